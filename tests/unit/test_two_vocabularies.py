"""Transport from one vocabulary to another, of whatever sizes, over all tokens or over heads."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import otkd
from otkd.costs import EmbeddingCost
from otkd.supports import Dense, TopK
from tests import naive
from tests.problems import logits, points, seeds

pytestmark = pytest.mark.usefixtures("seeded")
close = torch.testing.assert_close

METRICS = ("sqeuclidean", "euclidean", "cosine")
SIZES = ((5, 8), (8, 5), (6, 6))
SUPPORTS = (Dense(), TopK(1), TopK(3), TopK(5), TopK(7))
EPSILON = 0.4
TIGHT = {"epsilon": EPSILON, "tolerance": 1e-11, "max_iterations": 5000}
every_size = pytest.mark.parametrize("sizes", SIZES, ids=str)
every_support = pytest.mark.parametrize("support", SUPPORTS, ids=repr)
every_debias = pytest.mark.parametrize("debias", [True, False])


# The reference -----------------------------------------------------------------------------------


def distances(x, y, metric):
    """Differentiable, and exactly 0 between a vector and itself."""
    if metric == "cosine":
        x, y = x / x.norm(dim=-1, keepdim=True), y / y.norm(dim=-1, keepdim=True)
        return 1 - x @ y.T
    squares = (x[:, None] - y).square().sum(-1)
    if metric == "sqeuclidean":
        return squares
    zero = squares == 0
    return squares.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)


def token_costs(source, target, metric, scale=None):
    """C_st, C_ss and C_tt over all tokens, in units of the mean of the first."""
    pairs = ((source, target), (source, source), (target, target))
    costs = [distances(x, y, metric) for x, y in pairs]
    if scale is None:
        scale = costs[0].detach().mean()
    return [cost / scale for cost in costs]


class Atoms:
    """The k heaviest tokens of a row of masses, and the others together if there are any.

    With the cost to the tokens of another row, the nearest token of each of its head is one, too.
    """

    def __init__(self, masses, k, other=None, cost=None):
        size = len(masses)
        head = masses.argsort(descending=True)[:k]
        if other is not None and k is not None:
            head = torch.cat([head, cost[:, other.head].argmin(0)]).unique()
        self.head = head
        one_hot = torch.eye(size, dtype=masses.dtype)
        self.members, self.means = one_hot[head], one_hot[head]
        self.has_tail = k is not None and len(head) < size
        if self.has_tail:
            outside = 1 - self.members.sum(0, keepdim=True)
            self.members = torch.cat([self.members, outside])
            self.means = torch.cat([self.means, torch.full_like(outside, 1 / size)])
        self.masses = self.members @ masses


def atom_cost(rows, columns, cost, epsilon):
    """Mean costs to a tail over the whole vocabulary, and the soft mean between two tails."""
    matrix = rows.means @ cost @ columns.means.T
    if rows.has_tail and columns.has_tail:
        soft = -epsilon * torch.exp(-cost / epsilon).mean().log()
        last = torch.zeros_like(matrix)
        last[-1, -1] = 1
        matrix = torch.where(last == 1, soft, matrix)
    return matrix


def transport(a, b, cost, epsilon, sharp):
    """⟨P, C⟩ + ε·KL(P‖a⊗b), or ⟨P, C⟩, with autograd through Newton steps at the optimum."""

    def plan(f, g):
        exponent = (f.unsqueeze(-1) + g.unsqueeze(-2) - cost) / epsilon
        return a.unsqueeze(-1) * b.unsqueeze(-2) * exponent.exp()

    with torch.no_grad():
        g = torch.zeros_like(b)
        for _ in range(100):
            f = naive.soft_minimum(g, b, cost, epsilon)
            g = naive.soft_minimum(f, a, cost.mT, epsilon)
    for _ in range(5):  # each is right to first order in masses and costs, too
        p = plan(f, g)
        rows, columns = p.sum(-1), p.sum(-2)
        upper = torch.cat([rows.diag_embed(), p], -1)
        jacobian = torch.cat([upper, torch.cat([p.mT, columns.diag_embed()], -1)], -2)
        excess = torch.cat([rows - a, columns - b], -1)
        # Of f + c and g − c one is enough: the last g stays.
        step = torch.linalg.solve(jacobian[:, :-1, :-1], excess[:, :-1]) * epsilon
        f = f - step[:, : a.shape[-1]]
        g = g - torch.nn.functional.pad(step[:, a.shape[-1] :], (0, 1))
    assert excess.abs().max() < 1e-14
    p = plan(f, g)
    value = (p * cost).sum((-2, -1))
    if sharp:
        return value
    return value + epsilon * (p * (p / (a.unsqueeze(-1) * b.unsqueeze(-2))).log()).sum((-2, -1))


def reference(q, p, costs, support, *, debias=True, sharp=False, epsilon=EPSILON):
    """Every position by itself: its atoms and their costs; then all transported in float64."""
    k = support.k if isinstance(support, TopK) else None
    values = []
    for q_row, p_row in zip(q.flatten(0, -2), p.flatten(0, -2), strict=True):
        b = Atoms(p_row, k)
        a = Atoms(q_row, k, b, costs[0].detach())
        total = 0.0
        terms = ((a, b, 1.0), (a, a, -0.5), (b, b, -0.5))
        for (left, right, weight), cost in zip(terms, costs, strict=True):
            if weight < 0 and not debias:
                break
            matrix = atom_cost(left, right, cost, epsilon).unsqueeze(0)
            masses = left.masses.unsqueeze(0), right.masses.unsqueeze(0)
            total = total + weight * transport(*masses, matrix, epsilon, sharp)
        values.append(total)
    return torch.cat(values).reshape(q.shape[:-1])


def slopes(function, *leaves):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    value = function(*leaves)
    weights = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).reshape(value.shape)
    return value.detach(), *torch.autograd.grad((weights * value).sum(), leaves)


def spaces(sizes, seed=1, width=3):
    return points(seed, sizes[0], width) + 0.5, points(seed + 1, sizes[1], width)


# Value and gradient ------------------------------------------------------------------------------


@every_size
@every_support
@every_debias
@pytest.mark.parametrize("value", ["dual", "sharp"])
def test_value_and_gradient(sizes, support, debias, value):
    source, target = spaces(sizes)
    student, teacher = logits(3, 2, 2, sizes[0]), logits(4, 2, 2, sizes[1])
    loss = otkd.SinkhornLoss(
        EmbeddingCost(source, target),
        support=support,
        debias=debias,
        value=value,
        temperature=1.5,
        teacher_temperature=0.7,
        reduction="none",
        **TIGHT,
    )
    costs = token_costs(source, target, "sqeuclidean")
    p = naive.log_distribution(teacher, 0.7).exp()

    def expected(z):
        q = naive.log_distribution(z, 1.5).exp()
        return reference(q, p, costs, support, debias=debias, sharp=value == "sharp")

    actual = slopes(lambda z: loss(z, teacher), student)
    for left, right in zip(actual, slopes(expected, student), strict=True):
        close(left, right, atol=1e-8, rtol=1e-7)
    assert loss.last_report.converged


@given(
    seed=seeds,
    sizes=st.tuples(st.integers(2, 7), st.integers(2, 7)),
    k=st.integers(1, 8),
    metric=st.sampled_from(METRICS),
    epsilon=st.sampled_from([0.3, 2.0]),
)
def test_any_problem(seed, sizes, k, metric, epsilon):
    source, target = spaces(sizes, seed)
    student, teacher = logits(seed + 3, 2, sizes[0]), logits(seed + 4, 2, sizes[1])
    loss = otkd.SinkhornLoss(
        EmbeddingCost(source, target, metric=metric),
        support=TopK(k),
        reduction="none",
        **{**TIGHT, "epsilon": epsilon},
    )
    costs = token_costs(source, target, metric)
    p = naive.log_distribution(teacher).exp()

    def expected(z):
        q = naive.log_distribution(z).exp()
        return reference(q, p, costs, TopK(k), epsilon=epsilon)

    actual = slopes(lambda z: loss(z, teacher), student)
    for left, right in zip(actual, slopes(expected, student), strict=True):
        close(left, right, atol=1e-6, rtol=1e-6)


@every_size
@every_debias
@pytest.mark.parametrize("value", ["dual", "sharp"])
@pytest.mark.parametrize("metric", METRICS)
def test_heads_of_all_tokens_are_dense(sizes, debias, value, metric):
    cost = EmbeddingCost(*spaces(sizes), metric=metric)
    student, teacher = logits(3, 4, sizes[0]), logits(4, 4, sizes[1])
    common = {"debias": debias, "value": value, "reduction": "none", **TIGHT}
    dense = otkd.SinkhornLoss(cost, support=Dense(), **common)
    expected = slopes(lambda z: dense(z, teacher), student)
    for k in (max(sizes), max(sizes) + 5):
        whole = otkd.SinkhornLoss(cost, support=TopK(k), **common)
        for left, right in zip(slopes(lambda z: whole(z, teacher), student), expected, strict=True):  # noqa: B023
            close(left, right, atol=1e-8, rtol=1e-7)
        close(whole.last_report.worst_coverage, torch.tensor(1.0, dtype=torch.float64))


@every_size
def test_each_side_has_the_head_of_its_own_logits(sizes):
    """Permuting one vocabulary with its embedding leaves everything as it was, and only so."""
    source, target = spaces(sizes)
    student, teacher = logits(3, 4, sizes[0]), logits(4, 4, sizes[1])
    order = torch.arange(sizes[1] - 1, -1, -1)

    def run(target, teacher):
        loss = otkd.SinkhornLoss(
            EmbeddingCost(source, target), support=TopK(2), reduction="none", **TIGHT
        )
        return slopes(lambda z: loss(z, teacher), student)

    plain, moved = run(target, teacher), run(target[order], teacher[:, order])
    for left, right in zip(moved, plain, strict=True):
        close(left, right, atol=1e-8, rtol=1e-7)
    assert (run(target, teacher[:, order])[0] - plain[0]).abs().max() > 0.01


@pytest.mark.parametrize("metric", METRICS)
def test_the_costs_of_the_tail_of_a_large_vocabulary_are_sampled(metric):
    """Above 2048 tokens means without closed form are of 1024: near those over all."""
    sizes, support = (2100, 2300), TopK(6)
    source, target = (side / 2 for side in spaces(sizes, width=8))
    student, teacher = logits(3, 2, sizes[0]), logits(4, 2, sizes[1])
    student[:, ::400] += 9
    teacher[:, ::500] += 9
    cost = EmbeddingCost(source, target, metric=metric)
    loss = otkd.SinkhornLoss(cost, support=support, reduction="none", **TIGHT)
    costs = token_costs(source, target, metric)
    q, p = (naive.log_distribution(z).exp() for z in (student, teacher))
    close(loss(student, teacher), reference(q, p, costs, support), atol=0, rtol=0.02)
    assert loss.last_report.coverage < 0.95


@every_size
def test_one_cost_serves_losses_of_any_epsilon_and_precision(sizes):
    source, target = spaces(sizes)
    cost = EmbeddingCost(source, target, metric="euclidean")
    student, teacher = logits(3, 4, sizes[0]), logits(4, 4, sizes[1])
    for epsilon in (0.3, 1.0):
        for debias in (True, False):
            for dtype in (torch.float32, torch.float64):
                settings = {"epsilon": epsilon, "debias": debias, "support": TopK(2)}
                pair = student.to(dtype), teacher.to(dtype)
                shared = otkd.SinkhornLoss(cost, **settings)(*pair)
                fresh = otkd.SinkhornLoss(
                    EmbeddingCost(source, target, metric="euclidean"), **settings
                )
                close(shared, fresh(*pair), rtol=0, atol=0)
                assert shared.dtype == dtype


# Microbatches, masks, constants ------------------------------------------------------------------


@every_size
@every_support
@every_debias
def test_microbatches_add_up(sizes, support, debias):
    loss = otkd.SinkhornLoss(EmbeddingCost(*spaces(sizes)), support=support, debias=debias, **TIGHT)
    student, teacher = logits(3, 6, sizes[0]), logits(4, 6, sizes[1])
    mask = torch.tensor([1, 0, 1, 1, 1, 0])

    def whole(z):
        return loss(z, teacher, mask=mask)

    def parts(z):
        return sum(
            loss(z[rows], teacher[rows], mask=mask[rows], num_items_in_batch=4)
            for rows in (slice(0, 1), slice(1, 2), slice(2, 6))
        )

    for left, right in zip(slopes(parts, student), slopes(whole, student), strict=True):
        close(left, right, atol=1e-9, rtol=1e-8)


@every_size
@every_support
def test_masked_positions_may_hold_anything(sizes, support):
    loss = otkd.SinkhornLoss(
        EmbeddingCost(*spaces(sizes)), support=support, reduction="none", **TIGHT
    )
    student, teacher = logits(3, 4, sizes[0]), logits(4, 4, sizes[1])
    mask = torch.tensor([1, 0, 1, 0])
    counted = mask == 1
    expected = slopes(lambda z: loss(z, teacher) * mask, student)
    for garbage in (math.nan, math.inf, -math.inf):
        noisy = [z.masked_fill(~counted.unsqueeze(-1), garbage) for z in (student, teacher)]
        value, slope = slopes(lambda z: loss(z, noisy[1], mask=mask), noisy[0])  # noqa: B023
        close(value, expected[0], atol=1e-9, rtol=1e-8)
        close(slope, expected[1], atol=1e-9, rtol=1e-8)
        assert slope[~counted].abs().max() == 0
    for side in (0, 1):
        pair = [student.clone(), teacher.clone()]
        pair[side][2, 1] = math.nan
        name = ("student_logits", "teacher_logits")[side]
        with pytest.raises(ValueError, match=f"1 of 4 positions have {name} .*position 2"):
            loss(*pair)


@every_size
@every_support
@every_debias
def test_the_teacher_and_constant_embeddings_get_no_gradient(sizes, support, debias):
    source, target = (side.requires_grad_() for side in spaces(sizes))
    student = logits(3, 4, sizes[0]).requires_grad_()
    teacher = logits(4, 4, sizes[1]).requires_grad_()
    cost = EmbeddingCost(source, torch.nn.Parameter(target.detach()))
    loss = otkd.SinkhornLoss(cost, support=support, debias=debias)
    assert not list(loss.parameters())
    loss(student, teacher).backward()
    assert student.grad.abs().max() > 0
    assert teacher.grad is None
    assert source.grad is None
    assert cost.target.grad is None


# A cost that learns ------------------------------------------------------------------------------


@every_size
@every_support
@every_debias
@pytest.mark.parametrize("metric", METRICS)
def test_gradients_of_both_embeddings(sizes, support, debias, metric):
    source, target = spaces(sizes)
    student, teacher = logits(3, 3, sizes[0]), logits(4, 3, sizes[1])
    scale = distances(source, target, metric).mean()  # a number, computed once
    p = naive.log_distribution(teacher).exp()

    def actual(z, x, y):
        cost = EmbeddingCost(x, y, metric=metric, learnable=True)
        loss = otkd.SinkhornLoss(cost, support=support, debias=debias, reduction="none", **TIGHT)
        return loss(z, teacher)

    def expected(z, x, y):
        q = naive.log_distribution(z).exp()
        return reference(q, p, token_costs(x, y, metric, scale), support, debias=debias)

    found, wanted = (slopes(f, student, source, target) for f in (actual, expected))
    for left, right in zip(found, wanted, strict=True):
        close(left, right, atol=1e-6, rtol=1e-6)
    assert all(gradient.abs().max() > 1e-3 for gradient in wanted[1:])


@pytest.mark.parametrize("support", [Dense(), TopK(2)], ids=repr)
def test_sharp_gradients_of_both_embeddings_are_differences(support):
    sizes = (4, 4)
    source, target = spaces(sizes)
    student, teacher = logits(3, 2, sizes[0]), logits(4, 2, sizes[1])
    scale = distances(source, target, "sqeuclidean").mean().item()

    def value(x, y):  # the scale is a number of the embeddings: given here, so that it stays
        cost = EmbeddingCost(x / scale**0.5, y / scale**0.5, normalize=None, learnable=True)
        return otkd.SinkhornLoss(cost, support=support, value="sharp", **TIGHT)(student, teacher)

    assert torch.autograd.gradcheck(
        value, (source.requires_grad_(), target.requires_grad_()), eps=1e-5, atol=1e-5, rtol=1e-4
    )


# Padded vocabularies -----------------------------------------------------------------------------


@every_size
@pytest.mark.parametrize("support", [Dense(), TopK(2), TopK(9)], ids=repr)
@pytest.mark.parametrize("padding", [0.0, 50.0, math.nan, math.inf, -math.inf])
def test_each_side_is_sliced_at_its_own_number_of_tokens(sizes, support, padding):
    cost = EmbeddingCost(*spaces(sizes))
    settings = {"support": support, "reduction": "none", **TIGHT}
    student, teacher = logits(3, 4, sizes[0]), logits(4, 4, sizes[1])
    plain = otkd.SinkhornLoss(cost, **settings)
    expected = slopes(lambda z: plain(z, teacher), student)
    loss = otkd.SinkhornLoss(cost, vocab_size=sizes, **settings)
    for widths in ((0, 0), (3, 0), (0, 2), (1, 4)):
        padded = [
            torch.nn.functional.pad(z, (0, width), value=padding)
            for z, width in zip((student, teacher), widths, strict=True)
        ]
        for given_teacher in (padded[1], otkd.DenseTeacher(padded[1])):
            value, slope = slopes(lambda z: loss(z, given_teacher), padded[0])  # noqa: B023
            close(value, expected[0], atol=1e-10, rtol=1e-9)
            close(slope[:, : sizes[0]], expected[1], atol=1e-10, rtol=1e-9)
            assert (slope[:, sizes[0] :] == 0).all()


def test_a_pair_serves_every_loss_that_allows_it():
    student, teacher = logits(1, 3, 7), logits(2, 3, 9)
    universal = otkd.UniversalLogitLoss(vocab_size=(5, 8))(student, teacher)
    close(universal, otkd.UniversalLogitLoss()(student[:, :5], teacher[:, :8]))
    cost = EmbeddingCost(*spaces((5, 8)))
    exact = otkd.WassersteinLoss(cost, vocab_size=(5, 8))(student, teacher)
    close(exact, otkd.WassersteinLoss(cost)(student[:, :5], teacher[:, :8]))
    one = otkd.KLLoss(vocab_size=(6, 6))(student, teacher)
    close(one, otkd.KLLoss(vocab_size=6)(student, teacher))
    labels = torch.tensor([0, 3, 5])
    hard = otkd.losses.CrossEntropyLoss(vocab_size=(6, 8))(student, labels=labels)
    close(hard, torch.nn.functional.cross_entropy(student[:, :6], labels))


def test_refused_sizes():
    student, teacher = logits(1, 3, 7), logits(2, 3, 9)
    bridge = EmbeddingCost(*spaces((5, 8)))
    for sizes in (0, (0, 3), (3, -1), (1, 2, 3), (3,), (2.0, 3), 2.5, "ab"):
        with pytest.raises(
            ValueError, match="vocab_size must be a whole number of at least 1, or a"
        ):
            otkd.SinkhornLoss(bridge, vocab_size=sizes)
    for sizes, side, number in (((8, 8), "student", 7), ((5, 10), "teacher", 9)):
        loss = otkd.SinkhornLoss(bridge, vocab_size=sizes)
        with pytest.raises(ValueError, match=rf"is larger than the {number} logits of the {side}"):
            loss(student, teacher)
    message = "leaves the student 5 tokens and the teacher 8, but this {} needs one vocabulary"
    for loss in (
        otkd.KLLoss(vocab_size=(5, 8)),
        otkd.BatchSinkhornLoss(vocab_size=(5, 8)),
        otkd.SinkhornLoss("discrete", vocab_size=(5, 8)),
        otkd.SinkhornLoss(EmbeddingCost(points(1, 5)), vocab_size=(5, 8)),
    ):
        with pytest.raises(ValueError, match=message.format(type(loss).__name__)):
            loss(student, teacher)
    for sizes in ((5, 7), 5, None):
        with pytest.raises(ValueError, match="the cost is for 5 source and 8 target tokens"):
            otkd.SinkhornLoss(bridge, vocab_size=sizes)(student, teacher)
