"""A weighted sum of costs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from otkd.costs.base import Cost, CostMatrices, Side
from otkd.scalars import as_positive


class SumCost(Cost):
    """w₁·C₁ + w₂·C₂ + …, for example of an embedding and of prefixes.

    A sum keeps what is known of its costs: their means over the vocabulary, and whether the
    debiased divergence is positive. The minimum of two costs would keep neither.

    Args:
        costs: between the same tokens.
        weights: of each, above 0; 1 by default.

    Raises:
        TypeError: if an entry is not a cost, or a weight not a number.
        ValueError: if there is no cost, their number differs from that of the weights, they are
            between different tokens, or a weight is not above 0.

    Example:
        >>> order, equal = otkd.costs.OrdinalCost(), otkd.costs.DiscreteCost()
        >>> otkd.costs.SumCost([order, equal], weights=[0.5, 2])(3, 3)
        tensor([[0.0000, 2.5000, 3.0000],
                [2.5000, 0.0000, 2.5000],
                [3.0000, 2.5000, 0.0000]])
    """

    def __init__(self, costs: Sequence[Cost], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        costs = list(costs)
        for cost in costs:
            if not isinstance(cost, Cost):
                raise TypeError(f"SumCost needs costs of otkd.costs, got {type(cost).__name__}")
        if not costs:
            raise ValueError("SumCost needs at least one cost")
        weights = [1.0] * len(costs) if weights is None else list(weights)
        if len(weights) != len(costs):
            raise ValueError(f"got {len(costs)} costs, but {len(weights)} weights")
        self.costs = nn.ModuleList(costs)
        self.weights = [float(as_positive("a weight of SumCost", weight)) for weight in weights]
        shapes = {cost.shape for cost in costs if cost.shape is not None}
        if len(shapes) > 1 or len({cost.one_vocabulary for cost in costs}) > 1:
            each = ", ".join(f"{type(cost).__name__} {cost.shape}" for cost in costs)
            raise ValueError(f"the costs of a sum must be between the same tokens, got {each}")
        self.shape = next(iter(shapes), None)
        self.width = sum(cost.width for cost in costs)
        if self.shape is not None:
            self.check_size(*self.shape)

    def _parts(self) -> list[tuple[float, Cost]]:
        return list(zip(self.weights, self.costs, strict=True))  # pyright: ignore[reportReturnType]

    def _sum(self, values: Sequence[Tensor]) -> Tensor:
        return sum(
            (weight * value for weight, value in zip(self.weights, values, strict=True)),
            start=torch.zeros_like(values[0]),
        )

    def largest(self, n: int, m: int) -> float:
        """See :class:`Cost`."""
        return math.fsum(weight * cost.largest(n, m) for weight, cost in self._parts())

    def matrices(
        self, n: int, m: int, *, dtype: torch.dtype, device: torch.device, self_terms: bool
    ) -> CostMatrices:
        """See :class:`Cost`."""
        parts = [
            cost.matrices(n, m, dtype=dtype, device=device, self_terms=self_terms)
            for _, cost in self._parts()
        ]
        sums = [
            None if values[0] is None else self._sum(values)  # pyright: ignore[reportArgumentType]
            for values in zip(*parts, strict=True)
        ]
        if self.one_vocabulary and self_terms:  # the same matrix, which is recognised as such
            sums = sums[:1] * 3
        return CostMatrices(*sums)  # pyright: ignore[reportArgumentType]

    def between(
        self,
        x: Int[Tensor, "batch k"],
        y: Int[Tensor, "batch l"],
        sides: tuple[Side, Side],
        dtype: torch.dtype,
    ) -> Float[Tensor, "batch k l"]:
        """See :class:`Cost`."""
        return self._sum([cost.between(x, y, sides, dtype) for _, cost in self._parts()])

    def mean_to_all(
        self, tokens: Int[Tensor, "batch k"], sides: tuple[Side, Side], dtype: torch.dtype
    ) -> Float[Tensor, "batch k"] | None:
        """The sum of the means; None if one of them has no closed form."""
        means = [cost.mean_to_all(tokens, sides, dtype) for _, cost in self._parts()]
        known = [mean for mean in means if mean is not None]
        return self._sum(known) if len(known) == len(means) else None

    def check_within(self) -> None:
        """See :class:`Cost`."""
        for _, cost in self._parts():
            cost.check_within()

    def forget(self) -> None:
        """See :class:`Cost`."""
        super().forget()
        for _, cost in self._parts():
            cost.forget()

    @property
    def learns(self) -> bool:
        """Whether one of the costs is learnable."""
        return any(cost.learns for _, cost in self._parts())

    @property
    def one_vocabulary(self) -> bool:
        """Whether the costs are for one vocabulary."""
        return all(cost.one_vocabulary for _, cost in self._parts())

    def keeps_divergence_positive(self, epsilon: float) -> bool:
        """True if it is for each cost: their kernels are multiplied entry by entry (Schur)."""
        return all(
            cost.keeps_divergence_positive(epsilon / weight) for weight, cost in self._parts()
        )

    def extra_repr(self) -> str:
        """The weights."""
        return f"weights={self.weights}"
