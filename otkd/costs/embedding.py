"""The cost between tokens as the distance of their embeddings."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from otkd.checks import check_choice
from otkd.costs.base import Cost, CostMatrices, hold, same_for_all

METRICS = ("sqeuclidean", "euclidean", "cosine")
_SAMPLED_PAIRS = 2**20


class EmbeddingCost(Cost):
    """Distance between the embeddings of two tokens, in units of its mean over the vocabulary.

    - ``"sqeuclidean"``: |x_i − y_j|²
    - ``"euclidean"``: |x_i − y_j|
    - ``"cosine"``: 1 − cos(x_i, y_j)

    Args:
        source: ``(V_s, d)``, the student's tokens (rows), or those of a common vocabulary.
        target: ``(V_t, d)``, the teacher's tokens in the same space, where they are others.
        metric: one of the above.
        normalize: ``"mean"`` divides by the uniform mean of the cross cost over all V_s·V_t pairs
            (closed form for sqeuclidean and cosine; for euclidean a seeded sample of 2²⁰ pairs,
            all pairs where there are no more), so that ε is a fraction of a typical cost. Computed
            once, here; the same number divides the self-costs. ``None`` leaves the units.
        learnable: let gradients flow into the embeddings; otherwise they are constants. The very
            tensors given are used: a ``Parameter`` becomes a parameter of the loss, so pass a copy
            of the teacher's, ``nn.Parameter(weight.detach().clone())``.

    Raises:
        ValueError: if shapes do not fit, a row is not finite, a row is zero under ``"cosine"``, or
            all tokens coincide.
    """

    source: Tensor
    target: Tensor | None
    centre: Tensor

    def __init__(
        self,
        source: Float[Tensor, "source width"],
        target: Float[Tensor, "target width"] | None = None,
        metric: str = "sqeuclidean",
        normalize: str | None = "mean",
        learnable: bool = False,
    ):
        super().__init__()
        check_choice("metric", metric, METRICS)
        if normalize not in ("mean", None):
            raise ValueError(f"normalize must be 'mean' or None, got {normalize!r}")
        self.metric, self.learnable = metric, learnable
        _check_embedding("source", source, metric)
        if target is not None:
            _check_embedding("target", target, metric)
            if source.shape[1] != target.shape[1]:
                raise ValueError(
                    "source and target embeddings must have the same width, got "
                    f"{source.shape[1]} and {target.shape[1]}; map one into the other's space first"
                )
        hold(self, "source", source, learnable)
        hold(self, "target", target, learnable)
        # Squared distances do not see it, but their rounding does.
        hold(self, "centre", source.detach().double().mean(0).to(source.dtype), learnable=False)
        self.shape = (source.shape[0], (source if target is None else target).shape[0])
        self.scale = self._mean_cost() if normalize == "mean" else 1.0
        if not self.scale > 0:
            raise ValueError("all tokens have the same embedding: every cost would be 0")
        self._cached: dict[tuple, CostMatrices] = {}

    def matrices(self, n, m, *, dtype, device, self_terms):
        """See :class:`Cost`. Constant matrices are computed once per device and dtype."""
        self.check_size(n, m)
        key = (dtype, device, self_terms)
        if key in self._cached:
            return self._cached[key]
        source = self.source.to(device, dtype)
        if self.target is None:
            result = same_for_all(self._self_distance(source) / self.scale, self_terms)
        else:
            target = self.target.to(device, dtype)
            cross = self._distance(source, target) / self.scale
            result = CostMatrices(cross)
            if self_terms:
                source_cost = self._self_distance(source) / self.scale
                target_cost = self._self_distance(target) / self.scale
                result = CostMatrices(cross, source_cost, target_cost)
        if not self.learnable:
            self._cached = {key: result}
        return result

    def between(self, x, y, sides, dtype):
        """See :class:`Cost`."""
        rows = nn.functional.embedding(x, self._side(sides[0])).to(dtype)
        columns = rows
        if x is not y or sides[0] != sides[1]:
            columns = nn.functional.embedding(y, self._side(sides[1])).to(dtype)
        distance = self._distance(rows, columns) / self.scale
        if self.target is None or sides[0] == sides[1]:  # exactly 0 between a token and itself
            distance = distance.masked_fill(x.unsqueeze(-1) == y.unsqueeze(-2), 0.0)
        return distance

    def mean_to_all(self, tokens, sides, dtype):
        """|x − m|² + E|y − m|² with m = E[y]; 1 − ⟨x̂, E[ŷ]⟩; none for ``"euclidean"``."""
        if self.metric == "euclidean":
            return None
        x = nn.functional.embedding(tokens, self._side(sides[0])).to(dtype)
        y = self._side(sides[1]).to(dtype)
        if self.metric == "cosine":
            x, y = nn.functional.normalize(x, dim=-1), nn.functional.normalize(y, dim=-1)
            return (1 - x @ y.mean(0)) / self.scale
        mean = y.mean(0)
        spread = (y - mean).square().sum(-1).mean()
        return ((x - mean).square().sum(-1) + spread) / self.scale

    @property
    def learns(self) -> bool:
        """Whether it was made ``learnable``."""
        return self.learnable

    @property
    def one_vocabulary(self) -> bool:
        """Whether no target was given."""
        return self.target is None

    def _side(self, side: str) -> Tensor:
        return self.source if side == "source" or self.target is None else self.target

    def _distance(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self._full_precision_distance(x, y)

    def _full_precision_distance(self, x: Tensor, y: Tensor) -> Tensor:
        if self.metric == "euclidean":
            return torch.cdist(x, y)
        if self.metric == "cosine":
            x, y = nn.functional.normalize(x, dim=-1), nn.functional.normalize(y, dim=-1)
            return (1 - x @ y.mT).clamp(min=0)
        centre = self.centre.to(x)
        x, y = x - centre, y - centre
        squares = x.square().sum(-1).unsqueeze(-1) + y.square().sum(-1).unsqueeze(-2)
        return torch.sub(squares, x @ y.mT, alpha=2).clamp(min=0)

    def _self_distance(self, x: Tensor) -> Tensor:
        distance = self._distance(x, x)
        diagonal = torch.eye(len(x), dtype=torch.bool, device=x.device)
        return distance.masked_fill(diagonal, 0.0)

    @torch.no_grad()
    def _mean_cost(self) -> float:
        x = self.source.double()
        y = x if self.target is None else self.target.double()
        if self.metric == "cosine":
            x, y = nn.functional.normalize(x, dim=-1), nn.functional.normalize(y, dim=-1)
            return (1 - x.mean(0) @ y.mean(0)).item()
        if self.metric == "sqeuclidean":
            centre = x.mean(0)
            x, y = x - centre, y - centre
            mean_squares = x.square().sum(-1).mean() + y.square().sum(-1).mean()
            return (mean_squares - 2 * x.mean(0) @ y.mean(0)).item()
        if len(x) * len(y) <= _SAMPLED_PAIRS:
            return torch.cdist(x, y).mean().item()
        generator = torch.Generator().manual_seed(0)
        i = torch.randint(len(x), (_SAMPLED_PAIRS,), generator=generator).to(x.device)
        j = torch.randint(len(y), (_SAMPLED_PAIRS,), generator=generator).to(x.device)
        blocks = zip(i.split(2**14), j.split(2**14), strict=True)
        return sum((x[r] - y[c]).norm(dim=-1).sum().item() for r, c in blocks) / len(i)

    def extra_repr(self) -> str:
        """The settings."""
        return f"{self.shape}, metric={self.metric!r}, scale={self.scale:.4g}"


def _check_embedding(name: str, embedding: Tensor, metric: str) -> None:
    if embedding.ndim != 2 or not embedding.is_floating_point() or embedding.numel() == 0:
        raise ValueError(
            f"the {name} embedding must be a floating-point matrix (tokens, width), got shape "
            f"{tuple(embedding.shape)} and dtype {embedding.dtype}"
        )
    bad = ~embedding.detach().isfinite().all(-1)
    problem = "NaN or infinite numbers"
    if metric == "cosine" and not bad.any():
        bad = (embedding.detach() == 0).all(-1)
        problem = "nothing but zeros, which has no direction"
    if bad.any():
        row = bad.nonzero()[0].item()
        raise ValueError(f"row {row} of the {name} embedding holds {problem}")
