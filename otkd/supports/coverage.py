"""How much of the mass takes part token by token."""

from __future__ import annotations

from torch import Tensor

from otkd.warn import warn_caller

LEAST_COVERAGE = 0.5
"""Mean coverage below which the gradient is off by a tenth or more: see ``docs/choosing.md``."""


class CoverageWarning(UserWarning):
    """The heaviest tokens hold too little of the mass.

    Python's filters decide how often it is shown: by default once for each place and k.
    """


def warn_of_coverage(coverage: Tensor, k: int) -> None:
    """Warn if most of the mass is in the tail; ``coverage`` is a scalar tensor."""
    if coverage.item() < LEAST_COVERAGE:
        warn_caller(
            f"the {k} heaviest tokens of a position hold less than {LEAST_COVERAGE:.0%} of the "
            "probability mass on average: the loss is mostly determined by the approximation of "
            "the tail. Take a larger k, TopK(k, clusters=32), or a lower temperature; "
            "last_report.coverage has the mass",
            CoverageWarning,
        )
