"""`otkd report glue`, run as it is typed, on result files written here."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from otkd.cli.app import app
from otkd.cli.glue.chance import chance_of_counts
from otkd.cli.glue.collect import collect
from otkd.cli.glue.departures import Departure, departures, setting_value
from otkd.cli.glue.published import read_published
from otkd.cli.objectives import objective_options
from otkd.cli.protocols import load_protocol
from otkd.cli.results import Result, read_result, write_result
from otkd.cli.settings import Settings
from otkd.cli.stats import estimate, paired_difference
from otkd.tasks.tasks import get_task

# t(.975, n − 1) of Student's table.
T = {2: 12.7062, 3: 4.30265, 4: 3.18245, 5: 2.77645}
SHARED = (
    *("max_length", "precision", "teacher", "teacher_epochs", "teacher_batch_size"),
    *("teacher_learning_rate", "group_by_length", "freeze_embeddings", "epochs"),
    *("learning_rate", "batch_size", "evaluate_every", "score", "student_layers"),
)
ROWS = {"rte": (2490, 277), "mrpc": (3668, 408), "cola": (8551, 1043)}


class Tree:
    """A results folder in which runs are made as their protocol says, unless told otherwise."""

    def __init__(self, root):
        self.root = root

    def run(self, place, score, *, tuning=None, evaluations=(), seconds=1.0, cut="", **settings):
        """Write ``protocol/task/loss/number.json``; ``cut`` is what the file name is to be."""
        protocol_name, task_name, loss, number = place.split("/")
        protocol, task = load_protocol(protocol_name), get_task(task_name)
        shared = protocol.resolve(Settings(task.name), ())
        objective = {each.name: each for each in protocol.objectives(shared, ())}[loss]
        chosen = objective.tried()[0]
        folder = self.root / protocol_name / task_name / loss
        if tuning is not None:
            chosen = objective.tried(**protocol.tuning.settings)[int(number)]
            folder /= "tuning"
        values = {name: getattr(chosen.settings, name) for name in SHARED}
        values |= {"teacher": "small-encoder", "loss": chosen.loss, "seed": int(number)}
        values |= {
            f"loss.{k}": v for k, v in objective_options(chosen.loss, chosen.settings).items()
        }
        values |= {"train_rows": ROWS[task_name][0], "dev_rows": ROWS[task_name][1]}
        scores = score if isinstance(score, dict) else {task.headline: score}
        result = Result(
            task=task.name, loss=loss, seed=int(number), settings=values | settings,
            headline=task.headline, metrics=scores, teacher_metrics=scores, agreement=0.9,
            teacher_logits="t", rows=dict(zip(("train", "dev"), ROWS[task_name], strict=True)),
            steps=10, seconds=seconds, precision="fp32", versions={"otkd": "0"},
            machine={"processor": "Abacus", "cores": 1},
            evaluations=[{"step": i, task.headline: value} for i, value in enumerate(evaluations)],
            finished="2000-01-01T00:00:00+00:00",
        )  # fmt: skip
        path = folder / (cut or f"{number}.json")
        write_result(path, result)
        return path

    def runs(self, place, scores, **options):
        """One run a score; seeds from 0, or the keys of a dict."""
        seeds = scores if isinstance(scores, dict) else dict(enumerate(scores))
        for seed, score in seeds.items():
            self.run(f"{place}/{seed}", score, **options)

    def teacher(self, place, score, majority=None):
        """The teacher of a task, ``protocol/task``, and what its larger class scores."""
        path = self.run(f"{place}/kl/0", score, cut="for-teacher.json")
        result = dataclasses.replace(
            read_result(path), loss="teacher", majority_metrics=majority or {}
        )
        path.unlink()
        write_result(self.root / place / "teacher" / "result.json", result)


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path / "results")


def report(tree, output, code=0):
    arguments = ["report", "glue", "--results-dir", str(tree.root), "--output", str(output)]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "160"})
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def page(tree, tmp_path):
    """The page of the tree, as it is when it is asked for."""

    def make():
        report(tree, tmp_path / "docs" / "glue.md")
        return (tmp_path / "docs" / "glue.md").read_text(encoding="utf-8")

    return make


def section(text, title):
    """What stands under a heading, up to the next of its rank or above."""
    lines = text.splitlines()
    start = lines.index(title)
    level = title.split()[0]
    ends = [
        i for i, line in enumerate(lines) if i > start and line[:1] == "#" == line.strip()[0]
        and len(line.split()[0]) <= len(level)
    ]  # fmt: skip
    return "\n".join(lines[start : min(ends, default=len(lines))])


def row(text, *first):
    """The cells after the first ones of the one table row that begins with these."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line[:2] == "| "]
    found = [cells[len(first) :] for cells in rows if tuple(cells[: len(first)]) == first]
    assert len(found) == 1, (first, rows)
    return found[0]


def fair_title(loss):
    return load_protocol("fair").losses[loss]["title"]


def test_means_and_paired_differences_are_those_of_shared_seeds(tree, page):
    tree.runs("fair/rte/kl", [0.60, 0.62, 0.61, 0.63])
    # Of seeds 1 to 4 the first three are shared: differences 0.01, 0.03 and 0.02.
    tree.runs("fair/rte/jsd", {1: 0.63, 2: 0.64, 3: 0.65, 4: 0.90})
    tree.runs("fair/rte/tvd", {4: 0.5})
    tree.teacher("fair/rte", 0.7)
    table = section(page(), "### RTE")
    assert row(table, "teacher")[0] == "70.0"
    spread = 100 * (5e-4 / 3) ** 0.5 / 2
    assert row(table, "KL")[0] == f"61.5 ± {T[4] * spread:.1f} (4 of 5 seeds)"
    assert row(table, "JSD")[1] == f"+2.0 ± {T[3] * 1.0 / 3**0.5:.1f} (3 seeds)"
    assert row(table, "JSD")[2] == "4"
    assert row(table, "TVD")[:3] == ["50.0 ± – (1 of 5 seeds)", "–", "1"]
    assert row(table, "reverse KL")[0] == "not run (0 of 5 seeds)"


def test_differences_apart_from_zero_are_bold(tree, page):
    tree.runs("fair/rte/kl", [0.60, 0.61, 0.62, 0.60, 0.61])
    tree.runs("fair/rte/jsd", [0.62, 0.63, 0.64, 0.62, 0.631])
    tree.runs("fair/rte/tvd", [0.58, 0.59, 0.60, 0.58, 0.589])
    tree.runs("fair/rte/rkl", [0.62, 0.59, 0.62, 0.62, 0.59])
    text = page()
    table = section(text, "### RTE")
    assert row(table, "JSD")[1] == "**+2.0 ± 0.1**"
    assert row(table, "TVD")[1] == "**−2.0 ± 0.1**"
    assert row(table, "reverse KL")[1].startswith("+0.0 ± ")
    advice = section(text, "### What to use")
    assert "1 of 3 comparisons of a loss with KL is above 0 and 1 below" in advice
    # Of 32 changes of sign four: none, all, which turns TVD over, and two that suit reverse KL.
    assert "1 or more above with probability 0.12" in advice
    assert "Apart below KL: TVD on RTE." in advice
    fair = load_protocol("fair")
    assert f"RTE has 20 of {fair.seeds * len(fair.losses)} students" in advice
    assert "- RTE: JSD, **+2.0 ± 0.1** (5 seeds); above KL." in section(
        text, "### Which loss is best, and by how much over KL?"
    )


def test_every_metric_of_a_task_has_its_columns(tree, page):
    for seed, f1, accuracy in ((0, 0.80, 0.70), (1, 0.82, 0.71)):
        tree.run(f"fair/mrpc/kl/{seed}", {"f1": f1, "accuracy": accuracy})
        tree.run(f"fair/mrpc/jsd/{seed}", {"f1": f1 + 0.01, "accuracy": accuracy - 0.02})
    cells = row(section(page(), "### MRPC"), "JSD")
    assert cells[1] == "**+1.0 ± 0.0**"
    assert cells[2].startswith("68.5 ± ")
    assert cells[3] == "**−2.0 ± 0.0**"


def test_published_differences_are_judged_by_ours(tree, page):
    published = read_published()
    tree.runs("author/rte/sinkd", [0.66, 0.67, 0.68])
    tree.runs("author/rte/kl", [0.64, 0.65, 0.661])  # reproduced
    tree.runs("author/rte/rkl", [0.68, 0.69, 0.701])  # reversed
    tree.runs("author/rte/jsd", [0.66, 0.60, 0.72])  # not apart
    tree.runs("author/rte/tvd", {2: 0.6})  # one seed
    tree.runs("fair/rte/sinkd", [0.66, 0.67, 0.68])
    tree.runs("fair/rte/kl", [0.66, 0.60, 0.72])
    tree.teacher("author/rte", 0.7)
    text = page()
    table = section(text, "## The published table beside ours")
    theirs = 100 * published.difference("sinkd", "kl", "rte", "accuracy")
    said, ours, gap, paired = row(table, "RTE, accuracy", "KL")
    assert said == f"{100 * published.scores['kl', 'rte', 'accuracy']:.1f} †"
    assert ours.startswith("65.0 ± ")
    assert gap == f"{theirs:+.1f} †"
    assert paired == "**+2.0 ± 0.1**"
    assert row(table, "RTE, accuracy", "TVD")[1:] == [
        "60.0 ± – (1 of 3 seeds)",
        f"{100 * published.difference('sinkd', 'tvd', 'rte', 'accuracy'):+.1f}",
        "+8.0 ± – (1 seed)",
    ]
    assert row(table, "RTE, accuracy", "teacher")[1] == "70.0"
    assert row(table, "MNLI, accuracy (mismatched)", "SinKD")[1] == "not run (0 of 3 seeds)"
    verdict = section(text, "### Do the published differences reproduce?")
    count = 4 * len(published.tasks)
    assert f"Of {count} published differences" in verdict
    assert f"headline metric), {count - 3} cannot be judged here" in verdict
    sized = "the published sign, another size (apart from 0, without it in the interval): 1"
    assert f"{sized}\n  - RTE: KL **+2.0 ± 0.1**, published +4.3 †" in verdict
    assert (
        "- reproduced (apart from 0, with the published difference in the interval): 0" in verdict
    )
    assert "- not apart from 0: 1\n  - RTE: JSD" in verdict
    assert "(the other sign, and the interval excludes 0): 1\n  - RTE: reverse KL" in verdict
    followed = section(text, "### Do they outlast the same tuned budget?")
    assert "- not apart from 0: 1\n  - RTE: KL" in followed
    assert "Of the 1 with the published sign above, 1 is not apart from 0 here." in followed


def test_best_evaluations_are_laid_against_the_last(tree, page):
    # Best − last: 0.04 and 0.02; what the score in the file is does not matter.
    tree.run("author/rte/kl/0", 0.61, evaluations=(0.5, 0.64, 0.60))
    tree.run("author/rte/kl/1", 0.62, evaluations=(0.62, 0.61, 0.60))
    tree.run("author/rte/sinkd/0", 0.62, evaluations=(0.62,))
    evaluations, kl, *_, sinkd = row(
        section(page(), "## What the best of many evaluations adds"), "RTE"
    )
    assert evaluations == "3"
    assert kl == f"+3.0 ± {T[2] * 1.0:.1f}"
    assert sinkd == "–"


def test_cost_is_relative_to_the_baseline(tree, page):
    tree.run("fair/rte/kl/0", 0.6, seconds=2.0)
    tree.run("fair/rte/jsd/0", 0.6, seconds=3.0)
    tree.run("fair/rte/jsd/1", 0.6, seconds=4.0)
    cells = row(section(page(), "## Cost"), "RTE")
    losses = list(load_protocol("fair").losses)
    assert cells[0] == "0.200"
    assert cells[1 + losses.index("kl")] == "1.00"
    assert cells[1 + losses.index("jsd")] == "1.50"  # of the fastest
    assert cells[1 + losses.index("tvd")] == "–"


def test_tuning_shows_all_candidates_and_the_one_chosen(tree, page):
    tree.run("fair/rte/kl/0", 0.6)
    for number, score in enumerate((0.55, 0.51, 0.52)):
        tree.run(f"fair/rte/kl/{number}", score, tuning=True)
    table = section(page(), "### RTE")
    first = load_protocol("fair").losses["kl"]["candidates"][0]
    label = ", ".join(f"{name} {setting_value(value)}" for name, value in first.items())
    main, held_out = table.split("<details>")
    assert row(main, "KL")[-1] == label.replace("_", " ")
    cells = row(held_out, "KL")
    assert [cell.split(": ")[1] for cell in cells] == ["**55.0**", "51.0", "52.0"]


def test_results_made_as_the_protocols_say_show_no_departure(tree, page):
    for protocol in ("author", "fair", "sensitivity"):
        for loss in load_protocol(protocol).losses:
            tree.run(f"{protocol}/rte/{loss}/0", 0.6)
    tree.run("fair/rte/kl/0", 0.55, tuning=True)
    text = section(page(), "### Departures from the protocols")
    # These are not the published models, which is all.
    assert text.count(": none.") == 2
    assert {line.split(" | ")[1] for line in text.splitlines() if line.startswith("| RTE")} == {
        "teacher",
        "student",
    }


def test_departures_are_found_by_name_and_value(tree, page):
    for loss in load_protocol("author").losses:
        tree.run(f"author/rte/{loss}/0", 0.6, freeze_embeddings=True)
    tree.run("author/rte/kl/0", 0.6, freeze_embeddings=True, train_rows=1000)
    tree.run("author/rte/sinkd/0", 0.6, freeze_embeddings=True, **{"loss.sinkhorn_weight": 8.0})
    tree.run("fair/rte/kl/0", 0.6, precision="bf16")
    tree.run("fair/rte/jsd/0", 0.6)
    # Losses of one title are told apart by their names.
    tree.run("sensitivity/rte/batch_8/0", 0.6, batch_size=9)
    tree.run("sensitivity/rte/batch_16/0", 0.6)
    tree.run("fair/rte/kl/1", 0.7, tuning=True, epochs=77)
    text = section(page(), "### Departures from the protocols")
    assert row(text, "RTE", "freeze embeddings") == ["no", "yes", "all"]
    assert row(text, "RTE", "train rows") == ["2,490", "1,000", "KL"]
    assert row(text, "RTE", "sinkhorn weight") == ["0.8", "8", "SinKD"]
    assert row(text, "RTE", "epochs")[1:] == ["77", "KL"]
    # The student has candidate 0, and the one candidate on file is another.
    assert row(text, "RTE", "candidate")[2] == "KL"
    assert row(text, "RTE", "batch size") == ["8", "9", "batch_8"]
    assert "precision" not in text  # auto stands for either


def test_a_task_that_was_not_run_says_why(tree, page):
    tree.run("fair/rte/kl/0", 0.6)
    (tree.root / "notes.toml").write_text(
        '[fair]\ncommands = ["otkd compare rte"]\n'
        '[fair.QNLI]\nreason = "no training file at hand"\n'
        '[fair.RTE]\nreason = "still running"\n'
    )
    text = page()
    assert "    otkd compare rte\n" in section(text, "## What was run")
    wanted = len(load_protocol("fair").losses) * 5
    assert f"- fair, RTE: 1 of {wanted} students: still running." in text
    wanted = "ot run (0 of 5 seeds): no training file at hand."
    assert f"N{wanted}" in section(text, "### QNLI")
    assert f"- fair, QNLI: n{wanted}" in text
    assert section(text, "### QQP").endswith("Not run (0 of 5 seeds).\n")


def rewritten(path, **fields):
    write_result(path, dataclasses.replace(read_result(path), **fields))


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (lambda path: path.write_text(path.read_text()[:99]), "is not whole JSON"),
        (
            lambda path: path.write_text(path.read_text().replace('"epochs": ', '"epochs": 9')),
            "does not fit its content hash",
        ),
        (
            lambda path: path.write_text(path.read_text().replace('"accuracy": 0.9', '"f1": 0.9')),
            "does not fit its content hash",
        ),
        (
            lambda path: path.write_text(path.read_text().replace(": 0.95", ": NaN")),
            "is not whole JSON (NaN is no number of JSON)",
        ),
        (lambda path: path.rename(path.with_name("7.json")), "says that it is of seed 1"),
        (lambda path: path.rename(path.with_name("x.json")), "its name is not a number"),
        (lambda path: shutil.copy(path, path.parent.parent / "jsd"), "it is of rte, kl"),
        (lambda path: rewritten(path, teacher_logits="u"), "another teacher"),
        (
            lambda path: rewritten(path, headline="f1", metrics={"f1": 0.95}),
            "does not have a number",
        ),
        (
            lambda path: rewritten(
                path, metrics={}, agreement=None, status="diverged", reason="the loss is nan"
            ),
            "its training diverged after 10 steps: the loss is nan",
        ),
    ],
)
def test_bad_files_are_left_out_and_named(tree, tmp_path, harm, why):
    tree.run("fair/rte/jsd/0", 0.5)
    tree.run("fair/rte/kl/0", 0.6)
    tree.teacher("fair/rte", 0.7)
    harm(tree.run("fair/rte/kl/1", 0.95))
    output = tmp_path / "glue.md"
    said = " ".join(report(tree, output).output.split())
    assert why in said
    text = output.read_text(encoding="utf-8")
    assert why in text.split("Left out:")[1].split("###")[0]
    table = section(text, "### RTE")
    assert row(table, "JSD")[0] == "50.0 ± – (1 of 5 seeds)"
    if "rte, kl" not in why:
        assert row(table, "KL")[0] == "60.0 ± – (1 of 5 seeds)"


def test_folders_of_no_protocol_task_or_loss_are_named(tree, page):
    tree.run("fair/rte/kl/0", 0.6)
    source = tree.root / "fair" / "rte" / "kl"
    for other in ("fiar/rte/kl", "fair/rt/kl", "fair/rte/lk"):
        shutil.copytree(source, tree.root / other)
    left_out = page().split("Left out:")[1]
    assert "- fiar: of no protocol" in left_out
    assert "- fair/rt: of no task" in left_out
    assert "- fair/rte/lk: the protocol 'fair' has no such loss" in left_out


def test_what_runs_leave_behind_is_not_read(tree, page):
    path = tree.run("fair/rte/kl/0", 0.6)
    (path.parent / "1.partial").mkdir()
    (path.parent / "1.partial" / "settings.json").write_text("{}")
    (path.parent.parent / "summary.json").write_text("{}")
    text = page()
    assert "from 1 result file (" in text
    assert "Left out" not in text


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "is not a folder"),
        ({}, "holds no result of a student"),
        ({"fair/rte/kl/0.json": "{"}, "fair/rte/kl/0.json: is not whole JSON"),
        ({"notes.toml": "[fair.rte]\nwhy = 1"}, "reason = "),
        ({"notes.toml": "[fair"}, "notes.toml is not made of"),
        ({"diagnosis.json": "[1]"}, 'is not a list of {"title"'),
    ],
)
def test_mistakes_are_said_and_nothing_is_written(tree, tmp_path, files, message):
    if files is not None:
        tree.root.mkdir()
        if not {"fair/rte/kl/0.json"} & {*files} and files:
            tree.run("fair/rte/kl/0", 0.6)
        for name, text in files.items():
            (tree.root / name).parent.mkdir(parents=True, exist_ok=True)
            (tree.root / name).write_text(text)
    said = " ".join(report(tree, tmp_path / "docs" / "glue.md", code=1).output.split())
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "docs").exists()


def test_a_page_that_cannot_be_finished_is_not_begun(tree, tmp_path):
    tree.runs("fair/rte/kl", [0.6, 0.61])
    tree.runs("fair/rte/jsd", [0.6, 0.61])
    output = tmp_path / "docs" / "glue.md"
    output.parent.mkdir()
    output.write_text("before")
    (output.parent / "images").write_text("in the way of the folder")
    assert "cannot be written" in report(tree, output, code=1).output.replace("\n", " ")
    assert output.read_text() == "before"
    assert sorted(path.name for path in output.parent.iterdir()) == ["glue.md", "images"]


def whole_tree(tree):
    tree.runs("author/rte/kl", [0.60, 0.61], evaluations=(0.62, 0.60))
    tree.runs("author/rte/sinkd", [0.60, 0.62], evaluations=(0.63, 0.60))
    tree.runs("fair/rte/kl", [0.6, 0.61])
    tree.runs("fair/rte/jsd", [0.6, 0.62])
    for loss in load_protocol("sensitivity").losses:
        tree.runs(f"sensitivity/rte/{loss}", [0.6, 0.61])


def test_the_same_results_make_the_same_files(tree, tmp_path):
    whole_tree(tree)
    output = tmp_path / "docs" / "glue.md"

    def files():
        found = [path for path in output.parent.rglob("*") if path.is_file()]
        return {path.relative_to(output.parent).as_posix(): path.read_bytes() for path in found}

    report(tree, output)
    first = files()
    images = {name for name in first if name != "glue.md"}
    assert {"images/glue-fair.svg", "images/glue-best.svg"} < images
    for name in images:
        assert ElementTree.fromstring(first[name]).tag.endswith("svg")
        assert f"]({name})" in first["glue.md"].decode()
    assert first["glue.md"].decode().count("](images/") == len(images)
    # In a process of its own neither hash seeds nor counters are the same.
    command = ["report", "glue", "--results-dir", tree.root, "--output", output]
    for path in output.parent.rglob("*.*"):
        path.unlink()
    subprocess.run([sys.executable, "-m", "otkd.cli.app", *map(str, command)], check=True)
    assert files() == first
    # Time and agreement alone are in no table; the page still tells these files from those.
    path = tree.root / "fair" / "rte" / "jsd" / "0.json"
    write_result(path, dataclasses.replace(read_result(path), agreement=0.8))
    report(tree, output)
    changed = {name for name, content in files().items() if content != first[name]}
    assert changed == {"glue.md"}


def test_curves_run_over_their_setting(tree, page):
    whole_tree(tree)
    shutil.rmtree(tree.root / "sensitivity")
    tree.runs("sensitivity/rte/kl", [0.60, 0.61, 0.62])
    tree.runs("sensitivity/rte/batch_l1", [0.61, 0.62, 0.63])
    tree.runs("sensitivity/rte/weight_10", [0.59, 0.60, 0.61])
    tree.runs("sensitivity/rte/batch_8", [0.63, 0.64, 0.65])
    tree.runs("sensitivity/rte/kl_batch_8", [0.64, 0.65, 0.66])
    text = page()
    title = load_protocol("sensitivity").losses["batch_l1"]["title"]
    weights = section(text, "### Sinkhorn weight")
    assert row(weights, title, "0.1")[1] == "**+1.0 ± 0.0**"
    assert row(weights, title, "10")[1] == "**−1.0 ± 0.0**"
    assert row(weights, "KL", "any")[0] == "61.0 ± 2.5"
    # At each batch size the difference is to KL at that size.
    sizes = section(text, "### Batch size")
    assert row(sizes, title, "8")[1] == "**−1.0 ± 0.0**"
    assert row(sizes, title, "32")[1] == "**+1.0 ± 0.0**"
    assert row(sizes, "KL", "8")[:2] == ["65.0 ± 2.5", "–"]
    assert "Not run." in section(text, "### Iterations")
    tree.runs("sensitivity/rte/sinkd", [0.62, 0.63, 0.64])
    made = section(page(), "### Iterations")  # by the public code, where nothing else is said
    assert row(made, "SinKD, public code", "20")[1] == "**+2.0 ± 0.0**"


def test_the_teacher_is_laid_against_hard_labels(tree, page):
    tree.runs("fair/rte/ce", [0.60, 0.61, 0.62])
    tree.runs("fair/rte/kl", [0.60, 0.62, 0.61])
    tree.teacher("fair/rte", 0.7)
    tree.runs("fair/mrpc/ce", [{"f1": f1, "accuracy": 0.5} for f1 in (0.60, 0.80)])
    tree.teacher("fair/mrpc", {"f1": 0.7, "accuracy": 0.7})
    lines = section(page(), "### Is there anything to teach?").splitlines()
    rte = next(line for line in lines if line.startswith("- RTE"))
    assert "**+9.0 ± 2.5**; the teacher is above them" in rte
    assert "KL − hard labels alone: +0.0 ± 2.5." in rte
    mrpc = next(line for line in lines if line.startswith("- MRPC"))
    assert "not apart from 0" in mrpc


@pytest.mark.parametrize(("right", "doubted"), [(0.57, True), (0.65, False)])
def test_a_teacher_that_may_be_lucky_is_doubted(tree, page, right, doubted):
    """158 of 277 rows right are what 146 expected ones give in one of twelve samples."""
    tree.runs("fair/rte/ce", [0.53, 0.54, 0.55])
    tree.runs("fair/rte/kl", [0.53, 0.55, 0.54])
    tree.teacher("fair/rte", right, {"accuracy": 0.527})
    text = section(page(), "### Is there anything to teach?")
    assert ("no loss can be judged by this task" in text) == doubted
    assert ("with probability 0.08" in text) == doubted


def test_more_seeds_of_one_loss_do_not_stand_for_another(tree, page):
    tree.runs("sensitivity/cola/kl", [0.2] * 5)
    tree.runs("sensitivity/cola/sinkd", [0.2])
    text = section(page(), "## What was run")
    wanted = 3 * len(load_protocol("sensitivity").losses)
    assert f"| 4 of {wanted} |" in text
    assert f"- sensitivity, CoLA: 4 of {wanted} students." in text


def test_chance_counts_what_losses_share():
    """Losses that are all the same are above together or not at all."""
    one = [0.02, 0.03, 0.02, 0.03, 0.025]
    mean, chance = chance_of_counts([[one] * 4], 1)
    assert (mean, chance) == (4 / 32, 1 / 32)
    assert chance_of_counts([[one] * 4], 4)[1] == 1 / 32
    assert chance_of_counts([[one], [one]], 1)[1] == pytest.approx(1 - (31 / 32) ** 2)
    assert chance_of_counts([[one], [one]], 2)[1] == pytest.approx(1 / 32**2)
    missing = [[0.02, 0.03, math.nan, 0.03, 0.025], one]
    assert chance_of_counts([missing], 2)[1] == 1 / 32


def test_the_majority_class_stands_beside_what_is_learned(tree, page):
    for protocol in ("author", "fair"):
        tree.runs(f"{protocol}/rte/kl", [0.53, 0.54, 0.55])
        tree.runs(f"{protocol}/rte/{'sinkd' if protocol == 'author' else 'ce'}", [0.53, 0.55, 0.54])
        tree.teacher(f"{protocol}/rte", 0.58, {"accuracy": 0.527})
    text = page()
    assert "| majority class | 52.7 | – | – | – |" in text
    assert "| RTE, accuracy | majority class | – | 52.7 | – | – |" in text
    assert text.count("- RTE: teacher +5.3, students of KL +1.3 ± 2.5") == 2


def test_results_older_than_the_majority_class_are_read(tree, page):
    tree.runs("fair/rte/kl", [0.5, 0.6])
    tree.teacher("fair/rte", 0.7)
    path = tree.root / "fair" / "rte" / "teacher" / "result.json"
    content = json.loads(path.read_text())
    del content["majority_metrics"]
    path.write_text(json.dumps(content))
    assert "majority class" not in page()


@pytest.mark.parametrize("better", [1, 3])
def test_few_losses_above_are_left_to_chance(tree, page, better):
    noise = [0.0, 0.01, 0.02, 0.01, 0.0]
    tree.runs("fair/rte/kl", [0.60 + x for x in noise])
    for number, loss in enumerate(("jsd", "tvd", "rkl", "sinkd", "sinkhorn")):
        up = 0.05 if number < better else 0.0
        tree.runs(f"fair/rte/{loss}", [0.60 + up + x for x in noise[1:] + noise[:1]])
    advice = section(page(), "### What to use")
    # Of 32 changes of sign one is none; two others lift all losses but the better ones at once.
    assert ("1 or more above with probability 0.09" in advice) == (better == 1)
    assert ("3 or more above with probability 0.03" in advice) == (better == 3)
    assert ("So few above 0 are what chance gives: use KL." in advice) == (better == 1)
    assert ("- JSD: above on RTE, below on none, of 1 task." in advice) == (better == 3)


def test_a_loss_that_has_learnt_nothing_is_not_recommended(tree, page):
    noise = [0.0, 0.01, 0.02, 0.01, 0.0]
    tree.runs("fair/rte/kl", [0.49 + x for x in noise])
    tree.runs("fair/rte/jsd", [0.52 + x for x in noise])
    tree.teacher("fair/rte", 0.58, {"accuracy": 0.527})
    advice = section(page(), "### What to use")
    assert "1 of 1 comparison of a loss with KL is above 0" in advice
    assert "most frequent in training, so no reason to use it: JSD on RTE." in advice
    assert "**Use KL.**" in advice
    assert "Worth trying" not in advice


@pytest.mark.parametrize("labels", [0.55, 0.60])
def test_without_a_better_loss_the_advice_is_the_baseline(tree, page, labels):
    noise = [0.0, 0.01, 0.02, 0.01, 0.0]
    tree.runs("fair/rte/kl", [0.60 + x for x in noise])
    tree.runs("fair/rte/jsd", [0.60 + x for x in reversed(noise[1:] + noise[:1])])
    tree.runs("fair/rte/ce", [labels + x / 2 for x in noise])
    advice = section(page(), "### What to use")
    assert "**No loss is apart above KL on any task: use KL.**" in advice
    assert ("KL is above hard labels alone on RTE." in advice) == (labels < 0.6)
    assert ("these seeds cannot tell" in advice) == (labels == 0.6)


def test_models_other_than_the_published_are_departures(tree):
    tree.run("author/rte/kl/0", 0.6)
    tree.run("author/rte/sinkd/0", 0.6, teacher="big-encoder", student="half-encoder")
    study = collect(tree.root, ("rte",)).studies["author"]
    assert departures(study, {}) == []
    found = departures(study, {"teacher": "big-encoder", "student": "half-encoder"})
    assert found == [
        Departure("rte", "teacher", "big-encoder", "small-encoder", ("kl",)),
        Departure("rte", "student", "half-encoder", "3 layers of the teacher", ("kl",)),
    ]


def test_a_protocol_that_prepares_the_others_is_shown(tree, page):
    tree.run("fair/rte/kl/0", 0.6)
    for number, score in enumerate((0.51, 0.53, 0.52)):
        tree.run(f"pilot/rte/ce/{number}", score, tuning=True)
    text = page()
    (heading,) = (line for line in text.splitlines() if line.startswith("## The protocol `pilot`"))
    cells = row(section(text, heading), "hard labels alone")
    assert [cell.split(": ")[1] for cell in cells] == ["51.0", "**53.0**", "52.0"]


def test_a_diagnosis_is_shown_as_it_is_before_the_verdict(tree, page):
    tree.run("fair/rte/kl/0", 0.6)
    section_of = {"title": "A | B", "lines": ["As it *is*."]}
    section_of["table"] = {"columns": ["", "start"], "rows": [["ratio", "0.1"]]}
    (tree.root / "diagnosis.json").write_text(json.dumps([section_of]))
    text = page()
    why = section(text, "## Why")
    assert "As it *is*." in why
    assert row(why, "ratio") == ["0.1"]
    assert text.index("## Why") < text.index("## Verdict")


def test_the_report_needs_no_training_library(tree, tmp_path):
    tree.run("fair/rte/kl/0", 0.6)
    code = (
        "import sys; sys.argv = sys.argv[:1] + sys.argv[2:]\n"
        "from otkd.cli.app import app\n"
        "try: app()\nexcept SystemExit as stop: assert not stop.code\n"
        "assert not {'transformers', 'datasets', 'torchmetrics'} & set(sys.modules)"
    )
    command = ["report", "glue", "--results-dir", tree.root, "--output", tmp_path / "glue.md"]
    subprocess.run([sys.executable, "-c", code, "-", *map(str, command)], check=True)


def test_published_figures_are_read_with_their_metrics():
    content = {
        "source": "S",
        "tasks": ["MRPC", "mnli"],
        "scores": {"sinkd": [90.0, [80.0, 81.0]]},
        "unconfirmed": {"kl": [89.0, [79.0, 79.5]]},
    }
    published = read_published(content)
    assert published.difference("sinkd", "kl", "mrpc", "f1") == pytest.approx(0.01)
    assert published.difference("sinkd", "kl", "mnli", "mismatched_accuracy") == pytest.approx(
        0.015
    )
    assert published.difference("sinkd", "jsd", "mrpc", "f1") is None
    assert published.unconfirmed == {"kl"}


SCORES = st.dictionaries(st.integers(0, 6), st.integers(0, 1000).map(lambda n: n / 1000))


@given(SCORES, SCORES)
def test_paired_differences_are_antisymmetric_and_of_shared_seeds(first, second):
    there, back = paired_difference(first, second), paired_difference(second, first)
    shared = sorted({*first} & {*second})
    if not shared:
        assert there is None
        assert back is None
        return
    assert there.seeds == tuple(shared)
    assert there.mean == pytest.approx(-back.mean)
    assert there.interval == pytest.approx(back.interval) or there.interval is None
    only = estimate([first[seed] for seed in shared])
    assert there.mean == pytest.approx(
        only.mean - estimate([second[seed] for seed in shared]).mean, abs=1e-12
    )
    # The same added to both seeds' scores changes nothing.
    moved = paired_difference(
        {seed: value + seed for seed, value in first.items()},
        {seed: value + seed for seed, value in second.items()},
    )
    assert moved.mean == pytest.approx(there.mean, abs=1e-9)
    assert (moved.interval is None) == (len(shared) == 1)


def test_values_are_written_for_readers():
    assert [setting_value(v) for v in (4e-4, 2.5e-5, 0.8, 1.0, 3, True, None, "l1")] == [
        *("4e-4", "2.5e-5", "0.8", "1", "3", "yes", "–", "l1"),
    ]
