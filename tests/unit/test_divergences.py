import itertools
import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.nn.functional import kl_div

import otkd
from otkd import functional as F
from otkd.functional import rowwise
from tests import naive
from tests.problems import logits, seeds

pytestmark = pytest.mark.usefixtures("seeded")
close = torch.testing.assert_close

CASES = {
    "kl": (F.kl_divergence, naive.kl, {}),
    "rkl": (F.reverse_kl_divergence, naive.reverse_kl, {}),
    "jsd": (F.jensen_shannon_divergence, naive.jsd, {}),
    "jsd-0.1": (F.jensen_shannon_divergence, naive.jsd, {"beta": 0.1}),
    "tvd": (F.total_variation_distance, naive.tvd, {}),
    "hellinger": (F.hellinger_divergence, naive.hellinger, {}),
    "skl": (F.skew_kl_divergence, naive.skew_kl, {}),
    "skl-0": (F.skew_kl_divergence, naive.skew_kl, {"alpha": 0.0}),
    "skl-0.6": (F.skew_kl_divergence, naive.skew_kl, {"alpha": 0.6}),
    "srkl": (F.skew_reverse_kl_divergence, naive.skew_reverse_kl, {}),
    "srkl-0": (F.skew_reverse_kl_divergence, naive.skew_reverse_kl, {"alpha": 0.0}),
    "akl": (F.adaptive_kl_divergence, naive.adaptive_kl, {}),
    "akl-0": (F.adaptive_kl_divergence, naive.adaptive_kl, {"head_mass": 0.0}),
    "akl-0.9": (F.adaptive_kl_divergence, naive.adaptive_kl, {"head_mass": 0.9}),
    "ab": (F.alpha_beta_divergence, naive.alpha_beta, {}),
    **{
        f"ab{pair}": (
            F.alpha_beta_divergence,
            naive.alpha_beta,
            {"alpha": pair[0], "beta": pair[1]},
        )
        for pair in (
            *((1, 0), (0, 1), (0.2, 0.7), (1, 1), (0.5, 0), (0, 2)),
            *((0, 0), (1, -1), (2, -0.5)),
        )
    },
    "uld": (F.universal_logit_distance, naive.uld, {}),
}
BOUNDED = [name for name in CASES if name not in ("ab(0, 0)", "ab(1, -1)", "ab(2, -0.5)")]
SMOOTH = [name for name in CASES if not name.startswith("akl")]


def value_and_gradient(
    name,
    student,
    teacher,
    *,
    reference=False,
    temperature=1.0,
    teacher_temperature=None,
    weights=None,
):
    function, naive_function, options = CASES[name]
    leaf = student.detach().clone().requires_grad_()
    if reference:
        leaf = student.detach().double().requires_grad_()
        log_p = naive.log_distribution(teacher, teacher_temperature or temperature)
        value = naive_function(naive.log_distribution(leaf, temperature), log_p, **options)
    else:
        value = function(
            leaf,
            teacher,
            temperature=temperature,
            teacher_temperature=teacher_temperature,
            **options,
        )
    (gradient,) = torch.autograd.grad((value * (1 if weights is None else weights)).sum(), leaf)
    return value.detach(), gradient


DTYPES = {
    torch.float64: (torch.float64, 1e-9, 1e-9),
    torch.float32: (torch.float32, 2e-5, 2e-5),
    torch.bfloat16: (torch.float32, 2e-5, 2**-8),
    torch.float16: (torch.float32, 2e-5, 2**-10),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_those_of_the_formula(name, dtype):
    result, value_error, gradient_error = DTYPES[dtype]
    scale = 2.0 if name in BOUNDED else 1.0  # else their gradients are beyond float16
    student, teacher = (logits(seed, 2, 3, 11, dtype=dtype, scale=scale) for seed in (1, 2))
    settings = ({}, {"temperature": 2.5}, {"temperature": 0.7, "teacher_temperature": 3.0})
    for options in settings:
        value, gradient = value_and_gradient(name, student, teacher, **options)
        expected, slope = value_and_gradient(name, student, teacher, reference=True, **options)
        assert value.shape == (2, 3)
        assert value.dtype == result
        assert gradient.dtype == dtype
        scale = max(1.0, slope.abs().max().item())
        close(value.double(), expected, rtol=value_error, atol=value_error)
        close(gradient.double(), slope, rtol=gradient_error, atol=value_error * scale)


@given(seed=seeds, name=st.sampled_from(list(CASES)), vocab=st.integers(1, 9))
def test_random_sizes_and_upstream_gradients(seed, name, vocab):
    student, teacher = logits(seed, 4, vocab), logits(seed + 1, 4, vocab)
    weights = logits(seed + 2, 4)
    actual = value_and_gradient(name, student, teacher, weights=weights)
    expected = value_and_gradient(name, student, teacher, weights=weights, reference=True)
    for left, right in zip(actual, expected, strict=True):
        close(left, right, rtol=1e-8, atol=1e-8 * max(1.0, right.abs().max().item()))


@pytest.mark.parametrize("name", SMOOTH)
def test_gradcheck(name):
    function, _, options = CASES[name]
    teacher = logits(4, 2, 5, scale=1)
    student = logits(3, 2, 5, scale=1).requires_grad_()
    assert gradcheck(lambda z: function(z, teacher, temperature=1.3, **options), student)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_zero_with_a_zero_gradient_at_equality(name, dtype):
    same = logits(1, 5, 9, dtype=dtype)
    value, gradient = value_and_gradient(name, same, same.clone())
    close(value, torch.zeros_like(value), atol=1e-6, rtol=0)
    close(gradient, torch.zeros_like(gradient), atol=1e-6, rtol=0)
    assert value.min() >= 0


@given(seed=seeds, name=st.sampled_from(list(CASES)))
def test_shift_permutation_and_sign(seed, name):
    student, teacher = logits(seed, 3, 6), logits(seed + 1, 3, 6)
    value, gradient = value_and_gradient(name, student, teacher)
    assert value.min() >= 0
    shifted = value_and_gradient(name, student + 7, teacher - 40)
    order = torch.randperm(6)
    moved = value_and_gradient(name, student[:, order], teacher[:, order])
    for other, slope in ((shifted, gradient), (moved, gradient[:, order])):
        close(other[0], value, rtol=1e-8, atol=1e-9)
        close(other[1], slope, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", ["jsd", "tvd", "uld", "ab", "ab(1, 1)", "ab(0, 0)"])
def test_symmetry(name):
    student, teacher = logits(1, 4, 7), logits(2, 4, 7)
    there = value_and_gradient(name, student, teacher)[0]
    close(there, value_and_gradient(name, teacher, student)[0])


def test_names_of_the_same_divergence():
    student, teacher = logits(1, 4, 7), logits(2, 4, 7)
    pairs = [("kl", "ab(1, 0)"), ("rkl", "ab(0, 1)"), ("kl", "skl-0"), ("rkl", "srkl-0")]
    for left, right in pairs:
        for x, y in zip(
            value_and_gradient(left, student, teacher),
            value_and_gradient(right, student, teacher),
            strict=True,
        ):
            close(x, y, rtol=1e-9, atol=1e-9)
    p, q = teacher.softmax(-1), student.softmax(-1)
    hellinger = F.hellinger_divergence(student, teacher)
    close(F.alpha_beta_divergence(student, teacher), 2 * hellinger)
    close(F.alpha_beta_divergence(student, teacher, alpha=1, beta=1), (p - q).square().sum(-1) / 2)


@pytest.mark.parametrize(("alpha", "beta"), [(1, 0), (0, 1), (0, 0), (1, -1), (0.3, 0)])
def test_alpha_beta_is_continuous_at_its_limits(alpha, beta):
    """And in float32, where the general formula would lose its digits to cancellation."""
    student, teacher = logits(1, 4, 7), logits(2, 4, 7)
    limit = F.alpha_beta_divergence(student, teacher, alpha=alpha, beta=beta)
    for step, dtype in itertools.product((1e-3, 1e-5, 2e-6, 1e-7), (torch.float64, torch.float32)):
        for change in ((step, 0), (0, step), (step, step), (-step, step / 2)):
            near = F.alpha_beta_divergence(
                student.to(dtype), teacher.to(dtype), alpha=alpha + change[0], beta=beta + change[1]
            )
            close(near.double(), limit, rtol=50 * step + 1e-3, atol=50 * step + 1e-3)


@given(seed=seeds, beta=st.floats(0.01, 0.99), scale=st.sampled_from([0.1, 3.0, 300.0]))
def test_bounds_of_jsd(seed, beta, scale):
    student, teacher = (logits(s, 5, 6, dtype=torch.float32, scale=scale) for s in (seed, seed + 1))
    value = F.jensen_shannon_divergence(student, teacher, beta=beta)
    entropy = -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)
    assert value.min() >= 0
    assert value.max() <= entropy + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_disjoint_distributions(dtype):
    student = torch.tensor([0.0, 0.0, -torch.inf, -torch.inf], dtype=dtype)
    teacher = student.flip(0)
    close(F.jensen_shannon_divergence(student, teacher), torch.tensor(math.log(2)))
    close(F.total_variation_distance(student, teacher), torch.tensor(1.0))
    close(F.hellinger_divergence(student, teacher), torch.tensor(2.0))
    close(F.skew_kl_divergence(student, teacher), torch.tensor(-math.log(0.1)))
    close(F.skew_reverse_kl_divergence(student, teacher), torch.tensor(-math.log(0.1)))
    close(F.alpha_beta_divergence(student, teacher), torch.tensor(4.0))


def test_universal_logit_distance_across_vocabularies():
    for sizes in ((5, 8), (8, 5), (1, 4)):
        student, teacher = logits(1, 3, sizes[0]), logits(2, 3, sizes[1])
        for left, right in zip(
            value_and_gradient("uld", student, teacher),
            value_and_gradient("uld", student, teacher, reference=True),
            strict=True,
        ):
            close(left, right, rtol=1e-9, atol=1e-12)
    order = torch.randperm(8)
    student, teacher = logits(1, 3, 5), logits(2, 3, 8)
    plain = F.universal_logit_distance(student, teacher)
    close(F.universal_logit_distance(student, teacher[:, order]), plain)
    with pytest.raises(ValueError, match="the student has 5 tokens and the teacher 8"):
        F.kl_divergence(student, teacher)


# Masks, infinities, refusals ---------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_masked_positions_may_hold_anything(name, garbage):
    function, _, options = CASES[name]
    student, teacher = logits(1, 3, 4, 5), logits(2, 3, 4, 5)
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 0, 1]])
    expected, slope = value_and_gradient(name, student, teacher, weights=mask)
    outside = mask.unsqueeze(-1) == 0
    noisy = student.masked_fill(outside, garbage).requires_grad_()
    for given_mask in (mask, mask.bool(), mask.double()):
        value = function(noisy, teacher.masked_fill(outside, garbage), mask=given_mask, **options)
        (gradient,) = torch.autograd.grad(value.sum(), noisy)
        close(value, expected * mask)
        close(gradient, slope)
    nothing = function(noisy, teacher, mask=torch.zeros_like(mask), **options)
    assert torch.autograd.grad(nothing.sum(), noisy)[0].abs().max() == 0
    assert nothing.abs().max() == 0


@pytest.mark.parametrize("name", CASES)
def test_a_token_without_mass_on_either_side_does_not_count(name):
    student, teacher = logits(1, 3, 6), logits(2, 3, 6)
    column = torch.full((3, 2), -torch.inf, dtype=torch.float64)
    if "-0.5" in name:
        return  # a negative power of a mass of zero
    value, gradient = value_and_gradient(name, student, teacher)
    pairs = [torch.cat([x, column], -1) for x in (student, teacher)]
    padded, padded_gradient = value_and_gradient(name, *pairs)
    close(padded, value, rtol=1e-8, atol=1e-9)
    close(padded_gradient[:, :6], gradient, rtol=1e-8, atol=1e-9)
    assert padded_gradient[:, 6:].abs().max() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BOUNDED)
def test_finite_on_minus_infinity_and_on_huge_gaps(name, dtype):
    infinite = logits(1, 4, 6, dtype=dtype)
    infinite[:, 1] = -torch.inf
    infinite[2, 2:] = -torch.inf
    gap = torch.tensor([0.0, 1e4, -1e4, 3, -1e4, 50], dtype=dtype).expand(4, 6)
    other = logits(2, 4, 6, dtype=dtype)
    rows = {
        "infinite": infinite,
        "flipped": infinite.flip(-1),
        "gap": gap,
        "gap reversed": gap.flip(-1),
        "usual": other,
    }
    for student, teacher in itertools.permutations(rows.values(), 2):
        value, gradient = value_and_gradient(name, student, teacher)
        assert value.isfinite().all()
        assert value.min() >= 0
        assert gradient.isfinite().all()


def test_infinite_kl_is_floored_with_the_analytic_gradient():
    student = torch.tensor([0.0, 0.5, -torch.inf], dtype=torch.float64)
    teacher = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    value, gradient = value_and_gradient("kl", student, teacher)
    p, q = teacher.softmax(-1), student.softmax(-1)
    close(gradient, q - p)
    finite = (p[:2] * (p[:2] / q[:2]).log()).sum() + p[2] * p[2].log()
    close(value, finite - p[2] * rowwise.LOG_ZERO)
    assert rowwise.LOG_ZERO < -1e4
    for scale in (1e2, 1e3, 1e4):  # far beyond where softmax().log() is −inf
        far = torch.tensor([0.0, 0.5, -scale], dtype=torch.float32)
        close(value_and_gradient("kl", far, teacher.float())[1], (far.softmax(-1) - p).float())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("kind", ["NaN", "+inf", "all -inf"])
def test_logits_without_a_softmax_are_refused(name, side, kind):
    function, _, options = CASES[name]
    pair = {"student": logits(1, 2, 3, 5), "teacher": logits(2, 2, 3, 5)}
    if kind == "all -inf":
        pair[side][1, 0] = -torch.inf
    else:
        pair[side][1, 0, 2] = torch.nan if kind == "NaN" else torch.inf
    with pytest.raises(ValueError, match=r"1 of 6 positions .*not finite .*position 3"):
        function(pair["student"], pair["teacher"], **options)


@pytest.mark.parametrize("name", CASES)
def test_the_teacher_is_a_constant(name):
    function, _, options = CASES[name]
    student, teacher = logits(1, 3, 5).requires_grad_(), logits(2, 3, 5).requires_grad_()
    function(student, teacher, **options).sum().backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert not function(student.detach(), teacher, **options).requires_grad
    with torch.no_grad():
        assert not function(student, teacher, **options).requires_grad


def test_refused_input():
    x = torch.randn(2, 3)
    for student, teacher, error, message in (
        (x, x.long(), TypeError, "teacher_logits must be a floating-point tensor"),
        ([[0.0]], x, TypeError, "student_logits"),
        (x, x[:1], ValueError, "same batch shape"),
        (x[..., :0], x[..., :0], ValueError, "vocab ≥ 1"),
        (torch.tensor(1.0), x, ValueError, "vocab ≥ 1"),
    ):
        with pytest.raises(error, match=message):
            F.kl_divergence(student, teacher)
    with pytest.raises(ValueError, match="mask must have one entry per position"):
        F.kl_divergence(x, x, mask=torch.ones(3))
    for options in ({"temperature": 0.0}, {"temperature": -1.0}, {"teacher_temperature": math.nan}):
        with pytest.raises(ValueError, match="temperature must be"):
            F.kl_divergence(x, x, **options)


@pytest.mark.parametrize(
    ("function", "options"),
    [
        *((F.jensen_shannon_divergence, {"beta": v}) for v in (0.0, 1.0, -0.1, math.nan)),
        *((F.skew_kl_divergence, {"alpha": v}) for v in (-0.1, 1.0, math.nan)),
        *((F.skew_reverse_kl_divergence, {"alpha": v}) for v in (-0.1, 1.0)),
        *((F.adaptive_kl_divergence, {"head_mass": v}) for v in (-0.1, 1.1)),
        *((F.alpha_beta_divergence, {k: math.inf}) for k in ("alpha", "beta")),
    ],
)
def test_refused_parameters(function, options):
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match=next(iter(options))):
        function(x, x, **options)
    with pytest.raises(TypeError):
        function(x, x, unknown=1.0)


# Other implementations ---------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.7])
def test_agreement_with_trl(beta):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experimental
        gkd = pytest.importorskip("trl.experimental.gkd", reason="this trl has no GKD trainer here")
    student, teacher = logits(1, 2, 3, 9).requires_grad_(), logits(2, 2, 3, 9)
    theirs = gkd.GKDTrainer.generalized_jsd_loss(
        student, teacher, beta=beta, temperature=1.7, reduction="none"
    ).sum(-1)
    ours = F.jensen_shannon_divergence(student, teacher, beta=beta, temperature=1.7)
    close(ours, theirs)
    slopes = [torch.autograd.grad(v.sum(), student)[0] for v in (ours, theirs)]
    close(*slopes)


def test_agreement_with_torch():
    student, teacher = logits(1, 2, 3, 9), logits(2, 2, 3, 9)
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    forward = kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    close(F.kl_divergence(student, teacher), forward)
    backward = kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    close(F.reverse_kl_divergence(student, teacher), backward)


# Blocks, temperature -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("masked", [False, True])
def test_the_size_of_the_blocks_does_not_matter(monkeypatch, name, masked):
    function, _, options = CASES[name]
    teacher = logits(2, 5, 3, 7)
    mask = (torch.arange(15).reshape(5, 3) % 4 != 1) if masked else None
    results = []
    for elements in (1, 15, 50, 2**18):
        monkeypatch.setattr(rowwise, "_BLOCK_ELEMENTS_ON_CPU", elements)
        student = logits(1, 5, 3, 7).requires_grad_()
        value = function(student, teacher, mask=mask, **options)
        results.append((value.detach(), torch.autograd.grad(value.sum(), student)[0]))
    for value, gradient in results[1:]:
        close(value, results[0][0], rtol=1e-12, atol=1e-14)
        close(gradient, results[0][1], rtol=1e-12, atol=1e-14)


LOSSES = {
    otkd.KLLoss: F.kl_divergence,
    otkd.ReverseKLLoss: F.reverse_kl_divergence,
    otkd.JSDLoss: F.jensen_shannon_divergence,
    otkd.TVDLoss: F.total_variation_distance,
    otkd.HellingerLoss: F.hellinger_divergence,
    otkd.SkewKLLoss: F.skew_kl_divergence,
    otkd.SkewReverseKLLoss: F.skew_reverse_kl_divergence,
    otkd.AdaptiveKLLoss: F.adaptive_kl_divergence,
    otkd.AlphaBetaLoss: F.alpha_beta_divergence,
    otkd.UniversalLogitLoss: F.universal_logit_distance,
}


@pytest.mark.parametrize("loss", LOSSES)
def test_t2_is_the_default_where_the_gradient_falls_as_its_inverse(loss):
    student, teacher = logits(1, 6, 9), logits(2, 6, 9)

    def size(temperature, rescale_t2):
        leaf = student.clone().requires_grad_()
        loss(temperature=temperature, rescale_t2=rescale_t2)(leaf, teacher).backward()
        return leaf.grad.norm().item()

    exponent = math.log2(size(100.0, False) / size(200.0, False))
    assert abs(exponent - (1 if loss in (otkd.TVDLoss, otkd.UniversalLogitLoss) else 2)) < 0.1
    rescaled = round(exponent) == 2
    assert size(3.0, None) == pytest.approx(size(3.0, rescaled))
    assert size(3.0, True) == pytest.approx(9 * size(3.0, False))


@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_is_its_function(loss):
    student, teacher = logits(1, 2, 3, 9), logits(2, 2, 3, 9)
    values = loss(temperature=2.0, rescale_t2=False, reduction="none")(student, teacher)
    close(values, LOSSES[loss](student, teacher, temperature=2.0))
    close(loss(temperature=2.0, rescale_t2=False)(student, teacher), values.mean())


@pytest.mark.parametrize("vocab", [2, 9, 1000])
@pytest.mark.parametrize(
    "loss",
    [
        *(otkd.JSDLoss(), otkd.TVDLoss(), otkd.HellingerLoss()),
        *(otkd.UniversalLogitLoss(), otkd.AlphaBetaLoss(0.3, 0.3)),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_symmetric_divergences_are_so_to_the_last_bit(loss, vocab):
    student, teacher = torch.randn(64, vocab) * 5, torch.randn(64, vocab) * 5
    assert torch.equal(loss(student, teacher), loss(teacher, student))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_that_is_kept_can_be_gone_through_again(dtype):
    """The backward pass scales the gradient in place, but not while it is needed again."""
    student = torch.randn(4, 6, dtype=dtype, requires_grad=True)
    values = F.kl_divergence(student, torch.randn(4, 6, dtype=dtype))
    weights = torch.tensor([0.5, -2.0, 3.0, 0.0])
    rows = [torch.autograd.grad(values[i], student, retain_graph=True)[0] for i in range(4)]
    (kept,) = torch.autograd.grad(values @ weights, student, retain_graph=True)
    (last,) = torch.autograd.grad(values @ weights, student)
    assert torch.equal(kept, last)
    for row, gradient in enumerate(rows):
        assert gradient[row].abs().sum() > 0
        assert gradient.abs().sum(-1).nonzero().tolist() == [[row]]
        scaled = (weights[row] * gradient[row].float()).to(dtype)
        torch.testing.assert_close(kept[row], scaled)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(values @ weights, student)


def test_a_second_derivative_is_refused_rather_than_dropped():
    student = torch.randn(4, 6, requires_grad=True)
    value = F.kl_divergence(student, torch.randn(4, 6)).sum()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(value, student, create_graph=True)
    assert torch.autograd.grad(value, student)[0].isfinite().all()


def test_a_scaled_loss_of_half_logits_loses_nothing_to_underflow():
    """A gradient of float16 that is scaled when it is made has no number below 6e-8."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(1, 30_000, generator=generator).half()
    student = torch.randn(1, 30_000, generator=generator).half().requires_grad_()
    single = student.detach().float().requires_grad_()
    for leaf in (student, single):
        (F.kl_divergence(leaf, teacher.to(leaf.dtype)).sum() * 2.0**10).backward()
    assert student.grad.dtype == torch.float16
    assert ((student.grad == 0) & (single.grad.abs() > 1e-7)).sum() == 0
    torch.testing.assert_close(student.grad.float(), single.grad, atol=1e-7, rtol=1e-3)


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 8.0])
@pytest.mark.parametrize("head_mass", [0.0, 0.3, 0.5, 0.95])
@pytest.mark.parametrize("rounded", [False, True])
def test_the_head_is_that_of_all_tokens_sorted(scale, head_mass, rounded):
    """Of hundreds of tokens, in few of which it is looked for first; rounded, many are alike."""
    student, teacher = (scale * logits(k, 40, 300, scale=1.0) for k in (1, 2))
    if rounded:
        student, teacher = student.round(), teacher.round()
    value = F.adaptive_kl_divergence(student, teacher, head_mass=head_mass)
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    expected = naive.adaptive_kl(log_q, log_p, head_mass)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
