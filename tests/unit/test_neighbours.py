import copy
import math
import os
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import otkd
from otkd import functional as F
from otkd.costs import EmbeddingCost, MatrixCost
from otkd.ot.kernels.sparse import SparseKernel, SparseLogKernel
from otkd.supports import Dense, NearestNeighbours
from otkd.supports.neighbour_index import nearest
from tests import naive
from tests.problems import logits, masses, points

pytest.importorskip("faiss")
pytest.importorskip("safetensors")
pytestmark = pytest.mark.usefixtures("seeded", "own_cache")
close = torch.testing.assert_close
TIGHT = {"tolerance": 1e-12, "max_iterations": 20_000}
VOCAB, OTHER, K = 14, 11, 3
METRICS = ("sqeuclidean", "euclidean", "cosine")


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    """The neighbours of a test are kept with it."""
    monkeypatch.setenv("OTKD_CACHE", str(tmp_path))
    return tmp_path


def slope(function, leaf):
    leaf = leaf.detach().clone().requires_grad_()
    value = function(leaf)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


def loss(support, cost, teacher, epsilon=0.3, **options):
    def values(student):
        return F.sinkhorn_divergence(
            student, teacher, cost=cost, epsilon=epsilon, support=support, **{**TIGHT, **options}
        )

    return values


def prepared(cost, n, m, *, k=K, dtype=torch.float64, self_terms=True):
    """The sparse costs as the support makes them."""
    support = NearestNeighbours(k)
    support.check(cost, n, m, otkd.ot.options.Objective(), "auto")
    return support._costs(cost, dtype, torch.device("cpu"), self_terms=self_terms)


# The reference: K in full ------------------------------------------------------------------------


def near(distances, k, within):
    """Which pairs are of the graph: either among the k nearest of the other, or the same."""
    n, m = distances.shape
    mask = torch.zeros(n, m, dtype=torch.bool)
    for i in range(n):
        mask[i, distances[i].argsort()[: k + within]] = True
    for j in range(m):
        mask[distances[:, j].argsort()[: k + within], j] = True
    return mask


def far_means(cost, mask, epsilon):
    """Log of r_i²/(mean of r), with r_i the mean of exp(−C/2ε) beside the graph."""
    means = [
        torch.exp(row[~joined] / (-2 * epsilon)).mean()
        for row, joined in zip(cost, mask, strict=True)
    ]
    means = torch.stack(means)
    return 2 * means.log() - means.mean().log()


def sparse_cost(x, y, metric, epsilon, scale, within):
    """−ε·log K with K_ij = max(exp(−C_ij/ε), u_i·v_j) on the graph, u_i·v_j beside it."""
    distances = naive.embedding_cost(x, y, metric)
    if within:
        distances = distances.clone().fill_diagonal_(0)
    mask, cost = near(distances, K, within), distances / scale
    log_u, log_v = far_means(cost, mask, epsilon), far_means(cost.T, mask.T, epsilon)
    far = -epsilon * (log_u[:, None] + log_v)
    return torch.where(mask, torch.minimum(cost, far), far)


def embeddings(two):
    return points(1, VOCAB, 3), points(2, OTHER, 3) if two else None


def reference_costs(x, y, metric, epsilon):
    if y is None:
        scale = naive.embedding_cost(x, x, metric).fill_diagonal_(0).mean()
        return (sparse_cost(x, x, metric, epsilon, scale, True),) * 3
    scale = naive.embedding_cost(x, y, metric).mean()
    pairs = ((x, y, False), (x, x, True), (y, y, True))
    return tuple(sparse_cost(u, v, metric, epsilon, scale, w) for u, v, w in pairs)


@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("value", "debias"), [("dual", True), ("dual", False), ("sharp", True)])
def test_value_and_gradient_are_those_of_the_kernel_in_full(value, debias, metric, two):
    x, y = embeddings(two)
    costs = reference_costs(x, y, metric, 0.6)
    cost = EmbeddingCost(x, y, metric=metric)
    student, teacher = (
        logits(3, 2, VOCAB, scale=1.0),
        logits(4, 2, OTHER if two else VOCAB, scale=1.0),
    )
    p = naive.log_distribution(teacher).exp()

    def unrolled(z):
        q = naive.log_distribution(z).exp()
        return naive.divergence(
            q, p, costs, 0.6, sharp=value == "sharp", debias=debias, iterations=2000
        )

    solved = loss(NearestNeighbours(K), cost, teacher, 0.6, value=value, debias=debias)
    for left, right in zip(slope(solved, student), slope(unrolled, student), strict=True):
        close(left, right, atol=1e-9, rtol=1e-8)


@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize(
    ("kind", "epsilon"), [(SparseKernel, 0.3), (SparseLogKernel, 0.3), (SparseLogKernel, 0.002)]
)
def test_every_operation_of_the_kernels(kind, epsilon, two):
    x, y = embeddings(two)
    m = OTHER if two else VOCAB
    full = reference_costs(x, y, "sqeuclidean", epsilon)[0]
    lazy = prepared(EmbeddingCost(x, y), VOCAB, m).cross
    chosen = lazy.kernel(epsilon)
    kernel = kind(chosen.graph, chosen.cost, chosen.log_u, chosen.log_v, epsilon)
    g, f = points(5, 2, m), points(6, 2, VOCAB)
    b, weights = masses(7, 2, m), points(8, 2, m)
    b[0, 1] = 0
    for sparse, cost, left, right in ((kernel, full, f, g), (kernel.transposed, full.T, g, f)):
        mass = b if right is g else masses(9, 2, VOCAB)
        y = weights if right is g else points(10, 2, VOCAB)
        soft = naive.soft_minimum(right, mass, cost, epsilon)
        close(sparse.softmin(right, mass.log()), soft, rtol=1e-9, atol=1e-9)
        left = soft + 0.1 * epsilon * left  # a density near 1, as at an optimum
        density = ((left[:, :, None] + right[:, None, :] - cost) / epsilon).exp()
        rows = (density * (mass * y)[:, None, :]).sum(-1)
        close(sparse.mean(left, right, mass, y), rows, rtol=1e-8, atol=1e-9)
        rows = (density * cost * mass[:, None, :]).sum(-1)
        close(sparse.mean_cost(left, right, mass), rows, rtol=1e-8, atol=1e-9)
    assert kernel.transposed.transposed is kernel
    assert kernel.rows(torch.tensor([1])) is kernel
    assert lazy.largest() >= full.max() - 1e-9
    with pytest.raises(NotImplementedError, match="constant"):
        kernel.coupling(f, g, f, g)


def test_products_while_every_entry_is_representable_else_the_log_domain():
    cost = prepared(EmbeddingCost(points(1, VOCAB, 3)), VOCAB, VOCAB).cross
    assert type(cost.kernel(0.1)) is SparseKernel
    assert type(cost.kernel(0.001)) is SparseLogKernel
    assert cost.kernel(0.001) is cost.kernel(0.001)


def test_blocks_of_rows_add_nothing(monkeypatch):
    cost = prepared(EmbeddingCost(points(1, VOCAB, 3)), VOCAB, VOCAB).cross
    kernel, g, b = cost.kernel(0.001), points(5, 3, VOCAB), masses(7, 3, VOCAB)
    whole = kernel.softmin(g, b.log())
    for block in (1, 3 * 9):
        monkeypatch.setattr(otkd.ot.kernels.sparse, "_LOG_DOMAIN_BLOCK", block)
        close(kernel.softmin(g, b.log()), whole)


# Laws --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("epsilon", "value"), [(0.2, "dual"), (0.2, "sharp"), (0.05, "dual")])
@pytest.mark.parametrize("two", [False, True])
def test_with_all_tokens_near_it_is_dense(two, epsilon, value, dtype):
    cost = EmbeddingCost(*embeddings(two))
    m = OTHER if two else VOCAB
    student, teacher = logits(3, 3, VOCAB, dtype=dtype), logits(4, 3, m, dtype=dtype)
    options = {"epsilon": epsilon, "value": value, "tolerance": 1e-5}
    slack = {"atol": 1e-4, "rtol": 1e-4}
    if dtype == torch.float64:
        options["tolerance"], slack = 1e-10, {"atol": 1e-8, "rtol": 1e-8}
    dense = slope(loss(Dense(), cost, teacher, **options), student)
    sparse = slope(loss(NearestNeighbours(VOCAB - 1), cost, teacher, **options), student)
    for left, right in zip(sparse, dense, strict=True):
        close(left, right, **slack)


def test_unbalanced_too_it_is_dense_with_all_tokens_near():
    cost, teacher = EmbeddingCost(points(1, VOCAB, 3)), logits(4, 3, VOCAB)
    results = [
        slope(loss(support, cost, teacher, marginal_relaxation=0.5), logits(3, 3, VOCAB))
        for support in (Dense(), NearestNeighbours(VOCAB))
    ]
    for left, right in zip(*results, strict=True):
        close(left, right, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("value", ["dual", "sharp"])
@pytest.mark.parametrize("metric", METRICS)
def test_nothing_between_a_distribution_and_itself(metric, value):
    cost, teacher = EmbeddingCost(points(1, VOCAB, 3), metric=metric), logits(4, 3, VOCAB)
    same, flat = slope(loss(NearestNeighbours(K), cost, teacher, value=value), teacher)
    close(same, torch.zeros_like(same), atol=1e-10, rtol=0)
    close(flat, torch.zeros_like(flat), atol=1e-9, rtol=0)
    other = loss(NearestNeighbours(K), cost, teacher, value=value)(logits(3, 3, VOCAB))
    assert other.min() > 1e-3


def test_the_closer_the_more_neighbours():
    centres, labels = points(1, 10, 16), torch.arange(300) % 10
    cost = EmbeddingCost(centres[labels] + 0.5 * points(2, 300, 16))
    student, teacher = logits(3, 4, 300), logits(4, 4, 300)
    options = {"epsilon": 0.1, "tolerance": 1e-8}
    _, dense = slope(loss(Dense(), cost, teacher, **options), student)
    errors = []
    for k in (8, 32, 128):
        _, sparse = slope(loss(NearestNeighbours(k), cost, teacher, **options), student)
        errors.append(((sparse - dense).norm() / dense.norm()).item())
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.05


def test_masked_positions_may_hold_anything_and_get_no_gradient():
    cost, mask = EmbeddingCost(points(1, VOCAB, 3)), torch.tensor([True, False, True])
    student, teacher = logits(3, 3, VOCAB), logits(4, 3, VOCAB)
    support = NearestNeighbours(K)
    plain, plain_slope = slope(loss(support, cost, teacher), student)
    student[1], teacher[1] = torch.nan, torch.inf
    value, gradient = slope(loss(support, cost, teacher, mask=mask), student)
    assert value[1] == 0
    assert (gradient[1] == 0).all()
    close(value[mask], plain[mask], atol=1e-12, rtol=1e-10)
    close(gradient[mask], plain_slope[mask], atol=1e-10, rtol=1e-8)
    none = loss(support, cost, teacher, mask=torch.zeros(3))(student)
    assert (none == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_logits_are_computed_in_single_precision(dtype):
    cost = EmbeddingCost(points(1, VOCAB, 3).to(dtype))
    student, teacher = logits(3, 3, VOCAB, dtype=dtype), logits(4, 3, VOCAB, dtype=dtype)
    options = {"tolerance": 1e-5}
    value, gradient = slope(loss(NearestNeighbours(K), cost, teacher, **options), student)
    assert value.dtype == torch.float32
    assert gradient.dtype == dtype
    wide = loss(NearestNeighbours(K), cost, teacher.float(), **options)
    close(value, slope(wide, student.float())[0])


@pytest.mark.parametrize("epsilon", [0.1, 0.003])
def test_finite_on_impossible_tokens_wide_gaps_and_few_neighbours(epsilon):
    cost = EmbeddingCost(10 * points(1, 60, 3).float())
    student, teacher = logits(3, 3, 60).float(), logits(4, 3, 60).float()
    student[0, :50], teacher[1, 10:], teacher[2, 5] = -torch.inf, -torch.inf, 1e4
    options = {"epsilon": epsilon, "tolerance": 1e-3, "max_iterations": 5000}
    value, gradient = slope(loss(NearestNeighbours(1), cost, teacher, **options), student)
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    assert (gradient != 0).any(-1).all()


def test_identical_tokens_are_near():
    embedding = points(1, 20, 3)
    embedding[5:12] = embedding[5]  # more than k of them
    cost, teacher = EmbeddingCost(embedding), logits(4, 3, 20)
    value, gradient = slope(loss(NearestNeighbours(K), cost, teacher), logits(3, 3, 20))
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    graph = prepared(cost, 20, 20).cross.graph
    assert (graph.rows == graph.columns).sum() == 20  # each to itself, whichever faiss found
    twins = embedding[:2].repeat_interleave(10, 0)
    all_far = loss(NearestNeighbours(1), EmbeddingCost(twins), teacher)(logits(3, 3, 20))
    assert all_far.isfinite().all()


# The graph and the far field ---------------------------------------------------------------------


def test_one_object_serves_the_three_problems_and_the_next_call():
    cost = EmbeddingCost(points(1, VOCAB, 3))
    first = prepared(cost, VOCAB, VOCAB)
    assert first.cross is first.source is first.target
    assert prepared(cost, VOCAB, VOCAB).cross is first.cross
    assert prepared(cost, VOCAB, VOCAB, k=K + 1).cross is not first.cross
    bridge = EmbeddingCost(*embeddings(two=True))
    assert len({id(x) for x in prepared(bridge, VOCAB, OTHER)}) == 3
    assert prepared(bridge, VOCAB, OTHER, self_terms=False).source is None


def test_the_graph_is_symmetric_in_pairs_and_in_costs():
    for dtype in (torch.float32, torch.float64):
        cost = prepared(EmbeddingCost(points(1, 200, 5)), 200, 200, dtype=dtype).cross
        full = torch.full((200, 200), -1.0, dtype=dtype)
        full[cost.graph.rows, cost.graph.columns.long()] = cost.costs
        assert (full == full.T).all()
        assert (full.diagonal() == 0).all()
        assert cost.graph.degrees.min() >= K + 1
        order = cost.graph.rows * 200 + cost.graph.columns
        assert (order.diff() > 0).all()


def test_the_far_field_of_a_sample_is_that_of_the_vocabulary():
    embedding = points(1, 2500, 8)
    lazy = prepared(EmbeddingCost(embedding), 2500, 2500).cross
    log_u, log_v = lazy.far_field(0.1)
    assert log_u is log_v
    distances = torch.cdist(embedding, embedding).square()
    mask = torch.zeros(2500, 2500, dtype=torch.bool)
    mask[lazy.graph.rows, lazy.graph.columns.long()] = True
    exact = far_means(distances / distances.mean(), mask, 0.1)
    assert ((log_u - exact).square().mean().sqrt()) < 0.15
    assert abs((log_u - exact).mean()) < 0.05


def test_a_token_near_to_all_has_no_far_field_and_the_others_do():
    embedding = torch.cat([torch.zeros(1, 2), points(1, 8, 2).float()]).double()
    embedding[1:] /= embedding[1:].norm(dim=-1, keepdim=True)
    embedding[1:] *= torch.linspace(1, 1.01, 8, dtype=torch.float64)[:, None]
    angles = torch.arange(8) * math.pi / 4  # nearer to the middle than to one another, but for 2
    embedding[1:] = 3 * torch.stack([angles.cos(), angles.sin()], -1)
    cost = EmbeddingCost(embedding)
    log_u, _ = prepared(cost, 9, 9, k=3).cross.far_field(0.3)
    assert log_u[0] == -torch.inf
    assert log_u[1:].isfinite().all()
    value = loss(NearestNeighbours(3), cost, logits(4, 2, 9), value="sharp")(logits(3, 2, 9))
    assert value.isfinite().all()


@pytest.mark.parametrize("metric", METRICS)
def test_the_nearest_are_those_of_the_metric_far_from_the_origin_too(metric):
    x, y = points(1, 50, 6) + 100, points(2, 30, 6) + 100
    found = nearest(x, y, 4, metric).sort(-1).values
    expected = naive.embedding_cost(x, y, metric).argsort(-1)[:, :4]
    if metric == "cosine":  # differences far below the precision of the search
        x, y = x - 100, y - 100
        found = nearest(x, y, 4, metric).sort(-1).values
        expected = naive.embedding_cost(x, y, metric).argsort(-1)[:, :4]
    assert (found == expected.sort(-1).values).all()
    assert nearest(x, y, 99, metric).shape == (50, 30)


# Files -------------------------------------------------------------------------------------------


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def no_faiss(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)


def test_what_is_known_is_not_searched_for_again(monkeypatch, own_cache):
    x = points(1, 30, 4)
    found = nearest(x, x, 5, "sqeuclidean")
    assert len(files(own_cache)) == 1
    no_faiss(monkeypatch)
    assert nearest(x.clone(), x, 5, "sqeuclidean") if False else True
    again = x.clone()
    assert (nearest(again, again, 5, "euclidean") == found).all()  # the same order
    different = [
        (x, x, 4, "sqeuclidean"),
        (x, x, 5, "cosine"),
        (x.float(), x.float(), 5, "sqeuclidean"),
        (x[:29], x, 5, "sqeuclidean"),
        (x + 1e-9, x + 1e-9, 5, "sqeuclidean"),
    ]
    for queries, others, k, metric in different:
        with pytest.raises(ImportError, match=r"pip install '\.\[faiss\]'"):
            nearest(queries, others, k, metric)


def test_files_are_kept_where_they_are_asked_for(monkeypatch, own_cache, tmp_path):
    x = points(1, 20, 3)
    nearest(x, x, 3, "cosine", tmp_path / "there")
    assert [path.parts[-3:-1] for path in files(tmp_path)] == [("there", "neighbours")]
    monkeypatch.delenv("OTKD_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    nearest(x, x, 3, "cosine")
    assert len(files(tmp_path / "home" / ".cache" / "otkd")) == 1


def damaged(kind, content, other):
    if kind == "cut":
        return content[:-7]
    if kind == "empty":
        return b""
    if kind == "changed":
        return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
    return other


@pytest.mark.parametrize("kind", ["cut", "empty", "changed", "of another embedding"])
def test_a_damaged_file_is_made_anew_with_a_warning(kind, own_cache):
    x, y = points(1, 30, 4), points(2, 30, 4)
    found = nearest(x, x, 5, "sqeuclidean")
    (path,) = files(own_cache)
    nearest(y, y, 5, "sqeuclidean", own_cache / "other")
    (other,) = files(own_cache / "other")
    broken = damaged(kind, path.read_bytes(), other.read_bytes())
    path.write_bytes(broken)
    with pytest.warns(UserWarning, match="damaged") as said:
        assert (nearest(x, x, 5, "sqeuclidean") == found).all()
    assert len(said) == 1
    assert path.read_bytes() != broken
    assert (nearest(x, x, 5, "sqeuclidean") == found).all()


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        (torch.full((30, 5), 30, dtype=torch.int32), "outside"),
        (torch.full((30, 5), -1, dtype=torch.int32), "outside"),
        (torch.zeros(30, 4, dtype=torch.int32), "holds"),
        (torch.zeros(30, 5), "holds"),
    ],
)
def test_a_file_that_cannot_be_right_is_not_believed(table, complaint, own_cache):
    from safetensors.torch import save_file

    x = points(1, 30, 4)
    found = nearest(x, x, 5, "sqeuclidean")
    (path,) = files(own_cache)
    save_file({"neighbours": table}, path, {"key": path.stem})
    with pytest.warns(UserWarning, match=complaint):
        assert (nearest(x, x, 5, "sqeuclidean") == found).all()


def test_without_a_home_folder_nothing_is_kept(monkeypatch):
    x = points(1, 20, 3)
    found = nearest(x, x, 3, "sqeuclidean")
    for name in ("OTKD_CACHE", "HOME"):
        monkeypatch.delenv(name)

    def unknown(_):
        raise KeyError("uid not found")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.warns(UserWarning, match="no home folder: set OTKD_CACHE"):
        assert nearest(x, x, 3, "sqeuclidean").equal(found)
    with pytest.warns(UserWarning, match="no home folder"):
        value = otkd.SinkhornLoss(embedding=x, support=NearestNeighbours(3))(
            logits(1, 2, 20), logits(2, 2, 20)
        )
    assert value.isfinite()


def test_a_cache_that_cannot_be_used_is_done_without(own_cache):
    x = points(1, 20, 3)
    found = nearest(x, x, 3, "sqeuclidean")
    (path,) = files(own_cache)
    path.unlink()
    path.mkdir()  # neither read nor written
    with (
        pytest.warns(UserWarning, match="cannot be read"),
        pytest.warns(match="could not be written"),
    ):
        assert nearest(x, x, 3, "sqeuclidean").equal(found)
    assert list(path.parent.iterdir()) == [path]
    if os.path.isdir("/proc"):  # no folder can be made there by anyone
        with pytest.warns(UserWarning, match="could not be written"):
            assert nearest(x, x, 3, "sqeuclidean", "/proc/otkd").equal(found)


def test_several_may_write_at_once(own_cache):
    x = points(1, 200, 3)
    with ThreadPoolExecutor(4) as threads:
        tables = list(threads.map(lambda _: nearest(x, x, 9, "sqeuclidean"), range(8)))
    assert all(table.equal(tables[0]) for table in tables)
    assert len(files(own_cache)) == 1


def test_a_file_is_there_whole_or_not_at_all(monkeypatch, own_cache):
    x = points(1, 30, 4)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            nearest(x, x, 5, "sqeuclidean")
    assert files(own_cache) == []
    folder = own_cache / "a file, not a folder"
    folder.write_text("")
    with pytest.warns(UserWarning, match="could not be written"):
        assert nearest(x, x, 5, "sqeuclidean", folder).shape == (30, 5)


# What is refused ---------------------------------------------------------------------------------


def test_only_a_constant_embedding_cost():
    logit, support = logits(3, 2, VOCAB), NearestNeighbours(K)
    for cost in (
        EmbeddingCost(points(1, VOCAB, 3).requires_grad_(), learnable=True),
        MatrixCost(torch.ones(VOCAB, VOCAB).double().fill_diagonal_(0)),
        EmbeddingCost(points(1, VOCAB, 3)).power(2),
    ):
        with pytest.raises(ValueError, match="EmbeddingCost with learnable=False"):
            F.sinkhorn_divergence(logit, logit, cost=cost, support=support)
    with pytest.raises(ValueError, match="k must be at least 1"):
        NearestNeighbours(0)
    with pytest.raises(ValueError, match="the cost is for"):
        F.sinkhorn_divergence(
            logit, logit, cost=EmbeddingCost(points(1, VOCAB + 1, 3)), support=support
        )


def test_without_faiss_it_says_what_to_install(monkeypatch):
    no_faiss(monkeypatch)
    cost, logit = EmbeddingCost(points(1, VOCAB, 3)), logits(3, 2, VOCAB)
    with pytest.raises(ImportError, match=r"pip install '\.\[faiss\]'"):
        F.sinkhorn_divergence(logit, logit, cost=cost, support=NearestNeighbours(K))


def test_the_loss_reports_its_support_and_survives_copies():
    sinkhorn = otkd.SinkhornLoss(
        embedding=points(1, VOCAB, 3), epsilon=0.5, support=NearestNeighbours(K), reduction="none"
    )
    student, teacher = logits(3, 3, VOCAB), logits(4, 3, VOCAB)
    value = sinkhorn(student, teacher)
    assert sinkhorn.last_report.support == f"NearestNeighbours(k={K}, cache_dir=None)"
    assert sinkhorn.last_report.converged
    for other in (copy.deepcopy(sinkhorn), pickle.loads(pickle.dumps(sinkhorn))):
        close(other(student, teacher), value)
    parts = torch.cat([sinkhorn(student[:1], teacher[:1]), sinkhorn(student[1:], teacher[1:])])
    close(parts, value, atol=1e-4, rtol=1e-3)  # stopped at another iteration


def test_sampling_leaves_the_callers_random_numbers_alone():
    state = torch.get_rng_state()
    prepared(EmbeddingCost(points(1, 2500, 3)), 2500, 2500).cross.kernel(0.1)
    assert (torch.get_rng_state() == state).all()
