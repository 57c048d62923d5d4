"""A cost between tokens by their text: 0 if one begins the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from otkd.costs.base import Cost, CostMatrices, Side, hold, same_for_all

TokenText = bytes | str | None


class PrefixCost(Cost):
    """0 between two tokens if the bytes of one begin those of the other, 1 otherwise.

    A model that is about to write "unlike" may write "un" first, so that mass on "un" is not wrong
    if the other vocabulary has the longer token. It says nothing about different texts: combine it
    with an embedding by :class:`~otkd.costs.SumCost`. It is not a metric, and its debiased
    divergence may be negative.

    Args:
        source: of each of the student's tokens (or of the common vocabulary), its bytes; a string
            for a special token, which is near only to special tokens with the same string; None
            for a token that is near only to itself.
        target: of each of the teacher's tokens, likewise, if they are another vocabulary.

    Raises:
        TypeError: if a token is neither bytes nor a string nor None.
        ValueError: if a side has no token.

    Example:
        >>> cost = otkd.costs.PrefixCost([b"un", b"do", "eos"], [b"unlike", b"d", "eos", b"a"])
        >>> cost(3, 4)
        tensor([[0., 1., 1., 1.],
                [1., 0., 1., 1.],
                [1., 1., 0., 1.]])
    """

    source_range: Tensor
    target_range: Tensor | None

    def __init__(
        self, source: Sequence[TokenText], target: Sequence[TokenText] | None = None
    ) -> None:
        super().__init__()
        sides = [source] if target is None else [source, target]
        keys = [_keys(name, side) for name, side in zip(("source", "target"), sides, strict=False)]
        order = sorted(set().union(*keys))
        # In this order, the texts that begin with one of them follow it without a gap.
        ends = _ends(order)
        place = {key: i for i, key in enumerate(order)}
        ranges = [torch.tensor([(place[key], ends[place[key]]) for key in side]) for side in keys]
        hold(self, "source_range", ranges[0], learnable=False, copy=False)
        hold(self, "target_range", None if target is None else ranges[1], False, copy=False)
        self.shape = (len(source), len(sides[-1]))
        self._texts = len(order)

    def largest(self, n: int, m: int) -> float:
        """See :class:`Cost`."""
        return 1.0

    @property
    def one_vocabulary(self) -> bool:
        """Whether there is no ``target``."""
        return self.target_range is None

    def matrices(
        self, n: int, m: int, *, dtype: torch.dtype, device: torch.device, self_terms: bool
    ) -> CostMatrices:
        """See :class:`Cost`."""
        self.check_size(n, m)

        def between(*sides: Side) -> Tensor:
            first, second = (self._range(side).to(device) for side in sides)
            return _cost(first.unsqueeze(-2), second, dtype)

        if self.one_vocabulary:
            return same_for_all(between("source", "source"), self_terms)
        cross = between("source", "target")
        if not self_terms:
            return CostMatrices(cross)
        return CostMatrices(cross, between("source", "source"), between("target", "target"))

    def between(
        self,
        x: Int[Tensor, "batch k"],
        y: Int[Tensor, "batch l"],
        sides: tuple[Side, Side],
        dtype: torch.dtype,
    ) -> Float[Tensor, "batch k l"]:
        """See :class:`Cost`."""
        first = self._range(sides[0]).to(x.device)[x]
        second = self._range(sides[1]).to(y.device)[y]
        return _cost(first.unsqueeze(-2), second.unsqueeze(-3), dtype)

    def mean_to_all(
        self, tokens: Int[Tensor, "batch k"], sides: tuple[Side, Side], dtype: torch.dtype
    ) -> Float[Tensor, "batch k"]:
        """1 minus the share of tokens that begin with this one or that this one begins with."""
        first, second = (self._range(side).to(tokens.device) for side in sides)

        def means() -> Tensor:
            (start, end), (its_start, its_end) = first.unbind(-1), second.unbind(-1)
            zeros = start.new_zeros(self._texts + 1)
            ones = torch.ones_like(its_start)
            here = zeros.index_add(0, its_start, ones)
            # The tokens up to a text in the order, and those that begin with it.
            before = here.cumsum(0) - here
            longer = before[end] - before[start]
            # A token begins all texts between its start and its end.
            open_at = (here - zeros.index_add(0, its_end, ones)).cumsum(0)
            near = longer + open_at[start] - here[start]
            return 1 - near.to(dtype) / len(second)

        return self.kept(("prefix", sides, dtype, tokens.device), means)[tokens]

    def power(self, p: float) -> Cost:
        """The cost itself, because 0 and 1 are their own powers."""
        return self

    def keeps_divergence_positive(self, epsilon: float) -> bool:
        """False: "a" is at no distance from "ab" and "ac", which are at 1 from each other."""
        return False

    def _range(self, side: Side) -> Tensor:
        if side == "source" or self.target_range is None:
            return self.source_range
        return self.target_range


def _cost(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """1 unless one range contains the start of the other, ``(..., k, 1, 2), (..., l, 2)``."""
    (start, end), (its_start, its_end) = x.unbind(-1), y.unbind(-1)
    begins = (start <= its_start) & (its_start < end)
    return (~(begins | ((its_start <= start) & (start < its_end)))).to(dtype)


def _keys(name: str, side: Sequence[TokenText]) -> list[bytes]:
    """Byte strings of which one begins another exactly if the tokens are near."""
    if not len(side):
        raise ValueError(f"the {name} of a PrefixCost must have a token")
    keys = []
    for token, text in enumerate(side):
        if isinstance(text, bytes) and text:
            keys.append(b"text:" + text)
        elif isinstance(text, str):
            keys.append(b"special:" + text.encode() + b"\0")
        elif text is None or text == b"":
            keys.append(f"{name}:{token}".encode() + b"\0")
        else:
            raise TypeError(
                f"token {token} of the {name} must be bytes, a string for a special token, or "
                f"None, got {type(text).__name__}"
            )
    return keys


def _ends(order: list[bytes]) -> list[int]:
    """For each text in the sorted list, the index after the last one that begins with it."""
    ends = [len(order)] * len(order)
    unfinished: list[int] = []
    for i, key in enumerate(order):
        while unfinished and not key.startswith(order[unfinished[-1]]):
            ends[unfinished.pop()] = i
        unfinished.append(i)
    return ends
