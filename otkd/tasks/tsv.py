"""Strict reading of tab-separated files; every error names the file and the line."""

from __future__ import annotations

import codecs
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from otkd.tasks.tasks import DataError

logger = logging.getLogger(__name__)


def read_tsv(
    path: Path,
    columns: Sequence[str],
    *,
    header: Sequence[str] | None = None,
    skip_short_rows: bool = False,
) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield ``(line number, values of columns)`` for each row of a tab-separated file.

    Lines are counted from 1, including the header and empty lines. Quote characters are literal,
    so that a row is its line split at tabs. Empty lines are skipped, and a byte-order mark is
    removed. (pandas fills short rows with NaN and does not report the line of an invalid byte.)

    Args:
        path: the file, in UTF-8.
        columns: the columns to return, in this order.
        header: the columns of a file without a header line; otherwise the first line names them.
        skip_short_rows: skip rows with too few fields, and log one warning.

    Raises:
        DataError: if the file cannot be read or is not text, a column is missing or repeated, or a
            row has a wrong number of fields.
    """
    skipped = 0
    for number, text in text_lines(path):
        where = f"{path}, line {number}"
        fields = text.split("\t")
        if header is None:
            header = fields
            _check_header(where, header, columns)
        elif len(fields) == len(header):
            yield number, tuple(fields[header.index(column)] for column in columns)
        elif skip_short_rows and len(fields) < len(header):
            skipped += 1
        else:
            raise DataError(
                f"{where}: {len(fields)} tab-separated fields; expected {len(header)} "
                f"({', '.join(header)})."
            )
    if header is None:
        raise DataError(f"{path} is empty; expected a header line.")
    if skipped:
        logger.warning("%s: left out %d lines with too few fields", path, skipped)


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield ``(line number, text)`` for each line of a UTF-8 file that is not empty.

    Lines are counted from 1, including empty ones. A byte-order mark is removed.

    Raises:
        DataError: if the file cannot be read, or a line is not text.
    """
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    for number, line in enumerate(lines, 1):
        if line:
            yield number, _text(f"{path}, line {number}", line)


def _text(where: str, line: bytes) -> str:
    if b"\0" in line:
        raise DataError(f"{where}: a NUL byte; expected UTF-8 text.")
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        byte = line[error.start]
        raise DataError(
            f"{where}: the byte 0x{byte:02x} is not UTF-8 text; save the file as UTF-8."
        ) from error


def _check_header(where: str, header: Sequence[str], columns: Sequence[str]) -> None:
    missing = [column for column in columns if column not in header]
    if missing:
        raise DataError(
            f"{where}: no column {' or '.join(map(repr, missing))}; "
            f"the header has {', '.join(header)}."
        )
    twice = [column for column in columns if header.count(column) > 1]
    if twice:
        raise DataError(
            f"{where}: the header has the column {twice[0]!r} {header.count(twice[0])} times; "
            "name each column once."
        )
