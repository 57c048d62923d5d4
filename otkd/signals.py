"""Deprecated names of :mod:`otkd.teachers`, kept for one release."""

from otkd import teachers
from otkd.warn import deprecated_names, warn_deprecated

warn_deprecated("otkd.signals", "otkd.teachers")
__getattr__ = deprecated_names(
    __name__,
    {
        "DenseSignal": ("otkd.teachers.DenseTeacher", teachers.DenseTeacher),
        "TeacherSignal": ("otkd.teachers.StoredTeacher", teachers.StoredTeacher),
        "TopKSignal": ("otkd.teachers.TopKTeacher", teachers.TopKTeacher),
        "teacher_logits_of": ("otkd.teachers.teacher_logits_of", teachers.teacher_logits_of),
    },
)
