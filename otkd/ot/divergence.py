"""One transport problem, or the three of a debiased divergence, from options to values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from otkd.checks import check_choice, check_positive
from otkd.costs import CostMatrices
from otkd.ot.gradients import dual_value, sharp_value
from otkd.ot.kernels import Kernel
from otkd.ot.problem import Problem, flatten_problem
from otkd.ot.solution import warn_not_converged
from otkd.ot.solver import Potentials, solve_potentials
from otkd.precision import without_autocast
from otkd.scalars import as_flag, as_positive, as_whole, settle

VALUES = ("dual", "sharp")
BACKENDS = ("auto", "torch", "keops", "triton")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How the entropic problem is set and solved; one object from the loss down to the solver.

    ``plain_steps`` is for :func:`~otkd.ot.solver.solve_potentials`; the others are a loss's.
    """

    epsilon: float = 0.1
    tolerance: float = 1e-4
    max_iterations: int = 1000
    value: str = "dual"
    debias: bool = True
    unbalanced: float | None = None
    backend: str = "auto"
    plain_steps: int = 0

    def __post_init__(self):
        settle(
            self,
            epsilon=as_positive("epsilon", self.epsilon),
            tolerance=as_positive("tolerance", self.tolerance),
            max_iterations=as_whole("max_iterations", self.max_iterations),
            debias=as_flag("debias", self.debias),
        )
        check_choice("value", self.value, VALUES)
        check_choice("backend", self.backend, BACKENDS)
        if self.unbalanced is not None:
            check_positive(unbalanced=self.unbalanced)
            if self.value != "dual":
                raise ValueError(f"unbalanced transport has value='dual' alone, got {self.value!r}")

    @property
    def penalty(self) -> float:
        """ρ of the penalised marginals; infinite where they are held."""
        return math.inf if self.unbalanced is None else self.unbalanced


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the solver did, for logs.

    Attributes:
        iterations: the most iterations any of the solves took.
        marginal_error: the largest L1 marginal error of any problem, a scalar tensor.
        converged: whether every marginal error is within the tolerance.
        support: what took part: tokens, or the samples of a batch.
        backend: what computed the kernel products.
        coverage: mean over the positions of the mass that the head has, on the side that has less
            of it; a scalar tensor, None where every token took part.
        worst_coverage: the same at the position where it is least.
    """

    iterations: int
    marginal_error: Tensor
    converged: bool
    support: str = "every point"
    backend: str = "torch"
    coverage: Tensor | None = None
    worst_coverage: Tensor | None = None

    @classmethod
    def of(cls, blocks: Sequence[Report], **fields) -> Report:
        """One report of all blocks of positions."""
        return cls(
            iterations=max(block.iterations for block in blocks),
            marginal_error=torch.stack([block.marginal_error for block in blocks]).max(),
            converged=all(block.converged for block in blocks),
            **fields,
        )


@dataclass(frozen=True)
class Transport:
    """One solved problem: its value ``(B,)``, differentiable, and what it was solved with."""

    value: Tensor
    kernel: Kernel
    potentials: Potentials
    sharp: bool


@dataclass(frozen=True)
class DivergenceSolution:
    """The divergences of a batch.

    Attributes:
        value: ``(*batch,)``, differentiable in masses and costs.
        report: what the solver did.
        parts: the solved problems, flattened: (a, b), then with debiasing (a, a) and (b, b).
    """

    value: Tensor
    report: Report
    parts: tuple[tuple[Problem, Transport], ...]

    def shares(self) -> tuple[Tensor, Tensor]:
        """What a unit of mass at each point adds to the value, ``(*batch, n)``, ``(*batch, m)``.

        ⟨a, source⟩ + ⟨b, target⟩ is the value up to the marginal error. Detached.
        """
        with without_autocast(self.value):
            (source, target), *self_terms = [
                _shares(problem, transport) for problem, transport in self.parts
            ]
        if self_terms:
            source = source - self_terms[0][0]
            target = target - self_terms[1][1]
        batch = self.value.shape
        return (
            source.reshape(*batch, source.shape[-1]),
            target.reshape(*batch, target.shape[-1]),
        )


def solve_transport(
    problem: Problem,
    options: Options,
    kernel: Kernel | None = None,
    start: Tensor | None = None,
) -> Transport:
    """Solve one batch of problems, from a guess of g, and attach the gradient of its value."""
    limits = {"tolerance": options.tolerance, "max_iterations": options.max_iterations}
    fixed = problem.detached()
    kernel = fixed.kernel() if kernel is None else kernel
    potentials = solve_potentials(
        fixed, kernel, start=start, plain_steps=options.plain_steps, **limits
    )
    if not potentials.converged:
        warn_not_converged(potentials.iterations, potentials.marginal_error, options.tolerance)
    if options.value == "dual":
        value = dual_value(problem, kernel, potentials)
    else:
        value = sharp_value(problem, kernel, potentials, **limits)
    return Transport(value, kernel, potentials, sharp=options.value == "sharp")


def solve_divergence(
    a: Tensor,
    b: Tensor,
    cost: CostMatrices,
    options: Options,
    *,
    target_value: Tensor | None = None,
) -> DivergenceSolution:
    """OT_ε(a, b), or with ``options.debias`` OT_ε(a, b) − ½·OT_ε(a, a) − ½·OT_ε(b, b).

    ``target_value`` is OT_ε(b, b) where it is known, ``(*batch,)``.
    """
    a, b, cross_cost, batch = flatten_problem(a, b, cost.cross)
    within: list[tuple[Problem, Transport]] = []
    kernels: dict[int, Kernel] = {}  # one vocabulary: the three costs are one, and so their kernels
    start = None
    with without_autocast(a):
        if options.debias:
            for masses, self_cost in ((a, cost.source), (b, cost.target)):
                if self_cost is None:
                    raise ValueError("a debiased divergence needs the cost within each side")
                if masses is b and target_value is not None:
                    continue
                _, _, matrix, _ = flatten_problem(masses, masses, self_cost, batch)
                problem = Problem(masses, masses, matrix, options.epsilon, True, options.penalty)
                transport = solve_transport(problem, options, kernels.get(id(self_cost)))
                kernels[id(self_cost)] = transport.kernel
                within.append((problem, transport))
                # Near a = b, where a good student is, the potentials of (b, b) are those of (a, b).
                start = transport.potentials.f if masses is b else None
        problem = Problem(a, b, cross_cost, options.epsilon, penalty=options.penalty)
        transport = solve_transport(problem, options, kernels.get(id(cost.cross)), start)
    parts = ((problem, transport), *within)
    value = transport.value
    for _, self_term in within:
        value = value - self_term.value / 2
    if options.debias and target_value is not None:
        value = value - target_value.reshape(-1) / 2
    if options.debias and options.unbalanced is not None:
        # Séjourné et al. (2019), "Sinkhorn Divergences for Unbalanced Optimal Transport".
        value = value + options.epsilon / 2 * (a.sum(-1) - b.sum(-1)).square()
    potentials = [transport.potentials for _, transport in parts]
    errors = [p.marginal_error.max() for p in potentials if p.marginal_error.numel()]
    return DivergenceSolution(
        value=value.reshape(batch),
        report=Report(
            iterations=max(p.iterations for p in potentials),
            marginal_error=torch.stack(errors).max() if errors else a.detach().new_zeros(()),
            converged=all(p.converged for p in potentials),
        ),
        parts=parts,
    )


def _shares(problem: Problem, transport: Transport) -> tuple[Tensor, Tensor]:
    """How the value of one problem is divided among the points of its two sides."""
    f, g = transport.potentials.f, transport.potentials.g
    if transport.sharp:
        kernel = transport.kernel
        row_cost = kernel.mean_cost(f, g, problem.b.detach())
        column_cost = kernel.transposed.mean_cost(g, f, problem.a.detach())
        return row_cost / 2, column_cost / 2
    return f, g
