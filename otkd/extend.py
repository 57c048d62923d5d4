"""What a divergence, a ground cost or a support of your own needs, from outside the package.

- A divergence: subclass :class:`Formula`, pass it to a :class:`DivergenceLoss`, and give that loss
  a name with :func:`register_loss`.
- A ground cost: subclass :class:`Cost`. Its ``matrices`` return :class:`CostMatrices`.
- A support: subclass :class:`Support`. Its ``select`` takes :class:`Positions` and returns a
  :class:`Selection` of :class:`Block`.

``CONTRIBUTING.md`` shows each of them.

Example:
    >>> import torch
    >>> from otkd.extend import DivergenceLoss, Formula
    >>> class SquaredError(Formula):
    ...     def __call__(self, pair):
    ...         value = pair.difference.square().sum(-1)
    ...         return value, 2 * pair.q * pair.difference  # D and q·∂D/∂q
    >>> loss = DivergenceLoss(SquaredError())
    >>> logits = torch.tensor([[0.0, 0.0]], requires_grad=True)
    >>> print(f"{loss(logits, torch.tensor([[0.0, 1.0]])).item():.4f}")
    0.1068
"""

from otkd.costs.base import Cost, CostMatrices
from otkd.functional.rowwise import Formula, Pair
from otkd.losses.divergences import DivergenceLoss
from otkd.losses.registry import register_loss
from otkd.supports.base import Block, Positions, Selection, Support

__all__ = [
    "Block",
    "Cost",
    "CostMatrices",
    "DivergenceLoss",
    "Formula",
    "Pair",
    "Positions",
    "Selection",
    "Support",
    "register_loss",
]
