"""Trainers with one tokenizer and with two, on the same texts."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import replace

from steps import StepSpec, models
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers import models as token_models
from torch import nn
from trainers import STEPS, arguments
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

import otkd
from otkd.alignment import token_map
from otkd.integrations.transformers import DistillationTrainer
from otkd.tasks.causal_lm import padding_collator

_LETTERS = "etaoinshrdlucmfw"


def _words(spec: StepSpec) -> list[str]:
    """Random words, from which both tokenizers learn as many tokens as they may have."""
    generator = random.Random(spec.seed)
    return ["".join(generator.choices(_LETTERS, k=1 + i % 11)) for i in range(2 * spec.vocab)]


@functools.lru_cache(maxsize=1)
def texts(spec: StepSpec) -> list[str]:
    """Texts of words, the first of which are the most frequent; longer than ``spec.length``."""
    words = _words(spec)
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    generator = random.Random(spec.seed)
    return [
        " ".join(generator.choices(words, weights, k=2 * spec.length))
        for _ in range(STEPS * spec.sequences)
    ]


@functools.lru_cache(maxsize=2)
def tokenizer(spec: StepSpec, size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of ``size`` tokens, which cuts texts at ``spec.length``."""
    backend = Tokenizer(token_models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = byte_level
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|end|>"],
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((f" {word}" for word in _words(spec)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|end|>",
        pad_token="<|end|>",
        model_max_length=spec.length,
    )


def _trainer(spec: StepSpec, loss: Callable[..., nn.Module], *, two: bool) -> Trainer:
    ours = tokenizer(spec, 2 * spec.vocab // 3)
    theirs = tokenizer(spec, spec.vocab) if two else ours
    student, _ = models(replace(spec, vocab=len(ours)))
    _, teacher = models(replace(spec, vocab=len(theirs)))
    rows = [
        {"input_ids": ours(text, truncation=True, add_special_tokens=False).input_ids}
        for text in texts(spec)
    ]
    return DistillationTrainer(
        student,
        TrainingArguments(**arguments(spec)),
        train_dataset=[{**row, "labels": row["input_ids"]} for row in rows],
        data_collator=padding_collator(ours),
        processing_class=ours,
        teacher=teacher,
        teacher_tokenizer=theirs if two else None,
        loss=loss(ours, theirs),
    )


TWO_TOKENIZERS: dict[str, Callable[[StepSpec], Trainer]] = {
    "one tokenizer, KLLoss": lambda spec: _trainer(spec, lambda *_: otkd.KLLoss(), two=False),
    "two tokenizers, PushforwardLoss": lambda spec: _trainer(
        spec, lambda *pair: otkd.PushforwardLoss(token_map(*pair)), two=True
    ),
    "two tokenizers, UniversalLogitLoss": lambda spec: _trainer(
        spec, lambda *_: otkd.UniversalLogitLoss(), two=True
    ),
}
