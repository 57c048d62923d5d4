"""Transport between the tokens of a vocabulary: the rows."""

from __future__ import annotations

from dataclasses import replace

from accuracy_rows import accuracy, language_model
from compare import Row, Settings, compare, errors_of, memory_ratio, peak_of, reference_of, target
from peers import Peer, prepare
from problems import Spec

from otkd.supports import Dense, TopK

GRADIENT_ERROR = 1e-5
TOLERANCES = (1e-5, 3e-6, 2e-6, 1e-6)
_UNREACHABLE = 1e-30  # a tolerance with which no problem stops before the limit of iterations


def dense(settings: Settings) -> dict:
    """Every token, against POT, GeomLoss and unrolled iterations."""
    sizes = settings.pick((4000, 256, 64), (120, 4, 8))
    cases = [_dense_case(Spec(*sizes, "zipf", "clustered", settings.seed), settings)]
    return {"cases": cases, "targets": dense_targets(cases)}


def dense_targets(cases: list[dict]) -> list[dict]:
    """An exact gradient in a fraction of the peers' time; memory does not grow with iterations."""
    (case,) = cases
    name, found = case["name"], case["peers"]
    error = found["otkd"]["gradient_error"]
    targets = [target(f"{name}: gradient error", error, "≤", GRADIENT_ERROR)]
    limits = {"pot": 15, "geomloss .9": 10, "geomloss .9, KeOps": 60, "unrolled": 50}
    for peer, limit in limits.items():
        if peer in case["times"]:
            times = case["times"][peer]["median"]
            targets.append(target(f"{name}: time, {peer} ÷ otkd", times, "≥", limit))
    few, many = (found[f"otkd, {i} iterations"] for i in (50, 200))
    label = f"{name}: growth of otkd's memory from 50 to 200 iterations"
    return [*targets, target(label, memory_ratio(many, few), "≤", 1.05)]


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
    smaller = replace(spec, positions=many)
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
    """The largest tolerance with a sufficiently exact gradient; else the most exact one."""
    search = []
    for tolerance in TOLERANCES:
        call = prepare(Peer("otkd", "otkd_sinkhorn", {"tolerance": tolerance}), spec)
        found = {"tolerance": tolerance, **errors_of(call, reference)}
        search.append({**found, "iterations": call.report.iterations})
        if found["gradient_error"] <= GRADIENT_ERROR:
            return search, search[-1]
    return search, min(search, key=lambda found: found["gradient_error"])


def classes(settings: Settings) -> dict:
    """Every class of a classifier with 3, 10 and 100 classes, 512 samples."""
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
    return {"cases": cases}


def topk(settings: Settings, vocab: int = 32_000) -> dict:
    """The 64 most probable of 32,000 tokens; peers `F.kl_div`, `KLLoss`, `UniversalLogitLoss`."""
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
    cases = []
    for spec in specs:
        many = settings.pick(512, 128)
        reference = reference_of(spec, TopK(many), positions=settings.pick(32, 4))
        case = compare(spec, peers, reference, settings, compared=("otkd",))
        case["reference"] = f"TopK({many}) in float64"
        cases.append(case)
    return {"cases": cases, "targets": topk_targets(cases)}


def topk_targets(cases: list[dict]) -> list[dict]:
    """Not far from F.kl_div in time, and in a large vocabulary next to no memory of its own."""
    targets = []
    for case in cases:
        name, large = case["name"], case["problem"]["vocab"] > 100_000
        kl_div, uld = (
            case["times"][peer]["median"] for peer in ("F.kl_div", "otkd.UniversalLogitLoss")
        )
        targets += [
            target(f"{name}: time, F.kl_div ÷ otkd", kl_div, "≥", 1 / 1.2 if large else 0.5),
            target(f"{name}: time, ULD ÷ otkd", uld, "≥", 5.0),
        ]
        if large:
            peak = case["peers"]["otkd"]["peak_units"]
            beyond = None if peak is None else peak - 1
            label = f"{name}: memory beyond the gradient, N·V·4"
            targets.append(target(label, beyond, "≤", 0.1))
    return targets


def topk_large(settings: Settings) -> dict:
    """The same with 152,000 tokens."""
    return topk(settings, vocab=152_000)


def sizes(settings: Settings) -> dict:
    """The 64 most probable of 32,000 to 262,144 tokens, at 1,024 to 8,192 positions."""
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
    return {"cases": cases}


ROWS: dict[str, Row] = {
    "dense": dense,
    "classes": classes,
    "topk": topk,
    "topk_large": topk_large,
    "accuracy": accuracy,
    "language_model": language_model,
    "sizes": sizes,
}
