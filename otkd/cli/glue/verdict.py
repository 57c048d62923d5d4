"""What the numbers say, in words that are chosen by the numbers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from otkd.cli.glue.advice import LEVEL, advice, best
from otkd.cli.glue.collect import BASELINE, LABELS, SUBJECT, Collection, Study, TaskResults
from otkd.cli.glue.departures import setting_name, setting_value
from otkd.cli.glue.findings import (
    ABOVE,
    BELOW,
    TOGETHER,
    UNKNOWN,
    Comparison,
    above_majority,
    above_students,
    comparisons_to,
    curve,
    curve_names,
    difference,
    outcome,
    published_comparisons,
    teacher_by_chance,
)
from otkd.cli.glue.markdown import apart, are, count, percent, signed
from otkd.cli.glue.published import Published


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
        "### Does it depend on the settings of transport?",
        *_settings(collection.studies["sensitivity"]),
        f"### Which loss is best, and by how much over {fair.title(BASELINE)}?",
        *best(fair, ours),
        "### What to use",
        *advice(fair, ours),
    ]
    return "\n\n".join(parts)


def _caution(comparisons: Sequence[Comparison]) -> str:
    known = [each for each in comparisons if each.outcome != UNKNOWN]
    return (
        "Intervals are over seeds (head, dropout, data order) alone: not over teachers, nor over "
        "samples of the task, so they are too narrow for another teacher or other rows. Between "
        f"losses this section makes {count(len(known), 'comparison')} at 95 %; if no loss differed "
        f"from any other, about {len(known) * LEVEL:.1f} of them would still exclude 0. “Not "
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
    return [
        f"{first} The models are others than the published ones, and so are their scores (see the "
        "table): that a difference is not found here says nothing of theirs.",
        f"Of the {len(known):,} that can:",
        *_outcomes(study, known),
        *_learned(study),
    ]


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
    found = [after for before, after in zip(first, again, strict=True) if before.same_side]
    lost = sum(each.outcome == TOGETHER for each in found)
    return [
        f"Of {count(len(again), 'published difference')}, {len(known):,} can be judged under the "
        "fair protocol:",
        *_outcomes(author, known),
        *(
            [
                f"Of the {len(found):,} with the published sign above, {lost:,} "
                f"{are(lost)} not apart from 0 here."
            ]
            if found
            else ()
        ),
    ]


def _teachable(fair: Study) -> list[str]:
    lines = []
    for results in fair.tasks.values():
        gap = above_students(results, LABELS)
        if gap is None or results.teacher is None:
            continue
        said = {
            ABOVE: "the teacher is above them",
            BELOW: "the teacher is below them: it has nothing to teach",
            TOGETHER: "not apart from 0: these seeds do not show that it has something to teach",
            UNKNOWN: "with one seed there is no interval",
        }[outcome(gap)]
        gained = difference(results, BASELINE, LABELS)
        kept = "" if gained is None else f" {fair.title(BASELINE)} − {fair.title(LABELS)}: "
        kept += "" if gained is None else f"{apart(gained, len(gap.seeds))}."
        lines.append(
            f"- {results.task.title}: teacher {percent(results.teacher.score)}, teacher − students "
            f"of {fair.title(LABELS)} {apart(gap, len(gap.seeds))}; {said}.{_doubt(results)}{kept}"
        )
    if not lines:
        return ["Not run: a teacher and students of hard labels."]
    return ["\n".join(lines), *_learned(fair)]


def _doubt(results: TaskResults) -> str:
    """A warning where a teacher so good may be the luck of these development rows."""
    chance = teacher_by_chance(results)
    if chance is None or chance < LEVEL:
        return ""
    return (
        f" But on so few rows an answer that needs no model is as good with probability "
        f"{chance:.2f}: no loss can be judged by this task."
    )


def _settings(study: Study) -> list[str]:
    """The points of the curves that are apart from their baseline."""
    known = [
        (f"{results.task.title}, {setting_name(name)} {setting_value(point.value)}", point)
        for results in study.tasks.values()
        for name in curve_names(study)
        for points in curve(study, results, name).values()
        for point in points
        if outcome(point.difference) != UNKNOWN
    ]
    found = [
        f"{place}: {apart(point.difference, point.seeds)}"
        for place, point in known
        if outcome(point.difference) != TOGETHER
    ]
    if not known:
        return ["Not run with at least two seeds."]
    text = (
        f"Of {count(len(known), 'point')} of the curves with an interval, {len(found):,} "
        f"{are(len(found))} apart from {study.title(BASELINE)}"
    )
    return [f"{text}: {'; '.join(found)}." if found else f"{text}."]


def _outcomes(study: Study, known: Sequence[Comparison]) -> list[str]:
    """Under each outcome how many comparisons had it, and their numbers task by task."""
    outcomes = {
        "reproduced (apart from 0, with the published difference in the interval)": [
            each for each in known if each.reproduced
        ],
        "the published sign, another size (apart from 0, without it in the interval)": [
            each for each in known if each.same_side and not each.reproduced
        ],
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
