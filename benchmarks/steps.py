"""A whole training step of a language model: teacher forward, student forward, loss, backward."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import nn

import otkd

_LOGIT_SCALE = 3.5  # a trained model's logits; those of fresh weights are all but uniform
_DISAGREEMENT = 0.03  # of the student's weights from the teacher's, in their standard deviation


@dataclass(frozen=True)
class StepSpec:
    """A GPT-2 of this size as student and as teacher, trained on random tokens."""

    vocab: int = 30_522
    layers: int = 6
    width: int = 384
    heads: int = 6
    sequences: int = 16
    length: int = 128
    seed: int = 0

    @property
    def logits_bytes(self) -> int:
        """N·V·4, the unit in which memory is reported."""
        return self.sequences * self.length * self.vocab * 4

    def as_dict(self) -> dict:
        """For JSON; ``StepSpec(**spec.as_dict())`` is the spec."""
        return asdict(self)


@functools.lru_cache(maxsize=1)
def models(spec: StepSpec) -> tuple[nn.Module, nn.Module]:
    """Student and teacher: the student is the teacher with noise on its weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(spec.seed)
    config = GPT2Config(
        vocab_size=spec.vocab,
        n_layer=spec.layers,
        n_embd=spec.width,
        n_head=spec.heads,
        n_positions=spec.length,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
        use_cache=False,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    teacher = GPT2LMHeadModel(config).eval().requires_grad_(False)
    nn.init.normal_(teacher.lm_head.weight, std=_LOGIT_SCALE / spec.width**0.5)
    student = copy.deepcopy(teacher).train().requires_grad_(True)
    with torch.no_grad():
        for weight in student.parameters():
            if weight.ndim > 1:
                weight.add_(torch.randn_like(weight), alpha=_DISAGREEMENT * weight.std().item())
    return student, teacher


class Step:
    """One step of AdamW; every call trains on the same tokens."""

    def __init__(self, spec: StepSpec, loss: str):
        self.student, self.teacher = models(spec)
        self.loss: Callable = otkd.KLLoss()
        if loss == "sinkhorn":
            self.loss = otkd.SinkhornLoss(embedding=self.teacher.get_input_embeddings().weight)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-6)
        generator = torch.Generator().manual_seed(spec.seed)
        shape = spec.sequences, spec.length
        self.tokens = torch.randint(spec.vocab, shape, generator=generator)

    def __call__(self) -> None:
        with torch.no_grad():
            teacher_logits = self.teacher(self.tokens).logits
        student_logits = self.student(self.tokens).logits
        self.loss(student_logits, teacher_logits).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def report(self):
        """What otkd's solver did in the last call."""
        return self.loss.last_report


def prepare_job(arguments: dict, *, tiny: bool) -> Step:
    """The call of another process; ``tiny`` for its warm-up. See :func:`measure.peak_memory`."""
    spec = StepSpec(**arguments["spec"])
    if tiny:
        spec = StepSpec(vocab=2100, layers=1, width=8, heads=1, sequences=1, length=4)
    return Step(spec, arguments["loss"])
