"""Anderson acceleration of a fixed-point iteration, for many problems at once.

The next point is the combination of the last images that would minimise the residual if the map
were linear (Anderson, 1965; Walker and Ni, 2011, "Anderson Acceleration for Fixed-Point
Iterations"). Near the optimum Sinkhorn's map is linear, and self-adjoint in L²(a), so the residual
is measured in that norm. A few slow modes, for example between clusters of tokens, then take a few
iterations instead of hundreds. Far from the optimum a combination can be worse than the plain
iteration, whose L1 marginal error never grows. If the error of a problem grows, it returns to the
image of its best point, drops its history, and waits before it combines again; the waiting time
doubles with every failure.
"""

from __future__ import annotations

import torch
from torch import Tensor

DEPTH = 3
_PLAIN_STEPS = 2
_AS_GOOD = 1.001
_GROWTH = 2.0
_LONGEST_WAIT = 32.0
_REGULARISATION = 1e-7


class Anderson:
    """The history of B iterations, each on a vector of n numbers.

    Args:
        weights: ``(B, n)``, of the squared residual.
        start: the first points, ``(B, n)``.
        unit: the unit of the points, chosen so that squares of residuals are representable.
    """

    def __init__(self, weights: Tensor, start: Tensor, unit: float = 1.0):
        problems, size = weights.shape
        self._root = weights.sqrt() / unit
        self._images = weights.new_zeros(problems, DEPTH, size)  # differences of images
        self._residuals = weights.new_zeros(problems, DEPTH, size)  # and of weighted residuals
        self._last: tuple[Tensor, Tensor, Tensor] | None = None  # image, residual, failed
        self._best_error = weights.new_full((problems,), torch.inf)
        self._best_image = start
        self._wait = weights.new_zeros(problems)
        self._failures = weights.new_zeros(problems)
        self._steps = 0

    @property
    def best_image(self) -> Tensor:
        """The image of the point with the smallest error so far, ``(B, n)``; at first the start."""
        return self._best_image

    def next_point(self, point: Tensor, image: Tensor, error: Tensor) -> Tensor:
        """The next point after ``point``, given its ``image (B, n)`` and ``error (B,)``."""
        # The error may stay constant while the point improves, so a later point is better.
        better = error <= _AS_GOOD * self._best_error
        # Errors are at most 2: near 2, and for NaN, anything but a clear decrease is a failure.
        best = self._best_error
        failed = ~(error <= torch.minimum(_GROWTH * best, (1 + best) / 2))
        self._best_error = torch.fmin(self._best_error, error)
        self._best_image = torch.where(better.unsqueeze(-1), image, self._best_image)
        residual = torch.sub(image, point).mul_(self._root)
        self._remember(image, residual, failed)
        self._steps += 1
        if self._steps <= _PLAIN_STEPS:
            return image
        combined = image - (self._coefficients(residual) @ self._images).squeeze(-2)
        if not bool(failed.any() | (self._wait > 0).any()):
            return combined
        self._failures = self._failures + failed
        pause = torch.exp2(self._failures - 1).clamp_(max=_LONGEST_WAIT)
        self._wait = torch.where(failed, pause, (self._wait - 1).clamp(min=0))
        following = torch.where((self._wait > 0).unsqueeze(-1), image, combined)
        return torch.where(failed.unsqueeze(-1), self._best_image, following)

    def keep(self, rows: Tensor) -> None:
        """Continue with only the problems ``rows``."""
        for name in ("_root", "_images", "_residuals", "_best_error", "_best_image"):
            setattr(self, name, getattr(self, name)[rows])
        self._wait, self._failures = self._wait[rows], self._failures[rows]
        if self._last is not None:
            image, residual, failed = self._last
            self._last = image[rows], residual[rows], failed[rows]

    def _remember(self, image: Tensor, residual: Tensor, failed: Tensor) -> None:
        if self._last is not None:
            last_image, last_residual, last_failed = self._last
            slot = self._steps % DEPTH
            torch.sub(image, last_image, out=self._images[:, slot])
            torch.sub(residual, last_residual, out=self._residuals[:, slot])
            restarted = failed | last_failed
            if restarted.any():  # differences across a failure carry no information
                self._images[:, slot].masked_fill_(restarted.unsqueeze(-1), 0)
                self._residuals[:, slot].masked_fill_(restarted.unsqueeze(-1), 0)
                self._images.masked_fill_(failed.reshape(-1, 1, 1), 0)
                self._residuals.masked_fill_(failed.reshape(-1, 1, 1), 0)
        self._last = image, residual, failed

    def _coefficients(self, residual: Tensor) -> Tensor:
        gram = (self._residuals @ self._residuals.mT).double()
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        diagonal += _REGULARISATION * diagonal.sum(-1, keepdim=True) + 1e-30
        right = (self._residuals @ residual.unsqueeze(-1)).double()
        solution, _ = torch.linalg.solve_ex(gram, right)
        return solution.mT.to(residual.dtype)
