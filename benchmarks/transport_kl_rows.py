"""The transport KL with its closed form: time, memory, and error against the whole vocabulary."""

from __future__ import annotations

from dataclasses import asdict

import torch
from compare import Row, Settings, compare, target
from files import unmeasured
from measure import relative_error
from memory import keeping_memory
from model_logits import MODEL, TEMPERATURES, at_temperatures, model_problem
from peers import Peer
from problems import Spec, build, coverage
from torch import Tensor

import otkd
from otkd.costs import EmbeddingCost
from otkd.supports import TopK

PRICES = (3.0, 10.0, 30.0)
SUPPORTS = {
    "the default, TopK(32)": None,
    "TopK(64)": TopK(64),
    "TopK(64, clusters=64)": TopK(64, clusters=64),
}
_LARGEST_ERROR = 0.03
_ROWS_AT_A_TIME = 1024


def time(settings: Settings) -> dict:
    """Value and gradient at 512 positions of 32,000 tokens: time, peak memory."""
    case = compare(_spec(settings), _peers(), None, settings)
    return {"cases": [{**case, "name": "transport KL"}], "targets": time_targets([case])}


def kept_memory(settings: Settings) -> dict:
    """The same times with an allocator that reuses freed memory."""
    with keeping_memory() as kept:
        if not kept:
            return unmeasured("the allocator cannot be told to keep freed memory")
        names = [peer.name for peer in _peers()]
        case = compare(_spec(settings), _peers(), None, settings, skip_memory=names)
    return {"cases": [{**case, "name": "transport KL"}], "targets": time_targets([case])}


def time_targets(cases: list[dict]) -> list[dict]:
    """Not far from F.kl_div."""
    (case,) = cases
    times = case["times"]["F.kl_div"]["median"]
    return [target("transport KL: time, F.kl_div ÷ otkd", times, "≥", 1 / 2.2)]


kept_memory_targets = time_targets


def _spec(settings: Settings) -> Spec:
    return Spec(*settings.pick((32_000, 512, 256), (3000, 16, 16)), seed=settings.seed)


def _peers() -> list[Peer]:
    return [
        Peer("otkd.TransportKLLoss", "otkd_transport_kl"),
        Peer("F.kl_div", "kl_div"),
        Peer("otkd.KLLoss", "otkd", {"loss": "KLLoss"}),
        Peer("otkd.SinkhornLoss, top 64", "otkd_sinkhorn", {"k": 64}),
    ]


def accuracy(settings: Settings) -> dict:
    """Gradient error against a kernel over all tokens, at three prices and temperatures."""
    sizes = settings.pick((4000, 16, 64), (300, 4, 8))
    cases = []
    for logits, embedding in (("zipf", "clustered"), ("flat", "clustered"), ("zipf", "iid")):
        spec = Spec(*sizes, logits, embedding, settings.seed)
        problem = build(spec)
        points = _points(problem.student, problem.teacher, problem.embedding)
        heads = {"coverage_of_64": coverage(problem.student)}
        cases.append({"name": spec.name, "problem": asdict(spec), **heads, "points": points})
    return {"cases": cases, "targets": accuracy_targets(cases)}


def language_model(settings: Settings) -> dict:
    """The same for SmolLM2-135M and a student of six of its layers, over all 49,152 tokens."""
    problem = model_problem(quick=settings.quick, seed=settings.seed)
    points = _points(*problem)
    heads = {"coverage_of_64": coverage(problem.student)}
    cases = [{"name": MODEL, "problem": problem.sizes(), **heads, "points": points}]
    return {"cases": cases, "targets": accuracy_targets(cases)}


def accuracy_targets(cases: list[dict]) -> list[dict]:
    """A gradient within 3 % at the default price and the default support."""
    return [
        target(
            f"{case['name']}: gradient error, T = {point['temperature']:g}",
            point["gradient_error"],
            "≤",
            _LARGEST_ERROR,
        )
        for case in cases
        for point in case["points"]
        if point["support"] == next(iter(SUPPORTS)) and point["price"] == PRICES[-1]
    ]


language_model_targets = accuracy_targets


def _points(student: Tensor, teacher: Tensor, embedding: Tensor) -> list[dict]:
    """Errors of every support, and the distance of KL's gradient, at all prices and temperatures.

    Temperatures are treated as further positions, so that the kernel is computed once for each.
    """
    scaled = [at_temperatures(x) for x in (student, teacher)]
    cost, points = EmbeddingCost(embedding), []
    for price, (value, gradient) in zip(PRICES, _exact(*scaled, cost), strict=True):
        found = {"KL": otkd.KLLoss(reduction="none")}
        for name, support in SUPPORTS.items():
            # "auto" would be every token of a small vocabulary.
            support = support or TopK(32)
            found[name] = otkd.TransportKLLoss(cost, price=price, support=support, reduction="none")
        for name, loss in found.items():
            z = scaled[0].float().requires_grad_()
            values = loss(z, scaled[1].float())
            (slope,) = torch.autograd.grad(values.sum(), z)
            parts = zip(
                TEMPERATURES,
                *(x.chunk(len(TEMPERATURES)) for x in (values.detach(), value, slope, gradient)),
                strict=True,
            )
            for temperature, ours, exact, our_slope, exact_slope in parts:
                points.append(
                    {
                        "price": price,
                        "temperature": temperature,
                        "support": name,
                        "value_error": relative_error(ours, exact),
                        "gradient_error": relative_error(our_slope, exact_slope),
                    }
                )
    return points


def _exact(student: Tensor, teacher: Tensor, cost: EmbeddingCost) -> list[tuple[Tensor, Tensor]]:
    """Values and logit gradients in float64 by the definition, with the whole kernel, by price."""
    q, p = student.softmax(-1), teacher.softmax(-1)
    both = torch.cat([q, p])
    smoothed = [x.chunk(2) for x in _kernel_times([both] * len(PRICES), cost)]
    slopes = _kernel_times([p / of_p - p / of_q for of_q, of_p in smoothed], cost)
    found = []
    for (of_q, of_p), slope in zip(smoothed, slopes, strict=True):
        ratio = of_q / of_p
        value = (p * (ratio - 1 - ratio.log())).sum(-1)
        found.append((value, q * (slope - (q * slope).sum(-1, keepdim=True))))
    return found


def _kernel_times(vectors: list[Tensor], cost: EmbeddingCost) -> list[Tensor]:
    """The product of the kernel of every price with its vectors, ``(N, V)`` each."""
    points = cost.coordinates("source", torch.float64, torch.device("cpu"))
    products: list[list[Tensor]] = [[] for _ in PRICES]
    for rows in torch.arange(len(points)).split(_ROWS_AT_A_TIME):
        costs = cost.distance(points[rows], points)
        costs[torch.arange(len(rows)), rows] = 0
        for parts, price, x in zip(products, PRICES, vectors, strict=True):
            parts.append(x @ torch.exp(-price * costs).mT)
    return [torch.cat(parts, -1) for parts in products]


ROWS: dict[str, Row] = {
    "time": time,
    "kept_memory": kept_memory,
    "accuracy": accuracy,
    "language_model": language_model,
}
