"""Costs that are not stored as a matrix and only apply exp(−C/ε)."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from otkd.ot.kernels.base import Kernel


class LazyCost(ABC):
    """A cost between n source and m target points, shared by all problems.

    It can replace the cost matrix of a :class:`~otkd.ot.problem.Problem`.

    Attributes:
        shape: ``(n, m)``.
        dtype: of its kernels' computations.
        inputs: the tensors that its gradient flows to; empty for a constant.
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
        """The kernel exp(−C/ε), for the solver and the gradients."""

    @abstractmethod
    def largest(self) -> float:
        """An upper bound of the costs."""
