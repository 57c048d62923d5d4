"""Answers of a teacher in a file, which an interrupted generation continues."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from otkd.tasks.causal_lm.answers import BATCH, batches_of, sampled_answers
from otkd.tasks.causal_lm.instructions import Instruction

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def write_answers(
    file: Path,
    partial: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[tuple[Instruction, list[int]]],
    *,
    max_new_tokens: int,
    seed: int,
    on_batches: Callable[[int], object],
) -> None:
    """Sample an answer to every prompt at temperature 1 into a file of JSON lines.

    The file has a row for each prompt, which :func:`read_instructions` reads if no answer is empty.
    An interrupted generation continues after its last whole batch, and has the answers of an
    uninterrupted one.

    Args:
        file: that is written when all answers are there.
        partial: the file of an unfinished generation with the same arguments.
        model: in any mode.
        tokenizer: with a padding token.
        prompts: rows with the tokens of their prompts, from :func:`fitting_prompts`.
        max_new_tokens: largest number of tokens of an answer.
        seed: of the first batch.
        on_batches: counts the batches; those that an interrupted generation wrote, first.
    """
    lines = [*_whole_lines(partial)]
    done = len(lines) // BATCH if len(lines) < len(prompts) else batches_of(prompts)
    partial.write_text("".join(lines[: done * BATCH]), encoding="utf-8")
    on_batches(done)
    left = prompts[done * BATCH :]
    batches = sampled_answers(
        model,
        tokenizer,
        [tokens for _, tokens in left],
        max_new_tokens=max_new_tokens,
        seed=seed + done,
        batch_size=BATCH,
    )
    rows = iter([row for row, _ in left])
    with partial.open("a", encoding="utf-8") as output:
        for answers in batches:
            for answer in answers:
                output.write(json.dumps(next(rows).answered(answer)) + "\n")
            output.flush()
            on_batches(1)
        os.fsync(output.fileno())
    os.replace(partial, file)


def read_answers(file: Path) -> list[str]:
    """The answers in a file of :func:`write_answers`, some of which may be empty."""
    return [_answer_of(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _answer_of(line: str) -> str:
    row = json.loads(line)
    return row["messages"][-1]["content"] if "messages" in row else row["output"]


def _whole_lines(path: Path) -> Iterator[str]:
    """The lines of an interrupted generation, without one that is cut."""
    if path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        yield from (line for line in lines if line.endswith("\n"))
