"""What the numbers say, in words that are chosen by the numbers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from otkd.cli.glue.collect import BASELINE, LABELS, SUBJECT, Collection, Study
from otkd.cli.glue.findings import (
    ABOVE,
    BELOW,
    TOGETHER,
    UNKNOWN,
    Comparison,
    above_majority,
    above_students,
    best_comparison,
    comparisons_to,
    difference,
    outcome,
    published_comparisons,
)
from otkd.cli.glue.markdown import apart, count, listed, percent, signed
from otkd.cli.glue.published import Published
from otkd.cli.stats import probability_of

# Of comparisons without any difference, the share whose 95 % interval excludes 0 all the same.
_FALSE = 0.05


def verdict(collection: Collection, published: Published) -> str:
    """The section's paragraphs and lists, in Markdown."""
    author, fair = collection.studies["author"], collection.studies["fair"]
    theirs = published_comparisons(author, published)
    ours = comparisons_to(fair)
    again = [
        replace(each, ours=difference(fair.tasks[each.task.name], each.loss, each.baseline))
        for each in theirs
    ]
    # What is compared with the baseline again is among `ours` already.
    parts = [
        _caution([*theirs, *ours, *(each for each in again if each.baseline != BASELINE)]),
        "### Do the published differences reproduce?",
        *_reproduction(author, theirs),
        "### Do they outlast the same tuned budget?",
        *_vanishing(author, theirs, again),
        "### Is there anything to teach?",
        *_teachable(fair),
        f"### Which loss is best, and by how much over {fair.title(BASELINE)}?",
        *_best(fair, ours),
        "### What to use",
        *_advice(fair, ours),
    ]
    return "\n\n".join(parts)


def _caution(comparisons: Sequence[Comparison]) -> str:
    known = [each for each in comparisons if each.outcome != UNKNOWN]
    return (
        "Intervals are over seeds (head, dropout, data order) alone: not over teachers, nor over "
        "samples of the task, so they are too narrow for another teacher or other rows. Between "
        f"losses this section makes {count(len(known), 'comparison')} at 95 %; if no loss differed "
        f"from any other, about {len(known) * _FALSE:.1f} of them would still exclude 0. “Not "
        "apart from 0” means that these seeds cannot tell, not that there is no difference."
    )


def _reproduction(study: Study, comparisons: Sequence[Comparison]) -> list[str]:
    known = [each for each in comparisons if each.outcome != UNKNOWN]
    missing = len(comparisons) - len(known)
    subject = study.title(SUBJECT)
    first = (
        f"Of {count(len(comparisons), 'published difference')} ({subject} − a baseline on a task's "
        f"headline metric), {missing:,} cannot be judged here: at least two seeds of both losses "
        "are needed."
    )
    if not known:
        return [first]
    found = _outcomes(study, known, "reproduced (the published sign, and the interval excludes 0)")
    return [first, f"Of the {len(known):,} that can:", *found, *_learned(study)]


def _learned(study: Study) -> list[str]:
    """How far the teacher and the baseline's students are above the majority class."""
    lines = []
    for results in study.tasks.values():
        gap = above_majority(results, BASELINE)
        if gap is not None and results.teacher is not None:
            by = signed(results.teacher.score - results.majority[results.task.headline])
            lines.append(
                f"- {results.task.title}: teacher {by}, students of {study.title(BASELINE)} "
                f"{apart(gap, len(gap.seeds))}"
            )
    if not lines:
        return []
    first = "Above always answering the class most frequent in training, which learns nothing:"
    return [first, "\n".join(lines)]


def _vanishing(
    author: Study, first: Sequence[Comparison], again: Sequence[Comparison]
) -> list[str]:
    """The published differences under the fair protocol, and what became of those reproduced."""
    known = [each for each in again if each.outcome != UNKNOWN]
    if not known:
        return ["Not run with at least two seeds of both losses."]
    reproduced = [after for before, after in zip(first, again, strict=True) if before.reproduced]
    gone = sum(each.outcome == TOGETHER for each in reproduced)
    fate = f"{gone:,} are gone (not apart from 0) here."
    return [
        f"Of {count(len(again), 'published difference')}, {len(known):,} can be judged under the "
        "fair protocol:",
        *_outcomes(author, known, "the published sign, and the interval excludes 0"),
        *([f"Of the {len(reproduced):,} reproduced above, {fate}"] if reproduced else ()),
    ]


def _teachable(fair: Study) -> list[str]:
    lines = []
    for results in fair.tasks.values():
        gap = above_students(results, LABELS)
        if gap is None or results.teacher is None:
            continue
        said = {
            ABOVE: "the teacher is above them: there is something to teach",
            BELOW: "the teacher is below them: it has nothing to teach",
            TOGETHER: "not apart from 0: these seeds do not show that it has something to teach",
            UNKNOWN: "with one seed there is no interval",
        }[outcome(gap)]
        gained = difference(results, BASELINE, LABELS)
        kept = "" if gained is None else f" {fair.title(BASELINE)} − {fair.title(LABELS)}: "
        kept += "" if gained is None else f"{apart(gained, len(gap.seeds))}."
        lines.append(
            f"- {results.task.title}: teacher {percent(results.teacher.score)}, teacher − students "
            f"of {fair.title(LABELS)} {apart(gap, len(gap.seeds))}; {said}.{kept}"
        )
    if not lines:
        return ["Not run: a teacher and students of hard labels."]
    return ["\n".join(lines), *_learned(fair)]


def _best(fair: Study, comparisons: Sequence[Comparison]) -> list[str]:
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


def _advice(fair: Study, comparisons: Sequence[Comparison]) -> list[str]:
    baseline = fair.title(BASELINE)
    known = [each for each in comparisons if each.outcome != UNKNOWN]
    losses = [each for each in known if each.loss != LABELS]
    if not losses:
        return ["There are too few runs under the fair protocol to say."]
    tasks = list(dict.fromkeys(each.task.title for each in losses))
    higher = [each for each in losses if each.outcome == ABOVE]
    # A loss whose students have learnt nothing may answer the larger class more often than others.
    above = [each for each in higher if _learnt(fair, each)]
    below = [each for each in losses if each.outcome == BELOW]
    expected = len(losses) * _FALSE / 2
    least = max(1, len(above))
    by_chance = probability_of(least, len(losses), _FALSE / 2)
    lines = [
        *_provisional(fair),
        f"On {listed(tasks)}, {len(above):,} of {count(len(losses), 'comparison')} of a loss with "
        f"{baseline} are above 0 and {len(below):,} below. By chance about {expected:.1f} of each "
        f"kind would be, and {least:,} or more above with probability {by_chance:.2f}.",
    ]
    if nothing := [each for each in higher if each not in above]:
        named = listed([f"{fair.title(each.loss)} on {each.task.title}" for each in nothing])
        lines.append(
            f"Not counted as above, for it is not apart above always answering the class most "
            f"frequent in training: {named}."
        )
    if not above:
        lines.append(f"**No loss is apart above {baseline} on any task: use {baseline}.**")
    elif by_chance > _FALSE:
        lines.append(f"**So few above 0 are what chance gives: use {baseline}.**")
    else:
        lines.append(_winners(fair, losses, above, below))
    if below:
        by_loss = {
            each.loss: [b.task.title for b in below if b.loss == each.loss] for each in below
        }
        worse = [f"{fair.title(loss)} on {listed(names)}" for loss, names in by_loss.items()]
        lines.append(f"Apart below {baseline}: {'; '.join(worse)}.")
    return [*lines, *_labels_or_baseline(fair, known)]


def _learnt(fair: Study, each: Comparison) -> bool:
    results = fair.tasks[each.task.name]
    gap = None if results is None else above_majority(results, each.loss)
    return gap is None or outcome(gap) == ABOVE


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
        made, wanted = sum(map(len, results.runs.values())), len(results.runs)
        wanted *= fair.protocol.seeds
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
        text = f"{baseline} is not apart above {labels} on any task: these seeds show no gain from "
        text += "distilling at all, and say little of pairs of models where there is one."
    else:
        rest = [each.task.title for each in pairs if each.outcome != BELOW]
        text = f"{baseline} is above {labels} on {listed(gains)}"
        text += f", and not on {listed(rest)}." if rest else "."
    return [text + (f" It is below on {listed(harms)}." if harms else "")]


def _outcomes(study: Study, known: Sequence[Comparison], reproduced: str) -> list[str]:
    """Under each outcome how many comparisons had it, and their numbers task by task.

    ``reproduced`` is what the first of them, the one published, is called.
    """
    outcomes = {
        reproduced: [each for each in known if each.reproduced],
        "not apart from 0": [each for each in known if each.outcome == TOGETHER],
        "reversed (the other sign, and the interval excludes 0)": [
            each for each in known if each.reversed
        ],
    }
    lines = []
    for title, found in outcomes.items():
        lines.append(f"- {title}: {len(found):,}")
        for task in dict.fromkeys(each.task.title for each in found):
            said = [_numbers(study, each) for each in found if each.task.title == task]
            lines.append(f"  - {task}: {'; '.join(said)}")
    outside = sum(not each.covers_published for each in known)
    return [
        "\n".join(lines),
        f"The published difference itself lies outside our interval in {outside:,} of "
        f"{len(known):,}.",
    ]


def _numbers(study: Study, each: Comparison) -> str:
    seeds = len(each.ours.seeds) if each.ours is not None else 0
    published = "" if each.published is None else f", published {signed(each.published)}"
    mark = " †" if each.unconfirmed else ""
    return f"{study.title(each.baseline)} {apart(each.ours, seeds)}{published}{mark}"
