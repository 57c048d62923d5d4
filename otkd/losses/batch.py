"""Losses that transport the samples of a batch: they see the batch, not the position."""

from __future__ import annotations

import torch
from torch import Tensor

from otkd.checks import check_choice, check_positive
from otkd.functional.batch_transport import (
    BATCH_COSTS,
    point_distances,
    transport_between_samples,
)
from otkd.functional.transport import at_counted_positions
from otkd.losses.base import Batch, DistillationLoss
from otkd.ot.divergence import Options


class BatchLoss(DistillationLoss):
    """A loss of all counted positions together, given as each position's share of b times it.

    The mean of the shares is the value of the batch, so that one reduction serves all losses: with
    ``num_items_in_batch`` the value is scaled by counted/num_items. Microbatches do not add up to
    the whole batch: transport sees the batch.
    """

    rescales_by_default = False

    def per_position(self, batch: Batch) -> Tensor:
        """Shares ``(*batch,)``, adding up to b times the value of the batch."""
        return at_counted_positions(
            self.shares,
            batch.student_logits,
            batch.teacher_logits,
            temperature=self.temperature,
            teacher_temperature=self.teacher_temperature,
            mask=batch.counted,
        )

    def shares(self, q: Tensor, p: Tensor) -> Tensor:
        """Each sample's share ``(b,)`` for samples ``q``, ``p`` of shape ``(b, vocab)``."""
        raise NotImplementedError(f"{type(self).__name__} must define shares")


class BatchSinkhornLoss(BatchLoss):
    """Entropic transport between the samples of a batch, each a point of mass 1/b.

    OT_ε over the b×b distances between q_i and p_j (SinKD). With ``reduction="none"`` each sample
    gets its share of the value, from its potentials; the shares add up to b times the mean, and
    their gradients are that of the mean, each.

    Args:
        cost: ``"l1"``, ``"euclidean"`` or ``"sqeuclidean"`` distance between distributions.
        temperature: divides the logits of both.
        epsilon: entropic strength in units of the cost.
        debias: subtract half the transport of each side to itself, so that the value is 0 where
            the two sets of points agree.
        value: ``"dual"``, or ``"sharp"`` for ⟨P, C⟩ (gradients by implicit differentiation).
        max_iterations: limit of the solver.
        tolerance: L1 marginal error at which the batch is solved.
        **common: see :class:`~otkd.losses.base.DistillationLoss`.

    Raises:
        ValueError: for settings out of range.

    Source: Cui et al. (2024), "SinKD: Sinkhorn Distance Minimization for Knowledge Distillation".
    """

    def __init__(
        self,
        cost: str = "l1",
        temperature: float = 2.0,
        epsilon: float = 0.1,
        debias: bool = False,
        value: str = "dual",
        max_iterations: int = 200,
        tolerance: float = 1e-4,
        **common,
    ):
        super().__init__(temperature=temperature, **common)
        check_choice("cost", cost, BATCH_COSTS)
        self.cost = cost
        self.solver_options = Options(epsilon, tolerance, max_iterations, value, debias)

    def shares(self, q: Tensor, p: Tensor) -> Tensor:
        """See :class:`BatchLoss`."""
        solution = transport_between_samples(q, p, self.cost, self.solver_options)
        self.last_report = solution.report
        source, target = solution.shares()
        shares = source + target
        # Exactly the value on average, whatever the marginal error left; and with its gradient.
        return shares - shares.mean() + solution.value

    def extra_repr(self) -> str:
        """The settings of the transport and the common ones."""
        options = self.solver_options
        return f"cost={self.cost!r}, epsilon={options.epsilon}, " + super().extra_repr()


class UnrolledBatchSinkhornLoss(BatchLoss):
    """The batch transport of SinKD's public code, number for number.

    K = exp(−W/ε) with W the L1 distances; ``iterations`` times the rows of P, then its columns,
    are made to sum to 1 (mass b, not 1); the value is ``factor``·⟨P, W⟩, differentiated through
    every iteration. For reproducing results; :class:`BatchSinkhornLoss` is the sound form.

    Args:
        temperature: divides the logits of both.
        epsilon: entropic strength.
        iterations: number of iterations, all of them made.
        factor: multiplies the value.
        **common: see :class:`~otkd.losses.base.DistillationLoss`.
    """

    def __init__(
        self,
        temperature: float = 2.0,
        epsilon: float = 0.1,
        iterations: int = 20,
        factor: float = 0.001,
        **common,
    ):
        super().__init__(temperature=temperature, **common)
        check_positive(epsilon=epsilon, iterations=iterations, factor=factor)
        self.epsilon, self.iterations, self.factor = epsilon, iterations, factor

    def shares(self, q: Tensor, p: Tensor) -> Tensor:
        """See :class:`BatchLoss`."""
        with torch.autocast(q.device.type, enabled=False):
            distances = point_distances(q, p, "l1")
            plan = (distances / -self.epsilon).exp()
            for _ in range(self.iterations):
                plan = plan / plan.sum(-1, keepdim=True)
                plan = plan / plan.sum(-2, keepdim=True)
            return len(q) * self.factor * (plan * distances).sum(-1)
