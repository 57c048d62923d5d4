"""The settings for which a stored self-term was computed."""

from __future__ import annotations

import math
from typing import NamedTuple

_COST_TOLERANCE = 1e-3


class SelfTermSettings(NamedTuple):
    """The settings for which a stored self-term was computed.

    Attributes:
        epsilon: strength of the entropic regularisation.
        costs: costs of a few pairs of tokens and of the tail, which identify the cost.
    """

    epsilon: float
    costs: tuple[float, ...]

    def fits(self, other: SelfTermSettings) -> bool:
        """Whether both describe the same problem, up to rounding differences of devices."""
        mine, theirs = (self.epsilon, *self.costs), (other.epsilon, *other.costs)
        return len(mine) == len(theirs) and all(
            math.isclose(x, y, rel_tol=_COST_TOLERANCE, abs_tol=1e-6)
            for x, y in zip(mine, theirs, strict=True)
        )
