"""The time of the main computations against the limits of the machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import measure
import torch
from batch_peers import BatchCall, BatchPeer, BatchSpec
from compare import Row, Settings
from peers import Peer, prepare
from problems import Spec, build
from steps import TINY, Step, StepSpec

import otkd
from otkd.functional.l1_distances import l1_distances

_BYTES, _OPERATIONS = ("copied", "fresh", "cached"), ("products", "simple", "exponentials")
_SHARE = 0.3  # a row below it needs an improvement, or a reason in results/notes.toml


@dataclass(frozen=True)
class Work:
    """The least work that a call has to do.

    Attributes:
        name: of the call.
        call: what is timed.
        copied: bytes read from and written to memory, each input and output once.
        fresh: bytes of new memory, which the system clears first.
        cached: bytes that are read repeatedly while they stay in the cache.
        products: floating-point operations of matrix products.
        simple: additions, comparisons and the like, one per element.
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

    def amounts(self, kinds: tuple[str, ...]) -> dict[str, float]:
        """The amounts of these kinds that are not zero."""
        return {kind: amount for kind in kinds if (amount := float(getattr(self, kind)))}


def rates(settings: Settings) -> dict[str, float]:
    """What the machine does per second, by the fields of :class:`Work`; the best of the repeats."""
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
    # A fused multiply-add counts as two operations and takes the time of one.
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
    large = Spec(*settings.pick((152_000, 512, 256), (4000, 16, 16)), seed=settings.seed)
    top = Peer("SinkhornLoss, top 64", "otkd_sinkhorn", {"k": 64})
    return [
        _of_logits(Peer("KLLoss", "otkd", {"loss": "KLLoss"}), spec),
        _of_logits(Peer("TVDLoss", "otkd", {"loss": "TVDLoss"}), spec),
        # One more for the logarithm of the mixture.
        _of_logits(Peer("JSDLoss", "otkd", {"loss": "JSDLoss"}), spec, exponentials=3),
        _of_logits(Peer("F.kl_div", "kl_div"), spec),
        _of_logits(top, spec),
        _of_logits(top, large),
    ]


def _of_logits(peer: Peer, spec: Spec, exponentials: int = 2) -> Work:
    """Reads the logits of both sides, and writes the gradient to new memory."""
    entries = spec.positions * spec.vocab
    return Work(
        f"{peer.name}, {spec.positions:,} positions of {spec.vocab:,} tokens",
        prepare(peer, spec),
        copied=3 * 4 * entries,
        fresh=4 * entries,
        exponentials=exponentials * entries,
    )


def _step(settings: Settings) -> Work:
    """The products with weights: one each for both forward passes, two for the backward pass."""
    spec = settings.pick(StepSpec(seed=settings.seed), TINY)
    step = Step(spec, "kl")
    embeddings = step.student.get_input_embeddings().weight, step.student.transformer.wpe.weight
    weights = sum(w.numel() for w in step.student.parameters() if w.ndim > 1)
    weights -= sum(w.numel() for w in embeddings)
    positions = spec.sequences * spec.length
    name = f"training step with KLLoss, GPT-2, {positions:,} positions of {spec.vocab:,} tokens"
    return Work(name, step, products=(1 + 1 + 2) * 2 * weights * positions)


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
    """The least possible time, from the machine's measured rates, and the time taken."""
    speed = rates(settings)
    points = []
    for work in (*_logits(settings), _dense(settings), *_samples(settings), _step(settings)):
        needed = {name: getattr(work, name) / rate for name, rate in speed.items()}
        bound = max(needed, key=lambda name: needed[name])
        with measure.without_warnings():
            seconds = measure.repeat(work.call, settings.repeats)
        spread = measure.spread(seconds)
        points.append(
            {"what": work.name, "bytes": work.amounts(_BYTES),
             "operations": work.amounts(_OPERATIONS), "bound by": bound,
             "limit, seconds": needed[bound], "share": needed[bound] / spread["median"],
             "seconds": spread}
        )  # fmt: skip
    low = [point["what"] for point in points if point["share"] < _SHARE]
    case = {"name": "share of the limit", "points": points, "below_a_third": low}
    return {"cases": [case], "rates_a_second": speed}


ROWS: dict[str, Row] = {"headline": headline}
