"""Small transport problems and logits, by seed; and the checks every solution must pass."""

from __future__ import annotations

import dataclasses

import torch
from hypothesis import strategies as st

from otkd.ot.options import Objective, SolverSettings, as_penalties
from tests import naive

KINDS = ("shared", "per_item", "rectangular", "zero_masses")
seeds = st.integers(0, 2**20)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def masses(seed: int, *shape: int, spread: float = 1.0) -> torch.Tensor:
    logits = torch.randn(shape, generator=generator(seed), dtype=torch.float64)
    return torch.softmax(spread * logits, -1)


def points(seed: int, n: int, width: int = 2) -> torch.Tensor:
    return torch.randn(n, width, generator=generator(seed), dtype=torch.float64)


def logits(seed: int, *shape: int, dtype=torch.float64, scale: float = 2.0) -> torch.Tensor:
    values = scale * torch.randn(shape, generator=generator(seed), dtype=torch.float64)
    return values.to(dtype)


def problem(kind: str, seed: int = 0, batch: int = 3, n: int = 6):
    """a (batch, n), b (batch, m) and a cost between 0 and about 3, shared or one per problem."""
    m = n + 3 if kind == "rectangular" else n
    a, b = masses(seed, batch, n), masses(seed + 1, batch, m)
    shape = (batch, n, m) if kind == "per_item" else (n, m)
    cost = 3 * torch.rand(shape, generator=generator(seed + 2), dtype=torch.float64)
    if kind == "zero_masses":
        a[:, 1], b[0, 2:4], b[1, 1] = 0, 0, 0
        a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    return a, b, cost


def self_costs(seed: int, n: int) -> dict[str, torch.Tensor]:
    """Costs for which exp(−C/ε) is positive definite (Feydy et al., 2019)."""
    x = points(seed, n, 3)
    unit = x / x.norm(dim=-1, keepdim=True)
    places = torch.arange(n, dtype=torch.float64)
    gaps = (places[:, None] - places).abs()
    costs = {
        "l1": (x[:, None] - x).abs().sum(-1),
        "euclidean": (x[:, None] - x).norm(dim=-1),
        "sqeuclidean": (x[:, None] - x).square().sum(-1),
        "cosine": (1 - unit @ unit.T).clamp(min=0).fill_diagonal_(0),
        "discrete": 1 - torch.eye(n, dtype=torch.float64),
        **{f"ordinal-{p}": gaps**p for p in (0.5, 1.0, 1.5, 2.0)},
    }
    return {name: cost / cost.mean() for name, cost in costs.items()}


SELF_COSTS = tuple(self_costs(0, 3))


def check_solution(solution, a, b, cost, epsilon: float, tolerance: float) -> None:
    """Every field of a Solution against its definition."""
    close = torch.testing.assert_close
    f, g = solution.f, solution.g
    assert torch.isfinite(f).all()
    assert torch.isfinite(g).all()
    plan = solution.plan()
    slack = {"rtol": 1e-7, "atol": 10 * tolerance}
    close(plan, naive.plan(f, g, a, b, cost, epsilon), rtol=1e-7, atol=1e-12)
    rows = (plan.sum(-1) - a).abs().sum(-1)
    columns = (plan.sum(-2) - b).abs().sum(-1)
    close(torch.maximum(rows, columns), solution.marginal_error, rtol=1e-5, atol=1e-12)
    assert torch.minimum(rows, columns).max() < 1e-12  # the side updated last is exact
    close((a * f).sum(-1), (b * g).sum(-1), rtol=1e-9, atol=1e-12)
    close(solution.transport_cost, (plan * cost).sum((-2, -1)), rtol=1e-9, atol=1e-12)
    close(solution.value, (a * f).sum(-1) + (b * g).sum(-1), rtol=1e-9, atol=1e-12)
    assert solution.converged == bool((solution.marginal_error <= tolerance).all())
    assert solution.iterations >= 1
    if solution.converged:
        close(naive.objective(plan, a, b, cost, epsilon), solution.value, **slack)
        close(f, naive.soft_minimum(g, b, cost, epsilon), **slack)
        close(g, naive.soft_minimum(f, a, cost.mT, epsilon), **slack)


def centred(gradient: torch.Tensor) -> torch.Tensor:
    """A gradient in probabilities up to the constant that their sum leaves free."""
    return gradient - gradient.mean(-1, keepdim=True)


def objective_and_solver(**options):
    """An objective and the settings of its solver, from the options of both."""
    names = {field.name for field in dataclasses.fields(SolverSettings)}
    solver = SolverSettings(**{name: x for name, x in options.items() if name in names})
    chosen = {name: x for name, x in options.items() if name not in names}
    chosen["penalties"] = as_penalties(chosen.pop("marginal_relaxation", None))
    return Objective(**chosen), solver
