"""The precision that values are computed in, whatever that of the logits and of autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def compute_dtype(student: Tensor) -> torch.dtype:
    """The precision everything is computed in: float64 for float64 logits, else float32."""
    return torch.float64 if student.dtype == torch.float64 else torch.float32


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Where autocast is on for the device of ``x``, a context in which it is off."""
    device = x.device.type
    # Entering one takes as long as a product of small matrices.
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
