"""The costs of the tail, an atom that stands for all tokens outside the head.

Let w be uniform over the vocabulary. The cost between a token and the tail is the mean
E_w[C(token, ·)]. (The cost to the mean embedding would be smaller, by the variance of the
vocabulary.) The cost between two tails is the soft mean −ε·log E_w,w[exp(−C/ε)].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from otkd.costs.base import Cost, Side

SAMPLED_TOKENS = 1024
_EXACT_SIZE = 2048
_BLOCK_PAIRS = 2**20


def mean_cost_to_all(
    cost: Cost, tokens: Tensor, sides: tuple[Side, Side], sizes: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """E_w[C(token, ·)] with w uniform over the second side, ``(batch, k) -> (batch, k)``.

    Computed in closed form if the cost has one; otherwise from a seeded sample of 1024 tokens, or
    all tokens up to 2048. For a constant cost it is computed once for all tokens.
    """
    if cost.learns:
        every, places = tokens.unique(return_inverse=True)  # positions share most of their tokens
        return _mean_to_all(cost, every.unsqueeze(0), sides, sizes[1], dtype).squeeze(0)[places]

    def all_means() -> Tensor:
        every = torch.arange(sizes[0], device=tokens.device).unsqueeze(0)
        blocks = every.split(_BLOCK_PAIRS // SAMPLED_TOKENS, -1)
        means = [_mean_to_all(cost, block, sides, sizes[1], dtype) for block in blocks]
        return torch.cat(means, -1).squeeze(0)

    return cost.kept(("mean", sides, sizes, dtype, tokens.device), all_means)[tokens]


def soft_mean_cost(
    cost: Cost,
    sides: tuple[Side, Side],
    sizes: tuple[int, int],
    epsilon: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """−ε·log E_w,w[exp(−C/ε)] with w uniform over each side, a scalar.

    Computed from a seeded sample of 1024 tokens of each side, or all tokens up to 2048. Within one
    vocabulary, pairs of a token with itself have the weight that they have among all pairs, 1/V.
    """
    key = ("soft", sides, sizes, epsilon, dtype, device)
    return cost.kept(key, lambda: _soft_mean(cost, sides, sizes, epsilon, dtype, device))


def _mean_to_all(cost, tokens, sides, size, dtype) -> Tensor:
    mean = cost.mean_to_all(tokens, sides, dtype)
    if mean is not None:
        return mean
    others = sample_tokens(size, tokens.device)
    return cost.between(tokens, others.expand(len(tokens), -1), sides, dtype).mean(-1)


def _soft_mean(cost, sides, sizes, epsilon, dtype, device) -> Tensor:
    x, y = (sample_tokens(size, device).unsqueeze(0) for size in sizes)
    log_kernel = cost.between(x, y, sides, dtype).squeeze(0) / -epsilon
    if not (cost.one_vocabulary or sides[0] == sides[1]):
        return -epsilon * (log_kernel.logsumexp((0, 1)) - math.log(log_kernel.numel()))
    size, sampled = sizes[0], x.shape[-1]
    itself = torch.eye(sampled, dtype=torch.bool, device=device)
    own = log_kernel.diagonal().logsumexp(0) - math.log(sampled * size)
    if size == 1:
        return -epsilon * own
    others = log_kernel.masked_fill(itself, -torch.inf).logsumexp((0, 1))
    share = math.log1p(-1 / size) - math.log(sampled * (sampled - 1))
    return -epsilon * torch.logaddexp(own, others + share)


def sample_tokens(size: int, device: torch.device) -> Tensor:
    """A seeded sample of 1024 tokens of a vocabulary, or all of them up to 2048."""
    if size <= _EXACT_SIZE:
        return torch.arange(size, device=device)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    return order[:SAMPLED_TOKENS].to(device)
