"""One transport problem, or the three of a debiased divergence, solved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from otkd.costs import CostMatrices
from otkd.ot.kernels.lazy import LazyCost
from otkd.ot.normal_form import Ground
from otkd.ot.options import Objective, SolverSettings
from otkd.ot.problem import Problem, flatten_problem
from otkd.ot.transport import Transport, solve_transport, transport_of
from otkd.precision import without_autocast


@dataclass(frozen=True, kw_only=True)
class SolverReport:
    """What the solver did, for logs.

    Attributes:
        iterations: the largest number of iterations of any solve.
        marginal_error: the largest L1 marginal error of any problem, a scalar tensor.
        converged: whether every marginal error is within the tolerance.
    """

    iterations: int
    marginal_error: Tensor
    converged: bool

    @classmethod
    def of_parts(cls, parts: Sequence[Transport]) -> SolverReport:
        """The report of the problems of one divergence."""
        potentials = [part.potentials for part in parts]
        errors = [p.marginal_error.max() for p in potentials if p.marginal_error.numel()]
        none = potentials[0].marginal_error.new_zeros(())
        return cls(
            iterations=max(p.iterations for p in potentials),
            marginal_error=torch.stack(errors).max() if errors else none,
            converged=all(part.converged for part in parts),
        )


@dataclass(frozen=True)
class DivergenceSolution:
    """The divergences of a batch, with convergence information.

    Attributes:
        value: ``(*batch,)``, differentiable in masses and costs.
        report: summary of what the solver did.
        parts: the solved problems, flattened: (a, b), then with debiasing (a, a) and (b, b).

    Example:
        >>> a, b = torch.tensor([0.5, 0.5]), torch.tensor([0.2, 0.8])
        >>> cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> solution = otkd.ot.sinkhorn_divergence(a, b, cost, return_solution=True)
        >>> solution.value, solution.converged
        (tensor(0.2567), True)
    """

    value: Float[Tensor, "*batch"]
    report: SolverReport
    parts: tuple[Transport, ...] = field(repr=False)

    @property
    def converged(self) -> bool:
        """Whether every problem was solved within the tolerance, and its gradient was found."""
        return self.report.converged

    @property
    def iterations(self) -> int:
        """The largest number of iterations of the (up to three) solves."""
        return self.report.iterations

    @property
    def marginal_error(self) -> Float[Tensor, "*batch"]:
        """For each value, the largest L1 marginal error of its problems."""
        errors = [part.potentials.marginal_error for part in self.parts]
        return torch.stack(errors).amax(0).reshape(self.value.shape)

    def shares(self) -> tuple[Tensor, Tensor]:
        """The contribution of a unit of mass at each point, ``(*batch, n)`` and ``(*batch, m)``.

        ⟨a, source⟩ + ⟨b, target⟩ is the value up to the marginal error. Detached.
        """
        with without_autocast(self.value):
            (source, target), *self_terms = [part.shares() for part in self.parts]
        if self_terms:
            source = source - self_terms[0][0]
            target = target - self_terms[1][1]
        source, target = (
            side + (offset.unsqueeze(-1) if isinstance(offset, Tensor) else offset)
            for side, offset in zip((source, target), _offsets(self.parts), strict=True)
        )
        batch = self.value.shape
        return (
            source.reshape(*batch, source.shape[-1]),
            target.reshape(*batch, target.shape[-1]),
        )


@dataclass(frozen=True)
class TargetTerm:
    """What debiasing subtracts because of the target b: value + ⟨gradient, a − b⟩.

    Attributes:
        value: ``(B,)``.
        gradient: ``(B, n)``, a constant; None for 0.
        start: target potentials in the normal form of (b, b), ``(B, n)``. Near a = b, where a good
            student is, those of (a, b) are the same.
    """

    value: Tensor
    gradient: Tensor | None = None
    start: Tensor | None = None

    @classmethod
    def of(cls, own: Transport, objective: Objective) -> TargetTerm:
        """The term of the solved problem (b, b)."""
        if objective.debias == "teacher":
            return cls(own.value, own.source_gradient(), own.potentials.g)
        return cls(own.value / 2, None, own.potentials.g)


def own_problem(
    masses: Tensor, log: Tensor | None, cost: Tensor | LazyCost, objective: Objective
) -> Problem:
    """The problem between masses ``(B, n)``, with their logarithms, and themselves."""
    source, target = penalties = objective.penalties
    return Problem(masses, masses, cost, objective.epsilon, source == target, penalties, log, log)


def solve_divergence(
    a: Tensor,
    b: Tensor,
    cost: CostMatrices,
    objective: Objective,
    solver: SolverSettings,
    *,
    logs: tuple[Tensor, Tensor] | None = None,
    target_potential: Tensor | None = None,
) -> DivergenceSolution:
    """Transport U(a, b) = OT_ε, balanced or relaxed, debiased as ``objective.debias`` says.

    Debiasing subtracts

    - ``"sinkhorn"``: ½·U(a, a) + ½·U(b, b);
    - ``"teacher"``: U(b, b) + ⟨∂₁U(b, b), a − b⟩, the tangent at a = b. U is convex in a, so that
      the rest is at least 0, and 0 with gradient 0 at a = b, for every cost and every penalty. Both
      sides have the same points, and b and the cost are constants;
    - None: nothing.

    Args:
        a: source masses, ``(*batch, n)``.
        b: target masses, ``(*batch, m)``.
        cost: between the two and, for debiasing, within each.
        objective: what is computed.
        solver: how it is computed.
        logs: logarithms of a and b, if they are known; see :class:`~otkd.ot.problem.Problem`.
        target_potential: target potentials of (b, b), ``(B, m)``, if they are known; any finite
            number at points without mass. For balanced ``debias="sinkhorn"``, ½·U(b, b) is their
            mean over b.
    """
    if objective.debias == "teacher":
        _check_constants(b, *cost)
    a, b, cross_cost, batch = flatten_problem(a, b, cost.cross)
    log_a, log_b = (
        None if log is None else log.to(a).reshape(len(a), -1) for log in logs or (None,) * 2
    )
    self_terms: list[Transport] = []
    # Within one vocabulary the three costs are one object, and so is their normal form.
    grounds: dict[int, Ground] = {}

    def solve(
        problem: Problem, matrix: Tensor, known: Tensor | None = None, **hints: Tensor | None
    ) -> Transport:
        ground = grounds.get(id(matrix))
        if known is None:
            transport = solve_transport(problem, solver, objective.value, ground, **hints)
        else:
            transport = transport_of(problem, known, solver.tolerance, ground)
        grounds[id(matrix)] = transport.form.ground
        return transport

    def solve_within(
        masses: Tensor, log: Tensor | None, matrix: Tensor | None, **hints: Tensor | None
    ) -> Transport:
        if matrix is None:
            raise ValueError("a debiased divergence needs the cost within each side")
        flat = flatten_problem(masses, masses, matrix, batch)[2]
        return solve(own_problem(masses, log, flat, objective), matrix, **hints)

    with without_autocast(a):
        if objective.debias == "sinkhorn":
            self_terms.append(solve_within(a, log_a, cost.source))
        if objective.debias is None:
            target_term = None
        elif target_potential is None:
            # The tangent is taken at a, which may have mass where b has none.
            weights = torch.maximum(a, b).detach() if objective.debias == "teacher" else None
            own = solve_within(b, log_b, cost.target, weights=weights)
            self_terms.append(own)
            target_term = TargetTerm.of(own, objective)
        elif objective.debias == "teacher":
            own = solve_within(b, log_b, cost.target, known=target_potential)
            target_term = TargetTerm.of(own, objective)
        else:
            half = torch.linalg.vecdot(b, target_potential.to(b))
            target_term = TargetTerm(half, start=target_potential)
        problem = Problem(
            a, b, cross_cost, objective.epsilon, False, objective.penalties, log_a, log_b
        )
        start = None if target_term is None else target_term.start
        transport = solve(problem, cost.cross, start=start)
        parts = (transport, *self_terms)
        value = transport.value
        if objective.debias == "sinkhorn":
            value = value - self_terms[0].value / 2
        if target_term is not None:
            value = value - target_term.value
            if target_term.gradient is not None:
                value = value - torch.linalg.vecdot(target_term.gradient, a - b)
        if objective.debias == "teacher" and target_potential is not None:
            # Exactly 0 there, although the potentials may be of b before its masses were rounded.
            value = value.masked_fill((a == b).all(-1), 0)
        if objective.debias != "teacher":  # with it both costs are the same: offsets cancel
            value = with_offsets(value, a, b, parts)
        if objective.debias == "sinkhorn" and not objective.balanced:
            # Séjourné et al. (2019), "Sinkhorn Divergences for Unbalanced Optimal Transport".
            value = value + objective.epsilon / 2 * (a.sum(-1) - b.sum(-1)).square()
    return DivergenceSolution(
        value=value.reshape(batch), report=SolverReport.of_parts(parts), parts=parts
    )


def _check_constants(*tensors: Tensor | None) -> None:
    for tensor in tensors:
        if getattr(tensor, "requires_grad", False) and torch.is_grad_enabled():
            raise ValueError(
                "debias='teacher' is not differentiable in the target masses or in the cost: "
                "detach them, or use debias='sinkhorn'"
            )


def with_offsets(value: Tensor, a: Tensor, b: Tensor, parts: Sequence[Transport]) -> Tensor:
    """The value of the given problems from that of their normal forms, ``(B,)``.

    The constant offsets are added to each other first, so that they cancel exactly in a divergence
    whose costs contain the same constant.
    """
    source, target = _offsets(parts)
    if not (a.requires_grad or b.requires_grad):  # in the normal form every total is 1
        total = source + target
        return value + total if isinstance(total, Tensor) or total != 0 else value
    for masses, offset in ((a, source), (b, target)):
        if isinstance(offset, Tensor) or offset != 0:
            total = masses.sum(-1)
            # The value is that of total mass 1, and the gradient is per unit of mass.
            value = value + offset * (1 + total - total.detach())
    return value


def _offsets(parts: Sequence[Transport]) -> tuple[Tensor | float, Tensor | float]:
    """The offsets of (a, b) for each side, minus those of (a, a) and (b, b) if these exist."""
    cross, *within = [part.offset for part in parts]
    source, target = [*within, 0.0, 0.0][:2]
    return cross - source, cross - target
