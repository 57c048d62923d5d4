"""The exact optima of toy problems in the literature, found through the losses.

Gu et al. (2024), "MiniLLM", figure 2; Wu et al. (2025), "Rethinking Kullback-Leibler Divergence in
Knowledge Distillation for Large Language Models", figure 2; Wen et al. (2023), "f-Divergence
Minimization for Sequence-Level Knowledge Distillation", figure 1.
"""

import math

import pytest
import torch

import otkd
from otkd import costs
from tests.problems import logits

pytestmark = pytest.mark.usefixtures("seeded")
close = torch.testing.assert_close

GRID = torch.linspace(-12, 14, 5201, dtype=torch.float64)


def log_normal(mean, deviation, x=GRID):
    return -(((x - mean) / deviation) ** 2) / 2 - torch.as_tensor(deviation).log()


def mixture(*components):
    """log Σ w·N(μ, σ²) of components (w, μ, σ), up to a constant."""
    parts = [log_normal(mean, deviation) + math.log(w) for w, mean, deviation in components]
    return torch.stack(parts).logsumexp(0)


MINILLM = mixture((0.5, -2.0, 0.6), (0.5, 2.0, 0.6))
TWO_MODES = mixture((0.8, 1.0, 0.5), (0.2, 5.0, 0.4))


def fit(loss, teacher, mean, deviation, fixed_mean=False):
    """μ, σ and the value where the loss of one Gaussian is smallest, from a start."""
    mean = torch.tensor(mean, dtype=torch.float64, requires_grad=not fixed_mean)
    log_deviation = torch.tensor(math.log(deviation), dtype=torch.float64, requires_grad=True)
    free = [log_deviation] if fixed_mean else [mean, log_deviation]
    optimiser = torch.optim.LBFGS(
        free, max_iter=300, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        value = loss(log_normal(mean, log_deviation.exp()), teacher)
        value.backward()
        return value

    optimiser.step(closure)
    return mean.item(), log_deviation.exp().item(), closure().item()


# One Gaussian for two modes ----------------------------------------------------------------------


@pytest.mark.parametrize("start", [(0.0, 1.0), (1.0, 0.7), (-2.5, 3.0)])
def test_kl_covers_both_modes(start):
    mean, deviation, _ = fit(otkd.KLLoss(), MINILLM, *start)
    assert mean == pytest.approx(0, abs=1e-4)
    assert deviation == pytest.approx(2.088, abs=5e-4)


@pytest.mark.parametrize(("start", "mode"), [((1.0, 1.0), 1.997), ((-1.0, 1.0), -1.997)])
def test_reverse_kl_seeks_one_mode(start, mode):
    mean, deviation, _ = fit(otkd.ReverseKLLoss(), MINILLM, *start)
    assert mean == pytest.approx(mode, abs=1e-3)
    assert deviation == pytest.approx(0.605, abs=5e-4)


def test_reverse_kl_is_stationary_between_the_modes():
    loss = otkd.ReverseKLLoss()
    _, deviation, value = fit(loss, MINILLM, 0.0, 1.0, fixed_mean=True)
    assert deviation == pytest.approx(1.790, abs=5e-4)
    parameters = torch.tensor([0.0, math.log(deviation)], dtype=torch.float64, requires_grad=True)
    loss(log_normal(parameters[0], parameters[1].exp()), MINILLM).backward()
    assert parameters.grad.abs().max() < 1e-6
    assert value > fit(loss, MINILLM, 1.0, 1.0)[2] + 0.1


def test_kl_averages_the_modes():
    mean, deviation, _ = fit(otkd.KLLoss(), TWO_MODES, 0.0, 1.0)
    assert mean == pytest.approx(1.800, abs=5e-4)
    assert deviation == pytest.approx(1.671, abs=5e-4)


def test_total_variation_takes_the_larger_mode():
    loss = otkd.TVDLoss()
    mean, deviation, value = fit(loss, TWO_MODES, 1.8, 1.671)
    assert value == pytest.approx(0.199947, abs=2e-5)
    assert abs(mean - 1) < 0.1
    published = loss(log_normal(1.051, 0.619), TWO_MODES).item()
    assert published == pytest.approx(0.199947, abs=1e-6)
    assert loss(log_normal(1.0, 0.5), TWO_MODES).item() == pytest.approx(0.199998, abs=1e-6)
    assert deviation < 1


@pytest.mark.parametrize(("start", "mode"), [((0.5, 0.5), (1.0, 0.5)), ((5.5, 0.5), (5.0, 0.4))])
def test_reverse_kl_ends_in_the_mode_it_starts_near(start, mode):
    mean, deviation, _ = fit(otkd.ReverseKLLoss(), TWO_MODES, *start)
    assert mean == pytest.approx(mode[0], abs=2e-2)
    assert deviation == pytest.approx(mode[1], abs=2e-2)


# Free logits -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_hundred_runs():
    """Distributions over 50 points by Adam, for 200 seeds at once: (teacher, {loss: states})."""
    draws = torch.rand(2, 200, 50, generator=torch.Generator().manual_seed(0))
    teacher, start = draws
    states = {}
    for name in ("kl", "rkl", "akl"):
        student = start.clone().requires_grad_()
        loss = otkd.get_loss(name, reduction="sum")
        optimiser = torch.optim.Adam([student], lr=0.1)
        states[name] = {}
        for step in range(1, 201):
            optimiser.zero_grad()
            loss(student, teacher).backward()
            optimiser.step()
            states[name][step] = student.detach().softmax(-1)
    return teacher.softmax(-1), states


def l1(x, y):
    return (x - y).abs().sum(-1)


def test_kl_and_reverse_kl_differ_after_one_step(two_hundred_runs):
    _, states = two_hundred_runs
    gap = l1(states["kl"][1], states["rkl"][1])
    assert gap.median().item() == pytest.approx(0.029, abs=3e-3)
    adaptive = states["akl"][1]
    for name in ("kl", "rkl"):
        assert l1(adaptive, states[name][1]).median() > 0


@pytest.mark.parametrize("name", ["kl", "rkl", "akl"])
def test_all_reach_the_teacher_after_two_hundred_steps(two_hundred_runs, name):
    teacher, states = two_hundred_runs
    assert l1(states[name][200], teacher).max() <= 1e-5
    assert l1(states[name][1], teacher).min() > 1e-2


# Gradient coefficients ---------------------------------------------------------------------------


def through_the_softmax(q, slope):
    """The gradient in the logits of what has the gradient ``slope`` in the probabilities."""
    return q * (slope - (q * slope).sum(-1, keepdim=True))


COEFFICIENTS = {
    "kl": (otkd.KLLoss, lambda p, q: -1 / q),
    "tvd": (otkd.TVDLoss, lambda p, q: torch.where(q < p, -1 / p, 0.0)),
    "skl": (otkd.SkewKLLoss, lambda p, q: -(1 - 0.1) / (0.1 * p + (1 - 0.1) * q)),
}


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_gradient_coefficients(name):
    """(∂D/∂q)/p, up to a constant along Σq = 1, which the logits do not see."""
    build, coefficient = COEFFICIENTS[name]
    student, teacher = logits(1, 6, 9).requires_grad_(), logits(2, 6, 9)
    build(reduction="sum")(student, teacher).backward()
    q, p = student.detach().softmax(-1), teacher.softmax(-1)
    close(student.grad, through_the_softmax(q, p * coefficient(p, q)), rtol=1e-10, atol=1e-13)


# Disjoint supports -------------------------------------------------------------------------------


def transports():
    places = torch.linspace(0, 1, 201, dtype=torch.float64).unsqueeze(-1)
    options = {"tolerance": 1e-6, "max_iterations": 5000}
    cost = costs.EmbeddingCost(places)
    return {
        "sinkhorn": otkd.SinkhornLoss(cost, **options),
        "wasserstein": otkd.WassersteinLoss("ordinal"),
    }


def test_moving_a_distribution_towards_a_disjoint_one():
    """JS stays at log 2 with a vanishing gradient; transport falls with the distance."""
    x = torch.linspace(0, 1, 201, dtype=torch.float64)
    teacher = log_normal(0.9, 0.01, x)
    for start in (0.1, 0.3, 0.6):
        slopes = {}
        for name, loss in {"jsd": otkd.JSDLoss(), **transports()}.items():
            mean = torch.tensor(start, dtype=torch.float64, requires_grad=True)
            value = loss(log_normal(mean, 0.01, x), teacher)
            (slopes[name],) = torch.autograd.grad(value, mean)
            if name == "jsd":
                assert value.item() == pytest.approx(math.log(2), abs=1e-9)
            if name == "wasserstein":
                assert value.item() == pytest.approx(200 * (0.9 - start), rel=1e-3)
        assert abs(slopes["jsd"].item()) < 1e-9
        assert slopes["wasserstein"].item() == pytest.approx(-200, rel=1e-3)
        assert slopes["sinkhorn"].item() < -1


def test_logits_of_disjoint_supports():
    """Two student tokens at different distances: transport prefers the nearer."""
    student = torch.full((5,), -math.inf, dtype=torch.float64)
    student[:2] = 0.0
    teacher = torch.full((5,), -math.inf, dtype=torch.float64)
    teacher[4] = 0.0
    student.requires_grad_()
    places = torch.arange(5, dtype=torch.float64).unsqueeze(-1)
    losses = {
        "jsd": otkd.JSDLoss(),
        "wasserstein": otkd.WassersteinLoss("ordinal"),
        "sinkhorn": otkd.SinkhornLoss(costs.EmbeddingCost(places), tolerance=1e-8),
    }
    for name, loss in losses.items():
        value = loss(student, teacher)
        (gradient,) = torch.autograd.grad(value, student)
        assert gradient.isfinite().all()
        if name == "jsd":
            assert value.item() == pytest.approx(math.log(2), abs=1e-12)
            assert gradient.abs().max() < 1e-12
        else:
            assert gradient[1] < -0.1
            assert gradient[0] == pytest.approx(-gradient[1].item())
    one = student.detach().clone()
    one[1] = -math.inf
    one.requires_grad_()  # a single token has nowhere to send its mass
    (gradient,) = torch.autograd.grad(losses["wasserstein"](one, teacher), one)
    assert gradient.abs().max() < 1e-12
