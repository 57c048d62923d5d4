"""Linear maps between two embedding spaces, fitted on the tokens that both have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from otkd.checks import check_choice
from otkd.scalars import as_positive
from otkd.tensors import check_floating

_RIDGE = 1e-3
METHODS = ("procrustes", "least_squares")
_HELD_OUT = 10
_BLOCK = 4096
RIDGES = tuple(10.0**power for power in range(-6, 3))
_JUDGED = 4096  # anchors that are left out to choose a ridge


@dataclass(frozen=True, eq=False)
class AnchorMap:
    """The map x ↦ x·W + c from one embedding space to another.

    Attributes:
        weight: W, ``(source_width, target_width)``.
        bias: c, ``(target_width,)``.
        residual: ‖Y − Ŷ‖/‖Y − ȳ‖ over a tenth of the anchors, which is held out (with a fixed seed)
            and mapped by a fit on the others; ȳ is their mean. 0 means that the map is exact, 1
            that it is no better than the mean.
        anchors: number of anchors. The final map is fitted on all of them.

    Example:
        >>> source = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [3.0, 0.0]])
        >>> found = otkd.alignment.fit_map(source, 2 * source + 1)
        >>> torch.allclose(found.apply(source), 2 * source + 1, atol=1e-5)
        True
    """

    weight: Float[Tensor, "source_width target_width"]
    bias: Float[Tensor, " target_width"]
    residual: float
    anchors: int

    def apply(self, embedding: Float[Tensor, "*tokens source_width"]) -> Tensor:
        """The rows in the target's space, ``(*tokens, target_width)``, in the precision of the map.

        Raises:
            ValueError: if the rows do not have the source's width.
        """
        if embedding.shape[-1] != len(self.weight):
            raise ValueError(
                f"the map is for rows of width {len(self.weight)}, got {embedding.shape[-1]}"
            )
        weight, bias = self.weight.to(embedding.device), self.bias.to(embedding.device)
        return embedding.to(weight.dtype) @ weight + bias


def fit_map(
    source: Float[Tensor, "anchors source_width"],
    target: Float[Tensor, "anchors target_width"],
    *,
    method: str = "procrustes",
    ridge: float | Literal["loo"] | None = None,
) -> AnchorMap:
    """Fit a linear map from the rows of ``source`` to those of ``target``.

    Both are centred first. With X and Y the centred rows, UΣVᵀ = XᵀY (thin) and
    k = min(source_width, target_width):

    - ``"procrustes"``: W = s·UVᵀ, which maximises ⟨XW, Y⟩ among the semi-orthogonal matrices, with
      the optimal scale s = tr Σ/‖XUVᵀ‖². It preserves angles and relative distances if the target
      is at least as wide as the source. Needs k + 1 anchors.
    - ``"least_squares"``: W minimises ‖XW − Y‖² + λ‖W‖², with λ = ``ridge`` times the mean squared
      norm of a column of X. It follows the anchors more closely, and shrinks directions that they
      do not determine. Needs source_width + 1 anchors.

    Sums are computed in float64, 4096 anchors at a time. The map is in float32, or in float64 if
    the source is, and on the source's device.

    Args:
        source: ``(anchors, source_width)``, the student's rows of the anchors.
        target: ``(anchors, target_width)``, the teacher's rows of the same tokens, in this order.
        method: one of the above.
        ridge: strength of the penalty of ``"least_squares"``, above 0; 1e-3 by default. ``"loo"``
            takes that of 1e-6, 1e-5, …, 100 with the least squared error of anchors that are left
            out one at a time (4,096 of them at most, with a fixed seed), in closed form. Not
            accepted with ``"procrustes"``.

    Raises:
        TypeError, ValueError: for rows that are not a finite floating-point matrix, different
            numbers of rows, too few anchors, anchors that are all equal, or settings out of range.

    Source: Schönemann (1966), "A generalized solution of the orthogonal Procrustes problem"; Xing
    et al. (2015), "Normalized Word Embedding and Orthogonal Transform for Bilingual Word
    Translation", for its use between the words of two languages.
    """
    check_choice("method", method, METHODS)
    if method != "least_squares" and ridge is not None:
        raise ValueError(f"ridge= is only used by method='least_squares', got method={method!r}")
    if isinstance(ridge, str):
        check_choice("ridge", ridge, ("loo",))
    penalty = as_positive("ridge", _RIDGE if ridge is None or ridge == "loo" else ridge)
    check_embedding("source anchors", source)
    check_embedding("target anchors", target)
    count = len(source)
    if count != len(target):
        raise ValueError(
            f"source and target must have a row for every anchor, got {count} and {len(target)}"
        )
    widths = source.shape[1], target.shape[1]
    needed = 1 + (min(widths) if method == "procrustes" else widths[0])
    if count < needed:
        raise ValueError(
            f"method={method!r} from width {widths[0]} to {widths[1]} needs at least {needed} "
            f"anchors, got {count}"
        )
    source, target = source.detach(), target.detach().to(source.device)
    for name, rows in (("source", source), ("target", target)):
        if (rows == rows[0]).all():
            raise ValueError(f"all {name} anchors are equal, so they determine no map")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).to(source.device)
    held, kept = order.tensor_split([max(1, count // _HELD_OUT)])
    of_held, of_kept = (_moments(source, target, rows) for rows in (held, kept))
    if ridge == "loo":
        penalty = _best_ridge(source, target, order[:_JUDGED], of_held, of_kept)
    weight, bias, mean = _fit(*of_kept, method, penalty)
    missed = (target[held].double() - source[held].double() @ weight - bias).norm()
    spread = (target[held].double() - mean).norm()
    weight, bias, _ = _fit(of_held[0] + of_kept[0], of_held[1] + of_kept[1], method, penalty)
    dtype = torch.promote_types(source.dtype, torch.float32)
    residual = (missed / spread.clamp(min=torch.finfo(spread.dtype).tiny)).item()
    return AnchorMap(weight.to(dtype), bias.to(dtype), residual, count)


def _moments(source: Tensor, target: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """XᵀX and XᵀY of these anchors, with a 1 appended to every row; moments of two sets add up."""
    moments: list[Tensor] = []
    for block in rows.split(_BLOCK):
        x, y = (
            nn.functional.pad(side[block].double(), (0, 1), value=1) for side in (source, target)
        )
        if not moments:
            moments = [x.new_zeros(x.shape[1], side.shape[1]) for side in (x, y)]
        moments[0].addmm_(x.mT, x)
        moments[1].addmm_(x.mT, y)
    return moments[0], moments[1]


def _best_ridge(
    source: Tensor,
    target: Tensor,
    rows: Tensor,
    of_held: tuple[Tensor, Tensor],
    of_kept: tuple[Tensor, Tensor],
) -> float:
    """The ridge with the least Σ‖eᵢ/(1 − hᵢ)‖², the error of anchors that are left out.

    eᵢ are the residuals of the fit on all anchors, and hᵢ is the diagonal of its hat matrix,
    1/n + x(XᵀX + λI)⁻¹xᵀ for the centred row x, with λ fixed.
    """
    xx, xy = of_held[0] + of_kept[0], of_held[1] + of_kept[1]
    count, sum_x = xx[-1, -1], xx[-1, :-1]
    mean_x, mean_y = sum_x / count, xy[-1, :-1] / count
    xx, xy = xx[:-1, :-1] - sum_x.outer(mean_x), xy[:-1, :-1] - sum_x.outer(mean_y)
    sizes, axes = torch.linalg.eigh(xx)
    x = (source[rows].double() - mean_x) @ axes
    y, along = target[rows].double() - mean_y, axes.mT @ xy
    errors = []
    for ridge in RIDGES:
        penalised = sizes.clamp(min=0) + ridge * sizes.mean()
        own = (x.square() / penalised).sum(-1) + 1 / count
        missed = (y - (x / penalised) @ along) / (1 - own).clamp(min=1e-12).unsqueeze(-1)
        errors.append(missed.square().sum().item())
    return RIDGES[min(range(len(RIDGES)), key=errors.__getitem__)]


def _fit(xx: Tensor, xy: Tensor, method: str, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """Weight and bias from the moments, and the mean of the targets."""
    count, sum_x = xx[-1, -1], xx[-1, :-1]
    mean_x, mean_y = sum_x / count, xy[-1, :-1] / count
    xx = xx[:-1, :-1] - sum_x.outer(mean_x)
    xy = xy[:-1, :-1] - sum_x.outer(mean_y)
    if method == "procrustes":
        left, sizes, right = torch.linalg.svd(xy, full_matrices=False)
        weight = left @ right
        weight = weight * (sizes.sum() / ((xx @ weight) * weight).sum())
    else:
        penalty = ridge * xx.diagonal().mean()
        eye = torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
        weight = torch.linalg.solve(xx + penalty * eye, xy)
    return weight, mean_y - mean_x @ weight, mean_y


def check_embedding(name: str, rows: Tensor) -> None:
    """Raise unless ``rows`` is a floating-point matrix of finite numbers.

    Raises:
        TypeError: if it is not a floating-point tensor.
        ValueError: if it is no matrix or a row is not finite.
    """
    check_floating(f"the {name}", rows, "(tokens, width)")
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise ValueError(f"the {name} must be a matrix (tokens, width), got {tuple(rows.shape)}")
    bad = ~rows.detach().isfinite().all(-1)
    if bad.any():
        raise ValueError(
            f"row {bad.nonzero()[0].item()} of the {name} holds NaN or infinite numbers"
        )
