"""otkd: optimal-transport distillation for PyTorch.

A loss between a teacher and a student is a module with one call,
``loss(student_logits, teacher_logits, *, labels=None, mask=None, num_items_in_batch=None)``:

    loss = otkd.SinkhornLoss(cost="embedding", embedding=teacher.get_input_embeddings().weight)

The same mathematics is in :mod:`otkd.functional` as plain functions of logits and in
:mod:`otkd.ot` as transport between probability vectors.
"""

from otkd import alignment, costs, functional, losses, ot, signals, supports
from otkd.losses import *  # noqa: F403
from otkd.losses import __all__ as _loss_names
from otkd.ot import ConvergenceWarning
from otkd.signals import DenseSignal, TeacherSignal, TopKSignal
from otkd.version import __version__

__all__ = [
    "ConvergenceWarning",
    "DenseSignal",
    "TeacherSignal",
    "TopKSignal",
    "__version__",
    "alignment",
    "costs",
    "functional",
    "losses",
    "ot",
    "signals",
    "supports",
    *_loss_names,
]
