"""One transport problem, or the three of a debiased divergence, solved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from otkd.costs import CostMatrices
from otkd.ot.normal_form import Ground
from otkd.ot.options import Objective, SolverSettings
from otkd.ot.problem import Problem, flatten_problem
from otkd.ot.transport import Transport, solve_transport
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


def solve_divergence(
    a: Tensor,
    b: Tensor,
    cost: CostMatrices,
    objective: Objective,
    solver: SolverSettings,
    *,
    target_value: Tensor | None = None,
) -> DivergenceSolution:
    """OT_ε(a, b), or with ``objective.debias`` OT_ε(a, b) − ½·OT_ε(a, a) − ½·OT_ε(b, b).

    ``target_value`` is OT_ε(b, b), ``(*batch,)``, if it is already known.
    """
    a, b, cross_cost, batch = flatten_problem(a, b, cost.cross)
    within: list[Transport] = []
    # Within one vocabulary the three costs are one object, and so is their normal form.
    grounds: dict[int, Ground] = {}
    start = None
    with without_autocast(a):
        if objective.debias:
            for masses, self_cost in ((a, cost.source), (b, cost.target)):
                if self_cost is None:
                    raise ValueError("a debiased divergence needs the cost within each side")
                if masses is b and target_value is not None:
                    continue
                _, _, matrix, _ = flatten_problem(masses, masses, self_cost, batch)
                problem = Problem(
                    masses, masses, matrix, objective.epsilon, True, objective.penalties
                )
                transport = solve_transport(
                    problem, solver, objective.value, grounds.get(id(self_cost))
                )
                grounds[id(self_cost)] = transport.form.ground
                within.append(transport)
                # Near a = b, where a good student is, (a, b) has the potentials of (b, b).
                start = transport.potentials.f if masses is b else None
        problem = Problem(a, b, cross_cost, objective.epsilon, penalties=objective.penalties)
        transport = solve_transport(
            problem, solver, objective.value, grounds.get(id(cost.cross)), start
        )
    parts = (transport, *within)
    value = transport.value
    for self_term in within:
        value = value - self_term.value / 2
    if objective.debias and target_value is not None:
        value = value - target_value.reshape(-1) / 2
    value = with_offsets(value, a, b, parts)
    if objective.debias and objective.unbalanced is not None:
        # Séjourné et al. (2019), "Sinkhorn Divergences for Unbalanced Optimal Transport".
        value = value + objective.epsilon / 2 * (a.sum(-1) - b.sum(-1)).square()
    return DivergenceSolution(
        value=value.reshape(batch), report=SolverReport.of_parts(parts), parts=parts
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
