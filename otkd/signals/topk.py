"""A stored teacher that keeps the heaviest tokens of each position and their masses."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from otkd.checks import check_one_logits, check_positive
from otkd.precision import compute_dtype
from otkd.signals.checks import check_distributions, check_shapes
from otkd.signals.files import load_tensors, save_tensors
from otkd.signals.self_term import SelfTermSettings

if TYPE_CHECKING:
    from otkd.losses.transport import SinkhornLoss

_BLOCK_ELEMENTS = 2**24


@dataclass(frozen=True, repr=False)
class TopKSignal:
    """The k heaviest tokens of a teacher at each position, and their masses.

    ``SinkhornLoss`` with a :class:`~otkd.supports.TopK` support reads it as it is: the atoms of a
    position are the stored tokens, the student's heaviest and one for all others, which has the
    teacher's mass that is not stored. Any other loss sees :meth:`logits`.

    Attributes:
        tokens: ``(examples, *positions, k)``, int32 or int64; distinct at each position.
        log_masses: log-probabilities of these tokens at ``temperature``, of the same shape; in half
            precision the mass of all others, which is what is left of 1, has an error of about 1e-3
            (float16) or 1e-2 (bfloat16).
        vocab_size: number of tokens of the teacher.
        temperature: divided the teacher's logits.
        self_potential: ``(examples, *positions, k + 1)`` or None: the potential f of the teacher's
            self-term on its tokens and the tail, with OT_ε(p, p) = 2·⟨p, f⟩; see
            :meth:`with_self_term`.
        self_settings: what it was made for.

    Raises:
        ValueError: for shapes or dtypes other than these, or settings out of range.
    """

    tokens: Tensor
    log_masses: Tensor
    vocab_size: int
    temperature: float = 1.0
    self_potential: Tensor | None = None
    self_settings: SelfTermSettings | None = None

    def __post_init__(self):
        check_shapes(self)

    @classmethod
    def of(
        cls,
        teacher_logits: Float[Tensor, "*batch vocab"],
        k: int,
        temperature: float = 1.0,
        dtype: torch.dtype | None = None,
    ) -> TopKSignal:
        """The signal of dense logits, heaviest token first; all tokens where there are only k.

        Args:
            teacher_logits: ``(*batch, vocab)``.
            k: tokens kept of each position, at least 1.
            temperature: divides the logits; a loss that reads the signal must have it, too.
            dtype: of ``log_masses``; by default float32, or float64 for float64 logits.

        Raises:
            TypeError, ValueError: for logits that are none, or settings out of range.
        """
        check_one_logits("teacher_logits", teacher_logits)
        check_positive(temperature=temperature)
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k!r}")
        vocab = teacher_logits.shape[-1]
        precision = compute_dtype(teacher_logits)
        rows = teacher_logits.detach().reshape(-1, vocab)
        tokens = rows.new_empty(len(rows), min(k, vocab), dtype=torch.int32)
        log_masses = torch.empty_like(tokens, dtype=dtype or precision)
        for block in torch.arange(len(rows), device=rows.device).split(_block_rows(vocab)):
            logits = rows[block].to(precision) / temperature
            heaviest, chosen = logits.topk(tokens.shape[-1])
            tokens[block] = chosen.to(tokens.dtype)
            normaliser = logits.logsumexp(-1, keepdim=True)
            log_masses[block] = (heaviest - normaliser).to(log_masses.dtype)
        shape = (*teacher_logits.shape[:-1], tokens.shape[-1])
        return cls(tokens.reshape(shape), log_masses.reshape(shape), vocab, temperature)

    @classmethod
    def cat(cls, signals: Sequence[TopKSignal]) -> TopKSignal:
        """The examples of several signals, such as those of one batch each, in this order.

        Raises:
            ValueError: if there is none, or they differ in more than their number of examples.
        """
        kinds = {(s.shape[1:], s.k, s.temperature, s.self_settings) for s in signals}
        if len(kinds) != 1:
            raise ValueError(
                "signals that become one must differ in their number of examples alone, got "
                f"{', '.join(map(repr, signals)) or 'none'}; with_length() makes lengths equal"
            )
        first = signals[0]
        potentials = [s.self_potential for s in signals if s.self_potential is not None]
        return replace(
            first,
            tokens=torch.cat([s.tokens for s in signals]),
            log_masses=torch.cat([s.log_masses for s in signals]),
            self_potential=torch.cat(potentials) if potentials else None,
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the logits it stands for, ``(*batch, vocab)``."""
        return (*self.tokens.shape[:-1], self.vocab_size)

    @property
    def k(self) -> int:
        """Number of tokens stored of each position."""
        return self.tokens.shape[-1]

    @property
    def tail_mass(self) -> Tensor:
        """What the tokens that are not stored have together, ``(*batch,)``."""
        return self.masses()[..., -1]

    def __repr__(self) -> str:
        known = "" if self.self_settings is None else ", with self-term"
        return f"TopKSignal({self.shape}, k={self.k}, temperature={self.temperature}{known})"

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __getitem__(self, index) -> TopKSignal:
        part = self._map(lambda tensor: tensor[index])
        if part.k != self.k:
            raise IndexError(
                f"{index!r} takes tokens away: only the batch {self.shape[:-1]} can be"
            )
        return part

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TopKSignal:
        """The same signal on ``device``."""
        if self.tokens.device == torch.device(device):
            return self
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def with_length(self, length: int) -> TopKSignal:
        """The first ``length`` positions of each example, ``(examples, length, …)``.

        Where fewer are stored the others have NaN masses, which a loss refuses where they count.
        """
        missing = length - self.tokens.shape[1]
        if missing <= 0:
            return self[:, :length]
        return self._map(lambda tensor: _lengthened(tensor, missing))

    def flatten(self) -> TopKSignal:
        """The same positions with one batch dimension."""
        return self._map(lambda tensor: tensor.reshape(-1, tensor.shape[-1]))

    def masses(self, dtype: torch.dtype | None = None) -> Shaped[Tensor, "*batch atoms"]:
        """Masses of the stored tokens and, last, of all others: ``(*batch, k + 1)``; they sum to 1.

        In float32 at least. Where rounding lifts the stored masses above 1 they are divided by
        their sum, and so they are where all tokens are stored.
        """
        stored = self.log_masses.to(dtype or compute_dtype(self.log_masses)).exp()
        total = stored.sum(-1, keepdim=True)
        if self.k == self.vocab_size:
            return torch.cat([stored / total, torch.zeros_like(total)], -1)
        # NaN, where there is no teacher, stays NaN.
        return torch.cat([stored / total.clamp(min=1), (1 - total).clamp(min=0)], -1)

    def logits(self, counted: Tensor | None = None) -> Tensor:
        """Dense logits of a teacher whose other tokens share the mass left to them evenly.

        ``(*batch, vocab)``, with ``softmax(logits / temperature)`` of the stored masses at the
        stored tokens. The teacher did not spread that mass evenly: values and gradients are those
        of this stand-in. They are free of it in ``SinkhornLoss(support=TopK(k))`` alone, where the
        other tokens are one atom. What is left is taken to be at least the rounding error of 1, so
        that no token is without mass that may have had some.

        Args:
            counted: boolean ``(*batch,)``: the positions that are checked; all by default.

        Raises:
            ValueError: see :meth:`validate`.
        """
        (self if counted is None else self[counted]).validate()
        masses = self.masses()
        rest = masses[..., -1:].clamp(min=torch.finfo(masses.dtype).eps)
        others = (rest / max(1, self.vocab_size - self.k)).log()
        logits = others.expand(self.shape).clone()
        logits.scatter_(-1, self.tokens.long(), masses[..., :-1].log())
        return logits.mul_(self.temperature)

    def without_logits(self) -> Tensor:
        """NaN in the shape of :meth:`logits` and without its memory: what stands for them."""
        return self.log_masses.new_full((), torch.nan).expand(self.shape)

    def validate(self) -> TopKSignal:
        """Itself, if every position is a distribution over distinct tokens of the vocabulary.

        Positions without a teacher may hold NaN masses.

        Raises:
            ValueError: for a token that is repeated or not in the vocabulary, or masses of a
                position that add up to more than 1.
        """
        check_distributions(self)
        return self

    def check_temperature(self, temperature: float) -> None:
        """Raise ``ValueError`` unless a loss has the temperature for which the masses are."""
        if not math.isclose(self.temperature, temperature, rel_tol=1e-6):
            raise ValueError(
                f"the stored teacher's masses are at temperature {self.temperature} but the loss "
                f"takes the teacher's at {temperature}: set teacher_temperature="
                f"{self.temperature}, or store the signal at the temperature of the loss"
            )

    def check_vocabulary(self, size: int) -> None:
        """Raise ``ValueError`` unless these are the tokens among which a loss transports."""
        if self.vocab_size != size:
            raise ValueError(
                f"the stored teacher has {self.vocab_size} tokens, of which the loss uses {size}: "
                "store it from logits[..., :vocab_size], as masses cannot be taken from it"
            )

    def with_self_term(self, loss: SinkhornLoss) -> TopKSignal:
        """The same signal with the potential of OT_ε(p, p), solved once for all steps to come.

        That term has no gradient in the student, and does not depend on the student's tokens, on
        which p has no mass.

        Args:
            loss: the loss that is to read the signal; its cost, ε and solver settings are taken.

        Raises:
            ValueError: if the loss has no such term that could be kept: it needs a ``TopK`` support
                with a tail, ``debias``, the dual value, held marginals and a constant cost.
        """
        from otkd.supports.stored import solve_self_term

        self.check_temperature(loss.teacher_temperature or loss.temperature)
        potential, settings = solve_self_term(self, loss.cost, loss.support, loss.solver_options)
        return replace(self, self_potential=potential, self_settings=settings)

    def save(self, path: str | os.PathLike) -> None:
        """Write the signal to a safetensors file, whole or not at all."""
        tensors = {"tokens": self.tokens, "log_masses": self.log_masses}
        metadata = {"vocab_size": str(self.vocab_size), "temperature": repr(self.temperature)}
        if self.self_potential is not None and self.self_settings is not None:
            tensors["self_potential"] = self.self_potential
            metadata["self_settings"] = json.dumps(self.self_settings)
        save_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike) -> TopKSignal:
        """Read a signal written by :meth:`save`.

        Raises:
            ValueError: if it is no safetensors file, or what it holds is no such signal.
        """
        tensors, metadata = load_tensors(path, "tokens", "log_masses")
        try:
            settings = None
            if "self_settings" in metadata:
                epsilon, costs = json.loads(metadata["self_settings"])
                settings = SelfTermSettings(float(epsilon), tuple(map(float, costs)))
            vocab_size = int(metadata["vocab_size"])
            temperature = float(metadata["temperature"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the settings in {path} are missing or damaged: {error!r}") from error
        try:
            return cls(
                tensors["tokens"],
                tensors["log_masses"],
                vocab_size,
                temperature,
                tensors.get("self_potential"),
                settings,
            ).validate()
        except ValueError as error:
            raise ValueError(f"{path} holds no sound signal: {error}") from error

    def _map(self, change) -> TopKSignal:
        potential = self.self_potential
        return replace(
            self,
            tokens=change(self.tokens),
            log_masses=change(self.log_masses),
            self_potential=None if potential is None else change(potential),
        )


def _lengthened(tensor: Tensor, missing: int) -> Tensor:
    filling = tensor.new_empty(len(tensor), missing, *tensor.shape[2:])
    if filling.is_floating_point():
        filling.fill_(torch.nan)
    else:  # tokens, which are distinct
        filling.copy_(torch.arange(tensor.shape[-1]))
    return torch.cat([tensor, filling], 1)


def _block_rows(vocab: int) -> int:
    return max(1, _BLOCK_ELEMENTS // vocab)
