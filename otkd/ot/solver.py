"""Sinkhorn iterations on dual potentials, without autograd.

The entropic problem (see :class:`otkd.ot.problem.Problem`) has the dual

    max over f, g of ⟨a, f⟩ + ⟨b, g⟩ − ε·(Σ_ij a_i·b_j·exp((f_i + g_j − C_ij)/ε) − 1),

which is solved by alternating exact maximisation: f ← softmin(g), g ← softmin(f). If a = b and the
cost is symmetric, f ← ½(f + softmin(f)) converges in a few iterations (Feydy et al., 2019,
"Interpolating between Optimal Transport and MMD using Sinkhorn Divergences"). With relaxed
marginals every soft minimum is multiplied by ρ/(ρ + ε) (Chizat et al., 2018, "Scaling Algorithms
for Unbalanced Optimal Transport Problems"). At points without mass the potentials are also defined
by the soft minimum.

Both are fixed-point iterations on f and are accelerated (:mod:`otkd.ot.acceleration`). Solved
problems keep their result, and leave the batch as soon as they are half of it.

If iterations converge slowly, Newton's method (:mod:`otkd.ot.newton`) continues from them, and one
more iteration measures the error of its result. With few targets, Newton's method comes first.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from otkd.ot.acceleration import Anderson
from otkd.ot.kernels.base import Kernel
from otkd.ot.newton import newton_potentials
from otkd.ot.potentials import Potentials, excess_of
from otkd.ot.problem import Problem

_CHEAP = 2  # times as many iterations before Newton's method if some of them are plain
_FIRST = 4  # times as many plain steps at first
_GROWTH = 8  # the next plain steps are at most so many times those made so far
_SEEN = 0.1  # share of a row's mass that is missing in the plan
_FEW_TARGETS = 10  # up to here a Newton step costs as much as an easy problem's iterations
_FAST = 0.5  # error ratio of an iteration at which a handful of iterations is enough
_MOST_TARGETS = 256  # above, Newton's method would take seconds


@torch.no_grad()
def solve_potentials(
    problem: Problem,
    kernel: Kernel,
    *,
    tolerance: float,
    max_iterations: int,
    start: Tensor | None = None,
    plain_steps: int = 0,
    least_mass: Tensor | None = None,
    weights: Tensor | None = None,
) -> Potentials:
    """Iterate until the L1 marginal error of every problem is at most ``tolerance``.

    Args:
        problem: in normal form.
        kernel: of its cost.
        tolerance: of the L1 marginal error.
        max_iterations: limit of updates of both potentials.
        start: first guess of g, ``(B, m)``; by default 0. If only the source is relaxed, f is 0 at
            first instead: at a = b, the potential of a single relaxed side is about 0 if all costs
            are high, however small a mass.
        plain_steps: largest number of plain updates after every accelerated one, if the kernel
            makes them cheap. They are neither measured nor accelerated, and speed up small
            problems, for which measuring takes longer than an update.
        least_mass: ``(B,)``. With relaxed marginals the plan may have far less mass than both
            sides. The error is then relative to the mass of the plan, down to this mass; by
            default it is absolute.
        weights: ``(B, n)``, of the errors of the row sums over their masses; by default the masses.
    """
    if problem.symmetric:
        update: _Update = _Averaging(problem, kernel)
        f = kernel.softmin(torch.zeros_like(problem.a), problem.log_masses()[0]) / 2
    else:
        update = _Alternation(problem, kernel)
        if start is not None:  # it may be the solution, and nothing else finds it as exactly
            update.patience = max(update.patience, 1.0)
        near_zero = start is None and problem.target.held and not problem.source.held
        if near_zero or problem.source.free:
            f = torch.zeros_like(problem.a)
        else:
            start = torch.zeros_like(problem.b) if start is None else start
            damping = problem.source.damping(problem.epsilon)
            f = damping * kernel.softmin(start, problem.log_masses()[1])
    if not (problem.balanced and kernel.scales):
        plain_steps = 0
    if plain_steps:
        update.patience *= _CHEAP
    weights = problem.a if weights is None else weights
    return _iterate(problem, update, f, tolerance, max_iterations, plain_steps, least_mass, weights)


class _Update(ABC):
    """One step of the fixed-point iteration on f."""

    patience: float = math.inf  # number of iterations before :meth:`leap`

    def __init__(self, problem: Problem, kernel: Kernel):
        self.epsilon = problem.epsilon
        self.source, self.target = problem.source, problem.target
        self.damping = self.source.damping(self.epsilon)
        self.kernel = kernel
        self.log_a, self.log_b = problem.log_masses()

    @abstractmethod
    def __call__(self, f: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """g, the next f, the best f for this g, and ``log Σ_j b_j·E_ij`` of the plan of f and g."""

    @abstractmethod
    def repeat(self, f: Tensor, count: int, tolerance: float) -> tuple[Tensor, int]:
        """Potentials f after at most ``count`` more steps, with a kernel that supports scaling."""

    def leap(self, f: Tensor, tolerance: float, max_steps: int) -> tuple[Tensor, int]:
        """The optimal f by Newton's method, starting from f, and the number of steps."""
        raise NotImplementedError

    def keep(self, rows: Tensor) -> None:
        """Continue with only the problems ``rows``."""
        self.kernel = self.kernel.rows(rows)
        self.log_a, self.log_b = self.log_a[rows], self.log_b[rows]

    def _log_rows(self, f: Tensor, softmin: Tensor) -> Tensor:
        return torch.sub(f, softmin).div_(self.epsilon)


class _Alternation(_Update):
    def __init__(self, problem: Problem, kernel: Kernel):
        super().__init__(problem, kernel)
        self.transposed = kernel.transposed
        self.target_damping = self.target.damping(self.epsilon)
        self.a, self.b = problem.a, problem.b
        targets = problem.b.shape[-1]
        # Every iteration multiplies the error of the potentials by at most this.
        self.slow = self.damping * self.target_damping > _FAST and kernel.reach >= 1
        if self.slow and targets <= _MOST_TARGETS and isinstance(problem.cost, Tensor):
            # A Newton step takes about as many times longer as there are targets.
            self.patience = 0.0 if targets <= _FEW_TARGETS else float(targets)

    def __call__(self, f):
        # Columns are updated last and are exact, so only the rows can show an error.
        g = _damped(self.transposed.softmin(f, self.log_a), self.target_damping)
        softmin = self.kernel.softmin(g, self.log_b)
        best = _damped(softmin, self.damping)
        return g, self._in_gauge(best, g), best, self._log_rows(f, softmin)

    def repeat(self, f, count, tolerance):
        f, made = self.kernel.alternate(f, self.log_a, self.log_b, count, tolerance)
        return self._in_gauge(f), made

    def leap(self, f, tolerance, max_steps):
        g, steps = newton_potentials(
            self.log_a,
            self.log_b,
            self.kernel.cost,
            self.epsilon,
            penalties=(self.source.penalty, self.target.penalty),
            start=self.target_damping * self.transposed.softmin(f, self.log_a),
            tolerance=tolerance,
            max_steps=max_steps,
        )
        return self._in_gauge(self.damping * self.kernel.softmin(g, self.log_b), g), steps

    def _in_gauge(self, f: Tensor, g: Tensor | None = None) -> Tensor:
        """The potential f with the constant that suits it best added.

        If both marginals are held, every constant gives the same plan; it is fixed, because
        extrapolation could let it grow without bound. Otherwise the constant is added to f and
        subtracted from g so that the dual is maximal, which plain iterations approach slowly
        (Séjourné et al., 2022, "Faster Unbalanced Optimal Transport: Translation invariant
        Sinkhorn and 1-D Frank-Wolfe").
        """
        if self.source.held and self.target.held:
            return f - torch.linalg.vecdot(self.a, f).unsqueeze(-1)
        if not self.slow:
            return f
        assert g is not None
        of_source = self.source.log_mass(self.a, self.log_a, f)
        surplus = of_source - self.target.log_mass(self.b, self.log_b, g)
        rho = 1 / (1 / self.source.penalty + 1 / self.target.penalty)
        return f + rho * surplus

    def keep(self, rows):
        super().keep(rows)
        self.transposed = self.kernel.transposed
        self.a, self.b = self.a[rows], self.b[rows]


def _damped(softmin: Tensor, damping: float) -> Tensor:
    return softmin if damping == 1 else damping * softmin


class _Averaging(_Update):
    def __call__(self, f):
        softmin = self.kernel.softmin(f, self.log_a)
        best = _damped(softmin, self.damping)
        return f, (f + best) / 2, best, self._log_rows(f, softmin)

    def repeat(self, f, count, tolerance):
        return self.kernel.average(f, self.log_a, count), count


def _iterate(
    problem: Problem,
    update: _Update,
    f: Tensor,
    tolerance: float,
    max_iterations: int,
    plain_steps: int,
    least_mass: Tensor | None,
    weights: Tensor,
) -> Potentials:
    a, source = problem.a, problem.source
    tolerance = tolerance * update.kernel.reach
    members, unsolved = torch.arange(len(a), device=a.device), torch.ones_like(a[:, 0]) > 0
    found = [torch.zeros_like(x) for x in (a, problem.b, a, a[:, 0])]
    left, iteration, patience = len(a), 0, update.patience
    # Plain steps solve an easy problem before acceleration would pay off.
    first = min(_FIRST * plain_steps, max_iterations - 1, patience)
    if first > 0 and not problem.symmetric:
        f, iteration = update.repeat(f, int(first), tolerance)
    accelerator = Anderson(weights, f, problem.epsilon)
    while True:
        if patience <= iteration < max_iterations - 1:
            f, steps = update.leap(f, tolerance, max_iterations - 1 - iteration)
            accelerator, patience = Anderson(weights, f, problem.epsilon), math.inf
            iteration += steps
        iteration += 1
        last = iteration == max_iterations
        if last:
            f = accelerator.best_image
        g, image, best, log_rows = update(f)
        missing, mass = excess_of(log_rows), None
        if not source.held:
            optimal = excess_of(source.optimal_log_ratio(f, log_rows))
            missing = missing - optimal
            if least_mass is not None:
                mass = torch.linalg.vecdot(a, 1 + optimal)
                mass = torch.maximum(mass, least_mass[members]).clamp_(max=1)
        error = torch.linalg.vecdot(weights, missing.abs())
        error = error if mass is None else error / mass
        done = unsolved if last else unsolved & (error <= tolerance)
        rows = done.nonzero().squeeze(-1)
        if len(rows):  # the result does not depend on the rest of the batch
            at_once = len(rows) == len(problem.a)
            kept = [x if at_once else x[rows] for x in (f, g, log_rows, error)]
            sources, best = (weights, best) if at_once else (weights[rows], best[rows])
            kept[0], kept[2] = _settled(problem, sources, kept[0], best, kept[2], tolerance)
            if at_once:
                found = kept
            else:
                places = members[rows]
                for whole, part in zip(found, kept, strict=True):
                    whole[places] = part
            unsolved = unsolved & ~done
            left -= len(rows)
        if left == 0:
            break
        # Few at first, because few may be enough.
        more = min(plain_steps, _GROWTH * iteration, max_iterations - iteration - 1)
        if more > 0:
            image, made = update.repeat(image, more, tolerance)
            iteration += made
        f = accelerator.next_point(f, image, error)
        if 2 * left <= len(members) or (left < len(members) and iteration >= patience):
            rows = unsolved.nonzero().squeeze(-1)
            members, unsolved, a, f = members[rows], unsolved[rows], a[rows], f[rows]
            weights = weights[rows]
            accelerator.keep(rows)
            update.keep(rows)
    f, g, log_rows, error = found
    if problem.symmetric:
        g = f
    if problem.balanced:
        difference = torch.linalg.vecdot(problem.b, g) - torch.linalg.vecdot(problem.a, f)
        shift = difference.unsqueeze(-1) / 2
        f, g = f + shift, g - shift
    return Potentials(f, g, log_rows, error, iteration, bool((error <= tolerance).all()))


def _settled(
    problem: Problem, weights: Tensor, f: Tensor, best: Tensor, log_rows: Tensor, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Potentials f and log row sums, with the best f where the error does not depend on f.

    These are points without mass, or with so little mass that acceleration could have moved f
    anywhere: the row then lacks at most its whole mass. The columns change by what those rows
    lacked, which remains part of the error.
    """
    optimal_log_ratio = problem.source.optimal_log_ratio
    missing = (excess_of(log_rows) - excess_of(optimal_log_ratio(f, log_rows))).abs()
    unseen = (weights <= 0) | ((weights <= tolerance / _SEEN) & (missing > _SEEN))
    settled = torch.where(unseen, optimal_log_ratio(best, log_rows), log_rows)
    return torch.where(unseen, best, f), settled
