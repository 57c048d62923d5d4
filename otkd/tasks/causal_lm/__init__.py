"""What a study of causal language models needs: a teacher, shorter students, text and metrics."""

from otkd.tasks.causal_lm.layers import evenly_spaced, student_of
from otkd.tasks.causal_lm.metrics import next_token_metrics
from otkd.tasks.causal_lm.packaged import packaged_teacher
from otkd.tasks.causal_lm.text import review_blocks

__all__ = ["evenly_spaced", "next_token_metrics", "packaged_teacher", "review_blocks", "student_of"]
