"""Signals as safetensors files: written whole or not at all, refused in the same words."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import Tensor

from otkd.files import written_whole


def save_tensors(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write tensors to a safetensors file, whole or not at all; its folder is made."""
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with written_whole(path) as partial:
        save_file(plain, partial, metadata)


def load_tensors(path: str | os.PathLike, *names: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Raises:
        ValueError: if it is no safetensors file, or holds no tensor of one of the ``names``.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error
    for name in names:
        if name not in tensors:
            raise ValueError(f"{path} holds {sorted(tensors)}, but no tensor named {name!r}")
    return tensors, metadata
