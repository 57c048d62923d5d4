"""docs/glue.md is what the committed results say, and its statistics are right."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import shutil
from dataclasses import fields
from pathlib import Path

import glue_report
import glue_tables
import numpy as np
import pandas as pd
import pytest
from glue_results import (
    adjusted_pvalues,
    chance_of_teacher,
    difference,
    gain_of_best,
    gaps_to_baseline,
    holm,
    interval,
    read_published,
    read_studies,
    wins_by_chance,
)
from scipy import stats

from otkd.study.objectives import objective_options
from otkd.study.results import read_result, write_result
from otkd.study.settings import Settings
from otkd.tasks import get_task

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "glue"
PAGE = (ROOT / "docs" / "glue.md").read_text(encoding="utf-8")
TASKS = ("cola", "sst2", "mrpc", "rte")


@pytest.fixture(scope="module")
def studies():
    return read_studies(RESULTS)


@pytest.fixture(scope="module")
def tables(studies):
    return glue_report.tables(RESULTS, studies)


# The page ----------------------------------------------------------------------------------------


def test_the_tables_of_the_page_are_those_of_the_results(tables):
    assert glue_report.fill(PAGE, tables) == PAGE


def test_every_result_is_read(studies):
    files = [path for path in RESULTS.rglob("*.json") if path.stem.isdecimal()]
    files += RESULTS.rglob("teacher/result.json")
    assert sum(len(study.runs) for study in studies.values()) == len(files) > 600


def test_the_plot_is_that_of_the_results_and_none_is_left_over(tables):
    shown = re.findall(r"\]\((images/.*?)\)", PAGE)
    found = (ROOT / "docs" / "images").glob("glue-*.svg")
    assert sorted(shown) == sorted(f"images/{path.name}" for path in found)
    assert tables["fair"] in (ROOT / "docs" / shown[0]).read_text(encoding="utf-8")


def numbers(text):
    """The numbers of a text, with their intervals; not those in names such as SST-2."""
    return re.findall(r"(?<![\w-])[+−]?\d+(?:\.\d+)?(?: ± \d+\.\d+)?", " ".join(text.split()))


def test_the_numbers_of_the_conclusions_are_those_of_the_results(studies, tables):
    """All of them, in their order, bullet by bullet."""
    fair, author, sensitivity = (studies[name] for name in ("fair", "author", "sensitivity"))
    cola, sst2, mrpc, rte = map(get_task, TASKS)

    def gap(task, loss, baseline="kl", study=fair, metric=""):
        found = difference(study.scores(task, metric), loss, baseline)
        return glue_tables.gap(found, found.seeds).strip("*")

    def above_majority(task):
        return glue_tables.gap(to_majority(fair, task, "kl"), 5).strip("*")

    total = tables["wins"].splitlines()[-1].strip("| ").split(" | ")
    _, compared, better, _, chance, worse, corrected = total
    f1 = fair.scores(mrpc)[["jsd", "batch_hidden"]].mean()
    majority = 100 * fair.teacher(mrpc).majority_metrics["f1"]
    guess = chance_of_teacher(rte, fair.teacher(rte))
    published, _ = read_published()
    theirs = published.rsub(published["sinkd"], axis=0)[["kl", "rkl", "jsd", "tvd"]]
    here, signed, outside = judged(author, theirs)
    again, kept, outside_again = judged(fair, theirs)
    curves = re.findall(r"\(.*?\)", tables["sensitivity"])
    evaluations = [len(run.evaluations) for run in students(author).result]
    gains = gains_of_best(author)
    conclusions = [
        f"5 {better} {compared} {worse} {better} {chance} {compared} {corrected} "
        f"{gap(mrpc, 'batch_sample')}",
        f"{gap(mrpc, 'jsd')}, {gap(mrpc, 'batch_hidden')}, {f1.jsd:.1f} {f1.batch_hidden:.1f} "
        f"{majority:.1f} {gap(mrpc, 'batch_hidden', metric='accuracy')[1:]} {gap(rte, 'tvd')} "
        f"{guess:.2f}",
        " ".join(gap(cola, loss) for loss in ("batch_hidden", "batch_sample", "sinkhorn")),
        f"4 {' '.join(gap(task, 'kl', 'ce') for task in (cola, sst2, mrpc, rte))} "
        f"{above_majority(mrpc)} {above_majority(rte)}",
        f"{100 * author.teacher(cola).score:.1f} {published.teacher.cola} {theirs.size} {here} "
        f"{signed} {gap(rte, 'sinkd', 'rkl', author)} {theirs.rkl.rte:+.1f} {here - signed} "
        f"{again} {kept} {outside} {here} {outside_again} {again}",
        f"2 {gap(cola, 'sinkd_t2', 'sinkd')} 4 {gap(cola, 'sinkd_t2')}",
        f"{len(curves)} {sum('**' in each for each in curves)} 10 "
        f"{gap(cola, 'weight_10', study=sensitivity)} {gap(sst2, 'weight_10', study=sensitivity)} "
        "0.1",
        f"{min(evaluations)} {max(evaluations)} {gains.min():.1f} {gains.max():.1f}",
    ]
    bullets = PAGE.split("## Conclusions")[1].split("\nThe intervals")[0].split("\n- ")[1:]
    assert [numbers(bullet) for bullet in bullets] == [numbers(text) for text in conclusions]


def test_what_the_conclusions_say_without_a_number_is_so(studies):
    fair = studies["fair"]
    scores = {task: fair.scores(task) for task in map(get_task, TASKS)}
    for task, table in scores.items():
        for loss in ("sinkd", "sinkd_t2", "batch_l1"):
            assert not difference(table, loss, "kl").significant
        assert not difference(table, "kl", "ce").significant
        assert difference(table, "sinkd_t2", "sinkd").significant == (task.name == "cola")
        assert interval(100 * fair.teacher(task).score - table["ce"]).significant
    for task, loss in (("mrpc", "jsd"), ("mrpc", "batch_hidden"), ("rte", "kl")):
        assert not to_majority(fair, get_task(task), loss).significant
    gaps = {task.name: gaps_to_baseline(table) for task, table in scores.items()}
    kept = [place for place, p in adjusted_pvalues(gaps).items() if p < 0.05]
    assert kept == [("mrpc", "batch_sample")]
    gained = np.concatenate([table.mean() for table in gaps.values()])
    assert np.mean(gained < gains_of_best(studies["author"]).min()) > 0.5


def students(study):
    return study.runs[study.runs.role == "student"]


def to_majority(study, task, loss):
    majority = study.teacher(task).majority_metrics[task.headline]
    return interval(study.scores(task)[loss] - 100 * majority)


def gains_of_best(study):
    """The mean gain of the best evaluation over the last, by task and loss."""
    runs = students(study)
    gains = runs.assign(gain=[gain_of_best(run) for run in runs.result])
    return gains.groupby(["task", "loss"]).gain.mean()


def judged(study, theirs):
    """How many published differences can be tested, are significant, are not in the interval."""
    found = [
        (difference(study.scores(get_task(task)), "sinkd", loss), value)
        for task, row in theirs.iterrows()
        for loss, value in row.items()
    ]
    found = [(ours, value) for ours, value in found if ours and ours.seeds > 1]
    outside = sum(abs(value - ours.mean) > ours.half for ours, value in found)
    assert all(ours.mean * value > 0 for ours, value in found if ours.significant)
    return len(found), sum(ours.significant for ours, _ in found), outside


def test_the_numbers_of_the_diagnosis_are_those_of_its_table(tables):
    rows = [line.strip("| ").split(" | ") for line in tables["gradients"].splitlines()[2:]]
    later = {(task, name): [abs(float(x)) for x in cells[1:]] for task, name, *cells in rows}

    def largest(*words):
        return max(max(v) for (_, name), v in later.items() if all(w in name for w in words))

    text = PAGE.split("### Why transport adds little")[1]
    assert f"at most {100 * largest('ratio', 'public'):.1f} %" in text
    assert f"at most {100 * largest('own mass'):.0f} %" in text
    assert largest("cosine", "debiased") < 0.5


def test_the_runs_are_as_the_page_says(studies):
    """Machines, versions and the departures from the protocols are written by hand."""
    runs = pd.concat(study.runs for study in studies.values())
    for run in runs.result:
        assert (run.machine["processor"], run.machine["device"]) == ("AMD EPYC", "cpu")
        assert run.machine["cores"] == 2
        for name, version in run.versions.items():
            assert name == "otkd" or version.removesuffix("+cpu") in PAGE
    found = {}
    for run in runs[runs.role != "teacher"].itertuples():
        plan, made = planned(studies[run.protocol], run), run.result.settings
        for name in {*plan, *made}:
            known = name.startswith("loss.") or {name} <= plan.keys() & made.keys()
            if known and plan.get(name) != made.get(name):
                found.setdefault((run.protocol, name), set()).add((run.task, made.get(name)))
    three = ("cola", "mrpc", "rte")
    assert found == {
        ("author", "freeze_embeddings"): {(task, True) for task in three},
        ("author", "precision"): {(task, "bf16") for task in three},
        ("author", "evaluate_every"): {("cola", 50)},
    }


def planned(study, run):
    """The settings of a run by its protocol; a student has those of the best candidate."""
    shared = study.protocol.resolve(Settings(run.task), ())
    (objective,) = study.protocol.objectives(shared, (), [run.loss])
    tuning, more = study.protocol.tuning, {}
    if run.role == "candidate":
        chosen = objective.tried(**tuning.settings)[run.number]
        more = {"tuning_rows": tuning.train_rows, "held_out": tuning.held_out}
    else:
        held_out = study.scores(get_task(run.task), role="candidate")[run.loss]
        chosen = objective.tried()[held_out.idxmax() if held_out.any() else 0]
    options = objective_options(chosen.loss, chosen.settings)
    more |= {"loss": chosen.loss, **{f"loss.{name}": value for name, value in options.items()}}
    plan = {item.name: getattr(chosen.settings, item.name) for item in fields(Settings)} | more
    # These are left to the machine and the command line.
    is_open = {"teacher": None, "student": None, "precision": "auto"}
    return {name: value for name, value in plan.items() if is_open.get(name, "") != value}


# Statistics --------------------------------------------------------------------------------------


def test_differences_are_paired_over_shared_seeds():
    scores = pd.DataFrame({"a": [1.0, 2.0, 4.0, np.nan], "b": [0.5, 1.0, np.nan, 3.0]})
    found, back = difference(scores, "a", "b"), difference(scores, "b", "a")
    low, high = stats.ttest_rel([1.0, 2.0], [0.5, 1.0]).confidence_interval()
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    assert (found.seeds, back.mean, back.half) == (2, -found.mean, found.half)
    assert interval(scores["a"] * np.nan) is None
    one = interval(scores["a"][:1])
    assert math.isnan(one.half)
    assert not one.significant


def test_an_interval_that_excludes_zero_is_that_of_a_small_p_value():
    generator = np.random.default_rng(0)
    for _ in range(50):
        values = pd.Series(generator.normal(1, 1, size=5))
        assert interval(values).significant == (stats.ttest_1samp(values, 0).pvalue < 0.05)


def test_wins_by_chance_are_those_of_all_changes_of_sign():
    generator = np.random.default_rng(1)
    tasks = [generator.normal(1, 0.7, (seeds, losses)) for seeds, losses in ((3, 2), (4, 3))]
    tasks[0][1, 0] = np.nan
    counts = []
    for signs in itertools.product((1, -1), repeat=3 + 4):
        changed = (
            np.reshape(signs[:3], (3, 1)) * tasks[0],
            np.reshape(signs[3:], (4, 1)) * tasks[1],
        )
        found = [interval(pd.Series(column)) for task in changed for column in task.T]
        counts.append(sum(each.significant and each.mean > 0 for each in found))
    frames = [pd.DataFrame(task) for task in tasks]
    for wins in range(4):
        expected, chance = wins_by_chance(frames, wins)
        assert expected == pytest.approx(np.mean(counts))
        assert chance == pytest.approx(np.mean(np.array(counts) >= wins))
    # Losses that are all the same win together.
    same = pd.DataFrame(np.tile([[2.0], [3.0], [2.0], [3.0], [2.5]], 4))
    assert wins_by_chance([same], 4) == pytest.approx((4 / 32, 1 / 32))


def test_corrected_p_values_are_those_of_all_joint_hypotheses():
    """Holm's method is the closed test whose joint hypotheses are tested by Bonferroni's."""
    pvalues = [0.04, 0.001, 0.3, 0.02, 0.011]
    groups = [g for n in range(1, 6) for g in itertools.combinations(range(5), n)]
    naive = [
        max(min(1, len(g) * min(pvalues[j] for j in g)) for g in groups if i in g) for i in range(5)
    ]
    assert holm(pvalues) == pytest.approx(naive)


def test_how_likely_a_guess_as_good_as_the_teacher_is(studies):
    rte, teacher = get_task("rte"), studies["fair"].teacher(get_task("rte"))
    right, guess = round(teacher.score * 277), teacher.majority_metrics["accuracy"]
    naive = sum(math.comb(277, n) * guess**n * (1 - guess) ** (277 - n) for n in range(right, 278))
    assert chance_of_teacher(rte, teacher) == pytest.approx(naive)
    table = np.array([[30, 20], [15, 35]])
    numerator = np.linalg.det(table)
    phi = numerator / math.sqrt(np.prod(table.sum(0)) * np.prod(table.sum(1)))
    teacher = dataclasses.replace(
        teacher, headline="mcc", metrics={"mcc": phi}, rows={"train": 1, "dev": int(table.sum())}
    )
    expected = stats.chi2_contingency(table, correction=False).pvalue
    assert chance_of_teacher(get_task("cola"), teacher) == pytest.approx(expected)


# The script --------------------------------------------------------------------------------------


@pytest.fixture
def some(tmp_path):
    """A folder of results of few runs, and a page that does not exist yet."""
    root = tmp_path / "results"
    for name in ("teacher/result", "kl/0", "kl/1", "jsd/0", "jsd/1", "jsd/tuning/0"):
        path = root / "fair" / "rte" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(RESULTS / "fair" / "rte" / f"{name}.json", path)
    return root, tmp_path / "page.md"


def test_a_page_of_few_results_can_be_made_and_kept(some):
    root, page = some
    glue_report.main(root, page)
    text = page.read_text(encoding="utf-8")
    first, second = (read_result(root / f"fair/rte/kl/{seed}.json").score for seed in (0, 1))
    assert f"| KL | {50 * (first + second):.1f} ± " in text
    assert (page.parent / "images" / "glue-fair.svg").is_file()
    page.write_text(text.replace("## fair", "## By hand"), encoding="utf-8")
    glue_report.main(root, page)
    assert page.read_text(encoding="utf-8") == text.replace("## fair", "## By hand")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (shutil.rmtree, "has no results"),
        (lambda root: (root / "fair/rte/kl/0.json").write_text("{"), "kl/0.json is not whole JSON"),
        (
            lambda root: shutil.copy(root / "fair/rte/kl/0.json", root / "fair/rte/jsd/0.json"),
            "jsd/0.json is a result of rte and kl",
        ),
        (
            lambda root: shutil.copy(root / "fair/rte/kl/0.json", root / "fair/rte/kl/7.json"),
            "kl/7.json is a result of seed 0",
        ),
        (lambda root: (root / "fair/rte/teacher/result.json").unlink(), "no teacher/result.json"),
        (lambda root: rewrite(root, teacher_logits="another"), "results of different teachers"),
        (lambda root: rewrite(root, status="diverged", reason="nan"), "a run that diverged"),
        (lambda root: (root / "fair").rename(root / "fiar"), "no protocol 'fiar'"),
        (lambda root: (root / "notes.toml").write_text("[fair"), "notes.toml cannot be read"),
        (lambda root: (root / "diagnosis.json").write_text("[1]"), "is not what glue_diagnosis.py"),
    ],
)
def test_results_that_cannot_be_used_are_named(some, harm, message):
    root, page = some
    harm(root)
    with pytest.raises(SystemExit, match=re.escape(message)):
        glue_report.main(root, page)
    assert not page.exists()


def rewrite(root, **changes):
    path = root / "fair/rte/kl/0.json"
    result = read_result(path)
    if "status" in changes:
        changes |= {"metrics": {}, "agreement": None}
    write_result(path, dataclasses.replace(result, **changes))


@pytest.mark.parametrize("text", ["", "<!-- table: fiar -->\n<!-- end -->"])
def test_a_page_without_the_markers_is_not_changed(some, text):
    root, page = some
    page.write_text(text)
    with pytest.raises(SystemExit, match="Missing, unknown or repeated"):
        glue_report.main(root, page)
    assert page.read_text() == text
