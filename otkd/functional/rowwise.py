"""Value and logit gradient of a divergence, position by position, in one pass.

Every divergence D(p, q) of this package is given as a *formula* of the two distributions of a
position, ``pair -> (D, q·∂D/∂q)``. The chain rule through ``q = softmax(z/T)`` is the same for
all,

    ∂D/∂z = (h − q·Σh) / T,    h = q·∂D/∂q,

so it is implemented once, here. Value and gradient are computed together, in blocks of positions.
Apart from the gradient, which the backward pass scales in place, no temporary is larger than a
block.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from otkd.checks import (
    check_finite_rows,
    check_logits,
    check_mask,
    check_temperatures,
    refuse_second_derivative,
)
from otkd.precision import compute_dtype, without_autocast
from otkd.tensors import block_elements, is_batched

LOG_ZERO = -1e5
"""Floor of every log-probability: where KL is truly infinite it is finite and this steep."""

_BLOCK_ELEMENTS_ON_CPU = 2**18  # about what a core's cache holds
_BLOCK_ELEMENTS_ON_DEVICE = 2**25


class Pair:
    """The distributions of a block of positions and their logarithms, computed when first used.

    Computing a softmax, and logarithms from the shifted logits, takes half the time of a
    log-softmax and its exponential.

    Attributes:
        q, log_q: the student's, ``(positions, atoms)``.
        p, log_p: the teacher's. Logarithms are clamped at ``LOG_ZERO``.
        difference: q − p.
        tail: whether the last atom stands for all tokens that have no atom of their own. If False,
            the atoms are the tokens of the vocabulary.
    """

    tail: ClassVar[bool] = False

    def __init__(self, student: Tensor, teacher: Tensor):
        self._student, self._teacher = student, teacher

    @functools.cached_property
    def q(self) -> Tensor:
        """The student's probabilities."""
        return self._student.softmax(-1)

    @functools.cached_property
    def p(self) -> Tensor:
        """The teacher's probabilities."""
        return self._teacher.softmax(-1)

    @functools.cached_property
    def log_q(self) -> Tensor:
        """Logarithms of the student's probabilities."""
        return _floored_log(self._student, self.q)

    @functools.cached_property
    def log_p(self) -> Tensor:
        """Logarithms of the teacher's probabilities."""
        return _floored_log(self._teacher, self.p)

    @functools.cached_property
    def difference(self) -> Tensor:
        """The student's minus the teacher's probabilities."""
        return self.q - self.p


def _floored_log(logits: Tensor, probabilities: Tensor) -> Tensor:
    """Logits minus their maximum, plus log max q, which is accurate because max q ≥ 1/V."""
    shifted = logits - logits.amax(-1, keepdim=True)
    heaviest = probabilities.amax(-1, keepdim=True)
    return shifted.add_(heaviest.log_()).clamp_(min=LOG_ZERO)


@dataclass(frozen=True, kw_only=True)
class Formula(ABC):
    """A divergence as a function of the two distributions of each position of a block.

    Attributes:
        same_vocabulary: whether token i of the student is compared with token i of the teacher.
        caches_per_block: size of a block on a CPU, in what a core's cache holds; above 1 if a block
            takes much work besides passes over its entries.
    """

    same_vocabulary: ClassVar[bool] = True
    caches_per_block: ClassVar[int] = 1

    @abstractmethod
    def __call__(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """The values D, ``(positions,)``, and q·∂D/∂q, ``(positions, atoms)``."""


class Teacher(ABC):
    """The teacher's side of all positions, compared with the student's block by block."""

    @abstractmethod
    def compare(
        self, student: Tensor, rows: slice | Tensor, formula: Formula
    ) -> tuple[Pair, Spread | None]:
        """Both distributions over the atoms of a block, given the student's logits divided by T.

        Also a function that maps the gradient in the atoms' logits to the gradient in the tokens'
        logits and writes it to its second argument, if given. None if the atoms are the tokens.
        """


Spread = Callable[[Tensor, Tensor | None], Tensor]


class DenseTeacher(Teacher):
    """A teacher given by its logits ``(positions, vocab)``; the atoms are the tokens."""

    def __init__(self, logits: Tensor, temperature: float):
        self.logits, self.temperature = logits, temperature

    def compare(
        self, student: Tensor, rows: slice | Tensor, formula: Formula
    ) -> tuple[Pair, Spread | None]:
        """See :class:`Teacher`."""
        return Pair(student, _scaled(self.logits[rows], self.temperature, student.dtype)), None


def rowwise_divergence(
    formula: Formula,
    student_logits: Float[Tensor, "*batch vocab"],
    teacher_logits: Float[Tensor, "*batch teacher_vocab"],
    *,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    mask: Shaped[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """The divergence that ``formula`` defines, at every position.

    The other arguments and exceptions are those of the functions in
    :mod:`otkd.functional.divergences`.
    """
    check_logits(student_logits, teacher_logits, same_vocabulary=formula.same_vocabulary)
    teacher_temperature = check_temperatures(temperature, teacher_temperature)
    teacher = DenseTeacher(_rows(teacher_logits.detach()), teacher_temperature)
    return compare_rowwise(formula, student_logits, teacher, temperature=temperature, mask=mask)


def compare_rowwise(
    formula: Formula,
    student_logits: Tensor,
    teacher: Teacher,
    *,
    temperature: float,
    mask: Tensor | None,
) -> Tensor:
    """The divergence of the student from ``teacher`` at every position, ``(*batch,)``."""
    batch_shape = student_logits.shape[:-1]
    check_mask(mask, batch_shape)
    values: Any = _Rowwise.apply(
        _rows(student_logits),
        teacher,
        None if mask is None else mask.reshape(-1),
        formula,
        temperature,
        torch.is_grad_enabled() and student_logits.requires_grad,
    )
    check_finite_rows(values, "a loss that is not finite")
    return values.reshape(batch_shape)


def _rows(logits: Tensor) -> Tensor:
    return logits.reshape(math.prod(logits.shape[:-1]), logits.shape[-1])


def _blocks(
    positions: int, vocab: int, mask: Tensor | None, device: torch.device, caches: int
) -> Iterator:
    """Slices of all positions, or index tensors of the counted ones, in blocks."""
    elements = block_elements(device, caches * _BLOCK_ELEMENTS_ON_CPU, _BLOCK_ELEMENTS_ON_DEVICE)
    size = max(1, elements // vocab)
    if mask is None:
        for start in range(0, positions, size):
            yield slice(start, start + size)
    else:
        yield from mask.nonzero().squeeze(-1).split(size)


def _scaled(logits: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    logits = logits.to(dtype)
    return logits if temperature == 1 else logits / temperature


class _Rowwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, mask, formula, temperature, with_gradient):
        dtype = compute_dtype(student)
        positions, vocab = student.shape
        values = torch.zeros(positions, dtype=dtype, device=student.device)
        gradient = student[:0]
        if with_gradient:
            # float32, because small entries would underflow in float16 before they are scaled.
            kept = dtype if student.dtype == torch.float16 else student.dtype
            make = torch.empty_like if mask is None else torch.zeros_like
            gradient = make(student, dtype=kept)
            ctx.save_for_backward(gradient)
            ctx.dtype = student.dtype
        with without_autocast(student):
            blocks = _blocks(positions, vocab, mask, student.device, formula.caches_per_block)
            for rows in blocks:
                logits = _scaled(student[rows], temperature, dtype)
                pair, spread = teacher.compare(logits, rows, formula)
                block, weighted = formula(pair)
                # Every divergence is non-negative: negative values are rounding errors.
                values[rows] = block.clamp(min=0).to(dtype)
                if with_gradient:
                    inner = weighted.sum(-1, keepdim=True)
                    whole = isinstance(rows, slice) and gradient.dtype == dtype
                    place = gradient[rows] if whole else None
                    # The gradient of the atoms and that of the tokens differ in size.
                    out = place if place is not None and spread is None else None
                    out = torch.empty_like(weighted) if out is None else out
                    torch.addcmul(weighted, pair.q, inner, value=-1, out=out)
                    if temperature != 1:
                        out /= temperature
                    if spread is not None:
                        out = spread(out, place)
                    if place is None:
                        gradient[rows] = out.to(gradient.dtype)
        return values

    @staticmethod
    def backward(ctx, grad_values):  # pyright: ignore[reportIncompatibleMethodOverride]
        refuse_second_derivative("divergences are")
        (gradient,) = ctx.saved_tensors
        factor = grad_values.unsqueeze(-1).to(gradient.dtype)
        if is_batched(factor):
            result = gradient * factor
        else:
            # Scale the saved gradient in place unless the graph is retained: then copy it.
            result = torch.empty_like(gradient) if _graph_is_kept() else gradient
            torch.mul(gradient, factor, out=result)
        return result.to(ctx.dtype), None, None, None, None, None


def _graph_is_kept() -> bool:
    """Whether the current backward pass retains the graph, if torch tells."""
    engine = getattr(torch._C, "_autograd", None)
    ask = getattr(engine, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else ask()
