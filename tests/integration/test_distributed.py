"""What one process has on the whole batch, two and three processes have together, for real."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import kl_div

pytestmark = [
    pytest.mark.skipif(
        not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
        reason="needs torch.distributed with gloo",
    ),
    # Several tests compare the trainings of one fixture: one worker makes them, once.
    pytest.mark.xdist_group("distributed"),
]
FOLDER = Path(__file__).parent
LOSSES, RUNS = FOLDER / "distributed_worker.py", FOLDER / "distributed_runs.py"


def start(processes, script, *arguments):
    """Run a script in so many processes; a time-out takes the place of waiting for ever."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    command = [str(part) for part in (*command, script, *arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parents[1])}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def launch(folder, script, processes):
    """What each process of a script wrote."""
    done = start(processes, script, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{processes}-{rank}.pt") for rank in range(processes)]


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    folder = tmp_path_factory.mktemp("losses")
    return launch(folder, LOSSES, 1), launch(folder, LOSSES, 2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("runs")
    (whole,) = launch(folder, RUNS, 1)
    return whole, {processes: launch(folder, RUNS, processes) for processes in (2, 3)}


# Losses


def test_loss_and_gradient_are_those_of_the_whole_batch(losses):
    (whole,), parts = losses
    for name, expected in whole.items():
        for part in parts:
            # The value is the same everywhere, the gradient that of the average over processes.
            torch.testing.assert_close(part[name]["value"], expected["value"], msg=name)
            torch.testing.assert_close(
                part[name]["gradient"], expected["gradient"], rtol=1e-6, atol=1e-9, msg=name
            )
        assert expected["gradient"].abs().sum() > 0
        assert expected["value"] > 0


def test_without_gathering_each_process_has_its_own(losses):
    (whole,), parts = losses
    values = [part["own"]["value"] for part in parts]
    assert values[0] != values[1]
    assert not torch.isclose(values[0], whole["l1, even"]["value"], rtol=1e-3)


def test_a_loss_of_one_process_alone_and_samples_that_do_not_fit(losses):
    _, parts = losses
    # Without gradients a process may call a loss that the others do not.
    assert parts[0]["alone"] > 0
    for part in parts:
        assert "the student's width is 4, 5 in processes 0 to 1" in part["refusal"]


# Trainings


SAME = (
    "kl",
    "evaluated first",
    "packed",
    "mixture",
    "per example, packed",
    "base model",
    "two tokenizers",
    "sinkhorn",
    "sum",
    "sequence_mean",
    "weighted",
    "classes, sequence_mean",
    "unlabelled tokens",
    "unlabelled examples",
    "unlabelled causal",
    "batch",
    "batch, sum",
    "batch, sequence_mean",
    "split",
    "dispatched",
)


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("processes", [2, 3])
def test_a_training_is_that_of_one_process(runs, name, processes):
    whole, parts = runs[0][name], [part[name] for part in runs[1][processes]]
    assert whole["moved"].abs().max() > 1e-3
    for part in parts:
        difference = (part["moved"] - whole["moved"]).norm() / whole["moved"].norm()
        assert difference < 2e-4
        assert len(part["logs"]) == len(whole["logs"]) == 2
        for log, expected in zip(part["logs"], whole["logs"], strict=True):
            assert log == pytest.approx(expected, rel=1e-3, abs=2e-6)
        # Also where the last batch was filled with rows of the first.
        assert part["metrics"] == pytest.approx(whole["metrics"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", ["one", "mixture", "per example", "base model", "FSDP1"])
@pytest.mark.parametrize("processes", [2, 3])
def test_a_sharded_teacher_teaches_as_a_whole_one(runs, name, processes):
    whole = runs[0][f"sharded, {name}"]
    assert len(whole["losses"]) == 2
    for part in (part[f"sharded, {name}"] for part in runs[1][processes]):
        assert part["losses"] == pytest.approx(whole["losses"], rel=1e-4)
        assert part["evaluation"] == pytest.approx(whole["evaluation"], rel=1e-4)
        if name != "FSDP1":
            torch.testing.assert_close(part["weights"], whole["weights"], rtol=1e-4, atol=1e-6)
        assert part["sharded"]
        assert part["frozen"]
        # Accelerate knows of the student alone, whose gradients it clips and which it saves.
        assert part["students"] == 1


def test_what_is_logged(runs):
    logs = {name: runs[0][name]["logs"][0] for name in SAME}
    metrics = {name: runs[0][name]["metrics"] for name in SAME}
    assert {"loss/ot", "solver/ot/top/iterations", "solver/iterations"} <= logs["weighted"].keys()
    assert {"solver/ot/top/coverage", "solver/ot/top/worst_coverage"} <= logs["weighted"].keys()
    assert {"solver/l1/iterations", "solver/hidden/iterations"} <= logs["batch"].keys()
    assert {"eval_loss", "eval_cross_entropy", "eval_accuracy"} == metrics["batch"].keys()
    assert {"eval_loss"} == metrics["unlabelled tokens"].keys()
    total = sum(w * logs["batch"][f"loss/{n}"] for n, w in (("kl", 0.9), ("l1", 2), ("hidden", 1)))
    assert logs["batch"]["loss"] == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_that_see_other_things(runs, processes):
    parts = runs[1][processes]
    for name in ("other terms", "other teachers", "labels in the first alone"):
        assert all(part[name]["logs"] == parts[0][name]["logs"] for part in parts)
    for calls, log in enumerate(parts[0]["other terms"]["logs"]):
        own = [log[f"loss/of {rank}"] for rank in range(processes)]
        assert sum(own) == pytest.approx(log["loss"], rel=1e-5)
        assert log.get("loss/all", log["loss"]) == pytest.approx(log["loss"], rel=1e-5)
        assert ("loss/all" in log) == (calls == 0)
    log, whole = (found["other teachers"]["logs"][0] for found in (parts[0], runs[0]))
    assert log["loss/kl"] == pytest.approx(whole["loss/kl"], rel=1e-4)
    assert log.keys() == whole.keys()
    metrics = parts[0]["labels in the first alone"]["metrics"]
    assert metrics.keys() == {"eval_loss", "eval_cross_entropy", "eval_accuracy"}


def test_batches_that_leave_a_process_without_its_part_are_refused(runs):
    whole, parts = runs
    assert whole["refused"] == [None, None]
    for part in (*parts[2], *parts[3]):
        uneven, dispatched = part["refused"]
        assert "dataloader_drop_last=True" in uneven
        assert "dispatch_batches=True" in dispatched


@pytest.mark.parametrize("processes", [2, 3])
def test_means_of_processes_are_of_those_that_count(runs, processes):
    from tests.integration.distributed_runs import CAUSAL, STEP, pad, tiny_gpt2

    batch = pad(CAUSAL[:STEP])
    labels = batch.pop("labels")[:, 1:]
    with torch.no_grad():
        q, p = (tiny_gpt2(seed).eval()(**batch).logits[:, :-1].log_softmax(-1) for seed in (0, 1))
    values = kl_div(q, p, log_target=True, reduction="none").sum(-1)
    parts = zip(values.chunk(processes), (labels != -100).chunk(processes), strict=True)
    means = [value[counted].mean() for value, counted in parts if counted.any()]
    assert len(means) == processes - 1
    log = runs[1][processes][0]["means of processes"]["logs"][0]
    assert log["loss"] == pytest.approx(torch.stack(means).mean().item(), rel=1e-4)


@pytest.mark.parametrize("fault", ["positions", pytest.param("batch", marks=pytest.mark.slow)])
def test_an_error_in_one_process_ends_all_of_them(tmp_path, fault):
    done = start(2, RUNS, tmp_path, fault)
    assert done.returncode != 0
    assert "NaN" in done.stderr or "without a softmax" in done.stderr
