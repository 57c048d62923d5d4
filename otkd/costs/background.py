"""The costs between two different tokens, in a form whose kernel exp(−C/ε) has low rank.

A cost over a whole vocabulary has too many entries to be computed at every position. Between tokens
of no special interest it is replaced by

    a_i + C̄_{c(i) c(j)} + a_j,

with c(i) the cluster of token i, C̄ the mean cost between two clusters, and a_i how much the mean
cost from token i to its own cluster exceeds that of the cluster's other tokens. (For a squared
distance that is what the distance of a token from the cluster's centre adds to its costs.)
Constants are moved from C̄ to a so that no term is below 0: exp(−C/ε) is then at most 1, and
vanishes as ε → 0. All terms depend on the vocabulary alone and not on a batch, so microbatches add
up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from otkd.costs.base import Cost, Side
from otkd.costs.clusters import clusters_of, mean_cost_to_clusters
from otkd.costs.embedding import EmbeddingCost
from otkd.costs.tails import mean_cost_to_all, sample_tokens

_COMPARED = 64  # tokens in the check of symmetry
_SIDES: tuple[Side, Side] = ("source", "target")


@dataclass(frozen=True)
class Background:
    """The costs a_i + C̄_{cd} + a_j between different tokens.

    Attributes:
        assignment: the cluster of every token, ``(V,)``.
        excess: a_i, ``(V,)``.
        between: C̄, ``(L, L)``.
    """

    assignment: Tensor
    excess: Tensor
    between: Tensor

    def kernel(self, epsilon: float) -> LowRankKernel:
        """exp(−C/ε) for these costs."""
        scales, between = ((x / -epsilon).exp() for x in (self.excess, self.between))
        members = one_hot(self.assignment, len(between)).to(scales) * scales.unsqueeze(-1)
        own = 1 - scales.square() * between.diagonal()[self.assignment]
        return LowRankKernel(self.assignment, scales, members, between, own.clamp(min=0))


@dataclass(frozen=True)
class LowRankKernel:
    """s_i·κ_{cd}·s_j between two different tokens, and 1 between a token and itself.

    Attributes:
        assignment: the cluster of every token, ``(V,)``.
        scales: s_i, ``(V,)``.
        members: s_i in the column of the cluster of token i, ``(V, L)``.
        between: κ, ``(L, L)``.
        own: 1 − s_i·κ_{cc}·s_i, ``(V,)``: what a token has beyond this matrix.
    """

    assignment: Tensor
    scales: Tensor
    members: Tensor
    between: Tensor
    own: Tensor


def background_of(
    cost: Cost, size: int, clusters: int, dtype: torch.dtype, device: torch.device
) -> Background:
    """The background of a constant cost within one vocabulary; computed once.

    Args:
        cost: of one vocabulary.
        size: number of tokens, V.
        clusters: number of clusters; above 1 the cost must be an ``EmbeddingCost``.
        dtype: of the result.
        device: of the result.

    Raises:
        ValueError: if the cost is not symmetric.
    """
    key = ("background", size, clusters, dtype, device)
    return cost.kept(key, lambda: _background(cost, size, clusters, dtype, device))


def _background(cost, size, clusters, dtype, device) -> Background:
    every = torch.arange(size, device=device).unsqueeze(0)
    if clusters > 1 and isinstance(cost, EmbeddingCost):
        groups = clusters_of(cost, "source", clusters, device)
        assignment = groups.assignment
        means = mean_cost_to_clusters(cost, every, _SIDES, groups, dtype).squeeze(0)
    else:
        _check_symmetry(cost, size, device)
        assignment = torch.zeros_like(every[0])
        means = mean_cost_to_all(cost, every, _SIDES, (size, size), dtype).squeeze(0)
        means = means.unsqueeze(-1)
    members = one_hot(assignment).to(dtype)
    sizes = members.sum(0)
    # The mean over a cluster counts the cost from a token to itself, which is 0.
    others = sizes / (sizes - 1).clamp(min=1)
    within = (means * members).sum(-1) * others[assignment]
    between = members.mT @ means / sizes.unsqueeze(-1)
    between = torch.lerp(between, between.mT, 0.5)
    between.diagonal().mul_(others)
    excess = within - between.diagonal()[assignment]
    # Half the cost to the nearest cluster moves from C̄ to the tokens, so that no term is below 0.
    nearest = between.amin(-1) / 2
    excess = (excess + nearest[assignment]).clamp(min=0)
    between = (between - nearest.unsqueeze(-1) - nearest).clamp(min=0)
    return Background(assignment, excess, between)


def _check_symmetry(cost: Cost, size: int, device: torch.device) -> None:
    tokens = sample_tokens(size, device)[:_COMPARED].unsqueeze(0)
    costs = cost.between(tokens, tokens.clone(), _SIDES, torch.float64).squeeze(0)
    if (costs - costs.mT).abs().max() > 1e-3 * costs.abs().max():
        raise ValueError(
            f"{cost!r} is not symmetric, but costs within one vocabulary must be: pass a cost that "
            "is the same in both directions"
        )
