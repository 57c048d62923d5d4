"""Ground costs: what it costs to move mass from one token to another.

A cost knows its matrix between source and target (the student's and the teacher's tokens), and
within each side for debiasing. Every cost is an ``nn.Module``, so that it follows its loss to a
device; nothing of it is saved with a model.
"""

from otkd.costs.base import Cost, CostMatrices, PowerCost
from otkd.costs.embedding import EmbeddingCost
from otkd.costs.forms import as_cost_matrices
from otkd.costs.simple import DiscreteCost, MatrixCost, OrdinalCost

__all__ = [
    "Cost",
    "CostMatrices",
    "DiscreteCost",
    "EmbeddingCost",
    "MatrixCost",
    "OrdinalCost",
    "PowerCost",
    "as_cost_matrices",
]
