"""The kind of experiment that a task needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from otkd.study.classification import ClassificationExperiment
from otkd.study.experiment import Experiment
from otkd.study.language import LanguageExperiment
from otkd.study.messages import StudyError
from otkd.study.two_tokenizers import TwoTokenizerExperiment
from otkd.tasks import LanguageTask, get_task

if TYPE_CHECKING:
    from otkd.study.protocols import Objective, Tuning
    from otkd.study.settings import Settings


def make_experiment(
    settings: Settings,
    objectives: Sequence[Objective],
    folder: Path,
    tuning: Tuning | None = None,
) -> Experiment:
    """The experiment of ``settings.task``; for the arguments see :class:`Experiment`.

    Raises:
        StudyError: for settings, losses or models that cannot work together.
        DataError: for a task that does not exist, or rows that cannot be read.
    """
    own_tokenizer = settings.student_vocabulary is not None
    kind: type[Experiment] = ClassificationExperiment
    if isinstance(get_task(settings.task), LanguageTask):
        kind = TwoTokenizerExperiment if own_tokenizer else LanguageExperiment
    elif own_tokenizer:
        raise StudyError("--student-vocabulary is for language models: leave it out.")
    return kind(settings, objectives, folder, tuning)
