"""Stored teacher outputs: what a loss accepts in the place of teacher logits."""

from otkd.signals.dense import DenseSignal
from otkd.signals.protocol import TeacherSignal, teacher_logits_of
from otkd.signals.topk import TopKSignal

__all__ = ["DenseSignal", "TeacherSignal", "TopKSignal", "teacher_logits_of"]
