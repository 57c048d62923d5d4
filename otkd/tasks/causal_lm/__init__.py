"""What a study of causal language models needs: a teacher, shorter students, and blocks of text."""

from otkd.tasks.causal_lm.layers import evenly_spaced, student_of
from otkd.tasks.causal_lm.packaged import packaged_teacher
from otkd.tasks.causal_lm.text import review_blocks

__all__ = ["evenly_spaced", "packaged_teacher", "review_blocks", "student_of"]
