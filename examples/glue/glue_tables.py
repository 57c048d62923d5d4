"""The tables of docs/glue.md in Markdown, each made from the studies alone."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from glue_results import (
    BASELINE,
    LABELS,
    SUBJECT,
    Interval,
    Study,
    adjusted_pvalues,
    chance_of_teacher,
    difference,
    gain_of_best,
    gaps_to_baseline,
    interval,
    read_published,
    wins_by_chance,
)

from otkd.losses.sinkd import UnrolledBatchSinkhornLoss
from otkd.study.report import metric_title
from otkd.study.results import Result
from otkd.tasks import Task, get_task

NONE = "–"
LEVEL = 0.05
Studies = Mapping[str, Study]


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], text: int = 1) -> str:
    """A table whose first ``text`` columns are words and the others numbers."""
    rule = ["---"] * text + ["---:"] * (len(header) - text)
    rows = [*rows] or [[NONE] * len(header)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def number(value: float, sign: str = "", digits: int = 1) -> str:
    """A number with a minus sign; a dash for NaN."""
    return NONE if np.isnan(value) else f"{value:{sign}.{digits}f}".replace("-", "−")


def mean(found: Interval | None, seeds: int, sign: str = "") -> str:
    """A mean ± half of its interval, and the number of seeds if it is not ``seeds``."""
    if found is None:
        return NONE
    text = f"{number(found.mean, sign)} ± {number(found.half)}"
    text = f"**{text}**" if sign and found.significant else text
    return text if found.seeds == seeds else f"{text}, n = {found.seeds}"


def gap(found: Interval | None, seeds: int) -> str:
    """Likewise with a sign, bold if the interval excludes 0."""
    return mean(found, seeds, "+")


def beside(scores: pd.DataFrame, loss: str, baseline: str, seeds: int) -> str:
    """The score of a loss and, in brackets, its difference to another."""
    text = mean(interval(scores[loss]), seeds)
    found = None if loss == baseline else difference(scores, loss, baseline)
    return text if found is None else f"{text} ({gap(found, seeds)})"


def metric_name(task: Task, metric: str = "") -> str:
    """A task with one of its metrics, the headline one by default."""
    return f"{task.title}, {metric_title(metric or task.headline)}"


def fair(studies: Studies) -> str:
    """Every loss on every task, with the difference to KL."""
    study = studies["fair"]
    columns = [(task, metric) for task in study.tasks for metric in study.teacher(task).metrics]
    scores = [study.scores(*column) for column in columns]
    rows = []
    for title, name in (("teacher", "metrics"), ("majority class", "majority_metrics")):
        known = [getattr(study.teacher(t), name).get(metric, np.nan) for t, metric in columns]
        rows.append([title, *(number(100 * value) for value in known)])
    for loss in study.protocol.losses:
        cells = [beside(table, loss, BASELINE, study.protocol.seeds) for table in scores]
        rows.append([study.title(loss), *cells])
    return markdown(["loss", *(metric_name(*column) for column in columns)], rows)


def teaching(studies: Studies) -> str:
    """Whether the teacher has something to teach, and whether the students learn it."""
    study = studies["fair"]
    seeds = study.protocol.seeds
    rows = []
    for task in study.tasks:
        teacher, scores = study.teacher(task), study.scores(task)
        majority = 100 * teacher.majority_metrics.get(task.headline, np.nan)
        rows.append(
            [
                task.title,
                number(100 * teacher.score),
                number(majority),
                number(chance_of_teacher(task, teacher), digits=2),
                gap(interval(100 * teacher.score - scores[LABELS]), seeds),
                gap(difference(scores, BASELINE, LABELS), seeds),
                gap(interval(scores[BASELINE] - majority), seeds),
            ]
        )
    header = ["task", "teacher", "majority class", "p of a guess", "teacher − hard labels"]
    return markdown([*header, "KL − hard labels", "KL − majority class"], rows)


def wins(studies: Studies) -> str:
    """How many losses differ from KL, and how many better ones chance alone gives."""
    study = studies["fair"]
    gaps = {task.title: gaps_to_baseline(study.scores(task)) for task in study.tasks}
    gaps = {title: table for title, table in gaps.items() if len(table) > 1}
    adjusted = adjusted_pvalues(gaps)
    rows = []
    for row, titles in {**{title: [title] for title in gaps}, "all": [*gaps]}.items():
        found = [interval(gaps[title][loss]) for title in titles for loss in gaps[title]]
        apart = [each for each in found if each and each.significant]
        better = sum(each.mean > 0 for each in apart)
        expected, chance = wins_by_chance([gaps[title] for title in titles], better)
        kept = sum(adjusted[title, loss] < LEVEL for title in titles for loss in gaps[title])
        probabilities = number(expected, digits=2), number(chance, digits=2)
        counts = str(len(apart) - better), str(kept)
        rows.append([row, str(len(found)), str(better), *probabilities, *counts])
    header = ["task", "losses compared with KL", "better", "better by chance, expected"]
    header += ["p of as many or more", "worse", "different after correction"]
    return markdown(header, rows)


def published(studies: Studies) -> str:
    """The published table beside both protocols here, for the tasks that were run."""
    table, second_hand = read_published()
    author, fair = studies["author"], studies["fair"]
    rows = []
    for task in (get_task(name) for name in table.index):
        if task not in (*author.tasks, *fair.tasks):
            continue
        theirs, scores = table.loc[task.name], author.scores(task)
        for loss in ("teacher", *author.protocol.losses):
            mark = " †" if loss in second_hand else ""
            row = [task.title, loss, number(theirs[loss]) + mark, NONE, NONE, NONE, NONE]
            if loss != "teacher":
                row[1] = author.title(loss)
                row[3] = mean(interval(scores[loss]), author.protocol.seeds)
            elif task in author.tasks:
                row[3] = number(100 * author.teacher(task).score)
            if loss not in ("teacher", SUBJECT):
                row[4] = number(theirs[SUBJECT] - theirs[loss], "+") + mark
                row[5] = gap(difference(scores, SUBJECT, loss), author.protocol.seeds)
                row[6] = gap(difference(fair.scores(task), SUBJECT, loss), fair.protocol.seeds)
            rows.append(row)
    header = ["task", "loss", "published", "`author`"]
    gaps = (f"SinKD − loss, {where}" for where in ("published", "`author`", "`fair`"))
    return markdown([*header, *gaps], rows, text=2)


def best_evaluation(studies: Studies) -> str:
    """Best − last evaluation of the same training."""
    study = studies["author"]
    rows = []
    for task in study.tasks:
        runs = study.select("student", task)
        runs = runs.assign(gain=[gain_of_best(run) for run in runs.result])
        gains = [interval(runs.gain[runs.loss == loss]) for loss in study.protocol.losses]
        counts = sorted({len(run.evaluations) for run in runs.result})
        cells = [NONE if g is None else f"+{mean(g, study.protocol.seeds)}" for g in gains]
        rows.append([task.title, "–".join(map(str, counts[:: len(counts) - 1 or 1])), *cells])
    titles = [study.title(loss) for loss in study.protocol.losses]
    return markdown(["task", "evaluations per run", *titles], rows)


def sensitivity(studies: Studies) -> str:
    """Scores over one setting at a time, with the difference to KL at the same value."""
    study = studies["sensitivity"]
    losses, scores = study.protocol.losses, [study.scores(task) for task in study.tasks]
    curves = {loss: values.get("curves", ()) for loss, values in losses.items()}
    runs = {run.loss: run for run in study.runs.result if run.loss in losses}
    rows = []
    for name in dict.fromkeys(name for names in curves.values() for name in names):
        values = {loss: _setting(run, name) for loss, run in runs.items() if name in curves[loss]}
        # KL has a run for some values of some settings; otherwise there is one for all.
        same = {v: loss for loss, v in values.items() if losses[loss].get("loss") == BASELINE}
        for loss, value in sorted(values.items(), key=lambda item: item[1]):
            baseline = same.get(value, BASELINE)
            cells = [beside(table, loss, baseline, study.protocol.seeds) for table in scores]
            rows.append([name.replace("_", " "), f"{value:g}", study.title(loss), *cells])
    header = ["setting", "value", "loss", *map(metric_name, study.tasks)]
    return markdown(header, rows, text=3)


def _setting(run: Result, name: str) -> float:
    value = run.settings.get(f"loss.{name}", run.settings.get(name))
    if value is None:  # the default of the public code's iterations
        value = inspect.signature(UnrolledBatchSinkhornLoss).parameters[name].default
    return float(value)


TABLES = (fair, wins, teaching, published, sensitivity, best_evaluation)
