"""Every token, with a kernel that is exact between near tokens and of rank one otherwise."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from otkd.costs import Cost, CostMatrices, EmbeddingCost
from otkd.costs.base import Side, same_for_all
from otkd.costs.tails import sample_tokens
from otkd.ot.kernels.sparse import Graph, SparseCost
from otkd.ot.options import Objective
from otkd.scalars import as_whole, settle
from otkd.supports.base import Positions, Selection, Support
from otkd.supports.dense import full_blocks
from otkd.supports.neighbour_index import nearest

Sides = tuple[Side, Side]

_GATHERED_ELEMENTS = 2**22
_FAR_BLOCK_PAIRS = 2**20


@dataclass(frozen=True)
class NearestNeighbours(Support):
    """Every token, with a sparse kernel, for vocabularies that are too large for a dense one.

    The kernel exp(−C/ε) is exact between each token and its k nearest tokens, which faiss finds.
    All other pairs use an approximation of rank one, K_ij ≈ u_i·v_j, computed from the mean of the
    kernel over a sample of the vocabulary (see :class:`MeanKernel`). Within one vocabulary, two
    tokens are neighbours if either is among the k nearest of the other, and every token is its own
    neighbour. Between two vocabularies, each token has its k nearest on the other side. With k ≥ V
    − 1 the result is that of :class:`~otkd.supports.Dense`. Time and memory of an iteration are of
    order k·V.

    Use it for distributions that are spread over many tokens. If most of the mass is on a few
    tokens, :class:`~otkd.supports.TopK` is both faster and more accurate. The approximate kernel
    may not be positive definite: the debiased divergence is 0 at p = q but may be negative
    elsewhere.

    Args:
        k: nearest tokens of each token; at least 1.
        cache_dir: folder in which neighbours are cached, one file per embedding; by default
            ``$OTKD_CACHE``, else ``~/.cache/otkd``.

    Raises:
        TypeError: if ``k`` is not a whole number.
        ValueError: if ``k`` is less than 1, or the cost is not a constant ``EmbeddingCost``.
        ImportError: if faiss is not installed and the neighbours are not cached.

    Example:
        >>> support = otkd.supports.NearestNeighbours(256)
        >>> loss = otkd.SinkhornLoss(embedding=torch.randn(1000, 8), support=support)
    """

    k: int = 256
    _: KW_ONLY
    cache_dir: Path | str | None = None

    def __post_init__(self) -> None:
        settle(self, k=as_whole("k", self.k))

    def check(self, cost: Cost, n: int, m: int, objective: Objective, backend: str) -> None:
        """See :class:`Support`."""
        super().check(cost, n, m, objective, backend)
        if not isinstance(cost, EmbeddingCost) or cost.learns:
            kind = f"{type(cost).__name__}{' that learns' if cost.learns else ''}"
            raise ValueError(
                f"NearestNeighbours requires an EmbeddingCost with learnable=False, got a {kind}; "
                "use otkd.supports.TopK or Dense for other costs"
            )

    def select(
        self, positions: Positions, cost: Cost, objective: Objective, backend: str
    ) -> Selection:
        """See :class:`Support`."""
        assert isinstance(cost, EmbeddingCost)
        device = positions.student.device
        costs = self._costs(cost, positions.dtype, device, self_terms=objective.debias is not None)
        return Selection(blocks=full_blocks(positions, costs), support=repr(self))

    def _costs(self, cost: EmbeddingCost, dtype, device, *, self_terms: bool) -> CostMatrices:
        """The sparse costs between and within the sides, cached with the cost."""
        kept: dict[tuple, Any] = cost.tail_constants

        def between(sides: Sides) -> Any:
            key = ("neighbours", self.k, sides, dtype, device)
            if key not in kept:
                kept[key] = self._cost(cost, sides, dtype, device)
            return kept[key]

        cross = between(("source", "target"))
        if cost.one_vocabulary or not self_terms:
            return same_for_all(cross, self_terms)
        return CostMatrices(cross, between(("source", "source")), between(("target", "target")))

    @torch.no_grad()
    def _cost(self, cost: EmbeddingCost, sides: Sides, dtype, device) -> SparseCost:
        within = cost.one_vocabulary or sides[0] == sides[1]
        k = self.k + within  # a token is its own nearest neighbour
        rows, columns, costs = self._near_pairs(cost, sides, k, dtype, device)
        if within:
            every = torch.arange(len(_embedding(cost, sides[0])), device=device)
            others = every, every, torch.zeros(len(every), dtype=dtype, device=device)
        else:
            others = self._near_pairs(cost, (sides[1], sides[0]), k, dtype, device)
            others = others[1], others[0], others[2]
        rows, columns, costs = (
            torch.cat(parts) for parts in zip((rows, columns, costs), others, strict=True)
        )
        shape = len(_embedding(cost, sides[0])), len(_embedding(cost, sides[1]))
        if within:  # (i, j) and (j, i) must have bitwise equal costs
            rows, columns = torch.minimum(rows, columns), torch.maximum(rows, columns)
        rows, columns, costs = _distinct(rows, columns, costs, shape[1])
        if within:
            others = rows != columns
            rows, columns = (
                torch.cat([rows, columns[others]]),
                torch.cat([columns, rows[others]]),
            )
            costs = torch.cat([costs, costs[others]])
        graph, order = Graph.of(rows, columns, shape, symmetric=within)
        return SparseCost(graph, costs[order], MeanKernel(cost, sides, graph, dtype))

    def _near_pairs(self, cost: EmbeddingCost, sides: Sides, k: int, dtype, device):
        """Every token of the first side with the k nearest of the second, and their costs."""
        queries, points = _embedding(cost, sides[0]), _embedding(cost, sides[1])
        table = nearest(queries, points, k, cost.metric, self.cache_dir).to(device).long()
        every = torch.arange(len(queries), device=device)
        size = max(1, _GATHERED_ELEMENTS // (table.shape[1] * points.shape[1]))
        costs = [
            cost.between(block.unsqueeze(-1), table[block], sides, dtype).flatten()
            for block in every.split(size)
        ]
        return every.repeat_interleave(table.shape[1]), table.flatten(), torch.cat(costs)


def _embedding(cost: EmbeddingCost, side: Side) -> Tensor:
    return cost.source if side == "source" or cost.target is None else cost.target


def _distinct(rows, columns, costs, m: int):
    """The pairs without repetitions."""
    key, order = (rows * m + columns).sort(stable=True)
    first = torch.ones_like(key, dtype=torch.bool)
    first[1:] = key[1:] != key[:-1]
    order = order[first]
    return rows[order], columns[order], costs[order]


@dataclass(frozen=True)
class MeanKernel:
    """The rank-one part u_i·v_j = (r_i·c_j/r̄)², with r and c row and column means of exp(−C/2ε).

    The means are over the pairs outside the graph, on a seeded sample of the other side (1024
    tokens, or all tokens up to 2048). Means of exp(−C/ε) are dominated by the nearest of these
    pairs, and exp(−mean C/ε) by the farthest; the mean of exp(−C/2ε) gave the smallest error of the
    gradient.
    """

    cost: EmbeddingCost
    sides: Sides
    graph: Graph
    dtype: torch.dtype

    @torch.no_grad()
    def __call__(self, epsilon: float) -> tuple[Tensor, Tensor]:
        """Log u and log v; −∞ for a token whose pairs are all in the graph."""
        log_u = self._scaled(self.graph, self.sides, epsilon)
        if self.graph.symmetric:
            return log_u, log_u
        return log_u, self._scaled(
            self.graph.transposed()[0], (self.sides[1], self.sides[0]), epsilon
        )

    def _scaled(self, graph: Graph, sides: Sides, epsilon: float) -> Tensor:
        """Log of the means, minus half of that of the overall mean."""
        means = self._log_means(graph, sides, 2 * epsilon)
        known = means[means.isfinite()]
        if not len(known):
            return means
        overall = known.logsumexp(0) - math.log(len(known))
        complete = graph.degrees == graph.shape[1]
        means = torch.where(means.isfinite() | complete, means, overall)
        return 2 * means - overall

    def _log_means(self, graph: Graph, sides: Sides, epsilon: float) -> Tensor:
        """Log of the row means of exp(−C/ε) over the sampled pairs outside the graph."""
        n, m = graph.shape
        device = graph.offsets.device
        sample = sample_tokens(m, device)
        place = torch.full((m,), -1, device=device)
        place[sample] = torch.arange(len(sample), device=device)
        place = place[graph.columns]
        sampled = place >= 0
        rows, place = graph.rows[sampled], place[sampled]
        means = []
        for block in torch.arange(n, device=device).split(_FAR_BLOCK_PAIRS // len(sample)):
            costs = self.cost.between(block.unsqueeze(0), sample.unsqueeze(0), sides, self.dtype)
            bounds = torch.searchsorted(rows, torch.stack([block[0], block[-1] + 1]))
            pairs = slice(*bounds.tolist())
            far = (costs.squeeze(0) / -epsilon).index_put_(
                (rows[pairs] - block[0], place[pairs]), costs.new_tensor(-torch.inf)
            )
            means.append(far.logsumexp(-1) - far.isfinite().sum(-1).to(far).log())
        return torch.cat(means).nan_to_num(nan=-torch.inf)
