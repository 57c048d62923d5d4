"""The divergences against the plain formulas with autograd, F.kl_div and TRL."""

from __future__ import annotations

import torch
from compare import Row, Settings, compare, memory_ratio, target
from divergence_peers import PLAIN
from files import unmeasured
from measure import relative_error
from memory import keeping_memory
from peers import Call, Peer, prepare
from problems import Spec, build


def peers_of(loss: str) -> list[Peer]:
    """Implementations of this loss; ours comes first."""
    peers = [
        Peer(f"otkd.{loss}", "otkd", {"loss": loss}),
        Peer("plain", "plain", {"divergence": loss}),
    ]
    if loss == "KLLoss":
        peers.append(Peer("F.kl_div", "kl_div"))
        peers.append(Peer("torchdistill KDLoss", "torchdistill"))
    if loss == "JSDLoss":
        peers.append(Peer("TRL generalized JSD", "trl_jsd"))
    return peers


def _reference(spec: Spec, loss: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and gradient of the plain formula in float64."""
    problem = build(spec)
    function = prepare(Peer("", "plain", {"divergence": loss}), spec).function
    return Call(function, problem.student.double(), problem.teacher.double())()


def divergences(settings: Settings) -> dict:
    """Value and gradient at 512 positions of 32,000 tokens: time, peak memory, error."""
    spec = _spec(settings)
    cases = []
    for loss in PLAIN:
        case = compare(spec, peers_of(loss), _reference(spec, loss), settings)
        cases.append({**case, "name": loss})
    return {"cases": cases, "targets": divergences_targets(cases)}


def divergences_targets(cases: list[dict]) -> list[dict]:
    """No peer should be faster than otkd, or need less memory."""
    targets = []
    for case in cases:
        targets.append(_fastest(case))
        ours, *others = case["peers"].values()
        ratios = [ratio for other in others if (ratio := memory_ratio(other, ours)) is not None]
        if ratios:
            label = f"{case['name']}: memory, smallest peer ÷ otkd"
            targets.append(target(label, min(ratios), "≥", 1))
    return targets


def _fastest(case: dict) -> dict:
    fastest = min(times["median"] for times in case["times"].values())
    return target(f"{case['name']}: time, fastest peer ÷ otkd", fastest, "≥", 1)


def _spec(settings: Settings) -> Spec:
    sizes = settings.pick((32_000, 512, 1), (300, 8, 1))
    return Spec(*sizes, "zipf", "iid", settings.seed)


def extremes(settings: Settings) -> dict:
    """Logits of −inf, and bfloat16 logits, with each implementation as it is."""
    spec = Spec(*settings.pick((4000, 64, 1), (300, 8, 1)), "zipf", "iid", settings.seed)
    problem = build(spec)
    without = [z.clone() for z in (problem.student, problem.teacher)]
    for logits in without:
        logits[:, 7] = -torch.inf
    half = [z.bfloat16() for z in (problem.student, problem.teacher)]
    cases = []
    for loss in PLAIN:
        plain = prepare(Peer("", "plain", {"divergence": loss}), spec).function
        # The reference uses the same rounded logits, so the error is that of the arithmetic alone.
        exact = Call(plain, *(z.double() for z in half))()
        found = {}
        for peer in filter(lambda peer: peer.available, peers_of(loss)):
            function = prepare(peer, spec).function
            values, gradient = Call(function, *without)()
            rounded = Call(function, *half)()
            found[peer.name] = {
                "finite_without_mass": bool(values.isfinite().all() & gradient.isfinite().all()),
                "least_value": float(rounded[0].min()),
                "value_error": relative_error(rounded[0], exact[0]),
                "gradient_error": relative_error(rounded[1], exact[1]),
            }
        cases.append({"name": f"{loss}, bfloat16", "peers": found, "times": {}})
    return {"cases": cases}


def kept_memory(settings: Settings) -> dict:
    """Times with an allocator that reuses freed memory, as CUDA's caching allocator does.

    glibc's allocator returns large blocks to the system, and new ones have to be cleared before
    they are used. For losses with many temporaries that is most of the time; transport over the
    most probable tokens has few. The problems are those of `divergences` and of `vocabulary/topk`.
    """
    with keeping_memory() as kept:
        if not kept:
            return unmeasured("the allocator cannot be told to keep freed memory")
        cases = [_times(_spec(settings), loss, peers_of(loss), settings) for loss in PLAIN]
        spec = Spec(*settings.pick((32_000, 512, 256), (3000, 16, 16)), seed=settings.seed)
        ours = Peer("otkd.SinkhornLoss", "otkd_sinkhorn", {"k": 64})
        peers = [ours, Peer("F.kl_div", "kl_div"), Peer("otkd.KLLoss", "otkd", {"loss": "KLLoss"})]
        cases.append(_times(spec, "SinkhornLoss, top 64", peers, settings))
    return {"cases": cases, "targets": kept_memory_targets(cases)}


def _times(spec: Spec, name: str, peers: list[Peer], settings: Settings) -> dict:
    names = [peer.name for peer in peers]
    return {**compare(spec, peers, None, settings, skip_memory=names), "name": name}


def kept_memory_targets(cases: list[dict]) -> list[dict]:
    """No peer of a divergence should be faster, and F.kl_div at most twice as fast as transport."""
    *divergences, transport = cases
    label = f"{transport['name']}: time, F.kl_div ÷ otkd"
    times = transport["times"]["F.kl_div"]["median"]
    return [*map(_fastest, divergences), target(label, times, "≥", 0.5)]


ROWS: dict[str, Row] = {
    "divergences": divergences,
    "extremes": extremes,
    "kept_memory": kept_memory,
}
