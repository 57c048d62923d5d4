"""Classification tasks: what they are, where their rows come from, how they are scored."""

from otkd.data.encoding import encode
from otkd.data.loading import SAMPLE_SEED, TaskData, load_task
from otkd.data.metrics import agreement, majority_score, score
from otkd.data.tasks import DataError, Task, get_task, task_names

__all__ = [
    "SAMPLE_SEED",
    "DataError",
    "Task",
    "TaskData",
    "agreement",
    "encode",
    "get_task",
    "load_task",
    "majority_score",
    "score",
    "task_names",
]
