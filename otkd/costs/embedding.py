"""The cost between tokens as the distance of their embeddings."""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Float
from torch import Tensor, nn

from otkd.checks import check_choice
from otkd.costs.base import Cost, CostMatrices, Side, hold, same_for_all
from otkd.precision import without_autocast
from otkd.scalars import as_flag

METRICS = ("sqeuclidean", "euclidean", "cosine")
_SAMPLED_PAIRS = 2**20
_FAR = 10.0


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
            tensors given are used, not a copy: a ``Parameter`` becomes a parameter of the loss,
            and what is trained elsewhere changes the cost. So pass a copy of the teacher's,
            ``nn.Parameter(weight.detach().clone())``, or of a student's as a constant.

    Raises:
        TypeError: if an embedding is no tensor.
        ValueError: if shapes do not fit, a row is not finite, a row is zero under ``"cosine"``, or
            all tokens coincide.

    Warns:
        UserWarning: if it is to be learnable and no tensor given requires a gradient.
    """

    source: Tensor
    target: Tensor | None
    centre: Tensor | None

    def __init__(
        self,
        source: Float[Tensor, "source width"],
        target: Float[Tensor, "target width"] | None = None,
        *,
        metric: str = "sqeuclidean",
        normalize: str | None = "mean",
        learnable: bool = False,
    ) -> None:
        super().__init__()
        check_choice("metric", metric, METRICS)
        if normalize not in ("mean", None):
            raise ValueError(f"normalize must be 'mean' or None, got {normalize!r}")
        self.metric, self.learnable = metric, as_flag("learnable", learnable)
        _check_embedding("source", source, metric)
        if target is not None:
            _check_embedding("target", target, metric)
            if source.shape[1] != target.shape[1]:
                raise ValueError(
                    "source and target embeddings must have the same width, got "
                    f"{source.shape[1]} and {target.shape[1]}; map one into the other's space first"
                )
        tensors = [source] if target is None else [source, target]
        if learnable and not any(tensor.requires_grad for tensor in tensors):
            warnings.warn(
                "learnable=True, but no embedding given requires a gradient: pass "
                "nn.Parameter(weight.detach().clone())",
                stacklevel=2,
            )
        hold(self, "source", source, learnable)
        hold(self, "target", target, learnable)
        hold(self, "centre", _needed_centre(source), learnable=False)
        self.width = source.shape[1]
        self.shape = (source.shape[0], (source if target is None else target).shape[0])
        self.scale = self._mean_cost() if normalize == "mean" else 1.0
        if not self.scale > 0:
            raise ValueError("all tokens have the same embedding: every cost would be 0")
        self._cached: dict[tuple, CostMatrices] = {}
        self._constant_moments: dict[tuple, tuple[Tensor, Tensor]] = {}

    def matrices(self, n, m, *, dtype, device, self_terms):
        """See :class:`Cost`. Constant matrices are computed once per device and dtype."""
        self.check_size(n, m)
        key = (dtype, device, self_terms)
        if key in self._cached:
            return self._cached[key]
        source = self.source.to(device, dtype)
        if self.target is None:
            result = same_for_all(self._self_distance(source), self_terms)
        else:
            target = self.target.to(device, dtype)
            cross = self._distance(source, target)
            result = CostMatrices(cross)
            if self_terms:
                source_cost = self._self_distance(source)
                target_cost = self._self_distance(target)
                result = CostMatrices(cross, source_cost, target_cost)
        if not self.learnable:
            self._cached = {key: result}
        return result

    def between(self, x, y, sides, dtype):
        """See :class:`Cost`."""
        x_side, y_side = self._side(sides[0]), self._side(sides[1])
        one_set = x is y and x_side is y_side
        rows = nn.functional.embedding(x, x_side).to(dtype)
        columns = rows if one_set else nn.functional.embedding(y, y_side).to(dtype)
        distance = self._distance(rows, columns)
        if one_set and not self.learnable:  # exactly 0 between a token and itself
            distance.diagonal(dim1=-2, dim2=-1).zero_()
        elif x_side is y_side:
            distance = distance.masked_fill(x.unsqueeze(-1) == y.unsqueeze(-2), 0.0)
        return distance

    def mean_to_all(self, tokens, sides, dtype):
        """|x − m|² + E|y − m|² with m = E[y]; 1 − ⟨x̂, E[ŷ]⟩; none for ``"euclidean"``."""
        if self.metric == "euclidean":
            return None
        x = nn.functional.embedding(tokens, self._side(sides[0])).to(dtype)
        with without_autocast(x):
            mean, spread = self._moments(sides[1], dtype)
            if self.metric == "cosine":
                return (1 - nn.functional.normalize(x, dim=-1) @ mean) / self.scale
            return ((x - mean).square().sum(-1) + spread) / self.scale

    @property
    def learns(self) -> bool:
        """Whether it was made ``learnable``."""
        return self.learnable

    @property
    def one_vocabulary(self) -> bool:
        """Whether no target was given."""
        return self.target is None

    def _moments(self, side: Side, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Mean and variance of the vectors (directions) of a side; those of constants once."""
        y = self._side(side)
        key = (side, dtype, y.device)
        if key in self._constant_moments:
            return self._constant_moments[key]
        y = y.to(dtype)
        if self.metric == "cosine":
            # A product in place of normalised copies: as large as the embedding, with autograd.
            mean = (1 / y.norm(dim=-1)) @ y / len(y)
            moments = mean, 1 - mean.square().sum()
        else:
            variance, mean = torch.var_mean(y, 0, correction=0)
            moments = mean, variance.sum()
        if not self.learnable:
            self._constant_moments[key] = moments
        return moments

    def _side(self, side: str) -> Tensor:
        return self.source if side == "source" or self.target is None else self.target

    def coordinates(self, side: Side, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The tokens of one side as :meth:`distance` takes them, ``(V, d)``."""
        return self._placed(self._side(side).to(device, dtype))

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """The cost between two sets of :meth:`coordinates`, ``(..., k, d), (..., l, d)``."""
        with without_autocast(x):
            return self._full_precision_distance(x, y)

    def _distance(self, x: Tensor, y: Tensor) -> Tensor:
        placed = self._placed(x)
        return self.distance(placed, placed if x is y else self._placed(y))

    def _placed(self, x: Tensor) -> Tensor:
        if self.metric == "cosine":
            return nn.functional.normalize(x, dim=-1)
        return x if self.centre is None else x - self.centre.to(x)

    def _full_precision_distance(self, x: Tensor, y: Tensor) -> Tensor:
        if self.metric == "euclidean":
            return torch.cdist(x, y) / self.scale
        if self.metric == "cosine":
            return (x @ y.mT).neg_().add_(1).clamp_(min=0).div_(self.scale)
        x_squares = x.square().sum(-1)
        y_squares = x_squares if y is x else y.square().sum(-1)
        squares = x_squares.unsqueeze(-1) + y_squares.unsqueeze(-2)
        product = torch.addmm if x.ndim == 2 else torch.baddbmm
        distance = product(squares, x, y.mT, beta=1 / self.scale, alpha=-2 / self.scale)
        return distance.clamp_(min=0)

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


@torch.no_grad()
def _needed_centre(points: Tensor) -> Tensor | None:
    """Squared distances do not see the centre, but where it is far off their rounding does."""
    points = points.double()
    centre = points.mean(0)
    spread = (points - centre).square().sum(-1).mean()
    return centre.float() if centre.square().sum() > _FAR * spread else None


def _check_embedding(name: str, embedding: Tensor, metric: str) -> None:
    if not isinstance(embedding, Tensor):
        raise TypeError(
            f"the {name} embedding must be a tensor (tokens, width), got "
            f"{type(embedding).__name__}: of a module pass its weight"
        )
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
