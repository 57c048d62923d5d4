"""The magnitude of embeddings: what is refused, what is rescaled, and the mean cost.

Costs are computed in float32, in which squares overflow above 10¹⁹ and underflow below 10⁻²³. A
cost that is divided by its mean does not depend on the unit of the embedding, so its constant
vectors are multiplied by a power of two, which changes no digit. Other embeddings of such a
magnitude are refused, because every cost would be 0 or infinite.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from otkd.tensors import check_floating

_SMALLEST, _LARGEST = 1e-12, 1e12  # of centred entries; outside this range they are rescaled
_ROUNDING = 1e-14  # relative difference below which float64 entries count as equal
_SAME_DIRECTION = 1e-6  # mean of 1 − cos that may be only rounding error in float32
_SAMPLED_PAIRS = 2**20
_BLOCK = 2**14
_FAR = 10.0

Embeddings = tuple[Tensor, Tensor | None]


def check_embedding(name: str, embedding: Tensor, metric: str) -> None:
    """Raise unless ``embedding`` is a matrix of finite numbers, without zero rows for ``"cosine"``.

    Raises:
        TypeError: if it is not a tensor.
        ValueError: if it is not such a matrix.
    """
    if not isinstance(embedding, Tensor):
        raise TypeError(
            f"the {name} embedding must be a tensor (tokens, width), got "
            f"{type(embedding).__name__}. Pass the weight of a module"
        )
    if embedding.ndim != 2 or not embedding.is_floating_point() or embedding.numel() == 0:
        raise ValueError(
            f"the {name} embedding must be a floating-point matrix (tokens, width) with at least "
            f"one token, got shape {tuple(embedding.shape)} and dtype {embedding.dtype}"
        )
    check_floating(f"the {name} embedding", embedding, "(tokens, width)")
    bad = ~embedding.detach().isfinite().all(-1)
    problem = "NaN or infinite numbers"
    if metric == "cosine" and not bad.any():
        bad = (embedding.detach() == 0).all(-1)
        problem = "only zeros, which have no direction"
    if bad.any():
        row = bad.nonzero()[0].item()
        raise ValueError(f"row {row} of the {name} embedding holds {problem}")


@torch.no_grad()
def brought_to_size(embeddings: Embeddings, metric: str, *, rescale: bool) -> Embeddings:
    """The embeddings, multiplied by a power of two if their squares exceed the range of float32.

    With ``"cosine"`` each row has its own factor. With other metrics both sides have the same
    factor, which requires ``rescale``.

    Raises:
        ValueError: if all tokens are equal, or the embeddings would have to be rescaled and may
            not.
    """
    source, target = embeddings
    if metric == "cosine":
        return _row_by_row(source, rescale), None if target is None else _row_by_row(
            target, rescale
        )
    size = _spread(embeddings)
    ends = (end for x in embeddings if x is not None for end in torch.aminmax(x))
    largest = max(abs(end.item()) for end in ends)
    if size <= _ROUNDING * largest and source.shape[0] * len(_second(embeddings)) > 1:
        raise ValueError("all tokens have the same embedding: every cost would be 0")
    if size == 0 or _SMALLEST <= size <= _LARGEST:
        return embeddings
    if not rescale:
        raise ValueError(_unsafe(size))
    factor = 2.0 ** -round(math.log2(size))
    return _times(source, factor), None if target is None else _times(target, factor)


def _row_by_row(rows: Tensor, rescale: bool) -> Tensor:
    sizes = rows.abs().amax(-1, keepdim=True).double()
    unsafe = (sizes < _SMALLEST) | (sizes > _LARGEST)
    if not unsafe.any():
        return rows
    if not rescale:
        raise ValueError(_unsafe(sizes[unsafe][0].item()))
    return _times(rows, torch.where(unsafe, torch.exp2(-sizes.log2().round()), 1.0))


def _times(rows: Tensor, factor: Tensor | float) -> Tensor:
    return (rows.double() * factor).to(rows.dtype)  # the factor may exceed the range of float32


def _unsafe(size: float) -> str:
    return (
        f"the embedding has entries of size {size:.1e}, whose squares exceed the range of float32: "
        "divide it by its standard deviation. (A constant embedding with normalize='mean' is "
        "rescaled automatically.)"
    )


def _second(embeddings: Embeddings) -> Tensor:
    source, target = embeddings
    return source if target is None else target


def _spread(embeddings: Embeddings) -> float:
    """The largest absolute entry of both sides after subtracting the mean of the source."""
    centre = _centre(embeddings[0])
    return max(
        (block.double() - centre).abs().max().item()
        for side in embeddings
        if side is not None
        for block in side.split(_BLOCK)
    )


def _centre(rows: Tensor) -> Tensor:
    """The mean row in float64, computed without a float64 copy of all rows."""
    return sum((x.double().sum(0) for x in rows.split(_BLOCK)), rows.new_zeros(())) / len(rows)


@torch.no_grad()
def mean_cost(embeddings: Embeddings, metric: str) -> float:
    """The mean of the cost over all pairs of source and target, in float64.

    Computed in closed form for sqeuclidean and cosine, and for euclidean from a seeded sample of
    2²⁰ pairs, or all pairs if there are fewer. It is 1 for a single pair of equal tokens.

    Raises:
        ValueError: if it is 0.
    """
    source, target = embeddings[0], _second(embeddings)
    mean, pairs = _MEANS[metric](source, target), len(source) * len(target)
    if mean > (_SAME_DIRECTION if metric == "cosine" else 0):
        return mean
    if pairs == 1:
        return 1.0
    what = "direction" if metric == "cosine" else "embedding"
    raise ValueError(f"all tokens have the same {what}: every cost would be 0 or rounding error")


def _mean_cosine(source: Tensor, target: Tensor) -> float:
    means = []
    for side in (source,) if target is source else (source, target):
        blocks = side.split(_BLOCK)
        directions = (nn.functional.normalize(x.double(), dim=-1).sum(0) for x in blocks)
        means.append(torch.stack(list(directions)).sum(0) / len(side))
    return (1 - means[0] @ means[-1]).item()


def _mean_sqeuclidean(source: Tensor, target: Tensor) -> float:
    centre = _centre(source)
    squares, offsets = [], []
    for side in (source, target):
        blocks = [block.double() - centre for block in side.split(_BLOCK)]
        squares.append(sum(block.square().sum().item() for block in blocks) / len(side))
        offsets.append(torch.stack([block.sum(0) for block in blocks]).sum(0) / len(side))
    return sum(squares) - 2 * (offsets[0] @ offsets[1]).item()


def _mean_euclidean(source: Tensor, target: Tensor) -> float:
    if len(source) * len(target) <= _SAMPLED_PAIRS:
        return torch.cdist(source.double(), target.double()).mean().item()
    generator = torch.Generator().manual_seed(0)
    i = torch.randint(len(source), (_SAMPLED_PAIRS,), generator=generator).to(source.device)
    j = torch.randint(len(target), (_SAMPLED_PAIRS,), generator=generator).to(source.device)
    blocks = zip(i.split(_BLOCK), j.split(_BLOCK), strict=True)
    distances = (
        (source[rows].double() - target[columns].double()).norm(dim=-1).sum().item()
        for rows, columns in blocks
    )
    return sum(distances) / len(i)


_MEANS = {
    "cosine": _mean_cosine,
    "sqeuclidean": _mean_sqeuclidean,
    "euclidean": _mean_euclidean,
}


@torch.no_grad()
def needed_centre(rows: Tensor) -> Tensor | None:
    """The mean row if it is large compared with the spread of the rows, else None.

    Squared distances do not depend on it, but their rounding errors do.
    """
    centre = _centre(rows)
    spread = sum((x.double() - centre).square().sum().item() for x in rows.split(_BLOCK))
    far = centre.square().sum().item() > _FAR * spread / len(rows)
    return centre.float() if far else None


@torch.no_grad()
def largest_distance(embeddings: Embeddings, metric: str) -> float:
    """An upper bound of the distance between any two tokens of both sides."""
    if metric == "cosine":
        return 2.0
    centre = _centre(embeddings[0])
    radius = max(
        (block.double() - centre).norm(dim=-1).max().item()
        for side in embeddings
        if side is not None
        for block in side.split(_BLOCK)
    )
    return (2 * radius) ** 2 if metric == "sqeuclidean" else 2 * radius
