"""The demo's distillation: what a project of your own would do, from the teacher to the metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

import otkd
from otkd.cli.console import StepBar, notice
from otkd.integrations.transformers import DistillationTrainer
from otkd.study.memory import reset_peak_memory, resident_memory
from otkd.study.messages import StudyError
from otkd.study.models import load_language_model
from otkd.tasks.causal_lm import next_token_metrics, review_blocks, student_of

# Sequences of a training step, and of a forward pass that measures.
BATCH = 4
# Of the page that explains a position: at the price of training too little mass moves to be seen.
EXPLAINED_PRICE = 5.0
LEARNING_RATE, WARMUP_STEPS, SEED = 1e-3, 5, 0
NEW_TOKENS = 24
TEACHER, UNTRAINED, EXPLAINED = "teacher", "student, untrained", "student, transport KL"

Advance = Callable[[int], None]


def losses(embedding: Tensor) -> dict[str, nn.Module]:
    """The losses that are compared; ``embedding`` are the teacher's input embeddings."""
    return {
        "student, cross-entropy": otkd.CrossEntropyLoss(),
        "student, KL": otkd.KLLoss(),
        EXPLAINED: otkd.TransportKLLoss(embedding=embedding),
    }


@dataclass(frozen=True)
class Sizes:
    """Training steps, held-out reviews, tokens of a review, and layers of the student."""

    steps: int
    held_out: int
    length: int
    layers: int


@dataclass
class Demo:
    """The outcome.

    Attributes:
        sizes: those of the demo.
        prompt: of the continuations.
        models: the measurements of each model, by its name.
        explanation: of the token after the prompt.
        seconds: duration, with the time to load the teacher.
    """

    sizes: Sizes
    prompt: str
    models: dict[str, dict[str, Any]]
    explanation: str
    seconds: float


def distil(sizes: Sizes, prompt: str, teacher_folder: Path | None, bar: StepBar) -> Demo:
    """Train and measure a student for every loss.

    Raises:
        StudyError, DataError: if a package, a model or enough text is missing, the teacher has too
            few layers, or the prompt has no token.
    """
    start = time.perf_counter()
    notice("The teacher is loaded. The first time it is converted, which takes up to a minute.")
    teacher, tokenizer = load_language_model(teacher_folder)
    untrained = _student(teacher, sizes.layers)
    prompt_tokens = _tokens(tokenizer, prompt)
    embedding = teacher.get_input_embeddings().weight.detach()
    objectives = losses(embedding)
    texts, held_out = review_blocks(
        tokenizer, sizes.length, train=sizes.steps * BATCH, held_out=sizes.held_out
    )

    bar.plan(sizes.steps * (1 + len(objectives)) + -(-sizes.held_out // BATCH))
    advance = bar.start(TEACHER)
    # The teacher reads every text once, for all students. Its last hidden states are stored, from
    # which its head computes the same logits in every step.
    stored = stored_teacher(teacher, texts, advance)
    held_out_logits = torch.cat([*logits_of(teacher, held_out, advance)])

    def measured(model: Any, batches: Iterable[Tensor]) -> dict[str, Any]:
        text = tokenizer.decode(continuation(model, prompt_tokens), skip_special_tokens=True)
        return {**evaluate(batches, held_out, held_out_logits), "continuation": text}

    models = {
        TEACHER: measured(teacher, held_out_logits.split(BATCH)),
        UNTRAINED: measured(untrained, logits_of(untrained, held_out)),
    }
    del untrained
    explanation = ""
    for name, loss in objectives.items():
        student = _student(teacher, sizes.layers)
        costs = train(student, loss, stored, texts, sizes.steps, bar.start(name))
        models[name] = {**measured(student, logits_of(student, held_out)), **costs}
        if name == EXPLAINED:
            with torch.no_grad():
                ours, theirs = (each(prompt_tokens).logits[0, -1:] for each in (student, teacher))
            page = otkd.TransportKLLoss(embedding=embedding, price=EXPLAINED_PRICE)
            explanation = str(page.explain(ours, theirs, tokenizer, top=12))
    return Demo(
        sizes=sizes,
        prompt=prompt,
        models=models,
        explanation=explanation,
        seconds=time.perf_counter() - start,
    )


def stored_teacher(teacher: Any, tokens: Tensor, advance: Advance) -> otkd.HiddenStateTeacher:
    """The teacher's last hidden states at every position of ``(sequences, length)``."""
    states = []
    for rows in tokens.split(BATCH):
        with torch.no_grad():
            states.append(teacher.base_model(rows).last_hidden_state)
        advance(1)
    return otkd.HiddenStateTeacher(
        torch.cat(states), teacher.get_output_embeddings().weight.detach()
    )


def train(
    student: Any,
    loss: nn.Module,
    teacher: otkd.StoredTeacher,
    tokens: Tensor,
    steps: int,
    advance: Advance,
) -> dict[str, float | None]:
    """Train a student in place; returns its seconds per step and the peak memory of the process."""
    with TemporaryDirectory() as folder:  # nothing is saved, but the trainer wants one
        trainer = DistillationTrainer(
            model=student,
            loss=loss,
            teacher=teacher,
            train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
            args=TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=BATCH,
                learning_rate=LEARNING_RATE,
                warmup_steps=WARMUP_STEPS,
                seed=SEED,  # all losses see the texts in the same order
                use_cpu=True,  # the times and memory in the report are those of a CPU
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            callbacks=[_Count(advance)],
        )
        trainer.remove_callback(PrinterCallback)
        was_reset = reset_peak_memory()
        seconds = trainer.train().metrics["train_runtime"]
    return {
        "seconds_per_step": seconds / steps,
        "peak_bytes": resident_memory("VmHWM") if was_reset else None,
    }


class _Count(TrainerCallback):
    """Counts the steps for a progress bar."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._advance(1)


def evaluate(batches: Iterable[Tensor], tokens: Tensor, teacher_logits: Tensor) -> dict[str, float]:
    """Means over held-out positions.

    Args:
        batches: the logits of a student, or of the teacher itself, batch by batch.
        tokens: ``(sequences, length)``.
        teacher_logits: ``(sequences, length, vocab)``.

    Returns:
        ``cross_entropy`` of the texts; ``kl`` from the teacher, over all tokens; and ``agreement``,
        the share of positions at which both have the same most probable token.
    """
    kl = otkd.KLLoss(reduction="none")
    found: dict[str, list[Tensor]] = {"cross_entropy": [], "kl": [], "agreement": []}
    triples = zip(batches, teacher_logits.split(BATCH), tokens.split(BATCH), strict=True)
    for ours, theirs, rows in triples:
        ours, theirs, labels = ours[:, :-1], theirs[:, :-1], rows[:, 1:]
        values = {**next_token_metrics(ours, theirs, labels), "kl": kl(ours, theirs)}
        for name, parts in found.items():
            parts.append(values[name].double().flatten())
    return {name: torch.cat(parts).mean().item() for name, parts in found.items()}


def logits_of(
    model: Any, tokens: Tensor, advance: Advance = lambda steps: None
) -> Iterator[Tensor]:
    """The logits of each batch of ``tokens``, one after the other."""
    model.eval()
    for rows in tokens.split(BATCH):
        with torch.no_grad():
            yield model(rows).logits
        advance(1)


def continuation(model: Any, prompt: Tensor) -> Tensor:
    """The most probable next tokens after a prompt ``(1, length)``, chosen one by one."""
    model.eval()
    tokens = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
    )
    return tokens[0, prompt.shape[1] :]


def _student(teacher: Any, layers: int) -> Any:
    try:
        return student_of(teacher, layers)
    except ValueError as error:
        raise StudyError(f"{error}.") from error


def _tokens(tokenizer: Any, prompt: str) -> Tensor:
    tokens = tokenizer(prompt, return_tensors="pt").input_ids.long()
    if not tokens.numel():
        raise StudyError("--prompt has no token: give the beginning of a text.")
    return tokens
