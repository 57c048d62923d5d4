"""Batch transport across processes: what one process has on the whole batch, for real."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="needs torch.distributed with gloo",
)
WORKER = Path(__file__).with_name("distributed_worker.py")


def launch(folder, mode, processes):
    """Run the worker in so many processes; what each of them wrote."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    command = [str(part) for part in (*command, WORKER, mode, folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[1])}
    done = subprocess.run(
        [str(part) for part in command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{mode}-{processes}-{rank}.pt") for rank in range(processes)]


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    folder = tmp_path_factory.mktemp("losses")
    return launch(folder, "losses", 1), launch(folder, "losses", 2)


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


def test_trainer_in_two_processes_is_the_trainer_with_the_whole_batch(tmp_path):
    (whole,), parts = launch(tmp_path, "trainer", 1), launch(tmp_path, "trainer", 2)
    for part in parts:
        assert part["steps"] == whole["steps"] == 3
        torch.testing.assert_close(part["weights"], whole["weights"], rtol=1e-4, atol=1e-6)
    assert (whole["weights"] - whole["start"]).abs().max() > 1e-3
    torch.testing.assert_close(parts[0]["losses"], whole["losses"], rtol=1e-4, atol=1e-6)
