"""The result files of the GLUE protocols, and the statistics of their scores."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from otkd.study.messages import StudyError
from otkd.study.protocols import Protocol, load_protocol
from otkd.study.results import CorruptResultError, Result, read_result
from otkd.study.summary import estimate
from otkd.tasks import Task, get_task, task_names

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PUBLISHED = Path(__file__).with_name("published.toml")
# The loss that others are compared with, training without a teacher, and the published loss.
BASELINE, LABELS, SUBJECT = "kl", "ce", "sinkd"
PROTOCOLS = ("author", "fair", "sensitivity")
# Above this number of seeds, sign changes are drawn at random instead of enumerated.
_SIGN_CHANGES = 2**12


@dataclass(frozen=True)
class Study:
    """A protocol and its results.

    Attributes:
        protocol: which losses, tasks and seeds it asks for.
        runs: one row per result file, with the columns role (teacher, student or candidate), task,
            loss, number (the seed, or the candidate's place in the protocol) and result.
    """

    protocol: Protocol
    runs: pd.DataFrame

    @property
    def tasks(self) -> list[Task]:
        """The tasks that have a student, in the order of the command's catalogue."""
        names = set(self.runs.task[self.runs.role == "student"])
        return [get_task(name) for name in task_names() if name in names]

    def title(self, loss: str) -> str:
        """The name of a loss in tables."""
        return self.protocol.losses[loss].get("title", loss)

    def select(self, role: str, task: Task) -> pd.DataFrame:
        """The runs of one role on one task."""
        return self.runs[(self.runs.role == role) & (self.runs.task == task.name)]

    def teacher(self, task: Task) -> Result:
        """The teacher of a task."""
        return self.select("teacher", task).result.item()

    def scores(self, task: Task, metric: str = "", role: str = "student") -> pd.DataFrame:
        """Scores × 100, a row per seed (or candidate) and a column per loss, NaN where missing."""
        rows = self.select(role, task)
        values = [100 * run.metrics[metric or task.headline] for run in rows.result]
        table = rows.assign(score=values).pivot(index="number", columns="loss", values="score")
        return table.reindex(columns=list(self.protocol.losses))


def read_studies(root: Path, protocols: Path | None = None) -> dict[str, Study]:
    """Read ``root/PROTOCOL/TASK/LOSS/SEED.json`` and the teachers and candidates beside them.

    Args:
        root: of the results.
        protocols: a folder with files ``PROTOCOL.toml``, in place of those that otkd includes.

    Raises:
        StudyError: if there are no results, or one is damaged, misplaced or of another teacher.
    """
    patterns = ("*/*/teacher/result.json", "*/*/*/[0-9]*.json", "*/*/*/tuning/[0-9]*.json")
    paths = [path for pattern in patterns for path in sorted(root.glob(pattern))]
    if not paths:
        raise StudyError(
            f"{root} has no results at PROTOCOL/TASK/LOSS/SEED.json. `otkd compare TASK --protocol "
            f"fair --output-dir {root}` makes them."
        )
    runs = pd.DataFrame([_row(root, path) for path in paths])
    found = {}
    for name in dict.fromkeys((*PROTOCOLS, *runs.protocol)):
        own = protocols / f"{name}.toml" if protocols else None
        protocol = load_protocol(str(own) if own and own.is_file() else name)
        found[name] = Study(protocol, runs[runs.protocol == name])
        _check(root / name, found[name])
    return found


def _row(root: Path, path: Path) -> dict:
    protocol, task, loss, *rest = path.relative_to(root).parts
    role = "teacher" if loss == "teacher" else "candidate" if len(rest) > 1 else "student"
    try:
        result = read_result(path)
    except (CorruptResultError, OSError) as error:
        raise StudyError(f"A result cannot be read: {error}.") from error
    if (result.task, result.loss) != (get_task(task).name, loss):
        raise StudyError(f"{path} is a result of {result.task} and {result.loss}.")
    if role == "student" and path.stem != str(result.seed):
        raise StudyError(f"{path} is a result of seed {result.seed}.")
    if result.diverged:
        raise StudyError(f"{path} is a run that diverged, which has no score to compare.")
    number = 0 if role == "teacher" else int(path.stem)
    row = {"protocol": protocol, "role": role, "task": result.task, "loss": loss}
    return {**row, "number": number, "result": result}


def _check(folder: Path, study: Study) -> None:
    unknown = set(study.runs.loss) - {*study.protocol.losses, "teacher"}
    if unknown:
        raise StudyError(f"{folder} has results of {min(unknown)}, which is not in the protocol.")
    for run in study.runs[study.runs.role == "candidate"].itertuples():
        if run.number >= len(study.protocol.losses[run.loss]["candidates"]):
            raise StudyError(f"{folder} has a candidate {run.number} that is not in the protocol.")
    for name, runs in study.runs.groupby("task"):
        if "teacher" not in set(runs.role):
            raise StudyError(f"{folder / str(name)} has no teacher/result.json.")
        if len({run.teacher_logits for run in runs.result}) > 1:
            raise StudyError(f"{folder / str(name)} has results of different teachers.")


class Interval(NamedTuple):
    """A mean over seeds with half the width of its 95 % t-interval, NaN for a single seed."""

    mean: float
    half: float
    seeds: int

    @property
    def significant(self) -> bool:
        """Whether the interval excludes 0."""
        return abs(self.mean) > self.half


def interval(values: pd.Series) -> Interval | None:
    """The mean of the values that are not NaN; None if all are."""
    values = values.dropna()
    if values.empty:
        return None
    found = estimate(list(values))
    half = np.nan if found.interval is None else found.interval
    return Interval(found.mean, half, len(values))


def difference(scores: pd.DataFrame, loss: str, baseline: str) -> Interval | None:
    """``loss`` − ``baseline``, paired over the seeds that both have."""
    return interval(scores[loss] - scores[baseline])


def gaps_to_baseline(scores: pd.DataFrame) -> pd.DataFrame:
    """The differences of every distillation loss to KL by seed."""
    others = [
        name for name in scores if name not in (BASELINE, LABELS) and any(scores[name].notna())
    ]
    return scores[others].sub(scores[BASELINE], axis=0).dropna(how="all")


def wins_by_chance(tasks: Sequence[pd.DataFrame], wins: int) -> tuple[float, float]:
    """How many losses are significantly above the baseline if none differs from it.

    The losses of a task share their seeds and the baseline, so their differences are dependent. If
    no loss differs, all differences of a seed may as well have the opposite sign, together; the
    number of wins over all such changes has the distribution that chance gives it (Good, 2005,
    "Permutation, Parametric and Bootstrap Tests of Hypotheses", chapter 3). Tasks are independent.

    Args:
        tasks: the differences to the baseline of each task, a row per seed and a column per loss.
        wins: the number found.

    Returns:
        The expected number, and the probability of ``wins`` or more.
    """
    distribution = np.ones(1)
    for gaps in tasks:
        null = stats.permutation_test(
            (gaps.to_numpy().T,),
            _significantly_above,
            permutation_type="samples",
            n_resamples=_SIGN_CHANGES,
            axis=-1,
            vectorized=True,
        ).null_distribution
        counts = np.bincount(null.sum(axis=1).astype(int), minlength=gaps.shape[1] + 1)
        distribution = np.convolve(distribution, counts / len(null))
    expected = float(distribution @ np.arange(len(distribution)))
    return expected, float(distribution[wins:].sum())


def _significantly_above(gaps: np.ndarray, axis: int) -> np.ndarray:
    seeds = np.isfinite(gaps).sum(axis)
    half = stats.t.ppf(0.975, seeds - 1) * stats.sem(gaps, axis, nan_policy="omit")
    return np.nanmean(gaps, axis) > half


def holm(pvalues: Sequence[float]) -> np.ndarray:
    """P-values adjusted for their number, valid however they depend on each other (Holm, 1979)."""
    order = np.argsort(pvalues)
    scaled = np.asarray(pvalues)[order] * np.arange(len(pvalues), 0, -1)
    adjusted = np.empty(len(pvalues))
    adjusted[order] = np.maximum.accumulate(scaled).clip(max=1)
    return adjusted


def adjusted_pvalues(tasks: Mapping[str, pd.DataFrame]) -> dict[tuple[str, str], float]:
    """Holm's p-values of all differences to the baseline, by task and loss."""
    pvalues = {
        (task, loss): stats.ttest_1samp(values.dropna(), 0).pvalue
        for task, gaps in tasks.items()
        for loss, values in gaps.items()
    }
    return dict(zip(pvalues, holm([*pvalues.values()]), strict=True))


def chance_of_teacher(task: Task, teacher: Result) -> float:
    """The probability that an answer without a model scores as well as the teacher.

    From the rows that the teacher has right, if each were right with the accuracy of the majority
    class. For a Matthews correlation φ over n rows, n·φ² has a χ² distribution of one degree.
    """
    rows = teacher.rows["dev"]
    if len(task.dev_splits) > 1:  # only the sum of their rows is known
        return np.nan
    if task.headline == "mcc":
        return float(stats.chi2.sf(rows * teacher.score**2, 1))
    right = round(teacher.metrics["accuracy"] * rows)
    guess = teacher.majority_metrics["accuracy"]
    return float(stats.binomtest(right, rows, guess, alternative="greater").pvalue)


def gain_of_best(run: Result) -> float:
    """Best − last evaluation of a training × 100; NaN if there was only one."""
    scores = [entry[run.headline] for entry in run.evaluations if run.headline in entry]
    return 100 * (max(scores) - scores[-1]) if len(scores) > 1 else np.nan


def read_toml(path: Path) -> dict:
    """The content of a TOML file; empty if there is none."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise StudyError(f"{path} cannot be read: {error}.") from error


def read_published() -> tuple[pd.DataFrame, set[str]]:
    """The headline scores of ``published.toml`` × 100, and the losses that are quoted by others."""
    content = read_toml(PUBLISHED)
    # MNLI has a pair, of which the first is the headline.
    scores = {
        loss: [np.atleast_1d(value)[0] for value in row]
        for loss, row in {**content["scores"], **content["unconfirmed"]}.items()
    }
    tasks = [get_task(name).name for name in content["tasks"]]
    return pd.DataFrame(scores, index=tasks), set(content["unconfirmed"])
