"""The command `otkd align`: reads tokenizers and texts, and shows how they correspond."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from otkd.alignment import Audit, audit, normalized_for
from otkd.extras import missing
from otkd.files import write_json
from otkd.study.messages import StudyError


def align(
    student: str, teacher: str, text: Path, *, normalize: bool, worst: int, output: Path | None
) -> Audit:
    """Audit two tokenizers on the lines of a file, and write the result as JSON.

    Raises:
        StudyError: for tokenizers that cannot be read or aligned, or a file without text.
        OSError: if a file cannot be read or written.
    """
    if message := missing("This command", "transformers", extra="train"):
        raise StudyError(message)
    tokenizers = _tokenizer(student), _tokenizer(teacher)
    try:
        lines = [line for line in text.read_text(encoding="utf-8").split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise StudyError(f"{text} is not a text in UTF-8: {error}") from error
    if not lines:
        raise StudyError(f"{text} holds no text. Write one text per line.")
    try:
        if normalize:
            lines = [normalized_for(line, *tokenizers) for line in lines]
        found = audit(*tokenizers, lines, worst=worst)
    except (TypeError, ValueError) as error:
        hint = "" if normalize else " With --normalize, this command does so."
        raise StudyError(f"{error}.{hint if 'normalized_for' in str(error) else ''}") from error
    if output is not None:
        named = {"student": student, "teacher": teacher, "text": str(text), "normalize": normalize}
        write_json(output, {**named, **found.as_dict()})
    return found


def audit_tables(found: Audit) -> list[Table]:
    """The shares, and the worst tokens."""
    shares = Table(title="Positions and tokens", title_justify="left")
    shares.add_column("share of")
    shares.add_column("", justify="right")
    for side, share in found.boundary_share.items():
        shares.add_row(f"the {side}'s boundaries that are common", f"{share:.2%}")
    for name, share in found.coverage.items():
        shares.add_row(f"the teacher's tokens in the texts: {name}", f"{share:.2%}")
    for name, share in found.vocabulary.items():
        shares.add_row(f"the teacher's vocabulary: {name}", f"{share:.2%}")
    worst = Table(
        title="Most frequent tokens of the teacher without an exact match", title_justify="left"
    )
    for column in ("token", "share", "coverage", "student begins with"):
        worst.add_column(column, justify="right" if column == "share" else "left")
    for each in found.worst:
        begins = "" if each.student is None else repr(each.student)
        worst.add_row(repr(each.text), f"{each.share:.3%}", each.coverage, begins)
    return [shares, worst] if found.worst else [shares]


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        if Path(name).is_file():
            return PreTrainedTokenizerFast(tokenizer_file=name)
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:
        # transformers and tokenizers raise errors of many kinds, Exception itself among them.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise StudyError(f"{name} holds no tokenizer that can be read: {reason}") from error
