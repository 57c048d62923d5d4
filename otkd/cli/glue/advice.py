"""Which loss to use, in words that are chosen by the numbers alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

from otkd.cli.glue.chance import chance_of_counts
from otkd.cli.glue.collect import BASELINE, LABELS, Study
from otkd.cli.glue.findings import (
    ABOVE,
    BELOW,
    TOGETHER,
    UNKNOWN,
    Comparison,
    above_majority,
    best_comparison,
    difference,
    outcome,
)
from otkd.cli.glue.markdown import apart, are, count, listed
from otkd.cli.glue.tables import students

# A probability below which what was found is not put down to chance.
LEVEL = 0.05


def best(fair: Study, comparisons: Sequence[Comparison]) -> list[str]:
    """Task by task the loss with the highest mean, and its difference to the baseline."""
    lines = []
    for name, results in fair.tasks.items():
        on_task = [each for each in comparisons if each.task.name == name]
        if not on_task:
            continue
        best = best_comparison(on_task, name)
        baseline = fair.title(BASELINE)
        if best is None or best.ours is None:
            lines.append(f"- {results.task.title}: {baseline} itself, by its mean.")
            continue
        said = {
            ABOVE: f"above {baseline}",
            TOGETHER: f"not apart from {baseline}",
            UNKNOWN: "one shared seed, so no interval",
        }[best.outcome]
        gap = f"{apart(best.ours)}"
        lines.append(f"- {results.task.title}: {fair.title(best.loss)}, {gap}; {said}.")
    if not lines:
        return [f"Not run: {fair.title(BASELINE)} and another loss with a seed in common."]
    text = "By the mean over shared seeds; the best of several is flattered by being picked:"
    return [text, "\n".join(lines)]


def advice(fair: Study, comparisons: Sequence[Comparison]) -> list[str]:
    """What to use: another loss only where more are above the baseline than chance gives."""
    baseline = fair.title(BASELINE)
    known = [each for each in comparisons if each.outcome != UNKNOWN]
    losses = [each for each in known if each.loss != LABELS]
    if not losses:
        return ["There are too few runs under the fair protocol to say."]
    tasks = list(dict.fromkeys(each.task.title for each in losses))
    above = [each for each in losses if each.outcome == ABOVE]
    below = [each for each in losses if each.outcome == BELOW]
    expected, by_chance = _by_chance(fair, losses, len(above))
    lines = [
        *_provisional(fair),
        f"On {listed(tasks)}, {len(above):,} of {count(len(losses), 'comparison')} of a loss with "
        f"{baseline} {are(len(above))} above 0 and {len(below):,} below. If no "
        f"loss differed from {baseline}, about {expected:.1f} of each kind would be by chance, and "
        f"{max(1, len(above)):,} or more above with probability {by_chance:.2f} (all changes of "
        "sign of a seed's differences together, as losses share seeds and baseline).",
    ]
    worthy = [each for each in above if _has_learnt(fair, each)]
    if above:
        lines.append(f"Above: {_named(fair, above)}.")
    if idle := [each for each in above if each not in worthy]:
        lines.append(
            "Not apart above always answering the class most frequent in training, so no reason "
            f"to use it: {_named(fair, idle)}."
        )
    if not above:
        lines.append(f"**No loss is apart above {baseline} on any task: use {baseline}.**")
    elif not worthy:
        lines.append(f"**Use {baseline}.**")
    elif by_chance > LEVEL:
        lines.append(f"**So few above 0 are what chance gives: use {baseline}.**")
    else:
        lines.append(_winners(fair, losses, worthy, below))
    if below:
        by_loss = {
            each.loss: [b.task.title for b in below if b.loss == each.loss] for each in below
        }
        worse = [f"{fair.title(loss)} on {listed(names)}" for loss, names in by_loss.items()]
        lines.append(f"Apart below {baseline}: {'; '.join(worse)}.")
    return [*lines, *_labels_or_baseline(fair, known)]


def _by_chance(fair: Study, losses: Sequence[Comparison], above: int) -> tuple[float, float]:
    tasks = []
    for name in dict.fromkeys(each.task.name for each in losses):
        results = fair.tasks[name]
        base = results.scores(BASELINE)
        rows = [results.scores(each.loss) for each in losses if each.task.name == name]
        tasks.append(
            [
                [row[seed] - score if seed in row else math.nan for seed, score in base.items()]
                for row in rows
            ]
        )
    return chance_of_counts(tasks, max(1, above))


def _has_learnt(fair: Study, each: Comparison) -> bool:
    """Whether a loss's students are better than an answer that needs no model, as far as known."""
    gap = above_majority(fair.tasks[each.task.name], each.loss)
    return gap is None or outcome(gap) == ABOVE


def _named(fair: Study, comparisons: Sequence[Comparison]) -> str:
    return listed([f"{fair.title(each.loss)} on {each.task.title}" for each in comparisons])


def _winners(
    fair: Study,
    losses: Sequence[Comparison],
    above: Sequence[Comparison],
    below: Sequence[Comparison],
) -> str:
    lines = []
    for loss in dict.fromkeys(each.loss for each in above):
        better = [each.task.title for each in above if each.loss == loss]
        worse = [each.task.title for each in below if each.loss == loss]
        tried = len([each for each in losses if each.loss == loss])
        text = f"- {fair.title(loss)}: above on {listed(better)}"
        text += f", below on {listed(worse)}" if worse else ", below on none"
        lines.append(f"{text}, of {count(tried, 'task')}.")
    head = f"**{fair.title(BASELINE)} is the default. Worth trying where they are above it:**"
    return f"{head}\n\n" + "\n".join(lines)


def _provisional(fair: Study) -> list[str]:
    """A warning where students of a task that was begun are missing."""
    missing = []
    for results in filter(None, fair.tasks.values()):
        made, wanted = students(fair, results)
        if made < wanted:
            missing.append(f"{results.task.title} has {made:,} of {wanted:,} students")
    return [f"Provisional: {listed(missing)}."] if missing else []


def _labels_or_baseline(fair: Study, known: Sequence[Comparison]) -> list[str]:
    """Whether distilling is worth it at all: hard labels − the baseline, seen from the baseline."""
    pairs = [each for each in known if each.loss == LABELS]
    if not pairs:
        return []
    baseline, labels = fair.title(BASELINE), fair.title(LABELS)
    gains = [each.task.title for each in pairs if each.outcome == BELOW]
    harms = [each.task.title for each in pairs if each.outcome == ABOVE]
    if not gains:
        by_task = []
        for each in pairs:
            gap = difference(fair.tasks[each.task.name], BASELINE, LABELS)
            by_task.append(f"{each.task.title} {apart(gap, len(gap.seeds) if gap else 0)}")
        text = (
            f"{baseline} is not apart above {labels} on any task ({', '.join(by_task)}): whether "
            "distilling helps here at all these seeds cannot tell."
        )
    else:
        rest = [each.task.title for each in pairs if each.outcome != BELOW]
        text = f"{baseline} is above {labels} on {listed(gains)}"
        text += f", and not on {listed(rest)}." if rest else "."
    return [text + (f" It is below on {listed(harms)}." if harms else "")]
