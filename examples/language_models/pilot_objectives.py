"""The objectives of the pilot study, by name.

All compare the distributions of student and teacher at temperature 1; only ``ce`` reads the
reviews' own tokens. Costs are between the teacher's input embeddings.

``transport_kl-DIRECTION-PRICE-SMOOTHING-COST`` is ``otkd.TransportKLLoss``, with ``-undebiased`` at
the end for ``debias=None``. The cost ``permuted`` gives every token the embedding of another one,
which shows whether the geometry matters or only the presence of a cost; ``discrete`` has none. The
price ``falling`` starts at 100 and ends at 10.

``wasd`` has the arithmetic of WASD (Na et al. 2026), at temperature 1 like the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import otkd
from otkd.checks import did_you_mean
from otkd.study.messages import StudyError
from otkd.study.wasd import Wasd

PERMUTATION_SEED = 0
PRICES = ("1", "3", "10", "30", "100", "falling")
# The reverse direction has no member with smoothing 1.
SMOOTHINGS = {"forward": ("0.1", "1"), "reverse": ("0.1",)}
COSTS = ("embedding", "discrete", "permuted")
_FIRST_PRICE, _LAST_PRICE = 100.0, 10.0

# A loss for the given part of the training that is over, from 0 to 1.
Schedule = Callable[[float], nn.Module]


@dataclass(frozen=True)
class Objective:
    """An objective of the table.

    Attributes:
        build: a loss from the teacher's input embeddings, for every part of the training.
        requires: the loss of otkd that it needs.
    """

    build: Callable[[Tensor], Schedule]
    requires: str = ""

    @property
    def available(self) -> bool:
        """Whether this version of otkd has the loss."""
        return not self.requires or hasattr(otkd, self.requires)


def _constant(make: Callable[[Tensor], nn.Module]) -> Objective:
    def build(embedding: Tensor) -> Schedule:
        loss = make(embedding)
        return lambda done: loss

    return Objective(build)


def _kl_and_sinkhorn(embedding: Tensor) -> nn.Module:
    return otkd.WeightedLoss(
        {"kl": (1.0, otkd.KLLoss()), "sinkhorn": (1.0, otkd.SinkhornLoss(embedding=embedding))}
    )


def _cost(name: str, embedding: Tensor) -> otkd.costs.Cost:
    if name == "discrete":
        return otkd.costs.DiscreteCost()
    if name == "permuted":
        generator = torch.Generator().manual_seed(PERMUTATION_SEED)
        embedding = embedding[torch.randperm(len(embedding), generator=generator)]
    return otkd.costs.EmbeddingCost(embedding)


def _transport_kl(
    direction: str, price: str, smoothing: str, cost: str, debias: str | None = "auto"
) -> Objective:
    def build(embedding: Tensor) -> Schedule:
        between = _cost(cost, embedding)

        def at(price: float) -> nn.Module:
            return otkd.TransportKLLoss(
                between,
                price=price,
                smoothing=float(smoothing),
                direction=direction,
                debias=debias,
            )

        if price == "falling":
            # The cost is prepared once, so that a new loss for every step takes no time.
            return lambda done: at(_FIRST_PRICE * (_LAST_PRICE / _FIRST_PRICE) ** done)
        loss = at(float(price))
        return lambda done: loss

    return Objective(build, requires="TransportKLLoss")


OBJECTIVES = {
    "ce": _constant(lambda _: otkd.get_loss("ce")),
    "kl": _constant(lambda _: otkd.KLLoss()),
    "rkl": _constant(lambda _: otkd.ReverseKLLoss()),
    "jsd": _constant(lambda _: otkd.JSDLoss()),
    "skl": _constant(lambda _: otkd.SkewKLLoss()),
    "srkl": _constant(lambda _: otkd.SkewReverseKLLoss()),
    "akl": _constant(lambda _: otkd.AdaptiveKLLoss()),
    "tvd": _constant(lambda _: otkd.TVDLoss()),
    "sinkhorn": _constant(lambda embedding: otkd.SinkhornLoss(embedding=embedding)),
    "kl+sinkhorn": _constant(_kl_and_sinkhorn),
    "wasd": _constant(Wasd),
    **{
        f"transport_kl-{direction}-{price}-{smoothing}-{cost}": _transport_kl(
            direction, price, smoothing, cost
        )
        for direction, smoothings in SMOOTHINGS.items()
        for price in PRICES
        for smoothing in smoothings
        for cost in COSTS
    },
    **{
        f"transport_kl-forward-{price}-1-{cost}-undebiased": _transport_kl(
            "forward", price, "1", cost, None
        )
        for price in PRICES
        for cost in COSTS
    },
}


def get_objective(name: str) -> Objective:
    """The objective called ``name``.

    Raises:
        StudyError: if there is none.
    """
    if name not in OBJECTIVES:
        hint = did_you_mean(name, OBJECTIVES)
        raise StudyError(
            f"There is no objective '{name}'{hint} `pilot.py objectives` lists all of them."
        )
    return OBJECTIVES[name]
