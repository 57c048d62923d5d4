"""The benchmarks at tiny sizes: that every row runs and says what it should.

The figures themselves are of no meaning at these sizes, but for errors, which have their bounds.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from filelock import FileLock
from typer.testing import CliRunner

from otkd.losses.divergences import DivergenceLoss

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
ROWS = ("dense", "topk", "accuracy", "sizes")


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_rows(output: Path, *rows: str, extra: tuple[str, ...] = ()) -> str:
    where = ("--output", str(output))
    options = ("--quick", "--repeats", "2", "--threads", "1", "--no-keops", *extra)
    return run("run.py", "vocabulary", "--rows", ",".join(rows), *where, *options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The results of all rows, made once for all workers of a parallel run."""
    pytest.importorskip("transformers")
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    output = root / "benchmark"
    with FileLock(root / "benchmark.lock"):
        if not (output / f"{ROWS[-1]}.json").is_file():
            run_rows(output, *ROWS)
    return output


@pytest.fixture
def here(monkeypatch):
    """Calls a script in this process, which saves the imports: its output and its exit status."""
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    logger = logging.getLogger("otkd")
    level = logger.level

    def call(script: str, *arguments: str) -> tuple[str, int]:
        app = typer.Typer()
        app.command()(importlib.import_module(script).main)
        done = CliRunner().invoke(app, arguments)
        return done.output, done.exit_code

    yield call
    logger.setLevel(level)


def load(folder: Path, row: str) -> dict:
    return json.loads((folder / f"{row}.json").read_text("utf-8"))


@pytest.mark.parametrize("row", ROWS)
def test_a_row_says_what_was_measured_where(folder, row):
    result = load(folder, row)
    assert result["row"] == row
    assert result["settings"] == {"quick": True, "seed": 0, "repeats": 2, "keops": False}
    assert result["versions"]["torch"] == torch.__version__
    assert result["machine"]["cores"] >= 1
    assert result["machine"]["threads"] == 1
    assert not list(folder.glob("*.unfinished"))
    for target in result["targets"]:
        measured, limit = target["measured"], target["limit"]
        expected = None if measured is None else measured <= limit
        if target["relation"] == "≥" and measured is not None:
            expected = measured >= limit
        assert target["met"] is expected


def test_dense_agrees_with_a_solver_that_is_not_ours(folder):
    (case,) = load(folder, "dense")["cases"]
    peers = case["peers"]
    assert peers["otkd"]["gradient_error"] <= 1e-5
    assert peers["pot"]["gradient_error"] <= 1e-4
    assert peers["pot"]["value_error"] <= 1e-4
    assert case["chosen"] in case["tolerance_search"]
    assert peers["pot"]["time_scaled_by"] == case["problem"]["positions"]
    for name, ratio in case["times"].items():
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"], name


@pytest.mark.parametrize("row", ["topk", "sizes"])
def test_time_spread_and_memory_are_recorded(folder, row):
    (case,) = load(folder, row)["cases"]
    for name in ("otkd", "F.kl_div"):
        seconds = case["peers"][name]["seconds"]
        assert 0 < seconds["low"] <= seconds["median"] <= seconds["high"]
        assert seconds["repeats"] == len(seconds["rounds"]) == 2
        assert max(seconds["rounds"]) == pytest.approx(seconds["high"], rel=1e-3)
    assert case["times"]["F.kl_div"]["repeats"] == 2
    assert case["peers"]["otkd"]["peak_bytes"] > 0
    assert case["coverage_of_64"] > 0.5


def test_more_tokens_are_more_accurate(folder):
    result = load(folder, "accuracy")
    assert len(result["cases"]) == 6
    for case in result["cases"]:
        few, *_, many = (point for point in case["points"] if point["clusters"] == 1)
        assert few["k"] < many["k"]
        assert few["coverage"] < many["coverage"]
        assert few["gradient_error"] > many["gradient_error"]


def test_without_a_gpu_nothing_is_claimed(tmp_path):
    run("gpu.py", "--quick", "--repeats", "1", "--output", str(tmp_path))
    found = {path.stem: json.loads(path.read_text("utf-8")) for path in tmp_path.glob("*.json")}
    assert list(found)
    for result in found.values():
        assert result["measured"] == torch.cuda.is_available()
        if not result["measured"]:
            assert result["reason"] == "no GPU"


@pytest.mark.parametrize(("minutes", "begun"), [("0", set()), ("1.1", {"correctness.json"})])
def test_no_gpu_row_is_begun_that_might_not_be_done_in_time(here, tmp_path, minutes, begun):
    said, _ = here("gpu", "--quick", "--minutes", minutes, "--output", str(tmp_path))
    assert said.count("left for another call") == 5 - len(begun)
    assert {path.name for path in tmp_path.iterdir()} == begun


@pytest.mark.skipif(torch.cuda.is_available(), reason="only without a GPU is nothing measured")
def test_what_a_gpu_measured_outlives_a_run_without_one(here, tmp_path):
    settings = {"quick": True, "seed": 0, "repeats": 10, "keops": False}
    empty = {"schema": 1, "settings": settings, "measured": True, "cases": [], "targets": []}
    rows = ("correctness", "transport", "batch", "divergences", "language_model")
    for row in rows:
        (tmp_path / f"{row}.json").write_text(json.dumps({**empty, "row": row}), "utf-8")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    where = ("--quick", "--output", str(tmp_path))
    assert here("run", "gpu", "--no-keops", *where)[0].count("is finished") == len(rows)
    assert "not measured" not in here("gpu", *where)[0]
    for again in (("run", "gpu", "--no-keops", "--force"), ("gpu", "--seed", "1")):
        said, status = here(*again, *where)
        assert status == 0
        assert said.count("what was measured before is kept") == len(rows)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.fixture
def gpu_rows(monkeypatch):
    """The rows of a GPU on a CPU, by a name that is not just its own; no counters, no KeOps."""
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_rows

    monkeypatch.setattr(gpu_rows, "DEVICE", "cpu:0")
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3000)
    monkeypatch.setitem(sys.modules, "pykeops", None)  # which would compile for long
    return gpu_rows


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "row", ["correctness", "transport", "batch", "divergences", "language_model"]
)
def test_every_gpu_row_does_what_it_can(gpu_rows, row):
    from compare import Settings

    cases = gpu_rows.ROWS[row].__wrapped__(Settings(quick=True, repeats=1))["cases"]
    assert cases
    for case in cases:
        if row == "correctness":
            assert all(found["right"] for found in case["peers"].values())
        elif row == "transport":  # no Triton on a CPU, and torch is not passed off as KeOps
            (name,) = case["refused"]
            assert name == ("otkd, triton" if "top 64" in case["name"] else "otkd, keops")
            assert name not in case["peers"]
        else:
            ours, *_ = case["peers"].values()
            assert ours["peak_bytes"] == 2000


def test_a_gpu_row_that_fails_says_why(gpu_rows, monkeypatch, capsys):
    class CompilationError(Exception):
        pass

    def fails(settings):
        raise CompilationError("of a kernel")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    result = gpu_rows.on_gpu(fails)(None)
    assert not result["measured"]
    assert result["reason"] == "CompilationError: of a kernel"
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [("run", "divergences", "--rows", "extremes"), ("gpu", "--minutes", "0")]
)
def test_tiny_sizes_want_a_folder_of_their_own(here, arguments):
    said, status = here(*arguments, "--quick")
    assert status == 2
    assert "--output" in said


def test_what_cannot_be_is_refused_in_words(here, tmp_path):
    said, status = here("run", "vocabulary", "--threads", "-1")
    assert status == 2
    assert "--threads" in said
    file = tmp_path / "quick.json"
    for text in ("{", "[]", '{"ratios": [1]}'):
        file.write_text(text, "utf-8")
        said, status = here("quick", "--file", str(file))
        assert status == 2
        assert "holds no ratios" in said.replace("\n", " ")


def test_a_finished_row_is_kept_and_a_broken_one_made_anew(folder, tmp_path):
    for row in ("accuracy", "sizes"):
        (tmp_path / f"{row}.json").write_bytes((folder / f"{row}.json").read_bytes())
    before = (tmp_path / "accuracy.json").read_bytes()
    (tmp_path / "sizes.json").write_text("{", "utf-8")
    out = run_rows(tmp_path, "accuracy", "sizes")
    assert "accuracy is finished" in out
    assert "measuring sizes" in out
    assert (tmp_path / "accuracy.json").read_bytes() == before
    assert load(tmp_path, "sizes")["row"] == "sizes"
    assert "measuring sizes" in run_rows(tmp_path, "sizes", extra=("--seed", "1"))  # other settings


@pytest.mark.filterwarnings("ignore")
def test_more_is_measured_only_where_it_is_asked_for(here, folder, tmp_path):
    (tmp_path / "accuracy.json").write_bytes((folder / "accuracy.json").read_bytes())
    options = ("run", "vocabulary", "--rows", "accuracy", "--quick", "--output", str(tmp_path))
    for extra in ((), ("--repeats", "1"), ("--no-keops",)):
        assert "accuracy is finished" in here(*options, *extra)[0]
    for extra in (("--no-keops", "--repeats", "3"), ("--keops",)):
        assert "measuring accuracy" in here(*options, *extra)[0]


# Between samples, and divergences -----------------------------------------------------------------


def run_group(output: Path, group: str) -> dict[str, dict]:
    options = ("--quick", "--repeats", "2", "--threads", "1", "--no-keops")
    run("run.py", group, *options, "--output", str(output))
    return {path.stem: json.loads(path.read_text("utf-8")) for path in output.glob("*.json")}


def test_batch_transport_is_compared_at_known_errors(tmp_path):
    pytest.importorskip("geomloss")
    found = run_group(tmp_path, "batch")
    assert found.keys() == {"few_classes", "many_classes", "scaling"}
    for case in (*found["few_classes"]["cases"], *found["many_classes"]["cases"]):
        peers = case["peers"]
        assert peers["otkd"]["gradient_error"] < 2e-3
        # Solvers that are not ours, with gradients by their own plans, or through the iterations.
        assert peers["POT sinkhorn"]["gradient_error"] < 2e-3
        assert peers["POT batch"]["gradient_error"] < 0.2  # after 20 iterations
        assert peers["unrolled"]["gradient_error"] < 0.4  # of ⟨P, C⟩
        assert "gradient_error" not in peers["F.kl_div"]
        assert set(case["times"]) == set(peers) - {"otkd"}
    *_, largest = found["few_classes"]["cases"][:2]
    assert largest["peers"]["unrolled"]["peak_bytes"] > 0
    axes = {case["name"] for case in found["scaling"]["cases"]}
    general = {f"{kind} over {axis}" for kind in ("otkd", "unrolled") for axis in "bdT"}
    assert axes == {*general, "otkd, two classes over b", "kl_div over b", "kl_div over d"}
    for case in found["scaling"]["cases"]:
        assert case["exponent"]["interval"] > 0
        assert ("half_at" in case["exponent"]) == (not case["name"].endswith("over b"))


def test_a_peer_is_laid_beside_the_fastest_of_ours_with_no_greater_error(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import batch_rows

    seconds = {"otkd": 4.0, "otkd, tolerance 0.1": 2.0, "rough": 1.0, "good": 6.0, "best": 9.0}
    errors = {"otkd": 1e-3, "otkd, tolerance 0.1": 0.2, "rough": 0.3, "good": 0.01, "best": 5e-4}
    peers = {
        name: {"seconds": {"median": seconds[name]}, "gradient_error": errors[name]}
        for name in seconds
    }
    case = {"name": "some", "problem": {"samples": 64}, "peers": peers}
    found = {each["name"].split(" of ")[1]: each for each in batch_rows._targets(case, None)}
    assert found["rough / the fastest otkd"]["measured"] == 0.5
    assert found["good / the fastest otkd"]["measured"] == 1.5
    assert len(found) == 2  # none of ours was measured with so small an error


def test_divergences_are_compared_with_the_plain_formulas(tmp_path):
    found = run_group(tmp_path, "divergences")
    names = [case["name"] for case in found["divergences"]["cases"]]
    # Every loss of positions that is a divergence: the others have rows of their own.
    assert set(names) == {loss.__name__ for loss in DivergenceLoss.__subclasses__()}
    for case in found["divergences"]["cases"]:
        for peer in case["peers"].values():
            assert peer["value_error"] < 1e-4
            assert peer["gradient_error"] < 1e-4
    kept = found["kept_memory"]
    assert [case["name"] for case in kept["cases"]] == [*names, "SinkhornLoss, top 64"]
    assert "\n" not in kept["what"]  # on the page it would be a block of code
    for case in found["extremes"]["cases"]:
        ours, plain = (
            found for name, found in case["peers"].items() if name == "plain" or "otkd" in name
        )
        assert ours["finite_without_mass"]
        assert ours["least_value"] >= 0
        assert ours["gradient_error"] < min(0.004, plain["gradient_error"])


def test_a_step_with_every_loss_is_a_ratio_to_kl(tmp_path):
    found = run_group(tmp_path, "steps")
    rows = ("language_model", "large_vocabulary", "classification")
    (language,), (large,), (classes,) = (found[row]["cases"] for row in rows)
    for case in (language, large, classes):
        assert case["times_against"] == "kl"
        assert set(case["times"]) == set(case["peers"]) - {"kl"}
    assert "F.kl_div" in language["times"].keys() & classes["times"].keys()
    assert language["peers"]["sinkhorn"]["peak_bytes"] > 0
    assert language["iterations"]["sinkhorn"] >= 1
    assert {"sinkd", "SinKD's public code"} <= set(classes["peers"])
    (trainers,) = found["trainers"]["cases"]
    assert set(trainers["times"]) == set(trainers["peers"]) - {"otkd DistillationTrainer"}
    losses = {name: peer["loss"] for name, peer in trainers["peers"].items()}
    # That of the same positions; GKDTrainer divides by the first label of the eight, too.
    losses["TRL GKDTrainer"] *= 8 / 7
    ours = losses["otkd DistillationTrainer"]
    assert list(losses.values()) == pytest.approx([ours] * len(losses), rel=0.05)


def test_accuracy_stands_against_time(tmp_path):
    pytest.importorskip("geomloss")
    found = run_group(tmp_path, "pareto")
    for row, families in (("vocabulary", 6), ("batch", 5)):
        (case,) = found[row]["cases"]
        assert len({point["family"] for point in case["points"]}) == families
        for point in case["points"]:
            assert 0 < point["gradient_error"] < 1.5
            assert point["seconds"]["median"] > 0


def test_shares_of_the_limit_are_of_what_was_measured(tmp_path):
    result = run_group(tmp_path, "limits")["headline"]
    rates = result["rates_a_second"]
    assert all(rate > 0 for rate in rates.values())
    for point in result["cases"][0]["points"]:
        assert point["share"] > 0
        expected = point["limit, seconds"] / point["seconds"]["median"]
        assert point["share"] == pytest.approx(expected)
        least = {**point["bytes"], **point["operations"]}
        needed = {kind: amount / rates[kind] for kind, amount in least.items()}
        assert point["limit, seconds"] == pytest.approx(max(needed.values()))
        assert needed[point["bound by"]] == max(needed.values())
    step = result["cases"][0]["points"][-1]
    # A layer of width 16 has 12 · 16² weights and the output layer 2,100 · 16, at 2 · 8 positions.
    assert step["operations"] == {"products": 8 * (12 * 16**2 + 2100 * 16) * 16}


@pytest.fixture
def results(folder, tmp_path) -> Path:
    shutil.copytree(folder, tmp_path / "results" / "vocabulary")
    return tmp_path / "results"


def report(results: Path) -> str:
    page = results.parent / "benchmarks.md"
    run("report.py", "--results", str(results), "--output", str(page))
    return page.read_text("utf-8")


def test_the_page_and_its_figure_are_made_of_the_results_alone(folder, results):
    text = report(results)
    found = load(folder, "topk")["cases"][0]["times"]["F.kl_div"]
    assert f"| F.kl_div | {found['median']:.3g} ({found['low']:.3g}–{found['high']:.3g}) |" in text
    assert "`few_classes`: not measured." in text
    assert "(images/topk-error.svg)" in text
    drawing = (results.parent / "images" / "topk-error.svg").read_text("utf-8")
    assert drawing.rstrip().endswith("</svg>")
    assert "flat, clustered embedding" in drawing
    (results / "vocabulary" / "topk.json").unlink()
    (results / "vocabulary" / "accuracy.json").unlink()
    text = report(results)
    assert "`topk`: not measured." in text
    assert "topk-error.svg" not in text


def test_notes_stand_at_their_rows(results):
    (results / "notes.toml").write_text('[vocabulary]\ntopk = "Slower, for a reason."\n', "utf-8")
    text = report(results)
    assert text.index("### `topk`") < text.index("Slower, for a reason.")
    assert text.index("Slower, for a reason.") < text.index("### `accuracy`")


def test_quick_ratios_stand_beside_those_on_file(tmp_path):
    options = ("--repeats", "1", "--file", str(tmp_path / "quick.json"))
    first = run("quick.py", *options, "--keep")
    assert "–" in first
    kept = json.loads((tmp_path / "quick.json").read_text("utf-8"))
    assert all(ratio > 0 for ratio in kept["ratios"].values())
    kept["ratios"] = dict.fromkeys(kept["ratios"], 1e6)  # no machine is so slow
    (tmp_path / "quick.json").write_text(json.dumps(kept), "utf-8")
    again = run("quick.py", *options)
    assert again.count("1000000.00") == again.count("moved") == len(kept["ratios"])
