"""The ground cost of a transport loss, from any form in which it can be given."""

from __future__ import annotations

from torch import Tensor

from otkd.checks import check_choice
from otkd.costs import Cost, DiscreteCost, EmbeddingCost, MatrixCost, OrdinalCost

COSTS = ("embedding", "discrete", "ordinal")


class MissingCost(ValueError):
    """A transport loss was created without the cost between its tokens.

    Attributes:
        advice: a sentence that says what to pass.
    """

    def __init__(self, call: str) -> None:
        super().__init__(call)
        self.advice = (
            f"Write {call}embedding=teacher.get_input_embeddings().weight), or {call}cost=...) "
            "with 'discrete', 'ordinal', a (vocab, vocab) tensor or an object of otkd.costs"
        )

    def __str__(self) -> str:
        return (
            'cost="embedding", the default, needs embedding=, the vectors of the tokens '
            f"(vocab, width). {self.advice}"
        )


def make_cost(
    cost: str | Tensor | Cost, embedding: Tensor | None = None, *, loss: str = "SinkhornLoss"
) -> Cost:
    """A cost object from any form in which the class ``loss`` accepts its cost.

    Raises:
        TypeError: if ``cost`` is not a string, a tensor or a cost object.
        ValueError: for an unknown name, or an embedding that is missing or has no effect.
    """
    if isinstance(cost, str):
        check_choice("cost", cost, COSTS)
        if cost == "embedding":
            if embedding is None:
                raise MissingCost(f"{loss}(")
            return EmbeddingCost(embedding)
    if embedding is not None:
        raise ValueError('embedding= is used by cost="embedding" only')
    if isinstance(cost, str):
        return DiscreteCost() if cost == "discrete" else OrdinalCost()
    if isinstance(cost, Cost):
        return cost
    if isinstance(cost, Tensor):
        return MatrixCost(cost)
    raise TypeError(
        f"cost must be one of {', '.join(map(repr, COSTS))}, a (vocab, vocab) tensor or a cost "
        f"object of otkd.costs, got {type(cost).__name__}"
    )
