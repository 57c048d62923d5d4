"""How much of the mass takes part token by token."""

from __future__ import annotations

import warnings

from torch import Tensor

LEAST_COVERAGE = 0.5
"""Mean coverage below which the gradient is off by a tenth or more: see ``docs/choosing.md``."""

_warned = False


class CoverageWarning(UserWarning):
    """The heaviest tokens hold too little of the mass; said once a process."""


def warn_of_coverage(coverage: Tensor, k: int) -> None:
    """Say once a process that most of the mass is in the tail; ``coverage`` is a scalar tensor."""
    global _warned
    if _warned or not (mean := coverage.item()) < LEAST_COVERAGE:
        return
    _warned = True
    warnings.warn(
        f"the {k} heaviest tokens of a position hold {mean:.0%} of the mass: what is transported "
        "between single tokens is the smaller part. Take a larger k, TopK(k, clusters=32), or a "
        "lower temperature. Later cases are in last_report.coverage only.",
        CoverageWarning,
        stacklevel=3,
    )
