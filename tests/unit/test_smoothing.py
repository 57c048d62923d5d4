"""The closed form of the transport KL over a whole vocabulary, with an exact kernel at the head."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import otkd
from otkd import costs
from otkd.costs.background import background_of
from otkd.functional.smoothing import KernelSettings
from otkd.supports import Dense, TopK
from tests.problems import logits, points

close = torch.testing.assert_close
CPU = torch.device("cpu")
seeds = st.integers(0, 10**6)
V = 60


def pair(seed, positions=3, vocab=V, scale=2.0):
    return [logits(seed + i, positions, vocab, scale=scale) for i in range(2)]


def any_matrix(seed, vocab=V):
    """Symmetric, with zeros on the diagonal, and a kernel that need not be positive definite."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.rand(vocab, vocab, generator=generator, dtype=torch.float64)
    return (matrix + matrix.mT).fill_diagonal_(0)


def result(cost, student, teacher, support, **options):
    z = student.detach().clone().requires_grad_()
    loss = otkd.TransportKLLoss(cost, support=support, reduction="none", **options)
    value = loss(z, teacher)
    return value, torch.autograd.grad(value.sum(), z)[0]


@pytest.mark.parametrize("debias", ["teacher", None])
@pytest.mark.parametrize("price", [0.1, 1.0, 5.0, 30.0])
def test_for_the_discrete_cost_nothing_is_approximated(price, debias):
    student, teacher = pair(1)
    cost = costs.DiscreteCost()
    found = result(cost, student, teacher, TopK(3), price=price, debias=debias)
    exact = result(cost, student, teacher, Dense(), price=price, debias=debias)
    close(found, exact, rtol=1e-9, atol=1e-11)


@given(seeds)
@settings(max_examples=20)
def test_if_all_tokens_are_in_the_head_nothing_is_approximated(seed):
    student, teacher = pair(seed)
    cost = costs.MatrixCost(any_matrix(seed))
    found = result(cost, student, teacher, TopK(V), price=4.0)
    close(found, result(cost, student, teacher, Dense(), price=4.0), rtol=1e-8, atol=1e-10)


@given(seeds, st.sampled_from([0.5, 4.0, 40.0]))
@settings(max_examples=20)
def test_without_debiasing_if_all_tokens_are_in_the_head(seed, price):
    student, teacher = pair(seed)
    cost = costs.EmbeddingCost(points(seed, V, 3))
    options = {"price": price, "debias": None}
    found = result(cost, student, teacher, TopK(V), **options)
    close(found, result(cost, student, teacher, Dense(), **options), rtol=1e-8, atol=1e-10)


def test_without_debiasing_a_cost_may_be_learnable_or_asymmetric():
    """The closed form has no gradient in the cost, and requires symmetry: the solver is used."""
    student, teacher = pair(2)
    embedding = points(2, V, 3).requires_grad_()
    loss = otkd.TransportKLLoss(
        costs.EmbeddingCost(embedding, learnable=True), price=3.0, debias=None, support=TopK(8)
    )
    loss(student, teacher).backward()
    assert embedding.grad.norm() > 0
    matrix = torch.rand(V, V, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    options = {"price": 3.0, "debias": None}
    found = result(costs.MatrixCost(matrix), student, teacher, TopK(V), **options)
    exact = result(costs.MatrixCost(matrix), student, teacher, Dense(), **options)
    close(found, exact, rtol=1e-4, atol=1e-5)


@given(seeds)
@settings(max_examples=20)
def test_a_high_price_gives_kl_over_the_whole_vocabulary(seed):
    student, teacher = pair(seed)
    cost = costs.EmbeddingCost(points(seed, V, 8))
    found = result(cost, student, teacher, TopK(2), price=1000.0)
    z = student.clone().requires_grad_()
    kl = otkd.KLLoss(reduction="none")(z, teacher)
    close(found, (kl, torch.autograd.grad(kl.sum(), z)[0]), rtol=1e-7, atol=1e-9)


@given(seeds, st.sampled_from([0.5, 4.0, 40.0]), st.integers(1, 8), st.booleans())
@settings(max_examples=60)
def test_it_is_a_divergence_whatever_the_kernel(seed, price, k, embedded):
    student, teacher = pair(seed)
    cost = costs.EmbeddingCost(points(seed, V, 3))
    if not embedded:
        cost = costs.MatrixCost(any_matrix(seed))
    value, _ = result(cost, student, teacher, TopK(k), price=price)
    assert (value > 0).all()
    value, slope = result(cost, teacher, teacher, TopK(k), price=price)
    assert (value == 0).all()
    assert (slope == 0).all()


@pytest.mark.parametrize("debias", ["teacher", None])
@pytest.mark.parametrize("embedded", [True, False])
def test_gradients_are_those_of_differences(embedded, debias):
    student, teacher = pair(3, vocab=12)
    cost = costs.EmbeddingCost(points(3, 12, 3))
    if not embedded:
        cost = costs.MatrixCost(any_matrix(3, 12))
    loss = otkd.TransportKLLoss(cost, price=3.0, support=TopK(2), debias=debias)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, teacher), student, atol=1e-7)


def test_the_kernel_is_symmetric_and_exact_among_the_most_probable_tokens():
    student, teacher = (x.expand(V, -1) for x in pair(4, positions=1))
    cost = costs.MatrixCost(any_matrix(4))
    kernel = KernelSettings(cost, 0.3, 3, 1).at(student, teacher)
    matrix = kernel(torch.eye(V, dtype=torch.float64))  # row i is that of token i
    close(matrix, matrix.mT)
    assert (matrix >= 0).all()
    exact = (-cost(V, V).double() / 0.3).exp()
    head = torch.cat([student[0].topk(3).indices, teacher[0].topk(3).indices]).unique()
    close(matrix[head][:, head], exact[head][:, head], rtol=1e-6, atol=1e-8)
    close(matrix.diagonal(), torch.ones(V, dtype=torch.float64))


def test_a_cost_that_is_not_symmetric_is_refused():
    class Later(costs.OrdinalCost):
        """Tokens may only move up for free."""

        def between(self, x, y, sides, dtype):
            return (x.unsqueeze(-1) - y.unsqueeze(-2)).clamp(min=0).to(dtype)

    student, teacher = pair(12)
    with pytest.raises(ValueError, match="not symmetric"):
        otkd.TransportKLLoss(Later(), support=TopK(3))(student, teacher)


@pytest.mark.parametrize("clusters", [1, 5])
def test_the_background_has_the_mean_cost_of_every_pair_of_clusters(clusters):
    cost = costs.EmbeddingCost(points(5, V, 8))
    found = background_of(cost, V, clusters, torch.float64, CPU)
    exact = cost(V, V).double()
    member = torch.nn.functional.one_hot(found.assignment).double()
    assert member.shape[-1] == clusters
    replaced = found.excess.unsqueeze(-1) + member @ found.between @ member.mT + found.excess
    assert (replaced > 0).all()
    replaced.fill_diagonal_(0)
    close(member.mT @ replaced @ member, member.mT @ exact @ member, rtol=1e-5, atol=1e-6)


def test_no_cost_of_the_background_is_below_zero():
    """A token near all others, in a cluster of tokens far from each other."""
    embedding = torch.cat([torch.zeros(1, 30), 5 * torch.eye(30), torch.ones(20, 30) / 50])
    found = background_of(costs.EmbeddingCost(embedding), 51, 3, torch.float64, CPU)
    kernel = found.kernel(0.01)
    assert (kernel.members @ kernel.between @ kernel.members.mT).max() <= 1
    assert kernel.own.min() >= 0


def test_a_price_that_changes_keeps_no_more_tables():
    cost = costs.EmbeddingCost(points(5, V, 3))
    student, teacher = pair(5)
    kept = set()
    for price in (30.0, 20.0, 10.0):
        result(cost, student, teacher, TopK(3), price=price)
        kept.add(len(cost.tail_constants))
    assert len(kept) == 1


def test_near_duplicates_far_from_all_other_tokens():
    """In float32 the squares of their rows are rounded by more than the costs between them."""
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(3000, 16, generator=generator) * 0.05
    far = 100 * torch.randn(16, generator=generator)
    embedding[:40] = far + 0.003 * torch.randn(40, 16, generator=generator)
    student, teacher = (x.float() for x in pair(5, vocab=3000))
    value, slope = result(costs.EmbeddingCost(embedding), student, teacher, TopK(8), price=30.0)
    assert value.isfinite().all()
    assert slope.isfinite().all()


@pytest.mark.parametrize("debias", ["teacher", None])
def test_float32_where_the_tail_has_almost_no_mass(debias):
    pairs = torch.nn.functional.one_hot(torch.arange(60) // 2).float()
    teacher = torch.full((1, 60), -60.0)
    student = teacher.clone()
    teacher[0, [0, 4, 8]] = torch.tensor([1.5, -0.3, -2.2])
    teacher[0, 12], student[0, 12] = -28.0, 0.0
    student[0, [0, 4, 8]] = -20.0
    cost = costs.EmbeddingCost(pairs)
    options = {"price": 30.0, "debias": debias}
    found = result(cost, student, teacher, TopK(4), **options)
    exact = result(cost, student.double(), teacher.double(), Dense(), **options)
    close([x.double() for x in found], list(exact), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("price", [300.0, 1000.0])
def test_a_large_vocabulary_at_a_high_price_is_kl(price):
    """A few near pairs must not decide the costs between all other tokens."""
    embedding = points(8, 4000, 16).float()
    embedding[:300] = embedding[0] + 0.3 * embedding[:300]
    student, teacher = (x.float() for x in pair(8, vocab=4000))
    z = student.clone().requires_grad_()
    kl = otkd.KLLoss(reduction="none")(z, teacher)
    found = result(costs.EmbeddingCost(embedding), student, teacher, TopK(2), price=price)
    slope = torch.autograd.grad(kl.sum(), z)[0]
    assert (found[0] - kl).abs().max() < 0.02 * kl.max()
    assert (found[1] - slope).norm() < 0.02 * slope.norm()


@pytest.mark.parametrize(("price", "limit"), [(3.0, 0.1), (10.0, 0.1), (30.0, 0.15)])
def test_the_gradient_is_near_that_over_all_tokens(price, limit):
    """With one atom for the tail it would be off by 35, 74 and 71 %."""
    student, teacher = pair(6, positions=8, vocab=400, scale=1.5)
    centres = torch.arange(400) % 8
    cost = costs.EmbeddingCost(points(7, 8, 16)[centres] + 0.3 * points(8, 400, 16))
    _, exact = result(cost, student, teacher, Dense(), price=price)
    _, found = result(cost, student, teacher, TopK(32), price=price)
    assert (found - exact).norm() < limit * exact.norm()


def test_positions_that_do_not_count_may_hold_anything():
    student, teacher = pair(9, positions=4)
    cost = costs.EmbeddingCost(points(9, V, 3))
    loss = otkd.TransportKLLoss(cost, price=5.0, support=TopK(4))
    mask = torch.tensor([True, False, True, False])
    expected = loss(student[mask], teacher[mask])
    student[1], teacher[3] = torch.nan, torch.inf
    student.requires_grad_()
    value = loss(student, teacher, mask=mask)
    close(value, expected)
    value.backward()
    assert (student.grad[~mask] == 0).all()
    assert student.grad.isfinite().all()
    assert loss.last_report.converged
    assert loss(student, teacher, mask=torch.zeros_like(mask)).item() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_padding_tokens_and_low_precision(dtype):
    student, teacher = pair(10)
    for side in (student, teacher):
        side[:, -5:] = -torch.inf
    student[0, 3] = -torch.inf  # a token that only the teacher gives mass
    cost = costs.EmbeddingCost(points(10, V, 3))
    student, teacher = student.to(dtype), teacher.to(dtype)
    value, slope = result(cost, student, teacher, TopK(4), price=5.0)
    assert slope.dtype == dtype
    exact, exact_slope = result(cost, student.double(), teacher.double(), TopK(4), price=5.0)
    close(value.double(), exact, rtol=1e-4, atol=1e-5)
    close(slope.double(), exact_slope, rtol=2e-2, atol=1e-4)
    assert (slope[:, -5:] == 0).all()


@pytest.mark.parametrize("gap", [60.0, 150.0, 500.0, 1e4])
def test_float32_where_the_student_has_no_mass_for_a_token_of_the_tail(gap):
    """The teacher's 30 most probable tokens are alike, and the head has four."""
    student, teacher = pair(11, scale=0.5)
    student[:, :30] -= gap
    teacher[:, 30:] -= 20
    cost = costs.DiscreteCost()
    for price in (5.0, 300.0):
        found = result(cost, student.float(), teacher.float(), TopK(2), price=price)
        exact = result(cost, student, teacher, TopK(2), price=price)
        close([x.double() for x in found], list(exact), rtol=2e-3, atol=2e-3)
        distance = min(price, gap)  # the mass of every token comes from others, or is its own
        assert (exact[0] - distance).abs().max() < 5


@pytest.mark.parametrize("price", [300.0, 1000.0, 3000.0])
def test_the_price_of_moving_bounds_what_a_token_costs_where_float64_underflows(price):
    student = torch.tensor([[-1e4, 0.0, -1e4]], dtype=torch.float64)
    teacher = torch.tensor([[0.0, -30.0, -30.0]], dtype=torch.float64)
    value, slope = result(costs.DiscreteCost(), student, teacher, TopK(3), price=price)
    assert value.item() == pytest.approx(price, rel=0.01)
    assert slope.abs().max() < 1e-6
