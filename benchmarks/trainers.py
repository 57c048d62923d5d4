"""Trainers as a user runs them: the same models, examples and arguments, with JSD."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable

import torch
from steps import StepSpec, models
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

import otkd
from otkd.integrations.transformers import DistillationTrainer

STEPS = 2
_COMMON = {
    "max_steps": STEPS,
    "learning_rate": 1e-6,
    "report_to": "none",
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
    "remove_unused_columns": False,
    "use_cpu": not torch.cuda.is_available(),
}
# The same objective; options that only TRL's configurations have are switched off.
_TRL = {
    "beta": 0.5,
    "temperature": 1.0,
    "gradient_checkpointing": False,
    "bf16": False,
    "disable_dropout": False,
}


def _otkd(spec: StepSpec) -> Trainer:
    student, teacher = models(spec)
    return DistillationTrainer(
        student,
        TrainingArguments(**arguments(spec)),
        train_dataset=_examples(spec),
        data_collator=_collate,
        loss=otkd.JSDLoss(),
        teacher=teacher,
    )


def _trl_gkd(spec: StepSpec) -> Trainer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of being experimental
        from trl.experimental.gkd import GKDConfig, GKDTrainer

    student, teacher = models(spec)
    no_generation = {"lmbda": 0.0}
    return GKDTrainer(
        student,
        teacher,
        GKDConfig(**arguments(spec), **_TRL, **no_generation),
        train_dataset=_examples(spec),
        data_collator=_collate,
        processing_class=_tokenizer(spec),
    )


def _trl_distillation(spec: StepSpec) -> Trainer:
    """It always generates completions; here it gets the rest of each example in their place.

    So all trainers do the same work; otherwise generation would take nearly all of its time.
    """
    import trl

    def given(examples: list[list[int]]) -> tuple:
        """Prompts and completions, neither tools nor images."""
        return [x[:1] for x in examples], [x[1:] for x in examples], None, None, []

    student, teacher = models(spec)
    trainer = trl.DistillationTrainer(
        student,
        teacher,
        trl.DistillationConfig(**arguments(spec), **_TRL),
        train_dataset=_examples(spec).rename_column("input_ids", "prompt"),
        processing_class=_tokenizer(spec),
    )
    trainer._generate = given
    return trainer


def arguments(spec: StepSpec) -> dict:
    """Of ``TrainingArguments``, the same for all trainers."""
    folder = tempfile.mkdtemp(prefix="otkd-bench-")  # nothing is saved there
    return {**_COMMON, "output_dir": folder, "per_device_train_batch_size": spec.sequences}


def _examples(spec: StepSpec):
    from datasets import Dataset

    generator = torch.Generator().manual_seed(spec.seed)
    shape = STEPS * spec.sequences, spec.length
    return Dataset.from_dict(
        {"input_ids": torch.randint(spec.vocab, shape, generator=generator).tolist()}
    )


def _collate(examples: list[dict]) -> dict[str, torch.Tensor]:
    tokens = torch.tensor([example["input_ids"] for example in examples])
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


def _tokenizer(spec: StepSpec) -> PreTrainedTokenizerFast:
    """What TRL's trainer wants to have; the examples are tokens already."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {f"t{index}": index for index in range(spec.vocab)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="t0"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="t0", eos_token="t0")


TRAINERS: dict[str, Callable[[StepSpec], Trainer]] = {
    "otkd DistillationTrainer": _otkd,
    "TRL GKDTrainer": _trl_gkd,
    "TRL DistillationTrainer, completions given": _trl_distillation,
}
