"""Costs that need no embedding: given by identity, by order or by a matrix."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from otkd.costs.base import Cost, CostMatrices, Side, hold, power_bound, same_for_all
from otkd.costs.checks import check_self_cost, has_positive_kernel
from otkd.scalars import as_flag, as_positive
from otkd.tensors import check_floating


class DiscreteCost(Cost):
    """0 between a token and itself, 1 between any two others: exact transport is TVD."""

    def matrices(
        self, n: int, m: int, *, dtype: torch.dtype, device: torch.device, self_terms: bool
    ) -> CostMatrices:
        """See :class:`Cost`."""
        self.check_size(n, m)
        return same_for_all(1 - torch.eye(n, dtype=dtype, device=device), self_terms)

    def largest(self, n: int, m: int) -> float:
        """See :class:`Cost`."""
        return 1.0

    def between(
        self,
        x: Int[Tensor, "batch k"],
        y: Int[Tensor, "batch l"],
        sides: tuple[Side, Side],
        dtype: torch.dtype,
    ) -> Float[Tensor, "batch k l"]:
        """See :class:`Cost`."""
        return (x.unsqueeze(-1) != y.unsqueeze(-2)).to(dtype)

    def power(self, p: float) -> Cost:
        """0 and 1 are their own powers."""
        return self


class OrdinalCost(Cost):
    """|i − j|^p between the i-th and the j-th token (or class), in units of one step.

    Args:
        p: the exponent, above 0; at most 2 for a debiased divergence that is ≥ 0.

    Raises:
        TypeError, ValueError: if ``p`` is not a finite number above 0.
    """

    def __init__(self, p: float = 1.0) -> None:
        super().__init__()
        self.p = float(as_positive("p", p))

    def largest(self, n: int, m: int) -> float:
        """See :class:`Cost`."""
        return power_bound(max(n, m) - 1.0, self.p)

    def matrices(
        self, n: int, m: int, *, dtype: torch.dtype, device: torch.device, self_terms: bool
    ) -> CostMatrices:
        """See :class:`Cost`."""
        self.check_size(n, m)
        places = torch.arange(n, dtype=dtype, device=device)
        return same_for_all((places[:, None] - places[None, :]).abs() ** self.p, self_terms)

    def between(
        self,
        x: Int[Tensor, "batch k"],
        y: Int[Tensor, "batch l"],
        sides: tuple[Side, Side],
        dtype: torch.dtype,
    ) -> Float[Tensor, "batch k l"]:
        """See :class:`Cost`."""
        return (x.unsqueeze(-1) - y.unsqueeze(-2)).abs().to(dtype) ** self.p

    def power(self, p: float) -> Cost:
        """|i − j|^(p·q)."""
        return OrdinalCost(self.p * p)

    def keeps_divergence_positive(self, epsilon: float) -> bool:
        """True up to p = 2 (Schoenberg, 1938)."""
        return self.p <= 2

    def extra_repr(self) -> str:
        """The exponent."""
        return f"p={self.p}"


class MatrixCost(Cost):
    """A cost given entry by entry, in the units it is given in.

    Args:
        matrix: ``(V_s, V_t)``; square, symmetric and zero on the diagonal where debiasing is to
            be possible.
        learnable: let gradients flow into the matrix, and see every change of it: the very tensor
            is used, and a ``Parameter`` becomes a parameter of the loss. Otherwise the cost keeps a
            copy of it as it is now.

    Raises:
        ValueError: if it is no matrix or holds numbers that are not finite, or beyond 1e30.
    """

    matrix: Tensor

    def __init__(self, matrix: Float[Tensor, "source target"], *, learnable: bool = False) -> None:
        super().__init__()
        sound = matrix.ndim == 2 and matrix.is_floating_point() and matrix.numel() > 0
        if sound:
            check_floating("the matrix of a cost", matrix, "(source, target)")
        if not (sound and matrix.detach().isfinite().all()):
            raise ValueError(
                "MatrixCost needs a matrix (source, target) of finite floating-point numbers, got "
                f"shape {tuple(matrix.shape)} and dtype {matrix.dtype}"
            )
        self.shape = (matrix.shape[0], matrix.shape[1])
        self.learnable = as_flag("learnable", learnable)
        hold(self, "matrix", matrix, self.learnable)
        self._bound = matrix.detach().abs().max().double().item()
        self.check_size(*self.shape)
        self._checked_within = False

    def largest(self, n: int, m: int) -> float:
        """The largest entry when the cost was built, whatever its sign."""
        return self._bound

    def matrices(
        self, n: int, m: int, *, dtype: torch.dtype, device: torch.device, self_terms: bool
    ) -> CostMatrices:
        """See :class:`Cost`."""
        self.check_size(n, m)
        if self_terms:
            self.check_within()
        return same_for_all(self.matrix.to(device, dtype), self_terms)

    def check_within(self) -> None:
        """See :class:`Cost`; of a constant, once."""
        if not self._checked_within:
            check_self_cost(self.matrix)
            self._checked_within = not self.learns

    def between(
        self,
        x: Int[Tensor, "batch k"],
        y: Int[Tensor, "batch l"],
        sides: tuple[Side, Side],
        dtype: torch.dtype,
    ) -> Float[Tensor, "batch k l"]:
        """See :class:`Cost`."""
        if sides[0] == sides[1] and self.bridges_vocabularies:
            raise ValueError(
                f"a matrix of shape {tuple(self.matrix.shape)} does not say the costs within a "
                "side that debiasing needs: use debias=False or EmbeddingCost(source, target)"
            )
        matrix = self.matrix.mT if sides == ("target", "source") else self.matrix
        return matrix.to(dtype)[x.unsqueeze(-1), y.unsqueeze(-2)]

    @property
    def learns(self) -> bool:
        """Whether it was made ``learnable``."""
        return self.learnable

    def keeps_divergence_positive(self, epsilon: float) -> bool:
        """Checked by factorising the kernel, up to 1024 tokens; beyond, taken as not shown."""
        return has_positive_kernel(self.matrix, epsilon)
