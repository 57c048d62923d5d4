"""Exact nearest neighbours with faiss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from otkd.extras import missing


def nearest_points(queries: Tensor, points: Tensor, k: int, metric: str, *, purpose: str) -> Tensor:
    """The k points nearest to every query, ``(n, k)``, int32, on the CPU.

    Args:
        queries: ``(n, d)``.
        points: ``(m, d)``, m ≥ k.
        k: number of points.
        metric: ``"cosine"``: inner products of normalised vectors; anything else: L2.
        purpose: what needs them, for the message if faiss is missing.

    Raises:
        ImportError: if faiss is not installed.
    """
    if message := missing(purpose, "faiss", extra="faiss"):
        raise ImportError(message)
    import faiss

    queries, points = queries.detach().double().cpu(), points.detach().double().cpu()
    if metric == "cosine":
        queries, points = (nn.functional.normalize(x, dim=-1) for x in (queries, points))
        index = faiss.IndexFlatIP(points.shape[1])
    else:  # faiss computes in float32, where a large mean would cost digits
        centre = points.mean(0)
        queries, points = queries - centre, points - centre
        index = faiss.IndexFlatL2(points.shape[1])
    index.add(points.float().numpy())  # pyright: ignore[reportCallIssue]
    _, found = index.search(queries.float().numpy(), k)  # pyright: ignore[reportCallIssue]
    return torch.from_numpy(found).to(torch.int32)


def mutual_neighbours(first: Tensor, second: Tensor, *, purpose: str) -> tuple[Tensor, Tensor]:
    """The pairs of rows that are nearest to each other (L2), as indices into both.

    Raises:
        ImportError: if faiss is not installed.
    """
    of_first = nearest_points(first, second, 1, "L2", purpose=purpose).squeeze(-1).long()
    of_second = nearest_points(second, first, 1, "L2", purpose=purpose).squeeze(-1).long()
    rows = torch.arange(len(first))
    mutual = of_second[of_first] == rows
    return rows[mutual], of_first[mutual]
