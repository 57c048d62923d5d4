"""Costs that need no embedding: by identity, by order, or by an explicit matrix."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from otkd.costs.base import Cost, CostMatrices, Side, hold, power_bound, same_for_all
from otkd.costs.checks import check_self_cost, has_positive_kernel
from otkd.scalars import as_flag, as_positive
from otkd.tensors import check_floating


class DiscreteCost(Cost):
    """0 between a token and itself, 1 between two different tokens: exact transport is TVD.

    Example:
        >>> student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> otkd.WassersteinLoss(otkd.costs.DiscreteCost())(student, teacher)
        tensor(0.2311)
        >>> otkd.TVDLoss()(student, teacher)
        tensor(0.2311)
    """

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
        """The cost itself, because 0 and 1 are their own powers."""
        return self


class OrdinalCost(Cost):
    """|i − j|^p between token (or class) i and j.

    Args:
        p: the exponent, above 0. For p ≤ 2 the debiased divergence is non-negative.

    Raises:
        TypeError, ValueError: if ``p`` is not a finite number above 0.

    Example:
        >>> otkd.costs.OrdinalCost()(3, 3)
        tensor([[0., 1., 2.],
                [1., 0., 1.],
                [2., 1., 0.]])
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
        """True for p ≤ 2 (Schoenberg, 1938)."""
        return self.p <= 2

    def extra_repr(self) -> str:
        """The exponent."""
        return f"p={self.p}"


class MatrixCost(Cost):
    """A cost given as a matrix, which is not normalised.

    Args:
        matrix: ``(V_s, V_t)``. Debiasing requires a square, symmetric matrix with a zero diagonal.
        learnable: let gradients flow into the matrix. The tensor itself is used, so later changes
            of it change the cost, and a ``Parameter`` becomes a parameter of the loss. With False
            the cost keeps a copy.

    Raises:
        ValueError: if it is not a matrix, or holds numbers that are not finite or exceed 1e30.

    Example:
        >>> cost = otkd.costs.MatrixCost(torch.tensor([[0.0, 0.5], [0.5, 0.0]]))
        >>> otkd.WassersteinLoss(cost)(torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 9.0]]))
        tensor(0.4999)
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
        """The largest absolute entry at the time the cost was built."""
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
        """See :class:`Cost`; a constant matrix is checked once."""
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
                f"a matrix of shape {tuple(self.matrix.shape)} does not define the costs within a "
                "side, which debiasing needs: use debias=None or EmbeddingCost(source, target)"
            )
        matrix = self.matrix.mT if sides == ("target", "source") else self.matrix
        return matrix.to(dtype)[x.unsqueeze(-1), y.unsqueeze(-2)]

    @property
    def learns(self) -> bool:
        """Whether the cost was built with ``learnable=True``."""
        return self.learnable

    def keeps_divergence_positive(self, epsilon: float) -> bool:
        """Checked by factorising the kernel, for up to 1024 tokens; otherwise unknown (False)."""
        return has_positive_kernel(self.matrix, epsilon)
