"""The special ways to apply exp(−C/ε), each against what would be used in its place."""

from __future__ import annotations

import warnings

from compare import Row, Settings, compare, target
from peers import Peer
from problems import Spec

from otkd import ConvergenceWarning
from otkd.supports.dense import LARGEST_DENSE

_LOG_DOMAIN = "otkd, two positions: log domain"


def stabilised(settings: Settings) -> dict:
    """One position at ε = 0.005, where the kernel underflows: around potentials, and in logs.

    Positions that share a cost have no kernel around potentials, so two of them are computed in the
    log domain, at half their time for one.
    """
    # As many iterations for both kernels.
    options = {"epsilon": 0.005, "tolerance": 1e-30, "max_iterations": 50}
    peers = [
        Peer("otkd, one position: around potentials", "otkd_sinkhorn", options, positions=1),
        Peer(_LOG_DOMAIN, "otkd_sinkhorn", options),
    ]
    sizes = settings.pick((1000, 2, 64), (60, 2, 8))
    spec = Spec(*sizes, embedding="iid", seed=settings.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the iterations are cut
        case = compare(spec, peers, None, settings, skip_memory=[peer.name for peer in peers])
    cases = [{**case, "name": f"{spec.vocab:,} tokens"}]
    return {"cases": cases, "targets": stabilised_targets(cases)}


def stabilised_targets(cases: list[dict]) -> list[dict]:
    """Faster than the log domain."""
    return [
        target(
            f"{case['name']}: time, {_LOG_DOMAIN} ÷ otkd",
            case["times"][_LOG_DOMAIN]["median"],
            "≥",
            1,
        )
        for case in cases
    ]


def recomputed(settings: Settings) -> dict:
    """Costs that are recomputed for every product, above the largest vocabulary with a matrix.

    The stored matrix is between 16 tokens fewer, the most for which `Dense` stores one. Two
    iterations.
    """
    limits = {"tolerance": 1e-30, "max_iterations": 2}
    vocab = settings.pick(LARGEST_DENSE, 60)
    peers = [
        Peer("otkd, recomputed", "otkd_sinkhorn", limits, rounds=2),
        Peer(
            "otkd, a stored matrix",
            "otkd_sinkhorn",
            {**limits, "first_tokens": vocab},
            rounds=2,
        ),
    ]
    if settings.keops:
        keops = {**limits, "backend": "keops"}
        peers.append(Peer("otkd, KeOps", "otkd_sinkhorn", keops, 1, 1))
    spec = Spec(vocab + 16, *settings.pick((8, 16), (2, 8)), seed=settings.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the iterations are cut
        case = compare(spec, peers, None, settings)
    return {"cases": [{**case, "name": f"{spec.vocab:,} tokens"}], "targets": []}


ROWS: dict[str, Row] = {"stabilised": stabilised, "recomputed": recomputed}
