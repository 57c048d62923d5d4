"""What a stored self-term of a teacher was made for."""

from __future__ import annotations

import math
from typing import NamedTuple

_COST_TOLERANCE = 1e-3


class SelfTermSettings(NamedTuple):
    """What a stored self-term was made for.

    Attributes:
        epsilon: entropic strength.
        costs: costs of a few pairs of tokens and of the tail, which tell one cost from another.
    """

    epsilon: float
    costs: tuple[float, ...]

    def fits(self, other: SelfTermSettings) -> bool:
        """Whether it is the same problem, up to what devices differ in rounding."""
        mine, theirs = (self.epsilon, *self.costs), (other.epsilon, *other.costs)
        return len(mine) == len(theirs) and all(
            math.isclose(x, y, rel_tol=_COST_TOLERANCE, abs_tol=1e-6)
            for x, y in zip(mine, theirs, strict=True)
        )
