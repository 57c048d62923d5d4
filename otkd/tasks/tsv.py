"""Strict reading of tab-separated files; every error names the file and the line."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

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

    Lines are counted from 1, including the header and empty lines. Quote characters are literal.
    Empty lines are skipped, and a byte-order mark is removed.

    Args:
        path: the file, in UTF-8.
        columns: the columns to return, in this order.
        header: the columns of a file without a header line; otherwise the first line names them.
        skip_short_rows: skip rows with too few fields, and log one warning.

    Raises:
        DataError: if the file cannot be read or is not text, a column is missing or repeated, or a
            row has a wrong number of fields.
    """
    try:
        # Bytes that are not UTF-8 become surrogates, by which their line is found.
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            rows = csv.reader(_text_lines(path, file), delimiter="\t", quoting=csv.QUOTE_NONE)
            try:
                yield from _read_rows(path, rows, columns, header, skip_short_rows)
            except csv.Error as error:
                raise DataError(f"{path}, line {rows.line_num}: {error}.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def _read_rows(
    path: Path,
    rows: Any,
    columns: Sequence[str],
    header: Sequence[str] | None,
    skip_short_rows: bool,
) -> Iterator[tuple[int, tuple[str, ...]]]:
    if header is None:
        header = next(filter(None, rows), None)
        if header is None:
            raise DataError(f"{path} is empty; expected a header line.")
        _check_header(f"{path}, line {rows.line_num}", header, columns)
    wanted = [header.index(column) for column in columns]
    skipped = 0
    for row in filter(None, rows):
        if skip_short_rows and len(row) < len(header):
            skipped += 1
            continue
        if len(row) != len(header):
            raise DataError(
                f"{path}, line {rows.line_num}: {len(row)} tab-separated fields; "
                f"expected {len(header)} ({', '.join(header)})."
            )
        yield rows.line_num, tuple(row[index] for index in wanted)
    if skipped:
        logger.warning("%s: left out %d lines with too few fields", path, skipped)


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


def _text_lines(path: Path, file: Iterable[str]) -> Iterator[str]:
    """The lines of ``file``, unless one is not UTF-8 text."""
    for number, line in enumerate(file, 1):
        if "\0" in line:
            raise DataError(f"{path}, line {number}: a NUL byte; expected UTF-8 text.")
        if not line.isascii():
            try:
                line.encode("utf-8")
            except UnicodeEncodeError as error:
                byte = ord(line[error.start]) - 0xDC00
                raise DataError(
                    f"{path}, line {number}: the byte 0x{byte:02x} is not UTF-8 text; "
                    "save the file as UTF-8."
                ) from error
        yield line
