"""The samples of all processes as one batch, with gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class GatheredBatch:
    """Where the samples of this process are among those of all.

    Attributes:
        sizes: number of samples of each process.
        rank: this process.
    """

    sizes: tuple[int, ...]
    rank: int

    @classmethod
    def of(cls, samples: int, device: torch.device) -> GatheredBatch:
        """Ask every process how many samples it has; all of them must call this."""
        own = torch.tensor([samples], device=device)
        sizes = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(sizes, own)
        return cls(tuple(torch.cat(sizes).tolist()), dist.get_rank())

    @property
    def own(self) -> slice:
        """The place of this process's samples."""
        start = sum(self.sizes[: self.rank])
        return slice(start, start + self.sizes[self.rank])

    def gather(self, samples: Tensor) -> Tensor:
        """``(b, d)`` of every process as ``(Σ b, d)``, in the order of their ranks.

        The gradient of a sample is the sum of its gradients in all processes, so that processes
        whose gradients are averaged, as DistributedDataParallel does it, have that of the whole
        batch if each has the loss of the whole batch.
        """
        return _AllGather.apply(samples, self)  # pyright: ignore[reportReturnType]


def spans_processes() -> bool:
    """Whether there are other processes to gather samples from."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, samples: Tensor, batch: GatheredBatch) -> Tensor:
        ctx.batch = batch
        # Collectives want one size from every process.
        padded = samples.new_zeros(max(batch.sizes), *samples.shape[1:])
        padded[: len(samples)] = samples
        parts = [torch.empty_like(padded) for _ in batch.sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, batch.sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient[ctx.batch.own], None
