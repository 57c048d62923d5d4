"""A whole training step: teacher forward, student forward, loss, backward, optimiser."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from peers import KINDS
from torch import Tensor, nn

import otkd

_LOGIT_SCALE = 3.5  # as in a trained model; with fresh weights the distributions are almost uniform
_DISAGREEMENT = 0.03  # noise on the student's weights, in units of the teacher's standard deviation


@dataclass(frozen=True)
class StepSpec:
    """Sizes of two models and a batch of random tokens: GPT-2, or BERT if there are classes.

    The GPT-2 student is the teacher with noise on its weights. The BERT student has half of the
    teacher's layers.
    """

    vocab: int = 30_522
    layers: int = 6
    width: int = 384
    heads: int = 6
    sequences: int = 16
    length: int = 128
    classes: int = 0
    seed: int = 0
    device: str = "cpu"

    @property
    def logits_bytes(self) -> int:
        """N·V·4, the unit in which memory is reported."""
        if self.classes:
            return self.sequences * self.classes * 4
        return self.sequences * self.length * self.vocab * 4


TINY = StepSpec(vocab=2100, layers=1, width=16, heads=2, sequences=2, length=8)
"""A tiny language model, with more tokens than the support ``"auto"`` treats as a whole."""


@functools.lru_cache(maxsize=1)
def models(spec: StepSpec) -> tuple[nn.Module, nn.Module]:
    """Student and teacher."""
    torch.manual_seed(spec.seed)
    student, teacher = _classifiers(spec) if spec.classes else _language_models(spec)
    return student.to(spec.device), teacher.to(spec.device)


def _language_models(spec: StepSpec) -> tuple[nn.Module, nn.Module]:
    from transformers import GPT2Config, GPT2LMHeadModel

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


def _classifiers(spec: StepSpec) -> tuple[nn.Module, nn.Module]:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=spec.vocab,
        num_hidden_layers=spec.layers,
        hidden_size=spec.width,
        num_attention_heads=spec.heads,
        intermediate_size=4 * spec.width,
        max_position_embeddings=spec.length,
        num_labels=spec.classes,
    )
    teacher = BertForSequenceClassification(config).eval().requires_grad_(False)
    config = copy.deepcopy(config)
    config.num_hidden_layers = (spec.layers + 1) // 2
    student = BertForSequenceClassification(config).train()
    for model in (student, teacher):
        nn.init.normal_(model.classifier.weight, std=_LOGIT_SCALE / spec.width**0.5)
    return student, teacher


class FromStates:
    """TRL's chunked JSD, which computes the logits from the last hidden states, tile by tile.

    A tile has up to 4,096 positions and 32,768 tokens.
    """

    def __call__(self, student: nn.Module, teacher: nn.Module, tokens: Tensor) -> Tensor:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        with torch.no_grad():
            known = teacher.transformer(tokens).last_hidden_state.flatten(0, 1)
        states = student.transformer(tokens).last_hidden_state.flatten(0, 1)
        heads = (states, student.lm_head.weight, None, known, teacher.lm_head.weight, None)
        # β, temperature, and for either side a scale of the logits and no soft cap.
        values, _ = ChunkedDivergenceFunction.apply(*heads, 0.5, 1.0, 1.0, None, 1.0, None)
        return values.mean()


class Step:
    """One step of AdamW; every call trains on the same tokens.

    Args:
        spec: the models and the tokens.
        loss: a key of ``LANGUAGE_LOSSES`` or ``CLASS_LOSSES``.
    """

    def __init__(self, spec: StepSpec, loss: str):
        self.student, self.teacher = models(spec)
        make = (CLASS_LOSSES if spec.classes else LANGUAGE_LOSSES)[loss]
        self.loss = make(self.teacher)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-6)
        generator = torch.Generator().manual_seed(spec.seed)
        shape = spec.sequences, spec.length
        self.tokens = torch.randint(spec.vocab, shape, generator=generator).to(spec.device)
        # Only the losses with hard labels read them.
        labels = torch.arange(spec.sequences) % max(1, spec.classes)
        self.labels = labels.to(spec.device) if spec.classes else None

    def __call__(self) -> None:
        if isinstance(self.loss, FromStates):
            value = self.loss(self.student, self.teacher, self.tokens)
        else:
            with torch.no_grad():
                teacher_logits = self.teacher(self.tokens).logits
            student_logits = self.student(self.tokens).logits
            value = self.loss(student_logits, teacher_logits, labels=self.labels)
        value.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def report(self):
        """The solver's report on the last call; None for a loss without one."""
        return getattr(self.loss, "last_report", None)


def prepare_job(arguments: dict, *, tiny: bool) -> Step:
    """The call of another process; ``tiny`` for its warm-up. See :func:`measure.peak_memory`."""
    spec = StepSpec(**arguments["spec"])
    if tiny:
        small = {"layers": 1, "width": 8, "heads": 1, "length": 4}
        spec = replace(spec, **small, vocab=2100, sequences=2 if spec.classes else 1)
    return Step(spec, arguments["loss"])


def _mean_of(kind: str) -> Callable[[nn.Module], Callable]:
    """The mean over positions of a peer that is not a module of otkd."""

    def make(teacher: nn.Module) -> Callable:
        function = KINDS[kind](None)

        def loss(student_logits: Tensor, teacher_logits: Tensor, labels=None) -> Tensor:
            return function(student_logits.flatten(0, -2), teacher_logits.flatten(0, -2)).mean()

        return loss

    return make


def _named(name: str, **options) -> Callable[[nn.Module], nn.Module]:
    return lambda teacher: otkd.losses.get_loss(name, **options)


_OTHERS = {
    "F.kl_div": _mean_of("kl_div"),
    "torchdistill KDLoss": _mean_of("torchdistill"),
    "TRL generalized JSD": _mean_of("trl_jsd"),
}
LANGUAGE_LOSSES: dict[str, Callable[[nn.Module], Callable]] = {
    "kl": _named("kl"),
    "rkl": _named("rkl"),
    "jsd": _named("jsd"),
    "tvd": _named("tvd"),
    "skl": _named("skl"),
    "akl": _named("akl"),
    "uld": _named("uld"),
    "sinkhorn": lambda teacher: otkd.SinkhornLoss(embedding=teacher.get_input_embeddings().weight),
    **_OTHERS,
    "TRL chunked JSD": lambda teacher: FromStates(),
}
CLASS_LOSSES: dict[str, Callable[[nn.Module], Callable]] = {
    "kl": _named("kl"),
    "rkl": _named("rkl"),
    "jsd": _named("jsd"),
    "tvd": _named("tvd"),
    "sinkhorn, discrete": _named("sinkhorn", cost="discrete"),
    "batch_sinkhorn, debiased": _named("batch_sinkhorn", debias=True),
    # As measured before batch transport was debiased by default.
    "sinkd": lambda teacher: otkd.SinKDLoss(
        sinkhorn_weight=0.8, transport=otkd.BatchSinkhornLoss(debias=False)
    ),
    "SinKD's public code": lambda teacher: otkd.SinKDLoss.author(),
    **_OTHERS,
}
