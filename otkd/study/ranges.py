"""Which numbers an option takes: one description for the command line and for protocol files."""

from __future__ import annotations

import reprlib
import sys
from dataclasses import dataclass
from typing import Any

from otkd.study.fields import LARGEST_SEED


@dataclass(frozen=True)
class Range:
    """The numbers from ``low`` to ``high``, with both unless ``above`` leaves ``low`` out.

    The bounds are there so that nothing overflows in the arithmetic of a loss, and nothing is begun
    that cannot end. NaN and the infinities are in no range.
    """

    low: float
    high: float = sys.float_info.max
    above: bool = False

    def complaint(self, value: Any) -> str | None:
        """The end of a sentence that refuses ``value``, or None if it is in the range."""
        if value <= self.high and (value > self.low if self.above else value >= self.low):
            return None
        return f"must {self}, got {shown(value)}"

    def __str__(self) -> str:
        if self.high == sys.float_info.max:
            return f"be a number above {self.low:g}" if self.above else f"be at least {self.low:g}"
        return f"lie between {_plain(self.low)} and {_plain(self.high)}"


def shown(value: Any) -> str:
    """A value as a message shows it: a line, however large or deep it is."""
    try:
        return reprlib.repr(value)
    except ValueError:  # a number of more digits than Python turns into text
        return f"a number of {value.bit_length():,} bits"


def _plain(value: float) -> str:
    return f"{value:,}" if value == int(value) else f"{value:g}"


COUNT = Range(1, 10**9)
EPOCHS = Range(1, 10_000)
BATCH = Range(1, 100_000)
RATE = Range(0, above=True)
TEMPERATURE = Range(1e-3, 10_000)
EPSILON = Range(1e-6, 10**6)
SHARE = Range(0, 1)
WEIGHT = Range(0, 10**6)
SEED = Range(0, LARGEST_SEED)
SEEDS = Range(1, 10_000)
