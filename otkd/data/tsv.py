"""Tab-separated files, read strictly: every complaint names the file and the line."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from otkd.data.tasks import DataError

logger = logging.getLogger(__name__)


def read_tsv(
    path: Path,
    columns: Sequence[str],
    *,
    header: Sequence[str] | None = None,
    skip_short_rows: bool = False,
) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield ``(line number, values of columns)`` for each row of a tab-separated file.

    Quote characters are literal. Empty lines are passed over; a byte-order mark is dropped.

    Args:
        path: the file, UTF-8.
        columns: the columns wanted, in the order wanted.
        header: the columns of a file that has no header line; else the first line names them.
        skip_short_rows: pass over rows with too few fields, with one warning in the log.

    Raises:
        DataError: if the file cannot be read, a column is missing, or a row has a wrong number of
            fields.
    """
    line = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            if header is None:
                header = next(rows, None)
                if header is None:
                    raise DataError(f"{path} is empty; expected a header line.")
            missing = [column for column in columns if column not in header]
            if missing:
                raise DataError(
                    f"{path}, line 1: no column {' or '.join(map(repr, missing))}; "
                    f"the header has {', '.join(header)}."
                )
            wanted = [header.index(column) for column in columns]
            skipped = 0
            for row in rows:
                line = rows.line_num
                if not row:
                    continue
                if skip_short_rows and len(row) < len(header):
                    skipped += 1
                    continue
                if len(row) != len(header):
                    raise DataError(
                        f"{path}, line {line}: {len(row)} tab-separated fields; "
                        f"expected {len(header)} ({', '.join(header)})."
                    )
                yield line, tuple(row[index] for index in wanted)
            if skipped:
                logger.warning("%s: left out %d lines with too few fields", path, skipped)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}.") from error
    except csv.Error as error:
        raise DataError(f"{path}, line {line + 1}: {error}.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
