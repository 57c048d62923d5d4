import copy
import importlib
import math
import os
import sys

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

pytest.importorskip("transformers")

from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments

import otkd
from otkd.integrations.records import LossRecord
from otkd.integrations.transformers import DistillationTrainer
from otkd.losses.protocol import as_loss
from otkd.teachers import DenseTeacher
from tests.models import (
    CLASSES,
    PLAIN_TRAINING,
    VOCAB,
    WIDTH,
    tiny_bert,
    tiny_distilbert,
    tiny_gpt2,
    tiny_llama,
    tiny_masked_lm,
    tiny_t5,
)

LENGTHS = (9, 3, 7, 2, 8, 4, 6, 5)


@pytest.fixture
def arguments(tmp_path):
    def build(**options):
        defaults = {
            **PLAIN_TRAINING,
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "train_sampling_strategy": "sequential",
            "num_train_epochs": 1,
            "dataloader_pin_memory": False,
        }
        return TrainingArguments(**(defaults | options))

    return build


def pad(features):
    """Pad on the right to the longest of the batch."""
    length = max(len(feature["input_ids"]) for feature in features)
    fill = {"input_ids": 0, "attention_mask": 0, "token_type_ids": 0}
    batch = {}
    for name in features[0]:
        values = [feature[name] for feature in features]
        if isinstance(values[0], list):
            values = [v + [fill.get(name, -100)] * (length - len(v)) for v in values]
        batch[name] = torch.tensor(values)
    return batch


def pad_left(features):
    flipped = [{k: v[::-1] for k, v in feature.items()} for feature in features]
    return {k: v.flip(1) for k, v in pad(flipped).items()}


def texts(*, labels=True, lengths=LENGTHS, seed=0):
    """Sequences of unlike lengths, the first third of each a prompt without labels."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for length in lengths:
        ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        example = {"input_ids": ids, "attention_mask": [1] * length}
        if labels:
            example["labels"] = [-100] * (length // 3) + ids[length // 3 :]
        examples.append(example)
    return examples


def sentences(lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    examples = texts(labels=False, lengths=lengths, seed=seed)
    for example in examples:
        example["labels"] = int(torch.randint(CLASSES, (), generator=generator))
    return examples


def stored_logits(teacher, examples):
    """One forward pass of all examples, padded positions included."""
    batch = pad([{k: e[k] for k in ("input_ids", "attention_mask")} for e in examples])
    with torch.no_grad():
        return teacher.eval()(**batch).logits


def mixed_loss():
    return otkd.WeightedLoss({"kl": (0.9, otkd.KLLoss(temperature=2.0)), "ce": (0.1, "ce")})


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def trained(student, *options, **named):
    trainer = DistillationTrainer(student, *options, **named)
    before = weights(trainer.model)
    trainer.train()
    assert not torch.equal(weights(trainer.model), before)
    return trainer


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# Gradient accumulation


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize(("size", "steps"), [(2, 4), (3, 3), (1, 8)])
def test_accumulation_equals_the_full_batch(arguments, build, labels, size, steps):
    loss = mixed_loss() if labels else otkd.KLLoss()
    runs = [
        trained(
            build(0),
            arguments(per_device_train_batch_size=b, gradient_accumulation_steps=n),
            train_dataset=texts(labels=labels),
            data_collator=pad,
            teacher=build(1),
            loss=loss,
        )
        for b, n in ((8, 1), (size, steps))
    ]
    torch.testing.assert_close(weights(runs[1].model), weights(runs[0].model), rtol=1e-5, atol=1e-7)
    for name in ("loss", "loss/kl", "loss/ce") if labels else ("loss",):
        assert logged(runs[1], name) == pytest.approx(logged(runs[0], name), rel=1e-5)


@pytest.mark.parametrize("accepts", [True, False])
def test_accumulation_of_a_classifier_with_a_short_last_batch(arguments, accepts):
    examples = sentences(lengths=LENGTHS[:6])
    student = tiny_bert(0)
    student.accepts_loss_kwargs = accepts
    runs = [
        trained(
            copy.deepcopy(student),
            arguments(per_device_train_batch_size=b, gradient_accumulation_steps=n),
            train_dataset=examples,
            data_collator=pad,
            teacher=tiny_bert(1),
            loss=mixed_loss(),
        )
        for b, n in ((6, 1), (4, 2))
    ]
    torch.testing.assert_close(weights(runs[1].model), weights(runs[0].model), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["jsd", "uld", "sinkhorn"])
def test_accumulation_of_other_losses(arguments, name):
    teacher = tiny_gpt2(1)
    options = {}
    if name == "sinkhorn":
        embedding = teacher.get_input_embeddings().weight
        options = {"embedding": embedding, "epsilon": 0.5, "tolerance": 1e-6}
    runs = [
        trained(
            tiny_gpt2(0),
            arguments(per_device_train_batch_size=b, gradient_accumulation_steps=n),
            train_dataset=texts(),
            data_collator=pad,
            teacher=teacher,
            loss=otkd.get_loss(name, **options),
        )
        for b, n in ((8, 1), (2, 4))
    ]
    torch.testing.assert_close(weights(runs[1].model), weights(runs[0].model), rtol=1e-4, atol=1e-6)
    assert all(
        ("solver/iterations" in run.state.log_history[0]) == (name == "sinkhorn") for run in runs
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_sequence_means_are_over_the_sequences_of_all_microbatches(arguments, weighted):
    examples = texts()
    for index in (1, 4, 5):  # of the microbatches of two one counts nothing
        examples[index]["labels"] = [-100] * len(examples[index]["labels"])
    loss = otkd.KLLoss(reduction="sequence_mean")
    if weighted:
        jsd = otkd.JSDLoss(reduction="sequence_mean")
        loss = otkd.WeightedLoss({"kl": (1.0, loss), "jsd": (1.0, jsd)})
    runs = [
        trained(
            tiny_llama(0),
            arguments(per_device_train_batch_size=b, gradient_accumulation_steps=n),
            train_dataset=examples,
            data_collator=pad,
            teacher=tiny_llama(1),
            loss=loss,
        )
        for b, n in ((8, 1), (2, 4), (3, 3))
    ]
    for run in runs[1:]:
        torch.testing.assert_close(weights(run.model), weights(runs[0].model), rtol=1e-5, atol=1e-7)
        assert logged(run, "loss") == pytest.approx(logged(runs[0], "loss"), rel=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum", "sequence_mean"])
@pytest.mark.parametrize("build", [tiny_bert, tiny_distilbert, tiny_masked_lm])
def test_accumulation_without_labels(arguments, build, reduction):
    runs = [
        trained(
            build(0),
            arguments(
                per_device_train_batch_size=b, gradient_accumulation_steps=n, learning_rate=1e-2
            ),
            train_dataset=texts(labels=False),
            data_collator=pad,
            teacher=build(1),
            loss=otkd.KLLoss(reduction=reduction),
        )
        for b, n in ((8, 1), (3, 3))
    ]
    torch.testing.assert_close(weights(runs[1].model), weights(runs[0].model), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("build", "shift"), [(tiny_llama, 1), (tiny_masked_lm, 0)])
def test_embedded_tokens_without_labels_and_mask_all_count(arguments, build, shift):
    generator = torch.Generator().manual_seed(0)
    examples = [
        {"inputs_embeds": torch.randn(length, WIDTH, generator=generator)}
        for length in (6, 6, 3, 3)  # two microbatches, each of one length
    ]
    values = []
    with torch.no_grad():
        for example in examples:
            q, p = (build(seed).eval()(inputs_embeds=example["inputs_embeds"][None]).logits
                    for seed in (0, 1))  # fmt: skip
            count = q.shape[1] - shift
            values.append(otkd.functional.kl_divergence(q[0, :count], p[0, :count]))
    trainer = trained(
        build(0),
        arguments(per_device_train_batch_size=2, gradient_accumulation_steps=2),
        train_dataset=examples,
        data_collator=lambda rows: {
            "inputs_embeds": torch.stack([row["inputs_embeds"] for row in rows])
        },
        teacher=build(1),
        loss=otkd.KLLoss(),
    )
    expected = torch.cat(values).mean().item()
    assert logged(trainer, "loss") == [pytest.approx(expected, rel=1e-4)]


# What the loss is called with


def expected_kl(student, teacher, batch, counted):
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        q = log_softmax(student(**inputs).logits[:, :-1], -1)
        p = log_softmax(teacher.eval()(**inputs).logits[:, :-1], -1)
    rows = kl_div(q, p, log_target=True, reduction="none").sum(-1)
    return (rows * counted).sum() / counted.sum()


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("labels", [True, False])
def test_causal_lm_pairs_logits_with_the_next_label(arguments, build, labels):
    student, teacher, examples = build(0), build(1), texts(labels=labels)
    batch = pad(examples)
    counted = (batch["labels"] != -100 if labels else batch["attention_mask"] == 1)[:, 1:]
    expected = expected_kl(student, teacher, batch, counted)
    trainer = trained(
        student,
        arguments(per_device_train_batch_size=8),
        train_dataset=examples,
        data_collator=pad,
        teacher=teacher,
        loss=otkd.KLLoss(),
    )
    assert logged(trainer, "loss")[0] == pytest.approx(expected.item(), rel=1e-5)


def test_hard_labels_are_shifted_once(arguments):
    student, examples = tiny_llama(0), texts()
    with torch.no_grad():
        expected = student(**pad(examples)).loss
    trainer = trained(
        student,
        arguments(per_device_train_batch_size=8),
        train_dataset=examples,
        data_collator=pad,
        loss=otkd.get_loss("ce"),
    )
    assert logged(trainer, "loss")[0] == pytest.approx(expected.item(), rel=1e-5)


def test_labels_shifted_by_the_collator_are_not_shifted_again(arguments):
    def shifted(features):
        batch = pad(features)
        labels = nn.functional.pad(batch.pop("labels"), (0, 1), value=-100)[:, 1:]
        return batch | {"shift_labels": labels}

    runs = [
        trained(
            tiny_llama(0),
            arguments(gradient_accumulation_steps=2),
            train_dataset=texts(),
            data_collator=collator,
            teacher=tiny_llama(1),
            loss=mixed_loss(),
        )
        for collator in (pad, shifted)
    ]
    torch.testing.assert_close(weights(runs[1].model), weights(runs[0].model))


def test_without_labels_padding_on_either_side_is_not_counted(arguments):
    runs = [
        trained(
            tiny_llama(0),
            arguments(),
            train_dataset=texts(labels=False),
            data_collator=collator,
            teacher=tiny_llama(1),
            loss=otkd.KLLoss(),
        )
        for collator in (pad, pad_left)
    ]
    assert logged(runs[1], "loss") == pytest.approx(logged(runs[0], "loss"), rel=1e-4)


def test_encoder_decoder_gets_its_decoder_input_but_no_labels(arguments):
    student, teacher, examples = tiny_t5(0), tiny_t5(1), texts()
    batch = pad(examples)
    with torch.no_grad():
        q, p = (log_softmax(m.eval()(**batch).logits, -1) for m in (student, teacher))
    counted = batch["labels"] != -100
    rows = kl_div(q, p, log_target=True, reduction="none").sum(-1)
    seen = []
    student.register_forward_pre_hook(lambda _, __, kw: seen.append(set(kw)), with_kwargs=True)
    trainer = trained(
        student,
        arguments(per_device_train_batch_size=2, gradient_accumulation_steps=4),
        train_dataset=examples,
        data_collator=pad,
        teacher=teacher,
        loss=otkd.KLLoss(),
    )
    expected = (rows[counted].sum() / counted.sum()).item()
    assert logged(trainer, "loss")[0] == pytest.approx(expected, rel=1e-4)
    assert seen[0] == {"input_ids", "attention_mask", "decoder_input_ids", "use_cache"}


def test_the_teacher_gets_inputs_that_the_student_does_not_read(arguments):
    student, teacher, examples = tiny_distilbert(), tiny_bert(1), sentences()
    for example in examples:
        example["token_type_ids"] = [1] * len(example["input_ids"])
        example["text"] = "unused"
    seen = {}
    for name, model in (("student", student), ("teacher", teacher)):
        model.register_forward_pre_hook(
            lambda _, __, kw, name=name: seen.update({name: set(kw)}), with_kwargs=True
        )
    trained(
        student,
        arguments(),
        train_dataset=examples,
        data_collator=pad,
        teacher=teacher,
        loss=otkd.KLLoss(),
    )
    assert seen["student"] == {"input_ids", "attention_mask"}
    assert seen["teacher"] == {"input_ids", "attention_mask", "token_type_ids"}


class Hints(nn.Module):
    """Squared distance of projected features."""

    needs_features = True

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.projection = nn.Linear(WIDTH, WIDTH)

    def forward(
        self,
        student_logits,
        teacher_logits,
        *,
        student_features,
        teacher_features,
        labels=None,
        mask=None,
        num_items_in_batch=None,
    ):
        assert student_features.shape[:-1] == student_logits.shape[:-1]
        assert not teacher_features.requires_grad
        return (self.projection(student_features) - teacher_features).square().mean()


@pytest.mark.parametrize(("build", "examples"), [(tiny_bert, sentences()), (tiny_llama, texts())])
def test_features_and_the_parameters_of_a_loss(arguments, build, examples):
    options = {"optim": "adamw_torch", "num_train_epochs": 2, "save_steps": 3}
    losses, finals = [], []
    for resume in (False, True):
        args = arguments(**options, save_strategy="no" if resume else "steps")
        trainer = DistillationTrainer(
            build(0),
            args,
            train_dataset=examples,
            data_collator=pad,
            teacher=build(1),
            loss=Hints(),
        )
        start = weights(trainer.loss)
        checkpoint = os.path.join(args.output_dir, "checkpoint-3")
        trainer.train(resume_from_checkpoint=checkpoint if resume else None)
        assert not torch.equal(weights(trainer.loss), start)
        losses.append(weights(trainer.loss))
        finals.append(weights(trainer.model))
    assert "loss.pt" in os.listdir(checkpoint)
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(finals[1], finals[0])


def test_a_learnable_cost_learns(arguments):
    teacher = tiny_llama(1)
    embedding = nn.Parameter(teacher.get_input_embeddings().weight.detach().clone())
    cost = otkd.costs.EmbeddingCost(embedding, learnable=True)
    loss = otkd.SinkhornLoss(cost, epsilon=0.5)
    start = weights(loss)
    trained(
        tiny_llama(0),
        arguments(learning_rate=0.01),
        train_dataset=texts(),
        data_collator=pad,
        teacher=teacher,
        loss=loss,
    )
    assert not torch.equal(weights(loss), start)


def test_gradients_of_a_loss_do_not_pile_up(arguments):
    class Norms(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            norms.append(loss.projection.weight.grad.norm().item())

    norms, loss = [], Hints()
    trained(
        tiny_bert(0),
        arguments(learning_rate=1e-9, num_train_epochs=3, per_device_train_batch_size=8),
        train_dataset=sentences(),
        data_collator=pad,
        teacher=tiny_bert(1),
        loss=loss,
        callbacks=[Norms()],
    )
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-4)


# Stored teachers


@pytest.mark.parametrize("kind", ["tensor", "half", "column"])
@pytest.mark.parametrize(("build", "examples"), [(tiny_bert, sentences()), (tiny_llama, texts())])
def test_stored_logits_train_as_their_teacher_does(arguments, build, examples, kind):
    logits = stored_logits(build(1), examples)
    if kind == "half":
        logits = logits.half()
    stored, dataset = {"teacher": logits}, examples
    if kind == "half":
        stored["teacher"] = DenseTeacher(logits)
    elif kind == "column":
        stored, dataset = {}, []
        for row, example in zip(logits, examples, strict=True):
            own = row[: len(example["input_ids"])] if row.ndim == 2 else row
            dataset.append(example | {"teacher_logits": own.tolist()})
    options = {"train_sampling_strategy": "random", "num_train_epochs": 2}
    live, cached = (
        trained(
            build(0),
            arguments(**options),
            train_dataset=data,
            data_collator=pad,
            loss=mixed_loss(),
            **teacher,
        )
        for data, teacher in ((examples, {"teacher": build(1)}), (dataset, stored))
    )
    tolerance = {"rtol": 1e-2, "atol": 1e-3} if kind == "half" else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(weights(cached.model), weights(live.model), **tolerance)
    assert logged(cached, "loss") == pytest.approx(logged(live, "loss"), rel=1e-3)


class Echo(nn.Module):
    """A student whose logits say which example it reads: the first token."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(CLASSES))

    def forward(self, input_ids, labels=None):
        return {"logits": self.bias + input_ids[:, :1]}


class Pairs(nn.Module):
    """Keeps which example met which stored row."""

    def __init__(self):
        super().__init__()
        self.met = []

    def forward(self, student_logits, teacher_logits, **options):
        self.met.append(torch.stack([student_logits[:, 0].detach(), teacher_logits[:, 0]]))
        return student_logits.sum() * 0


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
@pytest.mark.parametrize("hub", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_example_meets_its_own_row(arguments, strategy, hub, workers):
    count = 24
    examples = [
        {"input_ids": [i] + [1] * (i * 7 % 11), "labels": 0, "text": "unused"} for i in range(count)
    ]
    dataset = pytest.importorskip("datasets").Dataset.from_list(examples) if hub else examples
    loss = Pairs()
    DistillationTrainer(
        Echo(),
        arguments(
            train_sampling_strategy=strategy,
            dataloader_num_workers=workers,
            num_train_epochs=1 if workers else 2,
            gradient_accumulation_steps=2,
        ),
        train_dataset=dataset,
        data_collator=pad,
        teacher=torch.arange(count).float()[:, None].expand(count, CLASSES),
        loss=loss,
    ).train()
    student, teacher = torch.cat(loss.met, dim=1)
    torch.testing.assert_close(student, teacher)
    assert sorted(student[:count].tolist()) == list(range(count))
    assert student[:count].tolist() != list(range(count))


def test_stored_logits_too_short_for_a_counted_position_raise(arguments):
    examples = texts()
    trainer = DistillationTrainer(
        tiny_llama(0),
        arguments(),
        train_dataset=examples,
        data_collator=pad,
        teacher=stored_logits(tiny_llama(1), examples)[:, :6],
        loss=otkd.KLLoss(),
    )
    with pytest.raises(ValueError, match="NaN"):
        trainer.train()


@pytest.mark.parametrize("column", [True, False])
def test_stored_logits_and_padding_on_the_left_raise(arguments, column):
    examples = texts()
    logits = stored_logits(tiny_llama(1), examples)
    stored = {"teacher": logits}
    if column:
        stored = {}
        for row, example in zip(logits, examples, strict=True):
            example["teacher_logits"] = row[: len(example["input_ids"])].numpy()
    trainer = DistillationTrainer(
        tiny_llama(0),
        arguments(per_device_train_batch_size=2, train_sampling_strategy="random"),
        train_dataset=examples,
        data_collator=pad_left,
        loss=otkd.KLLoss(),
        **stored,
    )
    with pytest.raises(ValueError, match="padded on the left"):
        trainer.train()


# Evaluation


def accuracy(prediction):
    assert isinstance(prediction.predictions, type(prediction.label_ids))
    return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean()}


def test_evaluation_with_and_without_a_teacher(arguments):
    student, teacher, examples = tiny_bert(0), tiny_bert(1), sentences()
    logits = stored_logits(teacher, examples)
    own = stored_logits(student, examples)
    labels = torch.tensor([example["labels"] for example in examples])
    soft = otkd.KLLoss()(own, logits).item()
    hard = cross_entropy(own, labels).item()
    right = (own.argmax(-1) == labels).float().mean().item()
    cases = [
        ({"teacher": teacher}, soft),
        ({"teacher": logits, "eval_teacher": logits}, soft),
        ({"teacher": logits}, hard),
    ]
    for options, expected in cases:
        trainer = DistillationTrainer(
            student,
            arguments(),
            train_dataset=examples,
            eval_dataset=examples,
            data_collator=pad,
            loss=otkd.KLLoss(),
            compute_metrics=accuracy,
            **options,
        )
        metrics = trainer.evaluate()
        assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
        assert metrics["eval_accuracy"] == pytest.approx(right)


def test_evaluation_of_several_sets_and_of_a_language_model(arguments):
    student, teacher, examples = tiny_gpt2(0), tiny_gpt2(1), texts()
    trainer = DistillationTrainer(
        student,
        arguments(per_device_eval_batch_size=8),
        train_dataset=examples,
        eval_dataset={"soft": examples, "hard": examples},
        data_collator=pad,
        teacher=stored_logits(teacher, examples),
        eval_teacher={"soft": stored_logits(teacher, examples)},
        loss=otkd.KLLoss(),
    )
    metrics = trainer.evaluate()
    batch = pad(examples)
    counted = batch["labels"][:, 1:] != -100
    soft = expected_kl(student, teacher, batch, counted)
    with torch.no_grad():
        hard = student.eval()(**batch).loss
    assert metrics["eval_soft_loss"] == pytest.approx(soft.item(), rel=1e-5)
    assert metrics["eval_hard_loss"] == pytest.approx(hard.item(), rel=1e-5)


@pytest.mark.parametrize("only_losses", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "sequence_mean"])
@pytest.mark.parametrize("build", [tiny_gpt2, tiny_t5, tiny_masked_lm])
def test_evaluation_is_that_of_the_whole_set_at_once(arguments, build, reduction, only_losses):
    student, teacher, examples = build(0), build(1), texts()
    for index in (3, 4):
        examples[index]["labels"] = [-100] * len(examples[index]["labels"])
    metrics = []
    for size in (2, 3, 8):
        trainer = DistillationTrainer(
            student,
            arguments(per_device_eval_batch_size=size, prediction_loss_only=only_losses),
            eval_dataset={"one": examples, "two": examples[:2]},
            data_collator=pad,
            teacher=teacher,
            loss=otkd.KLLoss(reduction=reduction),
            compute_metrics=None if only_losses else lambda _: {"mine": 1.0},
        )
        metrics.append(trainer.evaluate())
        assert ("eval_one_mine" in metrics[-1]) != only_losses
    names = [name for name in metrics[0] if name.endswith(("_loss", "_cross_entropy"))]
    assert len(names) == 4
    for name in names:
        assert [m[name] for m in metrics] == pytest.approx([metrics[-1][name]] * 3, rel=1e-5)
    with torch.no_grad():
        hard = student.eval()(**pad(examples)).loss
    assert metrics[0]["eval_one_cross_entropy"] == pytest.approx(hard.item(), rel=1e-5)


def test_evaluation_where_only_some_have_labels_or_nothing_counts(arguments):
    labelled, student = sentences(), tiny_bert(0)
    unlabelled = [{k: v for k, v in e.items() if k != "labels"} for e in labelled]
    nothing = [example | {"labels": -100} for example in labelled]
    trainer = DistillationTrainer(
        student,
        arguments(),
        eval_dataset=labelled,
        data_collator=pad,
        teacher=tiny_bert(1),
        loss=otkd.KLLoss(),
        compute_metrics=lambda p: {"labels": (p.label_ids != -100).sum().item()},
    )
    expected = trainer.evaluate()
    # Four examples of each kind, in batches of four.
    found = trainer.evaluate([*labelled[:4], *unlabelled[4:]])
    assert found["eval_labels"] == 4
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    assert found["eval_cross_entropy"] != expected["eval_cross_entropy"]
    found = trainer.evaluate([*labelled[:4], *nothing[4:]])
    assert found["eval_loss"] == pytest.approx(trainer.evaluate(labelled[:4])["eval_loss"])
    found = trainer.evaluate(nothing)
    assert math.isnan(found["eval_loss"])
    assert math.isnan(found["eval_cross_entropy"])
    assert "eval_cross_entropy" not in trainer.evaluate(unlabelled)
    with pytest.raises(ValueError, match="batches without labels before batches with labels"):
        trainer.evaluate([*unlabelled[:4], *labelled[4:]])


def test_prediction_without_labels_gives_logits(arguments):
    examples = sentences()
    trainer = DistillationTrainer(
        tiny_bert(0),
        arguments(),
        train_dataset=examples,
        data_collator=pad,
        teacher=tiny_bert(1),
        loss=mixed_loss(),
    )
    unlabelled = [{k: v for k, v in e.items() if k != "labels"} for e in examples]
    output = trainer.predict(unlabelled)
    expected = stored_logits(trainer.model, examples)
    torch.testing.assert_close(torch.from_numpy(output.predictions), expected)
    assert output.label_ids is None


# Checkpoints


@pytest.mark.parametrize("stored", [True, False])
def test_a_resumed_run_ends_as_the_uninterrupted_one(arguments, stored):
    examples, teacher = texts(), tiny_llama(1)
    options = {
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "train_sampling_strategy": "random",
        "num_train_epochs": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "save_steps": 3,
        "seed": 5,
    }
    finals, held = [], {}
    for resume in (False, True):
        args = arguments(**options, save_strategy="no" if resume else "steps")
        trainer = DistillationTrainer(
            tiny_llama(0),
            args,
            train_dataset=examples,
            data_collator=pad,
            teacher=stored_logits(teacher, examples) if stored else teacher,
            loss=mixed_loss(),
        )
        checkpoint = os.path.join(args.output_dir, "checkpoint-3")
        trainer.train(resume_from_checkpoint=checkpoint if resume else None)
        finals.append(weights(trainer.model))
        held = load_file(os.path.join(checkpoint, "model.safetensors"))
    assert torch.equal(finals[1], finals[0])
    assert held.keys() == trainer.model.state_dict().keys()
    files = os.listdir(checkpoint)
    assert [name for name in files if name.endswith(".safetensors")] == ["model.safetensors"]
    assert "loss.pt" not in files
    optimizer = torch.load(os.path.join(checkpoint, "optimizer.pt"), weights_only=True)
    count = len(list(trainer.model.parameters()))
    assert sum(len(group["params"]) for group in optimizer["param_groups"]) == count


def test_the_teacher_stays_out_of_training(arguments):
    class Disturb(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            teacher.train()

    teacher, student = tiny_bert(1, dropout=0.5), tiny_bert(0)
    before = weights(teacher)
    modes = []
    teacher.register_forward_hook(
        lambda module, *_: modes.append((module.training, torch.is_grad_enabled()))
    )
    trained(
        student,
        arguments(),
        train_dataset=sentences(),
        data_collator=pad,
        teacher=teacher,
        loss=otkd.KLLoss(),
        callbacks=[Disturb()],
    )
    assert modes == [(False, False)] * 2
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())
    assert torch.equal(weights(teacher), before)
    assert all(module is not teacher for module in student.modules())


# Logs


def test_terms_and_solver_reports_are_logged_between_logs(arguments):
    loss = otkd.WeightedLoss(
        {"kl": (0.5, otkd.KLLoss()), "ot": (2.0, otkd.BatchSinkhornLoss()), "ce": (0.1, "ce")}
    )
    examples = sentences()
    trainer = trained(
        tiny_bert(0),
        arguments(
            logging_steps=3,  # with an evaluation in between
            num_train_epochs=3,
            gradient_accumulation_steps=2,
            per_device_train_batch_size=2,
            eval_strategy="epoch",
        ),
        train_dataset=examples,
        eval_dataset=examples,
        data_collator=pad,
        teacher=tiny_bert(1),
        loss=loss,
    )
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    for entry in logs:
        total = 0.5 * entry["loss/kl"] + 2 * entry["loss/ot"] + 0.1 * entry["loss/ce"]
        assert entry["loss"] == pytest.approx(total, rel=1e-5)
        assert entry["solver/iterations"] >= 1
        assert 0 <= entry["solver/marginal_error"] < 1
    for entry in trainer.state.log_history:
        if "loss" not in entry:
            assert not any(name.startswith(("loss/", "solver/")) for name in entry)


def test_terms_are_read_only_by_a_log(monkeypatch):
    class Terms(nn.Module):
        last_terms = {"kl": torch.tensor(3.0)}  # noqa: RUF012
        last_report = otkd.ot.sinkhorn(
            torch.ones(2, 4) / 4, torch.ones(2, 4) / 4, torch.eye(4), epsilon=0.1
        )

    def refuse(*_):
        raise AssertionError("waits for the device")

    record = LossRecord()
    with monkeypatch.context() as patch:
        for method in ("item", "tolist", "cpu", "__float__", "__bool__"):
            patch.setattr(torch.Tensor, method, refuse)
        for share in (0.5, 0.25):
            record.add(as_loss(Terms()), share=share, steps=0.5, positions=lambda: torch.tensor(2))
    found = record.take()
    assert list(found) == ["loss/kl", "solver/iterations", "solver/marginal_error"]
    assert found["loss/kl"] == pytest.approx(2.25)
    assert record.take() == {}


# Precision


def test_bfloat16(arguments):
    trainer = trained(
        tiny_llama(0),
        arguments(bf16=True, num_train_epochs=2),
        train_dataset=texts(),
        data_collator=pad,
        teacher=tiny_llama(1),
        loss=mixed_loss(),
    )
    exact = trained(
        tiny_llama(0),
        arguments(num_train_epochs=2),
        train_dataset=texts(),
        data_collator=pad,
        teacher=tiny_llama(1),
        loss=mixed_loss(),
    )
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert logged(trainer, "loss") == pytest.approx(logged(exact, "loss"), rel=0.02)
    assert logged(trainer, "loss") != logged(exact, "loss")


# Errors


def test_construction_errors(arguments):
    examples, student = sentences(), tiny_bert(0)
    logits = torch.zeros(len(examples), CLASSES)
    shared = tiny_bert(1)
    shared.bert.embeddings = student.bert.embeddings
    tied, tying = tiny_bert(1), otkd.KLLoss()
    tying.register_parameter("embedding", tied.get_input_embeddings().weight)
    trainable = otkd.KLLoss()
    trainable.register_parameter("scale", nn.Parameter(torch.ones(())))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    none = otkd.KLLoss(reduction="none")
    cases = [
        ({"loss": "kl", "teacher": logits}, TypeError, "loss module, got str"),
        ({"teacher": "a path"}, TypeError, "got str"),
        ({"loss": torch.nn.KLDivLoss()}, TypeError, "KLDivLoss takes no labels, mask, num_items"),
        ({}, ValueError, "KLLoss needs a teacher"),
        ({"teacher": logits[:5]}, ValueError, "5 entries and the train_dataset 8"),
        ({"teacher": logits, "train_dataset": iter(examples)}, ValueError, "with a length"),
        (
            {"teacher": logits, "eval_dataset": examples, "eval_teacher": logits[:3]},
            ValueError,
            "3 entries and the eval_dataset 8",
        ),
        (
            {"teacher": logits, "eval_dataset": examples, "eval_teacher": {"a": logits}},
            ValueError,
            "must be a dictionary",
        ),
        ({"teacher": logits, "eval_teacher": logits}, ValueError, "eval_dataset with a length"),
        ({"teacher": student}, ValueError, "the teacher is the student"),
        ({"teacher": shared}, ValueError, "shares trainable parameters"),
        ({"teacher": tied, "loss": tying}, ValueError, "shares trainable parameters"),
        ({"teacher": logits, "loss": Hints()}, ValueError, "pass the teacher as a model"),
        ({"teacher": logits, "loss": none}, ValueError, "not return a scalar"),
        ({"teacher": logits, "label_smoothing_factor": 0.1}, ValueError, "whole objective"),
        ({"teacher": logits, "compute_loss_func": sum}, ValueError, "whole objective"),
    ]
    for options, error, message in cases:
        options = {"loss": otkd.KLLoss(), "train_dataset": examples} | options
        smoothing = options.pop("label_smoothing_factor", 0.0)
        args = arguments(label_smoothing_factor=smoothing, max_steps=1)
        with pytest.raises(error, match=message):
            DistillationTrainer(student, args, data_collator=pad, **options)
    trainer = DistillationTrainer(
        student,
        arguments(),
        train_dataset=examples,
        data_collator=pad,
        teacher=logits,
        loss=trainable,
        optimizers=(optimizer, None),
    )
    with pytest.raises(ValueError, match="does not contain the trainable parameters"):
        trainer.train()


def test_a_batch_without_its_teacher_is_refused(arguments):
    examples = texts()
    examples[0]["teacher_logits"] = torch.zeros(9, VOCAB)
    trainer = DistillationTrainer(
        tiny_llama(0),
        arguments(per_device_train_batch_size=1),
        train_dataset=[examples[0], *examples[:0:-1]],
        data_collator=pad,
        loss=otkd.KLLoss(),
    )
    with pytest.raises(ValueError, match="has no 'teacher_logits'"):
        trainer.train()


def test_a_deep_copy_is_a_teacher(arguments):
    student = tiny_bert(0)
    trainer = DistillationTrainer(
        student,
        arguments(),
        train_dataset=sentences(),
        eval_dataset=sentences(),
        data_collator=pad,
        teacher=copy.deepcopy(student),
        loss=otkd.KLLoss(),
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("package", ["transformers", "accelerate"])
def test_a_missing_package_is_named_with_what_to_install(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    for name in [name for name in sys.modules if name.startswith("otkd.integrations")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(
        ImportError, match=rf"{package}, which is not installed: pip install '\.\[train\]'"
    ):
        importlib.import_module("otkd.integrations.transformers")
