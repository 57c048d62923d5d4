"""otkd: optimal-transport distillation for PyTorch.

A loss between a teacher and a student is a module that is called as
``loss(student_logits, teacher_logits, *, labels=None, mask=None, num_items_in_batch=None)``:

    loss = otkd.KLLoss(temperature=2)
    loss = otkd.SinkhornLoss(embedding=teacher.get_input_embeddings().weight)

The same mathematics is in :mod:`otkd.functional` as functions of logits, and in :mod:`otkd.ot` as
transport between probability vectors.
"""

from otkd import alignment, costs, functional, losses, ot, supports, teachers
from otkd.losses import *  # noqa: F403
from otkd.losses import __all__ as _loss_names
from otkd.ot import ConvergenceWarning
from otkd.teachers import DenseTeacher, HiddenStateTeacher, StoredTeacher, TopKTeacher
from otkd.version import __version__
from otkd.warn import deprecated_names as _deprecated_names

__all__ = [
    "ConvergenceWarning",
    "DenseTeacher",
    "HiddenStateTeacher",
    "StoredTeacher",
    "TopKTeacher",
    "__version__",
    "alignment",
    "costs",
    "functional",
    "losses",
    "ot",
    "supports",
    "teachers",
    *_loss_names,
]

__getattr__ = _deprecated_names(
    "otkd",
    {
        "DenseSignal": ("otkd.DenseTeacher", DenseTeacher),
        "TeacherSignal": ("otkd.StoredTeacher", StoredTeacher),
        "TopKSignal": ("otkd.TopKTeacher", TopKTeacher),
    },
)
