"""Every loss on a stored top-k teacher: whatever is not stored is one mass on both sides."""

import dataclasses
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import otkd
from otkd.costs import EmbeddingCost
from otkd.losses.sinkd import SoftCrossEntropyLoss
from otkd.supports import CoverageWarning, Dense, TopK
from otkd.teachers import DenseTeacher, TopKTeacher
from tests.problems import logits, points, seeds

pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.filterwarnings("ignore::otkd.supports.CoverageWarning"),
]

VOCAB = 12
EXACT = {"tolerance": 1e-9, "max_iterations": 5000}
close = torch.testing.assert_close


def cost(vocab=VOCAB):
    return EmbeddingCost(points(7, VOCAB, 3)[:vocab], normalize=None)


def sinkhorn(support, vocab=VOCAB):
    return lambda **o: otkd.SinkhornLoss(
        cost(vocab), **{"epsilon": 0.5, "support": support, **EXACT, **o}
    )


def transport_kl(vocab=VOCAB):
    return lambda **o: otkd.TransportKLLoss(cost(vocab), price=5.0, support=TopK(3), **o)


F_DIVERGENCES = {
    "kl": otkd.KLLoss,
    "rkl": otkd.ReverseKLLoss,
    "jsd": otkd.JSDLoss,
    "tvd": otkd.TVDLoss,
    "skl": otkd.SkewKLLoss,
    "srkl": otkd.SkewReverseKLLoss,
    "hellinger": otkd.HellingerLoss,
    "alpha half": otkd.AlphaBetaLoss,
    "alpha": lambda **o: otkd.AlphaBetaLoss(1.7, -0.7, **o),
}
OTHERS = {
    "akl": otkd.AdaptiveKLLoss,
    "akl all": lambda **o: otkd.AdaptiveKLLoss(head_mass=0.9, **o),
    "squared": lambda **o: otkd.AlphaBetaLoss(1, 1, **o),
    "logarithms": lambda **o: otkd.AlphaBetaLoss(0, 0, **o),
    "ratio": lambda **o: otkd.AlphaBetaLoss(0.5, -0.5, **o),
}
DIVERGENCES = F_DIVERGENCES | OTHERS | {"uld": otkd.UniversalLogitLoss}
TRANSPORT = {
    "dense": sinkhorn(Dense()),
    "topk": sinkhorn(TopK(3)),
    "wide topk": sinkhorn(TopK(9)),
    "headless": sinkhorn(TopK(3, tail=False)),
    "transport KL": transport_kl(),
    "wasserstein": lambda **o: otkd.WassersteinLoss(cost(), **o),
    "total variation": lambda **o: otkd.WassersteinLoss("discrete", **o),
    "samples": lambda **o: otkd.BatchSinkhornLoss(
        **{"debias": True, "temperature": 1.0, **EXACT, **o}
    ),
}
LOSSES = DIVERGENCES | TRANSPORT


def ragged(stored, counts, tokens=-1):
    """The first ``counts`` tokens of each position alone."""
    empty = torch.arange(stored.k) >= torch.as_tensor(counts).unsqueeze(-1)
    return dataclasses.replace(
        stored,
        tokens=stored.tokens.masked_fill(empty, tokens),
        log_masses=stored.log_masses.masked_fill(empty, -torch.inf),
    )


def value_and_gradient(loss, student, teacher, **options):
    student = student.detach().clone().requires_grad_()
    value = loss(student, teacher, **options)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    return value.detach(), gradient


@pytest.mark.parametrize("name", LOSSES)
def test_zero_and_flat_where_student_and_teacher_are_the_same(name):
    iterates = name in TRANSPORT and name not in ("wasserstein", "total variation")
    coarse = {"tolerance": 1e-5} if iterates else {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        loss = LOSSES[name](reduction="none", **({} if dtype == torch.float64 else coarse))
        student = logits(1, 3, VOCAB, dtype=dtype, scale=1.5)
        for k in (4,) if name == "wasserstein" else (1, 4, VOCAB - 1, VOCAB):
            stored = TopKTeacher.from_logits(student, k)
            few = ragged(stored, [k, 1, max(1, k // 2)], tokens=0)
            # A server adds the token that was sampled, which may be a light one.
            added = dataclasses.replace(
                stored, tokens=stored.tokens.clone(), log_masses=stored.log_masses.clone()
            )
            lightest = student.argmin(-1)
            if k < VOCAB and name != "uld":
                added.tokens[:, -1] = lightest
                normalised = student.to(stored.log_masses.dtype).log_softmax(-1)
                added.log_masses[:, -1] = normalised.gather(-1, lightest[:, None])[:, 0]
            for teacher in (stored, few, added):
                value, gradient = value_and_gradient(loss, student, teacher)
                # What float32 leaves of 1 − Σp counts more in logarithms that no mass weighs.
                loose = iterates or name in ("logarithms", "ratio")
                tolerance = 1e-9 if dtype == torch.float64 else 2e-4 if loose else 4e-6
                assert value.abs().max() < tolerance, (dtype, k)
                assert gradient.abs().max() < tolerance, (dtype, k)


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"headless"}))
@settings(max_examples=6)
@given(seed=seeds, k=st.integers(1, VOCAB))
def test_nothing_is_negative(name, seed, k):
    loss = LOSSES[name](reduction="none")
    value = loss(logits(seed, 3, VOCAB), TopKTeacher.from_logits(logits(seed + 1, 3, VOCAB), k))
    assert (value > -1e-7).all()


@pytest.mark.parametrize("name", [*F_DIVERGENCES, "uld", "soft ce"])
@settings(max_examples=6)
@given(seed=seeds, scale=st.sampled_from([1.0, 4.0]))
def test_more_tokens_say_more_up_to_all_of_them(name, seed, scale):
    loss = (LOSSES | {"soft ce": SoftCrossEntropyLoss})[name](reduction="none")
    student, teacher = logits(seed, 4, VOCAB), logits(seed + 1, 4, VOCAB, scale=scale)
    dense, before = value_and_gradient(loss, student, teacher), torch.zeros(4)
    for k in range(1, VOCAB + 1):
        value, gradient = value_and_gradient(loss, student, TopKTeacher.from_logits(teacher, k))
        # What is left of 1 in float64 has few digits if it is as small as 1e-10.
        assert (value >= before - 1e-5).all()
        assert (value <= dense[0] + 1e-5).all()
        before = value
    close((value, gradient), dense, rtol=1e-7, atol=1e-9)


def atoms(values, tokens):
    """Sums over the tokens outside ``tokens``, behind the values at these."""
    head = values.gather(-1, tokens)
    outside = torch.ones_like(values).scatter(-1, tokens, 0.0)
    return torch.cat([head, (values * outside).sum(-1, keepdim=True)], -1)


@pytest.mark.parametrize("name", [*F_DIVERGENCES, *OTHERS])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_value_and_gradient_are_those_of_the_distributions_over_atoms(name, temperature):
    loss = LOSSES[name](reduction="none", temperature=temperature, rescale_t2=False)
    plain = LOSSES[name](reduction="none", rescale_t2=False)
    student, teacher = logits(1, 3, VOCAB).requires_grad_(), logits(2, 3, VOCAB)
    stored = TopKTeacher.from_logits(teacher, 4, temperature)
    tokens = stored.tokens.long()
    q, p = (atoms((x / temperature).softmax(-1), tokens) for x in (student, teacher))
    if name.startswith("akl"):  # of which the tail is no part of the head
        p = p[..., :] if p[..., -1].max() < p[..., 0].min() else p
        gap = (p - q).detach().abs()
        inside = (p[..., :-1].cumsum(-1) - p[..., :-1]) <= plain.formula.head_mass
        weight = (gap[..., :-1] * inside).sum(-1) / gap.sum(-1)
        kl, rkl = (p * (p / q).log()).sum(-1), (q * (q / p).log()).sum(-1)
        expected = weight * kl + (1 - weight) * rkl
    else:
        expected = plain(q.log(), p.log())
    (slope,) = torch.autograd.grad(expected.sum(), student)
    close(
        value_and_gradient(loss, student, stored), (expected.detach(), slope), rtol=1e-7, atol=1e-9
    )


def test_ranks_are_compared_between_any_two_vocabularies():
    loss = otkd.UniversalLogitLoss(reduction="none")
    for sizes in ((VOCAB, 20), (20, VOCAB), (3, 20)):
        student, teacher = logits(1, 4, sizes[0]), logits(2, 4, sizes[1])
        dense, before = loss(student, teacher), torch.zeros(4)
        for k in (1, 2, 5, sizes[1]):
            value, gradient = value_and_gradient(loss, student, TopKTeacher.from_logits(teacher, k))
            assert (value >= before - 1e-12).all()
            assert (value <= dense + 1e-12).all()
            assert gradient.isfinite().all()
            before = value
        close(value, dense)
    student, stored = (
        logits(1, 4, VOCAB).requires_grad_(),
        TopKTeacher.from_logits(logits(2, 4, 20), 3),
    )
    assert torch.autograd.gradcheck(lambda s: loss(s, stored), student)


@pytest.mark.parametrize("name", LOSSES)
def test_a_ragged_position_is_one_of_fewer_tokens(name):
    loss = LOSSES[name](reduction="none")
    student, teacher = logits(1, 3, VOCAB), logits(2, 3, VOCAB)
    counts = [5, 1, 3]
    stored = TopKTeacher.from_logits(teacher, 5)
    mask = torch.tensor([True, False, True])
    broken = student.clone()
    broken[1] = torch.nan
    for tokens in (-1, 0, 7):
        teacher_rows = ragged(stored, counts, tokens)
        found = value_and_gradient(loss, student, teacher_rows)
        if name == "samples":
            assert found[1].isfinite().all()
            continue
        for i, count in enumerate(counts):
            rows = slice(i, i + 1)
            alone = value_and_gradient(
                loss, student[rows], TopKTeacher.from_logits(teacher[rows], count)
            )
            close((found[0][rows], found[1][rows]), alone, rtol=1e-6, atol=1e-8)
        value, gradient = value_and_gradient(loss, broken, teacher_rows, mask=mask)
        close(value[mask], found[0][mask])
        close(gradient[mask], found[1][mask])
        assert (gradient[1] == 0).all()


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"wide topk"}))
def test_padded_vocabularies_are_the_same_to_every_form_of_teacher(name):
    size = VOCAB - 3
    make = LOSSES[name] | {} if isinstance(LOSSES[name], dict) else LOSSES[name]
    if name in ("dense", "topk", "headless"):
        support = {"dense": Dense(), "topk": TopK(3), "headless": TopK(3, tail=False)}[name]
        make = sinkhorn(support, size)
    if name == "transport KL":
        make = transport_kl(size)
    if name == "wasserstein":
        make = lambda **o: otkd.WassersteinLoss(cost(size), **o)  # noqa: E731
    loss, plain = make(reduction="none", vocab_size=size), make(reduction="none")
    student, teacher = logits(1, 3, VOCAB), logits(2, 3, VOCAB)
    student[:, size:] += 9  # a padding that would matter
    expected = value_and_gradient(plain, student[:, :size], teacher[:, :size])
    bare = teacher.clone()
    bare[:, size:] = -torch.inf
    # Known in full, the padding can be taken away whatever it holds.
    for form in (teacher, DenseTeacher(teacher), TopKTeacher.from_logits(bare, VOCAB)):
        value, gradient = value_and_gradient(loss, student, form)
        if isinstance(form, TopKTeacher) and name in ("topk", "headless", "transport KL"):
            expected = value_and_gradient(
                plain, student[:, :size], TopKTeacher.from_logits(teacher[:, :size], size)
            )
        close((value, gradient[:, :size]), expected, rtol=1e-6, atol=1e-8)
        assert (gradient[:, size:] == 0).all()
    heavy = TopKTeacher.from_logits(teacher, VOCAB)
    close(loss(student, heavy), value, rtol=1e-6, atol=1e-8)
    # Otherwise it must not be stored.
    cut = value_and_gradient(
        plain, student[:, :size], TopKTeacher.from_logits(teacher[:, :size], 4)
    )
    for form in (
        TopKTeacher.from_logits(bare, 4),
        ragged(TopKTeacher.from_logits(bare, 6), [4, 4, 4], tokens=VOCAB - 1),
        TopKTeacher.from_logits(teacher[:, :size], 4),
    ):
        value, gradient = value_and_gradient(loss, student, form)
        close((value, gradient[:, :size]), cut, rtol=1e-6, atol=1e-8)
    heavy = teacher.clone()
    heavy[:, -1] = 9
    with pytest.raises(ValueError, match=r"mass on padding tokens \(from 9 on\).*rebuild"):
        loss(student, TopKTeacher.from_logits(heavy, 4))
    mask = torch.tensor([1, 1, 0])
    only_there = teacher.clone()
    only_there[:, size:] = -torch.inf
    only_there[2, -1] = 9
    assert loss(student, TopKTeacher.from_logits(only_there, 4), mask=mask).isfinite().all()


def test_a_cut_teacher_keeps_its_self_term():
    loss = sinkhorn(TopK(3), VOCAB - 3)(vocab_size=VOCAB - 3, reduction="none")
    student, teacher = logits(1, 3, VOCAB), logits(2, 3, VOCAB)
    teacher[:, VOCAB - 3 :] = -torch.inf
    stored = TopKTeacher.from_logits(teacher, VOCAB - 1).sliced(VOCAB - 3)
    assert stored.k == stored.vocab_size == VOCAB - 3
    kept = loss.with_self_term(stored)
    close(loss(student, kept), loss(student, stored), rtol=1e-6, atol=1e-8)
    few = ragged(TopKTeacher.from_logits(teacher[:, : VOCAB - 3], 5), [5, 1, 3])
    kept = loss.with_self_term(few)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", CoverageWarning)
        close(loss(student, kept), loss(student, few), rtol=1e-6, atol=1e-8)
        wide = TopKTeacher.cat(
            [kept, loss.with_self_term(TopKTeacher.from_logits(teacher[:, : VOCAB - 3], 6))]
        )
        assert wide.k == 6
        twice = torch.cat([student, student])
        close(loss(twice, wide)[:3], loss(student, few), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", [*F_DIVERGENCES, "akl", "squared", "uld", "dense", "topk"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
def test_masses_of_any_precision(name, precision):
    options = {"tolerance": 1e-4} if name in TRANSPORT else {}
    loss = LOSSES[name](reduction="none", **options)
    student, teacher = logits(1, 3, VOCAB, dtype=torch.float32), logits(2, 3, VOCAB)
    exact = loss(student.double(), TopKTeacher.from_logits(teacher, 5))
    found = loss(student, TopKTeacher.from_logits(teacher, 5, dtype=precision))
    close(found.double(), exact, rtol=0.1, atol=0.05)
    half = loss(student.to(torch.bfloat16), TopKTeacher.from_logits(teacher, 5, dtype=precision))
    assert half.dtype == torch.float32
    assert half.isfinite().all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_extreme_logits(name):
    if name in ("alpha", "logarithms", "ratio"):
        pytest.skip("not bounded at small probabilities")
    loss = LOSSES[name](reduction="none")
    for dtype in (torch.float64, torch.float32):
        teacher = torch.zeros(4, VOCAB, dtype=dtype)
        teacher[0, 3], teacher[1, :2], teacher[2] = 1e4, 50.0, -torch.inf
        teacher[2, :2] = 0
        student = torch.zeros_like(teacher)
        student[0, 4], student[1, 0], student[3] = 1e4, -torch.inf, -torch.inf
        student[3, 5] = 0
        for k in (1, 3, VOCAB):
            value, gradient = value_and_gradient(loss, student, TopKTeacher.from_logits(teacher, k))
            assert value.isfinite().all()
            assert gradient.isfinite().all()


def test_the_mass_left_over_is_shared_as_the_student_shares_it():
    student, teacher = logits(1, 3, VOCAB), logits(2, 3, VOCAB)
    stored = TopKTeacher.from_logits(teacher, 4, 2.0)
    q, p = (student / 0.5).softmax(-1), (stored.logits_beside(student, 0.5) / 2.0).softmax(-1)
    tokens = stored.tokens.long()
    close(p.gather(-1, tokens), (teacher / 2.0).softmax(-1).gather(-1, tokens))
    ratios = (p / q).scatter(-1, tokens, torch.nan)
    close(ratios.nan_to_num(0).amax(-1), ratios.nan_to_num(torch.inf).amin(-1))
    close(p.sum(-1), torch.ones(3).double())
    # Where the student has the masses it is the student, bit for bit.
    assert torch.equal(TopKTeacher.from_logits(student, 4).logits_beside(student), student)
    # Where the student has none on the others they share evenly.
    alone = torch.full_like(student, -torch.inf).scatter(-1, tokens, 0.0)
    close(stored.logits_beside(alone).softmax(-1), stored.logits().softmax(-1))


def test_a_position_must_have_something():
    stored = TopKTeacher.from_logits(logits(2, 3, VOCAB), 4)
    nothing = ragged(stored, [4, 0, 2])
    mask = torch.tensor([1, 0, 1])
    for name, make in LOSSES.items():
        loss = make(reduction="none")
        with pytest.raises(ValueError, match=r"1 of 3 positions have only empty slots"):
            loss(logits(1, 3, VOCAB), nothing)
        if name != "samples":
            close(
                loss(logits(1, 3, VOCAB), nothing, mask=mask),
                loss(logits(1, 3, VOCAB), ragged(stored, [4, 1, 2]), mask=mask),
            )
