"""The special ways to apply exp(−C/ε), each against what would be used in its place."""

from __future__ import annotations

import warnings

from compare import Row, Settings, compare, target
from peers import Peer
from problems import Spec

from otkd import ConvergenceWarning

_ITERATIONS = {"tolerance": 1e-30, "max_iterations": 50}  # as many for every kernel


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
    """All of 16,384 and of 20,000 tokens, 8 positions: costs stored, in blocks, and in KeOps.

    Above 16,384 tokens the costs are computed anew in every product, in blocks.
    """
    cases = []
    for vocab in settings.pick((16_384, 20_000), (64, 100)):
        ours = "otkd, costs in blocks" if vocab > 16_384 else "otkd, stored costs"
        peers = [Peer(ours, "otkd_sinkhorn", _ITERATIONS, rounds=2)]
        if settings.keops:
            options = {**_ITERATIONS, "backend": "keops"}
            peers.append(Peer("otkd, KeOps", "otkd_sinkhorn", options, rounds=2))
        sizes = (vocab, *settings.pick((8, 64), (2, 8)))
        cases.append(_compared(Spec(*sizes, seed=settings.seed), peers, settings, ()))
    return {"cases": cases, "targets": lazy_targets(cases)}


def lazy_targets(cases: list[dict]) -> list[dict]:
    """Blocks are no slower than KeOps on a CPU."""
    return _faster(cases[1:], "otkd, KeOps")


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
