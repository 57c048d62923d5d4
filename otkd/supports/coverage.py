"""The probability mass of the tokens that are atoms of their own."""

from __future__ import annotations

from torch import Tensor

from otkd.warn import warn_caller

LEAST_COVERAGE = 0.5
"""Mean coverage below which the gradient is off by a tenth or more: see ``docs/choosing.md``."""


class CoverageWarning(UserWarning):
    """The k most probable tokens hold too little of the probability mass.

    Python's warning filters decide how often it is shown: by default once per place and k.
    """


def warn_of_coverage(coverage: Tensor, k: int) -> None:
    """Warn if most of the mass is in the tail; ``coverage`` is a scalar tensor."""
    if coverage.item() < LEAST_COVERAGE:
        warn_caller(
            f"the {k} most probable tokens of a position hold less than {LEAST_COVERAGE:.0%} of "
            "the probability mass on average, so the loss is mostly determined by the tail "
            "approximation. With a language model of 49,152 tokens, the gradient of TopK(64) was "
            "off by more than half if its tokens held 40% of the mass, that of TopK(64, "
            "clusters=32) by 9%, and that of TopK(512, clusters=32) by 2%. Use the latter, or "
            "temperature 1: see docs/choosing.md. The mass is in last_report.coverage",
            CoverageWarning,
        )
