"""Batch transport between the states of student and teacher."""

import copy

import pytest
import torch
from torch import nn

import otkd
from tests import naive
from tests.integration.test_trainer import (  # noqa: F401
    arguments,
    pad,
    sentences,
    stored_logits,
    texts,
    weights,
)
from tests.problems import logits

pytest.importorskip("transformers")

from otkd.integrations.transformers import DistillationTrainer
from tests.models import CLASSES, WIDTH, tiny_bert, tiny_llama

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
    for name in ("student_features", "teacher_features"):
        with pytest.raises(ValueError, match=f"2 of 7 counted samples have {name} that are not"):
            loss(**batch | {name: broken[name]})
    states = broken["student_features"].requires_grad_()
    projection = nn.Linear(5, 5, dtype=torch.float64)
    loss = otkd.BatchSinkhornLoss(cost="hidden", projection=projection)
    loss(**broken, mask=mask).backward()
    assert (states.grad[mask == 0] == 0).all()
    assert (states.grad[mask == 1] != 0).any(-1).all()
    assert projection.weight.grad.isfinite().all()
    states.grad = None
    nothing = loss(**broken, mask=torch.zeros(7))
    nothing.backward()
    assert nothing == 0
    assert (states.grad == 0).all()


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
    with pytest.raises(ValueError, match='projection= requires cost="hidden"'):
        otkd.BatchSinkhornLoss(projection=projection)
    with pytest.raises(TypeError, match=r"such as nn.Linear.*got Tensor"):
        otkd.BatchSinkhornLoss(cost="hidden", projection=projection.weight.detach())
    narrow = otkd.BatchSinkhornLoss(cost="hidden", projection=nn.Linear(4, 8))
    with pytest.raises(
        ValueError, match="expects features of width 4, but the student's have width 5"
    ):
        narrow(**batch)


@pytest.mark.parametrize("name", ["student_features", "teacher_features"])
def test_missing_and_ill_shaped_states_are_refused(name):
    batch = sample()
    loss = otkd.BatchSinkhornLoss(cost="hidden")
    with pytest.raises(ValueError, match="needs student_features= and teacher_features="):
        loss(**{key: value for key, value in batch.items() if key != name})
    with pytest.raises(ValueError, match=rf"{name} must have shape \(7,\)"):
        loss(**batch | {name: batch[name][:3]})
    with pytest.raises(TypeError, match=rf"{name} must be a floating-point tensor"):
        loss(**batch | {name: torch.ones(7, 5, dtype=torch.long)})


def test_each_sample_has_its_share():
    batch, mask = sample(), torch.tensor([1, 1, 0, 1, 1, 0, 1])
    batch["student_features"] = batch["teacher_features"].clone()
    batch["student_features"][3] += 4
    options = {"cost": "hidden", "debias": True, **EXACT}
    shares = otkd.BatchSinkhornLoss(reduction="none", **options)(**batch, mask=mask)
    assert (shares[mask == 0] == 0).all()
    close(shares.sum(), 5 * otkd.BatchSinkhornLoss(**options)(**batch, mask=mask))
    assert shares.argmax() == 3


def test_logits_are_not_compared():
    batch = sample()
    loss = otkd.BatchSinkhornLoss(cost="hidden")
    expected = loss(**batch)
    assert loss(**batch | {"teacher_logits": logits(8, 7, 9)}) == expected


@pytest.mark.parametrize(
    "options",
    [{"temperature": 9.0}, {"teacher_temperature": 2.0}, {"vocab_size": 5}, {"rescale_t2": True}],
    ids=lambda options: next(iter(options)),
)
def test_settings_of_logits_are_refused_beside_states(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}= has no effect"):
        otkd.BatchSinkhornLoss(cost="hidden", **options)


def test_what_all_states_share_is_not_rounded_away():
    """States of transformers have a few large entries that hardly vary."""
    x = logits(1, 16, 64, scale=0.3) + logits(2, 64, scale=30)
    y = x + logits(3, 16, 64, scale=0.1)
    results = []
    for dtype in (torch.float64, torch.float32):
        loss = otkd.BatchSinkhornLoss("hidden", debias=True, tolerance=1e-6, max_iterations=2000)
        zeros, leaf = torch.zeros(16, 3, dtype=dtype), x.to(dtype).detach().requires_grad_()
        value = loss(zeros, zeros, student_features=leaf, teacher_features=y.to(dtype))
        value.backward()
        results.append((value.detach().double(), leaf.grad.double()))
    close(results[1][0], results[0][0], rtol=1e-5, atol=0)
    close(results[1][1], results[0][1], rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("debias", [False, True])
def test_autocast_changes_nothing(debias):
    batch = {name: values.detach().float() for name, values in sample().items()}
    loss = otkd.BatchSinkhornLoss("hidden", debias=debias, projection=nn.Linear(5, 5))
    expected = loss(**batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(**batch), expected)


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


def test_a_stored_teacher_keeps_features_with_its_logits(tmp_path):
    stored = otkd.DenseTeacher(torch.randn(6, 3), torch.randn(6, 4).half())
    stored.save(tmp_path / "teacher.safetensors")
    loaded = otkd.DenseTeacher.load(tmp_path / "teacher.safetensors")
    assert torch.equal(loaded.features, stored.features)
    part = loaded[torch.tensor([4, 1])]
    assert torch.equal(part.features, stored.features[[4, 1]])
    assert part.to("cpu").features is part.features
    with pytest.raises(ValueError, match="features must have shape"):
        otkd.DenseTeacher(torch.randn(6, 3), torch.randn(5, 4))
    with pytest.raises(ValueError, match=r"floating-point numbers, got shape \(6, 4\) and dtype"):
        otkd.DenseTeacher(torch.randn(6, 3), torch.ones(6, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="on the device of the logits, cpu, got meta"):
        otkd.DenseTeacher(torch.randn(6, 3), torch.randn(6, 4, device="meta"))
    moved = stored.to("meta")
    assert moved.values.device.type == moved.features.device.type == "meta"
    batch = {name: values.detach().float() for name, values in sample(samples=6, width=4).items()}
    loss = otkd.BatchSinkhornLoss(cost="hidden")
    found = loss(batch["student_logits"], stored, student_features=batch["student_features"])
    given = batch | {"teacher_features": stored.features, "teacher_logits": stored.values}
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
    stored = otkd.DenseTeacher(stored_logits(teacher, examples), states(teacher, examples))
    found = []
    for given in (teacher, stored):
        trainer = DistillationTrainer(
            tiny_bert(0), arguments(), train_dataset=examples, data_collator=pad,
            teacher=given, loss=copy.deepcopy(loss),
        )  # fmt: skip
        trainer.train()
        found.append((weights(trainer.model), weights(trainer.loss)) if projected else
                     (weights(trainer.model),))  # fmt: skip
    for from_stored, live in zip(*found, strict=True):
        close(from_stored, live, rtol=1e-4, atol=1e-6)
    assert not torch.equal(found[0][0], weights(tiny_bert(0)))


@pytest.mark.parametrize("length", [7, 9, 12])
def test_stored_states_of_tokens_go_along_with_their_logits(arguments, length):  # noqa: F811
    """Also where the teacher was run at another length than the batch."""
    examples, teacher = texts(lengths=(7, 3, 6, 5)), tiny_llama(1)
    batch = pad([{k: e[k] for k in ("input_ids", "attention_mask")} for e in examples])
    with torch.no_grad():
        outputs = teacher.eval()(**batch, output_hidden_states=True)
    values, features = (
        nn.functional.pad(x, (0, 0, 0, length - 7), value=float("nan"))
        for x in (outputs.logits, outputs.hidden_states[-1])
    )
    found = []
    for given in (teacher, otkd.DenseTeacher(values, features)):
        loss = otkd.WeightedLoss(
            {"kl": (1.0, "kl"), "hidden": (1.0, otkd.BatchSinkhornLoss("hidden", debias=True))}
        )
        trainer = DistillationTrainer(
            tiny_llama(0), arguments(per_device_train_batch_size=2), train_dataset=examples,
            data_collator=pad, teacher=given, loss=loss,
        )  # fmt: skip
        trainer.train()
        found.append(weights(trainer.model))
    close(found[1], found[0], rtol=1e-4, atol=1e-6)
    assert not torch.equal(found[0], weights(tiny_llama(0)))


def test_evaluation_with_stored_states(arguments):  # noqa: F811
    examples, teacher = sentences(), tiny_bert(1)
    stored = stored_logits(teacher, examples)
    options = {"data_collator": pad, "loss": otkd.BatchSinkhornLoss("hidden", debias=True)}
    found = []
    for eval_teacher in (otkd.DenseTeacher(stored, states(teacher, examples)), stored):
        options |= {"train_dataset": examples, "eval_dataset": {"a": examples}}
        options |= {"teacher": teacher, "eval_teacher": {"a": eval_teacher}}
        if eval_teacher is stored:
            with pytest.raises(ValueError, match="which the eval_teacher does not contain"):
                DistillationTrainer(tiny_bert(0), arguments(), **options)
            options["eval_teacher"] = None  # evaluates with the model
        trainer = DistillationTrainer(tiny_bert(0), arguments(), **options)
        found.append(trainer.evaluate()["eval_a_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert found[0] > 1e-3


def test_a_stored_teacher_without_features_is_refused_before_training(arguments):  # noqa: F811
    examples = sentences()
    with pytest.raises(ValueError, match=r"DenseTeacher\(logits, features\)"):
        DistillationTrainer(
            tiny_bert(0), arguments(), train_dataset=examples, data_collator=pad,
            teacher=torch.randn(len(examples), CLASSES),
            loss=otkd.BatchSinkhornLoss(cost="hidden"),
        )  # fmt: skip
