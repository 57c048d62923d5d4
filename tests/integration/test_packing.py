"""Packed batches have the value and the gradient of padded ones, also with a stored teacher."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers
from transformers import DataCollatorWithFlattening

import otkd
from otkd.integrations.packing import packed_teacher
from otkd.integrations.transformers import DistillationTrainer
from otkd.teachers import DenseTeacher
from tests.integration.test_trainer import (
    arguments,
    logged,
    mixed_loss,
    pad,
    pad_left,
    stored_logits,
    texts,
    trained,
    weights,
)
from tests.models import VOCAB, WIDTH, tiny_gpt2, tiny_llama

__all__ = ["arguments"]  # a fixture
pytestmark = pytest.mark.usefixtures("seeded")

FLASH = {"return_flash_attn_kwargs": True}


def unmasked(examples):
    return [{k: v for k, v in each.items() if k != "attention_mask"} for each in examples]


def run(args, build, collator, teacher, *, examples=None, loss=None, attention="sdpa", **options):
    examples = texts() if examples is None else examples
    student = build(0)
    for model in (student, teacher):
        if isinstance(model, nn.Module):
            model.set_attn_implementation(attention)
    return trained(
        student,
        args(num_train_epochs=2, **options),
        train_dataset=examples if collator in (pad, pad_left) else unmasked(examples),
        data_collator=collator,
        teacher=teacher,
        loss=mixed_loss() if loss is None else loss,
    )


def assert_same(one, other, *, rtol=1e-4, atol=1e-6):
    torch.testing.assert_close(weights(one.model), weights(other.model), rtol=rtol, atol=atol)
    assert logged(one, "loss") == pytest.approx(logged(other, "loss"), rel=1e-4)


# A teacher that is a model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_packed_batches_train_as_padded_ones(arguments, build, attention):
    packed, padded = (
        run(arguments, build, collator, build(1), attention=attention)
        for collator in (DataCollatorWithFlattening(**FLASH), pad)
    )
    assert_same(packed, padded)


def test_packing_with_accumulation_equals_the_full_batch(arguments):
    runs = [
        run(
            arguments, tiny_llama, DataCollatorWithFlattening(), tiny_llama(1),
            per_device_train_batch_size=size, gradient_accumulation_steps=steps,
        )
        for size, steps in ((8, 1), (2, 4), (3, 3))
    ]  # fmt: skip
    for each in runs[1:]:
        assert_same(each, runs[0])


def test_both_models_get_the_arguments_of_flash_attention(arguments):
    seen = {"student": [], "teacher": []}

    def built(seed, name):
        model = tiny_llama(seed)
        model.model.layers[-1].self_attn.register_forward_pre_hook(
            lambda _, __, given: seen[name].append(given), with_kwargs=True
        )
        return model

    run(
        arguments,
        lambda seed: built(seed, "student"),
        DataCollatorWithFlattening(**FLASH),
        built(1, "teacher"),
    )
    assert len(seen["student"]) == len(seen["teacher"]) == 4
    for given in (*seen["student"], *seen["teacher"]):
        ends, positions = given["cu_seq_lens_q"], given["position_ids"]
        assert ends.dtype == torch.int32
        assert torch.equal(ends, given["cu_seq_lens_k"])
        assert torch.equal(ends[:-1].long(), (positions[0] == 0).nonzero()[:, 0])
        assert given["max_length_q"] == given["max_length_k"] == int(ends.diff().max())


def test_evaluation_of_packed_batches(arguments):
    examples = texts()
    found = []
    for collator in (DataCollatorWithFlattening(), pad):
        rows = examples if collator is pad else unmasked(examples)
        found.append(
            DistillationTrainer(
                tiny_llama(0),
                arguments(per_device_eval_batch_size=3),
                eval_dataset=rows,
                data_collator=collator,
                teacher=tiny_llama(1),
                loss=otkd.KLLoss(),
            ).evaluate()
        )
    for name in ("eval_loss", "eval_cross_entropy"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-5)


# A stored teacher


def as_teacher(kind, logits, examples):
    """The options of a trainer for one kind of stored teacher, and its examples."""
    if kind == "column":
        rows = zip(examples, logits, strict=True)
        return None, [e | {"teacher_logits": x[: len(e["input_ids"])]} for e, x in rows]
    stored = {
        "tensor": lambda: logits,
        "dense": lambda: DenseTeacher(logits),
        "topk": lambda: otkd.TopKTeacher.from_logits(logits, k=5),
        "other": lambda: Rows(logits),
    }
    return stored[kind](), examples


class Rows:
    """A stored teacher that can be indexed by examples alone."""

    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        assert isinstance(index, int | slice | torch.Tensor)
        return Rows(self.values[index])

    def to(self, device, non_blocking=False):
        return self

    def logits(self):
        return self.values


@pytest.mark.parametrize("kind", ["tensor", "dense", "topk", "other", "column"])
def test_packed_examples_find_their_stored_positions(arguments, kind):
    examples = texts()
    logits = stored_logits(tiny_llama(1), examples)
    loss = otkd.KLLoss()
    order = {"train_sampling_strategy": "random"}
    packed, padded = (
        run(arguments, tiny_llama, collator, stored, examples=rows, loss=loss, **order)
        for collator in (DataCollatorWithFlattening(**FLASH), pad)
        for stored, rows in [as_teacher(kind, logits, examples)]
    )
    assert_same(packed, padded)
    if kind != "topk":  # whose tail is one atom
        live = run(arguments, tiny_llama, pad, tiny_llama(1), loss=loss, **order)
        assert_same(packed, live)


def test_stored_features_are_packed_too(arguments):
    class Hints(nn.Module):
        needs_features = True

        def forward(self, student_logits, teacher_logits, *, student_features, teacher_features,
                    labels, mask, num_items_in_batch):  # fmt: skip
            counted = (labels != -100).unsqueeze(-1)
            squares = (student_features - teacher_features).square() * counted
            return squares.sum() / num_items_in_batch

    examples = texts()
    logits = stored_logits(tiny_llama(1), examples)
    features = torch.randn(*logits.shape[:2], WIDTH)
    packed, padded = (
        run(arguments, tiny_llama, collator, DenseTeacher(logits, features), loss=Hints(),
            learning_rate=1e-3)
        for collator in (DataCollatorWithFlattening(), pad)
    )  # fmt: skip
    assert_same(packed, padded)


def test_a_stored_self_term_is_packed_with_its_masses():
    logits = torch.randn(3, 5, VOCAB)
    loss = otkd.SinkhornLoss("discrete", support=otkd.supports.TopK(4))
    stored = loss.with_self_term(otkd.TopKTeacher.from_logits(logits, k=4))
    packed = packed_teacher(stored, torch.tensor([2, 5, 0]))
    student = torch.randn(1, 7, VOCAB)
    expected = loss(
        student, otkd.TopKTeacher.from_logits(torch.cat([logits[0, :2], logits[1]])[None], 4)
    )
    assert packed.self_potential is not None
    torch.testing.assert_close(loss(student, packed), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["tensor", "topk"])
def test_stored_positions_that_are_missing_raise_where_they_count(arguments, kind):
    examples = texts()
    logits = stored_logits(tiny_llama(1), examples)[:, :6]
    stored, _ = as_teacher(kind, logits, examples)
    with pytest.raises(ValueError, match="NaN"):
        run(arguments, tiny_llama, DataCollatorWithFlattening(), stored, loss=otkd.KLLoss())


def test_other_packings_and_stored_rows_without_positions_are_refused(arguments):
    class Reversed(DataCollatorWithFlattening):
        def __call__(self, features, **options):
            return super().__call__(features[::-1], **options)

    examples = texts()
    logits = stored_logits(tiny_llama(1), examples)
    with pytest.raises(ValueError, match="not into one row of all their tokens in order"):
        run(arguments, tiny_llama, Reversed(), logits)
    with pytest.raises(ValueError, match="without positions"):
        run(arguments, tiny_llama, DataCollatorWithFlattening(), logits[:, 0])


# What packing refuses


def test_a_mean_over_sequences_of_a_packed_row_is_refused(arguments):
    loss = otkd.KLLoss(reduction="sequence_mean")
    with pytest.raises(ValueError, match="one sequence"):
        run(arguments, tiny_llama, DataCollatorWithFlattening(), tiny_llama(1), loss=loss)


def test_a_model_that_does_not_read_where_documents_start_is_refused(arguments):
    config = transformers.BloomConfig(vocab_size=VOCAB, hidden_size=8, n_layer=1, n_head=2)
    bloom = transformers.BloomForCausalLM(config)
    collator = DataCollatorWithFlattening()
    with pytest.raises(ValueError, match="BloomForCausalLM gets none of position_ids"):
        run(arguments, tiny_llama, collator, bloom)
    without = DataCollatorWithFlattening(return_position_ids=False)
    with pytest.raises(ValueError, match="LlamaForCausalLM gets none of position_ids"):
        run(arguments, tiny_llama, without, tiny_llama(1))


# Padding on the left


@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("labels", [True, False])
def test_padding_on_the_left_trains_as_on_the_right(arguments, labels, shifted):
    def collate(rows, inner):
        batch = inner(rows)
        if shifted and labels:
            given = batch.pop("labels")
            batch["shift_labels"] = nn.functional.pad(given, (0, 1), value=-100)[:, 1:]
        return batch

    examples = texts(labels=labels)
    if labels:  # no prompt: padding would predict the first token
        examples = [each | {"labels": each["input_ids"]} for each in examples]
    left, right = (
        trained(
            tiny_llama(0),
            arguments(num_train_epochs=2),
            train_dataset=examples,
            data_collator=lambda rows, inner=inner: collate(rows, inner),
            teacher=tiny_llama(1),
            loss=otkd.KLLoss(),
        )
        for inner in (pad_left, pad)
    )
    assert_same(left, right)
