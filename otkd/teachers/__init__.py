"""Stored teachers: teacher outputs that a loss accepts in place of logits."""

from otkd.teachers.dense import DenseTeacher
from otkd.teachers.hidden import HiddenStateTeacher
from otkd.teachers.protocol import StoredTeacher, teacher_logits_of
from otkd.teachers.topk import TopKTeacher

__all__ = [
    "DenseTeacher",
    "HiddenStateTeacher",
    "StoredTeacher",
    "TopKTeacher",
    "teacher_logits_of",
]
