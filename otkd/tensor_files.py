"""Tensors in safetensors files with a checksum."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping

import torch
from torch import Tensor

from otkd.extras import missing
from otkd.files import written_whole

_CHECKSUM = "checksum"


def save_tensors(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write tensors to a safetensors file, atomically; missing folders are created.

    Raises:
        ImportError: if safetensors is not installed.
    """
    _check_safetensors()
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = metadata or {}
    with written_whole(path) as partial:
        save_file(plain, partial, {**metadata, _CHECKSUM: _checksum(plain, metadata)})


def load_tensors(path: str | os.PathLike, *names: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Files of earlier versions have no checksum and are read without verification.

    Raises:
        ImportError: if safetensors is not installed.
        ValueError: if it is not a safetensors file, was changed after it was written, or lacks a
            tensor of one of the ``names``.
    """
    _check_safetensors()
    from safetensors import SafetensorError, safe_open

    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder, not a safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    for name in names:
        if name not in tensors:
            raise ValueError(f"{path} holds {sorted(tensors)}, but no tensor named {name!r}")
    written = metadata.pop(_CHECKSUM, None)
    if written is not None and written != _checksum(tensors, metadata):
        raise ValueError(
            f"{path} is damaged or was changed after it was saved: its checksum does not match. "
            "Copy the file again, or write it again"
        )
    return tensors, metadata


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """A hash of all tensors with their names, dtypes and shapes, and of the metadata."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_safetensors() -> None:
    message = missing("A safetensors file", "safetensors", extra="train")
    if message:
        raise ImportError(message)
