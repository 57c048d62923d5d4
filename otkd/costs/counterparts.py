"""The nearest token of the other vocabulary."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from otkd.costs.base import Cost

_BLOCK_ELEMENTS = 2**24  # of costs, or of gathered embeddings


def nearest_sources(
    cost: Cost, targets: Int[Tensor, "batch k"], sizes: tuple[int, int], dtype: torch.dtype
) -> Int[Tensor, "batch k"]:
    """The source token with the least cost to each target token; the first of several.

    For a constant cost it is computed once for each token that is asked for.
    """
    every, places = targets.unique(return_inverse=True)
    if cost.learns:
        return _nearest(cost, every, sizes[0], dtype)[places]
    table = cost.kept(
        ("counterparts", sizes, dtype, targets.device),
        lambda: torch.full((sizes[1],), -1, dtype=torch.long, device=targets.device),
    )
    unknown = every[table[every] < 0]
    if len(unknown):
        table[unknown] = _nearest(cost, unknown, sizes[0], dtype)
    return table[targets]


@torch.no_grad()
def _nearest(cost: Cost, targets: Tensor, sources: int, dtype: torch.dtype) -> Tensor:
    every = torch.arange(sources, device=targets.device).unsqueeze(0)
    size = max(1, _BLOCK_ELEMENTS // sources)
    blocks = [
        cost.between(block.unsqueeze(0), every, ("target", "source"), dtype).argmin(-1).squeeze(0)
        for block in targets.split(size)
    ]
    return torch.cat(blocks) if blocks else targets
