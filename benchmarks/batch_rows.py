"""Transport between the samples of a batch: the rows, and how time grows with b, d and T."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import measure
import torch
from batch_peers import BatchCall, BatchPeer, BatchSpec, build
from compare import Settings, target
from scipy import stats

ITERATIONS = 20
_UNROLLED = BatchPeer("unrolled", "unrolled", {"iterations": ITERATIONS})
PEERS = (
    BatchPeer("otkd", "otkd"),
    BatchPeer(f"otkd, {ITERATIONS} iterations", "otkd", {"iterations": ITERATIONS}),
    *(BatchPeer(f"otkd, tolerance {t:g}", "otkd", {"tolerance": t}) for t in (1e-1, 1e-2, 1e-3)),
    _UNROLLED,
    BatchPeer("POT sinkhorn", "pot", {"iterations": 2000, "threshold": 1e-4}),
    BatchPeer("POT batch", "pot_batch", {"iterations": ITERATIONS}),
    BatchPeer("POT batch, 50 iterations", "pot_batch", {"iterations": 50}),
    BatchPeer(
        "POT batch, log domain", "pot_batch", {"iterations": ITERATIONS, "method": "log_sinkhorn"}
    ),
    BatchPeer("POT emd (exact)", "emd", {}, 1024),
    BatchPeer("geomloss .9", "geomloss"),
    BatchPeer("F.kl_div", "kl_div"),
)
_ONLINE = BatchPeer("geomloss .9, KeOps", "geomloss", {"backend": "online"})
_ROUNDING = 1e-4  # below it the error of a gradient in float32 is that of its inputs
# The value whose gradient a peer computes, to be held against that in float64: ⟨P, C⟩, or nothing
# where it is another problem. All others compute the dual value's.
VALUES = {"unrolled": "sharp", "emd": None, "kl_div": None}


def compare_batch(
    spec: BatchSpec, peers: Sequence[BatchPeer], settings: Settings, *, memory: bool = False
) -> dict:
    """Time and error, and peak memory if asked, of every peer; the first peer is ours."""
    missing = [peer.name for peer in peers if not peer.available]
    peers = [peer for peer in peers if peer.available and spec.samples <= peer.largest]
    calls = {peer.name: BatchCall(peer, spec) for peer in peers}
    seconds = measure.alternate(calls, dict.fromkeys(calls, settings.repeats))
    found = {name: {"seconds": measure.spread(times)} for name, times in seconds.items()}
    references = {value: reference_of(spec, value) for value in ("dual", "sharp")}
    for peer in peers:
        if (value := VALUES.get(peer.kind, "dual")) is not None:
            error = measure.relative_error(calls[peer.name]()[1], references[value])
            found[peer.name]["gradient_error"] = error
        if memory and not (settings.quick and peer.kind not in ("otkd", "unrolled")):
            found[peer.name] |= _peak(peer, spec)
    ours = peers[0].name
    report = calls[ours].function.last_report
    return {
        "name": spec.name,
        "problem": spec.as_dict(),
        "iterations": report.iterations,
        "peers": found,
        "times": {n: measure.ratio(seconds[n], seconds[ours]) for n in found if n != ours},
        "not_installed": missing,
    }


def _peak(peer: BatchPeer, spec: BatchSpec) -> dict:
    """Peak memory beyond the inputs, in matrices of b × b float32 numbers."""
    arguments = {"spec": spec.as_dict(), "peer": dataclasses.asdict(peer)}
    job = {"runner": "batch_peers", "arguments": arguments, "threads": torch.get_num_threads()}
    peak = measure.peak_memory(job)
    matrices = None if peak["bytes"] is None else peak["bytes"] / (4 * spec.samples**2)
    return {"peak_bytes": peak["bytes"], "peak_matrices": matrices, "peak_method": peak["method"]}


def reference_of(spec: BatchSpec, value: str = "dual"):
    """The gradient of the converged value in float64."""
    exact = BatchPeer("", "otkd", {"tolerance": 1e-9, "value": value})
    spec = dataclasses.replace(spec, dtype="float64", device="cpu")
    gradient = BatchCall(exact, spec)()[1]
    build.cache_clear()
    return gradient


def few_classes(settings: Settings) -> dict:
    """d = 2 and 3 with the L1 cost, over b: what a classifier has."""
    sizes = settings.pick((16, 64, 256, 1024, 4096), (16, 32))
    peers = [*PEERS, _ONLINE] if settings.keops else PEERS
    cases, targets = [], []
    for classes in (2, 3):
        for samples in sizes:
            spec = BatchSpec(samples, classes, seed=settings.seed)
            memory = samples == sizes[-1]
            cases.append(compare_batch(spec, peers, settings, memory=memory))
            targets += _targets(cases[-1], {256: 4, 1024: 8}.get(samples))
    return {"cases": cases, "targets": targets}


def many_classes(settings: Settings) -> dict:
    """d = 1,000 and 30,522, with the L1 and the squared Euclidean cost."""
    sizes = settings.pick(((256, 1000), (1024, 1000), (64, 30_522)), ((16, 50),))
    cases, targets = [], []
    for cost in ("l1", "sqeuclidean"):
        for samples, classes in sizes:
            spec = BatchSpec(samples, classes, cost, settings.seed)
            memory = samples == max(size for size, _ in sizes)
            cases.append(compare_batch(spec, PEERS, settings, memory=memory))
            targets += _targets(cases[-1], 5 if cost == "sqeuclidean" else 1)
    return {"cases": cases, "targets": targets}


def _targets(case: dict, unrolled: float | None) -> list[dict]:
    """From b = 64 on no peer is faster at no greater error; so much faster than unrolling."""
    found, targets = case["peers"], []
    ours = {name: each for name, each in found.items() if name.startswith("otkd")}
    for name, each in found.items():
        if case["problem"]["samples"] < 64 or name in ours or "gradient_error" not in each:
            continue
        as_good = [
            own["seconds"]["median"]
            for own in ours.values()
            if own["gradient_error"] <= max(each["gradient_error"], _ROUNDING)
        ]
        if as_good:  # else none was measured
            label = f"{case['name']}: time of {name} / the fastest otkd of no greater error"
            targets.append(target(label, each["seconds"]["median"] / min(as_good), "≥", 1))
    if unrolled is not None and _UNROLLED.name in found:
        same = found[f"otkd, {ITERATIONS} iterations"]["seconds"]["median"]
        times = found[_UNROLLED.name]["seconds"]["median"] / same
        label = f"{case['name']}: time of {ITERATIONS} unrolled iterations / as many of otkd"
        targets.append(target(label, times, "≥", unrolled))
    return targets


def scaling(settings: Settings) -> dict:
    """How time grows with b, d and T, in fitted exponents with 95 % intervals, and memory with b.

    Of two classes otkd's time does not grow with b², and it has a line of its own.
    """
    base = settings.pick({"b": 1024, "d": 3, "T": 20}, {"b": 32, "d": 3, "T": 5})
    grids = {
        "b": settings.pick((256, 512, 1024, 2048, 4096), (16, 32, 64)),
        "d": settings.pick((125, 500, 2000, 8000, 30_522), (16, 32, 64)),
        "T": settings.pick((5, 10, 20, 40, 80), (5, 10, 20)),
    }
    few = {"d": settings.pick({"b": 256}, {"b": 16})}  # samples, where there are many classes
    cases = []
    for axis, sizes in grids.items():
        for kind in ("otkd", "unrolled", "kl_div"):
            points = [{**base, **few.get(axis, {}), axis: size} for size in sizes]
            if kind != "kl_div" or axis != "T":
                cases.append(_growth(f"{kind} over {axis}", kind, axis, points, settings))
        if axis == "b":
            points = [{**base, "d": 2, axis: size} for size in sizes]
            cases.append(_growth("otkd, two classes over b", "otkd", axis, points, settings))
    return {"cases": cases, "targets": []}


def _growth(name: str, kind: str, axis: str, points: Sequence[dict], settings: Settings) -> dict:
    measured = []
    for point in points:
        peer = BatchPeer(kind, kind, {} if kind == "kl_div" else {"iterations": point["T"]})
        spec = BatchSpec(point["b"], point["d"], seed=settings.seed)
        found = _peak(peer, spec) if axis == "b" and not settings.quick else {}
        seconds = measure.spread(measure.repeat(BatchCall(peer, spec), settings.repeats))
        measured.append({**point, **found, "seconds": seconds})
    case = {"name": name, "points": measured, "peers": {}, "times": {}}
    case["exponent"] = exponent(measured, axis)
    if axis != "b":
        case["exponent"]["half_at"] = _half_at(measured, axis)
    return case


def _half_at(points: Sequence[dict], axis: str) -> float | None:
    """Where what grows with ``axis`` is half of the time: intercept over slope of a line.

    None where the intercept is not apart from 0.
    """
    fit = stats.linregress(
        [point[axis] for point in points], [point["seconds"]["median"] for point in points]
    )
    interval = stats.t.ppf(0.975, len(points) - 2) * fit.intercept_stderr
    return fit.intercept / fit.slope if fit.intercept > interval else None


def exponent(points: Sequence[dict], axis: str) -> dict[str, float]:
    """k of time ∝ size^k, fitted to the medians in logarithms, and half its 95 % interval."""
    sizes = [math.log(point[axis]) for point in points]
    fit = stats.linregress(sizes, [math.log(point["seconds"]["median"]) for point in points])
    quantile = stats.t.ppf(0.975, len(points) - 2)
    return {"exponent": fit.slope, "interval": quantile * fit.stderr}


ROWS: dict[str, Callable[[Settings], dict]] = {
    "few_classes": few_classes,
    "many_classes": many_classes,
    "scaling": scaling,
}
