"""The tail as several atoms: clusters of the embedding.

If the embedding has clusters, moving mass within a cluster is cheap and moving it between clusters
is expensive, which a single tail atom cannot represent. With w_c uniform over cluster c, the cost
between a token and cluster c is the mean E_{w_c}[C(token, ·)], and the cost between clusters c and
d is the soft mean −ε·log E_{w_c, w_d}[exp(−C/ε)], as for the single tail in
:mod:`otkd.costs.tails`.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
import torch
from torch import Tensor

from otkd.costs.base import Side
from otkd.costs.embedding import EmbeddingCost
from otkd.costs.tails import SAMPLED_TOKENS
from otkd.precision import without_autocast

_FITTED_TOKENS = 2**14
_ITERATIONS = 10
_SMALLEST_MEAN = 1e-300  # of exp(−C/ε) in float64, a cost of 690ε


class Clusters:
    """k-means clusters of the tokens of one side, computed once.

    Args:
        cost: its coordinates are clustered; for a learnable cost the current ones.
        side: whose tokens.
        number: requested number of clusters; empty ones are dropped.

    Attributes:
        assignment: the cluster of every token, ``(V,)``.
        sizes: number of tokens in every cluster, ``(clusters,)``.
    """

    def __init__(self, cost: EmbeddingCost, side: Side, number: int, device: torch.device):
        points = cost.coordinates(side, torch.float32, device).detach().cpu().numpy()
        assignment = torch.from_numpy(_assign(points, number)).to(device)
        self.assignment = assignment.unique(return_inverse=True)[1]
        self.sizes = torch.bincount(self.assignment)

    def __len__(self) -> int:
        return len(self.sizes)

    def membership(self, dtype: torch.dtype) -> Tensor:
        """1 where a token is in a cluster, ``(V, clusters)``."""
        return torch.nn.functional.one_hot(self.assignment, len(self)).to(dtype)

    def sample(self) -> Tensor:
        """About 1024 tokens, equally many of each cluster that has enough, ``(S,)``."""
        each = math.ceil(SAMPLED_TOKENS / len(self))
        order = torch.randperm(len(self.assignment), generator=torch.Generator().manual_seed(0))
        order = order.to(self.assignment.device)
        order = order[self.assignment[order].argsort(stable=True)]
        starts = self.sizes.cumsum(0) - self.sizes
        places = torch.arange(len(order), device=order.device) - starts[self.assignment[order]]
        return order[places < each]


def clusters_of(cost: EmbeddingCost, side: Side, number: int, device: torch.device) -> Clusters:
    """The clusters of one side of a cost, cached with the cost."""
    key = ("clusters", "source" if cost.one_vocabulary else side, number, device)
    if key not in cost.tail_constants:
        cost.tail_constants[key] = Clusters(cost, side, number, device)
    return cost.tail_constants[key]


def mean_cost_to_clusters(
    cost: EmbeddingCost, tokens: Tensor, sides: tuple[Side, Side], clusters: Clusters, dtype
) -> Tensor:
    """E_{w_c}[C(token, ·)] for every cluster c of the second side, ``(batch, k, clusters)``.

    Computed in closed form, |x − m_c|² + E|y − m_c|² or 1 − ⟨x̂, E[ŷ]⟩; for ``"euclidean"`` from a
    sample. For a constant cost it is computed once for all tokens.
    """
    key = ("cluster means", sides, len(clusters), dtype, tokens.device)
    with without_autocast(tokens):
        table = cost.kept(
            key, lambda: _mean_cost_table(cost, sides, clusters, dtype, tokens.device)
        )
    return table[tokens]


def soft_mean_cost_of_clusters(
    cost: EmbeddingCost,
    sides: tuple[Side, Side],
    clusters: tuple[Clusters, Clusters],
    epsilon: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """−ε·log E_{w_c, w_d}[exp(−C/ε)] for all clusters c and d, ``(clusters, clusters)``.

    Computed from a sample of about 1024 tokens of each side. Within one cluster, pairs of a token
    with itself have the weight that they have among all its pairs.
    """
    key = ("cluster soft means", sides, len(clusters[0]), len(clusters[1]), epsilon, dtype, device)
    with without_autocast(clusters[0].assignment):
        return cost.kept(key, lambda: _soft_means(cost, sides, clusters, epsilon, device).to(dtype))


def _assign(points: np.ndarray, number: int) -> np.ndarray:
    from scipy.cluster.vq import kmeans2, vq

    generator = np.random.default_rng(0)
    sample = points
    if len(points) > _FITTED_TOKENS:
        sample = points[generator.choice(len(points), _FITTED_TOKENS, replace=False)]
    starts = _spread_out(sample, min(number, len(sample)), generator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about empty clusters, which are dropped
        centres, _ = kmeans2(sample, starts, iter=_ITERATIONS, minit="matrix")
    return vq(points, centres)[0].astype(np.int64)


def _spread_out(points: np.ndarray, number: int, generator: np.random.Generator) -> np.ndarray:
    """First centres of k-means: each is drawn far from those before it.

    Random points would put several centres into one cluster and none into another. Source: Arthur
    and Vassilvitskii (2007), "k-means++: The Advantages of Careful Seeding".
    """
    chosen = [int(generator.integers(len(points)))]
    distances = np.full(len(points), np.inf)
    while len(chosen) < number:
        distances = np.minimum(distances, np.square(points - points[chosen[-1]]).sum(-1))
        if not distances.any():  # all other points coincide with a centre
            break
        chosen.append(int(generator.choice(len(points), p=distances / distances.sum())))
    return points[chosen]


def _mean_cost_table(cost, sides, clusters, dtype, device) -> Tensor:
    x = cost.coordinates(sides[0], dtype, device)
    if cost.metric == "euclidean":
        sample = clusters.sample()
        groups = clusters.membership(dtype)[sample]
        y = cost.coordinates(sides[1], dtype, device)[sample]
        return cost.distance(x, y) @ (groups / groups.sum(0))
    y = cost.coordinates(sides[1], dtype, device)
    weights = clusters.membership(dtype) / clusters.sizes.to(dtype)
    means = weights.mT @ y
    if cost.metric == "cosine":
        return (1 - x @ means.mT) / cost.scale
    spread = weights.mT @ y.square().sum(-1) - means.square().sum(-1)
    squares = x.square().sum(-1, keepdim=True) + means.square().sum(-1) + spread
    return (squares - 2 * x @ means.mT).clamp(min=0) / cost.scale


def _soft_means(cost, sides, clusters, epsilon, device) -> Tensor:
    x, y = (side.sample() for side in clusters)
    one_side = sides[0] == sides[1] or cost.one_vocabulary
    dtype = torch.float64
    points = [
        cost.coordinates(side, dtype, device)[tokens]
        for side, tokens in zip(sides, (x, y), strict=True)
    ]
    kernel = torch.exp(cost.distance(*points) / -epsilon)
    groups = [side.membership(dtype)[tokens] for side, tokens in zip(clusters, (x, y), strict=True)]
    counts = [group.sum(0) for group in groups]
    if not one_side:
        means = groups[0].mT @ kernel @ groups[1] / torch.outer(*counts)
        return -epsilon * means.clamp(min=_SMALLEST_MEAN).log()
    kernel = kernel.masked_fill(torch.eye(len(x), dtype=torch.bool, device=device), 0.0)
    pairs = torch.outer(*counts) - counts[0].diag()
    means = groups[0].mT @ kernel @ groups[1] / pairs.clamp(min=1)
    share = 1 / clusters[0].sizes.to(dtype)  # of pairs of a token with itself, whose cost is 0
    means = means * (1 - share.diag()) + share.diag()
    return -epsilon * means.clamp(min=_SMALLEST_MEAN).log()
