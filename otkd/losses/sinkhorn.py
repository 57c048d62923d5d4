"""The Sinkhorn divergence between the student's and the teacher's token distributions."""

from __future__ import annotations

import warnings

from torch import Tensor
from typing_extensions import Unpack

from otkd.costs import Cost
from otkd.losses.ground_cost import make_cost
from otkd.losses.registry import register_loss
from otkd.losses.settings import CommonSettings
from otkd.losses.token_transport import TokenTransportLoss
from otkd.ot.options import Objective, SolverSettings, as_penalties, relaxation_of
from otkd.supports import Support


@register_loss("sinkhorn")
class SinkhornLoss(TokenTransportLoss):
    """Debiased entropic optimal transport between q and p over the tokens of each position.

    S_ε(q, p) = OT_ε(q, p) − ½·OT_ε(q, q) − ½·OT_ε(p, p), with
    OT_ε(q, p) = min_P ⟨P, C⟩ + ε·KL(P‖q⊗p). Gradients follow from the envelope theorem, so memory
    does not grow with the number of iterations. The logit gradient falls about as T^−1.5, so the
    loss is not multiplied by T² by default.

    Args:
        cost: ``"embedding"``, ``"discrete"`` (0/1), ``"ordinal"`` (|i − j|), a ``(vocab, vocab)``
            tensor, or an object of :mod:`otkd.costs`.
        embedding: ``(vocab, width)``, for ``cost="embedding"``: the cost is the squared distance of
            two rows, divided by its mean. The embedding is constant; to train it, pass
            ``EmbeddingCost(..., learnable=True)`` as ``cost``.
        epsilon: strength of the entropic regularisation, in units of the cost. For a normalised
            cost, 0.05 to 0.1 is the useful range.
        debias: ``"sinkhorn"`` (or True) for S_ε. ``"teacher"`` for
            OT_ε(q, p) − OT_ε(p, p) − ⟨∂OT_ε(p, p)/∂q, q − p⟩: the distance to the tangent at p,
            which is non-negative, and 0 with gradient 0 at q = p, for every cost and relaxation,
            and needs no self-term of the student. None (or False) for OT_ε(q, p), which is not 0 at
            q = p.
        value: ``"dual"``, or ``"sharp"`` for ⟨P, C⟩ (gradients by implicit differentiation).
        support: which tokens take part: an object of :mod:`otkd.supports`, or ``"auto"``, which is
            ``Dense()`` up to 2048 tokens and ``TopK(64)`` above, with ``clusters=32`` for a
            constant embedding cost and a teacher that is not stored.
        max_iterations: limit of the solver. If it is reached, a warning is issued and
            ``last_report.converged`` is False.
        tolerance: L1 marginal error at which a position counts as solved.
        backend: what computes the transport: ``"auto"``, ``"torch"``, or another backend of the
            support.
        marginal_relaxation: ρ, in units of the cost. If given, the marginals of the plan may differ
            from q and p: ρ·KL(P1‖q) + ρ·KL(Pᵀ1‖p) is added to what OT_ε minimises. Use it for
            distributions that disagree on their support, and for ``TopK(k, tail=False)``, whose
            heads then keep their mass. A pair (ρ_student, ρ_teacher) relaxes each side by its own
            ρ; ``math.inf`` or None holds a side, as by default. Two different values require
            ``debias="teacher"`` or None. Requires ``value="dual"``.
        unbalanced: deprecated name of ``marginal_relaxation``.
        **common: see :class:`~otkd.losses.base.DistillationLoss`.

    Raises:
        TypeError, ValueError: for settings that are out of range or contradict each other.

    Warns:
        UserWarning: if ``debias`` is used with a cost for which the divergence is not known to be
            non-negative.

    Source: Feydy et al. (2019), "Interpolating between Optimal Transport and MMD using Sinkhorn
    Divergences".

    Example:
        >>> embedding = torch.tensor([[0.0, 0.0], [0.0, 0.1], [3.0, 0.0]])
        >>> loss = otkd.SinkhornLoss(embedding=embedding)
        >>> teacher = torch.tensor([[4.0, 0.0, 0.0]])
        >>> loss(torch.tensor([[0.0, 4.0, 0.0]]), teacher)  # a near token
        tensor(0.0023)
        >>> loss(torch.tensor([[0.0, 0.0, 4.0]]), teacher)  # a far token
        tensor(2.1164)
    """

    def __init__(
        self,
        cost: str | Tensor | Cost = "embedding",
        embedding: Tensor | None = None,
        *,
        epsilon: float = 0.1,
        debias: bool | str | None = "sinkhorn",
        value: str = "dual",
        support: str | Support = "auto",
        max_iterations: int = 200,
        tolerance: float = 1e-4,
        backend: str = "auto",
        marginal_relaxation: float | tuple[float | None, float | None] | None = None,
        unbalanced: float | tuple[float, float] | None = None,
        **common: Unpack[CommonSettings],
    ) -> None:
        super().__init__(**common)
        penalties = as_penalties(relaxation_of(marginal_relaxation, unbalanced))
        self._set_up(
            cost=make_cost(cost, embedding),
            support=support,
            objective=Objective(epsilon=epsilon, debias=debias, value=value, penalties=penalties),
            solver=SolverSettings(tolerance=tolerance, max_iterations=max_iterations),
            backend=backend,
        )
        positive = self.cost.keeps_divergence_positive(epsilon)
        if self.objective.debias == "sinkhorn" and not positive:
            warnings.warn(
                f"exp(−C/ε) of this {type(self.cost).__name__} is not known to be positive "
                f"definite at epsilon={epsilon}: the debiased divergence may be negative, and "
                "minimal at some p ≠ q. Use debias='teacher', or another cost",
                stacklevel=2,
            )

    def extra_repr(self) -> str:
        """The settings of the transport and the common ones."""
        objective = self.objective
        return (
            f"epsilon={objective.epsilon}, debias={objective.debias!r}, "
            f"value={objective.value!r}, " + super().extra_repr()
        )
