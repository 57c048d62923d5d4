"""How numbers and tables are written in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from otkd.cli.stats import Estimate, PairedDifference

NONE = "–"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], text: int = 1) -> str:
    """A table whose first columns are ``text`` and the others numbers, to the right."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    rule = ["---"] * text + ["---:"] * (len(header) - text)
    return "\n".join([line(header), line(rule), *map(line, rows)])


def percent(value: float) -> str:
    """A fraction of one × 100."""
    return f"{value * 100:.1f}".replace("-", "−")


def signed(value: float) -> str:
    """Likewise, with its sign."""
    return f"{value * 100:+.1f}".replace("-", "−")


def interval(value: Estimate) -> str:
    """Half the width of an interval; a dash where there is none."""
    return NONE if value.interval is None else percent(value.interval)


def mean(value: Estimate) -> str:
    """A mean with its interval."""
    return f"{percent(value.mean)} ± {interval(value)}"


def apart(value: PairedDifference | None, seeds: int = 0) -> str:
    """A difference with its interval, bold where that excludes 0.

    Args:
        value: the difference, or None.
        seeds: the number that goes without saying.
    """
    if value is None:
        return NONE
    text = f"{signed(value.mean)} ± {interval(value)}"
    text = f"**{text}**" if value.apart else text
    return text if len(value.seeds) == seeds else f"{text} ({count(len(value.seeds), 'seed')})"


def count(number: int, what: str) -> str:
    """``1 seed``, ``2 seeds``."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def are(number: int) -> str:
    """``is`` of 1, else ``are``."""
    return "is" if number == 1 else "are"


def listed(words: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
