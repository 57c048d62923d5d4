"""The base class of all ground costs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from otkd.scalars import as_positive

Side = Literal["source", "target"]
LARGEST_COST = 1e30
"""Largest cost there may be: sums of costs over ε are to stay within float32."""

Kept = TypeVar("Kept")


class CostMatrices(NamedTuple):
    """Costs between source and target and, for debiasing, within each of them."""

    cross: Tensor
    source: Tensor | None = None
    target: Tensor | None = None


class Cost(nn.Module, ABC):
    """A ground cost between two sets of tokens.

    Attributes:
        shape: number of source and target tokens, or None if the cost fits any single vocabulary.
        width: how many numbers it reads per token; it decides the size of blocks.
    """

    shape: tuple[int, int] | None = None
    width: int = 1

    def __init__(self) -> None:
        super().__init__()
        self.tail_constants: dict[tuple, Any] = {}  # see otkd.costs.tails

    @property
    def bridges_vocabularies(self) -> bool:
        """Whether source and target are vocabularies of different size."""
        return self.shape is not None and self.shape[0] != self.shape[1]

    @abstractmethod
    def matrices(
        self, n: int, m: int, *, dtype: torch.dtype, device: torch.device, self_terms: bool
    ) -> CostMatrices:
        """The cost matrices for distributions of size n and m.

        Raises:
            ValueError: if the cost does not fit those sizes.
        """

    @abstractmethod
    def between(
        self,
        x: Int[Tensor, "batch k"],
        y: Int[Tensor, "batch l"],
        sides: tuple[Side, Side],
        dtype: torch.dtype,
    ) -> Float[Tensor, "batch k l"]:
        """The costs between tokens x of one side and y of another, row by row of the batch."""

    def mean_to_all(
        self, tokens: Int[Tensor, "batch k"], sides: tuple[Side, Side], dtype: torch.dtype
    ) -> Float[Tensor, "batch k"] | None:
        """The mean cost to all tokens of the second side; None if there is no closed form."""
        return None

    def check_within(self) -> None:
        """Raise ``ValueError`` if the cost does not define the costs within a side.

        Debiasing needs them.
        """

    def kept(self, key: tuple, make: Callable[[], Kept]) -> Kept:
        """``make()``, computed once for a constant cost and in every call for a learnable one."""
        if self.learns:
            return make()
        if key not in self.tail_constants:
            with as_constant():
                self.tail_constants[key] = make()
        return self.tail_constants[key]

    def forget(self) -> None:
        """Drop cached results because the cost was moved, cast or loaded."""
        self.tail_constants = {}

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.forget()
        return self

    def __getstate__(self) -> dict:
        # Copies and pickles compute cached results again: these may be far larger than the cost.
        return {**self.__dict__, "tail_constants": {}}

    @property
    def learns(self) -> bool:
        """Whether gradients flow into the cost."""
        return False

    @property
    def one_vocabulary(self) -> bool:
        """Whether source and target are the same tokens."""
        return not self.bridges_vocabularies

    def power(self, p: float) -> Cost:
        """The cost raised to the power ``p``, entry by entry."""
        return self if p == 1 else PowerCost(self, p)

    def keeps_divergence_positive(self, epsilon: float) -> bool:
        """Whether exp(−C/ε) is positive definite, so that the debiased divergence is ≥ 0."""
        return True

    def forward(self, n: int, m: int) -> Float[Tensor, "n m"]:
        """The cost matrix between source and target in float32, on the cost's device."""
        device = next(iter([*self.buffers(), *self.parameters()]), torch.empty(0)).device
        matrix = self.matrices(n, m, dtype=torch.float32, device=device, self_terms=False).cross
        return matrix if self.learns else matrix.clone()  # a copy, which the caller may change

    def largest(self, n: int, m: int) -> float:
        """An upper bound of the costs between n source and m target tokens."""
        return 0.0

    def check_size(self, n: int, m: int) -> None:
        """Raise ``ValueError`` unless it fits n source and m target tokens and is not too large."""
        if self.shape is not None and self.shape != (n, m):
            raise ValueError(
                f"the cost is for {self.shape[0]} source and {self.shape[1]} target tokens, but "
                f"the distributions have {n} and {m}. Pass a cost of that size. If the "
                "vocabulary is padded, pass vocab_size= and only that many rows of the embedding"
            )
        if self.shape is None and n != m:
            raise ValueError(
                f"{type(self).__name__} needs one vocabulary, but source and target have {n} and "
                f"{m} tokens; use EmbeddingCost(source, target) to bridge two"
            )
        if not self.largest(n, m) <= LARGEST_COST:
            raise ValueError(
                f"{type(self).__name__} has costs up to {self.largest(n, m):.1e} between {n} and "
                f"{m} tokens, but they must be below {LARGEST_COST:.0e}: use larger units for the "
                "cost"
            )


class PowerCost(Cost):
    """Another cost raised to the power ``p``, entry by entry.

    Example:
        >>> otkd.costs.PowerCost(otkd.costs.OrdinalCost(), 2)(3, 3)
        tensor([[0., 1., 4.],
                [1., 0., 1.],
                [4., 1., 0.]])
    """

    def __init__(self, base: Cost, p: float) -> None:
        super().__init__()
        self.base, self.p, self.shape = base, float(as_positive("p", p)), base.shape
        if self.shape is not None:
            self.check_size(*self.shape)

    def largest(self, n: int, m: int) -> float:
        """See :class:`Cost`."""
        return power_bound(self.base.largest(n, m), self.p)

    def matrices(
        self, n: int, m: int, *, dtype: torch.dtype, device: torch.device, self_terms: bool
    ) -> CostMatrices:
        """See :class:`Cost`."""
        base = self.base.matrices(n, m, dtype=dtype, device=device, self_terms=self_terms)
        raised = (None if matrix is None else matrix**self.p for matrix in base[1:])
        return CostMatrices(base.cross**self.p, *raised)

    def between(
        self,
        x: Int[Tensor, "batch k"],
        y: Int[Tensor, "batch l"],
        sides: tuple[Side, Side],
        dtype: torch.dtype,
    ) -> Float[Tensor, "batch k l"]:
        """See :class:`Cost`."""
        return self.base.between(x, y, sides, dtype) ** self.p

    def check_within(self) -> None:
        """See :class:`Cost`."""
        self.base.check_within()

    @property
    def learns(self) -> bool:
        """Whether the base cost is learnable."""
        return self.base.learns

    @property
    def one_vocabulary(self) -> bool:
        """Whether the base cost is for one vocabulary."""
        return self.base.one_vocabulary

    def keeps_divergence_positive(self, epsilon: float) -> bool:
        """True for powers up to 1 if it is for the base (Schoenberg, 1938); unknown otherwise."""
        return self.p <= 1 and self.base.keeps_divergence_positive(epsilon)


def power_bound(base: float, p: float) -> float:
    """``base**p``, or infinity if that exceeds the range of a float."""
    try:
        return base**p
    except OverflowError:
        return math.inf


def same_for_all(matrix: Tensor, self_terms: bool) -> CostMatrices:
    """The matrices of a cost within one vocabulary."""
    return CostMatrices(matrix, matrix, matrix) if self_terms else CostMatrices(matrix)


def hold(
    module: nn.Module, name: str, tensor: Tensor | None, learnable: bool, *, copy: bool = True
) -> None:
    """Register a tensor with a module: the tensor itself if it is learnable, else a copy.

    The copy is a buffer that is not saved. ``copy=False`` skips copying a tensor that has no other
    owner.
    """
    if learnable and isinstance(tensor, nn.Parameter):
        module.register_parameter(name, tensor)
    elif learnable or tensor is None:
        module.register_buffer(name, tensor, persistent=False)
    else:
        with as_constant():
            kept = tensor.detach()
            if copy:
                kept = kept.clone(memory_format=torch.contiguous_format)
        module.register_buffer(name, kept, persistent=False)


@contextmanager
def as_constant() -> Iterator[None]:
    """Context for results that are cached: no gradients are recorded.

    It also leaves ``inference_mode``, whose tensors cannot be used in a backward pass later.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield
