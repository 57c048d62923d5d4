"""The special ways to apply exp(−C/ε), each against what would be used in its place."""

from __future__ import annotations

import warnings

from compare import Row, Settings, compare, target
from peers import Peer
from problems import Spec

from otkd import ConvergenceWarning

_ITERATIONS = {"tolerance": 1e-30, "max_iterations": 50}  # as many for every kernel
_FEW = {**_ITERATIONS, "max_iterations": 3}


def stabilised(settings: Settings) -> dict:
    """One position at ε = 0.005, where the kernel underflows: around potentials, and in logs.

    Positions that share a cost have no kernel around potentials, so two of them are computed in the
    log domain, at half their time for one.
    """
    sizes = settings.pick((1000, 2, 64), (60, 2, 8))
    options = {"epsilon": 0.005, **_ITERATIONS}
    peers = [
        Peer("otkd, one position: around potentials", "otkd_sinkhorn", options, positions=1),
        Peer("otkd, two positions: log domain", "otkd_sinkhorn", options),
    ]
    names = [peer.name for peer in peers]
    case = _compared(Spec(*sizes, embedding="iid", seed=settings.seed), peers, settings, names)
    return {"cases": [case], "targets": stabilised_targets([case])}


def stabilised_targets(cases: list[dict]) -> list[dict]:
    """Faster than the log domain."""
    return _faster(cases, "otkd, two positions: log domain")


def lazy(settings: Settings) -> dict:
    """All of 20,000 tokens, 2 positions: costs computed anew in blocks, and by KeOps."""
    peers = [Peer("otkd, costs in blocks", "otkd_sinkhorn", _FEW, rounds=2)]
    if settings.keops:
        options = {**_FEW, "backend": "keops"}
        peers.append(Peer("otkd, KeOps", "otkd_sinkhorn", options, rounds=1))
    spec = Spec(*settings.pick((20_000, 2, 64), (100, 2, 8)), seed=settings.seed)
    case = _compared(spec, peers, settings, ())
    return {"cases": [case], "targets": lazy_targets([case])}


def lazy_targets(cases: list[dict]) -> list[dict]:
    """Blocks are no slower than KeOps on a CPU."""
    return _faster(cases, "otkd, KeOps")


def _compared(spec: Spec, peers: list[Peer], settings: Settings, skip_memory) -> dict:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the iterations are cut
        case = compare(spec, peers, None, settings, skip_memory=skip_memory)
    return {**case, "name": f"{spec.vocab:,} tokens"}


def _faster(cases: list[dict], peer: str) -> list[dict]:
    found = [case["times"].get(peer) for case in cases]
    return [
        target(f"{case['name']}: time, {peer} ÷ otkd", times and times["median"], "≥", 1)
        for case, times in zip(cases, found, strict=True)
    ]


ROWS: dict[str, Row] = {"stabilised": stabilised, "lazy": lazy}
