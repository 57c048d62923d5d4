"""The nearest tokens of every token, computed once per embedding with faiss and cached."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path

import torch
from torch import Tensor

from otkd.extras import missing
from otkd.files import cache_folder, written_whole
from otkd.neighbour_search import nearest_points

_FORMAT, _VERSION = "otkd.neighbours", "1"


def nearest(
    queries: Tensor, points: Tensor, k: int, metric: str, cache_dir: Path | str | None = None
) -> Tensor:
    """The k points nearest to every query, exactly; the result is cached in a file.

    Args:
        queries: ``(n, d)``.
        points: ``(m, d)``.
        k: number of points; all of them if there are fewer.
        metric: of :class:`~otkd.costs.EmbeddingCost`: inner products of normalised vectors for
            ``"cosine"``, L2 for the others.
        cache_dir: folder of the files; by default ``$OTKD_CACHE``, else ``~/.cache/otkd``.

    Returns:
        Indices of points, ``(n, min(k, m))``, int32, on the CPU, unsorted.

    Raises:
        ImportError: if faiss is not installed and the result is not cached.

    Warns:
        UserWarning: if a file is damaged or cannot be read (it is computed again), if it cannot be
            written, or if there is no folder for it.
    """
    k = min(k, len(points))
    key = _key(queries, points, k, metric)
    path = _path(cache_dir, key)
    if path is None:
        warnings.warn(
            "the nearest neighbours are not cached, because there is no home folder: set "
            "OTKD_CACHE, or pass NearestNeighbours(cache_dir=…)",
            stacklevel=2,
        )
        return nearest_points(queries, points, k, metric, purpose="NearestNeighbours")
    try:
        return _read(path, key, (len(queries), k), len(points))
    except FileNotFoundError:
        pass
    except ValueError as error:
        warnings.warn(f"{path} is damaged and is computed again: {error}", stacklevel=2)
    except OSError as error:
        warnings.warn(f"{path} cannot be read and is computed again: {error}", stacklevel=2)
    table = nearest_points(queries, points, k, metric, purpose="NearestNeighbours")
    try:
        _write(path, key, table)
    except OSError as error:
        warnings.warn(
            f"the nearest neighbours could not be written to {path}: {error}", stacklevel=2
        )
    return table


def _path(cache_dir: Path | str | None, key: str) -> Path | None:
    """The file of a table; None if no folder is given and the user has no home folder."""
    folder = cache_folder(cache_dir)
    return None if folder is None else folder / "neighbours" / f"{key}.safetensors"


def _key(queries: Tensor, points: Tensor, k: int, metric: str) -> str:
    """SHA-256 of everything that the result depends on."""
    sides = [points] if queries is points else [points, queries]
    order = "cosine" if metric == "cosine" else "L2"
    header = [_FORMAT, _VERSION, order, k, [(str(x.dtype), list(x.shape)) for x in sides]]
    digest = hashlib.sha256(json.dumps(header).encode())
    for side in sides:
        digest.update(_bytes(side))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data


def _read(path: Path, key: str, shape: tuple[int, int], points: int) -> Tensor:
    """The table of a file; ``ValueError`` if its content is not the one that was written."""
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            table = file.get_tensor("neighbours")
    except safetensors.SafetensorError as error:
        raise ValueError(f"no safetensors file with neighbours ({error})") from error
    if metadata.get("key") != key:
        raise ValueError("it belongs to another embedding")
    if table.dtype != torch.int32 or tuple(table.shape) != shape:
        raise ValueError(f"it holds {table.dtype} {tuple(table.shape)}, not int32 {shape}")
    if table.numel() and not (int(table.min()) >= 0 and int(table.max()) < points):
        raise ValueError(f"an index is outside 0 … {points - 1}")
    if metadata.get("sha256") != hashlib.sha256(_bytes(table)).hexdigest():
        raise ValueError("its content has changed since it was written")
    return table


def _write(path: Path, key: str, table: Tensor) -> None:
    """Write a table, atomically."""
    _safetensors()
    from safetensors.torch import save

    content = hashlib.sha256(_bytes(table)).hexdigest()
    metadata = {"format": _FORMAT, "version": _VERSION, "key": key, "sha256": content}
    with written_whole(path) as partial:
        partial.write_bytes(save({"neighbours": table.contiguous()}, metadata))


def _safetensors():
    if message := missing("The file of neighbours", "safetensors", extra="faiss"):
        raise ImportError(message)
    import safetensors

    return safetensors
