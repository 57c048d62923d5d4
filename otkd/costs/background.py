"""exp(−C/ε) between two different tokens, as a matrix of low rank.

A kernel over a whole vocabulary has too many entries to be computed at every position. Between
tokens of no special interest it is replaced by

    s_i · κ_{c(i) d(j)} · t_j,

with c(i) the cluster of token i. The scale s_i is the mean of row i of the kernel, relative to its
cluster, so a token that is close to many others stays so. κ has the right total for every pair of
clusters. t_j is the same for columns. One cluster is enough if costs are high compared with ε; the
more mass moves, the more clusters matter. All is computed from the vocabulary alone and not from a
batch, so microbatches add up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from otkd.costs.base import Cost
from otkd.costs.clusters import clusters_of
from otkd.costs.embedding import EmbeddingCost
from otkd.costs.tails import sample_tokens

_BLOCK_PAIRS = 2**22


@dataclass(frozen=True)
class Background:
    """The kernel between different tokens, s_i·κ_{cd}·t_j, and that of a token with itself.

    Attributes:
        assignment: the cluster of every token, ``(V,)``.
        rows: s_i in the column of the cluster of token i, ``(V, L)``.
        columns: t_j in the column of its cluster, ``(V, L)``.
        between: κ, ``(L, L)``.
        own: 1 − s_i·κ_{cc}·t_i, ``(V,)``: what a token has beyond this matrix, at least 0.
    """

    assignment: Tensor
    rows: Tensor
    columns: Tensor
    between: Tensor
    own: Tensor

    @property
    def transposed(self) -> Background:
        """The same for the transposed kernel."""
        return replace(self, rows=self.columns, columns=self.rows, between=self.between.mT)

    def to(self, dtype: torch.dtype) -> Background:
        """The same in another precision."""
        parts = (self.rows, self.columns, self.between, self.own)
        return Background(self.assignment, *(part.to(dtype) for part in parts))


def background_of(
    cost: Cost,
    size: int,
    epsilon: float,
    clusters: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Background:
    """The background of a constant cost within one vocabulary; computed once.

    Args:
        cost: of one vocabulary.
        size: number of tokens, V.
        epsilon: ε.
        clusters: number of clusters; above 1 the cost must be an ``EmbeddingCost``.
        dtype: of the result.
        device: of the result.
    """

    def estimate() -> Background:
        if clusters > 1 and isinstance(cost, EmbeddingCost):
            groups = clusters_of(cost, "source", clusters, device)
            return _estimate(cost, epsilon, groups.assignment, groups.sample())
        one = torch.zeros(size, dtype=torch.long, device=device)
        return _estimate(cost, epsilon, one, sample_tokens(size, device))

    key = ("background", size, epsilon, clusters, device)
    return cost.kept((*key, dtype), lambda: cost.kept(key, estimate).to(dtype))


def _estimate(cost: Cost, epsilon: float, assignment: Tensor, sample: Tensor) -> Background:
    """From the kernel between all tokens and a sample of them, in float64."""
    groups = one_hot(assignment).double()
    sizes, sampled = groups.sum(0), groups[sample]
    # A cluster counts as much as it has tokens, however many of them are in the sample.
    weights = (sampled @ (sizes / sampled.sum(0).clamp(min=1))).unsqueeze(-1)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        costs = cost.between(x.unsqueeze(0), y.unsqueeze(0), ("source", "target"), torch.float32)
        values = (costs.squeeze(0).double() / -epsilon).exp_()
        return values.masked_fill_(x.unsqueeze(-1) == y, 0.0)

    def scales(part: Callable[[Tensor], Tensor]) -> Tensor:
        every = torch.arange(len(assignment), device=assignment.device)
        size = max(1, _BLOCK_PAIRS // len(sample))
        means = torch.cat([part(block) @ weights for block in every.split(size)]).squeeze(-1)
        means /= (len(assignment) - weights.squeeze(-1)[0]).clamp(min=1)
        typical = (groups.mT @ means / sizes)[assignment]
        return torch.where(typical > 0, means / typical, 1.0)

    among = kernel(sample, sample)
    rows = scales(lambda tokens: kernel(tokens, sample))
    columns = rows
    if not torch.equal(among, among.mT):
        columns = scales(lambda tokens: kernel(sample, tokens).mT)
    left, right = (groups * side.unsqueeze(-1) for side in (rows, columns))
    pairs = left[sample].sum(0).outer(right[sample].sum(0))
    pairs -= (left[sample] * right[sample]).sum(0).diag()
    between = torch.where(pairs > 0, sampled.mT @ among @ sampled / pairs, 0.0)
    own = 1 - rows * columns * between.diagonal()[assignment]
    return Background(assignment, left, right, between, own.clamp(min=0))
