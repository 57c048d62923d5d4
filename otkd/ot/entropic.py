"""Entropic transport and the debiased Sinkhorn divergence between probability vectors."""

from __future__ import annotations

from typing import Literal, overload

from jaxtyping import Float
from torch import Tensor

from otkd.costs import Cost, CostMatrices, as_cost_matrices
from otkd.ot.divergence import DivergenceSolution, solve_divergence, with_offsets
from otkd.ot.options import Objective, SolverSettings, as_penalties
from otkd.ot.problem import Problem, check_costs, check_masses, flatten_problem
from otkd.ot.solution import Solution
from otkd.ot.transport import solve_transport
from otkd.precision import without_autocast


def sinkhorn(
    a: Float[Tensor, "*batch n"],
    b: Float[Tensor, "*#batch m"],
    cost: Float[Tensor, "*#batch n m"] | Cost,
    *,
    epsilon: float = 0.1,
    marginal_relaxation: float | tuple[float | None, float | None] | None = None,
    tolerance: float = 1e-4,
    max_iterations: int = 1000,
) -> Solution:
    """Entropic optimal transport, OT_ε(a, b) = min_P ⟨P, C⟩ + ε·KL(P‖a⊗b).

    With ``marginal_relaxation`` the plan need not have the marginals a and b, but pays for the
    difference: ρ_a·KL(P1‖a) + ρ_b·KL(Pᵀ1‖b) is added to the objective, with
    KL(x‖y) = Σ x·log(x/y) − x + y.

    Args:
        a: source masses; each vector adds up to 1.
        b: target masses; each vector adds up to 1.
        cost: a tensor ``(n, m)`` shared by the batch, one per problem ``(*batch, n, m)``, or a
            cost object of :mod:`otkd.costs`.
        epsilon: strength of the entropic regularisation, in units of the cost.
        marginal_relaxation: ρ of both marginals, or a pair (ρ_a, ρ_b), in units of the cost, above
            0; ``math.inf`` or None holds a marginal. It corresponds to ``reg_m`` of POT.
        tolerance: L1 marginal error at which a problem counts as solved.
        max_iterations: limit of updates of both potentials. If it is reached, the result has
            ``converged=False``, and a :class:`~otkd.ConvergenceWarning` is issued.

    Returns:
        A :class:`Solution`. ``value`` is differentiable in ``a``, ``b`` and ``cost`` by the
        envelope theorem; memory does not grow with the number of iterations.

    Raises:
        TypeError: if an argument is not a floating-point tensor.
        ValueError: for shapes that do not fit, masses that are not a distribution, or ε, ρ or
            tolerance not above 0.

    Source: Cuturi (2013), "Sinkhorn Distances: Lightspeed Computation of Optimal Transport" (with
    λ = 1/ε); Feydy et al. (2019) for the objective with KL(P‖a⊗b); Chizat et al. (2018), "Scaling
    Algorithms for Unbalanced Optimal Transport Problems".

    Example:
        >>> a, b = torch.tensor([0.5, 0.5]), torch.tensor([0.2, 0.8])
        >>> cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> relaxed = otkd.ot.sinkhorn(a, b, cost, epsilon=0.1, marginal_relaxation=(0.5, None))
        >>> relaxed.plan().sum(-1), relaxed.plan().sum(-2)  # the first need not be a
        (tensor([0.2199, 0.7801]), tensor([0.2000, 0.8000]))
    """
    objective = Objective(epsilon=epsilon, debias=None, penalties=as_penalties(marginal_relaxation))
    solver = SolverSettings(tolerance=tolerance, max_iterations=max_iterations)
    check_masses(a, b)
    costs = CostMatrices(as_cost_matrices(cost, a, b).cross)
    check_costs(a.shape[-1], b.shape[-1], costs)
    a, b, matrix, batch = flatten_problem(a, b, costs.cross)
    problem = Problem(a, b, matrix, objective.epsilon, penalties=objective.penalties)
    with without_autocast(a):
        transport = solve_transport(problem, solver)
        potentials, moved = transport.potentials, transport.transport_cost()
    return Solution(
        value=with_offsets(transport.value, a, b, [transport]).reshape(batch),
        transport_cost=moved.reshape(batch),
        f=transport.f.reshape(*batch, a.shape[-1]),
        g=transport.g.reshape(*batch, b.shape[-1]),
        marginal_error=potentials.marginal_error.reshape(batch),
        iterations=potentials.iterations,
        converged=potentials.converged,
        _transport=transport,
    )


@overload
def sinkhorn_divergence(
    a: Float[Tensor, "*batch n"],
    b: Float[Tensor, "*#batch m"],
    cost: Float[Tensor, "*#batch n m"] | tuple[Tensor, Tensor, Tensor] | Cost,
    *,
    epsilon: float = ...,
    debias: bool | str | None = ...,
    value: str = ...,
    marginal_relaxation: float | tuple[float | None, float | None] | None = ...,
    tolerance: float = ...,
    max_iterations: int = ...,
    return_solution: Literal[False] = ...,
) -> Float[Tensor, "*batch"]: ...


@overload
def sinkhorn_divergence(
    a: Float[Tensor, "*batch n"],
    b: Float[Tensor, "*#batch m"],
    cost: Float[Tensor, "*#batch n m"] | tuple[Tensor, Tensor, Tensor] | Cost,
    *,
    epsilon: float = ...,
    debias: bool | str | None = ...,
    value: str = ...,
    marginal_relaxation: float | tuple[float | None, float | None] | None = ...,
    tolerance: float = ...,
    max_iterations: int = ...,
    return_solution: Literal[True],
) -> DivergenceSolution: ...


def sinkhorn_divergence(
    a: Float[Tensor, "*batch n"],
    b: Float[Tensor, "*#batch m"],
    cost: Float[Tensor, "*#batch n m"] | tuple[Tensor, Tensor, Tensor] | Cost,
    *,
    epsilon: float = 0.1,
    debias: bool | str | None = "sinkhorn",
    value: str = "dual",
    marginal_relaxation: float | tuple[float | None, float | None] | None = None,
    tolerance: float = 1e-4,
    max_iterations: int = 1000,
    return_solution: bool = False,
) -> Float[Tensor, "*batch"] | DivergenceSolution:
    """The debiased divergence S_ε(a, b) = OT_ε(a, b) − ½·OT_ε(a, a) − ½·OT_ε(b, b).

    S_ε ≥ 0, with equality only at a = b, if exp(−C/ε) is positive definite and all points differ.
    Its gradients are ∂S/∂a = f_ab − f_aa and ∂S/∂C = P_ab − ½·P_aa − ½·P_bb.

    Args:
        a: source masses; each vector adds up to 1.
        b: target masses; each vector adds up to 1.
        cost: a self-cost (square, symmetric, zero diagonal) shared by the batch or one per
            problem; or ``(C_ab, C_aa, C_bb)`` for different supports; or a cost object.
        epsilon: strength of the entropic term, in units of the cost.
        debias: ``"sinkhorn"`` (or True) for S_ε. ``"teacher"`` for
            OT_ε(a, b) − OT_ε(b, b) − ⟨∂OT_ε(b, b)/∂a, a − b⟩, which needs no self-term of a, takes
            one cost, for the same points on both sides, and is a constant in b and in the cost;
            it is at least 0, and 0 with gradient 0 at a = b, for any cost and any ρ. None (or
            False) for OT_ε(a, b) (``cost`` may then be any ``(n, m)`` matrix).
        value: ``"dual"`` for OT_ε, ``"sharp"`` for ⟨P, C⟩ instead (gradients by implicit
            differentiation).
        marginal_relaxation: see :func:`sinkhorn`. A different ρ for each side requires
            ``debias="teacher"`` or None.
        tolerance: L1 marginal error at which a problem is solved.
        max_iterations: limit of updates of both potentials.
        return_solution: also return ``converged``, ``iterations`` and ``marginal_error``.

    Returns:
        The divergences, differentiable in a, b and cost; or with ``return_solution`` a
        :class:`~otkd.ot.DivergenceSolution`, whose ``value`` they are.

    Warns:
        ConvergenceWarning: if a problem was not solved within ``max_iterations``.

    Raises:
        TypeError: if an argument is not a floating-point tensor.
        ValueError: for shapes that do not fit, masses that are not a distribution, a single cost
            that is not a self-cost, settings that contradict each other, or ε, ρ or tolerance not
            above 0.

    Source: Feydy et al. (2019), "Interpolating between Optimal Transport and MMD using Sinkhorn
    Divergences"; Genevay et al. (2018) for the sharp variant.
    """
    objective = Objective(
        epsilon=epsilon, value=value, debias=debias, penalties=as_penalties(marginal_relaxation)
    )
    solver = SolverSettings(tolerance=tolerance, max_iterations=max_iterations)
    check_masses(a, b)
    matrices = as_cost_matrices(cost, a, b, self_terms=objective.debias is not None)
    if objective.debias == "teacher" and matrices.target is not matrices.cross:
        raise ValueError(
            "debias='teacher' needs one cost, between points that are the same on both sides: pass "
            "a square tensor or a cost object of one vocabulary"
        )
    check_costs(a.shape[-1], b.shape[-1], matrices)
    solution = solve_divergence(a, b, matrices, objective, solver)
    return solution if return_solution else solution.value
