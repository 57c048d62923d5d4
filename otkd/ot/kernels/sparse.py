"""A kernel that is exact on a sparse graph and has rank one elsewhere.

Only the pairs (i, j) of a graph have costs of their own. All other pairs are approximated:

    exp(−C_ij/ε) ≈ K_ij = S_ij + u_i·v_j,   S_ij = max(exp(−C_ij/ε) − u_i·v_j, 0) on the graph,

so that no pair is forbidden and every transport problem is feasible. An application consists of one
product of S with all problems, and of one scalar product with v per problem.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from otkd.ot.kernels.base import LARGEST_EXPONENT, LARGEST_LOG_DENSITY, Kernel, centred_weights
from otkd.ot.kernels.lazy import LazyCost

_LOG_DOMAIN_BLOCK = 2**22

FarField = Callable[[float], tuple[Tensor, Tensor]]
"""From ε to log u ``(n,)`` and log v ``(m,)``; −∞ for a point that is joined to all others."""


@dataclass(frozen=True)
class Graph:
    """Pairs (i, j) of n source and m target points, row by row as in a sparse CSR matrix.

    Attributes:
        shape: ``(n, m)``.
        offsets: start of the pairs of each row and, last, their number, ``(n + 1,)``.
        columns: j of every pair, ascending within a row, ``(E,)``, int32 like the offsets.
        symmetric: whether (j, i) is in the graph, with the same cost, for every (i, j).
    """

    shape: tuple[int, int]
    offsets: Tensor
    columns: Tensor
    symmetric: bool

    @classmethod
    def of(
        cls, rows: Tensor, columns: Tensor, shape: tuple[int, int], *, symmetric: bool = False
    ) -> tuple[Graph, Tensor]:
        """The graph of distinct pairs in any order, and the permutation that sorts them."""
        order = (rows.long() * shape[1] + columns).argsort()
        index = torch.int32 if len(order) < 2**31 else torch.int64
        offsets = torch.zeros(shape[0] + 1, dtype=index, device=rows.device)
        offsets[1:] = torch.bincount(rows, minlength=shape[0]).cumsum(0)
        return cls(shape, offsets, columns[order].to(index), symmetric), order

    @property
    def degrees(self) -> Tensor:
        """The number of pairs of each row, ``(n,)``."""
        return self.offsets.diff()

    @property
    def rows(self) -> Tensor:
        """I of every pair, ``(E,)``."""
        places = torch.arange(self.shape[0], device=self.offsets.device)
        return places.repeat_interleave(self.degrees, output_size=len(self.columns))

    def transposed(self) -> tuple[Graph, Tensor]:
        """The transposed graph, and the permutation of the pairs."""
        return Graph.of(self.columns, self.rows, (self.shape[1], self.shape[0]))

    def sums(self, values: Tensor, vectors: Tensor) -> Tensor:
        """Σ_j values_ij·vectors_j with one value per pair, ``(B, m) -> (B, n)``.

        Implemented with embedding bags, which torch computes two to three times as fast as CSR
        products.
        """
        return nn.functional.embedding_bag(
            self.columns,
            vectors.T.contiguous(),
            self.offsets,
            per_sample_weights=values,
            mode="sum",
            include_last_offset=True,
        ).T.contiguous()


class SparseCost(LazyCost):
    """Costs on a graph, and a rank-one kernel for all other pairs.

    Args:
        graph: the pairs that have a cost of their own.
        costs: of these pairs, ``(E,)``.
        far_field: gives log u and log v for an ε; for a symmetric graph the two are equal.

    The kernel of the last ε is cached.
    """

    def __init__(self, graph: Graph, costs: Tensor, far_field: FarField):
        super().__init__(graph.shape, costs.dtype)
        self.graph, self.costs, self.far_field = graph, costs, far_field
        self._kernel: SparseKernel | None = None

    def kernel(self, epsilon: float) -> SparseKernel:
        """See :class:`~otkd.ot.kernels.lazy.LazyCost`."""
        if self._kernel is None or self._kernel.epsilon != epsilon:
            self._kernel = sparse_kernel(self.graph, self.costs, *self.far_field(epsilon), epsilon)
        return self._kernel

    def largest(self) -> float:
        """An upper bound of the costs, including the approximated ones (of the last ε)."""
        own = self.costs.abs().max().item() if len(self.costs) else 0.0
        if self._kernel is None:
            return own
        kernel = self._kernel
        return max(own, kernel.epsilon * _far_reach(kernel.log_u, kernel.log_v))


class SparseKernel(Kernel):
    """K = S + u·vᵀ, applied by products.

    Args:
        graph: the pairs of S.
        cost: of these pairs, ``(E,)``.
        log_u: ``(n,)``.
        log_v: ``(m,)``.
        epsilon: strength of the entropic regularisation.
    """

    def __init__(self, graph: Graph, cost: Tensor, log_u: Tensor, log_v: Tensor, epsilon: float):
        super().__init__(cost, epsilon)
        self.graph, self.log_u, self.log_v = graph, log_u, log_v
        self._transposed: SparseKernel | None = self if graph.symmetric else None
        self.sparse = self._sparse_entries()

    @property
    def transposed(self) -> SparseKernel:
        """The transposed kernel: itself if it is symmetric, otherwise computed once."""
        if self._transposed is None:
            graph, order = self.graph.transposed()
            other = type(self)(graph, self.cost[order], self.log_v, self.log_u, self.epsilon)
            other._transposed, self._transposed = self, other
        return self._transposed

    def rows(self, index: Tensor) -> SparseKernel:
        """See :class:`~otkd.ot.kernels.base.Kernel`; the problems share the cost."""
        return self

    def softmin(self, g: Tensor, log_b: Tensor) -> Tensor:
        """See :class:`~otkd.ot.kernels.base.Kernel`."""
        weights, shift = centred_weights(log_b, g, self.epsilon)
        return self._apply(weights).log_().add_(shift).mul_(-self.epsilon)

    def mean(self, f: Tensor, g: Tensor, b: Tensor, y: Tensor) -> Tensor:
        """See :class:`~otkd.ot.kernels.base.Kernel`."""
        weights, shift = centred_weights(b.log(), g, self.epsilon)
        return self._apply(weights * y) * (f / self.epsilon + shift).exp()

    def mean_cost(self, f: Tensor, g: Tensor, b: Tensor) -> Tensor:
        """See :class:`~otkd.ot.kernels.base.Kernel`; the far field costs −ε·log(u_i·v_j)."""
        weights, shift = centred_weights(b.log(), g, self.epsilon)
        log_far, log_kernel = self._log_entries()
        entropies = _times_log(log_kernel) - _times_log(log_far)
        far = weights @ torch.stack([self.log_v.exp(), _times_log(self.log_v)], -1)
        product = self.graph.sums(entropies, weights)
        product = product + _times_log(self.log_u) * far[:, :1] + self.log_u.exp() * far[:, 1:]
        return -self.epsilon * product * (f / self.epsilon + shift).exp()

    def coupling(self, f: Tensor, g: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """Not available for a constant cost."""
        raise NotImplementedError("a sparse cost is constant and has no gradient")

    def _apply(self, weights: Tensor) -> Tensor:
        near = self.graph.sums(self.sparse, weights)
        return near.addcmul_(self.log_u.exp(), (weights @ self.log_v.exp()).unsqueeze(-1))

    def _sparse_entries(self) -> Tensor:
        """The stored entries of S, ``(E,)``."""
        log_far, log_kernel = self._log_entries()
        return log_kernel.exp() * -torch.expm1(log_far - log_kernel)

    def _log_entries(self) -> tuple[Tensor, Tensor]:
        """Log u_i·v_j and log K_ij of the pairs of the graph, ``(E,)``."""
        log_far = self.log_u[self.graph.rows] + self.log_v[self.graph.columns]
        return log_far, torch.maximum(self.cost / -self.epsilon, log_far)


class SparseLogKernel(SparseKernel):
    """K = S + u·vᵀ by log-sum-exp, for every ε, in blocks of rows of the graph."""

    def _sparse_entries(self) -> Tensor:
        log_far, log_kernel = self._log_entries()
        return log_kernel + (-torch.expm1(log_far - log_kernel)).log_()

    def softmin(self, g: Tensor, log_b: Tensor) -> Tensor:
        """See :class:`~otkd.ot.kernels.base.Kernel`."""
        log_weights = log_b + g / self.epsilon
        near = self._near(log_weights, self.sparse)
        far = self.log_u + (log_weights + self.log_v).logsumexp(-1, keepdim=True)
        return -self.epsilon * torch.logaddexp(near, far)

    def mean(self, f: Tensor, g: Tensor, b: Tensor, y: Tensor) -> Tensor:
        """See :class:`~otkd.ot.kernels.base.Kernel`."""
        f, log_weights = f / self.epsilon, b.log() + g / self.epsilon
        near = self._near(log_weights, self.sparse, f, y=y)
        return near + self._far(log_weights, f, y)

    def mean_cost(self, f: Tensor, g: Tensor, b: Tensor) -> Tensor:
        """See :class:`~otkd.ot.kernels.base.Kernel`."""
        f, log_weights = f / self.epsilon, b.log() + g / self.epsilon
        log_far, log_kernel = self._log_entries()
        near = self._near(log_weights, log_kernel, f, factors=_finite(log_kernel))
        near = near - self._near(log_weights, log_far, f, factors=_finite(log_far))
        far = self._far(log_weights, f, _finite(self.log_v).expand_as(log_weights))
        far = far + _finite(self.log_u) * self._far(log_weights, f, torch.ones_like(log_weights))
        return -self.epsilon * (near + far)

    def _near(self, log_weights, log_entries, f=None, *, y=None, factors=None) -> Tensor:
        """Sums over the pairs of each row: their log, or given f times e^f, y_j and factors."""
        blocks = []
        columns = log_weights.T.contiguous()
        for first, last, pairs in self._row_blocks(log_weights.shape[0]):
            degrees = self.graph.degrees[first:last].long()
            local = torch.arange(last - first, device=degrees.device).repeat_interleave(degrees)
            places = self.graph.columns[pairs]
            terms = columns[places] + log_entries[pairs].unsqueeze(-1)
            if f is None:
                index = local.unsqueeze(-1).expand_as(terms)
                low = torch.finfo(terms.dtype).min
                top = terms.new_full((last - first, terms.shape[1]), low)
                top = top.scatter_reduce(0, index, terms, "amax").clamp_(min=low)
                total = torch.zeros_like(top).index_add_(0, local, (terms - top[local]).exp_())
                blocks.append(total.log_().add_(top))
                continue
            terms = (terms + f.T[first:last][local]).clamp_(max=LARGEST_LOG_DENSITY[terms.dtype])
            terms.exp_()
            terms = terms if y is None else terms * y.T[places]
            terms = terms if factors is None else terms * factors[pairs].unsqueeze(-1)
            blocks.append(terms.new_zeros(last - first, terms.shape[1]).index_add_(0, local, terms))
        return torch.cat(blocks).T

    def _far(self, log_weights: Tensor, f: Tensor, y: Tensor) -> Tensor:
        terms = log_weights + self.log_v
        top = terms.amax(-1, keepdim=True).clamp(min=torch.finfo(terms.dtype).min)
        total = ((terms - top).exp_() * y).sum(-1, keepdim=True)
        limit = LARGEST_LOG_DENSITY[terms.dtype]
        return total * (self.log_u + f + top).clamp(max=limit).exp()

    def _row_blocks(self, problems: int):
        offsets = self.graph.offsets.tolist()
        size, first = max(1, _LOG_DOMAIN_BLOCK // max(1, problems)), 0
        for row in range(1, len(offsets)):
            if row == len(offsets) - 1 or offsets[row + 1] - offsets[first] > size:
                yield first, row, slice(offsets[first], offsets[row])
                first = row


def sparse_kernel(
    graph: Graph, cost: Tensor, log_u: Tensor, log_v: Tensor, epsilon: float
) -> SparseKernel:
    """Products if every entry of the kernel is representable, otherwise the log domain."""
    own = cost.abs().max().item() / epsilon if len(cost) else 0.0
    reach = max(own, _far_reach(log_u, log_v))
    products = reach <= LARGEST_EXPONENT[cost.dtype]
    return (SparseKernel if products else SparseLogKernel)(graph, cost, log_u, log_v, epsilon)


def _far_reach(log_u: Tensor, log_v: Tensor) -> float:
    """−log of the smallest u_i·v_j; 0 if all pairs are in the graph."""
    smallest = (x[x.isfinite()] for x in (log_u, log_v))
    return -sum(x.min().item() if len(x) else 0.0 for x in smallest)


def _finite(logs: Tensor) -> Tensor:
    return logs.masked_fill(logs.isneginf(), 0.0)


def _times_log(logs: Tensor) -> Tensor:
    """x·log x, 0 at 0."""
    return logs.exp() * _finite(logs)
