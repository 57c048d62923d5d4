"""Transport between the samples of a batch: the rows, and how time grows with b, d and T."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace

import measure
import memory
from batch_peers import BatchCall, BatchPeer, BatchSpec, build
from compare import Row, Settings, target
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
_ROUNDING = 1e-4  # smaller errors of a float32 gradient come from the rounding of its inputs
# The value whose gradient a peer computes and is compared with: ⟨P, C⟩ ("sharp"), or none where the
# peer solves another problem. All others compute the gradient of the dual value.
VALUES = {"unrolled": "sharp", "emd": None, "kl_div": None}


def compare_batch(
    spec: BatchSpec, peers: Sequence[BatchPeer], settings: Settings, *, peaks: bool = False
) -> dict:
    """Time and error, and with ``peaks`` peak memory, of every peer; the first peer is ours."""
    missing = [peer.name for peer in peers if not peer.available]
    peers = [peer for peer in peers if peer.available and spec.samples <= peer.largest]
    calls = {peer.name: BatchCall(peer, spec) for peer in peers}
    seconds = measure.alternate(calls, dict.fromkeys(calls, settings.repeats))
    ours = peers[0].name
    case = measure.against(seconds, ours)
    references = {value: reference_of(spec, value) for value in ("dual", "sharp")}
    for peer in peers:
        if (value := VALUES.get(peer.kind, "dual")) is not None:
            error = measure.relative_error(calls[peer.name]()[1], references[value])
            case["peers"][peer.name]["gradient_error"] = error
        if peaks and not (settings.quick and peer is not peers[0]):
            case["peers"][peer.name] |= _peak(peer, spec)
    report = calls[ours].function.last_report
    return {
        "name": spec.name,
        "problem": asdict(spec),
        "iterations": report.iterations,
        **case,
        "not_installed": missing,
    }


def _peak(peer: BatchPeer, spec: BatchSpec) -> dict:
    """Peak memory beyond the inputs, in matrices of b × b float32 numbers."""
    arguments = {"spec": asdict(spec), "peer": asdict(peer)}
    return memory.peak("batch_peers", arguments, spec.matrix_bytes, "peak_matrices")


def reference_of(spec: BatchSpec, value: str = "dual"):
    """The gradient of the converged value in float64."""
    exact = BatchPeer("", "otkd", {"tolerance": 1e-9, "value": value})
    spec = replace(spec, dtype="float64", device="cpu")
    gradient = BatchCall(exact, spec)()[1]
    build.cache_clear()
    return gradient


def few_classes(settings: Settings) -> dict:
    """2 and 3 classes with the L1 cost, for b = 16 to 4,096 samples."""
    sizes = settings.pick((16, 64, 256, 1024, 4096), (16, 32))
    peers = [*PEERS, _ONLINE] if settings.keops else PEERS
    cases = []
    for classes in (2, 3):
        for samples in sizes:
            spec = BatchSpec(samples, classes, seed=settings.seed)
            peaks = samples == sizes[-1]
            cases.append(compare_batch(spec, peers, settings, peaks=peaks))
    return {"cases": cases, "targets": few_classes_targets(cases)}


def few_classes_targets(cases: list[dict]) -> list[dict]:
    """See :func:`_targets`; 20 iterations against 20 are compared at 256 and 1,024 samples."""
    aims = {256: 4, 1024: 8}
    return [t for case in cases for t in _targets(case, aims.get(case["problem"]["samples"]))]


def many_classes(settings: Settings) -> dict:
    """1,000 and 30,522 classes, with the L1 and the squared Euclidean cost."""
    sizes = settings.pick(((256, 1000), (1024, 1000), (64, 30_522)), ((16, 50),))
    cases = []
    for cost in ("l1", "sqeuclidean"):
        for samples, classes in sizes:
            spec = BatchSpec(samples, classes, cost, settings.seed)
            peaks = samples == max(size for size, _ in sizes)
            cases.append(compare_batch(spec, PEERS, settings, peaks=peaks))
    return {"cases": cases, "targets": many_classes_targets(cases)}


def many_classes_targets(cases: list[dict]) -> list[dict]:
    """See :func:`_targets`."""
    aims = {"l1": 1, "sqeuclidean": 5}
    return [t for case in cases for t in _targets(case, aims[case["problem"]["cost"]])]


def _targets(case: dict, unrolled: float | None) -> list[dict]:
    """From 64 samples on, no peer should be faster than otkd at the same error or a smaller one.

    ``unrolled`` is the aim for 20 unrolled iterations ÷ 20 iterations of otkd, where there is one.
    """
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
        if as_good:  # otherwise no setting of otkd was measured at so small an error
            label = f"{case['name']}: time, {name} ÷ fastest otkd setting with no greater error"
            targets.append(target(label, each["seconds"]["median"] / min(as_good), "≥", 1))
    if unrolled is not None and _UNROLLED.name in found:
        same = found[f"otkd, {ITERATIONS} iterations"]["seconds"]["median"]
        times = found[_UNROLLED.name]["seconds"]["median"] / same
        label = f"{case['name']}: time, {ITERATIONS} unrolled ÷ {ITERATIONS} otkd iterations"
        targets.append(target(label, times, "≥", unrolled))
    return targets


def scaling(settings: Settings) -> dict:
    """Growth of time with b, d and T (fitted exponents, 95 % intervals), and of memory with b.

    Two classes have a line of their own, because there otkd's time does not grow with b².
    """
    base = settings.pick({"b": 1024, "d": 3, "T": 20}, {"b": 32, "d": 3, "T": 5})
    grids = {
        "b": settings.pick((256, 512, 1024, 2048, 4096), (16, 32, 64)),
        "d": settings.pick((125, 500, 2000, 8000, 30_522), (16, 32, 64)),
        "T": settings.pick((5, 10, 20, 40, 80), (5, 10, 20)),
    }
    few = {"d": settings.pick({"b": 256}, {"b": 16})}  # fewer samples where there are many classes
    cases = []
    for axis, sizes in grids.items():
        for kind in ("otkd", "unrolled", "kl_div"):
            points = [{**base, **few.get(axis, {}), axis: size} for size in sizes]
            if kind != "kl_div" or axis != "T":
                cases.append(_growth(f"{kind} over {axis}", kind, axis, points, settings))
        if axis == "b":
            points = [{**base, "d": 2, axis: size} for size in sizes]
            cases.append(_growth("otkd, two classes over b", "otkd", axis, points, settings))
    return {"cases": cases}


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
    """The size at which the part that grows with ``axis`` is half of the time.

    It is intercept over slope of a fitted line; None if the intercept is not significantly above 0.
    """
    fit = stats.linregress(
        [point[axis] for point in points], [point["seconds"]["median"] for point in points]
    )
    interval = stats.t.ppf(0.975, len(points) - 2) * fit.intercept_stderr
    return fit.intercept / fit.slope if fit.intercept > interval else None


def exponent(points: Sequence[dict], axis: str) -> dict[str, float]:
    """k of time ∝ size^k, fitted to the logarithms of the medians, and half its 95 % interval."""
    sizes = [math.log(point[axis]) for point in points]
    fit = stats.linregress(sizes, [math.log(point["seconds"]["median"]) for point in points])
    quantile = stats.t.ppf(0.975, len(points) - 2)
    return {"exponent": fit.slope, "interval": quantile * fit.stderr}


ROWS: dict[str, Row] = {
    "few_classes": few_classes,
    "many_classes": many_classes,
    "scaling": scaling,
}
