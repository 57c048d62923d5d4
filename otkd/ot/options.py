"""What entropic transport computes, and how it is solved."""

from __future__ import annotations

import math
from dataclasses import dataclass

from otkd.checks import check_choice
from otkd.ot.problem import HELD
from otkd.scalars import as_flag, as_positive, as_whole, settle

VALUES = ("dual", "sharp")


def as_penalties(unbalanced: float | tuple[float, float] | None) -> tuple[float, float]:
    """ρ of the source and of the target, from any form of ``unbalanced``.

    Raises:
        TypeError: if it is neither a number nor a pair of numbers.
        ValueError: if a ρ is not above 0.
    """
    if unbalanced is None:
        return HELD
    pair = unbalanced if isinstance(unbalanced, tuple | list) else (unbalanced, unbalanced)
    if len(pair) != 2:
        raise ValueError(f"unbalanced must be ρ or a pair (ρ_student, ρ_teacher), got {pair!r}")
    source, target = (
        math.inf if rho == math.inf else as_positive("unbalanced", rho) for rho in pair
    )
    return source, target


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is computed: the entropic problem and the number that is returned.

    Attributes:
        epsilon: entropic strength, in units of the cost.
        debias: whether half the self-terms are subtracted.
        value: ``"dual"``, or ``"sharp"`` for ⟨P, C⟩.
        unbalanced: (ρ of the source, ρ of the target), or None where both marginals are held.
    """

    epsilon: float = 0.1
    debias: bool = True
    value: str = "dual"
    unbalanced: float | tuple[float, float] | None = None

    def __post_init__(self):
        penalties = as_penalties(self.unbalanced)
        settle(
            self,
            epsilon=as_positive("epsilon", self.epsilon),
            debias=as_flag("debias", self.debias),
            unbalanced=None if penalties == HELD else penalties,
        )
        check_choice("value", self.value, VALUES)
        if self.unbalanced is None:
            return
        if self.value != "dual":
            raise ValueError(f"unbalanced transport has value='dual' alone, got {self.value!r}")
        if self.debias and penalties[0] != penalties[1]:
            raise ValueError(
                "with a different ρ for each side, OT(a, b) − ½·OT(a, a) − ½·OT(b, b) is not a "
                "divergence: it may be negative, and smallest where a ≠ b. Use debias=False, or "
                f"the same ρ for both sides; got unbalanced={penalties!r}"
            )

    @property
    def penalties(self) -> tuple[float, float]:
        """ρ of the source and of the target marginal; infinite for a marginal that is held."""
        return as_penalties(self.unbalanced)


@dataclass(frozen=True, kw_only=True)
class SolverSettings:
    """How it is computed: nothing here changes what the result is, up to ``tolerance``.

    Attributes:
        tolerance: L1 marginal error at which a problem is solved.
        max_iterations: limit of the iterations.
        plain_steps: see :func:`~otkd.ot.solver.solve_potentials`.
    """

    tolerance: float = 1e-4
    max_iterations: int = 1000
    plain_steps: int = 0

    def __post_init__(self):
        settle(
            self,
            tolerance=as_positive("tolerance", self.tolerance),
            max_iterations=as_whole("max_iterations", self.max_iterations),
        )
