"""KL that forgives near tokens, at a price."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from otkd.costs import Cost
from otkd.functional.transport_kl import Price, debiasing_for, transport_kl_of
from otkd.losses.base import Batch
from otkd.losses.ground_cost import make_cost
from otkd.losses.registry import register_loss
from otkd.losses.settings import CommonSettings
from otkd.losses.token_transport import TokenTransportLoss
from otkd.ot.options import SolverSettings
from otkd.supports import Support


@register_loss("transport_kl")
class TransportKLLoss(TokenTransportLoss):
    """KL between p and q over the tokens of each position that forgives near tokens, at a price.

    Where q has too little mass for a token of p, KL insists on that token. This loss may instead
    use mass of q on tokens at a small cost from it, and pays κ nats for each unit of cost. As
    κ → ∞ it tends to KL; as κ → 0 every token counts as near, and it tends to 0. Its gradient in
    the logits is q − r, where r is the teacher's distribution after the mass has moved (KL has
    q − p), plus that of the debiasing term.

    The price decides what a student can learn:

    - A token of p that costs C from the student's mass is insisted on while log(1/q) is below κ·C
      nats. Beyond, its mass moves: the loss stays at about κ·C (less up to 1 nat, which debiasing
      removes), and its gradient there vanishes, as that of transport does.
    - With debiasing, mass m of the student on tokens with p below about exp(−κ·C) costs about m²
      and not m, because the tangent at p already contains its first order. With ``debias=None`` its
      whole gradient remains, but the loss is then not smallest at q = p.

    So a student far from its teacher needs a high price.

    With ε = η/κ and ρ = (1 − η)/κ, let

        U(q, p) = min_P ⟨P, C⟩ + ε·KL(P‖q⊗p) + ρ·KL(P1‖q)    such that Pᵀ1 = p.

    The loss is κ·D(q, p), with D the distance of U(·, p) from its tangent at p:

        D(q, p) = U(q, p) − U(p, p) − ⟨∂U(p, p)/∂q, q − p⟩.

    U is convex in q, so D is at least 0, and 0 with gradient 0 at q = p. As κ → ∞, κ·D tends to
    KL(p‖q) exactly, for every η, if no two tokens coincide and p > 0 wherever q > 0. With
    ``direction="reverse"`` the penalty is on the other side, ρ·KL(Pᵀ1‖p) such that P1 = q; the loss
    is D/ρ and tends to KL(q‖p). A student with all of its mass on a wrong token at cost C then has
    a loss of about (κ·C − η·log(1/p))/(1 − η), or 0 if that is negative, as p at that token tends
    to 0: use a small η and a high price.

    For η = 1 (forward only) no iterations are needed, since U/ε = −Σ_j p_j·log(Kᵀq)_j with
    K = exp(−κ·C): the cross-entropy of p against q smoothed over near tokens. If the teacher's
    logits are given, a ``TopK`` support then has no tail: every token is an atom of its own. K is
    exact among the k most probable tokens of both sides, and has low rank between other tokens,
    with at least 16 clusters of an embedding, and one for other costs. (With ``debias=None`` this
    holds for constant embeddings and the 0/1 cost.) In all other cases the tail is one atom, or as
    many as the support has clusters.

    U(p, p) and its gradient depend on the teacher alone. With a stored top-k teacher,
    ``teacher = loss.with_self_term(teacher)`` solves them once and not in every step.

    Between two vocabularies U(p, p) does not exist. The loss is then U/(ε + ρ) (forward) or U/ρ
    (reverse), which has the same meaning but is not 0 at its minimum.

    Args:
        cost: ``"embedding"``, ``"discrete"`` (0/1), ``"ordinal"`` (|i − j|), a ``(vocab, vocab)``
            tensor, or an object of :mod:`otkd.costs` that is not learnable.
        embedding: ``(vocab, width)``, for ``cost="embedding"``: the cost is the squared distance of
            two rows, divided by its mean.
        price: κ, in nats per unit of the cost, above 0 and at most 1e9.
        smoothing: η, above 0 and at most 1 (below 1 for ``"reverse"``). A smaller one gives a
            sharper plan, and takes more iterations.
        direction: ``"forward"`` (mean-seeking, like KL) or ``"reverse"`` (mode-seeking).
        debias: ``"auto"`` and ``"teacher"`` give κ·D; ``"auto"`` leaves debiasing out between two
            vocabularies. None leaves it out always.
        support: which tokens take part: an object of :mod:`otkd.supports`, or ``"auto"``, which is
            ``Dense()`` up to 2048 tokens. Above, it is ``TopK(32)`` where there is no tail, and
            otherwise ``TopK(64)``, with ``clusters=32`` for an embedding and a teacher that is not
            stored.
        max_iterations: limit of the solver. If it is reached, a warning is issued and
            ``last_report.converged`` is False.
        tolerance: L1 marginal error at which a position counts as solved.
        backend: what computes the transport: ``"auto"``, ``"torch"``, or another backend of the
            support.
        **common: see :class:`~otkd.losses.base.DistillationLoss`.

    Raises:
        TypeError, ValueError: for settings that are out of range or contradict each other.

    Source: the infimal convolution of KL with transport, as in Birrell et al. (2022), "(f,
    Γ)-Divergences: Interpolating between f-Divergences and Integral Probability Metrics", with
    entropic transport (Chizat et al., 2018).

    Example:
        >>> embedding = torch.tensor([[0.0, 0.0], [0.0, 0.1], [3.0, 0.0]])
        >>> loss = otkd.TransportKLLoss(embedding=embedding, price=10.0)
        >>> teacher = torch.tensor([[6.0, 0.0, 0.0]])
        >>> near, far = torch.tensor([[0.0, 6.0, 0.0]]), torch.tensor([[0.0, 0.0, 6.0]])
        >>> loss(near, teacher), loss(far, teacher)
        (tensor(0.0003), tensor(5.2936))
        >>> otkd.KLLoss()(near, teacher), otkd.KLLoss()(far, teacher)
        (tensor(5.9556), tensor(5.9556))
    """

    rescales_by_default = True

    def __init__(
        self,
        cost: str | Tensor | Cost = "embedding",
        embedding: Tensor | None = None,
        *,
        price: float = 30.0,
        smoothing: float = 1.0,
        direction: str = "forward",
        debias: str | None = "auto",
        support: str | Support = "auto",
        max_iterations: int = 200,
        tolerance: float = 1e-4,
        backend: str = "auto",
        **common: Unpack[CommonSettings],
    ) -> None:
        super().__init__(**common)
        self.settings = Price(price=price, smoothing=smoothing, direction=direction)
        ground = make_cost(cost, embedding, loss="TransportKLLoss")
        self._set_up(
            cost=ground,
            support=support,
            objective=self.settings.objective(debiasing_for(ground, debias)),
            solver=SolverSettings(tolerance=tolerance, max_iterations=max_iterations),
            backend=backend,
        )

    def per_position(self, batch: Batch) -> Tensor:
        """See :class:`~otkd.losses.base.DistillationLoss`."""
        values, self.last_report = transport_kl_of(
            self._transport(batch),
            batch.student_logits,
            batch.teacher_logits,
            self.settings,
            self.objective,
        )
        return values

    @property
    def _value_unit(self) -> float:
        """See :class:`~otkd.losses.token_transport.TokenTransportLoss`."""
        return self.settings.unit

    def extra_repr(self) -> str:
        """The settings of the transport and the common ones."""
        settings = self.settings
        return (
            f"price={settings.price}, smoothing={settings.smoothing}, "
            f"direction={settings.direction!r}, "
            + ("debias=None, " if self.objective.debias is None else "")
            + super().extra_repr()
        )
