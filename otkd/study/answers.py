"""SeqKD: a student is trained on answers that its teacher gave once to the prompts of the rows."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from otkd.files import file_digest
from otkd.study.language import LanguageExperiment
from otkd.study.messages import notice
from otkd.study.ownership import remove
from otkd.study.reuse import TEACHER
from otkd.study.training import device
from otkd.study.work import claim
from otkd.tasks.causal_lm import fitting_prompts
from otkd.tasks.causal_lm.answer_files import read_answers, write_answers
from otkd.tasks.causal_lm.answers import batches_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from otkd.study.experiment import Experiment
    from otkd.study.interface import Rows

WORK = "answers.partial"
_SEED = 0


def answers_file(experiment: Experiment) -> str:
    """The name of the file of answers, which depends on their largest length."""
    return f"answers-{experiment.settings.answer_tokens}.jsonl"


def load_answers(path: Path, digest: str, rows: int) -> tuple[str, ...] | None:
    """The answers in a file, or None if they are to be generated again."""
    try:
        if file_digest(path) != digest:
            raise ValueError(f"{path} is not the file that was written")
        answers = tuple(read_answers(path))
        if len(answers) != rows:
            raise ValueError(f"{path} holds {len(answers)} answers, not {rows}")
    except (ValueError, KeyError) as error:
        notice(f"{error}; if a loss needs the teacher's answers, they are generated again.")
        return None
    return answers


def answer_batches(experiment: Experiment) -> int:
    """The steps of progress of :func:`generate_answers`."""
    return batches_of(experiment.data.train)


def generate_answers(
    experiment: Experiment,
    model: PreTrainedModel,
    folder: Path,
    digest: str,
    on_steps: Callable[[int], None],
) -> str:
    """Write the answers of a teacher to its folder, or go on writing; returns the file's name.

    Args:
        experiment: with the prompts.
        model: the teacher.
        folder: of the teacher.
        digest: of the teacher's outputs, to recognise the work of another one.
        on_steps: counts the batches.
    """
    name, tokenizer = answers_file(experiment), experiment.teacher_tokenizer
    chosen = experiment.settings
    made_of = {TEACHER: digest, "answer_tokens": chosen.answer_tokens}
    work = claim(folder / WORK, experiment.as_run(experiment.teacher_settings) | made_of)
    write_answers(
        work / "answers.jsonl",
        work / "answers-unfinished.jsonl",
        model.to(device()),  # pyright: ignore[reportArgumentType]
        tokenizer,
        fitting_prompts(experiment.data.train, tokenizer, chosen.max_length - 1),
        max_new_tokens=chosen.answer_tokens,
        seed=_SEED,
        on_batches=on_steps,
    )
    os.replace(work / "answers.jsonl", folder / name)
    remove(work)
    return name


def answered(experiment: Experiment, rows: Rows, answers: tuple[str, ...]) -> Rows:
    """The rows with these answers to the prompts of the training rows.

    An empty answer is kept: the teacher ended it at once, and so should the student. Every loss is
    then trained on the same number of rows.
    """
    assert isinstance(experiment, LanguageExperiment)  # others refuse such losses
    pairs = zip(experiment.data.train, answers, strict=True)
    every = [dataclasses.replace(row, answers=(text,)) for row, text in pairs]
    train = experiment.encoded(every, experiment.student_tokenizer)
    return dataclasses.replace(
        rows, train=train if rows.index is None else train.select(rows.index)
    )
