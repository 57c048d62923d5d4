"""The runs of a study of one task, and the files that belong to them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from otkd.study.messages import notice
from otkd.study.ownership import Claim
from otkd.study.prediction import PRECISION_FILE
from otkd.study.results import Result
from otkd.study.runs import Run
from otkd.study.teachers import teacher_files, teacher_folders

if TYPE_CHECKING:
    from otkd.study.experiment import Experiment
    from otkd.study.protocols import Objective


def claim_of(experiment: Experiment, runs: Iterable[Run], *names: str) -> Claim:
    """Everything that a command writes in the folder of an experiment, and what it reads."""
    chosen, folder, runs = experiment.settings, experiment.folder, [*runs]
    models = {"--teacher": chosen.teacher, "--student": chosen.student}
    return Claim(
        folder,
        files=[
            *(folder / name for name in (PRECISION_FILE, *names)),
            *teacher_files(folder / "teacher", experiment),
            *(run.result for run in runs),
        ],
        folders=[
            *teacher_folders(folder / "teacher"),
            *(run.work for run in runs),
            *(run.model for run in runs if run.model is not None),
        ],
        models={name: Path(model) for name, model in models.items() if model is not None},
        data={} if chosen.data_dir is None else {"--data-dir": chosen.data_dir},
    )


def candidates(experiment: Experiment) -> list[Run]:
    """The runs that tuning compares."""
    return [
        _run(experiment.folder / objective.name / "tuning", candidate, 0, number)
        for objective in experiment.objectives
        if objective.candidates and experiment.tuning is not None
        for number, candidate in enumerate(objective.tried(**experiment.tuning.settings))
    ]


def runs_of(folder: Path, objectives: Sequence[Objective], seeds: int) -> list[Run]:
    """The students of all losses and seeds."""
    # Seed by seed: an interrupted comparison has all losses for its first seeds.
    return [
        _run(folder / objective.name, objective, seed)
        for seed in range(seeds)
        for objective in objectives
    ]


def _run(folder: Path, objective: Objective, seed: int, candidate: int | None = None) -> Run:
    name = seed if candidate is None else candidate
    result, work = folder / f"{name}.json", folder / f"{name}.partial"
    return Run(objective, seed, result, work, tuning=candidate is not None)


def best_candidate(objective: Objective, done: dict[Run, Result]) -> Objective:
    """The objective with the best of its candidates, the first of equals; diverged ones are last.

    Without candidates it is the objective itself.
    """
    if not objective.candidates:
        return objective
    tried = {
        int(run.result.stem): result
        for run, result in done.items()
        if run.tuning and run.objective.name == objective.name
    }
    best = max(
        sorted(tried), key=lambda n: -math.inf if tried[n].diverged else tried[n].improvement
    )
    if tried[best].diverged:
        notice(
            f"All {len(tried)} candidates of {objective.name} diverged; its students are trained "
            "with the first."
        )
    return objective.tried()[best]
