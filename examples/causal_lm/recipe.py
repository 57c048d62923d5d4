"""What the recipes share: their options, messages, and the models and rows that they need."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import typer
from transformers import HfArgumentParser, TrainingArguments, set_seed

from otkd.cli.console import notice, reporting
from otkd.extras import missing
from otkd.study.grid import check_writable
from otkd.study.messages import StudyError, quiet_libraries
from otkd.study.models import load
from otkd.tasks.causal_lm import Instruction, packaged_teacher, read_instructions, student_of

DATA = str(Path(__file__).with_name("instructions.jsonl"))
# The experiment of MiniLLM and DistiLLM with GPT-2, apart from the learning rate of the method.
DEFAULTS = {
    "learning_rate": 5e-4,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.01,
    "seed": 10,
    "report_to": "none",
    "logging_steps": 1,
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "dataloader_pin_memory": torch.cuda.is_available(),
}


def option(default: Any, text: str) -> Any:
    """A field of a dataclass of options, with its help."""
    return field(default=default, metadata={"help": text})


@dataclass
class Setup:
    """Models and data."""

    teacher: str | None = option(None, "Hub name or folder; by default SmolLM2-135M-Instruct.")
    student: str | None = option(None, "Hub name or folder; by default layers of the teacher.")
    student_layers: int = option(6, "Layers of the teacher in a student made from it.")
    train_file: str = option(DATA, "JSONL or hub data set, with instructions or messages.")
    eval_rows: int = option(0, "Hold out this many rows at the start for evaluation.")
    max_length: int = option(512, "Most tokens of prompt and answer.")
    skip_long_prompts: bool = option(False, "Leave rows out whose prompt is too long, and warn.")
    lora_r: int = option(0, "Train LoRA adapters of this rank on all linear layers.")


@dataclass
class Materials:
    """What a recipe trains: checked models, their tokenizer, and rows.

    ``vocab_size`` is for the losses: the number of tokens if one of the models has more logits than
    the other, and None if their sizes are equal.
    """

    teacher: Any
    student: Any
    tokenizer: Any
    train: list[Instruction]
    held_out: list[Instruction]
    vocab_size: int | None = None


def parse(name: str, argv: Sequence[str] | None, *kinds: type, **defaults: Any) -> tuple[Any, ...]:
    """The options of a recipe as instances of dataclasses; ``defaults`` replace theirs."""
    parser = HfArgumentParser(kinds, description=f"See the head of {name}.py.")
    known = {option.name for kind in kinds for option in fields(kind)}
    every = {"output_dir": f"results/{name}", **DEFAULTS, **defaults}
    parser.set_defaults(**{key: value for key, value in every.items() if key in known})
    with warnings.catch_warnings():
        _ignore_renamed()
        return parser.parse_args_into_dataclasses(None if argv is None else list(argv))


def _ignore_renamed() -> None:
    """Peft and TRL use names that this version of transformers has replaced."""
    warnings.filterwarnings("ignore", ".*will be removed in v6", FutureWarning)


@contextmanager
def messages(output_dir: str, *, resumes: bool = True) -> Iterator[None]:
    """Errors that a user can correct become a sentence and a status, and so does Ctrl-C."""
    try:
        with reporting(Path(output_dir), resumes=resumes):
            quiet_libraries()
            _ignore_renamed()
            check_writable(Path(output_dir))
            yield
    except typer.Exit as end:
        raise SystemExit(end.exit_code) from end.__cause__


def prepare(setup: Setup, args: TrainingArguments, *, needs_teacher: bool = True) -> Materials:
    """Load and check models, tokenizers and rows.

    Raises:
        StudyError, DataError: if they cannot be read, or do not fit together.
    """
    held_out, rows = split_rows(setup)
    teacher = tokenizer = None
    if needs_teacher or setup.student is None:
        teacher, tokenizer = load_teacher(setup.teacher)
    student, tokenizer = _student(setup, teacher, tokenizer)
    models = {"student": student, "teacher": teacher} if needs_teacher else {"student": student}
    for role, model in models.items():
        refuse_sizes(role, model, tokenizer, setup.max_length)
    sizes = {model.config.vocab_size for model in models.values()}
    return Materials(
        teacher=teacher.to(args.device) if needs_teacher else None,
        student=with_adapters(student, setup.lora_r, args.seed),
        tokenizer=tokenizer,
        train=rows,
        held_out=held_out,
        vocab_size=min(sizes) if len(sizes) > 1 else None,
    )


def split_rows(setup: Setup) -> tuple[list[Instruction], list[Instruction]]:
    """The rows that are held out, and those of the training."""
    rows = read_instructions(setup.train_file)
    if not 0 <= setup.eval_rows < len(rows):
        raise StudyError(
            f"--eval-rows {setup.eval_rows}: {setup.train_file} has {len(rows)} rows, of which at "
            "least one must be left for training."
        )
    return rows[: setup.eval_rows], rows[setup.eval_rows :]


def load_teacher(source: str | None) -> tuple[Any, Any]:
    """A teacher in evaluation mode, and its tokenizer; by default the packaged model."""
    if source is None:
        notice("The teacher is loaded. The first time it is converted, which takes up to a minute.")
        model, tokenizer = packaged_teacher()
    else:
        model = load_model(source)
        tokenizer = load("AutoTokenizer", source)
    return model.eval(), with_padding(tokenizer)


def _student(setup: Setup, teacher: Any, tokenizer: Any) -> tuple[Any, Any]:
    if setup.student is None:
        return layers_of(teacher, setup), tokenizer
    own = load("AutoTokenizer", setup.student)
    if tokenizer is None:
        tokenizer = with_padding(own)
    check_same_tokens(own, tokenizer)
    return load_model(setup.student).train(), tokenizer


def layers_of(teacher: Any, setup: Setup) -> Any:
    """A student of some layers of the teacher."""
    try:
        return student_of(teacher, setup.student_layers)
    except ValueError as error:
        raise StudyError(f"--student-layers {setup.student_layers}: {error}.") from error


def load_model(source: str) -> Any:
    """A causal language model in float32; ``StudyError`` if it cannot be loaded."""
    return load("AutoModelForCausalLM", source, dtype=torch.float32)


def with_padding(tokenizer: Any) -> Any:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_same_tokens(student: Any, teacher: Any) -> None:
    """Raise ``StudyError`` for tokenizers that differ."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return
    token = next(t for t in sorted({*ours, *theirs}) if ours.get(t) != theirs.get(t))
    ids = [vocabulary.get(token, "missing") for vocabulary in (ours, theirs)]
    raise StudyError(
        f"The tokenizers of student and teacher differ: they have {len(ours):,} and "
        f"{len(theirs):,} tokens, and {token!r} is {ids[0]} in one and {ids[1]} in the other. The "
        "recipes give both models the same tokens: choose a student with the teacher's tokenizer."
    )


def refuse_sizes(role: str, model: Any, tokenizer: Any, max_length: int) -> None:
    """Raise ``StudyError`` for a model with too few tokens or too short a context."""
    tokens = model.config.vocab_size
    context = getattr(model.config, "max_position_embeddings", max_length)  # some have no limit
    if len(tokenizer) > tokens:
        raise StudyError(
            f"The tokenizer has {len(tokenizer):,} tokens, but the {role} only {tokens:,}: "
            "they do not belong together."
        )
    if max_length > context:
        raise StudyError(
            f"--max-length {max_length}: the {role} reads at most {context:,} tokens, so "
            "choose a smaller length."
        )


def with_adapters(student: Any, rank: int, seed: int) -> Any:
    if not rank:
        return student
    message = missing("--lora-r", "peft", extra="recipes")
    if message:
        raise StudyError(message)
    from peft import LoraConfig, get_peft_model

    set_seed(seed)  # the adapters start at random
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(student, config)


def json_options(text: str) -> dict[str, Any]:
    """``--loss-args`` as a dictionary."""
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise StudyError(f"--loss-args {text} is not a JSON object: {error}") from error


@contextmanager
def refused_settings() -> Iterator[None]:
    """Settings that a trainer or a loss refuses become a message for the user."""
    try:
        yield
    except (ValueError, TypeError, ImportError) as error:
        raise StudyError(f"{str(error).rstrip('.')}.") from error
