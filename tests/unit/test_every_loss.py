"""Every loss, in every precision, on every kind of call, against itself in float64.

A loss of the registry is tested by being registered; one that cannot be built from its vocabulary
alone has a row in ``BUILDERS``. The logits are the same numbers in every precision, so that what
differs from float64 is the loss's own arithmetic.
"""

import functools
import itertools
import math
import shutil
from contextlib import nullcontext

import pytest
import torch

import otkd
from otkd import costs, supports
from otkd.losses.base import DistillationLoss
from otkd.losses.sinkd import UnrolledBatchSinkhornLoss
from tests.problems import points

pytestmark = pytest.mark.usefixtures("seeded")

VOCAB = 6
SHAPE = (2, 3)
LIMITS = {"tolerance": 1e-5, "max_iterations": 1000}
SOLVER = {"epsilon": 0.5, **LIMITS}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
METRICS = ("sqeuclidean", "euclidean", "cosine")

# How to build the losses -------------------------------------------------------------------------


def embedding(vocab):
    return points(3, vocab, 3)


def matrix(vocab):
    x = points(5, vocab, 3)
    return (x[:, None] - x).norm(dim=-1)


COSTS = {
    **{m: lambda vocab, m=m: costs.EmbeddingCost(embedding(vocab), metric=m) for m in METRICS},
    "learnable": lambda vocab: costs.EmbeddingCost(
        torch.nn.Parameter(embedding(vocab)), learnable=True
    ),
    "discrete": lambda vocab: costs.DiscreteCost(),
    "ordinal": lambda vocab: costs.OrdinalCost(),
    "power": lambda vocab: costs.PowerCost(costs.OrdinalCost(), 0.5),
    "matrix": lambda vocab: costs.MatrixCost(matrix(vocab)),
}
SUPPORTS = {
    "dense": supports.Dense(),
    "topk": supports.TopK(2),
    "clusters": supports.TopK(2, clusters=2),
    "head": supports.TopK(2, tail=False),
    "neighbours": supports.NearestNeighbours(2),
}
OF_EMBEDDINGS = {"clusters": {*METRICS, "learnable"}, "neighbours": set(METRICS)}


def sinkhorn(cost="sqeuclidean", support="auto", **settings):
    def build(vocab, **options):
        settings.setdefault("support", SUPPORTS.get(support, support))
        return otkd.SinkhornLoss(COSTS[cost](vocab), **{**SOLVER, **settings, **options})

    return build


def transport_kl(cost="sqeuclidean", support="auto", **settings):
    def build(vocab, **options):
        settings.setdefault("support", SUPPORTS.get(support, support))
        return otkd.TransportKLLoss(COSTS[cost](vocab), **{"price": 5.0, **settings, **options})

    return build


def wasserstein(cost="ordinal", **settings):
    return lambda vocab, **options: otkd.WassersteinLoss(COSTS[cost](vocab), **settings, **options)


def of(loss, **settings):
    return lambda vocab, **options: loss(**settings, **options)


def mapped(vocab):
    """A map with tokens that are not mapped and not reached, and one that stands for two."""
    teacher, student = torch.arange(vocab).repeat_interleave(2), torch.arange(2 * vocab) // 2
    student[1] = vocab - 1
    kept = slice(2 * (vocab > 2), None)
    weight = torch.ones(2 * vocab)
    target, kinds = torch.arange(vocab), torch.full((vocab,), 3, dtype=torch.uint8)
    target[:1], kinds[:1] = -1 if vocab > 2 else 0, 0 if vocab > 2 else 3
    return otkd.alignment.TokenMap.of_weights(
        student[kept], teacher[kept], weight[kept], target, kinds, (vocab, vocab)
    )


def between(loss, *arguments):
    return lambda vocab, **options: loss(mapped(vocab), *arguments, **options)


def weighted(vocab, **options):
    terms = {name: (weight, BUILDERS[name](vocab, **options)) for name, weight in WEIGHTS.items()}
    inner = otkd.WeightedLoss({"ce": (0.3, BUILDERS["ce"](vocab, **options))})
    return otkd.WeightedLoss({**terms, "nested": (0.5, inner)})


def sinkd(vocab, reduction="mean"):
    # One temperature, for a stored teacher has one.
    transport = otkd.BatchSinkhornLoss(temperature=1.0, reduction=reduction, **SOLVER)
    return otkd.SinKDLoss(reduction=reduction, transport=transport)


WEIGHTS = {"kl": 0.7, "tvd": -0.2}
BUILDERS = {
    **{name: of(otkd.losses.loss_class(name)) for name in otkd.list_losses()},
    "pushforward": between(otkd.PushforwardLoss),
    "pushforward-rkl": between(otkd.PushforwardLoss, "rkl"),
    "pushforward-tvd": between(otkd.PushforwardLoss, "tvd"),
    "hybrid_uld": between(otkd.HybridLogitLoss),
    "sinkhorn": sinkhorn(),
    "transport_kl": transport_kl(),
    "transport_kl-topk": transport_kl("cosine", "topk"),
    "transport_kl-clusters": transport_kl("euclidean", "clusters"),
    "transport_kl-ordinal": transport_kl("ordinal"),
    "transport_kl-sharp": transport_kl(smoothing=0.3, **LIMITS),
    "transport_kl-reverse": transport_kl(smoothing=0.3, direction="reverse", **LIMITS),
    "wasserstein": wasserstein(),
    "batch_sinkhorn": of(otkd.BatchSinkhornLoss, **SOLVER),
    "sinkd": sinkd,
    **{
        f"sinkhorn-{support}-{cost}": sinkhorn(cost, support)
        for support, cost in itertools.product(SUPPORTS, COSTS)
        if cost in OF_EMBEDDINGS.get(support, COSTS)
    },
    "sinkhorn-raw": sinkhorn(debias=False),
    "sinkhorn-sharp": sinkhorn(value="sharp"),
    "sinkhorn-topk-sharp": sinkhorn(support="topk", value="sharp"),
    "sinkhorn-unbalanced": sinkhorn(marginal_relaxation=0.5),
    "sinkhorn-relaxed": sinkhorn(marginal_relaxation=(0.5, 2.0), debias="teacher"),
    "sinkhorn-head-unbalanced": sinkhorn(support="head", marginal_relaxation=0.5),
    "sinkhorn-temperature": sinkhorn(support="topk", temperature=2.0, teacher_temperature=1.5),
    "wasserstein-program": wasserstein("matrix"),
    "wasserstein-embedding": wasserstein("euclidean", p=2.0),
    "kl-temperature": of(otkd.KLLoss, temperature=2.0, teacher_temperature=1.5),
    "alpha_beta-kl": of(otkd.AlphaBetaLoss, alpha=1.0, beta=0.0),
    "batch_sinkhorn-euclidean": of(otkd.BatchSinkhornLoss, cost="euclidean", **SOLVER),
    "batch_sinkhorn-sqeuclidean": of(otkd.BatchSinkhornLoss, cost="sqeuclidean", **SOLVER),
    "batch_sinkhorn-raw": of(otkd.BatchSinkhornLoss, debias=False, **SOLVER),
    "batch_sinkhorn-sharp": of(otkd.BatchSinkhornLoss, value="sharp", **SOLVER),
    "batch_sinkhorn-samples": of(otkd.BatchSinkhornLoss, sample_cost=0.3, **SOLVER),
    "batch_sinkhorn-unrolled": of(UnrolledBatchSinkhornLoss, factor=1.0),
    "sinkd-author": lambda vocab, **options: otkd.SinKDLoss.author(temperature=2.0, **options),
    "weighted": weighted,
}
IN_FULL = {*otkd.list_losses(), "sinkhorn-topk-sqeuclidean", "weighted"}
every_loss = pytest.mark.parametrize("name", BUILDERS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
two_dtypes = pytest.mark.parametrize("dtype", DTYPES[1:3], ids=lambda dtype: str(dtype)[6:])

# The calls ---------------------------------------------------------------------------------------


def numbers(seed, *shape):
    """Multiples of 1/16 below 4, distinct at each position: exact in every precision."""
    order = torch.rand(*shape[:-1], 64, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    return order[..., : shape[-1]].double() / 16


MASK = torch.tensor([[True, False, True], [True, True, False]])
LABELS = torch.tensor([[3, 1, -100], [0, 5, 2]])
CALLS = {
    "all": {},
    "bool": {"mask": MASK},
    "weights": {"mask": MASK * 0.5},
    "labels": {"labels": LABELS},
    "both": {"mask": MASK, "labels": LABELS},
}
TEACHERS = ("logits", "other", "dense", "topk")
REDUCTIONS = ("mean", "sum", "none", "sequence_mean")
TOLERANCES = {  # of the value, and of the gradient relative to its largest entry
    torch.float64: (1e-9, 1e-9),
    torch.float32: (1e-4, 1e-3),
    torch.bfloat16: (1e-4, 2**-7),
    torch.float16: (1e-4, 2**-9),
}


def counted_in(call):
    counted = torch.ones(SHAPE, dtype=torch.bool)
    if "mask" in call:
        counted &= call["mask"] != 0
    if "labels" in call:
        counted &= call["labels"] != -100
    return counted


def teacher_of(kind, logits, dtype, temperature):
    """What a loss is given for teacher logits; the same numbers for every precision."""
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    if kind == "dense":
        return otkd.DenseTeacher(logits.half())
    if kind == "topk":
        return otkd.TopKTeacher.from_logits(logits.float(), 3, temperature)
    return logits.to(dtype if kind == "logits" else other)


def evaluate(loss, student, teacher, **call):
    """Value and gradient of the value, or of the values weighted by 1, 2, …"""
    student = student.detach().clone().requires_grad_()
    value = loss(student, teacher, **call)
    weights = torch.arange(1.0, 1 + value.numel(), dtype=value.dtype).reshape(value.shape)
    (value * weights).sum().backward()
    assert value.dtype == (torch.float64 if student.dtype == torch.float64 else torch.float32)
    assert student.grad.dtype == student.dtype
    return value.detach().double(), student.grad.double()


@functools.cache
def built(name, reduction="mean", vocab=VOCAB):
    return BUILDERS[name](vocab, reduction=reduction)


@functools.cache
def expected(name, call, teacher, reduction):
    return evaluated(name, torch.float64, call, teacher, reduction)


@functools.cache
def inputs(dtype, call, teacher, temperature):
    """Student logits and teacher, poisoned where they do not count."""
    student, logits = numbers(1, *SHAPE, VOCAB), numbers(2, *SHAPE, VOCAB)
    outside = ~counted_in(CALLS[call])
    student[outside], logits[outside] = math.nan, math.inf
    return student.to(dtype), teacher_of(teacher, logits, dtype, temperature)


def evaluated(name, dtype, call, teacher, reduction):
    loss = built(name, reduction)
    first = next(m for m in loss.modules() if isinstance(m, DistillationLoss))
    temperature = first.teacher_temperature or first.temperature
    pair = inputs(dtype, call, teacher, temperature)
    labels = {"labels": LABELS.clamp(min=0)} if loss.needs_labels else {}
    return evaluate(loss, *pair, **labels | CALLS[call])


def pairs(dtype):
    """Every pair of call and teacher, half of them in each of the lower precisions."""
    modes = (True,) if dtype == torch.float64 else (False, True)
    every = list(enumerate(itertools.product(CALLS, TEACHERS)))
    if dtype != torch.float64:
        place = DTYPES.index(dtype)
        every = [(i, pair) for i, pair in every if (i + i // 4 + place) % 2]
    return [(*pair, REDUCTIONS[(i + i // 4) % 4], modes[i // 2 % len(modes)]) for i, pair in every]


def product(dtype):
    """Every combination. In float64 only autocast can make a difference to the reference."""
    modes = (True,) if dtype == torch.float64 else (False, True)
    return itertools.product(CALLS, TEACHERS, REDUCTIONS, modes)


def check_cases(name, dtype, cases):
    slack, slope_slack = TOLERANCES[dtype]
    for call, teacher, reduction, autocast in cases:
        if teacher == "topk" and "-clusters" in name:
            continue  # refused
        value, slope = expected(name, call, teacher, reduction)
        outside = ~counted_in(CALLS[call])
        case = f"{call=} {teacher=} {reduction=} {autocast=}"
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            found, gradient = evaluated(name, dtype, call, teacher, reduction)
        assert found.shape == (SHAPE if reduction == "none" else ()), case
        torch.testing.assert_close(found, value, rtol=slack, atol=slack, msg=case)
        error = (gradient - slope).abs().max()
        assert error <= slope_slack * slope.abs().max() + 1e-12, (case, float(error))
        assert gradient[outside].eq(0).all(), case


@every_dtype
@every_loss
def test_pairs_of_the_product(name, dtype):
    check_cases(name, dtype, pairs(dtype))


@pytest.mark.parametrize("name", sorted(IN_FULL))
def test_the_product_in_half_precision(name):
    check_cases(name, torch.bfloat16, product(torch.bfloat16))


@pytest.mark.slow
@every_dtype
@pytest.mark.parametrize("name", sorted(IN_FULL))
def test_the_product(name, dtype):
    check_cases(name, dtype, product(dtype))


# Extreme calls -----------------------------------------------------------------------------------


def of_shape(*shape, vocab=VOCAB):
    return numbers(1, *shape, vocab), numbers(2, *shape, vocab)


def without_mass(logits):
    logits[..., 1] = -math.inf
    return logits


def with_a_gap(logits):
    logits[..., 0, 2] = 1e4
    logits[..., -1, 3] = -1e4
    return logits


EXTREMES = {
    "-inf": lambda: map(without_mass, of_shape(*SHAPE)),
    "gap": lambda: map(with_a_gap, of_shape(*SHAPE)),
    "gap of the student": lambda: (with_a_gap(of_shape(*SHAPE)[0]), of_shape(*SHAPE)[1]),
    "gap of the teacher": lambda: (of_shape(*SHAPE)[0], with_a_gap(of_shape(*SHAPE)[1])),
    "no position": lambda: of_shape(0),
    "no sequence": lambda: of_shape(0, 3),
    "empty sequences": lambda: of_shape(2, 0),
    "one position": lambda: of_shape(1, 1),
    "no batch dimension": lambda: of_shape(),
    "one token": lambda: of_shape(*SHAPE, vocab=1),
    "two tokens": lambda: of_shape(*SHAPE, vocab=2),
    "equal": lambda: of_shape(*SHAPE)[:1] * 2,
    "constant": lambda: (torch.zeros(*SHAPE, VOCAB), torch.zeros(*SHAPE, VOCAB)),
}


@pytest.mark.filterwarnings("ignore::otkd.ConvergenceWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@every_loss
def test_extreme_calls_are_finite(name, dtype):
    for case, make in EXTREMES.items():
        student, teacher = (logits.to(dtype) for logits in make())
        loss = built(name, vocab=student.shape[-1])
        labels = torch.zeros(student.shape[:-1], dtype=torch.long)
        with torch.autocast("cpu", torch.bfloat16) if case == "gap" else nullcontext():
            value, slope = evaluate(loss, student, teacher, labels=labels)
        assert value.shape == (), case
        assert value.isfinite(), case
        assert slope.isfinite().all(), case
        if case == "-inf":
            assert slope[..., 1].eq(0).all(), case
        if not labels.numel():
            assert value == 0, case


@two_dtypes
@every_loss
def test_nothing_counted_is_zero(name, dtype):
    student, teacher = (torch.full((*SHAPE, VOCAB), math.nan, dtype=dtype) for _ in range(2))
    for reduction in REDUCTIONS:
        for call in ({"mask": torch.zeros(SHAPE)}, {"labels": torch.full(SHAPE, -100)}):
            value, slope = evaluate(
                built(name, reduction), student, teacher, **{"labels": LABELS, **call}
            )
            assert value.eq(0).all()
            assert slope.eq(0).all()


@two_dtypes
@every_loss
def test_layout_and_mode_do_not_matter(name, dtype):
    loss = built(name)
    student, teacher = (logits.to(dtype) for logits in of_shape(*SHAPE))
    call = {"labels": LABELS}
    value, slope = evaluate(loss, student, teacher, **call)
    apart = [
        torch.stack([x, x * 0], -1).transpose(0, 1)[..., 0].transpose(0, 1)
        for x in (student, teacher)
    ]
    assert not any(x.is_contiguous() for x in apart)
    leaf = apart[0].requires_grad_()
    found = loss(leaf, apart[1], **call)
    found.backward()
    torch.testing.assert_close(found.double(), value, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(leaf.grad.double(), slope, rtol=1e-6, atol=1e-7)

    row = student[:1, :1].clone().requires_grad_()  # one row in all places
    expanded = loss(row.expand(*SHAPE, VOCAB), teacher, **call)
    expanded.backward()
    alone, shares = evaluate(loss, row.expand(*SHAPE, VOCAB).clone(), teacher, **call)
    torch.testing.assert_close(expanded.detach().double(), alone, rtol=1e-6, atol=1e-7)
    slack = TOLERANCES[dtype][1] * len(LABELS.flatten())
    summed = shares.sum((0, 1), keepdim=True)
    assert (row.grad.double() - summed).abs().max() <= slack * shares.abs().max() + 1e-12

    values = [loss(student, teacher, **call)]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            values.append(loss(student.clone(), teacher.clone(), **call))
    for other in values:
        assert other.requires_grad <= any(True for _ in loss.parameters())
        torch.testing.assert_close(other.double(), value, rtol=1e-6, atol=1e-7)
    assert teacher.grad is None


@every_loss
def test_gradients_of_float16_survive_until_a_scaler_lifts_them(name):
    """Entries of 1e-8, which float16 rounds to 0 or by half, have their digits once scaled."""
    loss, call = built(name), {"labels": LABELS, "mask": MASK}
    gradients = []
    for dtype in (torch.float16, torch.float64):
        student, teacher = ((4 * logits).to(dtype) for logits in of_shape(*SHAPE))
        student.requires_grad_()
        (loss(student, teacher, **call) * 2**15).backward()
        gradients.append(student.grad.double())
    torch.testing.assert_close(*gradients, rtol=2e-2, atol=5e-4)


# Compiled programs -------------------------------------------------------------------------------

QUICK = {"kl", "sinkhorn", "weighted"}
COMPILED = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in sorted(IN_FULL | QUICK)
]


def check_compiled(name, **how):
    """A compiled step, and a compiled loss, equal the plain ones; two sizes compile everything."""
    loss, layer = built(name), torch.nn.Linear(VOCAB, VOCAB, dtype=torch.float64)

    def step(student, teacher, labels):
        return loss(layer(student), teacher, labels=labels)

    torch._dynamo.reset()
    counted = torch._dynamo.utils.counters
    counted.clear()
    compiled = [torch.compile(step, **how), torch.compile(loss, **how)]
    for positions in range(3, 8):
        if positions == 5:
            frames = dict(counted["frames"])
        student, teacher = numbers(1, positions, VOCAB), numbers(2, positions, VOCAB)
        labels = torch.arange(positions) % VOCAB
        expected = step(student, teacher, labels)
        slope = torch.autograd.grad(expected, layer.weight)
        values = (
            compiled[0](student, teacher, labels),
            compiled[1](layer(student), teacher, labels=labels),
        )
        for value in values:
            torch.testing.assert_close(value, expected)
            torch.testing.assert_close(torch.autograd.grad(value, layer.weight), slope)
    assert frames["total"] <= 6
    assert counted["frames"] == frames
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")  # of the compiler's own modules
@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_program_calls_a_loss_as_it_is(name):
    check_compiled(name, backend="eager")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("name", ["kl", "sinkhorn", "sinkhorn-topk-sqeuclidean"])
def test_the_same_through_the_default_compiler(name):
    check_compiled(name)
