"""The benchmarks at tiny sizes: every row runs and has the right fields.

Times mean nothing at these sizes; errors are checked against bounds.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import importlib
import json
import logging
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from otkd.losses.divergences import DivergenceLoss

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
VOCABULARY = ("dense", "topk", "accuracy", "sizes")

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def measured_peak(monkeypatch):
    """Rows run in this process, without what only exact times need; the real peak memory of a call.

    Loading the libraries takes longer than the rows do, so the rows start no processes: they get a
    peak memory that is not measured. One test measures it.
    """
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    memory, measure = map(importlib.import_module, ("memory", "measure"))

    def peak(runner, arguments, unit, name="peak_units"):
        return {"peak_bytes": 4 * unit, name: 4.0, "peak_method": "none"}

    real = memory.peak
    monkeypatch.setattr(memory, "peak", peak)
    monkeypatch.setattr(measure, "_SHORTEST", 0.0)
    logger = logging.getLogger("otkd")
    level = logger.level
    gc.freeze()  # each measurement collects garbage, which takes long with many modules loaded
    yield real
    gc.unfreeze()
    logger.setLevel(level)


def call(script: str, *arguments: str) -> tuple[str, int]:
    """Output and exit status of a script that is called in this process."""
    app = typer.Typer()
    app.command()(importlib.import_module(script).main)
    done = CliRunner().invoke(app, arguments)
    return done.output, done.exit_code


@functools.cache
def result_of(group: str, row: str, repeats: int = 1) -> dict:
    """The result of a row at tiny sizes, as it is read from its file."""
    run, compare = map(importlib.import_module, ("run", "compare"))
    settings = compare.Settings(quick=True, repeats=repeats)
    result = run.run_row(run.GROUPS[group][row], row, settings)
    assert result["measured"], result.get("reason")
    return json.loads(json.dumps(result))


def vocabulary(row: str) -> dict:
    return result_of("vocabulary", row, 2)


# Rows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", VOCABULARY)
def test_a_result_has_its_settings_and_where_it_was_measured(row):
    result = vocabulary(row)
    assert result["row"] == row
    assert result["settings"] == {"quick": True, "seed": 0, "repeats": 2, "keops": False}
    assert result["versions"]["torch"] == torch.__version__
    assert result["machine"]["cores"] >= 1
    assert result["machine"]["threads"] == torch.get_num_threads()
    for target in result["targets"]:
        measured, limit = target["measured"], target["limit"]
        expected = None if measured is None else measured <= limit
        if target["relation"] == "≥" and measured is not None:
            expected = measured >= limit
        assert target["met"] is expected


def test_dense_agrees_with_a_solver_that_is_not_ours():
    (case,) = vocabulary("dense")["cases"]
    peers = case["peers"]
    assert peers["otkd"]["gradient_error"] <= 1e-5
    assert peers["pot"]["gradient_error"] <= 1e-4
    assert peers["pot"]["value_error"] <= 1e-4
    assert case["chosen"] in case["tolerance_search"]
    assert peers["pot"]["time_scaled_by"] == case["problem"]["positions"]
    for name, ratio in case["times"].items():
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"], name


@pytest.mark.parametrize("row", ["topk", "sizes"])
def test_time_spread_and_memory_are_recorded(row):
    (case,) = vocabulary(row)["cases"]
    for name in ("otkd", "F.kl_div"):
        seconds = case["peers"][name]["seconds"]
        assert 0 < seconds["low"] <= seconds["median"] <= seconds["high"]
        assert seconds["repeats"] == len(seconds["rounds"]) == 2
        assert max(seconds["rounds"]) == pytest.approx(seconds["high"], rel=1e-3)
    assert case["times"]["F.kl_div"]["repeats"] == 2
    assert case["peers"]["otkd"]["peak_bytes"] > 0
    assert case["coverage_of_64"] > 0.5


def test_more_tokens_are_more_accurate():
    result = vocabulary("accuracy")
    assert len(result["cases"]) == 6
    for case in result["cases"]:
        few, *_, many = (point for point in case["points"] if point["clusters"] == 1)
        assert few["k"] < many["k"]
        assert few["coverage"] < many["coverage"]
        assert few["gradient_error"] > many["gradient_error"]


@pytest.mark.parametrize("row", ["accuracy", "language_model"])
def test_the_transport_kl_is_compared_with_the_whole_kernel(row):
    result = result_of("transport_kl", row)
    for case in result["cases"]:
        errors = {}
        for point in case["points"]:
            place = point["price"], point["temperature"]
            errors.setdefault(place, {})[point["support"]] = point["gradient_error"]
        assert len(errors) == 9
        for found in errors.values():
            kl, default, *more = found.values()
            assert max(default, *more) < 0.5
            if kl > 0.1:  # else the price is so high that the loss is KL
                assert default < kl


def test_the_transport_kl_is_timed_beside_kl():
    (case,) = result_of("transport_kl", "time")["cases"]
    assert {"F.kl_div", "otkd.KLLoss"} < set(case["times"])
    assert case["peers"]["otkd.TransportKLLoss"]["peak_bytes"] > 0


def test_batch_transport_is_compared_at_known_errors():
    pytest.importorskip("geomloss")
    few, many = (result_of("batch", row) for row in ("few_classes", "many_classes"))
    for case in (*few["cases"], *many["cases"]):
        peers = case["peers"]
        assert peers["otkd"]["gradient_error"] < 2e-3
        # Solvers that are not ours, with gradients by their own plans, or through the iterations.
        assert peers["POT sinkhorn"]["gradient_error"] < 2e-3
        assert peers["POT batch"]["gradient_error"] < 0.2  # after 20 iterations
        assert peers["unrolled"]["gradient_error"] < 0.4  # of ⟨P, C⟩
        assert "gradient_error" not in peers["F.kl_div"]
        assert set(case["times"]) == set(peers) - {"otkd"}
    *_, largest = few["cases"][:2]
    assert largest["peers"]["otkd"]["peak_matrices"] > 0


def test_growth_is_fitted_over_every_axis():
    found = result_of("batch", "scaling")
    axes = {case["name"] for case in found["cases"]}
    general = {f"{kind} over {axis}" for kind in ("otkd", "unrolled") for axis in "bdT"}
    assert axes == {*general, "otkd, two classes over b", "kl_div over b", "kl_div over d"}
    for case in found["cases"]:
        assert case["exponent"]["interval"] > 0
        assert ("half_at" in case["exponent"]) == (not case["name"].endswith("over b"))


def test_a_peer_is_compared_with_the_fastest_otkd_setting_of_no_greater_error():
    batch_rows = importlib.import_module("batch_rows")
    seconds = {"otkd": 4.0, "otkd, tolerance 0.1": 2.0, "rough": 1.0, "good": 6.0, "best": 9.0}
    errors = {"otkd": 1e-3, "otkd, tolerance 0.1": 0.2, "rough": 0.3, "good": 0.01, "best": 5e-4}
    peers = {
        name: {"seconds": {"median": seconds[name]}, "gradient_error": errors[name]}
        for name in seconds
    }
    case = {"name": "some", "problem": {"samples": 64}, "peers": peers}
    found = {target["name"]: target["measured"] for target in batch_rows._targets(case, None)}
    # No setting of otkd has an error as small as that of "best".
    assert found == {
        f"some: time, {name} ÷ fastest otkd setting with no greater error": ratio
        for name, ratio in (("rough", 0.5), ("good", 1.5))
    }


def test_divergences_are_compared_with_the_plain_formulas():
    cases = result_of("divergences", "divergences")["cases"]
    names = [case["name"] for case in cases]
    # Every loss of positions that is a divergence: the others have rows of their own.
    assert set(names) == {loss.__name__ for loss in DivergenceLoss.__subclasses__()}
    for case in cases:
        for peer in case["peers"].values():
            assert peer["value_error"] < 1e-4
            assert peer["gradient_error"] < 1e-4
    reused = result_of("divergences", "kept_memory")["cases"]
    assert [case["name"] for case in reused] == [*names, "SinkhornLoss, top 64"]


def test_extreme_logits_are_finite_and_exact():
    for case in result_of("divergences", "extremes")["cases"]:
        ours, plain = (
            found for name, found in case["peers"].items() if name == "plain" or "otkd" in name
        )
        assert ours["finite_without_mass"]
        assert ours["least_value"] >= 0
        assert ours["gradient_error"] < min(0.004, plain["gradient_error"])


def test_a_step_with_every_loss_is_a_ratio_to_kl():
    rows = ("language_model", "large_vocabulary", "classification")
    (language,), (large,), (classes,) = (result_of("steps", row)["cases"] for row in rows)
    for case in (language, large, classes):
        assert case["times_against"] == "kl"
        assert set(case["times"]) == set(case["peers"]) - {"kl"}
    assert "F.kl_div" in language["times"].keys() & classes["times"].keys()
    assert language["peers"]["sinkhorn"]["peak_bytes"] > 0
    assert language["iterations"]["sinkhorn"] >= 1
    assert {"sinkd", "SinKD's public code"} <= set(classes["peers"])


def test_trainers_do_the_same_work():
    (case,) = result_of("steps", "trainers")["cases"]
    assert set(case["times"]) == set(case["peers"]) - {"otkd DistillationTrainer"}
    losses = {name: peer["loss"] for name, peer in case["peers"].items()}
    # GKDTrainer also divides by the first label of the eight.
    losses["TRL GKDTrainer"] *= 8 / 7
    ours = losses["otkd DistillationTrainer"]
    assert list(losses.values()) == pytest.approx([ours] * len(losses), rel=0.05)


def test_two_tokenizers_are_measured_beside_one(monkeypatch, tmp_path):
    monkeypatch.setenv("OTKD_CACHE", str(tmp_path))
    (case,) = result_of("steps", "two_tokenizers")["cases"]
    one, *two = case["peers"]
    assert one == "one tokenizer, KLLoss"
    assert set(case["times"]) == set(two)
    assert len(two) == 2
    assert all(0 < peer["loss"] < 20 for peer in case["peers"].values())
    steps = importlib.import_module("two_tokenizers_steps")
    spec = importlib.import_module("steps").TINY
    assert [len(steps.tokenizer(spec, size)) for size in (1400, 2100)] == [1400, 2100]


@pytest.mark.parametrize(("row", "families"), [("vocabulary", 6), ("batch", 5)])
def test_error_is_measured_against_time(row, families):
    pytest.importorskip("geomloss")
    (case,) = result_of("pareto", row)["cases"]
    assert len({point["family"] for point in case["points"]}) == families
    for point in case["points"]:
        assert 0 < point["gradient_error"] < 1.5
        assert point["seconds"]["median"] > 0


def test_shares_of_the_limit_follow_from_the_measured_rates():
    result = result_of("limits", "headline")
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


# Files and commands -------------------------------------------------------------------------------


def test_peak_memory_is_measured_in_a_process_of_its_own(measured_peak):
    problems = importlib.import_module("problems")
    spec = problems.Spec(3000, 128, 16)
    arguments = {"spec": dataclasses.asdict(spec), "peer": {"name": "", "kind": "kl_div"}}
    found = measured_peak("peers", arguments, spec.logits_bytes)
    assert found["peak_method"].startswith("VmHWM")
    if found["peak_method"] == "VmHWM after reset":
        # Two log-softmaxes, the terms, and the gradients of those.
        assert 3 < found["peak_units"] < 8
    failed = measured_peak("peers", {**arguments, "spec": {}}, spec.logits_bytes)
    assert failed["peak_bytes"] is failed["peak_units"] is None
    assert failed["peak_method"].startswith("not measured: TypeError")


EXTREMES = ("run", "divergences", "--rows", "extremes", "--quick")


def test_a_finished_row_is_kept_and_a_damaged_one_is_measured_again(tmp_path):
    file, where = tmp_path / "extremes.json", ("--output", str(tmp_path))
    assert "measuring extremes" in call(*EXTREMES, *where)[0]
    before = file.read_bytes()
    for extra in ((), ("--repeats", "1"), ("--no-keops",)):
        assert "extremes is finished" in call(*EXTREMES, *where, *extra)[0]
    assert file.read_bytes() == before
    for extra in (("--seed", "1"), ("--no-keops", "--repeats", "9"), ("--keops",)):
        assert "measuring extremes" in call(*EXTREMES, *where, *extra)[0]
    file.write_text("{", "utf-8")
    assert "measuring extremes" in call(*EXTREMES, *where)[0]
    assert json.loads(file.read_text("utf-8"))["row"] == "extremes"


def test_a_row_that_fails_is_stored_with_the_reason_and_tried_again(monkeypatch, tmp_path):
    run = importlib.import_module("run")

    class CompilationError(Exception):
        pass

    def fails(settings):
        raise CompilationError("of a kernel")

    row = run.GROUPS["divergences"]["extremes"]
    monkeypatch.setitem(run.GROUPS["divergences"], "extremes", fails)
    where = ("--output", str(tmp_path))
    said, _ = call(*EXTREMES, *where)
    assert "extremes: not measured (CompilationError: of a kernel)" in said
    result = json.loads((tmp_path / "extremes.json").read_text("utf-8"))
    assert result["measured"] is False
    assert result["reason"] == "CompilationError: of a kernel"
    assert result["cases"] == result["targets"] == []
    monkeypatch.setitem(run.GROUPS["divergences"], "extremes", row)
    assert "measuring extremes" in call(*EXTREMES, *where)[0]
    assert json.loads((tmp_path / "extremes.json").read_text("utf-8"))["measured"]


@pytest.mark.parametrize(
    "arguments", [("run", "divergences", "--rows", "extremes"), ("gpu", "--minutes", "0")]
)
def test_tiny_sizes_need_a_folder_of_their_own(arguments):
    said, status = call(*arguments, "--quick")
    assert status == 2
    assert "--output" in said


def test_impossible_arguments_and_files_are_refused(tmp_path):
    said, status = call("run", "vocabulary", "--threads", "-1")
    assert status == 2
    assert "--threads" in said
    file = tmp_path / "quick.json"
    for text in ("{", "[]", '{"ratios": [1]}'):
        file.write_text(text, "utf-8")
        said, status = call("quick", "--file", str(file))
        assert status == 2
        assert "holds no ratios" in said.replace("\n", " ")


def test_quick_ratios_are_compared_with_those_on_file(monkeypatch, tmp_path):
    quick, problems = map(importlib.import_module, ("quick", "problems"))
    monkeypatch.setattr(quick, "SPEC", problems.Spec(3000, 8, 16, "zipf", "clustered"))
    options = ("--repeats", "1", "--file", str(tmp_path / "quick.json"))
    first, _ = call("quick", *options, "--keep")
    assert "–" in first
    kept = json.loads((tmp_path / "quick.json").read_text("utf-8"))
    assert all(ratio > 0 for ratio in kept["ratios"].values())
    on_file = json.loads((BENCHMARKS / "results" / "quick.json").read_text("utf-8"))
    assert kept["ratios"].keys() == on_file["ratios"].keys()
    kept["ratios"] = dict.fromkeys(kept["ratios"], 1e6)  # far from any real ratio
    (tmp_path / "quick.json").write_text(json.dumps(kept), "utf-8")
    again, _ = call("quick", *options)
    assert again.count("1000000.00") == again.count("moved") == len(kept["ratios"])


# Rows that need a GPU -----------------------------------------------------------------------------

GPU_ROWS = ("correctness", "transport", "batch", "divergences", "language_model")


@pytest.mark.skipif(torch.cuda.is_available(), reason="only without a GPU is nothing measured")
def test_without_a_gpu_the_reason_is_stored(tmp_path):
    call("gpu", "--quick", "--repeats", "1", "--output", str(tmp_path))
    for row in GPU_ROWS:
        result = json.loads((tmp_path / f"{row}.json").read_text("utf-8"))
        assert (result["measured"], result["reason"]) == (False, "no GPU")
    # Nothing could be added, so a second call measures nothing.
    said, _ = call("run", "gpu", "--quick", "--no-keops", "--output", str(tmp_path))
    assert said.count("is finished") == len(GPU_ROWS)


@pytest.mark.parametrize(("minutes", "begun"), [("0", set()), ("1.1", {"correctness.json"})])
def test_no_gpu_row_is_begun_that_might_not_finish_in_time(tmp_path, minutes, begun):
    said, _ = call("gpu", "--quick", "--minutes", minutes, "--output", str(tmp_path))
    assert said.count("left for another call") == len(GPU_ROWS) - len(begun)
    assert {path.name for path in tmp_path.iterdir()} == begun


@pytest.mark.skipif(torch.cuda.is_available(), reason="only without a GPU is nothing measured")
def test_a_run_without_a_gpu_keeps_what_a_gpu_measured(tmp_path):
    settings = {"quick": True, "seed": 0, "repeats": 10, "keops": False}
    empty = {"schema": 1, "settings": settings, "measured": True, "cases": [], "targets": []}
    for row in GPU_ROWS:
        (tmp_path / f"{row}.json").write_text(json.dumps({**empty, "row": row}), "utf-8")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    where = ("--quick", "--output", str(tmp_path))
    assert call("run", "gpu", "--no-keops", *where)[0].count("is finished") == len(GPU_ROWS)
    assert "not measured" not in call("gpu", *where)[0]
    for again in (("run", "gpu", "--no-keops", "--force"), ("gpu", "--seed", "1")):
        said, status = call(*again, *where)
        assert status == 0
        assert said.count("the earlier measurement is kept") == len(GPU_ROWS)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("row", GPU_ROWS)
def test_every_gpu_row_runs_on_a_cpu_as_far_as_it_can(monkeypatch, row):
    gpu_rows = importlib.import_module("gpu_rows")
    # A name of the CPU that is not just "cpu"; no counters of memory, and no KeOps, which compiles.
    monkeypatch.setattr(gpu_rows, "DEVICE", "cpu:0")
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3000)
    monkeypatch.setitem(sys.modules, "pykeops", None)
    settings = importlib.import_module("compare").Settings(quick=True, repeats=1)
    cases = gpu_rows.ROWS[row].__wrapped__(settings)["cases"]
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
