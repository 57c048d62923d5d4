"""Kernels: products with exp(−C/ε), or the same in the log domain.

The solver and the gradients use only four operations, each for all problems of a batch, with
E_ij = exp((f_i + g_j − C_ij)/ε) the density of the plan against a⊗b:

    softmin      −ε·log Σ_j b_j·exp((g_j − C_ij)/ε)
    mean         Σ_j b_j·E_ij·y_j
    mean_cost    Σ_j b_j·E_ij·C_ij
    coupling     left_i·right_j·E_ij, added up over the problems that share the cost

For a cost that is computed from other tensors, ``pull_back`` gives the gradient in those instead of
the coupling.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

# exp(−60) keeps products with masses far above subnormal numbers, which are slow and inaccurate.
LARGEST_EXPONENT = {torch.float32: 60.0, torch.float64: 300.0}
# A weight this far below the largest matters only if its kernel entry is larger by the limit above;
# the loss is at most exp(−20) of a sum.
SMALLEST_LOG_WEIGHT = {torch.float32: -80.0, torch.float64: -350.0}
_LOOK_EVERY = 8  # plain steps between checks of the error; a check takes less time than two steps
_FURTHEST = 80.0  # of f/ε below its largest entry, so that exp stays above 0
_LOG_DOMAIN_BLOCK = 2**22
# A density is at most 1/mass, but unbounded between points without mass, and 0·inf would be NaN.
LARGEST_LOG_DENSITY = {torch.float32: 80.0, torch.float64: 700.0}


class Kernel(ABC):
    """exp(−C/ε) of a batch of problems, applied to potentials."""

    def __init__(self, cost: Tensor, epsilon: float):
        self.cost = cost
        self.epsilon = epsilon

    @property
    def reach(self) -> float:
        """The largest C/ε if it is known to be below 1, which bounds the potentials divided by ε.

        They then need a correspondingly smaller tolerance, and iterations converge at once.
        """
        return 1.0

    @property
    def scales(self) -> bool:
        """Whether it can :meth:`alternate` and :meth:`average`, on exp(f/ε) instead of f."""
        return False

    def alternate(
        self, f: Tensor, log_a: Tensor, log_b: Tensor, count: int, tolerance: float = 0.0
    ) -> tuple[Tensor, int]:
        """Potentials f after at most ``count`` updates of both, and their number.

        The updates stop if the L1 marginal error, which is checked regularly, is at most
        ``tolerance`` for every problem.
        """
        raise NotImplementedError

    def average(self, f: Tensor, log_a: Tensor, count: int) -> Tensor:
        """Potentials f of a symmetric problem after ``count`` steps halfway to the soft minimum."""
        raise NotImplementedError

    @property
    @abstractmethod
    def transposed(self) -> Kernel:
        """The kernel of the problem with source and target exchanged."""

    @abstractmethod
    def rows(self, index: Tensor) -> Kernel:
        """The kernel of only the problems ``index``."""

    @abstractmethod
    def softmin(self, g: Tensor, log_b: Tensor) -> Tensor:
        """−ε·log Σ_j b_j·exp((g_j − C_ij)/ε), ``(B, m) -> (B, n)``."""

    @abstractmethod
    def mean(self, f: Tensor, g: Tensor, b: Tensor, y: Tensor) -> Tensor:
        """Σ_j b_j·exp((f_i + g_j − C_ij)/ε)·y_j, ``(B, n)``."""

    @abstractmethod
    def mean_cost(self, f: Tensor, g: Tensor, b: Tensor) -> Tensor:
        """Σ_j b_j·exp((f_i + g_j − C_ij)/ε)·C_ij, ``(B, n)``."""

    @abstractmethod
    def coupling(self, f: Tensor, g: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """left_i·right_j·exp((f_i + g_j − C_ij)/ε), in the shape of the cost.

        If the problems share a cost, their couplings are added up.
        """

    def pull_back(
        self, f: Tensor, g: Tensor, left: Tensor, right: Tensor, needed: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        """Gradients in the inputs of the cost, if the gradient in C_ij is the coupling.

        ``needed`` says which are needed, in the order of
        :attr:`otkd.ot.problem.Problem.cost_inputs`.
        """
        return (self.coupling(f, g, left, right) if needed[0] else None,)


class ScalingKernel(Kernel):
    """A kernel that is applied directly to positive vectors, such as exp(f/ε)."""

    _scales = False

    @property
    def scales(self) -> bool:
        """See :class:`Kernel`."""
        return self._scales

    @abstractmethod
    def apply(self, vectors: Tensor, out: Tensor | None = None) -> Tensor:
        """Σ_j exp(−C_ij/ε)·v_j, ``(B, m) -> (B, n)``."""

    @property
    @abstractmethod
    def transposed(self) -> ScalingKernel:
        """See :class:`Kernel`."""

    def softmin(self, g: Tensor, log_b: Tensor) -> Tensor:
        """See :class:`Kernel`."""
        weights, shift = centred_weights(log_b, g, self.epsilon)
        return self.apply(weights).log_().add_(shift).mul_(-self.epsilon)

    def alternate(
        self, f: Tensor, log_a: Tensor, log_b: Tensor, count: int, tolerance: float = 0.0
    ) -> tuple[Tensor, int]:
        """See :class:`Kernel`."""
        left, shift = centred_weights(log_a, f, self.epsilon)
        a, b, backward = log_a.exp(), log_b.exp(), self.transposed
        right, sums = torch.empty_like(b), torch.empty_like(a)
        made, solved = 0, False
        while made < count and not solved:
            made += 1  # with the masses in the scalings, each update is one division
            torch.div(b, backward.apply(left, out=right), out=right)
            self.apply(right, out=sums)
            if made % _LOOK_EVERY == 0 and made < count:
                error = torch.addcmul(a, left, sums, value=-1).abs_().sum(-1)
                solved = bool(error.amax() <= tolerance)
            torch.div(a, sums, out=left)
        return sums.log_().neg_().add_(shift).mul_(self.epsilon), made

    def average(self, f: Tensor, log_a: Tensor, count: int) -> Tensor:
        """See :class:`Kernel`."""
        # Adding a constant to f does not change its image.
        log_u = torch.sub(f, f.amax(-1, keepdim=True)).div_(self.epsilon)
        u = log_u.clamp_(min=-_FURTHEST).exp_()
        a = log_a.exp()
        for _ in range(count):
            u = (u / self.apply(a * u)).sqrt_()
        return u.log_().mul_(self.epsilon)

    def mean(self, f: Tensor, g: Tensor, b: Tensor, y: Tensor) -> Tensor:
        """See :class:`Kernel`."""
        weights, shift = centred_weights(b.log(), g, self.epsilon)
        return self.apply(weights * y) * (f / self.epsilon + shift).exp()


class ProductKernel(ScalingKernel):
    """K = exp(−C/ε) as a matrix; every application is a matrix product over all problems."""

    def __init__(
        self, cost: Tensor, epsilon: float, kernel: Tensor | None = None, *, scales: bool = False
    ):
        super().__init__(cost, epsilon)
        self.kernel = (cost * (-1 / epsilon)).exp_() if kernel is None else kernel
        self._columns = self.kernel.mT
        self._scales = scales

    @property
    def transposed(self) -> ProductKernel:
        """The transposed kernel; nothing is copied."""
        return ProductKernel(self.cost.mT, self.epsilon, self._columns, scales=self.scales)

    def rows(self, index: Tensor) -> ProductKernel:
        """See :class:`Kernel`."""
        if self.cost.ndim == 2:
            return self
        return ProductKernel(self.cost[index], self.epsilon, self.kernel[index], scales=self.scales)

    def apply(self, vectors: Tensor, out: Tensor | None = None) -> Tensor:
        """See :class:`ScalingKernel`."""
        return products(vectors, self._columns, out)

    def mean_cost(self, f: Tensor, g: Tensor, b: Tensor) -> Tensor:
        """See :class:`Kernel`."""
        weights, shift = centred_weights(b.log(), g, self.epsilon)
        product = products(weights, (self.kernel * self.cost).mT)
        return product * (f / self.epsilon + shift).exp()

    def coupling(self, f: Tensor, g: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """See :class:`Kernel`."""
        left, right = left * self._scaling(f), right * self._scaling(g)
        if self.cost.ndim == 2:
            return (left.mT @ right).mul_(self.kernel)
        return (self.kernel * left.unsqueeze(-1)).mul_(right.unsqueeze(-2))

    def _scaling(self, f: Tensor) -> Tensor:
        """exp(f/ε), finite also at points without mass."""
        return (f / self.epsilon).clamp_(max=LARGEST_LOG_DENSITY[f.dtype]).exp_()


def centred_weights(log_b: Tensor, g: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """b·exp(g/ε) divided by its largest entry, and the log of that entry."""
    log_weights = torch.add(log_b, g, alpha=1 / epsilon)
    shift = log_weights.amax(-1, keepdim=True)
    weights = log_weights.sub_(shift).exp_()
    # Smaller ones do not affect the sums, but would be subnormal in the products, which is slow.
    smallest = math.exp(SMALLEST_LOG_WEIGHT[weights.dtype])
    return torch.threshold_(weights, smallest, 0.0), shift


def products(vectors: Tensor, matrix: Tensor, out: Tensor | None = None) -> Tensor:
    """Each of ``vectors (B, m)`` times ``matrix (m, n)``, or times its own of ``(B, m, n)``."""
    if matrix.ndim == 2:
        return torch.mm(vectors, matrix, out=out)
    # As a row, because torch is many times slower for a column.
    rows = None if out is None else out.unsqueeze(-2)
    return torch.bmm(vectors.unsqueeze(-2), matrix, out=rows).squeeze(-2)


class LogKernel(Kernel):
    """Log-sum-exp over C/ε, exact for every ε, in blocks of problems."""

    @property
    def transposed(self) -> LogKernel:
        """The kernel of the transposed cost."""
        return LogKernel(self.cost.mT, self.epsilon)

    def rows(self, index: Tensor) -> LogKernel:
        """See :class:`Kernel`."""
        return self if self.cost.ndim == 2 else LogKernel(self.cost[index], self.epsilon)

    def softmin(self, g: Tensor, log_b: Tensor) -> Tensor:
        """See :class:`Kernel`."""
        blocks = [
            torch.logsumexp(log_b[rows, None, :] + (g[rows, None, :] - cost) / self.epsilon, -1)
            for rows, cost in self._blocks(len(g))
        ]
        return -self.epsilon * torch.cat(blocks) if blocks else g.new_zeros(0, self.cost.shape[-2])

    def mean(self, f: Tensor, g: Tensor, b: Tensor, y: Tensor) -> Tensor:
        """See :class:`Kernel`."""
        return self._contract(f, g, b * y, times_cost=False)

    def mean_cost(self, f: Tensor, g: Tensor, b: Tensor) -> Tensor:
        """See :class:`Kernel`."""
        return self._contract(f, g, b, times_cost=True)

    def coupling(self, f: Tensor, g: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """See :class:`Kernel`."""
        blocks = (
            coupling_density(f[rows], g[rows], cost, self.epsilon)
            * left[rows].unsqueeze(-1)
            * right[rows].unsqueeze(-2)
            for rows, cost in self._blocks(len(f))
        )
        if self.cost.ndim > 2:
            return torch.cat(list(blocks)) if len(f) else torch.zeros_like(self.cost)
        total = torch.zeros_like(self.cost)
        for block in blocks:
            total += block.sum(0)
        return total

    def _contract(self, f: Tensor, g: Tensor, weights: Tensor, *, times_cost: bool) -> Tensor:
        blocks = []
        for rows, cost in self._blocks(len(f)):
            coupling = coupling_density(f[rows], g[rows], cost, self.epsilon)
            mass = weights[rows].unsqueeze(-1)
            if times_cost:  # the masses first, because a density may be as large as a cost
                coupling, mass = (coupling * mass.mT) * cost, torch.ones_like(mass)
            blocks.append((coupling @ mass).squeeze(-1))
        return torch.cat(blocks) if blocks else f.clone()

    def _blocks(self, problems: int):
        n, m = self.cost.shape[-2:]
        size = max(1, _LOG_DOMAIN_BLOCK // max(1, n * m))
        for start in range(0, problems, size):
            rows = slice(start, start + size)
            yield rows, self.cost if self.cost.ndim == 2 else self.cost[rows]


def coupling_density(f: Tensor, g: Tensor, cost: Tensor, epsilon: float) -> Tensor:
    """E_ij = exp((f_i + g_j − C_ij)/ε), the density of the plan against a⊗b, ``(B, n, m)``."""
    exponents = log_density(f, g, cost, epsilon)
    return exponents.clamp_(max=LARGEST_LOG_DENSITY[exponents.dtype]).exp_()


def log_density(f: Tensor, g: Tensor, cost: Tensor, epsilon: float) -> Tensor:
    """(f_i + g_j − C_ij)/ε, ``(B, n, m)``."""
    return (f.unsqueeze(-1) + g.unsqueeze(-2) - cost).div_(epsilon)
