"""The divergences against the same formulas through autograd, F.kl_div and TRL."""

from __future__ import annotations

from collections.abc import Callable

import torch
from compare import Settings, compare, target
from divergence_peers import PLAIN
from measure import keeping_memory, relative_error
from peers import Call, Peer, prepare
from problems import Spec, build


def peers_of(loss: str) -> list[Peer]:
    """What computes the same as this loss; ours comes first."""
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
    """Value and gradient of 512 positions of 32,000 tokens: time, peak memory, error."""
    sizes = settings.pick((32_000, 512, 1), (300, 8, 1))
    spec = Spec(*sizes, "zipf", "iid", settings.seed)
    cases, targets = [], []
    for loss in PLAIN:
        peers = peers_of(loss)
        case = compare(spec, peers, _reference(spec, loss), settings)
        case["name"] = loss
        cases.append(case)
        ours, *others = (case["peers"][peer.name] for peer in peers if peer.available)
        fastest = min(case["times"].values(), key=lambda times: times["median"])["median"]
        targets.append(target(f"{loss}: time of the fastest peer / otkd", fastest, "≥", 1))
        least = min((o["peak_units"] for o in others if o.get("peak_units")), default=None)
        if least and ours["peak_units"]:
            label = f"{loss}: memory of otkd / the least of the peers"
            targets.append(target(label, ours["peak_units"] / least, "≤", 1))
    return {"cases": cases, "targets": targets}


def extremes(settings: Settings) -> dict:
    """Tokens without mass, and bfloat16, where each implementation is used as it is."""
    spec = Spec(*settings.pick((4000, 64, 1), (300, 8, 1)), "zipf", "iid", settings.seed)
    problem = build(spec)
    without = [z.clone() for z in (problem.student, problem.teacher)]
    for logits in without:
        logits[:, 7] = -torch.inf
    half = [z.bfloat16() for z in (problem.student, problem.teacher)]
    cases = []
    for loss in PLAIN:
        plain = prepare(Peer("", "plain", {"divergence": loss}), spec).function
        # Of the same rounded logits: what is left is the error of the arithmetic.
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
    return {"cases": cases, "targets": []}


def kept_memory(settings: Settings) -> dict:
    """The same times where the allocator keeps what is freed, as torch's does on a GPU.

    glibc's gives large blocks back to the system, which has to clear them before they are used
    again: for losses with many temporaries that is most of the time. Of transport over the heaviest
    tokens it is little, so that what it costs beside F.kl_div depends on it: the same problem as in
    `vocabulary/topk`, where nothing is kept.
    """
    sizes = settings.pick((32_000, 512, 1), (300, 8, 1))
    spec = Spec(*sizes, "zipf", "iid", settings.seed)
    cases, targets = [], []
    with keeping_memory() as kept:
        if not kept:
            reason = "the allocator cannot be told to keep memory"
            return {"measured": False, "reason": reason, "cases": [], "targets": []}
        for loss in PLAIN:
            peers = peers_of(loss)
            names = [peer.name for peer in peers]
            case = compare(spec, peers, None, settings, skip_memory=names)
            cases.append({**case, "name": loss})
            fastest = min(times["median"] for times in case["times"].values())
            targets.append(target(f"{loss}: time of the fastest peer / otkd", fastest, "≥", 1))
        spec = Spec(*settings.pick((32_000, 512, 256), (3000, 16, 16)), seed=settings.seed)
        ours = Peer("otkd.SinkhornLoss", "otkd_sinkhorn", {"k": 64})
        peers = [ours, Peer("F.kl_div", "kl_div"), Peer("otkd.KLLoss", "otkd", {"loss": "KLLoss"})]
        names = [peer.name for peer in peers]
        case = compare(spec, peers, None, settings, skip_memory=names)
        cases.append({**case, "name": "SinkhornLoss, top 64"})
        times = 1 / case["times"]["F.kl_div"]["median"]
        targets.append(target("SinkhornLoss, top 64: time of otkd / F.kl_div", times, "≤", 2))
    return {"cases": cases, "targets": targets}


ROWS: dict[str, Callable[[Settings], dict]] = {
    "divergences": divergences,
    "extremes": extremes,
    "kept_memory": kept_memory,
}
