"""Costs that are never held as a matrix: they know only how to apply exp(−C/ε)."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from otkd.ot.kernels.base import Kernel


class LazyCost(ABC):
    """A cost between n source and m target points, shared by all problems.

    It stands where a cost matrix may stand in a :class:`~otkd.ot.problem.Problem`.

    Attributes:
        shape: ``(n, m)``.
        dtype: what its kernels compute in.
        inputs: the tensors that its gradient goes to; none of a constant.
    """

    ndim = 2
    inputs: tuple[Tensor, ...] = ()

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype):
        self.shape = shape
        self.dtype = dtype

    def detach(self) -> LazyCost:
        """The same cost, constant."""
        return self

    @abstractmethod
    def kernel(self, epsilon: float) -> Kernel:
        """exp(−C/ε), as the solver and the gradients apply it."""

    @abstractmethod
    def largest(self) -> float:
        """An upper bound of the costs."""
