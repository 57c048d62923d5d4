"""Teacher, tokens and the teacher's states, which are computed once and stored.

The logits of a language model are a linear function of its last hidden states, which are 85 times
smaller for SmolLM2. Storing the states in float32 and applying the head in every step gives the
logits of a forward pass at the price of the head.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pilot_protocol import Protocol
from safetensors.torch import load_file, save
from torch import Tensor, nn

from otkd.files import cache_folder, file_digest, written_whole
from otkd.study.messages import StudyError, notice
from otkd.study.models import load_language_model
from otkd.tasks.causal_lm import review_blocks

Part = Literal["train", "preparation", "held_out"]
# Sequences of a file, so that an interrupted computation continues.
_SHARD = 160


@dataclass(frozen=True)
class Sequences:
    """Sequences of one part of the reviews.

    Attributes:
        inputs: token ids, ``(sequences, length)``.
        labels: the next token of each position, ``(sequences, length)``.
        states: the teacher's last hidden states, ``(sequences, length, width)``, float32.
    """

    inputs: Tensor
    labels: Tensor
    states: Tensor


class Material:
    """What all runs share.

    Args:
        protocol: says how many sequences there are.
        teacher: folder of a language model and its tokenizer; None is the packaged one.
        progress: called with a description and a number of steps; returns what counts them.
    """

    def __init__(
        self,
        protocol: Protocol,
        teacher: Path | None,
        progress: Callable[[str, int], Callable[[int], None]],
    ) -> None:
        self._protocol, self._progress = protocol, progress
        self._parts: dict[str, Sequences] = {}
        self.teacher, self._tokenizer = _load_teacher(teacher)
        cache = cache_folder()
        if cache is None:
            raise StudyError("There is no home folder for the cache: set OTKD_CACHE to a folder.")
        self.cache = cache / "pilot"
        self.digest = file_digest(Path(self.teacher.config._name_or_path, "model.safetensors"))

    @property
    def embedding(self) -> Tensor:
        """The teacher's input embeddings ``(vocab, width)``."""
        return self.teacher.get_input_embeddings().weight.detach()

    def teacher_logits(self, states: Tensor) -> Tensor:
        """The teacher's logits from its last hidden states."""
        head: Any = self.teacher.get_output_embeddings()
        with torch.no_grad():
            return head(states)

    def sequences(self, part: Part) -> Sequences:
        """The sequences of a part; no review is in two parts."""
        if part not in self._parts:
            self._parts[part] = self._read(part)
        return self._parts[part]

    @cached_property
    def _tokens(self) -> dict[str, Tensor]:
        protocol = self._protocol
        path = self.cache / "tokens" / f"{self._key(protocol.length)}.safetensors"
        if not path.is_file():
            notice("Reviews are read and tokenised.")
            train, held_out = review_blocks(self._tokenizer, protocol.length + 1)
            with written_whole(path) as partial:
                partial.write_bytes(save({"train": train, "held_out": held_out}))
        blocks = load_file(path)
        train, held_out = blocks["train"], blocks["held_out"]
        for name, have, need in (
            ("sequences", len(train), 2 * protocol.sequences),
            ("held_out", len(held_out), protocol.held_out),
        ):
            if have < need:
                raise StudyError(
                    f"The protocol's {name} needs {need:,} reviews of {protocol.length + 1} "
                    f"tokens, but there are {have:,}."
                )
        return {
            "train": train[: protocol.sequences],
            "preparation": train[protocol.sequences : 2 * protocol.sequences],
            "held_out": held_out[: protocol.held_out],
        }

    def _read(self, part: Part) -> Sequences:
        tokens = self._tokens[part]
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        folder = self.cache / "states" / self._key(inputs)
        paths = [folder / f"{start}.safetensors" for start in range(0, len(inputs), _SHARD)]
        absent = [path for path in paths if not path.is_file()]
        if absent:
            advance = self._progress("teacher", len(absent))
            for path in absent:
                rows = inputs[int(path.stem) :][:_SHARD]
                with written_whole(path) as partial:
                    partial.write_bytes(save({"states": self._states(rows)}))
                advance(1)
        states = torch.cat([load_file(path)["states"] for path in paths])
        return Sequences(inputs, labels, states)

    def _states(self, inputs: Tensor) -> Tensor:
        base: nn.Module = self.teacher.base_model
        with torch.no_grad():
            return torch.cat([base(rows).last_hidden_state for rows in inputs.split(16)])

    def _key(self, content: Tensor | int) -> str:
        digest = hashlib.sha256(self.digest.encode())
        digest.update(
            content.numpy().data if isinstance(content, Tensor) else str(content).encode()
        )
        return digest.hexdigest()[:16]


def _load_teacher(folder: Path | None) -> tuple[Any, Any]:
    model, tokenizer = load_language_model(folder)
    if getattr(model.config, "final_logit_softcapping", None):
        raise StudyError(
            f"{folder}: the logits of a model with final_logit_softcapping are not a linear "
            "function of its states, which this study stores. Choose another teacher."
        )
    return model, tokenizer
