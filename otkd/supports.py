"""Which tokens take part in the transport of a position."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

LARGEST_DENSE = 16_384
"""Largest vocabulary for which a dense cost matrix is made: 1 GiB in float32."""


class Support(ABC):
    """A choice of tokens; a constant for the gradient."""

    @abstractmethod
    def check(self, n: int, m: int) -> None:
        """Raise ``ValueError`` if distributions over n and m tokens cannot be handled."""


@dataclass(frozen=True)
class Dense(Support):
    """Every token, with the whole cost matrix in memory, shared by all positions."""

    def check(self, n: int, m: int) -> None:
        """See :class:`Support`."""
        if max(n, m) > LARGEST_DENSE:
            raise ValueError(
                f"a dense cost over {n}×{m} tokens would take {4 * n * m / 2**30:.1f} GiB; the "
                f"limit is {LARGEST_DENSE} tokens a side"
            )


def as_support(support: str | Support) -> Support:
    """The support meant by ``"auto"`` or an object; today ``"auto"`` is :class:`Dense`.

    Raises:
        TypeError: if it is neither.
    """
    if support == "auto":
        return Dense()
    if isinstance(support, Support):
        return support
    raise TypeError(f"support must be 'auto' or an object of otkd.supports, got {support!r}")
