import copy
import math
import pickle
import warnings

import pytest
import torch

import otkd
from otkd import costs
from otkd.functional import formulas
from tests.problems import logits, points

pytestmark = pytest.mark.usefixtures("seeded")
close = torch.testing.assert_close

VOCAB = 6
SHAPE = (3, 4)
# No shape of microbatch may depend on how near the others are to convergence.
EXACT = {"tolerance": 1e-12, "max_iterations": 5000}
MATRIX = (points(5, VOCAB, 3)[:, None] - points(5, VOCAB, 3)).norm(dim=-1)


def sinkhorn(**options):
    return otkd.SinkhornLoss(**{"embedding": points(3, VOCAB, 3), **EXACT, **options})


def transport_kl(**options):
    return otkd.TransportKLLoss(**{"embedding": points(3, VOCAB, 3), "price": 5.0, **options})


def wasserstein(**options):
    return otkd.WassersteinLoss(**{"cost": costs.MatrixCost(MATRIX), "p": 2, **options})


def batch_sinkhorn(**options):
    return otkd.BatchSinkhornLoss(**{**EXACT, **options})


def sinkd(**options):
    settings = {key: options[key] for key in ("reduction", "vocab_size") if key in options}
    return otkd.SinKDLoss(0.6, transport=batch_sinkhorn(**settings), **options)


def identity_map():
    return otkd.alignment.TokenMap.of_pairs(range(VOCAB), range(VOCAB), (VOCAB, VOCAB))


BUILDERS = {
    "pushforward": lambda **options: otkd.PushforwardLoss(identity_map(), "rkl", **options),
    "hybrid_uld": lambda **options: otkd.HybridLogitLoss(identity_map(), **options),
    **{name: otkd.losses.loss_class(name) for name in otkd.list_losses()},
    "sinkhorn": sinkhorn,
    "sinkhorn-sharp": lambda **options: sinkhorn(**{"value": "sharp", **options}),
    "sinkhorn-raw": lambda **options: sinkhorn(debias=False, **options),
    "transport_kl": transport_kl,
    "transport_kl-sharp": lambda **options: transport_kl(**{"smoothing": 0.2, **EXACT, **options}),
    "transport_kl-reverse": lambda **options: transport_kl(
        **{"smoothing": 0.2, "direction": "reverse", **EXACT, **options}
    ),
    "wasserstein": wasserstein,
    "wasserstein-ordinal": lambda **options: otkd.WassersteinLoss("ordinal", **options),
    "batch_sinkhorn": batch_sinkhorn,
    "batch_sinkhorn-debiased": lambda **options: batch_sinkhorn(debias=True, **options),
    "sinkd": sinkd,
    "sinkd-author": lambda reduction="mean", **_: otkd.SinKDLoss.author(reduction=reduction),
    "weighted": lambda reduction="mean", vocab_size=None, **options: otkd.WeightedLoss(
        {
            "kl": (0.7, otkd.KLLoss(reduction=reduction, vocab_size=vocab_size, **options)),
            "ce": (-0.2, otkd.losses.CrossEntropyLoss(reduction=reduction, vocab_size=vocab_size)),
        }
    ),
}
SEES_THE_BATCH = {"batch_sinkhorn", "batch_sinkhorn-debiased", "sinkd", "sinkd-author"}
ADDITIVE = sorted(set(BUILDERS) - SEES_THE_BATCH)
every_loss = pytest.mark.parametrize("name", BUILDERS)


def coarse(name, tolerance):
    """The option that float32 needs: it cannot reach the tolerance of the other tests."""
    solved = ("sinkhorn", "batch_sinkhorn", "transport_kl")
    return {"tolerance": tolerance} if name.startswith(solved) else {}


class Data:
    """Logits of student and teacher, labels (−100 at two positions) and a mask (two more)."""

    def __init__(self, dtype=torch.float64, shape=SHAPE):
        self.student = logits(1, *shape, VOCAB, dtype=dtype)
        self.teacher = logits(2, *shape, VOCAB, dtype=dtype)
        self.labels = torch.arange(math.prod(shape)).reshape(shape) % VOCAB
        self.labels.view(-1)[[1, 6]] = -100
        self.mask = torch.ones(shape, dtype=torch.bool)
        self.mask.view(-1)[[2, 9]] = False
        self.counted = self.mask & (self.labels != -100)

    def options(self):
        return {"labels": self.labels, "mask": self.mask}


def evaluate(loss, student, teacher, weights=None, **options):
    """Value and gradient, after the laws that hold of any call."""
    student = student.detach().clone().requires_grad_()
    teacher = teacher.detach().clone().requires_grad_() if torch.is_tensor(teacher) else teacher
    value = loss(student, teacher, **options)
    (value if weights is None else value * weights).sum().backward()
    assert not torch.is_tensor(teacher) or teacher.grad is None
    assert value.dtype == (torch.float64 if student.dtype == torch.float64 else torch.float32)
    assert value.isfinite().all()
    assert student.grad.isfinite().all()
    assert student.grad.dtype == student.dtype
    return value.detach(), student.grad


def same(left, right, **tolerances):
    for x, y in zip(left, right, strict=True):
        close(x, y, **({"rtol": 1e-8, "atol": 1e-10} | tolerances))


# The call ----------------------------------------------------------------------------------------


@every_loss
def test_every_keyword_of_the_contract_is_taken(name):
    data = Data()
    features = torch.randn(*SHAPE, 5)
    value, gradient = evaluate(
        BUILDERS[name](),
        data.student,
        data.teacher,
        num_items_in_batch=5,
        student_features=features,
        teacher_features=features[..., :3],
        **data.options(),
    )
    assert value.shape == ()
    assert (gradient[~data.counted] == 0).all()
    assert (gradient[data.counted] != 0).any()


@every_loss
@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "sequence_mean"])
def test_reductions_agree_with_the_values(name, reduction):
    data = Data()
    loss = BUILDERS[name](reduction=reduction)
    values, _ = evaluate(
        BUILDERS[name](reduction="none"), data.student, data.teacher, **data.options()
    )
    assert values.shape == SHAPE
    assert (values[~data.counted] == 0).all()
    value, _ = evaluate(loss, data.student, data.teacher, **data.options())
    rows = values.sum(-1) / data.counted.sum(-1)
    expected = {
        "mean": values.sum() / data.counted.sum(),
        "sum": values.sum(),
        "none": values,
        "sequence_mean": rows.mean(),
    }
    close(value, expected[reduction])


@every_loss
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_masked_positions_may_hold_anything(name, garbage):
    data = Data()
    loss = BUILDERS[name]()
    clean = evaluate(loss, data.student, data.teacher, **data.options())
    outside = ~data.counted.unsqueeze(-1)
    student, teacher = (x.masked_fill(outside, garbage) for x in (data.student, data.teacher))
    for kind in (torch.bool, torch.int64, torch.float32):
        mask = data.mask.to(kind) * (1 if kind == torch.bool else 3)
        noisy = evaluate(loss, student, teacher, labels=data.labels, mask=mask.to(kind))
        same(noisy, clean, rtol=0, atol=0)


@every_loss
def test_labels_of_minus_100_do_not_count(name):
    data = Data()
    loss = BUILDERS[name]()
    labelled = evaluate(loss, data.student, data.teacher, labels=data.labels)
    mask = data.labels != -100
    masked = evaluate(loss, data.student, data.teacher, labels=data.labels.clamp(min=0), mask=mask)
    same(labelled, masked, rtol=0, atol=0)


@every_loss
@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "sequence_mean"])
def test_nothing_counted_gives_zero_with_a_zero_gradient(name, reduction):
    data = Data()
    data.student[0] = math.nan
    loss = BUILDERS[name](reduction=reduction)
    for mask, labels in (
        (torch.zeros(SHAPE), data.labels.clamp(min=0)),
        (None, torch.full(SHAPE, -100)),
        (data.labels == -100, data.labels),
    ):
        for items in (None, 7, 0, torch.tensor(0)):
            value, gradient = evaluate(
                loss,
                data.student,
                data.teacher,
                mask=mask,
                labels=labels,
                num_items_in_batch=items,
            )
            assert value.shape == (SHAPE if reduction == "none" else ())
            assert value.abs().max() == 0
            assert gradient.abs().max() == 0


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(name, dtype):
    data = Data(dtype)
    loss = BUILDERS[name](**coarse(name, 1e-5))
    if name == "sinkd":
        loss = otkd.SinKDLoss(0.6)
    value, gradient = evaluate(loss, data.student, data.teacher, **data.options())
    exact, slope = evaluate(loss, data.student.double(), data.teacher.double(), **data.options())
    close(value.double(), exact, rtol=1e-3, atol=1e-4)
    close(gradient.double(), slope, rtol=2e-2, atol=1e-3)
    mixed, _ = evaluate(loss, data.student, data.teacher.float(), **data.options())
    close(mixed, value)


@every_loss
def test_a_stored_teacher_in_the_place_of_teacher_logits(name):
    data = Data()
    stored = otkd.DenseTeacher(data.teacher)
    loss = BUILDERS[name]()
    expected = evaluate(loss, data.student, data.teacher, **data.options())
    same(evaluate(loss, data.student, stored, **data.options()), expected, rtol=0, atol=0)
    half = otkd.DenseTeacher(data.teacher.bfloat16())
    expected = evaluate(loss, data.student, data.teacher.bfloat16(), **data.options())
    same(evaluate(loss, data.student, half, **data.options()), expected, rtol=0, atol=0)


@every_loss
def test_without_a_gradient_to_compute(name):
    data = Data()
    loss = BUILDERS[name]()
    expected, _ = evaluate(loss, data.student, data.teacher, **data.options())
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            value = loss(data.student, data.teacher, **data.options())
        assert not value.requires_grad
        close(value, expected)


@every_loss
def test_autocast_does_not_lower_the_precision(name):
    data = Data(torch.float32)
    loss = BUILDERS[name](**coarse(name, 1e-5))
    if name == "sinkd":
        loss = otkd.SinKDLoss(0.6)
    expected = evaluate(loss, data.student, data.teacher, **data.options())
    with torch.autocast("cpu", torch.bfloat16):
        same(evaluate(loss, data.student, data.teacher, **data.options()), expected, rtol=1e-5)


# Invariance --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ADDITIVE)
@pytest.mark.parametrize("kind", [int, float, torch.tensor])
@pytest.mark.parametrize("microbatches", [2, 3])
def test_microbatches_add_up_to_the_whole_batch(name, kind, microbatches):
    data = Data(shape=(6, 2))
    loss = BUILDERS[name]()
    whole, slope = evaluate(loss, data.student, data.teacher, **data.options())
    items = kind(int(data.counted.sum()))
    total, gradients = 0, []
    for rows in torch.arange(6).chunk(microbatches):
        value, gradient = evaluate(
            loss,
            data.student[rows],
            data.teacher[rows],
            labels=data.labels[rows],
            mask=data.mask[rows],
            num_items_in_batch=items,
        )
        total = total + value
        gradients.append(gradient)
    same((total, torch.cat(gradients)), (whole, slope))


@pytest.mark.parametrize("name", sorted(SEES_THE_BATCH))
def test_losses_of_the_batch_scale_by_counted_over_items(name):
    data = Data()
    loss = BUILDERS[name]()
    value, gradient = evaluate(loss, data.student, data.teacher, **data.options())
    for items in (20, 20.0, torch.tensor(20)):
        scaled = evaluate(
            loss, data.student, data.teacher, num_items_in_batch=items, **data.options()
        )
        factor = data.counted.sum().item() / 20
        same(scaled, (value * factor, gradient * factor))


@every_loss
def test_padding_and_the_layout_of_the_batch_do_not_matter(name):
    data = Data()
    loss = BUILDERS[name]()
    value, gradient = evaluate(loss, data.student, data.teacher, **data.options())
    for layout in ((12,), (2, 2, 3), (1, 12), (4, 3)):
        other, slope = evaluate(
            loss,
            data.student.reshape(*layout, VOCAB),
            data.teacher.reshape(*layout, VOCAB),
            labels=data.labels.reshape(layout),
            mask=data.mask.reshape(layout),
        )
        same((other, slope.reshape(*SHAPE, VOCAB)), (value, gradient))
    pad = torch.nn.functional.pad
    padded, slope = evaluate(
        loss,
        pad(data.student, (0, 0, 2, 1), value=math.nan),
        pad(data.teacher, (0, 0, 2, 1)),
        labels=pad(data.labels, (2, 1), value=-100),
        mask=pad(data.mask, (2, 1), value=True),
    )
    same((padded, slope[:, 2:-1]), (value, gradient))
    assert slope[:, :2].abs().max() == slope[:, -1].abs().max() == 0
    everywhere = evaluate(loss, data.student, data.teacher, labels=data.labels.clamp(min=0))
    ones = torch.ones(SHAPE)
    options = {"labels": data.labels.clamp(min=0), "mask": ones}
    same(evaluate(loss, data.student, data.teacher, **options), everywhere)


@every_loss
@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "sequence_mean"])
def test_a_single_position_without_batch_dimensions(name, reduction):
    data = Data()
    loss = BUILDERS[name](reduction=reduction)
    position = {"labels": data.labels[0, 0], "mask": data.mask[0, 0]}
    value, gradient = evaluate(loss, data.student[0, 0], data.teacher[0, 0], **position)
    assert value.shape == ()
    one = evaluate(loss, data.student[0, :1], data.teacher[0, :1], labels=data.labels[0, :1])
    same((value, gradient), (one[0].squeeze(), one[1][0]))


@pytest.mark.parametrize("name", [n for n in BUILDERS if n != "sinkd-author"])
def test_vocab_size_slices_the_padding(name):
    data = Data()
    value, gradient = evaluate(BUILDERS[name](), data.student, data.teacher, **data.options())
    loss = BUILDERS[name](vocab_size=VOCAB)
    student = torch.nn.functional.pad(data.student, (0, 2), value=math.nan)
    teacher = torch.nn.functional.pad(data.teacher, (0, 5), value=9.0)
    padded, slope = evaluate(loss, student, teacher, **data.options())
    same((padded, slope[..., :VOCAB]), (value, gradient))
    assert slope[..., VOCAB:].abs().max() == 0
    with pytest.raises(ValueError, match=f"vocab_size={VOCAB} is larger than the 4 logits"):
        loss(data.student[..., :4], data.teacher[..., :4], **data.options())


# Temperature -------------------------------------------------------------------------------------


RESCALED = {
    **dict.fromkeys(["kl", "rkl", "jsd", "hellinger", "skl", "srkl", "akl", "alpha_beta"], True),
    "transport_kl": True,
    **dict.fromkeys(["ce", "tvd", "uld", "sinkhorn", "wasserstein", "batch_sinkhorn"], False),
}


def test_the_table_of_rescaling_names_every_loss():
    assert {*RESCALED, "sinkd"} == set(otkd.list_losses())


@pytest.mark.parametrize("name", RESCALED)
def test_rescaling_by_default(name):
    data = Data()
    build = BUILDERS[name]

    def at(**options):
        return evaluate(
            build(temperature=3.0, **options), data.student, data.teacher, **data.options()
        )

    plain = at(rescale_t2=False)
    same(at(rescale_t2=True), [9 * x for x in plain])
    same(at(), [9 * x if RESCALED[name] else x for x in plain])
    values = at(reduction="none", rescale_t2=True)[0]
    close(values.sum() / data.counted.sum(), 9 * plain[0])
    assert build(temperature=3.0).rescale_t2 is RESCALED[name]


@pytest.mark.parametrize("name", [n for n in BUILDERS if not n.startswith(("sinkd", "weighted"))])
def test_temperatures_divide_the_logits(name):
    data = Data()
    options = {"rescale_t2": False, "temperature": 2.0}
    value, gradient = evaluate(
        BUILDERS[name](teacher_temperature=0.5, **options),
        data.student,
        data.teacher,
        **data.options(),
    )
    plain, slope = evaluate(
        BUILDERS[name](temperature=1.0), data.student / 2, data.teacher / 0.5, **data.options()
    )
    same((value, gradient), (plain, slope / 2))
    both = evaluate(BUILDERS[name](**options), data.student, data.teacher, **data.options())
    plain, slope = evaluate(
        BUILDERS[name](temperature=1.0), data.student / 2, data.teacher / 2, **data.options()
    )
    same(both, (plain, slope / 2))


def test_the_temperatures_of_sinkd_are_those_of_its_kl_term():
    data = Data()
    loss = otkd.SinKDLoss(0.7, 0.3, temperature=2.0, teacher_temperature=3.0, rescale_t2=False)
    value, _ = evaluate(loss, data.student, data.teacher, **data.options())
    kl, ce, transport = (
        evaluate(term, data.student, data.teacher, **data.options())[0]
        for term in (
            otkd.KLLoss(temperature=2.0, teacher_temperature=3.0, rescale_t2=False),
            otkd.losses.CrossEntropyLoss(),
            otkd.BatchSinkhornLoss(),
        )
    )
    close(value, 0.7 * kl + 0.3 * ce + 0.3 * transport)
    assert otkd.SinKDLoss().terms["kl"].rescale_t2


# Refusals of the call ----------------------------------------------------------------------------


@every_loss
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("kind", ["NaN", "+inf", "all -inf"])
def test_logits_without_a_softmax_in_a_counted_position_raise(name, side, kind):
    data = Data()
    if name == "ce" and side == "teacher":
        return  # not used
    row = getattr(data, side)[0, 0]
    if kind == "all -inf":
        row[:] = -math.inf
    else:
        row[4] = math.nan if kind == "NaN" else math.inf
    with pytest.raises(ValueError, match="positions have"):
        BUILDERS[name]()(data.student, data.teacher, **data.options())


@every_loss
def test_tokens_of_mass_zero_and_huge_gaps_are_finite(name):
    data = Data(torch.float32)
    data.labels = data.labels.where(data.labels != 1, 0)
    data.student[..., 1], data.teacher[..., 1] = -math.inf, -math.inf
    data.student[0, 0, 2] = 1e4
    data.teacher[1, 1, 3] = -1e4
    loss = BUILDERS[name](**coarse(name, 1e-4))
    if name == "sinkd":
        loss = otkd.SinKDLoss(0.6)
    _, gradient = evaluate(loss, data.student, data.teacher, **data.options())
    assert gradient[..., 1].abs().max() == 0


@every_loss
def test_refused_calls(name):
    data = Data()
    loss, student, teacher = BUILDERS[name](), data.student, data.teacher
    labels = {"labels": data.labels}
    needs_teacher = name != "ce"

    def refuses(error, message, *arguments, **options):
        with pytest.raises(error, match=message):
            loss(*arguments, **labels | options)

    shape = r"one entry per position, shape \(3, 4\), got"
    refuses(ValueError, f"mask must have {shape}", student, teacher, mask=torch.ones(3, 1))
    refuses(ValueError, f"labels must have {shape}", student, teacher, labels=data.labels[0])
    refuses(TypeError, "student_logits must be a floating", student.long(), teacher)
    refuses(TypeError, "student_logits must be a floating", student.tolist(), teacher)
    refuses(ValueError, r"student_logits must have shape", student[..., :0], teacher[..., :0])
    if needs_teacher:
        refuses(TypeError, "teacher_logits must be a floating", student, teacher.long())
        refuses(TypeError, r"tensor of shape .* got list", student, teacher.tolist())
        refuses(TypeError, "got str", student, "teacher.safetensors")
        refuses(ValueError, "needs teacher_logits: a tensor or a stored", student)
        refuses(ValueError, "same batch shape", student, teacher[:1])
        refuses(ValueError, "same batch shape", student, otkd.DenseTeacher(teacher[:2]))
        refuses(ValueError, "on cpu but teacher_logits on meta", student, teacher.to("meta"))
        refuses(ValueError, "teacher_logits must have shape", student, torch.tensor(1.0))
    if needs_teacher and name != "uld":
        refuses(ValueError, "6 tokens and the teacher 4.*vocab_size=", student, teacher[..., :4])
    needed = name in ("ce", "weighted") or name.startswith("sinkd")
    assert loss.needs_labels == needed
    assert loss.needs_teacher == needs_teacher
    assert not loss.needs_features
    if needed:
        refuses(ValueError, "has a hard-label term: pass labels=", student, teacher, labels=None)
    else:
        loss(student, teacher)


def test_vocab_size_does_not_change_what_is_refused():
    loss = otkd.KLLoss(vocab_size=3)
    for student, teacher, error, message in (
        (torch.tensor(1.0), torch.zeros(3), ValueError, "student_logits must have shape"),
        (torch.zeros(3), torch.tensor(1.0), ValueError, "teacher_logits must have shape"),
        ([0.0, 1.0, 2.0], torch.zeros(3), TypeError, "student_logits must be a floating"),
    ):
        with pytest.raises(error, match=message):
            loss(student, teacher)


def test_universal_logit_loss_bridges_vocabularies():
    data = Data()
    value, _ = evaluate(otkd.UniversalLogitLoss(), data.student, data.teacher[..., :4])
    padded = torch.nn.functional.pad(data.teacher[..., :4], (0, 2), value=-math.inf)
    close(value, otkd.UniversalLogitLoss()(data.student, padded))


def test_a_cost_that_bridges_vocabularies():
    data = Data()
    cost = costs.EmbeddingCost(points(1, VOCAB, 3), points(2, 4, 3))
    for loss in (sinkhorn(cost=cost, embedding=None), otkd.WassersteinLoss(cost)):
        evaluate(loss, data.student, data.teacher[..., :4], **data.options())
        with pytest.raises(ValueError, match="6 source and 4 target tokens"):
            loss(data.student, data.teacher)
    with pytest.raises(ValueError, match="the cost is for 5 source and 5 target tokens"):
        sinkhorn(embedding=points(1, 5))(data.student, data.teacher)


# Construction ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in otkd.list_losses() if n != "sinkd"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"temperature": t}, "temperature must be a fin") for t in (0, -1.0, math.nan, math.inf)),
        ({"teacher_temperature": 0.0}, "teacher_temperature must be"),
        ({"reduction": "batchmean"}, "reduction must be one of 'mean', 'sum', .* got 'batchmean'"),
        ({"vocab_size": 0}, "vocab_size must be a whole number of at least 1"),
    ],
)
def test_common_settings_are_checked(name, options, message):
    with pytest.raises(ValueError, match=message):
        BUILDERS[name](**options)


@pytest.mark.parametrize(
    ("build", "options", "error", "message"),
    [
        *((otkd.JSDLoss, {"beta": b}, ValueError, "beta must lie strictly") for b in (0, 1, 2)),
        *((otkd.SkewKLLoss, {"alpha": a}, ValueError, "alpha must be at") for a in (-0.1, 1.0, 2)),
        *((otkd.SkewReverseKLLoss, {"alpha": a}, ValueError, "alpha must") for a in (-0.1, 1.0)),
        *((otkd.AdaptiveKLLoss, {"head_mass": m}, ValueError, "head_mass") for m in (-0.1, 1.1)),
        (otkd.AlphaBetaLoss, {"alpha": math.nan}, ValueError, "alpha and beta must be finite"),
        (otkd.AlphaBetaLoss, {"beta": math.inf}, ValueError, "alpha and beta must be finite"),
        *(
            (build, {name: value}, ValueError, f"{name} must be")
            for build in (sinkhorn, batch_sinkhorn)
            for name, value in (
                ("epsilon", 0),
                ("epsilon", -1.0),
                ("epsilon", math.nan),
                ("tolerance", 0.0),
                ("max_iterations", 0),
                ("value", "primal"),
            )
        ),
        (sinkhorn, {"backend": "cuda"}, ValueError, "backend must be one of 'auto'"),
        (sinkhorn, {"support": "dense"}, TypeError, "support must be 'auto' or an object"),
        (otkd.SinkhornLoss, {}, ValueError, "needs embedding=, the vectors of the tokens"),
        (otkd.TransportKLLoss, {}, ValueError, r"Write TransportKLLoss\(embedding="),
        (sinkhorn, {"cost": "l1"}, ValueError, "cost must be one of 'embedding'.* got 'l1'"),
        (sinkhorn, {"cost": "discrete"}, ValueError, 'is used by cost="embedding" only'),
        (otkd.SinkhornLoss, {"cost": 3}, TypeError, "cost must be one of .* got int"),
        (otkd.SinkhornLoss, {"cost": torch.ones(3)}, ValueError, "MatrixCost needs a matrix"),
        (otkd.WassersteinLoss, {"cost": "embedding"}, ValueError, r"pass otkd\.costs\.Embedding"),
        (otkd.WassersteinLoss, {"cost": "l1"}, ValueError, "cost must be one of"),
        (otkd.WassersteinLoss, {}, TypeError, "cost"),
        (otkd.WassersteinLoss, {"cost": "ordinal", "p": 0}, ValueError, "p must be a finite"),
        (otkd.WassersteinLoss, {"cost": "discrete", "p": -1}, ValueError, "p must be"),
        (batch_sinkhorn, {"cost": "cosine"}, ValueError, "cost must be one of 'l1', 'euclidean'"),
        (otkd.SinKDLoss, {"alpha": 1.1}, ValueError, "alpha must lie between 0 and 1"),
        (otkd.SinKDLoss, {"sinkhorn_weight": math.inf}, ValueError, "'sinkhorn' must be finite"),
        (otkd.SinKDLoss, {"temperature": 0}, ValueError, "temperature must be"),
        (otkd.SinKDLoss, {"reduction": "no"}, ValueError, "reduction must be"),
        (otkd.KLLoss, {"beta": 0.5}, TypeError, "beta"),
    ],
)
def test_own_settings_are_checked(build, options, error, message):
    with pytest.raises(error, match=message):
        build(**options)


def test_debiasing_warns_where_the_divergence_may_be_negative():
    with pytest.warns(UserWarning, match="not known to be positive definite"):
        otkd.SinkhornLoss(costs.OrdinalCost(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        otkd.SinkhornLoss(costs.OrdinalCost(3), debias=False)
        otkd.SinkhornLoss(costs.OrdinalCost(2))


def test_registry():
    contract = "ce kl rkl jsd tvd skl srkl akl alpha_beta sinkhorn wasserstein batch_sinkhorn"
    others = {"sinkd", "uld", "hellinger", "transport_kl"}
    assert set(otkd.list_losses()) == {*contract.split(), *others}
    loss = otkd.get_loss("jsd", beta=0.1, temperature=2)
    assert isinstance(loss, otkd.JSDLoss)
    assert (loss.formula.beta, loss.temperature) == (0.1, 2)
    for wrong, nearest in (("KL", "kl"), ("sinkhrn", "sinkhorn"), ("jds", "jsd")):
        with pytest.raises(ValueError, match=f"unknown loss '{wrong}'; did you mean '{nearest}'"):
            otkd.get_loss(wrong)
    with pytest.raises(ValueError, match=r"unknown loss 'xyzzy'\. The losses are akl, alpha_beta"):
        otkd.get_loss("xyzzy")
    with pytest.raises(TypeError, match="beta"):
        otkd.get_loss("kl", beta=1)


def test_where_settings_are_at_their_defaults():
    defaults = {
        otkd.JSDLoss: formulas.JensenShannon(beta=0.5),
        otkd.SkewKLLoss: formulas.SkewKL(alpha=0.1),
        otkd.SkewReverseKLLoss: formulas.SkewReverseKL(alpha=0.1),
        otkd.AdaptiveKLLoss: formulas.AdaptiveKL(head_mass=0.5),
    }
    for build, formula in defaults.items():
        assert build().formula == formula
    for build in map(otkd.losses.loss_class, RESCALED):
        if build not in (otkd.SinkhornLoss, otkd.TransportKLLoss, otkd.WassersteinLoss):
            assert build().temperature == (2.0 if build is otkd.BatchSinkhornLoss else 1.0)
            assert build().reduction == "mean"
    token, batch = otkd.SinkhornLoss(embedding=points(1, 4)), otkd.BatchSinkhornLoss()
    options = otkd.ot.options
    assert token.objective == batch.objective == options.Objective(epsilon=0.1, debias=True)
    for loss, limit in ((token, 200), (batch, 1000)):
        expected = options.SolverSettings(tolerance=1e-4, max_iterations=limit)
        assert loss.solver == expected
    assert batch.cost == "l1"


# Modules -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in BUILDERS if n not in ("sinkd-author",)])
def test_copies_and_saved_state(name):
    data = Data()
    loss = BUILDERS[name](reduction="sum")
    expected = evaluate(loss, data.student, data.teacher, **data.options())
    assert loss.state_dict() == {}
    assert not list(loss.parameters())
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), loss.eval(), loss.cpu()):
        same(evaluate(other, data.student, data.teacher, **data.options()), expected)
    loss.load_state_dict({})


@pytest.mark.parametrize("name", [n for n in BUILDERS if not n.startswith(("sinkd", "weighted"))])
def test_repr(name):
    text = repr(BUILDERS[name](temperature=3.0, reduction="sum"))
    assert text.startswith(type(BUILDERS[name]()).__name__ + "(")
    assert "temperature=3.0, reduction='sum'" in text


def test_repr_of_settings():
    for loss, parts in (
        (otkd.JSDLoss(0.2), ["beta=0.2"]),
        (otkd.AlphaBetaLoss(0.2, 0.3), ["alpha=0.2, beta=0.3"]),
        (sinkhorn(), ["epsilon=0.1", "debias='sinkhorn'", "value='dual'", "EmbeddingCost((6, 6)"]),
        (wasserstein(), ["p=2", "MatrixCost()"]),
        (batch_sinkhorn(), ["cost='l1'", "epsilon=0.1"]),
        (otkd.SinKDLoss(0.75), ["kl=0.75, ce=0.25, sinkhorn=0.1", "KLLoss("]),
    ):
        assert all(part in repr(loss) for part in parts), repr(loss)


def test_the_embedding_follows_the_module_and_takes_no_gradient():
    data = Data(torch.float32)
    weight = torch.nn.Parameter(points(3, VOCAB, 3).float())
    loss = otkd.SinkhornLoss(embedding=weight)
    model = torch.nn.ModuleDict({"loss": loss})
    value, _ = evaluate(loss, data.student, data.teacher)
    assert weight.grad is None
    assert not list(model.parameters())
    assert model.state_dict() == {}
    for dtype, error in ((torch.float64, 1e-5), (torch.bfloat16, 2e-2)):
        moved = copy.deepcopy(model).to(dtype)["loss"]
        assert moved.cost.source.dtype == dtype
        result, _ = evaluate(moved, data.student, data.teacher)
        close(result, value, rtol=error, atol=error)
    assert copy.deepcopy(loss).to("meta").cost.source.device.type == "meta"


def test_a_learnable_embedding_is_a_parameter_with_a_gradient():
    data = Data()
    weight = torch.nn.Parameter(points(3, VOCAB, 3))
    loss = sinkhorn(cost=costs.EmbeddingCost(weight, learnable=True), embedding=None)
    assert set(loss.state_dict()) == {"cost.source", "cost.scale"}
    assert list(loss.parameters()) == [weight]
    evaluate(loss, data.student, data.teacher, **data.options())
    assert weight.grad.abs().max() > 0
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        close(other(data.student, data.teacher), loss(data.student, data.teacher))


def test_solver_report():
    data = Data()
    for loss in (sinkhorn(), batch_sinkhorn()):
        assert loss.last_report is None
        evaluate(loss, data.student, data.teacher)
        report = loss.last_report
        assert report.converged
        assert report.iterations >= 1
        assert 0 <= report.marginal_error <= 1e-12
        assert not report.marginal_error.requires_grad
    assert otkd.KLLoss().last_report is None
    loss = sinkhorn(max_iterations=1)
    with pytest.warns(otkd.ConvergenceWarning, match="1 iterations"):
        loss(data.student, data.teacher)
    assert not loss.last_report.converged


@pytest.mark.parametrize("name", ["kl", "tvd", "sinkhorn", "batch_sinkhorn", "sinkd", "weighted"])
def test_compiled(name):
    data = Data()
    loss = BUILDERS[name]()
    layer = torch.nn.Linear(VOCAB, VOCAB, dtype=torch.float64)

    def step(student, teacher, labels, mask):
        return loss(layer(student), teacher, labels=labels, mask=mask)

    arguments = (data.student, data.teacher, data.labels, data.mask)
    expected = step(*arguments)
    slopes = torch.autograd.grad(expected, layer.parameters())
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # breaks of the graph are no fault
        value = torch.compile(step, backend="eager")(*arguments)
        close(value, expected)
        same(torch.autograd.grad(value, layer.parameters()), slopes)
    torch._dynamo.reset()


# Weighted sums -----------------------------------------------------------------------------------


def test_weighted_loss_is_the_weighted_sum():
    data = Data()
    terms = {"kl": (0.5, otkd.KLLoss(temperature=2)), "hard": (2, "ce"), "tvd": (-1.0, "tvd")}
    loss = otkd.WeightedLoss(terms)
    assert loss.last_terms == {}
    options = {**data.options(), "num_items_in_batch": 9}
    value, gradient = evaluate(loss, data.student, data.teacher, **options)
    parts = {
        name: evaluate(
            otkd.get_loss(term) if isinstance(term, str) else term,
            data.student,
            data.teacher,
            **options,
        )
        for name, (_, term) in terms.items()
    }
    close(value, sum(terms[name][0] * part[0] for name, part in parts.items()))
    close(gradient, sum(terms[name][0] * part[1] for name, part in parts.items()))
    assert list(loss.last_terms) == list(terms)
    for name, term in loss.last_terms.items():
        assert torch.is_tensor(term)
        assert not term.requires_grad
        close(term, parts[name][0])


def test_weighted_losses_nest_and_learn():
    weight = torch.nn.Parameter(points(3, VOCAB, 3))
    transport = sinkhorn(cost=costs.EmbeddingCost(weight, learnable=True), embedding=None)
    inner = otkd.WeightedLoss({"kl": (1.0, "kl"), "transport": (3.0, transport)})
    loss = otkd.WeightedLoss({"inner": (0.5, inner), "ce": (0.5, "ce")})
    assert list(loss.parameters()) == [weight]
    assert loss.needs_labels
    assert loss.needs_teacher
    assert not inner.needs_labels
    data = Data()
    value, _ = evaluate(loss, data.student, data.teacher, labels=data.labels)
    close(value, 0.5 * loss.last_terms["inner"] + 0.5 * loss.last_terms["ce"])
    assert weight.grad.abs().max() > 0
    assert not otkd.WeightedLoss({"ce": (1.0, "ce")}).needs_teacher


@pytest.mark.parametrize(
    ("terms", "error", "message"),
    [
        ({}, ValueError, "needs at least one term"),
        ({"kl": otkd.KLLoss()}, TypeError, r"term 'kl' must be a pair \(weight, loss\)"),
        ({"kl": (1.0, "kl", 2)}, TypeError, "term 'kl' must be a pair"),
        ({"kl": (math.nan, "kl")}, ValueError, "the weight of term 'kl' must be finite"),
        ({"kl": (1.0, "kll")}, ValueError, "did you mean 'kl'"),
        ({"kl": (1.0, otkd.functional.kl_divergence)}, TypeError, "a module or a registry name"),
        ({"kl": ("kl", 1.0)}, TypeError, "must be a number"),
    ],
)
def test_refused_terms(terms, error, message):
    with pytest.raises(error, match=message):
        otkd.WeightedLoss(terms)


def test_hard_labels():
    data = Data()
    reference = torch.nn.functional.cross_entropy(
        data.student.flatten(0, 1) / 2, data.labels.flatten()
    )
    loss = otkd.losses.CrossEntropyLoss(temperature=2)
    close(loss(data.student, labels=data.labels), reference)
    close(loss(data.student, "not read", labels=data.labels), reference)


def test_unknown_arguments_are_named_with_the_loss():
    for make, message in (
        (
            lambda: otkd.KLLoss(temprature=2),
            "KLLoss has no argument 'temprature': did you",
        ),
        (
            lambda: otkd.get_loss("tvd", beta=1),
            "TVDLoss has no argument 'beta': it takes",
        ),
        (lambda: otkd.SinkhornLoss("discrete", epsilonn=1), "did you mean 'epsilon'"),
        (lambda: otkd.KLLoss(temperature="2"), "temperature must be a number, got '2'"),
        (lambda: otkd.WeightedLoss([(1, "ce")]), "terms {name: .*}, got list"),
    ):
        with pytest.raises(TypeError, match=message):
            make()
