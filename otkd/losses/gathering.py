"""The samples of all processes as one batch, with gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_KINDS = ("the student's width", "the teacher's width", "the size of a number in bytes")


@dataclass(frozen=True)
class GatheredBatch:
    """The place of this process's samples among those of all processes.

    Attributes:
        sizes: number of samples of each process.
        rank: this process.
    """

    sizes: tuple[int, ...]
    rank: int

    @classmethod
    def of(cls, student: Tensor, teacher: Tensor) -> GatheredBatch:
        """Exchange the number of samples ``(b, d)``; all processes must call this.

        Raises:
            ValueError: in all processes, if their samples differ in width or precision.
        """
        own = torch.tensor(
            [len(student), student.shape[-1], teacher.shape[-1], student.element_size()],
            device=student.device,
        )
        found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(found, own)
        sizes, *kinds = torch.stack(found).T.tolist()
        for name, kind in zip(_KINDS, kinds, strict=True):
            if len(set(kind)) > 1:
                raise ValueError(
                    f"the processes cannot transport their samples as one batch: {name} is "
                    f"{', '.join(map(str, kind))} in processes 0 to {len(kind) - 1}. Use the same "
                    "in all processes, or gather=False"
                )
        return cls(tuple(sizes), dist.get_rank())

    @property
    def own(self) -> slice:
        """The rows of this process's samples."""
        start = sum(self.sizes[: self.rank])
        return slice(start, start + self.sizes[self.rank])

    def gather(self, samples: Tensor) -> Tensor:
        """``(b, d)`` of every process as ``(Σ b, d)``, in the order of their ranks.

        Gradients are summed over ranks, so DDP's averaging gives the gradient of the global-batch
        loss, provided every rank computes that loss.
        """
        return _AllGather.apply(samples, self)  # pyright: ignore[reportReturnType]


def spans_processes() -> bool:
    """Whether there are other processes to gather samples from.

    False if no gradients are recorded: an evaluation may run in one process only, and its value
    must not depend on the number of processes.
    """
    return (
        torch.is_grad_enabled()
        and dist.is_available()
        and dist.is_initialized()
        and dist.get_world_size() > 1
    )


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, samples: Tensor, batch: GatheredBatch) -> Tensor:
        ctx.batch = batch
        # Collectives require the same size in every process.
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
