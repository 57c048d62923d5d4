"""Optimal transport between probability vectors; no logits here.

Data flows one way: :mod:`~otkd.ot.problem` (what is to be solved) →
:mod:`~otkd.ot.normal_form` (the same without constants and units) → :mod:`~otkd.ot.kernels` (how
exp(−C/ε) is applied) → :mod:`~otkd.ot.solver` (the iterations; knows nothing of autograd) →
:mod:`~otkd.ot.gradients` (the only file that does) → :class:`~otkd.ot.solution.Solution`.
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
