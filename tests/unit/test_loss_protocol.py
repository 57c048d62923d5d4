"""What losses say of themselves, and how trainers and weighted losses use it."""

import pytest
import torch
from torch import nn

import otkd
from otkd.costs import EmbeddingCost
from otkd.losses.protocol import Loss, as_loss, teacher_for
from otkd.losses.registry import LOSSES
from otkd.losses.sinkd import SoftCrossEntropyLoss
from otkd.supports import TopK
from otkd.teachers import DenseTeacher, TopKTeacher
from tests.problems import logits, points

pytestmark = pytest.mark.usefixtures("seeded")

VOCAB = 12
close = torch.testing.assert_close
NEEDED = {name: {"cost": "discrete"} for name in ("sinkhorn", "transport_kl", "wasserstein")}


def sinkhorn(**options):
    options = {"epsilon": 0.2, "support": TopK(3), **options}
    return otkd.SinkhornLoss(EmbeddingCost(points(7, VOCAB, 3)), **options)


class Foreign(nn.Module):
    """A module that is called as otkd's losses are and has nothing else of the protocol."""

    def __init__(self, inner=None):
        super().__init__()
        self.inner = nn.Identity() if inner is None else inner
        self.seen = []

    def forward(self, student_logits, teacher_logits=None, **options):
        self.seen.append(type(teacher_logits))
        options = {name: value for name, value in options.items() if value is not None}
        if isinstance(self.inner, nn.Identity):
            return (student_logits - teacher_logits).square().mean()
        return self.inner(student_logits, teacher_logits, **options)


@pytest.mark.parametrize("name", LOSSES)
def test_every_registered_loss_has_the_protocol(name):
    loss = otkd.get_loss(name, **NEEDED.get(name, {}))
    assert as_loss(loss) is loss
    assert loss.reductions == {"mean"}
    assert loss.last_report is None
    assert loss.last_reports == {}
    assert loss.last_terms == {}
    alone = otkd.WeightedLoss({"it": (1.0, loss)})
    for attribute in (
        "needs_teacher",
        "needs_labels",
        "needs_features",
        "reads_stored",
        "bridges_vocabularies",
        "reductions",
    ):
        assert getattr(alone, attribute) == getattr(loss, attribute), attribute


def test_a_weighted_loss_follows_from_its_terms():
    ce, kl = otkd.get_loss("ce"), otkd.KLLoss()
    uld, hidden = otkd.UniversalLogitLoss(), otkd.BatchSinkhornLoss(cost="hidden")

    def weighted(*losses):
        return otkd.WeightedLoss({str(i): (1.0, loss) for i, loss in enumerate(losses)})

    for make in (weighted, lambda *losses: weighted(weighted(*losses))):
        assert not make(ce).needs_teacher
        assert make(ce, kl).needs_teacher
        assert make(ce, kl).needs_labels
        assert not make(kl).needs_labels
        assert make(kl, hidden).needs_features
        assert not make(kl).needs_features
        assert make(ce, sinkhorn()).reads_stored
        assert not make(ce, otkd.WassersteinLoss("discrete")).reads_stored
        # The teacher's vocabulary matters to the terms that need a teacher alone.
        assert make(ce, uld).bridges_vocabularies
        assert not make(kl, uld).bridges_vocabularies
        assert not make(ce).bridges_vocabularies
        assert make(ce, kl).reductions == {"mean"}
    assert otkd.SinKDLoss(transport=sinkhorn()).reads_stored


def test_two_vocabularies_pass_through_a_weighted_loss():
    student, labels = logits(1, 3, VOCAB), torch.tensor([0, 1, -100])
    loss = otkd.WeightedLoss({"uld": (0.5, "uld"), "ce": (0.5, "ce")})
    expected = (otkd.UniversalLogitLoss()(student, logits(2, 3, 7), labels=labels)) / 2
    expected = expected + otkd.get_loss("ce")(student, labels=labels) / 2
    close(loss(student, logits(2, 3, 7), labels=labels), expected)


def test_reports_of_the_terms_can_be_reached_by_name():
    student, teacher = logits(1, 3, VOCAB), logits(2, 3, VOCAB)
    coarse, fine = sinkhorn(tolerance=1e-2), sinkhorn(tolerance=1e-8, max_iterations=5000)
    inner = otkd.WeightedLoss({"kl": (1.0, "kl"), "fine": (1.0, fine)})
    loss = otkd.WeightedLoss({"coarse": (1.0, coarse), "inner": (1.0, inner), "kl": (1.0, "kl")})
    assert loss.last_report is None
    loss(student, teacher)
    assert loss.last_reports == {"coarse": coarse.last_report, "inner/fine": fine.last_report}
    assert inner.last_report is fine.last_report  # the only one
    worst = loss.last_report
    assert worst.iterations == fine.last_report.iterations
    assert worst.marginal_error == coarse.last_report.marginal_error
    assert worst.converged == (coarse.last_report.converged and fine.last_report.converged)
    assert worst.coverage == torch.minimum(coarse.last_report.coverage, fine.last_report.coverage)
    assert worst.support == coarse.last_report.support
    # Terms of another precision, and one in which every token takes part.
    loss = otkd.WeightedLoss(
        {"topk": (1.0, coarse), "samples": (1.0, "batch_sinkhorn"), "dense": (1.0, sinkhorn())}
    )
    loss(student.float(), teacher.float())
    assert set(loss.last_reports) == {"topk", "samples", "dense"}
    assert loss.last_report.coverage is not None


@pytest.mark.parametrize("nested", [False, True])
def test_every_term_gets_a_stored_teacher_in_the_form_that_it_reads(nested):
    student, teacher = logits(1, 3, VOCAB), logits(2, 3, VOCAB)
    stored, foreign = TopKTeacher.from_logits(teacher, 4), Foreign()
    terms = {"sinkhorn": (1.0, sinkhorn()), "mine": (2.0, foreign), "ce": (1.0, "ce")}
    loss = otkd.WeightedLoss(terms)
    if nested:
        loss = otkd.WeightedLoss({"all": (1.0, loss)})
    labels = torch.tensor([1, 2, 3])
    value = loss(student, stored, labels=labels)
    expected = sinkhorn()(student, stored) + otkd.get_loss("ce")(student, labels=labels)
    close(value, expected + 2 * (student - stored.logits_beside(student)).square().mean())
    loss(student, DenseTeacher(teacher), labels=labels)
    assert foreign.seen == [torch.Tensor, torch.Tensor]


def test_a_foreign_module_is_adapted():
    foreign = as_loss(Foreign())
    assert not isinstance(Foreign(), Loss)
    assert isinstance(foreign, Loss)
    assert foreign.needs_teacher
    for attribute in ("needs_labels", "needs_features", "reads_stored", "bridges_vocabularies"):
        assert getattr(foreign, attribute) is False
    assert foreign.reductions == frozenset()
    assert foreign.last_report is None
    assert foreign.last_reports == {}
    assert foreign.last_terms == {}

    around = Foreign(otkd.WeightedLoss({"s": (1.0, sinkhorn(reduction="sum"))}))
    around(logits(1, 3, VOCAB), logits(2, 3, VOCAB))
    report = around.inner.last_report
    assert as_loss(around).last_reports == {"inner/s": report}
    assert as_loss(around).last_report is report
    assert as_loss(around).reductions == {"sum"}
    around.needs_labels = around.reads_stored = True
    assert as_loss(around).needs_labels
    stored = TopKTeacher.from_logits(logits(2, 3, VOCAB), 4)
    assert teacher_for(around, stored, logits(1, 3, VOCAB)) is stored
    assert isinstance(teacher_for(Foreign(), stored, logits(1, 3, VOCAB)), torch.Tensor)
    assert teacher_for(Foreign(), None, logits(1, 3, VOCAB)) is None


def test_the_trainer_hands_a_stored_teacher_on_as_it_is(tmp_path):
    transformers = pytest.importorskip("transformers")
    from otkd.integrations.transformers import DistillationTrainer
    from tests.models import VOCAB as WORDS
    from tests.models import tiny_llama

    rows = torch.arange(24).reshape(4, 6) % (WORDS - 2) + 2
    examples = [{"input_ids": row, "labels": row} for row in rows]
    with torch.no_grad():
        teacher = tiny_llama(1).eval()(input_ids=rows).logits
    seen = []

    class Spying(TopK):
        def select(self, positions, cost, objective, backend):
            seen.append(positions.stored)
            return super().select(positions, cost, objective, backend)

    transport = otkd.SinkhornLoss("discrete", support=Spying(3))
    inner = otkd.WeightedLoss({"sinkhorn": (1.0, transport), "kl": (1.0, "kl")})
    for loss in (
        otkd.WeightedLoss({"sinkhorn": (1.0, transport), "ce": (1.0, "ce")}),
        otkd.WeightedLoss({"inner": (1.0, inner), "ce": (1.0, "ce")}),
        otkd.SinKDLoss(transport=transport),
        otkd.WeightedLoss({"sinkhorn": (1.0, transport), "mine": (1.0, Foreign())}),
    ):
        trainer = DistillationTrainer(
            tiny_llama(0),
            transformers.TrainingArguments(
                output_dir=str(tmp_path),
                use_cpu=True,
                report_to="none",
                disable_tqdm=True,
                max_steps=1,
                logging_steps=1,
                save_strategy="no",
                dataloader_pin_memory=False,
            ),
            train_dataset=examples,
            loss=loss,
            teacher=TopKTeacher.from_logits(teacher, 4),
        )
        seen.clear()
        trainer.train()
        assert seen
        assert all(isinstance(stored, TopKTeacher) for stored in seen)
        assert "solver/iterations" in trainer.state.log_history[0]


def test_a_trainer_refuses_a_term_that_is_not_reduced(tmp_path):
    transformers = pytest.importorskip("transformers")
    from otkd.integrations.transformers import DistillationTrainer
    from tests.models import tiny_llama

    loss = otkd.WeightedLoss({"kl": (1.0, otkd.KLLoss(reduction="none"))})
    with pytest.raises(ValueError, match='reduction="none"'):
        DistillationTrainer(
            tiny_llama(0),
            transformers.TrainingArguments(
                output_dir=str(tmp_path), use_cpu=True, report_to="none"
            ),
            loss=otkd.WeightedLoss({"inner": (1.0, loss)}),
            teacher=tiny_llama(1),
        )


def test_the_soft_cross_entropy_has_the_protocol():
    assert isinstance(SoftCrossEntropyLoss(), Loss)
