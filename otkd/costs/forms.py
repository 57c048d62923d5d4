"""The forms in which transport functions accept a cost."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from otkd.checks import check_cost_shape
from otkd.costs.base import Cost, CostMatrices
from otkd.costs.checks import check_self_cost, check_symmetric
from otkd.costs.simple import MatrixCost


def as_cost(cost: Cost | Tensor, *, learnable: bool = False) -> Cost:
    """The cost between the tokens of a vocabulary, from an object or a matrix.

    Raises:
        TypeError: if ``cost`` has another form.
        ValueError: if it is a tensor but not a matrix.
    """
    if isinstance(cost, Cost):
        return cost
    if isinstance(cost, Tensor):
        return MatrixCost(cost, learnable=learnable)
    raise TypeError(
        "cost must be a (vocab, vocab) tensor or a cost object of otkd.costs, got "
        f"{type(cost).__name__}"
    )


def as_cost_matrices(
    cost: Cost | Tensor | tuple[Tensor, Tensor, Tensor],
    a: Float[Tensor, "*batch n"],
    b: Float[Tensor, "*#batch m"],
    *,
    self_terms: bool = False,
) -> CostMatrices:
    """The cost matrices, from any form in which a cost can be given.

    Raises:
        TypeError: if ``cost`` has another form.
        ValueError: if it does not fit the sizes, if ``self_terms`` are requested of a single tensor
            that is not a self-cost, or if a self-cost is not symmetric.
    """
    n, m = a.shape[-1], b.shape[-1]
    if isinstance(cost, Cost):
        dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
        return cost.matrices(n, m, dtype=dtype, device=a.device, self_terms=self_terms)
    if isinstance(cost, Tensor):
        if not self_terms:
            return CostMatrices(cost)
        check_cost_shape(cost, n, m)
        check_self_cost(cost)
        return CostMatrices(cost, cost, cost)
    if isinstance(cost, tuple) and len(cost) == 3:
        if self_terms:
            for within in cost[1:]:
                check_symmetric(within)
        return CostMatrices(*cost)
    raise TypeError(
        "cost must be a tensor, a cost object of otkd.costs, or (C_ab, C_aa, C_bb), got "
        f"{type(cost).__name__}"
    )
