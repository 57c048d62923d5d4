"""Supports: which tokens take part in the transport of a position."""

from __future__ import annotations

import logging

from otkd.costs import Cost, EmbeddingCost
from otkd.supports.base import Positions, Support
from otkd.supports.coverage import CoverageWarning
from otkd.supports.dense import LARGEST_DENSE, Dense
from otkd.supports.neighbours import NearestNeighbours
from otkd.supports.topk import TopK

__all__ = [
    "BACKENDS",
    "LARGEST_DENSE",
    "CoverageWarning",
    "Dense",
    "NearestNeighbours",
    "Positions",
    "Support",
    "TopK",
    "as_support",
    "choose_support",
]

BACKENDS = ("auto", "torch", *Dense.backends, *TopK.backends)
LARGEST_AUTOMATIC_DENSE = 2048
"""Largest vocabulary for which ``"auto"`` chooses :class:`Dense`."""

_logger = logging.getLogger("otkd")


def as_support(support: str | Support) -> Support | None:
    """The support given by an object; None for ``"auto"``, which depends on the vocabulary.

    Raises:
        TypeError: if it is neither.
    """
    if isinstance(support, str) and support == "auto":
        return None
    if isinstance(support, Support):
        return support
    raise TypeError(f"support must be 'auto' or an object of otkd.supports, got {support!r}")


def choose_support(n: int, m: int, backend: str = "auto", cost: Cost | None = None) -> Support:
    """:class:`Dense` up to 2048 tokens, ``TopK(64)`` above, with 32 clusters for an embedding.

    Reports name the choice (``last_report.support``), and it is logged at level DEBUG.

    If only one of them has the backend, that one is chosen.

    Args:
        n: number of tokens of the student.
        m: number of tokens of the teacher.
        backend: what computes the transport.
        cost: if it is a constant embedding cost, the tail is divided into clusters. None if the
            teacher's tail cannot be divided because it is stored as one mass.
    """
    dense = max(n, m) <= LARGEST_AUTOMATIC_DENSE
    if backend in Dense.backends + TopK.backends:
        dense = backend in Dense.backends
    clustered = isinstance(cost, EmbeddingCost) and not cost.learns and backend != "triton"
    support = Dense() if dense else TopK(64, clusters=32 if clustered else 1)
    _logger.debug("support='auto' chose %r for %d×%d tokens", support, n, m)
    return support
