"""The distance of two tokens' embeddings as the ground cost."""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from otkd.checks import check_choice
from otkd.costs.base import Cost, CostMatrices, Side, as_constant, hold, same_for_all
from otkd.costs.magnitude import (
    brought_to_size,
    check_embedding,
    largest_distance,
    mean_cost,
    needed_centre,
)
from otkd.precision import inner_products, without_autocast
from otkd.scalars import as_flag

METRICS = ("sqeuclidean", "euclidean", "cosine")


class EmbeddingCost(Cost):
    """Distance between the embeddings of two tokens, divided by its mean over the vocabulary.

    - ``"sqeuclidean"``: |x_i − y_j|²
    - ``"euclidean"``: |x_i − y_j|
    - ``"cosine"``: 1 − cos(x_i, y_j)

    Args:
        source: ``(V_s, d)``, the embedding of the student's tokens (or of the common vocabulary).
        target: ``(V_t, d)``, the embedding of the teacher's tokens in the same space, if they are
            another vocabulary.
        metric: one of the above.
        normalize: ``"mean"`` divides by the mean cost over all V_s·V_t pairs, so that ε is a
            fraction of a typical cost. The mean is computed once, in the constructor: in closed
            form for sqeuclidean and cosine, and for euclidean from a seeded sample of 2²⁰ pairs (or
            all pairs, if there are fewer). The self-costs are divided by the same number. ``None``
            leaves the cost as it is.
        learnable: let gradients flow into the embeddings. The tensors themselves are used: a
            ``Parameter`` becomes a parameter of the loss, and every later change changes the cost,
            with every support. To leave a model's own embedding unchanged, pass
            ``nn.Parameter(weight.detach().clone())``. With False the cost keeps copies, in the
            dtype of the embeddings.

    A learnable cost can reduce the loss by collapsing the token embeddings. Its distances, mean
    costs and kernels are computed in every call. The normalising number stays the one of the
    constructor, and is saved with the parameters. The clusters of ``TopK(clusters=…)`` stay those
    of the first call after the cost was built, loaded or moved.

    Raises:
        TypeError: if an embedding is not a tensor.
        ValueError: if shapes do not fit, a row is not finite, a row is zero under ``"cosine"``, all
            tokens have the same embedding, or squared distances exceed the range of float32. (A
            constant cost with ``normalize="mean"`` is rescaled by a power of two instead.)

    Warns:
        UserWarning: if ``learnable=True`` and no tensor requires a gradient.

    Example:
        >>> embedding = torch.tensor([[0.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
        >>> cost = otkd.costs.EmbeddingCost(embedding)
        >>> cost(3, 3)
        tensor([[0.0000, 0.2250, 2.0250],
                [0.2250, 0.0000, 2.2500],
                [2.0250, 2.2500, 0.0000]])
        >>> print(f"{cost.scale:.4f}")  # the mean squared distance
        4.4444
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
        check_embedding("source", source, metric)
        if target is not None:
            check_embedding("target", target, metric)
            if source.shape[1] != target.shape[1]:
                raise ValueError(
                    "source and target embeddings must have the same width, got "
                    f"{source.shape[1]} and {target.shape[1]}; map one into the other's space first"
                )
        given = (source, target)
        if learnable and not any(side is not None and side.requires_grad for side in given):
            warnings.warn(
                "learnable=True, but no embedding given requires a gradient: pass "
                "nn.Parameter(weight.detach().clone())",
                stacklevel=2,
            )
        # Directions have no unit, and neither have normalised distances.
        scale_free = normalize == "mean" or metric == "cosine"
        sized = brought_to_size(given, metric, rescale=scale_free and not learnable)
        hold(self, "source", sized[0], learnable, copy=sized[0] is source)
        hold(self, "target", sized[1], learnable, copy=sized[1] is target)
        hold(self, "centre", needed_centre(sized[0]), learnable=False, copy=False)
        self.width = source.shape[1]
        self.shape = (source.shape[0], (source if target is None else target).shape[0])
        self.scale = mean_cost(sized, metric) if normalize == "mean" else 1.0
        self._bound = largest_distance(sized, metric) / self.scale
        self.check_size(*self.shape)
        self._cached: dict[tuple, CostMatrices] = {}

    def largest(self, n: int, m: int) -> float:
        """An upper bound of the costs at the time the cost was built."""
        return self._bound

    def forget(self) -> None:
        """See :class:`Cost`."""
        super().forget()
        self._cached = {}

    def _apply(self, fn, recurse=True):
        dtype = self.source.dtype
        super()._apply(fn, recurse)
        if self.source.dtype != dtype and self.source.device.type != "meta":
            for name, side in (("source", self.source), ("target", self.target)):
                if side is not None:
                    _check_cast(name, side, dtype, self.metric)
        return self

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_cached": {}}

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.learnable:
            destination[prefix + "scale"] = torch.tensor(self.scale, dtype=torch.float64)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        scale = state_dict.pop(prefix + "scale", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if scale is not None:
            self.scale = float(scale)
        self.forget()

    def matrices(
        self, n: int, m: int, *, dtype: torch.dtype, device: torch.device, self_terms: bool
    ) -> CostMatrices:
        """See :class:`Cost`. Constant matrices are computed once per device and dtype."""
        self.check_size(n, m)
        key = (dtype, device, self_terms)
        if self.learnable:
            return self._matrices(dtype, device, self_terms)
        if key not in self._cached:
            with as_constant():
                self._cached = {key: self._matrices(dtype, device, self_terms)}
        return self._cached[key]

    def _matrices(self, dtype, device, self_terms) -> CostMatrices:
        source = self.source.to(device, dtype)
        if self.target is None:
            return same_for_all(self._self_distance(source), self_terms)
        target = self.target.to(device, dtype)
        cross = self._distance(source, target)
        if not self_terms:
            return CostMatrices(cross)
        return CostMatrices(cross, self._self_distance(source), self._self_distance(target))

    def between(
        self,
        x: Int[Tensor, "batch k"],
        y: Int[Tensor, "batch l"],
        sides: tuple[Side, Side],
        dtype: torch.dtype,
    ) -> Float[Tensor, "batch k l"]:
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

    def mean_to_all(
        self, tokens: Int[Tensor, "batch k"], sides: tuple[Side, Side], dtype: torch.dtype
    ) -> Float[Tensor, "batch k"] | None:
        """|x − m|² + E|y − m|² with m = E[y]; 1 − ⟨x̂, E[ŷ]⟩ for cosine; None for euclidean."""
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
        """Whether the cost was built with ``learnable=True``."""
        return self.learnable

    @property
    def one_vocabulary(self) -> bool:
        """Whether there is no ``target`` embedding."""
        return self.target is None

    def _moments(self, side: Side, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Mean and variance of the rows (or directions) of a side; computed once if constant."""
        y = self._side(side)

        def moments() -> tuple[Tensor, Tensor]:
            rows = y.to(dtype)
            if self.metric == "cosine":
                # A product instead of normalised copies, which would be as large as the embedding.
                mean = (1 / rows.norm(dim=-1)) @ rows / len(rows)
                return mean, 1 - mean.square().sum()
            variance, mean = torch.var_mean(rows, 0, correction=0)
            return mean, variance.sum()

        return self.kept(("moments", side, dtype, y.device), moments)

    def _side(self, side: str) -> Tensor:
        return self.source if side == "source" or self.target is None else self.target

    def coordinates(self, side: Side, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The rows of one side in the form that :meth:`distance` takes, ``(V, d)``."""
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
            return inner_products(x, y).neg_().add_(1).clamp_(min=0).div_(self.scale)
        x_squares = x.square().sum(-1)
        y_squares = x_squares if y is x else y.square().sum(-1)
        squares = x_squares.unsqueeze(-1) + y_squares.unsqueeze(-2)
        if squares.requires_grad:
            return (squares - 2 * inner_products(x, y)).clamp(min=0) / self.scale
        product = torch.addmm if x.ndim == 2 else torch.baddbmm
        distance = product(squares, x, y.mT, beta=1 / self.scale, alpha=-2 / self.scale)
        return distance.clamp_(min=0)

    def _self_distance(self, x: Tensor) -> Tensor:
        distance = self._distance(x, x)
        diagonal = torch.eye(len(x), dtype=torch.bool, device=x.device)
        return distance.masked_fill(diagonal, 0.0)

    def extra_repr(self) -> str:
        """The settings."""
        return f"{self.shape}, metric={self.metric!r}, scale={self.scale:.4g}"


def _check_cast(name: str, embedding: Tensor, before: torch.dtype, metric: str) -> None:
    try:
        check_embedding(name, embedding, metric)
    except ValueError as error:
        raise ValueError(
            f"after the cast from {before} to {embedding.dtype} {error}: leave the loss in {before}"
        ) from error
