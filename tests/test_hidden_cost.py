"""Batch transport between the states of student and teacher."""

import copy

import pytest
import torch
from torch import nn

import otkd
from tests import naive
from tests.problems import logits
from tests.test_trainer import arguments, pad, sentences, stored_logits, weights  # noqa: F401

pytest.importorskip("transformers")

from otkd.integrations.transformers import DistillationTrainer
from tests.models import CLASSES, WIDTH, tiny_bert

pytestmark = pytest.mark.usefixtures("seeded")
close = torch.testing.assert_close
EXACT = {"tolerance": 1e-12, "max_iterations": 20_000}


def sample(samples=7, width=5, seed=0):
    return {
        "student_logits": logits(seed, samples, 3),
        "teacher_logits": logits(seed + 1, samples, 3),
        "student_features": logits(seed + 2, samples, width).requires_grad_(),
        "teacher_features": logits(seed + 3, samples, width),
    }


def gradients(loss, batch, *leaves):
    value = loss(**batch)
    return value.detach(), torch.autograd.grad(value, leaves)


@pytest.mark.parametrize("debias", [False, True])
@pytest.mark.parametrize("value", ["dual", "sharp"])
def test_is_transport_between_states_in_units_of_their_mean_distance(debias, value):
    batch = sample()
    x, y = batch["student_features"], batch["teacher_features"]
    loss = otkd.BatchSinkhornLoss(cost="hidden", debias=debias, value=value, epsilon=0.3, **EXACT)
    found, (gradient,) = gradients(loss, batch, x)
    matrices = [(u[:, None] - v[None]).square().sum(-1) for u, v in ((x, y), (x, x), (y, y))]
    scale = matrices[0].detach().mean()
    uniform = torch.full((7,), 1 / 7, dtype=torch.float64)
    expected = naive.divergence(
        uniform, uniform, [m / scale for m in matrices], 0.3,
        sharp=value == "sharp", debias=debias, iterations=2000,
    )  # fmt: skip
    close(found, expected.detach())
    close(gradient, torch.autograd.grad(expected, x)[0])
    assert batch["teacher_features"].grad is None


def test_is_zero_where_the_states_agree_in_any_order():
    batch = sample()
    states = batch["teacher_features"][torch.randperm(7)].requires_grad_()
    loss = otkd.BatchSinkhornLoss(cost="hidden", debias=True, **EXACT)
    value, (gradient,) = gradients(loss, batch | {"student_features": states}, states)
    assert value.abs() < 1e-10
    assert gradient.abs().max() < 1e-8
    # Nor is there anything to divide by where all states are one.
    same = torch.ones(7, 5, dtype=torch.float64)
    assert loss(**batch | {"student_features": same, "teacher_features": same}).abs() < 1e-12


def test_masked_states_may_hold_anything_and_counted_ones_may_not():
    batch = sample()
    loss = otkd.BatchSinkhornLoss(cost="hidden")
    mask = torch.tensor([1, 1, 0, 1, 1, 0, 1])
    kept = {name: values[mask.bool()] for name, values in batch.items()}
    broken = {name: values.detach().clone() for name, values in batch.items()}
    for values in broken.values():
        values[mask == 0] = float("nan")
    close(loss(**broken, mask=mask), loss(**kept))
    with pytest.raises(ValueError, match="student_features that are not finite"):
        loss(**batch | {"student_features": broken["student_features"]})
    assert loss(**broken, mask=torch.zeros(7)) == 0


def test_other_widths_need_a_projection():
    batch = sample()
    batch["teacher_features"] = logits(9, 7, 8)
    with pytest.raises(ValueError, match=r"width 5 .* 8: .*nn.Linear\(5, 8\)"):
        otkd.BatchSinkhornLoss(cost="hidden")(**batch)
    projection = nn.Linear(5, 8, dtype=torch.float64)
    loss = otkd.BatchSinkhornLoss(cost="hidden", projection=projection)
    _, (student, weight) = gradients(loss, batch, batch["student_features"], projection.weight)
    assert student.abs().sum() > 0
    assert weight.abs().sum() > 0
    assert dict(loss.named_parameters()).keys() == {"projection.weight", "projection.bias"}
    with pytest.raises(ValueError, match='a projection is for cost="hidden"'):
        otkd.BatchSinkhornLoss(projection=projection)


@pytest.mark.parametrize("name", ["student_features", "teacher_features"])
def test_missing_and_ill_shaped_states_are_refused(name):
    batch = sample()
    loss = otkd.BatchSinkhornLoss(cost="hidden")
    with pytest.raises(ValueError, match="needs student_features= and teacher_features="):
        loss(**{key: value for key, value in batch.items() if key != name})
    with pytest.raises(ValueError, match=rf"{name} must have shape \(7,\)"):
        loss(**batch | {name: batch[name][:3]})


def test_half_precision_is_computed_in_float32():
    batch = {name: values.detach().float() for name, values in sample(width=64).items()}
    loss = otkd.BatchSinkhornLoss(cost="hidden", debias=True)
    half = {name: values.bfloat16() for name, values in batch.items()}
    expected = loss(**{name: values.float() for name, values in half.items()})
    assert torch.equal(loss(**half), expected)


def test_only_this_cost_asks_for_features():
    hidden = otkd.BatchSinkhornLoss(cost="hidden", debias=True)
    assert hidden.needs_features
    assert otkd.SinKDLoss(transport=hidden).needs_features
    assert not otkd.SinKDLoss().needs_features
    assert not otkd.BatchSinkhornLoss().needs_features


# Stored teachers and the trainer ------------------------------------------------------------------


def test_a_signal_keeps_features_with_its_logits(tmp_path):
    signal = otkd.DenseSignal(torch.randn(6, 3), torch.randn(6, 4).half())
    signal.save(tmp_path / "signal.safetensors")
    loaded = otkd.DenseSignal.load(tmp_path / "signal.safetensors")
    assert torch.equal(loaded.features, signal.features)
    part = loaded[torch.tensor([4, 1])]
    assert torch.equal(part.features, signal.features[[4, 1]])
    assert part.to("cpu").features is part.features
    with pytest.raises(ValueError, match="features must have shape"):
        otkd.DenseSignal(torch.randn(6, 3), torch.randn(5, 4))
    batch = {name: values.detach().float() for name, values in sample(samples=6, width=4).items()}
    loss = otkd.BatchSinkhornLoss(cost="hidden")
    found = loss(batch["student_logits"], signal, student_features=batch["student_features"])
    given = batch | {"teacher_features": signal.features, "teacher_logits": signal.values}
    assert torch.equal(found, loss(**given))


def states(teacher, examples):
    batch = pad([{k: e[k] for k in ("input_ids", "attention_mask")} for e in examples])
    with torch.no_grad():
        outputs = teacher.eval()(**batch, output_hidden_states=True)
    return outputs.hidden_states[-1][:, 0]


@pytest.mark.parametrize("projected", [False, True])
def test_a_stored_teacher_teaches_as_the_model_does(arguments, projected):  # noqa: F811
    examples, teacher = sentences(), tiny_bert(1)
    projection = nn.Linear(WIDTH, WIDTH) if projected else None
    loss = otkd.SinKDLoss(
        transport=otkd.BatchSinkhornLoss(cost="hidden", debias=True, projection=projection)
    )
    signal = otkd.DenseSignal(stored_logits(teacher, examples), states(teacher, examples))
    found = []
    for given in (teacher, signal):
        trainer = DistillationTrainer(
            tiny_bert(0), arguments(), train_dataset=examples, data_collator=pad,
            teacher=given, loss=copy.deepcopy(loss),
        )  # fmt: skip
        trainer.train()
        found.append((weights(trainer.model), weights(trainer.loss)) if projected else
                     (weights(trainer.model),))  # fmt: skip
    for stored, live in zip(*found, strict=True):
        close(stored, live, rtol=1e-4, atol=1e-6)
    assert not torch.equal(found[0][0], weights(tiny_bert(0)))


def test_a_signal_without_features_is_refused_before_training(arguments):  # noqa: F811
    examples = sentences()
    with pytest.raises(ValueError, match=r"DenseSignal\(logits, features\)"):
        DistillationTrainer(
            tiny_bert(0), arguments(), train_dataset=examples, data_collator=pad,
            teacher=torch.randn(len(examples), CLASSES),
            loss=otkd.BatchSinkhornLoss(cost="hidden"),
        )  # fmt: skip
