"""The peers of a row on one problem: time, memory and error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import measure
import memory
from peers import EPSILON, Call, Peer, prepare
from problems import Spec, build, coverage

import otkd


@dataclass(frozen=True)
class Settings:
    """What a result depends on besides the machine."""

    quick: bool = False
    seed: int = 0
    repeats: int = 5
    keops: bool = False

    def pick(self, full, quick):
        """One of two sizes."""
        return quick if self.quick else full


Row = Callable[[Settings], dict]
"""Measures the cases of a row, and with what we aim at its targets."""


def compare(spec, peers, reference, settings, *, compared=None, skip_memory=()) -> dict:
    """Time, memory and error of every peer on one problem; the first peer is ours."""
    missing = [peer.name for peer in peers if not peer.available]
    peers = [peer for peer in peers if peer.available]
    calls = {peer.name: prepare(peer, spec) for peer in peers}
    rounds = {peer.name: peer.rounds or settings.repeats for peer in peers}
    seconds = measure.alternate(calls, rounds)
    details = {}
    for peer in peers:
        positions = peer.positions or spec.positions
        factor = peer.scale * spec.positions / positions
        seconds[peer.name] = [factor * t for t in seconds[peer.name]]
        found = {"settings": peer.settings, "positions": positions, "time_scaled_by": factor}
        whole = peer.scale == 1
        if reference is not None and whole and (compared is None or peer.name in compared):
            found |= errors_of(calls[peer.name], reference)
        if peer.name not in skip_memory and not (settings.quick and peer is not peers[0]):
            if spec.device == "cpu":
                found |= peak_of(peer, spec)
            else:
                found |= memory.peak_on_gpu(calls[peer.name], spec.logits_bytes)
        details[peer.name] = found
    ours = peers[0].name
    report = calls[ours].report
    case = measure.against(seconds, ours)
    for name, found in details.items():
        case["peers"][name] |= found
    return {
        "name": spec.name,
        "problem": asdict(spec),
        "coverage_of_64": coverage(build(spec).student),
        "iterations": report and report.iterations,
        "marginal_error": report and float(report.marginal_error),
        **case,
        "not_installed": missing,
    }


def peak_of(peer: Peer, spec: Spec) -> dict:
    """Peak memory of a peer beyond its inputs, in units of N·V·4 bytes."""
    arguments = {"spec": asdict(spec), "peer": asdict(peer)}
    found = memory.peak("peers", arguments, spec.logits_bytes)
    return {"peak_positions": spec.positions, **found}


def reference_of(spec: Spec, support, positions: int | None = None, epsilon: float = EPSILON):
    """Values and gradient in float64, solved to a marginal error of 1e-9."""
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
    with measure.without_warnings():
        found = call()
    common = min(len(found[0]), len(reference[0]))
    names = ("value_error", "gradient_error")
    pairs = zip(names, found, reference, strict=True)
    return {name: measure.relative_error(x[:common], y[:common]) for name, x, y in pairs}


def target(name: str, measured: float | None, relation: str, limit: float) -> dict:
    """A quantity and what we aim at; ``met`` is None where nothing was measured.

    A ratio is always peer ÷ otkd.
    """
    met = None
    if measured is not None:
        met = measured <= limit if relation == "≤" else measured >= limit
    return {"name": name, "measured": measured, "relation": relation, "limit": limit, "met": met}


def memory_ratio(theirs: dict, ours: dict) -> float | None:
    """Peak memory of a peer over ours; None where one was not measured."""
    peaks = theirs.get("peak_bytes"), ours.get("peak_bytes")
    return peaks[0] / peaks[1] if all(peaks) else None
