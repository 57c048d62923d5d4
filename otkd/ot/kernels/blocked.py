"""The cost between embeddings without a stored matrix: rows are recomputed for every use.

A block of rows is an ordinary matrix, which is applied by products or in the log domain, depending
on the range of its costs. An application takes the time of the products x·yᵀ and of those with the
masses of all problems, and the memory of one block.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from otkd.costs import EmbeddingCost
from otkd.costs.base import Side
from otkd.ot.kernels.base import Kernel
from otkd.ot.kernels.choice import dense_kernel
from otkd.ot.kernels.lazy import LazyCost
from otkd.tensors import block_elements

_BLOCK_ELEMENTS_ON_CPU = 2**21
_BLOCK_ELEMENTS_ON_DEVICE = 2**26
_FEWEST_ROWS = 64  # so that the work on all columns for every block is small in comparison


class PointCost(LazyCost):
    """A constant :class:`~otkd.costs.EmbeddingCost` between two sides, as points in space.

    Args:
        cost: the cost; only its points are stored.
        sides: which tokens are rows, and which are columns.
        dtype: of the computations.
        device: of the computations.

    Attributes:
        points: the rows ``(n, d)`` and the columns ``(m, d)``; one tensor within one vocabulary.

    Raises:
        ValueError: if the cost is not an ``EmbeddingCost``, or is learnable, because its gradient
            is a matrix.
    """

    def __init__(
        self,
        cost: EmbeddingCost,
        sides: tuple[Side, Side] = ("source", "target"),
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        if not isinstance(cost, EmbeddingCost):
            raise ValueError(
                f"{type(self).__name__} requires an EmbeddingCost, got {type(cost).__name__}"
            )
        if cost.learns:
            raise ValueError(
                "a learnable embedding needs the gradient of every pair of tokens, which is not "
                "stored here: use learnable=False, or otkd.supports.TopK(64)"
            )
        device = torch.device(device)
        source = cost.coordinates(sides[0], dtype, device)
        within = cost.one_vocabulary or sides[0] == sides[1]
        self.points = source, source if within else cost.coordinates(sides[1], dtype, device)
        self.embedding_cost = cost
        super().__init__((len(self.points[0]), len(self.points[1])), dtype)

    @property
    def within(self) -> bool:
        """Whether rows and columns are the same tokens."""
        return self.points[0] is self.points[1]

    def largest(self) -> float:
        """A bound from the distance of the points to their origin; for the cosine 2, scaled."""
        if self.embedding_cost.metric == "cosine":
            return 2 / self.embedding_cost.scale
        x, y = (side.norm(dim=-1).max().item() for side in self.points)
        reach = (x + y) ** 2 if self.embedding_cost.metric == "sqeuclidean" else x + y
        return reach / self.embedding_cost.scale


class BlockedCost(PointCost):
    """A constant embedding cost whose rows torch recomputes in blocks."""

    def kernel(self, epsilon: float) -> BlockedKernel:
        """See :class:`~otkd.ot.kernels.lazy.LazyCost`."""
        return BlockedKernel(self, epsilon)

    @property
    def mT(self) -> BlockedCost:
        """The transposed cost."""
        if self.within:
            return self
        other = copy.copy(self)
        other.points, other.shape = self.points[::-1], self.shape[::-1]
        return other

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows and their costs, ``(rows, m)``; exactly 0 between a token and itself."""
        x, y = self.points
        elements = block_elements(x.device, _BLOCK_ELEMENTS_ON_CPU, _BLOCK_ELEMENTS_ON_DEVICE)
        size = max(_FEWEST_ROWS, elements // len(y))
        for start in range(0, len(x), size):
            block = self.embedding_cost.distance(x[start : start + size], y)
            if self.within:
                block.diagonal(start).zero_()
            yield slice(start, start + size), block


class SharedKernel(Kernel):
    """exp(−C/ε) of a constant cost that all problems share."""

    def rows(self, index: Tensor) -> SharedKernel:
        """The kernel itself, which all problems share."""
        return self

    def coupling(self, f: Tensor, g: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """Not available for a constant cost.

        Raises:
            NotImplementedError: always, because it would be as large as the cost.
        """
        raise NotImplementedError("the coupling of a lazy cost would be as large as the cost")


class BlockedKernel(SharedKernel):
    """exp(−C/ε) from the rows of a :class:`BlockedCost`."""

    def __init__(self, cost: BlockedCost, epsilon: float):
        self.lazy_cost, self.epsilon = cost, epsilon

    @property
    def transposed(self) -> BlockedKernel:
        """The kernel of the transposed cost, whose rows are recomputed."""
        return BlockedKernel(self.lazy_cost.mT, self.epsilon)

    def softmin(self, g: Tensor, log_b: Tensor) -> Tensor:
        """See :class:`~otkd.ot.kernels.base.Kernel`."""
        return self._by_rows(lambda kernel, rows: kernel.softmin(g, log_b))

    def mean(self, f: Tensor, g: Tensor, b: Tensor, y: Tensor) -> Tensor:
        """See :class:`~otkd.ot.kernels.base.Kernel`."""
        return self._by_rows(lambda kernel, rows: kernel.mean(f[:, rows], g, b, y))

    def mean_cost(self, f: Tensor, g: Tensor, b: Tensor) -> Tensor:
        """See :class:`~otkd.ot.kernels.base.Kernel`."""
        return self._by_rows(lambda kernel, rows: kernel.mean_cost(f[:, rows], g, b))

    def _by_rows(self, apply: Callable[[Kernel, slice], Tensor]) -> Tensor:
        blocks = self.lazy_cost.blocks()
        return torch.cat([apply(dense_kernel(c, self.epsilon), rows) for rows, c in blocks], -1)
