"""The rows of the benchmark: what is measured on what, and what it should be."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from compare import Settings, compare, errors_of, peak_of, reference_of, target
from peers import Peer, prepare
from problems import EMBEDDINGS, LOGITS, Spec, build, coverage

from otkd.supports import Dense, TopK

GRADIENT_ERROR = 1e-5
TOLERANCES = (1e-5, 3e-6, 2e-6, 1e-6)
_UNREACHABLE = 1e-30  # a tolerance with which all iterations are made


def dense(settings: Settings) -> dict:
    """Every token, against POT, GeomLoss and unrolled iterations."""
    sizes = settings.pick((4000, 256, 64), (120, 4, 8))
    cases = [_dense_case(Spec(*sizes, "zipf", "clustered", settings.seed), settings)]
    targets = []
    for case in cases:
        name, found = case["name"], case["peers"]
        error = found["otkd"]["gradient_error"]
        targets.append(target(f"{name}: gradient error", error, "≤", GRADIENT_ERROR))
        limits = {"pot": 15, "geomloss .9": 10, "geomloss .9, KeOps": 60, "unrolled": 50}
        for peer, limit in limits.items():
            if peer in case["times"]:
                times = case["times"][peer]["median"]
                targets.append(target(f"{name}: time of {peer} / otkd", times, "≥", limit))
        few, many = (found[f"otkd, {i} iterations"]["peak_bytes"] for i in (50, 200))
        growth = many / few if few and many else None
        targets.append(target(f"{name}: memory at 200 / 50 iterations", growth, "≤", 1.05))
    return {"cases": cases, "targets": targets}


def _dense_case(spec: Spec, settings: Settings) -> dict:
    reference = reference_of(spec, Dense(), positions=16)
    search, chosen = _search_tolerance(spec, reference)
    ours = Peer("otkd", "otkd_sinkhorn", {"tolerance": chosen["tolerance"]})
    iterations = chosen["iterations"]
    part = min(5, iterations)
    many, few = min(64, spec.positions), settings.pick(2, 1)
    pot = {"threshold": chosen["tolerance"], "max_iterations": 1000}
    slow = min(2, settings.repeats)
    log_domain = Peer(
        "unrolled, log domain",
        "unrolled",
        {"iterations": part, "log_domain": True},
        1,
        slow,
        iterations / part,
    )
    peers = [
        ours,
        Peer("otkd, default tolerance", "otkd_sinkhorn"),
        Peer("unrolled", "unrolled", {"iterations": iterations}, many, slow),
        Peer("pot", "pot", pot, few, slow),
        Peer("geomloss .9", "geomloss", {"scaling": 0.9}, 1, slow),
        log_domain,
    ]
    if settings.keops:
        online = {"scaling": 0.9, "backend": "online"}
        peers.append(Peer("geomloss .9, KeOps", "geomloss", online, 1, 1))
    unmeasured = (
        "unrolled",
        log_domain.name,
        *(["otkd"] if settings.quick else ()),
    )
    case = compare(spec, peers, reference, settings, skip_memory=unmeasured)
    smaller = dataclasses.replace(spec, positions=many)
    for count in (50, 200):
        limits = {"tolerance": _UNREACHABLE, "max_iterations": count}
        measured = [Peer(f"otkd, {count} iterations", "otkd_sinkhorn", limits)]
        if not settings.quick:
            unrolled = {"iterations": count}
            measured.append(Peer(f"unrolled, {count} iterations", "unrolled", unrolled))
        for peer in measured:
            case["peers"][peer.name] = peak_of(peer, smaller)
    return {**case, "tolerance_search": search, "chosen": chosen}


def _search_tolerance(spec: Spec, reference) -> tuple[list[dict], dict]:
    """The loosest tolerance with which the gradient is good enough, else the most exact."""
    search = []
    for tolerance in TOLERANCES:
        call = prepare(Peer("otkd", "otkd_sinkhorn", {"tolerance": tolerance}), spec)
        found = {"tolerance": tolerance, **errors_of(call, reference)}
        search.append({**found, "iterations": call.report.iterations})
        if found["gradient_error"] <= GRADIENT_ERROR:
            return search, search[-1]
    return search, min(search, key=lambda found: found["gradient_error"])


def classes(settings: Settings) -> dict:
    """The classes of a classifier, 512 samples: every one of 3, 10 and 100."""
    cases = []
    for vocab in settings.pick((3, 10, 100), (3,)):
        spec = Spec(vocab, settings.pick(512, 4), 64, "zipf", "iid", settings.seed)
        reference = reference_of(spec, Dense())
        pot = {"threshold": 1e-4, "max_iterations": 1000}
        peers = [
            Peer("otkd", "otkd_sinkhorn"),
            Peer("pot", "pot", pot, settings.pick(16, 1)),
            Peer("unrolled, 20 iterations", "unrolled", {"iterations": 20}),
            Peer("unrolled, 200 iterations", "unrolled", {"iterations": 200}),
            Peer("otkd.KLLoss", "otkd", {"loss": "KLLoss"}),
        ]
        names = [peer.name for peer in peers]
        case = compare(spec, peers, reference, settings, compared=names[:-1], skip_memory=names)
        cases.append({**case, "name": f"{vocab} classes"})
    return {"cases": cases, "targets": []}


def topk(settings: Settings, vocab: int = 32_000) -> dict:
    """The 64 heaviest tokens of each side, against the cheapest losses there are."""
    sizes = settings.pick((vocab, 512, 256), (3000, 16, 16))
    specs = [
        Spec(*sizes, logits, "clustered", settings.seed)
        for logits in settings.pick(("zipf", "dirichlet"), ("zipf",))
    ]
    peers = [
        Peer("otkd", "otkd_sinkhorn", {"k": 64}),
        Peer("F.kl_div", "kl_div"),
        Peer("otkd.KLLoss", "otkd", {"loss": "KLLoss"}),
        Peer("otkd.UniversalLogitLoss", "otkd", {"loss": "UniversalLogitLoss"}),
    ]
    cases, targets = [], []
    for spec in specs:
        many = settings.pick(512, 128)
        reference = reference_of(spec, TopK(many), positions=settings.pick(32, 4))
        case = compare(spec, peers, reference, settings, compared=("otkd",))
        case["reference"] = f"TopK({many}) in float64"
        peak = case["peers"]["otkd"]["peak_units"]
        beyond = None if peak is None else peak - 1
        cost = case["times"]["F.kl_div"]["median"]
        uld = case["times"]["otkd.UniversalLogitLoss"]["median"]
        limit = 2.0 if vocab < 100_000 else 1.2
        targets += [
            target(f"{spec.name}: time of otkd / F.kl_div", 1 / cost, "≤", limit),
            target(f"{spec.name}: time of ULD / otkd", uld, "≥", 5.0),
        ]
        if vocab > 100_000:
            name = f"{spec.name}: memory beyond the gradient, N·V·4"
            targets.append(target(name, beyond, "≤", 0.1))
        cases.append(case)
    return {"cases": cases, "targets": targets}


def topk_large(settings: Settings) -> dict:
    """The same for 152,000 tokens."""
    return topk(settings, vocab=152_000)


def sizes(settings: Settings) -> dict:
    """The 64 heaviest of up to 262,144 tokens, at up to 8,192 positions."""
    full = ((32_000, 8192), (128_000, 2048), (262_144, 1024))
    peers = [
        Peer("otkd", "otkd_sinkhorn", {"k": 64}),
        Peer("F.kl_div", "kl_div"),
        Peer("otkd.KLLoss", "otkd", {"loss": "KLLoss"}),
    ]
    cases = []
    for vocab, positions in settings.pick(full, ((3000, 16),)):
        spec = Spec(vocab, positions, settings.pick(256, 16), seed=settings.seed)
        case = compare(spec, peers, None, settings)
        cases.append({**case, "name": f"{vocab:,} tokens, {positions:,} positions"})
    return {"cases": cases, "targets": []}


def accuracy(settings: Settings) -> dict:
    """How far top-k is from every token, for k from 16 to 512."""
    vocab, positions, width = settings.pick((4000, 64, 64), (300, 4, 8))
    sizes = settings.pick((16, 32, 64, 128, 256, 512), (16, 64))
    cases, targets = [], []
    for logits in LOGITS:
        for embedding in EMBEDDINGS:
            spec = Spec(vocab, positions, width, logits, embedding, settings.seed)
            reference = reference_of(spec, Dense())
            points = []
            for k, clusters in (*((k, 1) for k in sizes), *((64, c) for c in (16, 32, 64))):
                support = {"k": k, "clusters": clusters, "tolerance": 1e-5}
                call = prepare(Peer("", "otkd_sinkhorn", support), spec)
                errors = errors_of(call, reference)
                covered = float(call.report.coverage)
                points.append({"k": k, "clusters": clusters, **errors, "coverage": covered})
            heads = coverage(build(spec).student)
            if heads >= 0.85:
                for point in points:
                    if point["k"] == 64:
                        name = f"{spec.name}: gradient error, {point['clusters']} tail atoms"
                        targets.append(target(name, point["gradient_error"], "≤", 0.03))
            case = {"name": spec.name, "problem": spec.as_dict(), "coverage_of_64": heads}
            cases.append({**case, "points": points})
    return {"cases": cases, "targets": targets}


ROWS: dict[str, Callable[[Settings], dict]] = {
    "dense": dense,
    "classes": classes,
    "topk": topk,
    "topk_large": topk_large,
    "accuracy": accuracy,
    "sizes": sizes,
}
