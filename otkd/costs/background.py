"""exp(−C/ε) between two different tokens, as a matrix of low rank.

A kernel over a whole vocabulary has too many entries to be computed at every position. Between
tokens of no special interest it is replaced by

    s_i · κ_{c(i) c(j)} · s_j,

with c(i) the cluster of token i. The scale s_i is the mean of row i of the kernel, relative to its
cluster, so a token that is close to many others stays so. κ has the right total for every pair of
clusters. One cluster is enough if costs are high compared with ε; the more mass moves, the more
clusters matter. All is computed from the vocabulary alone and not from a batch, so microbatches add
up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from otkd.costs.base import Cost, Side, as_constant
from otkd.costs.clusters import clusters_of
from otkd.costs.embedding import EmbeddingCost
from otkd.costs.tails import sample_tokens

_BLOCK_PAIRS = 2**20
_KEPT_TABLES = 4


@dataclass(frozen=True)
class Background:
    """The kernel between different tokens, s_i·κ_{cd}·s_j, and that of a token with itself.

    Attributes:
        assignment: the cluster of every token, ``(V,)``.
        scales: s_i, ``(V,)``.
        members: s_i in the column of the cluster of token i, ``(V, L)``.
        between: κ, ``(L, L)``.
        own: 1 − s_i·κ_{cc}·s_i, ``(V,)``: what a token has beyond this matrix, at least 0.
    """

    assignment: Tensor
    scales: Tensor
    members: Tensor
    between: Tensor
    own: Tensor

    def to(self, dtype: torch.dtype) -> Background:
        """The same in another precision."""
        numbers = (self.scales, self.members, self.between, self.own)
        return Background(self.assignment, *(x.to(dtype) for x in numbers))


def background_of(
    cost: Cost,
    size: int,
    epsilon: float,
    clusters: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Background:
    """The background of a constant cost within one vocabulary; computed once for the last few ε.

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

    # A price that changes in every step of a training must not fill the memory with tables.
    tables = cost.kept(("backgrounds", size, clusters, device), dict)
    if epsilon not in tables:
        with as_constant():
            table = estimate()
        for oldest in list(tables)[: 1 - _KEPT_TABLES]:
            tables.pop(oldest, None)
        tables[epsilon] = {torch.float64: table}
    by_dtype = tables[epsilon]
    if dtype not in by_dtype:
        with as_constant():
            by_dtype[dtype] = by_dtype[torch.float64].to(dtype)
    return by_dtype[dtype]


def _estimate(cost: Cost, epsilon: float, assignment: Tensor, sample: Tensor) -> Background:
    """From the kernel between all tokens and a sample of them, in float64."""
    groups = one_hot(assignment).double()
    sizes, sampled = groups.sum(0), groups[sample]
    # A cluster counts as much as it has tokens, however many of them are in the sample.
    weights = sampled @ (sizes / sampled.sum(0).clamp(min=1))

    def kernel(tokens: Tensor) -> Tensor:
        """To the sample; 0 between a token and itself."""
        sides: tuple[Side, Side] = ("source", "target")
        costs = cost.between(tokens.unsqueeze(0), sample.unsqueeze(0), sides, torch.float32)
        values = (costs.squeeze(0).double() / -epsilon).exp_()
        return values.masked_fill_(tokens.unsqueeze(-1) == sample, 0.0)

    every = torch.arange(len(assignment), device=assignment.device)
    means = torch.cat(
        [kernel(block) @ weights for block in every.split(max(1, _BLOCK_PAIRS // len(sample)))]
    )
    typical = (groups.mT @ means / sizes)[assignment]
    scales = torch.where(typical > 0, means / typical, 1.0)
    among, members = kernel(sample), groups * scales.unsqueeze(-1)
    if not torch.allclose(among, among.mT, rtol=1e-3, atol=1e-6):
        raise ValueError(
            f"{cost!r} is not symmetric, but costs within one vocabulary must be: pass a cost that "
            "is the same in both directions"
        )
    pairs = members[sample].sum(0).outer(members[sample].sum(0))
    pairs -= members[sample].square().sum(0).diag()
    between = torch.where(pairs > 0, sampled.mT @ among @ sampled / pairs, 0.0)
    own = 1 - scales.square() * between.diagonal()[assignment]
    return Background(assignment, scales, members, between, own.clamp(min=0))
