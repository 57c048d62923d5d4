import gc

import pytest
import torch
from hypothesis import HealthCheck, settings

import otkd.ot.solver
import otkd.ot.transport

# Workers run side by side: more threads than processors only wait for each other.
torch.set_num_threads(1)
# Memory from torch.empty is filled with NaN, so that a result that reads it is seen to.
torch.use_deterministic_algorithms(True)

settings.register_profile(
    "otkd",
    derandomize=True,
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("otkd")


def pytest_collection_finish():
    """What is imported stays: Trainer collects garbage in every run, most of whose time it took."""
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


@pytest.fixture
def seeded():
    """One seed, whatever was drawn before."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def iterations_alone(monkeypatch):
    """Small problems stand for large ones: no steps of Newton's method."""
    monkeypatch.setattr(otkd.ot.solver, "_MOST_TARGETS", 0)


@pytest.fixture
def solves(monkeypatch):
    """The number of problems solved, batch by batch."""
    counted, solve = [], otkd.ot.transport.solve_potentials

    def counting(problem, *arguments, **options):
        counted.append(len(problem.a))
        return solve(problem, *arguments, **options)

    monkeypatch.setattr(otkd.ot.transport, "solve_potentials", counting)
    return counted
