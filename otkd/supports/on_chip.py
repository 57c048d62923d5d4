"""TopK problems of all positions, solved by the Triton kernel if it supports them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from otkd.costs import Cost, CostMatrices, EmbeddingCost
from otkd.costs.base import Side
from otkd.costs.tails import mean_cost_to_all, soft_mean_cost
from otkd.fused.topk_sinkhorn import TopKSinkhorn
from otkd.ot.divergence import SolverReport
from otkd.ot.options import Objective, SolverSettings
from otkd.ot.solution import warn_not_converged
from otkd.supports.base import Block
from otkd.supports.heads import Atoms, Heads


def check_on_chip(cost: Cost, objective: Objective) -> None:
    """Raise ``ValueError`` unless the kernel supports this cost and these settings."""
    if not isinstance(cost, EmbeddingCost) or cost.learns or not cost.one_vocabulary:
        raise ValueError(
            f"backend='triton' requires a constant EmbeddingCost of one vocabulary, got {cost!r}: "
            "use backend='torch'"
        )
    if objective.value != "dual" or not objective.balanced or objective.debias == "teacher":
        raise ValueError(
            "backend='triton' computes value='dual' of balanced transport, with debias='sinkhorn' "
            "or None: use backend='torch'"
        )


@dataclass(frozen=True, kw_only=True)
class OnChipBlock(Block):
    """All positions as one block, solved by the kernel.

    Attributes:
        heads: the tokens of all positions.
        cost: between all tokens; ``costs`` is empty.
        vocab: number of tokens.
    """

    heads: Heads
    cost: EmbeddingCost
    vocab: int

    def solve(self, objective: Objective, solver: SolverSettings) -> tuple[Tensor, SolverReport]:
        """See :class:`~otkd.supports.base.Block`.

        Raises:
            ImportError, ValueError: see :func:`otkd.fused.topk_sinkhorn.topk_sinkhorn`.
        """
        a, b, cost = self.log_source.exp(), self.log_target.exp(), self.cost
        sides: tuple[Side, Side] = ("source", "target")
        sizes = (self.vocab, self.vocab)
        every = torch.arange(self.vocab, device=a.device).unsqueeze(0)
        to_tail = mean_cost_to_all(cost, every, sides, sizes, a.dtype).squeeze(0)
        corner = soft_mean_cost(cost, sides, sizes, objective.epsilon, a.dtype, a.device)
        settings = {
            "metric": cost.metric,
            "scale": cost.scale,
            "centre": None if cost.centre is None else cost.centre.to(a.device),
            "epsilon": objective.epsilon,
            "tolerance": solver.tolerance,
            "max_iterations": solver.max_iterations,
            "debias": objective.debias is not None,
        }
        embedding = cost.source.to(a.device)
        value, error, iterations = TopKSinkhorn.apply(
            a, b, self.heads.tokens, embedding, to_tail, corner, settings
        )
        report = SolverReport(
            iterations=int(iterations.max()),
            marginal_error=error.max(),
            converged=bool((error <= solver.tolerance).all()),
        )
        if not report.converged:
            warn_not_converged(a, b, objective.epsilon, solver)
        return value, report


def on_chip_block(student: Atoms, teacher: Atoms, cost: EmbeddingCost, vocab: int) -> OnChipBlock:
    """The block of all positions; both sides have the same tokens."""
    none = student.log_masses.new_empty(0, 0)
    return OnChipBlock(
        log_source=student.log_masses,
        log_target=teacher.log_masses,
        costs=CostMatrices(none),
        heads=student.heads,
        cost=cost,
        vocab=vocab,
    )
