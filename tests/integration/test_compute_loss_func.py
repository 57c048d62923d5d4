"""An unchanged ``transformers.Trainer`` with a loss of otkd and a teacher."""

from __future__ import annotations

import copy
import doctest

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from transformers import Trainer

import otkd
from otkd.integrations import objective
from otkd.integrations.transformers import DistillationTrainer, compute_loss_func
from tests.integration.test_trainer import arguments, logged, pad, sentences, texts, weights
from tests.models import (
    VOCAB,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_masked_lm,
)

__all__ = ["arguments"]  # a fixture
pytestmark = [
    pytest.mark.usefixtures("seeded"),
    # peft, and the older name of an option that every supported version knows.
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
]

EMBEDDING = tiny_llama(1).get_input_embeddings().weight.detach()
LOSSES = {
    "kl": otkd.KLLoss,
    "sinkhorn": lambda: otkd.SinkhornLoss(embedding=EMBEDDING),
    "transport_kl": lambda: otkd.TransportKLLoss(embedding=EMBEDDING),
    "sum": lambda: otkd.KLLoss(reduction="sum"),
    "weighted": lambda: otkd.WeightedLoss({"kl": (0.7, otkd.KLLoss()), "ce": (0.3, "ce")}),
}


def trained(args, loss, build=tiny_llama, rows=None, *, kind=Trainer, **options):
    student, teacher = build(0), build(1)
    options |= {"train_dataset": texts() if rows is None else rows, "data_collator": pad}
    if kind is Trainer:
        options["compute_loss_func"] = compute_loss_func(loss, teacher, student=student)
    else:
        options |= {"loss": loss, "teacher": teacher}
    trainer = kind(student, args, **options)
    before = weights(student)
    trainer.train()
    assert not torch.equal(weights(student), before)
    return trainer


def close(one, other):
    torch.testing.assert_close(weights(one.model), weights(other.model), rtol=1e-5, atol=1e-5)
    assert logged(one, "loss") == pytest.approx(logged(other, "loss"), rel=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_training_is_that_of_the_distillation_trainer(arguments, name):
    rate = 0.01 if name == "sum" else 0.1
    args = arguments(learning_rate=rate, num_train_epochs=2)
    close(*(trained(args, LOSSES[name](), kind=kind) for kind in (Trainer, DistillationTrainer)))


@pytest.mark.parametrize(
    ("build", "rows"),
    [
        # Trainer counts the first label of a row for GPT-2, so here the rows have none.
        (tiny_gpt2, texts(lengths=(9, 3, 7, 5, 8, 4, 6, 5))),
        (tiny_masked_lm, texts()),
        (tiny_bert, sentences()),
    ],
)
def test_other_models_are_trained_as_by_the_distillation_trainer(arguments, build, rows):
    """Shifted, at each token, and with one row of logits per example."""
    kinds = (Trainer, DistillationTrainer)
    close(*(trained(arguments(), otkd.KLLoss(), build, rows, kind=kind) for kind in kinds))


@pytest.mark.parametrize("name", LOSSES)
def test_accumulation_equals_the_full_batch(arguments, name):
    runs = [
        trained(
            arguments(
                per_device_train_batch_size=size,
                gradient_accumulation_steps=steps,
                learning_rate=0.01 if name == "sum" else 0.1,
            ),
            LOSSES[name](),
        )
        for size, steps in ((8, 1), (3, 3), (1, 8))
    ]
    for run in runs[1:]:
        close(run, runs[0])


def test_evaluation_reports_the_loss_and_predicts_the_logits_of_the_student(arguments):
    rows = texts(lengths=(5, 5, 5, 5))
    trainer = trained(arguments(), otkd.KLLoss(), rows=rows, eval_dataset=rows)
    batch = pad(rows)
    with torch.no_grad():
        student, teacher = (
            m.eval()(batch["input_ids"]).logits for m in (trainer.model, tiny_llama(1))
        )
    expected = otkd.KLLoss()(student[:, :-1], teacher[:, :-1], labels=batch["labels"][:, 1:])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    predicted = torch.as_tensor(trainer.predict(rows).predictions)
    torch.testing.assert_close(predicted, student, rtol=1e-5, atol=1e-5)


def test_checkpointing_and_half_precision(arguments):
    args = arguments(gradient_checkpointing=True, bf16=True)
    half, whole = trained(args, otkd.KLLoss()), trained(arguments(), otkd.KLLoss())
    assert logged(half, "loss") == pytest.approx(logged(whole, "loss"), rel=0.05)


def test_an_adapter_is_trained_and_nothing_else(arguments):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    student = peft.get_peft_model(tiny_llama(0), config)
    objective_of = compute_loss_func(otkd.KLLoss(), tiny_llama(1), student=student)
    trainer = Trainer(
        student, arguments(), train_dataset=texts(), data_collator=pad,
        compute_loss_func=objective_of,
    )  # fmt: skip
    trainer.train()
    named = dict(student.named_parameters())
    assert any(p.abs().sum() > 0 for name, p in named.items() if "lora_B" in name)
    # LoRA starts as the identity, so the first loss is that without an adapter.
    plain = trained(arguments(), otkd.KLLoss())
    assert logged(trainer, "loss")[0] == pytest.approx(logged(plain, "loss")[0], rel=1e-5)


def test_a_copy_of_the_student_does_not_copy_the_teacher():
    student, teacher = tiny_llama(0), tiny_llama(1)
    compute_loss_func(otkd.KLLoss(), teacher, student=student)
    found = copy.deepcopy(student)._forward_pre_hooks.values()
    assert len(found) == 1
    assert not any(teacher in vars(hook).values() for hook in found)


def test_a_model_that_is_not_the_student_is_refused(arguments):
    student, teacher = tiny_llama(0), tiny_llama(1)
    function = compute_loss_func(otkd.KLLoss(), teacher, student=student)
    trainer = Trainer(
        copy.deepcopy(student), arguments(), train_dataset=texts(), data_collator=pad,
        compute_loss_func=function,
    )  # fmt: skip
    with pytest.raises(ValueError, match="the model object that Trainer trains"):
        trainer.train()


def test_a_batch_without_labels_is_refused(arguments):
    with pytest.raises(ValueError, match="has no labels"):
        trained(arguments(), otkd.KLLoss(), rows=texts(labels=False))


def test_an_auxiliary_loss_is_refused(arguments):
    def mixture(seed):
        return transformers.MixtralForCausalLM(
            transformers.MixtralConfig(
                vocab_size=VOCAB,
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
                num_local_experts=2,
                output_router_logits=True,
            )
        )

    with pytest.raises(ValueError, match="MixtralForCausalLM has an auxiliary loss"):
        trained(arguments(), otkd.KLLoss(), mixture)


def with_a_parameter():
    loss = otkd.KLLoss()
    loss.register_parameter("scale", torch.nn.Parameter(torch.ones(())))
    return loss


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (otkd.KLLoss(reduction="none"), 'reduction="none"'),
        (otkd.KLLoss(reduction="sequence_mean"), 'reduction="sequence_mean"'),
        (otkd.BatchSinkhornLoss("hidden"), "compares features"),
        (with_a_parameter(), "compute_loss_func would not train"),
    ],
)
def test_losses_that_trainer_cannot_train_are_refused(loss, message):
    with pytest.raises(ValueError, match=message):
        compute_loss_func(loss, tiny_llama(1), student=tiny_llama(0))


def test_wrong_models_are_refused():
    student = tiny_llama(0)
    with pytest.raises(ValueError, match="the teacher is the student"):
        compute_loss_func(otkd.KLLoss(), student, student=student)
    with pytest.raises(TypeError, match="teacher must be a model, got Tensor"):
        compute_loss_func(otkd.KLLoss(), torch.zeros(2, 3), student=student)
    cost = otkd.costs.EmbeddingCost(EMBEDDING, torch.randn(VOCAB + 3, 4).repeat(1, 8))
    with pytest.raises(ValueError, match=f"has {VOCAB} tokens and the teacher LlamaForCausalLM"):
        compute_loss_func(otkd.SinkhornLoss(cost), tiny_llama(1, vocab=VOCAB + 3), student=student)
    with pytest.raises(TypeError, match="otkd loss"):
        compute_loss_func(torch.nn.KLDivLoss(), tiny_llama(1), student=student)


def test_the_example_prints_what_it_says():
    assert doctest.testmod(objective).failed == 0
