"""The cost c·|x_i − y_j| between probabilities, without a matrix: sums along the line.

On a line the kernel splits at each point x,

    Σ_j exp(−c·|x − y_j|/ε)·v_j = e^(−cx/ε)·Σ_{y_j ≤ x} e^(cy_j/ε)·v_j
                                + e^(cx/ε)·Σ_{y_j > x} e^(−cy_j/ε)·v_j,

and both sums are cumulative sums over the sorted points. After sorting, an application takes
O(n + m) time and memory instead of O(n·m) with a matrix. The gradient splits in the same way, with
the difference of the two parts instead of the sum. All distances between distributions over two
classes have this form.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from otkd.ot.kernels.base import LARGEST_EXPONENT, ScalingKernel
from otkd.ot.kernels.blocked import SharedKernel
from otkd.ot.kernels.flat import LARGEST_FLAT_REACH
from otkd.ot.kernels.lazy import LazyCost

_CENTRE = 0.5  # centre of the points, which halves the largest exponent


class LineCost(LazyCost):
    """``slope · |x_i − y_j|`` between probabilities ``x (n,)`` and ``y (m,)``, differentiable."""

    def __init__(self, x: Tensor, y: Tensor, slope: float):
        super().__init__((len(x), len(y)), x.dtype)
        self.x, self.y, self.slope = x, y, slope
        self.inputs = x, y

    @staticmethod
    def represents(slope: float, epsilon: float, dtype: torch.dtype) -> bool:
        """Whether exp(−C/ε) of the pairs is neither close to 0 nor close to 1 in this dtype."""
        return LARGEST_FLAT_REACH <= slope / epsilon <= LARGEST_EXPONENT[dtype]

    def detach(self) -> LineCost:
        """See :class:`~otkd.ot.kernels.lazy.LazyCost`."""
        return LineCost(self.x.detach(), self.y.detach(), self.slope)

    def kernel(self, epsilon: float) -> LineKernel:
        """See :class:`~otkd.ot.kernels.lazy.LazyCost`."""
        return LineKernel(self.x, self.y, self.slope, epsilon)

    def largest(self) -> float:
        """See :class:`~otkd.ot.kernels.lazy.LazyCost`."""
        return self.slope


class LineKernel(SharedKernel, ScalingKernel):
    """exp(−c·|x_i − y_j|/ε), applied by sums along the line."""

    def __init__(
        self, x: Tensor, y: Tensor, slope: float, epsilon: float, other: LineKernel | None = None
    ):
        x, y = x.contiguous(), y.contiguous()
        self.x, self.y, self.slope, self.epsilon = x, y, slope, epsilon
        self._other = other
        # y in ascending, then in descending order: one cumulative sum serves both directions.
        ordered, order = y.sort()
        self._order = torch.cat([order, order.flip(0)])
        self._rise = self._exponentials(ordered, (1, -1))
        self._rise[1] = self._rise[1].flip(0)
        self._fall = self._exponentials(x, (-1, 1))
        up_to, below = (torch.searchsorted(ordered, x, right=right) for right in (True, False))
        self._sums = self._places(up_to, up_to)
        self._differences = self._places(below, up_to)  # a point at x itself is on neither side

    @property
    def transposed(self) -> LineKernel:
        """See :class:`~otkd.ot.kernels.base.Kernel`."""
        if self._other is None:
            self._other = LineKernel(self.y, self.x, self.slope, self.epsilon, self)
        return self._other

    def apply(self, vectors: Tensor, out: Tensor | None = None) -> Tensor:
        """See :class:`~otkd.ot.kernels.base.ScalingKernel`."""
        below, above = self._parts(vectors, *self._sums)
        return torch.add(below, above, out=out)

    def mean_cost(self, f: Tensor, g: Tensor, b: Tensor) -> Tensor:
        """See :class:`~otkd.ot.kernels.base.Kernel`."""
        # |x − y| is x − y on one side and y − x on the other.
        weights = b * (g / self.epsilon).exp()
        signed = self.x * self._apply_signed(weights) - self._apply_signed(weights * self.y)
        return self.slope * signed * (f / self.epsilon).exp()

    def pull_back(
        self, f: Tensor, g: Tensor, left: Tensor, right: Tensor, needed: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        """See :meth:`Kernel.pull_back`: Σ_j coupling_ij·c·sign(x_i − y_j), and for y."""
        left = left * (f / self.epsilon).exp()
        right = right * (g / self.epsilon).exp()
        of_x = (left * self._apply_signed(right)).sum(0) if needed[0] else None
        of_y = (right * self.transposed._apply_signed(left)).sum(0) if needed[1] else None
        return tuple(None if part is None else self.slope * part for part in (of_x, of_y))

    def _apply_signed(self, vectors: Tensor) -> Tensor:
        """Σ_j sign(x_i − y_j)·exp(−C_ij/ε)·v_j."""
        below, above = self._parts(vectors, *self._differences)
        return below - above

    def _parts(self, vectors: Tensor, places: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
        """The contributions of the points of y below and above every x, ``(B, n)`` each."""
        ordered = vectors[:, self._order].view(len(vectors), 2, -1)
        sums = ordered.mul_(self._rise).cumsum_(-1).flatten(1)
        parts = sums[:, places].view(len(vectors), 2, -1).mul_(factors)
        return parts[:, 0], parts[:, 1]

    def _places(self, below: Tensor, up_to: Tensor) -> tuple[Tensor, Tensor]:
        """The indices of the sums of the ``below`` first and all but the ``up_to`` first points."""
        counts = torch.stack([below, len(self.y) - up_to])
        factors = self._fall.masked_fill(counts == 0, 0)  # no point on this side
        places = (counts - 1).clamp_(min=0)
        places[1] += len(self.y)
        return places.flatten(), factors

    def _exponentials(self, points: Tensor, signs: tuple[int, int]) -> Tensor:
        exponents = (points - _CENTRE) * (self.slope / self.epsilon)
        return torch.stack([sign * exponents for sign in signs]).exp_()
