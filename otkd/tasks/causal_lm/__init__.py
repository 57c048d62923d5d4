"""What a study of causal language models needs: a teacher, shorter students, text and metrics."""

from otkd.tasks.causal_lm.answers import rouge_l, sampled_answers
from otkd.tasks.causal_lm.byte_metrics import ByteMetrics, byte_metrics
from otkd.tasks.causal_lm.instructions import (
    Instruction,
    encode_instructions,
    fitting_prompts,
    read_instructions,
)
from otkd.tasks.causal_lm.layers import evenly_spaced, student_of
from otkd.tasks.causal_lm.metrics import next_token_metrics
from otkd.tasks.causal_lm.packaged import packaged_teacher
from otkd.tasks.causal_lm.padding import padding_collator
from otkd.tasks.causal_lm.text import review_blocks
from otkd.tasks.causal_lm.vocabulary import rows_of_student, with_vocabulary

__all__ = [
    "ByteMetrics",
    "Instruction",
    "byte_metrics",
    "encode_instructions",
    "evenly_spaced",
    "fitting_prompts",
    "next_token_metrics",
    "packaged_teacher",
    "padding_collator",
    "read_instructions",
    "review_blocks",
    "rouge_l",
    "rows_of_student",
    "sampled_answers",
    "student_of",
    "with_vocabulary",
]
