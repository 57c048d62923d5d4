"""The settings for which a stored self-term was computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from otkd.ot.problem import HELD

_TOLERANCE = 1e-3


class SelfTermSettings(NamedTuple):
    """The settings for which a stored self-term was computed.

    Attributes:
        epsilon: strength of the entropic regularisation.
        costs: costs of a few pairs of tokens and of the tail, which identify the cost.
        debias: ``"sinkhorn"`` or ``"teacher"``.
        penalties: ρ of the source and of the target, in units of the cost.
    """

    epsilon: float
    costs: tuple[float, ...]
    debias: str = "sinkhorn"
    penalties: tuple[float, float] = HELD

    def fits(self, other: SelfTermSettings) -> bool:
        """Whether both describe the same problem, up to rounding differences of devices."""
        mine, theirs = ((x.epsilon, *x.penalties) for x in (self, other))
        return (
            self.debias == other.debias
            and _close(mine, theirs)
            and _close(self.costs, other.costs, abs_tol=1e-6)
        )


def _close(mine: Sequence[float], theirs: Sequence[float], abs_tol: float = 0.0) -> bool:
    return len(mine) == len(theirs) and all(
        math.isclose(x, y, rel_tol=_TOLERANCE, abs_tol=abs_tol)
        for x, y in zip(mine, theirs, strict=True)
    )
