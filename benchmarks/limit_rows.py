"""How near the headline figures come to what the machine can do."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import measure
import torch
from batch_peers import BatchCall, BatchPeer, BatchSpec
from compare import Settings
from peers import Call, Peer, prepare
from problems import Spec, build

import otkd
from otkd.functional.l1_distances import l1_distances

_SHARE = 0.3  # below it a row wants an improvement or a reason


@dataclass(frozen=True)
class Work:
    """The least a call has to do.

    Attributes:
        name: of the call.
        call: what is timed.
        copied: bytes from and to memory, each input read and each output written once.
        fresh: bytes of new memory, above what the allocator keeps: the system clears it first.
        cached: bytes that are read again while they stay in the cache.
        products: floating-point operations of matrix products.
        simple: additions, comparisons and the like, an element each.
        exponentials: number of exp and log.
    """

    name: str
    call: Callable[[], object]
    copied: float = 0
    fresh: float = 0
    cached: float = 0
    products: float = 0
    simple: float = 0
    exponentials: float = 0


def rates(settings: Settings) -> dict[str, float]:
    """What the machine does a second, by the fields of :class:`Work`; the best of the repeats."""
    large, small, side = settings.pick((2**27, 2**20, 2048), (2**12, 2**10, 32))
    source, target = torch.rand(large), torch.empty(large)
    cached, out = torch.rand(small), torch.empty(small)
    left, right = torch.rand(side, side), torch.rand(side, side)
    best = {
        "copied": 8 * large / _fastest(lambda: target.copy_(source), settings),
        "fresh": 4 * large / _fastest(lambda: torch.empty(large).zero_(), settings),
        "cached": 4 * small / _fastest(cached.sum, settings),
        "products": 2 * side**3 / _fastest(lambda: left @ right, settings),
        "exponentials": small / _fastest(lambda: torch.exp(cached, out=out), settings),
    }
    # A fused multiply-add is two operations in the time of one.
    return {**best, "simple": best["products"] / 2}


def _fastest(call: Callable[[], object], settings: Settings) -> float:
    call()
    times = []
    for _ in range(settings.pick(30, 3)):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def _logits(settings: Settings) -> list[Work]:
    spec = Spec(*settings.pick((32_000, 512, 256), (3000, 16, 16)), seed=settings.seed)
    entries = spec.positions * spec.vocab
    least = {"copied": 3 * 4 * entries, "fresh": 4 * entries, "exponentials": 2 * entries}
    sizes = f"{spec.positions:,} positions of {spec.vocab:,} tokens"
    return [
        Work(f"KLLoss, {sizes}", prepare(Peer("", "otkd", {"loss": "KLLoss"}), spec), **least),
        Work(f"TVDLoss, {sizes}", prepare(Peer("", "otkd", {"loss": "TVDLoss"}), spec), **least),
        Work(f"F.kl_div, {sizes}", prepare(Peer("", "kl_div"), spec), **least),
        Work(f"SinkhornLoss, top 64, {sizes}", _top_k(spec), **least),
    ]


def _top_k(spec: Spec) -> Call:
    return prepare(Peer("", "otkd_sinkhorn", {"k": 64}), spec)


def _dense(settings: Settings) -> Work:
    sizes = settings.pick((4000, 256, 64), (120, 4, 8))
    problem = build(Spec(*sizes, seed=settings.seed))
    a, b = problem.student.softmax(-1), problem.teacher.softmax(-1)
    cost = torch.cdist(problem.embedding, problem.embedding).square_()
    cost /= cost.mean()
    iterations = 50
    products = (2 * iterations + 2) * 2 * len(a) * cost.numel()

    def call():
        return otkd.ot.sinkhorn(a, b, cost, tolerance=1e-30, max_iterations=iterations)

    name = f"ot.sinkhorn, {len(a)} problems of {len(cost):,} tokens, {iterations} iterations"
    return Work(name, call, products=products)


def _samples(settings: Settings) -> list[Work]:
    samples, classes = settings.pick((1024, 1000), (16, 300))
    call = BatchCall(BatchPeer("", "otkd"), BatchSpec(samples, 3, seed=settings.seed))
    call()
    pairs = samples**2
    steps = 2 * call.function.last_report.iterations + 1
    transport = Work(
        f"BatchSinkhornLoss, {samples:,} samples of 3 classes, {(steps - 1) // 2} iterations",
        call,
        cached=4 * pairs * steps,
        # Per coordinate: difference, absolute value, sum; sign, product, sum in the gradient.
        simple=(6 * 3 + 2) * pairs,
        products=2 * pairs * steps,
        exponentials=pairs,
    )
    x, y = torch.rand(samples, classes), torch.rand(samples, classes)
    weights = torch.rand(samples, samples)

    def distances(metric: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]):
        def call():
            points = x.detach().requires_grad_()
            (metric(points, y) * weights).sum().backward()

        return call

    simple = 6.0 * pairs * classes
    sizes = f"L1 distances of {samples:,} points of width {classes:,}, with their gradient"
    return [
        transport,
        Work(f"otkd, {sizes}", distances(l1_distances), simple=simple),
        Work(
            f"torch.cdist, {sizes}",
            distances(lambda x, y: torch.cdist(x, y, p=1)),
            simple=simple,
        ),
    ]


def headline(settings: Settings) -> dict:
    """Least bytes and operations over the measured rates of the machine, beside the time taken."""
    speed = rates(settings)
    points = []
    for work in (*_logits(settings), _dense(settings), *_samples(settings)):
        needed = {name: getattr(work, name) / rate for name, rate in speed.items()}
        bound = max(needed, key=lambda name: needed[name])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of iterations that are not to converge
            seconds = measure.repeat(work.call, settings.repeats)
        spread = measure.spread(seconds)
        points.append(
            {"what": work.name, "bound by": bound, "limit, seconds": needed[bound],
             "share": needed[bound] / spread["median"], "seconds": spread}
        )  # fmt: skip
    low = [point["what"] for point in points if point["share"] < _SHARE]
    case = {"name": "share of the limit", "points": points, "below_a_third": low}
    return {"cases": [case], "rates_a_second": speed, "targets": []}


ROWS: dict[str, Callable[[Settings], dict]] = {"headline": headline}
