"""Defaults a user can rely on, and settings that contradict one another or would do nothing."""

import pickle

import pytest
import torch
from torch import nn

import otkd
from otkd.losses.sinkd import SoftCrossEntropyLoss, UnrolledBatchSinkhornLoss
from otkd.supports import TopK
from tests.problems import logits, points

pytestmark = pytest.mark.usefixtures("seeded")
close = torch.testing.assert_close
VOCAB = 5


def value_and_gradient(loss, student, teacher, **options):
    leaf = student.clone().requires_grad_()
    value = loss(leaf, teacher, **options)
    value.backward()
    return value.detach(), leaf.grad


# Defaults ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cost", ["l1", "euclidean", "sqeuclidean"])
@pytest.mark.parametrize("value", ["dual", "sharp"])
def test_batch_transport_is_zero_and_flat_at_student_equal_teacher(cost, value):
    points_ = logits(1, 8, VOCAB)
    loss = otkd.BatchSinkhornLoss(cost, value=value, tolerance=1e-10)
    result, gradient = value_and_gradient(loss, points_, points_)
    assert abs(result) < 1e-8
    assert gradient.abs().max() < 1e-8
    distance = otkd.functional.batch_sinkhorn_distance(points_, points_, cost=cost, tolerance=1e-10)
    assert abs(distance) < 1e-8


def test_sinkd_is_what_the_documentation_recommends():
    student, teacher = logits(1, 8, 3), logits(2, 8, 3)
    labels = torch.arange(8) % 3
    loss = otkd.SinKDLoss()
    assert loss.weights == {"kl": 0.9, "ce": pytest.approx(0.1), "sinkhorn": 0.1}
    parts = (
        (0.9, otkd.KLLoss()),
        (0.1, otkd.CrossEntropyLoss()),
        (0.1, otkd.BatchSinkhornLoss(debias=True)),
    )
    close(
        loss(student, teacher, labels=labels),
        sum(weight * part(student, teacher, labels=labels) for weight, part in parts),
    )
    # Where student and teacher agree the hard labels alone are left.
    _, found = value_and_gradient(loss, student, student, labels=labels)
    _, hard = value_and_gradient(otkd.CrossEntropyLoss(), student, student, labels=labels)
    close(found, 0.1 * hard, atol=1e-5, rtol=1e-5)


def test_the_public_code_keeps_its_arithmetic():
    student, teacher = logits(1, 8, 3), logits(2, 8, 3)
    labels = torch.arange(8) % 3
    author = otkd.SinKDLoss.author()
    parts = (
        (0.9, SoftCrossEntropyLoss(rescale_t2=False)),
        (1 - 0.9, otkd.CrossEntropyLoss()),
        (0.8, UnrolledBatchSinkhornLoss()),
    )
    expected = sum(w * part(student, teacher, labels=labels) for w, part in parts)
    assert torch.equal(author(student, teacher, labels=labels), expected)


def test_a_report_of_a_batch_names_its_samples():
    loss = otkd.BatchSinkhornLoss()
    loss(logits(1, 8, 3), logits(2, 8, 3), mask=torch.arange(8) < 6)
    assert loss.last_report.support == "the 6 samples of the batch"


# Contradictions ----------------------------------------------------------------------------------

SUM = {"reduction": "sum"}
LINEAR = nn.Linear(3, 3)
CONTRADICTIONS = [
    (lambda: otkd.SinKDLoss(**SUM, transport=otkd.BatchSinkhornLoss()), "the same reduction"),
    (lambda: otkd.SinKDLoss(**SUM, soft_loss=otkd.KLLoss()), "the same reduction"),
    (lambda: otkd.SinKDLoss(transport=otkd.BatchSinkhornLoss(**SUM)), "the same reduction"),
    *(
        (
            lambda given=given: otkd.SinKDLoss(soft_loss=otkd.KLLoss(), **given),
            f"{next(iter(given))}= is a setting of the KL term, which soft_loss= replaces",
        )
        for given in (
            {"temperature": 2.0},
            {"temperature": 1.0},
            {"teacher_temperature": 2.0},
            {"rescale_t2": False},
        )
    ),
    (
        lambda: otkd.SinKDLoss(vocab_size=3, soft_loss=otkd.KLLoss()),
        "soft_loss has vocab_size=None",
    ),
    (lambda: otkd.SinKDLoss(soft_loss=otkd.KLLoss(vocab_size=3)), "soft_loss has vocab_size=3"),
    (
        lambda: otkd.SinKDLoss(vocab_size=3, transport=otkd.BatchSinkhornLoss()),
        "transport has vocab_size=None",
    ),
    *(
        (
            lambda other=other: otkd.WeightedLoss(
                {"kl": (1.0, otkd.KLLoss(reduction=other)), "ce": (1.0, "ce")}
            ),
            f"'kl' '{other}', 'ce' 'mean'",
        )
        for other in ("none", "sum", "sequence_mean")
    ),
    (
        lambda: otkd.WeightedLoss(
            {
                "inner": (1.0, otkd.WeightedLoss({"kl": (1.0, otkd.KLLoss(**SUM))})),
                "ot": (1.0, otkd.BatchSinkhornLoss()),
            }
        ),
        "the same reduction",
    ),
    (lambda: otkd.BatchSinkhornLoss(projection=LINEAR), 'projection= requires cost="hidden"'),
    (lambda: otkd.SinkhornLoss("discrete", points(1, 5, 3)), 'used by cost="embedding" only'),
    (
        lambda: otkd.SinkhornLoss(otkd.costs.DiscreteCost(), points(1, 5, 3)),
        'used by cost="embedding" only',
    ),
    (lambda: TopK(8, tail=False, clusters=4), "clusters=4 has no effect with tail=False"),
    (
        lambda: otkd.SinkhornLoss("discrete", marginal_relaxation=1.0, value="sharp"),
        "transport with marginal_relaxation has only value='dual'",
    ),
]


@pytest.mark.parametrize(("build", "message"), CONTRADICTIONS)
def test_contradictory_settings_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_settings_that_agree_are_taken():
    sum_ = {"reduction": "sum", "vocab_size": 3}
    otkd.SinKDLoss(
        soft_loss=otkd.KLLoss(temperature=2.0, **sum_),
        transport=otkd.BatchSinkhornLoss(**sum_),
        **sum_,
    )
    # States have no vocabulary, and a sum without a mean loses nothing.
    hidden = otkd.BatchSinkhornLoss("hidden")
    otkd.SinKDLoss(vocab_size=3, soft_loss=otkd.KLLoss(vocab_size=3), transport=hidden)
    otkd.WeightedLoss({"kl": (1.0, otkd.KLLoss(**SUM)), "ce": (1.0, otkd.CrossEntropyLoss(**SUM))})


class Foreign(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.shape = shape

    def forward(self, student_logits, teacher_logits=None, **options):
        return student_logits.sum().expand(self.shape)


def test_values_of_different_shape_do_not_add_up():
    student, teacher = logits(1, 4, VOCAB), logits(2, 4, VOCAB)
    loss = otkd.WeightedLoss({"kl": (1.0, otkd.KLLoss()), "own": (1.0, Foreign((4,)))})
    with pytest.raises(ValueError, match=r"the same shape, got 'kl' \(\), 'own' \(4,\)"):
        loss(student, teacher)
    loss = otkd.WeightedLoss({"kl": (1.0, otkd.KLLoss()), "own": (1.0, Foreign(()))})
    assert loss(student, teacher).shape == ()


@pytest.mark.parametrize(
    ("name", "term", "error", "message"),
    [
        ("kl", (torch.ones(()).requires_grad_(), "kl"), TypeError, "would not be trained"),
        ("kl", (True, "kl"), TypeError, "the weight of term 'kl' must be a number"),
        ("a.b", (1.0, "kl"), ValueError, "invalid name 'a.b'"),
        ("keys", (1.0, "kl"), ValueError, "invalid name 'keys'"),
        ("", (1.0, "kl"), ValueError, "invalid name ''"),
        (3, (1.0, "kl"), ValueError, "invalid name 3"),
    ],
)
def test_refused_names_and_weights(name, term, error, message):
    with pytest.raises(error, match=message):
        otkd.WeightedLoss({name: term})


# The registry ------------------------------------------------------------------------------------

REQUIRED = {
    "sinkhorn": {"embedding": points(1, VOCAB, 3)},
    "transport_kl": {"embedding": points(1, VOCAB, 3)},
    "wasserstein": {"cost": "ordinal"},
}


@pytest.mark.parametrize("name", otkd.list_losses())
def test_every_loss_can_be_made_by_name(name):
    options = {**REQUIRED.get(name, {}), "reduction": "sum"}
    loss, direct = otkd.get_loss(name, **options), otkd.losses.loss_class(name)(**options)
    student, teacher, labels = logits(1, 4, VOCAB), logits(2, 4, VOCAB), torch.arange(4)
    found = loss(student, teacher, labels=labels)
    assert torch.equal(found, direct(student, teacher, labels=labels))
    with pytest.raises(TypeError, match="Loss has no argument 'reductoin': did you mean 'reduct"):
        otkd.get_loss(name, **REQUIRED.get(name, {}), reductoin="sum")
    # The term of a sum, by its name where nothing else is needed.
    if name not in REQUIRED:
        otkd.WeightedLoss({"term": (1.0, name)})


@pytest.mark.parametrize(
    ("build", "advice"),
    [
        (otkd.SinkhornLoss, r"Write SinkhornLoss\(embedding=teacher.get_input_embeddings\(\)"),
        (lambda: otkd.SinkhornLoss(epsilon=0.2), r"Write SinkhornLoss\(embedding="),
        (lambda: otkd.get_loss("sinkhorn"), r"Write get_loss\('sinkhorn', embedding="),
        (
            lambda: otkd.WeightedLoss({"ot": (0.5, "sinkhorn")}),
            r"'ot' needs more than the name.*get_loss\('sinkhorn', embedding=.*'ot': \(0.5, loss\)",
        ),
        (
            lambda: otkd.get_loss("sinkd", transport=otkd.SinkhornLoss()),
            r"SinkhornLoss\(embedding=",
        ),
    ],
)
def test_a_missing_cost_is_told_where_it_is_missing(build, advice):
    with pytest.raises(ValueError, match=advice) as raised:
        build()
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)


@pytest.mark.parametrize(
    "build",
    [
        lambda: otkd.get_loss("wasserstein"),
        lambda: otkd.WeightedLoss({"ot": (0.5, "wasserstein")}),
    ],
)
def test_a_required_argument_is_named(build):
    with pytest.raises(
        TypeError, match=r"needs cost=: write get_loss\('wasserstein', cost=\.\.\.\)"
    ):
        build()


def test_a_temperature_that_changes_nothing_is_not_annealed():
    pytest.importorskip("transformers")
    from otkd.integrations.annealing import TemperatureAnnealing

    TemperatureAnnealing(otkd.BatchSinkhornLoss())
    with pytest.raises(ValueError, match="compares hidden states, so a temperature has no effect"):
        TemperatureAnnealing(otkd.BatchSinkhornLoss("hidden"))
