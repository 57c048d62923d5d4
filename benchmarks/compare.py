"""The peers of a row side by side on one problem."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass

import measure
import torch
from peers import EPSILON, Call, Peer, prepare
from problems import Spec, build, coverage

import otkd


@dataclass(frozen=True)
class Settings:
    """What a result depends on beside the machine."""

    quick: bool = False
    seed: int = 0
    repeats: int = 5
    keops: bool = False

    def pick(self, full, quick):
        """One of two sizes."""
        return quick if self.quick else full


def compare(spec, peers, reference, settings, *, compared=None, skip_memory=()) -> dict:
    """Time, memory and error of every peer on one problem; the first peer is ours."""
    missing = [peer.name for peer in peers if not peer.available]
    peers = [peer for peer in peers if peer.available]
    calls = {peer.name: prepare(peer, spec) for peer in peers}
    rounds = {peer.name: peer.rounds or settings.repeats for peer in peers}
    seconds = measure.alternate(calls, rounds)
    found = {}
    for peer in peers:
        positions = peer.positions or spec.positions
        factor = peer.scale * spec.positions / positions
        seconds[peer.name] = [factor * t for t in seconds[peer.name]]
        entry = {
            "settings": peer.settings,
            "positions": positions,
            "time_scaled_by": factor,
            "seconds": measure.spread(seconds[peer.name]),
        }
        whole = peer.scale == 1
        if reference is not None and whole and (compared is None or peer.name in compared):
            entry |= errors_of(calls[peer.name], reference)
        if peer.name not in skip_memory and not (settings.quick and peer is not peers[0]):
            entry |= (
                peak_of(peer, spec) if spec.device == "cpu" else peak_here(calls[peer.name], spec)
            )
        found[peer.name] = entry
    ours = peers[0].name
    report = calls[ours].report
    return {
        "name": spec.name,
        "problem": spec.as_dict(),
        "coverage_of_64": coverage(build(spec).student),
        "iterations": report and report.iterations,
        "marginal_error": report and float(report.marginal_error),
        "peers": found,
        "times": {
            name: measure.ratio(seconds[name], seconds[ours]) for name in found if name != ours
        },
        "not_installed": missing,
    }


def peak_of(peer: Peer, spec: Spec) -> dict:
    """Peak memory of a peer beyond its inputs."""
    arguments = {"spec": spec.as_dict(), "peer": dataclasses.asdict(peer)}
    found = peak_of_job({"runner": "peers", "arguments": arguments}, spec.logits_bytes)
    return {"peak_positions": spec.positions, **found}


def peak_here(call: Call, spec: Spec) -> dict:
    """The same in this process, by torch's own count of the memory of its device."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    peak = torch.cuda.max_memory_allocated() - before
    units, method = peak / spec.logits_bytes, "torch.cuda.max_memory_allocated"
    return {"peak_bytes": peak, "peak_units": units, "peak_method": method}


def peak_of_job(job: dict, unit: int) -> dict:
    """Peak memory of a job, in units of N·V·4 bytes."""
    peak = measure.peak_memory({**job, "threads": torch.get_num_threads()})
    units = None if peak["bytes"] is None else peak["bytes"] / unit
    return {"peak_bytes": peak["bytes"], "peak_units": units, "peak_method": peak["method"]}


def reference_of(spec: Spec, support, positions: int | None = None, epsilon: float = EPSILON):
    """Values and gradient in float64, iterated as far as that goes."""
    problem = build(spec)
    rows = slice(0, positions)
    loss = otkd.SinkhornLoss(
        embedding=problem.embedding.double(),
        epsilon=epsilon,
        support=support,
        tolerance=1e-9,
        max_iterations=2000,
        reduction="none",
    )
    return Call(loss, problem.student[rows].double(), problem.teacher[rows].double())()


def errors_of(call: Call, reference) -> dict[str, float]:
    """Relative errors over the positions that the reference and the call have in common."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a tolerance below what float32 reaches
        found = call()
    common = min(len(found[0]), len(reference[0]))
    names = ("value_error", "gradient_error")
    pairs = zip(names, found, reference, strict=True)
    return {name: measure.relative_error(x[:common], y[:common]) for name, x, y in pairs}


def target(name: str, measured: float | None, relation: str, limit: float) -> dict:
    """A figure and what it should be; ``met`` is None where there is no figure."""
    met = None
    if measured is not None:
        met = measured <= limit if relation == "≤" else measured >= limit
    return {
        "name": name,
        "measured": measured,
        "relation": relation,
        "limit": limit,
        "met": met,
    }
