"""Costs between two vocabularies: by prefixes, by an embedding whose ridge is chosen, and sums."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import otkd
from otkd.alignment import align_embeddings, aligned_cost, fit_map, prefix_cost
from otkd.alignment.maps import RIDGES
from otkd.alignment.pieces import vocabulary_of
from otkd.costs import DiscreteCost, EmbeddingCost, MatrixCost, OrdinalCost, PrefixCost, SumCost
from otkd.supports import Dense, TopK
from tests.problems import logits, points, seeds

pytestmark = pytest.mark.usefixtures("seeded")
close = torch.testing.assert_close
F64 = {"dtype": torch.float64, "device": torch.device("cpu")}

texts = st.lists(
    st.one_of(
        st.binary(min_size=1, max_size=4).map(
            lambda raw: bytes(b"ab\xff"[byte % 3] for byte in raw)
        ),
        st.sampled_from(["eos", "eosx", "", None, b""]),
    ),
    min_size=1,
    max_size=9,
)


def near(x, y, *, itself=False):
    """Whether two tokens are near, by definition."""
    if itself:
        return True
    if isinstance(x, bytes) and isinstance(y, bytes) and x and y:
        return x.startswith(y) or y.startswith(x)
    return isinstance(x, str) and x == y


def naive_matrix(rows, columns, *, within):
    return torch.tensor(
        [
            [float(not near(x, y, itself=within and i == j)) for j, y in enumerate(columns)]
            for i, x in enumerate(rows)
        ],
        dtype=torch.float64,
    )


@given(source=texts, target=texts, two=st.booleans())
def test_prefix_cost_is_its_definition(source, target, two):
    cost = PrefixCost(source, target if two else None)
    sides = {"source": source, "target": target if two else source}
    sizes = {side: len(tokens) for side, tokens in sides.items()}
    matrices = cost.matrices(sizes["source"], sizes["target"], **F64, self_terms=True)
    pairs = [("source", "target"), ("source", "source"), ("target", "target")]
    for (first, second), matrix in zip(pairs, matrices, strict=True):
        within = first == second or not two
        expected = naive_matrix(sides[first], sides[second], within=within)
        assert torch.equal(matrix, expected)
        for names, reference in (((first, second), expected), ((second, first), expected.mT)):
            x, y = (torch.arange(sizes[name]).flip(0).expand(2, -1) for name in names)
            found = cost.between(x, y, names, torch.float64)
            assert torch.equal(found, reference.flip(0, 1).expand_as(found))
            mean = cost.mean_to_all(x, names, torch.float64)
            close(mean, reference.mean(1).flip(0).expand_as(mean))
    assert cost.one_vocabulary != two
    assert cost.power(2) is cost
    assert cost.largest(1, 1) == 1


def test_prefix_costs_of_two_tokenizers():
    pytest.importorskip("tokenizers")
    from tests.small_tokenizers import tokenizer_of

    one, other = tokenizer_of("byte-level"), tokenizer_of("wordpiece")
    matrix = prefix_cost(one, other)(len(one), len(other))
    student, teacher = (vocabulary_of(tokenizer).raw for tokenizer in (one, other))
    for i in range(len(one)):
        for j in range(len(other)):
            if i in student and j in teacher:
                assert (matrix[i, j] == 0) == near(student[i], teacher[j])
    own = prefix_cost(one, one)(len(one), len(one))
    assert own.diagonal().abs().max() == 0
    assert own[one.eos_token_id].sum() == len(one) - 1
    same_roles = prefix_cost(other, other)
    assert same_roles(len(other), len(other))[other.cls_token_id].sum() == len(other) - 1


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [([], ValueError, "must have a token"), ([b"a", 3], TypeError, "token 1 of the source .* int")],
)
def test_wrong_tokens(source, error, message):
    with pytest.raises(error, match=message):
        PrefixCost(source)


# Sums --------------------------------------------------------------------------------------------


def bridge(seed=0):
    """An embedding and a prefix cost between 6 and 8 tokens, and the matrices of both."""
    x, y = points(seed, 6, 3), points(seed + 1, 8, 3)
    source = [b"a", b"ab", b"abc", b"b", "eos", None]
    target = [b"a", b"abcd", b"ba", b"c", "eos", "pad", b"ab", b"d"]
    return EmbeddingCost(x, y), PrefixCost(source, target)


def test_a_sum_is_a_sum():
    parts = bridge()
    both = SumCost(parts, [0.5, 2.0])
    for own in (False, True):
        terms = [cost.matrices(6, 8, **F64, self_terms=own) for cost in parts]
        found = both.matrices(6, 8, **F64, self_terms=own)
        for matrix, *of_parts in zip(found, *terms, strict=True):
            if of_parts[0] is None:
                assert matrix is None
            else:
                close(matrix, 0.5 * of_parts[0] + 2 * of_parts[1])
    matrix = both.matrices(6, 8, **F64, self_terms=False).cross
    x, y = torch.arange(6).unsqueeze(0), torch.arange(8).unsqueeze(0)
    close(both.between(x, y, ("source", "target"), torch.float64).squeeze(0), matrix)
    close(both.mean_to_all(x, ("source", "target"), torch.float64).squeeze(0), matrix.mean(1))
    assert both.shape == (6, 8)
    assert both.bridges_vocabularies
    assert not both.one_vocabulary
    assert both.largest(6, 8) >= matrix.max()
    euclidean = EmbeddingCost(points(0, 6, 3), points(1, 8, 3), metric="euclidean")
    sampled = SumCost([euclidean, parts[1]])
    assert sampled.mean_to_all(x, ("source", "target"), torch.float64) is None


def test_what_is_known_of_a_sum_is_known_of_its_costs():
    positive, other = EmbeddingCost(points(0, 5, 2)), MatrixCost(points(1, 5, 5).abs())
    assert SumCost([positive, DiscreteCost()]).keeps_divergence_positive(0.1)
    assert not SumCost([positive, OrdinalCost(3)]).keeps_divergence_positive(0.1)
    assert SumCost([positive, OrdinalCost(1)]).one_vocabulary
    # Positive definite for small ε only: at .475 with the weight 1, not with .05.
    far = MatrixCost(torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 5.0], [1.0, 5.0, 0.0]]))
    for weight, known in ((1.0, True), (0.05, False)):
        assert SumCost([far], [weight]).keeps_divergence_positive(0.475) == known
    with pytest.raises(ValueError, match="self-cost must be 0 on its"):
        SumCost([positive, other]).check_within()
    weight = torch.nn.Parameter(points(2, 5, 2))
    learnable = SumCost([EmbeddingCost(weight, learnable=True), DiscreteCost()])
    assert learnable.learns
    assert list(learnable.parameters()) == [weight]
    learnable(5, 5).sum().backward()
    assert weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda: [[]], ValueError, "at least one cost"),
        (lambda: [[3]], TypeError, "needs costs of otkd.costs, got int"),
        (lambda: [bridge(), [1]], ValueError, "2 costs, but 1 weights"),
        (lambda: [bridge(), [1, 0]], ValueError, "a weight of SumCost must be"),
        (lambda: [[*bridge(), DiscreteCost()]], ValueError, "between the same tokens"),
        (
            lambda: [[MatrixCost(torch.ones(2, 2)), MatrixCost(torch.ones(3, 3))]],
            ValueError,
            "between the same tokens",
        ),
    ],
)
def test_wrong_sums(arguments, error, message):
    with pytest.raises(error, match=message):
        SumCost(*arguments())


# Losses with these costs -------------------------------------------------------------------------

COSTS = {
    "prefix": lambda: bridge()[1],
    "sum": lambda: SumCost(bridge(), [1.0, 0.5]),
}
LOSSES = {
    "sinkhorn": lambda cost, support: otkd.SinkhornLoss(cost, debias=None, support=support),
    "transport_kl": lambda cost, support: otkd.TransportKLLoss(cost, price=5.0, support=support),
}


@pytest.mark.parametrize("support", [Dense(), TopK(3)], ids=repr)
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_between_two_vocabularies(loss, cost, support):
    made = COSTS[cost]()
    matrix = MatrixCost(made.matrices(6, 8, **F64, self_terms=False).cross)
    student, teacher = logits(1, 3, 6), logits(2, 3, 8)
    results = []
    for each in (made, matrix):
        leaf = student.clone().requires_grad_()
        value = LOSSES[loss](each, support)(leaf, teacher)
        value.backward()
        results.append((value.detach(), leaf.grad))
        assert leaf.grad.abs().max() > 0
    close(*results)
    stored = otkd.TopKTeacher.from_logits(teacher, 3)
    if support == TopK(3):
        assert LOSSES[loss](made, support)(student, stored).isfinite()
    module = LOSSES[loss](made, support).half()
    assert module(student.half(), teacher.half()).isfinite()


@pytest.mark.parametrize("kind", ["logits", "stored", "learnable"])
def test_an_improbable_token_that_the_teacher_wants_is_taught(kind):
    """Its gradient is that over all tokens; as a part of the tail it would have none of its own."""
    rows = points(0, 90, 24)
    cost = EmbeddingCost(rows[:70], rows, normalize="mean")
    support = TopK(5)
    if kind == "learnable":
        leaf = torch.nn.Parameter(rows[:70].clone())
        cost = EmbeddingCost(leaf, rows, learnable=True)
    student, teacher = logits(1, 2, 70), logits(2, 2, 90)
    student[:, 33] = -9.0
    teacher[:, 33] = 14.0
    given_teacher = teacher
    if kind == "stored":
        given_teacher = otkd.TopKTeacher.from_logits(teacher, 5)
    gradients = []
    for each, source in ((support, given_teacher), (Dense(), teacher)):
        z = student.clone().requires_grad_()
        loss = otkd.TransportKLLoss(cost, price=100.0, support=each, reduction="sum")
        loss(z, source).backward()
        gradients.append(z.grad[:, 33])
    assert gradients[1].max() < -0.9
    close(*gradients, rtol=0.02, atol=0.0)


@pytest.mark.parametrize("strings", [False, True])
@pytest.mark.parametrize("loss", ["sinkhorn", "transport_kl"])
def test_identical_tokenizers_and_embeddings_are_one_vocabulary(loss, strings):
    pytest.importorskip("tokenizers")
    from tests.small_tokenizers import tokenizer_of

    tokenizer = tokenizer_of("wordpiece")
    size = len(tokenizer)
    embedding = points(1, size, 6)
    one, two = EmbeddingCost(embedding), aligned_cost(embedding, embedding, tokenizer, tokenizer)
    if strings:
        raw = vocabulary_of(tokenizer).raw
        own = PrefixCost([raw.get(token, f"special {token}") for token in range(size)])
        one, two = SumCost([one, own]), SumCost([two, prefix_cost(tokenizer, tokenizer)])
    options = {"support": Dense(), "tolerance": 1e-9, "max_iterations": 5000}
    if loss == "transport_kl":
        # Between two vocabularies it is never debiased.
        options |= {"debias": None, "smoothing": 0.3, "price": 5.0}
    elif strings:
        options |= {"debias": None}
    student, teacher = logits(1, 2, size), logits(2, 2, size)
    results = []
    for cost in (one, two):
        leaf = student.clone().requires_grad_()
        value = otkd.get_loss(loss, cost=cost, **options)(leaf, teacher)
        value.backward()
        results.append((value.detach(), leaf.grad))
    close(*results, rtol=1e-5, atol=1e-5)


def test_debiasing_with_prefixes_warns():
    with pytest.warns(UserWarning, match="not known to be positive definite"):
        otkd.SinkhornLoss(bridge()[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        otkd.SinkhornLoss(bridge()[1], debias=None)


# The map of embeddings ---------------------------------------------------------------------------


@given(seed=seeds, noise=st.sampled_from([0.01, 1.0, 30.0]))
def test_the_ridge_is_chosen_by_leaving_out_one_anchor(seed, noise):
    source = points(seed, 14, 5) * torch.tensor([9.0, 3, 1, 0.3, 0.1]) + 2
    target = source @ points(seed + 1, 5, 4) + noise * points(seed + 2, 14, 4)
    chosen = fit_map(source, target, method="least_squares", ridge="loo")
    spread = (source - source.mean(0)).square().sum(0).mean()
    errors = []
    for ridge in RIDGES:
        missed = 0.0
        for left_out in range(14):
            kept = [i for i in range(14) if i != left_out]
            x, y = source[kept], target[kept]
            dx, dy = x - x.mean(0), y - y.mean(0)
            weight = torch.linalg.solve(
                dx.T @ dx + ridge * spread * torch.eye(5).double(), dx.T @ dy
            )
            guess = (source[left_out] - x.mean(0)) @ weight + y.mean(0)
            missed += (guess - target[left_out]).square().sum().item()
        errors.append(missed)
    best = RIDGES[errors.index(min(errors))]
    expected = fit_map(source, target, method="least_squares", ridge=best)
    close(chosen.weight, expected.weight)


def test_the_ridge_grows_with_the_noise():
    source = points(1, 60, 20)
    image = source @ points(2, 20, 10)
    sizes = [
        fit_map(source, image + noise * points(3, 60, 10), method="least_squares", ridge="loo")
        .weight.norm()
        .item()
        / fit_map(source, image + noise * points(3, 60, 10), method="least_squares", ridge=1e-6)
        .weight.norm()
        .item()
        for noise in (0.0, 30.0)
    ]
    assert sizes[0] == pytest.approx(1, abs=1e-3)
    assert sizes[1] < 0.8
    with pytest.raises(ValueError, match="ridge must be one of 'loo'"):
        fit_map(source, image, method="least_squares", ridge="gcv")


def test_mutual_neighbours_become_anchors():
    pytest.importorskip("faiss")
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    teacher = points(1, 80, 6).float()
    rotation = torch.linalg.qr(points(2, 6, 6))[0].float()
    student = (teacher @ rotation.T)[order] + 0.05 * points(3, 80, 6).float()
    ids = torch.arange(8)
    anchors = (ids, order[ids])
    once, first = align_embeddings(student, teacher, anchors=anchors)
    refined, second = align_embeddings(student, teacher, anchors=anchors, refine=2)
    assert first.anchors == 8
    assert second.anchors > 60
    every = torch.arange(80)
    best, third = align_embeddings(student, teacher, anchors=(every, order), refine=1)
    assert third.anchors == 80
    errors = [(mapped - teacher[order]).norm() for mapped in (once, refined, best)]
    assert errors[1] < 0.9 * errors[0]
    assert errors[1] < 1.1 * errors[2]
    with pytest.raises(ValueError, match="refine must be at least 0"):
        align_embeddings(student, teacher, anchors=anchors, refine=-1)
