"""Tasks: the catalogue, data and metrics of classification, and ``causal_lm`` for language."""

from otkd.tasks.encoding import encode
from otkd.tasks.loading import SAMPLE_SEED, TaskData, load_task
from otkd.tasks.metrics import Metric, agreement, get_metric, majority_score, score
from otkd.tasks.tasks import DataError, LanguageTask, Task, get_task, task_names

__all__ = [
    "SAMPLE_SEED",
    "DataError",
    "LanguageTask",
    "Metric",
    "Task",
    "TaskData",
    "agreement",
    "encode",
    "get_metric",
    "get_task",
    "load_task",
    "majority_score",
    "score",
    "task_names",
]
