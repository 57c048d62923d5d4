"""Ground costs: the cost of moving mass from one token to another.

A cost provides its matrix between source and target (the student's and the teacher's tokens) and,
for debiasing, within each side. Every cost is an ``nn.Module``, so that it moves to a device with
its loss. Constant costs are not saved with a model.
"""

from otkd.costs.base import Cost, CostMatrices, PowerCost
from otkd.costs.embedding import EmbeddingCost
from otkd.costs.forms import as_cost_matrices
from otkd.costs.prefix import PrefixCost
from otkd.costs.simple import DiscreteCost, MatrixCost, OrdinalCost
from otkd.costs.sums import SumCost

__all__ = [
    "Cost",
    "CostMatrices",
    "DiscreteCost",
    "EmbeddingCost",
    "MatrixCost",
    "OrdinalCost",
    "PowerCost",
    "PrefixCost",
    "SumCost",
    "as_cost_matrices",
]
