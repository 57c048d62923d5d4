"""The page: its sections in order, written whole or not at all."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from pathlib import Path

from otkd.cli.console import CommandError, notice
from otkd.cli.glue.collect import BASELINE, PROTOCOLS, Collection, Study, collect
from otkd.cli.glue.departures import setting_name
from otkd.cli.glue.findings import curve_names
from otkd.cli.glue.markdown import count, listed, table
from otkd.cli.glue.plots import curve_plot, difference_plot, inflation_plot
from otkd.cli.glue.published import Published, read_published
from otkd.cli.glue.tables import (
    cost_table,
    curve_table,
    departures_table,
    inflation_table,
    not_run,
    not_run_list,
    published_table,
    runs_table,
    task_table,
    tuning_table,
)
from otkd.cli.glue.verdict import verdict
from otkd.cli.locks import locked
from otkd.files import written_whole

_IMAGES = "images"
# By this an earlier page is known.
_MADE = " made this page from "


def report(results_dir: Path, output: Path) -> None:
    """Write the page ``output`` and its plots in the folder ``images`` beside it.

    Nothing is written before all is made, and the page goes last.

    Args:
        results_dir: ``<protocol>/<task>/<loss>/<seed>.json``, and beside them optionally
            ``notes.toml`` and ``diagnosis.json``.
        output: a Markdown file.

    Raises:
        CommandError: if there are no results, or the page cannot be written.
    """
    published = read_published()
    tasks = dict.fromkeys((*published.tasks, *_protocol_tasks()))
    collection = collect(results_dir, tuple(tasks))
    images: dict[str, bytes] = {}
    text = _page(collection, published, images, _command(results_dir, output))
    _check_own(output, images)
    with locked(output.parent, keep=False):
        _check_own(output, images)
        for name, image in images.items():
            _write(output.parent / _IMAGES / name, image)
        _write(output, text.encode())
    for problem in collection.problems:
        notice(f"Left out: {problem}.")
    notice(f"{output}: {count(collection.files, 'result file')}, {count(len(images), 'plot')}.")


def _protocol_tasks() -> tuple[str, ...]:
    from otkd.cli.protocols import load_protocol

    return tuple(name for protocol in PROTOCOLS for name in load_protocol(protocol).tasks)


def _command(results_dir: Path, output: Path) -> str:
    paths = shlex.quote(results_dir.as_posix()), shlex.quote(output.as_posix())
    return f"otkd report glue --results-dir {paths[0]} --output {paths[1]}"


def _page(
    collection: Collection, published: Published, images: dict[str, bytes], command: str
) -> str:
    parts = [
        "# Distillation on GLUE",
        f"`{command}`{_MADE}{count(collection.files, 'result file')} (SHA-256 "
        f"`{collection.digest[:16]}`); edit neither page nor plots. Scores are those of "
        "development rows × 100. ± is the half-width of the 95 % t-interval over seeds, – where "
        "there is one seed. Differences are paired: over the seeds that both losses have; "
        "**bold** where the interval excludes 0. [What follows from it all](#verdict) stands at "
        "the end.",
        *_runs(collection, published),
        *_published(collection, published),
        *_fair(collection, images),
        *_inflation(collection.studies["author"], images),
        *_cost(collection),
        *_sensitivity(collection, images),
        *_others(collection),
        *_diagnosis(collection),
        "## Verdict",
        verdict(collection, published),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _runs(collection: Collection, published: Published) -> list[str]:
    everything = [
        result
        for study in collection.studies.values()
        for results in study.tasks.values()
        for result in results.all()
    ]
    machines = Counter(
        ", ".join(f"{key} {value}" for key, value in run.machine.items()) for run in everything
    )
    versions = Counter(", ".join(f"{k} {v}" for k, v in run.versions.items()) for run in everything)
    parts = ["## What was run", runs_table(collection)]
    missing = not_run_list(collection)
    parts.append(
        f"Without a student, or with fewer than asked for:\n\n{missing}" if missing else ""
    )
    made = [f"    {command}" for commands in collection.commands.values() for command in commands]
    parts.append("\n".join(["Made by:", "", *made]) if made else "")
    for title, found in (("Machines", machines), ("Versions", versions)):
        listing = "; ".join(f"{what} ({count(n, 'run')})" for what, n in sorted(found.items()))
        parts.append(f"{title}: {listing}.")
    if collection.problems:
        parts.append("Left out:\n\n" + "\n".join(f"- {each}" for each in collection.problems))
    parts.append("### Departures from the protocols")
    parts.append(
        "Settings of the result files that are not what the protocol's file resolves to; students "
        "of a loss that was tuned are compared with the nearest of its candidates."
    )
    for study in collection.studies.values():
        if any(study.tasks.values()):
            found = departures_table(study, published)
            end = f":\n\n{found}" if found else ": none."
            parts.append(f"`{study.protocol.name}` ({study.protocol.title}){end}")
    return parts


def _published(collection: Collection, published: Published) -> list[str]:
    dagger = " † Quoted from the same paper by others and not confirmed." * bool(
        published.unconfirmed
    )
    return [
        "## The published table beside ours",
        f"Published: {published.source}.{_pair(published)}{dagger} Ours: the protocol "
        "`author`, its score the best of the evaluations as published, with the departures above.",
        published_table(collection, published),
    ]


def _pair(published: Published) -> str:
    named = [f"{role} {name}" for role, name in published.pair.items()]
    return f" Its models: {', '.join(named)}." if named else ""


def _fair(collection: Collection, images: dict[str, bytes]) -> list[str]:
    study = collection.studies["fair"]
    parts = [
        "## The same budget for every loss",
        f"The protocol `fair`: {study.protocol.title}. {_budget(study)}Under each task fold out "
        "the held-out scores that chose the settings, on training rows that no candidate was "
        "trained on.",
    ]
    image = difference_plot(study)
    if image is not None:
        parts.append(_image(images, "glue-fair.svg", image, "Differences to KL by task"))
    for name, results in study.tasks.items():
        title = results.task.title
        if not results:
            parts.append(f"### {title}\n\n{_sentence(not_run(collection, study, name))}")
            continue
        parts += [f"### {title}", task_table(collection, study, results)]
        tuned = tuning_table(study, results)
        if tuned:
            head = f"<summary>Held-out scores of all candidates, {title}</summary>"
            parts.append(f"<details>\n{head}\n\n{tuned}\n\n</details>")
    return parts


def _budget(study: Study) -> str:
    """What the tuning of each loss had to spend."""
    tuning, losses = study.protocol.tuning, study.protocol.losses
    if tuning is None:
        return ""
    numbers = sorted({len(values.get("candidates", ())) for values in losses.values()} - {0})
    without = [study.title(name) for name, values in losses.items() if not values.get("candidates")]
    rate = tuning.settings.get("learning_rate")
    text = f"Every loss chooses among {' or '.join(map(str, numbers))} settings"
    text += f" (but {listed(without)}, which has none)" if without else ""
    text += (
        f", each trained once, on {tuning.train_rows:,} rows of train" if tuning.train_rows else ""
    )
    text += f" at a learning rate of {rate:g}" if rate else ""
    return (
        f"{text}, and scored on a held-out {tuning.held_out:.0%} of train. Learning rate "
        f"({study.protocol.settings['learning_rate']:g}) and epochs of the students are the same "
        "for all, found with hard labels alone (the protocol `pilot`). Batches are drawn by "
        "length, so that they are no uniform sample: transport sees the batch. "
    )


def _inflation(study: Study, images: dict[str, bytes]) -> list[str]:
    parts = [
        "## What the best of many evaluations adds",
        "The protocol `author` evaluates on the development rows every few steps and reports the "
        "best. Best − last evaluation of the same training, mean over seeds:",
        inflation_table(study) or "Not run.",
    ]
    image = inflation_plot(study)
    if image is not None:
        parts.append(_image(images, "glue-best.svg", image, "Best − last evaluation by task"))
    return parts


def _cost(collection: Collection) -> list[str]:
    parts = [
        "## Cost",
        "Seconds of a training step as multiples of KL's on the same task, of the fastest run of "
        "each: what else the machines did is in them, so below some tenths this says nothing. "
        "Measured side by side it stands in [Benchmarks](benchmarks.md#whole-training-steps).",
    ]
    for name in ("author", "fair"):
        found = cost_table(collection.studies[name])
        parts.append(f"`{name}`:\n\n{found}" if found else f"`{name}`: not run.")
    return parts


def _sensitivity(collection: Collection, images: dict[str, bytes]) -> list[str]:
    study = collection.studies["sensitivity"]
    parts = ["## Sensitivity"]
    if not any(study.tasks.values()):
        return [*parts, "Not run (protocol `sensitivity`)."]
    fair, runs = (
        [(run.finished, run.seconds) for results in each.tasks.values() for run in results.all()]
        for each in (collection.studies["fair"], study)
    )
    copied = sum(run in fair for run in runs)
    parts.append(
        f"The protocol `sensitivity`: {study.protocol.title}; one setting at a time around a base. "
        f"{count(copied, 'result')} of {len(runs):,} are those of `fair`, of the same settings. "
        f"Dashed: {study.title(BASELINE)}, with the band of its interval. Differences are to "
        f"{study.title(BASELINE)} with the same value of the setting, where it was run with it."
    )
    for name in curve_names(study):
        image = curve_plot(study, name)
        title = setting_name(name)
        if image is None:
            parts.append(f"### {title.capitalize()}\n\nNot run.")
            continue
        file = f"glue-sensitivity-{name.replace('_', '-')}.svg"
        parts.append(f"### {title.capitalize()}")
        parts.append(_image(images, file, image, f"Score over {title}"))
        for results in study.tasks.values():
            found = curve_table(study, results, name)
            if found:
                parts.append(f"{results.task.title}:\n\n{found}")
    return parts


def _others(collection: Collection) -> list[str]:
    """Protocols that prepare the ones above: what their tuning found, or their scores."""
    parts = []
    for name, study in collection.studies.items():
        if name not in PROTOCOLS and study.tasks:
            parts.append(f"## The protocol `{name}`: {study.protocol.title}")
            for results in study.tasks.values():
                tuned = tuning_table(study, results)
                held_out = "held-out scores of the candidates" if tuned else "scores"
                parts.append(f"{results.task.title}, {held_out}:")
                parts.append(tuned or task_table(collection, study, results))
    return parts


def _diagnosis(collection: Collection) -> list[str]:
    if not collection.diagnosis:
        return []
    parts = ["## Why"]
    for section in collection.diagnosis:
        parts += [f"### {section['title']}", *section["lines"]]
        if section["columns"]:
            parts.append(table(section["columns"], section["rows"]))
    return parts


def _image(images: dict[str, bytes], name: str, image: bytes, title: str) -> str:
    images[name] = image
    return f"![{title}]({_IMAGES}/{name})"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _check_own(output: Path, images: dict[str, bytes]) -> None:
    """Check that the page is one of this command's, if there is one, and the plots are its own.

    Raises:
        CommandError: naming what this command did not write.
    """
    folder = output.parent / _IMAGES
    before = ""
    for path in (output, folder, *(folder / name for name in images)):
        if not os.path.lexists(path):
            continue
        why = None
        if path.is_symlink():
            why = "it is a symbolic link"
        elif path == folder:
            why = None if path.is_dir() else "it is a file where a folder is expected"
        elif not path.is_file():
            why = "it is not a file"
        elif path == output:
            before = path.read_text(encoding="utf-8", errors="replace")
            why = None if _MADE in before else "`otkd report` did not make it"
        elif f"]({_IMAGES}/{path.name})" not in before and path.read_bytes() != images[path.name]:
            why = "the page does not show it, so it may be another's"
        if why:
            raise CommandError(
                f"--output: {path} cannot be written: {why}. Move it elsewhere, or name another "
                "page with --output."
            )


def _write(path: Path, content: bytes) -> None:
    with written_whole(path) as partial:
        partial.write_bytes(content)
