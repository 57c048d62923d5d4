"""The error of the gradient against time, over each method's own setting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TypeVar

import measure
from batch_peers import BatchCall, BatchPeer, BatchSpec
from batch_rows import VALUES
from batch_rows import reference_of as batch_reference
from compare import Row, Settings, errors_of, reference_of
from peers import Peer, prepare
from problems import Spec

from otkd.supports import Dense

P = TypeVar("P", Peer, BatchPeer)
EPSILONS = (0.05, 0.1, 0.5)
BATCH_EPSILONS = (0.02, *EPSILONS)  # at the smallest, exp(−C/ε) is 0 for many pairs
_TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
# Peers that loop over positions are timed on this many, twice.
_FEW = 2


def _vocabulary_peers(epsilon: float) -> dict[str, list[Peer]]:
    """Families of peers, each over its own setting."""

    def ours(label: str, **settings) -> Peer:
        return Peer(label, "otkd_sinkhorn", {"epsilon": epsilon, **settings})

    return {
        "otkd, Dense": [ours(f"tolerance {t:g}", tolerance=t) for t in _TOLERANCES],
        "otkd, TopK": [ours(f"k = {k}", k=k) for k in (16, 32, 64, 128, 256)],
        "otkd, TopK with 32 clusters": [
            ours(f"k = {k}, 32 tail atoms", k=k, clusters=32) for k in (16, 64, 256)
        ],
        "otkd, NearestNeighbours": [
            ours(f"{n} neighbours", neighbours=n) for n in (32, 64, 128, 256)
        ],
        "POT": [
            Peer(
                f"stopThr {t:g}",
                "pot",
                {"threshold": t, "max_iterations": 1000, "epsilon": epsilon},
                _FEW,
            )
            for t in _TOLERANCES
        ],
        "GeomLoss": [
            Peer(f"scaling {s}", "geomloss", {"scaling": s, "epsilon": epsilon}, _FEW)
            for s in (0.5, 0.7, 0.9, 0.97)
        ],
    }


def vocabulary(settings: Settings) -> dict:
    """Every one of 1,000 tokens, 64 positions, Zipf logits, a clustered embedding."""
    sizes = settings.pick((1000, 64, 64), (90, 4, 8))
    spec = Spec(*sizes, "zipf", "clustered", settings.seed)
    cases = []
    for epsilon in settings.pick(EPSILONS, EPSILONS[1:2]):
        reference = reference_of(spec, Dense(), epsilon=epsilon)
        points = []
        for family, peer in _each(_vocabulary_peers(epsilon), settings):
            call = prepare(peer, spec)
            factor = spec.positions / (peer.positions or spec.positions)
            rounds = settings.repeats if factor == 1 else min(2, settings.repeats)
            seconds = [factor * t for t in _seconds(call, rounds)]
            errors = errors_of(call, reference)
            points.append(_point(family, peer.name, errors["gradient_error"], seconds))
        cases.append({"name": f"ε = {epsilon:g}", "problem": asdict(spec), "points": points})
    return {"cases": cases}


_ITERATIONS = (5, 10, 20, 50, 100)
_BATCH_FAMILIES: dict[str, Sequence[BatchPeer]] = {
    "otkd": [BatchPeer(f"tolerance {t:g}", "otkd", {"tolerance": t}) for t in _TOLERANCES],
    "unrolled": [
        BatchPeer(f"{n} iterations", "unrolled", {"iterations": n}) for n in _ITERATIONS
    ],
    "POT": [
        BatchPeer(f"stopThr {t:g}", "pot", {"iterations": 2000, "threshold": t})
        for t in _TOLERANCES
    ],
    "POT batch": [
        BatchPeer(f"{n} iterations", "pot_batch", {"iterations": n}) for n in _ITERATIONS
    ],
    "GeomLoss": [
        BatchPeer(f"scaling {s}", "geomloss", {"scaling": s}) for s in (0.5, 0.7, 0.9, 0.97)
    ],
}  # fmt: skip


def batch(settings: Settings) -> dict:
    """256 samples of 3 classes, the L1 cost between them."""
    cases = []
    for epsilon in settings.pick(BATCH_EPSILONS, EPSILONS[1:2]):
        spec = BatchSpec(settings.pick(256, 16), 3, seed=settings.seed, epsilon=epsilon)
        references = {value: batch_reference(spec, value) for value in ("dual", "sharp")}
        points = []
        for family, peer in _each(_BATCH_FAMILIES, settings):
            call = BatchCall(peer, spec)
            seconds = _seconds(call, settings.repeats)
            error = measure.relative_error(call()[1], references[VALUES.get(peer.kind, "dual")])
            points.append(_point(family, peer.name, error, seconds))
        cases.append({"name": f"ε = {epsilon:g}", "problem": asdict(spec), "points": points})
    return {"cases": cases}


def _each(families: Mapping[str, Sequence[P]], settings: Settings) -> Iterator[tuple[str, P]]:
    """Every installed peer with its family; in a quick run only the first of each family."""
    for family, peers in families.items():
        for peer in settings.pick(peers, peers[:1]):
            if peer.available:
                yield family, peer


def _seconds(call: measure.Call, rounds: int) -> list[float]:
    with measure.without_warnings():
        return measure.repeat(call, rounds)


def _point(family: str, setting: str, error: float, seconds: list[float]) -> dict:
    spread = measure.spread(seconds)
    return {"family": family, "setting": setting, "gradient_error": error, "seconds": spread}


ROWS: dict[str, Row] = {"vocabulary": vocabulary, "batch": batch}
