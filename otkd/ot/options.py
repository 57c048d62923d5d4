"""What entropic transport computes, and how it is solved."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from otkd.checks import check_choice
from otkd.ot.problem import HELD
from otkd.scalars import as_flag, as_not_negative, as_positive, as_whole, settle
from otkd.warn import warn_deprecated

VALUES = ("dual", "sharp")
DEBIASINGS = ("sinkhorn", "teacher")


def as_penalties(
    marginal_relaxation: float | tuple[float | None, float | None] | None,
) -> tuple[float, float]:
    """ρ of the source and of the target, from any form of ``marginal_relaxation``.

    Raises:
        TypeError: if it is neither None nor a number nor a pair of these.
        ValueError: if a ρ is not above 0.
    """
    pair = marginal_relaxation
    if not isinstance(pair, tuple | list):
        pair = (marginal_relaxation, marginal_relaxation)
    if len(pair) != 2:
        raise ValueError(
            f"marginal_relaxation must be ρ or a pair (ρ_student, ρ_teacher), got {pair!r}"
        )
    source, target = (
        math.inf if rho is None or rho == math.inf else as_positive("marginal_relaxation", rho)
        for rho in pair
    )
    return source, target


def as_debiasing(debias: bool | str | None) -> str | None:
    """``"sinkhorn"``, ``"teacher"`` or None, from any form of ``debias``.

    True means ``"sinkhorn"``, and False means None.

    Raises:
        TypeError: if it is neither text nor True, False or None.
        ValueError: if it is another text.
    """
    if isinstance(debias, str):
        check_choice("debias", debias, DEBIASINGS)
        return debias
    return "sinkhorn" if debias is not None and as_flag("debias", debias) else None


def relaxation_of(marginal_relaxation: Any, unbalanced: Any) -> Any:
    """``marginal_relaxation``, also if it was given by its deprecated name ``unbalanced``.

    Raises:
        TypeError: if both names were used.
    """
    if unbalanced is None:
        return marginal_relaxation
    if marginal_relaxation is not None:
        raise TypeError("unbalanced= is the old name of marginal_relaxation=: pass one of them")
    warn_deprecated("unbalanced=", "marginal_relaxation=")
    return unbalanced


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is computed: the entropic problem and the number that is returned.

    Attributes:
        epsilon: entropic strength, in units of the cost.
        debias: ``"sinkhorn"``, ``"teacher"`` or None; see
            :func:`otkd.ot.divergence.solve_divergence`.
        value: ``"dual"``, or ``"sharp"`` for ⟨P, C⟩.
        penalties: ρ of the source and of the target, in units of the cost: infinite for a marginal
            that is held, 0 for one that is free.
    """

    epsilon: float = 0.1
    debias: bool | str | None = "sinkhorn"
    value: str = "dual"
    penalties: tuple[float, float] = HELD

    def __post_init__(self):
        source, target = (
            rho if rho == math.inf else as_not_negative("ρ", rho) for rho in self.penalties
        )
        settle(
            self,
            epsilon=as_positive("epsilon", self.epsilon),
            debias=as_debiasing(self.debias),
            penalties=(source, target),
        )
        check_choice("value", self.value, VALUES)
        if self.value != "dual" and not self.balanced:
            raise ValueError(
                f"transport with marginal_relaxation has only value='dual', got {self.value!r}"
            )
        if self.value != "dual" and self.debias == "teacher":
            raise ValueError(f"debias='teacher' has only value='dual', got {self.value!r}")
        if self.debias == "sinkhorn" and source != target:
            raise ValueError(
                "with a different ρ for each side, OT(q, p) − ½·OT(q, q) − ½·OT(p, p) is not a "
                "divergence: it may be negative, and smallest where q ≠ p. Use debias='teacher' or "
                f"None, or the same ρ for both sides; got marginal_relaxation={self.penalties!r}"
            )

    @property
    def balanced(self) -> bool:
        """Whether both marginals are held."""
        return self.penalties == HELD


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
