"""The cost between embeddings inside KeOps' reductions, with memory linear in the vocabulary.

Two formulas, in the log domain, serve all operations. The points are scaled such that
D_ij = C_ij/ε:

    softmin            −ε·log Σ_j exp(h_j − D_ij),          h_j = log b_j + g_j/ε
    mean, mean_cost    Σ_j exp(h_j + f_i/ε − D_ij)·(y_j, D_ij)

Every problem recomputes the distances. On a CPU :mod:`otkd.ot.kernels.blocked`, whose problems
share them, is many times faster in about the same memory.

The cosine cost of unit vectors is half of their squared distance, so it needs no formula of its
own. KeOps compiles each formula once for every width, dtype and kind of device, which takes 10 to
40 s, and caches the result on disk.

Source: Charlier et al. (2021), "Kernel Operations on the GPU, with Autodiff, without Memory
Overflows", JMLR 22.
"""

from __future__ import annotations

import contextlib
import math
import sys
from types import ModuleType

import torch
from torch import Tensor

from otkd.extras import missing
from otkd.ot.kernels.blocked import PointCost, SharedKernel
from otkd.warn import warn_caller

_NO_MASS = -1e30  # log of mass 0; a difference of infinities would be NaN


class KeOpsCost(PointCost):
    """A constant embedding cost whose entries KeOps recomputes one by one.

    Raises:
        ImportError: if pykeops is not installed.
        RuntimeError: if it cannot compile for the device.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        obstacle = obstacle_to_keops(self.points[0].device)
        if obstacle is not None:
            raise obstacle

    def kernel(self, epsilon: float) -> KeOpsKernel:
        """See :class:`~otkd.ot.kernels.lazy.LazyCost`."""
        cost = self.embedding_cost
        scale = cost.scale * epsilon * (2 if cost.metric == "cosine" else 1)
        factor = 1 / (scale if cost.metric == "euclidean" else math.sqrt(scale))
        x = (self.points[0] * factor).contiguous()
        y = x if self.within else (self.points[1] * factor).contiguous()
        return KeOpsKernel(x, y, epsilon, squared=cost.metric != "euclidean")


class KeOpsKernel(SharedKernel):
    """exp(−D) between points ``x (n, d)`` and ``y (m, d)``; D is their distance or its square."""

    def __init__(self, x: Tensor, y: Tensor, epsilon: float, *, squared: bool):
        self.x, self.y, self.epsilon, self.squared = x, y, epsilon, squared

    @property
    def transposed(self) -> KeOpsKernel:
        """The kernel with rows and columns exchanged."""
        return KeOpsKernel(self.y, self.x, self.epsilon, squared=self.squared)

    def softmin(self, g: Tensor, log_b: Tensor) -> Tensor:
        """See :class:`~otkd.ot.kernels.base.Kernel`."""
        with _keops_at_work():
            log_sum = (self._log_weights(log_b, g) - self._distance()).logsumexp(dim=2)
        return -self.epsilon * log_sum.squeeze(-1)

    def mean(self, f: Tensor, g: Tensor, b: Tensor, y: Tensor) -> Tensor:
        """See :class:`~otkd.ot.kernels.base.Kernel`."""
        return self._means(f, g, b, y)[..., 0]

    def mean_cost(self, f: Tensor, g: Tensor, b: Tensor) -> Tensor:
        """See :class:`~otkd.ot.kernels.base.Kernel`."""
        return self.epsilon * self._means(f, g, b, b)[..., 1]

    def _means(self, f: Tensor, g: Tensor, b: Tensor, y: Tensor) -> Tensor:
        with _keops_at_work():
            distance = self._distance()
            rows = _lazy((f / self.epsilon)[:, :, None, None])
            mass = (self._log_weights(b.log(), g) + rows - distance).exp()
            return (mass * _lazy(y[:, None, :, None]).concat(distance)).sum(dim=2)

    def _distance(self):
        gap = _lazy(self.x[None, :, None, :]) - _lazy(self.y[None, None, :, :])
        return gap.sqnorm2() if self.squared else gap.norm2()

    def _log_weights(self, log_b: Tensor, g: Tensor):
        log_weights = torch.add(log_b, g, alpha=1 / self.epsilon).clamp_(min=_NO_MASS)
        return _lazy(log_weights[:, None, :, None])


def keops_works(device: torch.device) -> bool:
    """Whether KeOps can be used on this device; if not, warns why."""
    obstacle = obstacle_to_keops(device)
    if obstacle is not None:
        warn_caller(f"{obstacle}. Torch is used instead", UserWarning)
    return obstacle is None


def obstacle_to_keops(device: torch.device) -> Exception | None:
    """The error that keeps KeOps from working on this device, or None."""
    if message := missing("backend='keops'", "pykeops", extra="keops"):
        return ImportError(message)
    try:
        config = _import_keops().config
    except (ImportError, OSError) as error:  # importing it needs a writable folder
        return ImportError(f"backend='keops' needs pykeops, which cannot be imported: {error}")
    if device.type == "cuda" and not config.gpu_available:
        return RuntimeError("KeOps found no CUDA to compile for")
    if config.pykeops_base.get_cxx_compiler() is None:
        return RuntimeError(
            "KeOps compiles its formulas, and found no C++ compiler: install g++ or "
            "name one in the environment variable CXX"
        )
    if device.type not in ("cpu", "cuda"):
        return RuntimeError(f"KeOps does not compute on {device.type}")
    return None


@contextlib.contextmanager
def _keops_at_work():
    """Redirects KeOps' messages about compiling to stderr, and explains a failure."""
    with contextlib.redirect_stdout(sys.stderr):
        try:
            yield
        except ImportError as error:
            raise RuntimeError(
                "KeOps could not compile its formula, for the reason printed above: install what "
                "is missing, or use backend='torch'"
            ) from error


def _import_keops() -> ModuleType:
    with contextlib.redirect_stdout(sys.stderr):
        import pykeops  # pyright: ignore[reportMissingImports]
    return pykeops


def _lazy(values: Tensor):
    from pykeops.torch import LazyTensor  # pyright: ignore[reportMissingImports]

    return LazyTensor(values.contiguous())
