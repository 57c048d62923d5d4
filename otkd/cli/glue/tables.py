"""The tables of the page, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable

from otkd.cli.glue.collect import BASELINE, SUBJECT, Collection, Study, TaskResults
from otkd.cli.glue.departures import (
    best_candidate,
    candidate_label,
    chosen_candidate,
    departures,
    setting_name,
    setting_value,
)
from otkd.cli.glue.findings import (
    curve,
    difference,
    evaluation_scores,
    inflation,
    references,
    seconds_per_step,
)
from otkd.cli.glue.markdown import (
    NONE,
    apart,
    count,
    interval,
    listed,
    mean,
    percent,
    signed,
    table,
)
from otkd.cli.glue.published import Published, published_metrics
from otkd.cli.report import metric_title
from otkd.cli.stats import estimate

MAJORITY = "majority class"


def not_run(collection: Collection, study: Study, task: str, seeds: int = 0) -> str:
    """Why a cell is empty."""
    reason = collection.reasons.get((study.protocol.name, task))
    said = f"not run ({seeds} of {count(study.protocol.seeds, 'seed')})"
    return f"{said}: {reason.rstrip('.')}" if reason else said


def students(study: Study, results: TaskResults) -> tuple[int, int]:
    """How many of the students that the protocol asks for there are; more are not counted."""
    seeds = study.protocol.seeds
    done = sum(min(len(runs), seeds) for runs in results.runs.values())
    return done, seeds * len(results.runs)


def runs_table(collection: Collection) -> str:
    """What was trained, on what, by protocol and task; tasks that were not run are left out."""
    rows = []
    for study in collection.studies.values():
        for results in study.tasks.values():
            if not results:
                continue
            made = [run for runs in results.runs.values() for run in runs.values()]
            tried = sum(map(len, results.tuning.values()))
            done, wanted = students(study, results)
            rows.append(
                [
                    study.protocol.name,
                    results.task.title,
                    _distinct(run.settings.get("teacher", "?") for run in made),
                    _distinct(_student(run.settings) for run in made),
                    _distinct(f"{run.rows['train']:,} / {run.rows['dev']:,}" for run in made),
                    _distinct(run.precision for run in made),
                    f"{tried:,}" if tried else NONE,
                    f"{done:,} of {wanted:,}",
                ]
            )
    header = ["protocol", "task", "teacher", "student", "rows, train / dev", "precision"]
    return table([*header, "candidates tried", "students of the table"], rows, text=6)


def not_run_list(collection: Collection) -> str:
    """The tasks without a student, and those with fewer than asked for, by protocol and reason."""
    lines = []
    for study in collection.studies.values():
        tasks: dict[str, list[str]] = {}
        for name, results in study.tasks.items():
            done, wanted = students(study, results)
            if not results:
                tasks.setdefault(not_run(collection, study, name), []).append(results.task.title)
            elif done < wanted:
                reason = collection.reasons.get((study.protocol.name, name), "").rstrip(".")
                said = f"{done:,} of {wanted:,} students{': ' if reason else ''}{reason}"
                tasks.setdefault(said, []).append(results.task.title)
        lines += [f"- {study.protocol.name}, {listed(t)}: {why}." for why, t in tasks.items()]
    return "\n".join(lines)


def departures_table(study: Study, published: Published) -> str:
    """Where results were not made as their protocol says; empty if they all were."""
    pair = published.pair if study.protocol.name == "author" else {}
    found = departures(study, pair)
    rows = []
    for each in found:
        results = study.tasks[each.task]
        run = {loss for loss in results.runs if results.runs[loss] or results.tuning[loss]}
        losses = "all" if run <= {*each.losses} else ", ".join(map(study.label, each.losses))
        rows.append([results.task.title, each.setting, each.wanted, each.found, losses])
    return table(["task", "setting", "protocol", "here", "losses"], rows, text=5) if rows else ""


def published_table(collection: Collection, published: Published) -> str:
    """Published figures beside ours, a row a task, metric and loss."""
    study = collection.studies["author"]
    rows = []
    for name in published.tasks:
        results = study.tasks[name]
        for metric in published_metrics(results.task):
            title = f"{results.task.title}, {metric_title(metric)}"
            for loss in ("teacher", *study.protocol.losses):
                theirs = published.scores.get((loss, name, metric))
                if theirs is None and loss == "teacher":
                    continue
                mark = " †" if loss in published.unconfirmed else ""
                said = NONE if theirs is None else f"{percent(theirs)}{mark}"
                if loss == "teacher":
                    teacher = results.teacher
                    ours = NONE if teacher is None else percent(teacher.metrics[metric])
                    rows.append([title, "teacher", said, ours, NONE, NONE])
                    if metric in results.majority:
                        ours = percent(results.majority[metric])
                        rows.append([title, MAJORITY, NONE, ours, NONE, NONE])
                    continue
                gap = published.difference(SUBJECT, loss, name, metric)
                own = loss != SUBJECT
                rows.append(
                    [
                        title,
                        study.title(loss),
                        said,
                        _cell(collection, study, results, loss, metric),
                        f"{signed(gap)}{mark}" if own and gap is not None else NONE,
                        apart(difference(results, SUBJECT, loss, metric), study.protocol.seeds)
                        if own
                        else NONE,
                    ]
                )
    subject = study.title(SUBJECT)
    header = ["task", "loss", "published", "ours"]
    return table([*header, f"{subject} − it, published", f"{subject} − it, ours"], rows, text=2)


def task_table(collection: Collection, study: Study, results: TaskResults) -> str:
    """The losses on one task: each metric, its difference to the baseline, the settings chosen."""
    metrics = list(_metrics(results))
    header = ["loss"]
    for metric in metrics:
        header += [metric_title(metric), f"− {study.title(BASELINE)}"]
    given = {"teacher": results.teacher.metrics if results.teacher else {}}
    if results.majority:
        given[MAJORITY] = results.majority
    rows = []
    for title, scores in given.items():
        cells = [percent(scores[metric]) if metric in scores else NONE for metric in metrics]
        rows.append([title, *(text for cell in cells for text in (cell, NONE)), NONE, NONE])
    for loss, runs in results.runs.items():
        row = [study.title(loss)]
        for metric in metrics:
            row.append(_cell(collection, study, results, loss, metric))
            gap = difference(results, loss, BASELINE, metric) if loss != BASELINE else None
            row.append(apart(gap, len(runs)))
        chosen = chosen_candidate(study, results, loss)
        candidates = study.protocol.losses[loss]["candidates"]
        label = NONE if chosen is None else candidate_label(candidates[chosen])
        rows.append([*row, f"{len(runs)}", label])
    return table([*header, "seeds", "chosen"], rows)


def tuning_table(study: Study, results: TaskResults) -> str:
    """The held-out scores of every candidate, the best in bold; empty if none was tried."""
    rows = []
    for loss, tried in results.tuning.items():
        candidates = study.protocol.losses[loss]["candidates"]
        best = best_candidate(results, loss)
        cells = []
        for number in sorted(tried):
            label = candidate_label(candidates[number]) if number < len(candidates) else "?"
            score = percent(tried[number].score)
            cells.append(f"{label}: {f'**{score}**' if number == best else score}")
        if cells:
            rows.append([study.title(loss), *cells])
    width = max(map(len, rows), default=0)
    rows = [row + [NONE] * (width - len(row)) for row in rows]
    header = ["loss", *(f"{number}" for number in range(1, width))]
    return table(header, rows, text=width) if rows else ""


def inflation_table(study: Study) -> str:
    """Best − last evaluation, a row a task; empty where there was one evaluation a run."""
    losses = list(study.protocol.losses)
    rows = []
    for results in study.tasks.values():
        gains = [inflation(results, loss) for loss in losses]
        made = [run for runs in results.runs.values() for run in runs.values()]
        numbers = sorted({n for run in made if (n := len(evaluation_scores(run))) > 1})
        if numbers:
            evaluations = f"{numbers[0]:,}" if len(numbers) == 1 else f"{numbers[0]}–{numbers[-1]}"
            cells = [
                NONE if gain is None else f"{signed(gain.mean)} ± {interval(gain)}"
                for gain in gains
            ]
            rows.append([results.task.title, evaluations, *cells])
    header = ["task", "evaluations a run", *(study.title(loss) for loss in losses)]
    return table(header, rows) if rows else ""


def cost_table(study: Study) -> str:
    """Seconds a step of the baseline, and the other losses as multiples of it."""
    losses = list(study.protocol.losses)
    rows = []
    for results in study.tasks.values():
        base = seconds_per_step(results, BASELINE)
        if base:
            costs = [seconds_per_step(results, loss) for loss in losses]
            cells = [NONE if cost is None else f"{cost / base:.2f}" for cost in costs]
            rows.append([results.task.title, f"{base:.3f}", *cells])
    header = ["task", f"{study.title(BASELINE)}, s/step", *(study.title(loss) for loss in losses)]
    return table(header, rows) if rows else ""


def curve_table(study: Study, results: TaskResults, name: str) -> str:
    """The points of one curve on one task, and the lines beside it; empty where there are none."""
    rows = []
    for title, points in curve(study, results, name).items():
        for point in points:
            gap = apart(point.difference, point.seeds)
            wanted = study.protocol.seeds
            seeds = f"{point.seeds} of {wanted}" if point.seeds < wanted else str(point.seeds)
            rows.append([title, setting_value(point.value), mean(point.score), gap, seeds])
    if not rows:
        return ""
    for title, score in references(study, results, name).items():
        rows.append([title, "any", mean(score), NONE, NONE])
    baseline = study.title(BASELINE)
    header = ["loss", setting_name(name), metric_title(results.task.headline)]
    return table([*header, f"− {baseline}", "seeds"], rows)


def _cell(
    collection: Collection, study: Study, results: TaskResults, loss: str, metric: str
) -> str:
    scores = results.scores(loss, metric)
    if not scores:
        return not_run(collection, study, results.task.name)
    text = mean(estimate(list(scores.values())))
    wanted = study.protocol.seeds
    return text if len(scores) == wanted else f"{text} ({len(scores)} of {count(wanted, 'seed')})"


def _metrics(results: TaskResults) -> Iterable[str]:
    task = results.task
    return (task.metric_key(split, metric) for split in task.dev_splits for metric in task.metrics)


def _student(settings: dict) -> str:
    if "student" in settings:
        return str(settings["student"])
    return f"{settings.get('student_layers', '?')} of its layers"


def _distinct(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))
