"""What a divergence or a ground cost of your own needs, from outside the package.

- A divergence: subclass :class:`Formula`, pass it to a :class:`DivergenceLoss`, and give that loss
  a name with :func:`register_loss`.
- A ground cost: subclass :class:`Cost`. Its ``matrices`` return :class:`CostMatrices`.

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

__all__ = ["Cost", "CostMatrices", "DivergenceLoss", "Formula", "Pair", "register_loss"]
