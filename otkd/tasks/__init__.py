"""Classification tasks: the catalogue, their data, and their metrics."""

from otkd.tasks.encoding import encode
from otkd.tasks.loading import SAMPLE_SEED, TaskData, load_task
from otkd.tasks.metrics import agreement, majority_score, score
from otkd.tasks.tasks import DataError, Task, get_task, task_names

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
