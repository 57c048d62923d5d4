"""Losses that know which tokens of two vocabularies correspond, and likelihoods of spans."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import otkd
from otkd.alignment import TokenMap, common_positions, span_likelihood_divergence
from tests.problems import generator, logits, seeds

pytestmark = pytest.mark.usefixtures("seeded")
close = torch.testing.assert_close
STUDENTS, TEACHERS = 5, 7
ONE_VOCABULARY = {"kl": {}, "rkl": {}, "tvd": {}, "jsd": {}, "akl": {}, "skl": {}, "uld": {}}


def identity(size=STUDENTS):
    return TokenMap.of_pairs(range(size), range(size), (size, size))


def random_map(seed):
    """Most tokens stand for one or two of the student; the last of each side for none."""
    draw = generator(seed)
    teacher = torch.arange(TEACHERS - 1).repeat(2)
    student = torch.randint(0, STUDENTS - 1, (len(teacher),), generator=draw)
    weight = torch.rand(len(teacher), generator=draw) + 0.1
    kinds, target = torch.zeros(TEACHERS, dtype=torch.uint8), torch.full((TEACHERS,), -1)
    return TokenMap.of_weights(student, teacher, weight, target, kinds, (STUDENTS, TEACHERS))


def matrix_of(found):
    matrix = torch.zeros(TEACHERS, STUDENTS, dtype=torch.float64)
    matrix[found.teacher, found.student] = found.weight.double()
    return matrix


def result(loss, student, teacher, **options):
    leaf = student.clone().requires_grad_()
    value = loss(leaf, teacher, **options)
    value.sum().backward()
    return value.detach(), leaf.grad


# Identical vocabularies --------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["logits", "topk", "all"])
@pytest.mark.parametrize("name", ONE_VOCABULARY)
def test_with_one_vocabulary_it_is_the_loss_itself(name, kind, temperature):
    student, teacher = logits(1, 4, STUDENTS), logits(2, 4, STUDENTS)
    if kind != "logits":
        k = 3 if kind == "topk" else STUDENTS
        teacher = otkd.TopKTeacher.from_logits(teacher, k, temperature)
    options = {"temperature": temperature, "reduction": "none"}
    pushed = otkd.PushforwardLoss(identity(), name, **options)
    expected = result(otkd.get_loss(name, **options), student, teacher)
    close(result(pushed, student, teacher), expected, rtol=1e-5, atol=1e-5)
    if name == "kl" and kind == "logits":
        hybrid = otkd.HybridLogitLoss(identity(), **options)
        close(result(hybrid, student, teacher), expected, rtol=1e-9, atol=1e-9)


def test_transport_over_the_students_vocabulary():
    cost = otkd.costs.OrdinalCost()
    inner = otkd.SinkhornLoss(cost, epsilon=0.3, tolerance=1e-9, max_iterations=5000)
    student, teacher = logits(1, 4, STUDENTS), logits(2, 4, STUDENTS)
    pushed = otkd.PushforwardLoss(identity(), inner)
    close(result(pushed, student, teacher), result(inner, student, teacher), rtol=1e-6, atol=1e-8)
    assert pushed.last_report.support.startswith("Dense")


# Two vocabularies --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kl", "rkl", "tvd"])
@given(seed=seeds, temperature=st.sampled_from([1.0, 1.7]))
def test_the_teacher_is_mapped_and_renormalised(name, seed, temperature):
    found, student, teacher = (
        random_map(seed),
        logits(seed, 3, STUDENTS),
        logits(seed + 1, 3, TEACHERS),
    )
    p = (teacher / temperature).softmax(-1) @ matrix_of(found)
    p = p / p.sum(-1, keepdim=True)
    p = p.where(torch.bincount(found.student, minlength=STUDENTS) > 0, 1e-9)
    options = {"temperature": temperature, "reduction": "none"}
    expected = result(otkd.get_loss(name, **options), student, p.log() * temperature)
    loss = otkd.PushforwardLoss(found, name, **options)
    close(result(loss, student, teacher), expected, rtol=1e-6, atol=1e-6)
    padded = torch.nn.functional.pad(teacher, (0, 3), value=9.0)
    loss = otkd.PushforwardLoss(found, name, vocab_size=found.vocab_size, **options)
    close(result(loss, student, padded), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("build", [otkd.PushforwardLoss, otkd.HybridLogitLoss])
def test_gradients(build):
    found = random_map(3)
    if build is otkd.HybridLogitLoss:
        found = TokenMap.of_pairs([0, 3], [5, 1], (STUDENTS, TEACHERS))
    student = logits(1, 3, STUDENTS).requires_grad_()
    teacher = logits(2, 3, TEACHERS)
    torch.autograd.gradcheck(lambda z: build(found)(z, teacher), [student])


@given(seed=seeds)
def test_a_stored_teacher_is_mapped(seed):
    found, student, teacher = (
        random_map(seed),
        logits(seed, 3, STUDENTS),
        logits(seed + 1, 3, TEACHERS),
    )
    stored = otkd.TopKTeacher.from_logits(teacher, 3)
    # The reference: masses of the stored tokens alone, mapped; the others are the tail.
    masses = torch.zeros(3, TEACHERS, dtype=torch.float64)
    masses.scatter_(-1, stored.tokens, stored.log_masses.double().exp())
    pushed = masses @ matrix_of(found) / (1 - masses[:, -1:])
    expected = otkd.TopKTeacher(
        torch.arange(STUDENTS).expand(3, -1).masked_fill(pushed == 0, -1),
        pushed.log().clamp(max=0),
        STUDENTS,
    )
    for name in ("kl", "tvd"):
        loss = otkd.PushforwardLoss(found, name, reduction="none")
        direct = result(otkd.get_loss(name, reduction="none"), student, expected)
        close(result(loss, student, stored), direct, rtol=1e-5, atol=1e-6)
    # All tokens stored: that of the logits, apart from the tail's rounding.
    every = otkd.TopKTeacher.from_logits(teacher, TEACHERS)
    loss = otkd.PushforwardLoss(found, "tvd", reduction="none")
    close(loss(student, every), loss(student, teacher), rtol=1e-5, atol=1e-6)


def test_positions_without_mapped_mass_have_no_value():
    found = random_map(1)
    student, teacher = logits(1, 2, STUDENTS), logits(2, 2, TEACHERS)
    alone = torch.full_like(teacher[:1], -torch.inf)
    alone[:, -1] = 0.0  # which the student cannot write
    loss = otkd.PushforwardLoss(found, reduction="none")
    value, slope = result(loss, student, torch.cat([teacher[:1], alone]))
    close(value[:1], loss(student[:1], teacher[:1]))
    assert value[1] == 0
    assert slope[1].eq(0).all()
    stored = otkd.TopKTeacher.from_logits(torch.cat([teacher[:1], alone]), TEACHERS)
    assert loss(student, stored)[1].abs() < 1e-5
    with pytest.raises(ValueError, match="not finite"):
        loss(student, torch.full_like(teacher, torch.nan))


@given(seed=seeds, weight=st.sampled_from([None, 0.0, 0.3, 1.0]))
def test_hybrid_logit_loss_is_its_formula(seed, weight):
    pairs = [0, 3, 2], [5, 1, 6]
    found = TokenMap.of_pairs(*pairs, (STUDENTS, TEACHERS))
    student, teacher = logits(seed, 3, STUDENTS), logits(seed + 1, 3, TEACHERS)
    q, p = student.softmax(-1), teacher.softmax(-1)
    expected = torch.zeros(3, dtype=torch.float64)
    w = 3 / TEACHERS if weight is None else weight
    for i, j in zip(*pairs, strict=True):
        expected += w * (p[:, j] * (p[:, j] / q[:, i]).log() - p[:, j] + q[:, i])
    rest = [
        x[:, [i for i in range(x.shape[1]) if i not in ids]].sort(-1, descending=True).values
        for x, ids in ((q, pairs[0]), (p, pairs[1]))
    ]
    rest[0] = torch.nn.functional.pad(rest[0], (0, rest[1].shape[1] - rest[0].shape[1]))
    expected += (1 - w) * (rest[0] - rest[1]).abs().sum(-1)
    loss = otkd.HybridLogitLoss(found, matched_weight=weight, reduction="none")
    close(loss(student, teacher), expected)


def test_blocks_do_not_change_the_result(monkeypatch):
    found, student, teacher = random_map(2), logits(1, 9, STUDENTS), logits(2, 9, TEACHERS)
    stored = otkd.TopKTeacher.from_logits(teacher, 4)
    mask = torch.arange(9) % 3 != 1
    loss = otkd.PushforwardLoss(found)
    whole = [result(loss, student, each, mask=mask) for each in (teacher, stored)]
    monkeypatch.setattr("otkd.losses.pushforward._BLOCK_ELEMENTS_ON_CPU", 30)
    close([result(loss, student, each, mask=mask) for each in (teacher, stored)], whole)


def test_an_annealed_temperature_reaches_the_loss():
    found, student, teacher = random_map(2), logits(1, 9, STUDENTS), logits(2, 9, TEACHERS)
    loss = otkd.PushforwardLoss(found, temperature=3.0)
    loss.temperature = 1.5
    close(loss(student, teacher), otkd.PushforwardLoss(found, temperature=1.5)(student, teacher))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (["kl"], {}, TypeError, r"needs a TokenMap, from otkd.alignment.token_map\("),
        ([identity(), "ce"], {}, TypeError, "must compare distributions, got CrossEntropyLoss"),
        ([identity(), otkd.SinKDLoss()], {}, TypeError, "single positions, got SinKDLoss"),
        ([identity(), otkd.BatchSinkhornLoss()], {}, TypeError, "got BatchSinkhornLoss"),
        ([identity(), otkd.PushforwardLoss(identity())], {}, TypeError, "got PushforwardLoss"),
        ([identity(), otkd.KLLoss(vocab_size=3)], {}, ValueError, "given to PushforwardLoss, as a"),
        ([identity(), otkd.KLLoss()], {"temperature": 2}, ValueError, r"KLLoss\(temperature=\.\."),
        ([identity(), "klx"], {}, ValueError, "did you mean 'kl'"),
        ([identity()], {"reductoin": "sum"}, TypeError, "did you mean 'reduction'"),
    ],
)
def test_wrong_pushforward_losses(arguments, options, error, message):
    with pytest.raises(error, match=message):
        otkd.PushforwardLoss(*arguments, **options)


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
def test_wrong_weights(weight):
    with pytest.raises(ValueError, match="matched_weight must"):
        otkd.HybridLogitLoss(identity(), matched_weight=weight)


# Spans -------------------------------------------------------------------------------------------


def naive_span_divergence(student, teacher, positions, temperature):
    values = []
    places = list(zip(positions.student.tolist(), positions.teacher.tolist(), strict=True))
    for (i, j), (i_next, j_next) in itertools.pairwise(places):
        q = student[i + 1 : i_next + 1].exp().prod() ** (1 / temperature)
        p = teacher[j + 1 : j_next + 1].exp().prod() ** (1 / temperature)
        values.append(p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())
    return torch.stack(values)


@given(seed=seeds, temperature=st.sampled_from([1.0, 3.0]))
def test_spans_are_products_of_probabilities(seed, temperature):
    draw = generator(seed)
    ends = [sorted(torch.randperm(12, generator=draw)[:n].tolist()) for n in (7, 9)]
    ends = [[0, *(end + 1 for end in side), 13] for side in ends]
    positions = common_positions(*ends)
    student, teacher = (
        -3 * torch.rand(len(side), generator=draw, dtype=torch.float64) - 0.01 for side in ends
    )
    student[0] = teacher[0] = torch.nan  # of the first token there is none
    leaf = student.clone().requires_grad_()
    found = span_likelihood_divergence(leaf, teacher, positions, temperature=temperature)
    close(found, naive_span_divergence(student, teacher, positions, temperature))
    found.sum().backward()
    assert leaf.grad[1:].isfinite().all()
    with torch.no_grad():
        same = span_likelihood_divergence(teacher, teacher, common_positions(ends[1], ends[1]))
    assert same.abs().max() < 1e-12
    torch.autograd.gradcheck(
        lambda x: span_likelihood_divergence(x, teacher, positions, temperature=temperature),
        [student.nan_to_num(-1.0).requires_grad_()],
    )


def test_spans_at_the_ends_of_probability():
    positions = common_positions([0, 1, 2], [0, 1, 2])
    student = torch.tensor([0.0, 0.0, -torch.inf], requires_grad=True)
    teacher = torch.tensor([0.0, -1e-9, -0.5])
    value = span_likelihood_divergence(student, teacher, positions)
    value.sum().backward()
    assert value.isfinite().all()
    assert value[0].abs() < 1e-4
    assert value[1] > 1e4
    assert student.grad.isfinite().all()
    empty = common_positions([1], [2])
    assert len(span_likelihood_divergence(student, teacher, empty)) == 0
    with pytest.raises(ValueError, match="the student has a position at token 2, but only 2"):
        span_likelihood_divergence(student[:2], teacher, positions)
    with pytest.raises(ValueError, match="temperature must be"):
        span_likelihood_divergence(student, teacher, positions, temperature=0)
