"""Optimal transport between probability vectors, independent of logits.

The steps are: :mod:`~otkd.ot.problem` (checks and flattens a problem) →
:mod:`~otkd.ot.normal_form` (removes constants and units of the cost) → :mod:`~otkd.ot.kernels`
(products with exp(−C/ε)) → :mod:`~otkd.ot.solver` (iterations, without autograd) →
:mod:`~otkd.ot.gradients` (the only module with autograd functions of entropic transport) →
:class:`~otkd.ot.solution.Solution`.
"""

from otkd.ot.divergence import DivergenceSolution
from otkd.ot.entropic import sinkhorn, sinkhorn_divergence
from otkd.ot.exact import wasserstein
from otkd.ot.solution import ConvergenceWarning, Solution

__all__ = [
    "ConvergenceWarning",
    "DivergenceSolution",
    "Solution",
    "sinkhorn",
    "sinkhorn_divergence",
    "wasserstein",
]
