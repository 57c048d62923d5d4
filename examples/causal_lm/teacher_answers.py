"""Answers that the teacher samples once and keeps in a file, for `seqkd.py` and `distillm2.py`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from recipe import Materials
from tqdm.auto import tqdm

from otkd.cli.console import notice
from otkd.files import write_json
from otkd.study.messages import StudyError
from otkd.tasks.causal_lm import Instruction, fitting_prompts
from otkd.tasks.causal_lm.answer_files import read_answers, write_answers
from otkd.tasks.causal_lm.answers import batches_of

_COMPARED = ("rows", "teacher_weights", "seed", "max_length", "skip_long_prompts", "eval_rows")


def answered_by_teacher(
    materials: Materials, settings: dict[str, Any], args: Any, file: Path, max_new_tokens: int
) -> list[Instruction]:
    """The training rows with the answers of the teacher, sampled at temperature 1.

    The file has a row for each prompt, in the format of `--train-file`. An interrupted generation
    continues after its last whole batch, and has the answers of an uninterrupted one.

    Args:
        materials: teacher, tokenizer and rows.
        settings: of the run; what the answers depend on is written beside the file.
        args: of the training.
        file: of the answers.
        max_new_tokens: largest number of tokens of an answer.

    Raises:
        StudyError: if the file was made with other settings, or all answers are empty.
        DataError: if a prompt leaves no room for an answer.
    """
    longest = settings["max_length"] - max_new_tokens
    if longest < 1:
        raise StudyError(
            f"Answers of {max_new_tokens} tokens leave no room for a prompt in --max-length "
            f"{settings['max_length']}."
        )
    prompts = fitting_prompts(
        materials.train, materials.tokenizer, longest, skip_long=settings["skip_long_prompts"]
    )
    made_of = {name: settings[name] for name in _COMPARED} | {"max_new_tokens": max_new_tokens}
    with args.main_process_first(local=False):
        _check(file, made_of)
        if not file.exists():
            with tqdm(desc="The teacher answers", total=batches_of(prompts)) as bar:
                write_answers(
                    file,
                    file.with_suffix(".partial.jsonl"),
                    materials.teacher,
                    materials.tokenizer,
                    prompts,
                    max_new_tokens=max_new_tokens,
                    seed=settings["seed"],
                    on_batches=bar.update,
                )
    answers = read_answers(file)
    pairs = zip(prompts, answers, strict=True)
    found = [replace(row, answers=(text,)) for (row, _), text in pairs if text.strip()]
    if not found:
        raise StudyError(f"All answers of the teacher in {file} are empty.")
    if len(found) < len(answers):
        notice(f"{len(answers) - len(found)} answers of the teacher are empty and left out.")
    return found


def _check(file: Path, made_of: dict[str, Any]) -> None:
    record = file.with_suffix(".made-of.json")
    if not record.exists():
        if file.exists():
            raise StudyError(f"{file} is not a file of this recipe: choose another --answers-file.")
        write_json(record, made_of)
    found = json.loads(record.read_text(encoding="utf-8"))
    differing = ", ".join(name for name, value in made_of.items() if found.get(name) != value)
    if differing:
        raise StudyError(
            f"The answers in {file} were made with other settings ({differing}): choose another "
            f"--answers-file, or remove it and {record.name}."
        )
