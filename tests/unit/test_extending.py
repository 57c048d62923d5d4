"""The code of CONTRIBUTING.md runs as it is written; each extension obeys the laws of its kind."""

import re
from pathlib import Path
from types import SimpleNamespace

import ot
import pytest
import torch

import otkd
from otkd.losses.registry import LOSSES
from otkd.supports import Dense, TopK
from tests.problems import logits
from tests.unit import test_divergences as divergence_laws
from tests.unit import test_every_loss as loss_laws
from tests.unit import test_stored_laws as stored_laws

pytestmark = pytest.mark.usefixtures("seeded")
close = torch.testing.assert_close


@pytest.fixture(scope="module")
def shown():
    """What the code of CONTRIBUTING.md defines. Other tests do not see the loss it registers."""
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    names = {"__name__": "contributing"}
    before = dict(LOSSES)
    exec("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)), names)
    yield SimpleNamespace(**names)
    LOSSES.clear()
    LOSSES.update(before)


# A divergence ------------------------------------------------------------------------------------


@pytest.fixture
def triangular(monkeypatch, shown):
    """Its name in the registry and in the tables that the laws read."""
    name, loss = "triangular", shown.TriangularLoss

    def values(student, teacher, **settings):
        return loss(reduction="none", rescale_t2=False, **settings)(student, teacher)

    def reference(log_q, log_p):
        q, p = log_q.exp(), log_p.exp()
        return ((q - p).square() / (q + p)).sum(-1)

    monkeypatch.setitem(divergence_laws.CASES, name, (values, reference, {}))
    monkeypatch.setitem(loss_laws.BUILDERS, name, loss_laws.of(loss))
    monkeypatch.setitem(stored_laws.LOSSES, name, loss)
    return name


def test_a_divergence_is_registered(triangular, shown):
    assert triangular in otkd.list_losses()
    assert isinstance(otkd.get_loss(triangular, temperature=2), shown.TriangularLoss)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_divergence_obeys_the_laws_of_divergences(triangular, dtype):
    divergence_laws.test_value_and_gradient_are_those_of_the_formula(triangular, dtype)
    divergence_laws.test_zero_with_a_zero_gradient_at_equality(triangular, dtype)
    divergence_laws.test_finite_on_minus_infinity_and_on_huge_gaps(triangular, dtype)
    loss_laws.test_extreme_calls_are_finite(triangular, dtype)
    loss_laws.test_nothing_counted_is_zero(triangular, dtype)
    loss_laws.test_layout_and_mode_do_not_matter(triangular, dtype)


def test_a_divergence_obeys_the_laws_of_every_call(triangular):
    for seed in range(5):
        law = divergence_laws.test_shift_permutation_and_sign.hypothesis.inner_test
        law(seed, triangular)
    divergence_laws.test_gradcheck(triangular)
    loss_laws.test_pairs_of_the_product(triangular, torch.float32)
    loss_laws.test_gradients_of_float16_survive_until_a_scaler_lifts_them(triangular)
    stored_laws.test_zero_and_flat_where_student_and_teacher_are_the_same(triangular)
    stored_laws.test_value_and_gradient_are_those_of_the_distributions_over_atoms(triangular, 2.0)


# A cost ------------------------------------------------------------------------------------------


def test_a_cost_is_that_of_exact_transport(shown):
    student, teacher = logits(1, 3, 12), logits(2, 3, 12)
    cost = shown.CircularCost(12)
    matrix = cost(12, 12).double()
    assert matrix[0, 11] == 1
    values = otkd.WassersteinLoss(cost, reduction="none")(student, teacher)
    pairs = zip(student.softmax(-1).numpy(), teacher.softmax(-1).numpy(), strict=True)
    expected = [ot.emd2(q, p, matrix.numpy()) for q, p in pairs]
    close(values, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("support", [Dense(), TopK(2)])
def test_a_cost_obeys_the_laws_of_every_loss(monkeypatch, shown, support):
    def build(vocab, **options):
        settings = {**loss_laws.SOLVER, "support": support, **options}
        return otkd.SinkhornLoss(shown.CircularCost(vocab), **settings)

    name = f"circular-{support}"
    monkeypatch.setitem(loss_laws.BUILDERS, name, build)
    loss_laws.test_pairs_of_the_product(name, torch.float32)
    loss_laws.test_extreme_calls_are_finite(name, torch.float32)
    loss_laws.test_nothing_counted_is_zero(name, torch.float32)


def test_a_cost_refuses_another_vocabulary(shown):
    with pytest.raises(ValueError, match="12 source and 12 target tokens"):
        otkd.SinkhornLoss(shown.CircularCost(12))(logits(1, 3, 9), logits(2, 3, 9))


# A support ---------------------------------------------------------------------------------------


def test_a_support_is_dense_transport_over_its_tokens(shown):
    student, teacher = logits(1, 2, 3, 9), logits(2, 2, 3, 9)
    tokens, matrix = [3, 5, 8], shown.CircularCost(9)(9, 9).double()
    for options in ({}, {"debias": False}, {"value": "sharp"}, {"temperature": 2.0}):
        options = {"reduction": "none", "tolerance": 1e-9, "max_iterations": 1000, **options}
        loss = otkd.SinkhornLoss(matrix, support=shown.GivenTokens(tokens), **options)
        alone = otkd.SinkhornLoss(matrix[tokens][:, tokens], support=Dense(), **options)
        value, gradient = stored_laws.value_and_gradient(loss, student, teacher)
        expected = stored_laws.value_and_gradient(alone, student[..., tokens], teacher[..., tokens])
        close(value, expected[0])
        close(gradient[..., tokens], expected[1])
        assert gradient[..., [0, 1, 2, 4, 6, 7]].eq(0).all()
    assert loss.last_report.support == "GivenTokens"
    moves = loss.explain(student[0, 0], teacher[0, 0]).moves
    assert {token for move in moves for token in move[:2]} == set(tokens)


def test_a_support_obeys_the_laws_of_every_loss(monkeypatch, shown):
    def build(vocab, **options):
        support = shown.GivenTokens(range(0, vocab, 2))
        return otkd.SinkhornLoss("ordinal", support=support, **{**loss_laws.SOLVER, **options})

    monkeypatch.setitem(loss_laws.BUILDERS, "given tokens", build)
    loss_laws.test_pairs_of_the_product("given tokens", torch.float32)
    loss_laws.test_nothing_counted_is_zero("given tokens", torch.float32)
    loss_laws.test_layout_and_mode_do_not_matter("given tokens", torch.float32)
