"""Which models the trainer trains, as their own loss does, and which it refuses by name."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

pytest.importorskip("transformers")

import transformers
from transformers import Trainer, TrainingArguments

import otkd
from otkd.integrations.transformers import DistillationTrainer
from tests.integration.kind_models import (
    BERT,
    DECODERS,
    ENCODER_DECODERS,
    FSMT,
    MIXTURES,
    OTHERS,
    REFUSED,
    built,
    causal_text,
    sequence,
)
from tests.models import CLASSES, PLAIN_TRAINING, VOCAB, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture
def arguments(tmp_path):
    def build(**options):
        defaults = {
            **PLAIN_TRAINING,
            "output_dir": str(tmp_path),
            "train_sampling_strategy": "sequential",
            "max_steps": 1,
            "dataloader_pin_memory": False,
        }
        return TrainingArguments(**(defaults | options))

    return build


def examples(batch):
    """The rows of a batch, as they are."""
    size = len(next(iter(batch.values())))
    return [{name: values[i] for name, values in batch.items()} for i in range(size)]


def stack(rows):
    return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}


def one_step(student, args, batch, loss, **options):
    trainer = DistillationTrainer(
        student,
        args(per_device_train_batch_size=len(next(iter(batch.values())))),
        train_dataset=examples(batch),
        data_collator=stack,
        loss=loss,
        **options,
    )
    trainer.train()
    return trainer


def logged(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def kl(student_logits, teacher_logits, counted):
    log_q, log_p = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    rows = (log_p.exp() * (log_p - log_q)).sum(-1)
    return ((rows * counted).sum() / counted.sum()).item()


def forward(model, batch):
    """As the model itself does it, with its labels.

    T5Gemma masks padding in its decoder only if it has no cache, as in training.
    """
    with torch.no_grad():
        return copy.deepcopy(model).train()(**batch)


# What is trained


def check_kind(arguments, build, batch, shift):
    student, teacher = build(0), build(1)
    own, theirs = forward(student, batch), forward(teacher, batch)
    labels, logits, teacher_logits = batch["labels"], own.logits, theirs.logits
    if shift:
        labels, logits, teacher_logits = labels[:, 1:], logits[:, :-1], teacher_logits[:, :-1]
    trainer = one_step(
        student,
        arguments,
        batch,
        otkd.WeightedLoss({"kl": (1.0, otkd.KLLoss()), "ce": (1.0, "ce")}),
        teacher=teacher,
    )
    assert logged(trainer, "loss/ce")[0] == pytest.approx(own.loss.item(), rel=1e-4)
    expected = kl(logits, teacher_logits, labels != -100)
    assert expected > 1e-5
    assert logged(trainer, "loss/kl")[0] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("kind", ENCODER_DECODERS)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of the composed models' own loss
def test_encoder_decoders_derive_their_input_as_they_do_themselves(arguments, kind):
    build, batch = ENCODER_DECODERS[kind]
    check_kind(arguments, build, batch(), shift=False)


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_are_trained_as_their_own_loss_does(arguments, kind):
    build, batch, shift = OTHERS[kind]
    check_kind(arguments, build, batch(), shift)


def test_each_encoder_decoder_derives_its_own_input(arguments):
    """A teacher of another family has another first token of its decoder."""
    student, batch = ENCODER_DECODERS["m2m100"]
    teacher, _ = ENCODER_DECODERS["mbart"]
    student, teacher, batch = student(0), teacher(1), batch()
    expected = kl(
        forward(student, batch).logits, forward(teacher, batch).logits, batch["labels"] != -100
    )
    trainer = one_step(student, arguments, batch, otkd.KLLoss(), teacher=teacher)
    assert logged(trainer)[0] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("kind", ["m2m100", "bart"])
def test_decoder_inputs_of_the_collator_are_kept(arguments, kind):
    build, batch = ENCODER_DECODERS[kind]
    student, teacher = build(0), build(1)
    batch = batch() | {"decoder_input_ids": torch.randint(3, VOCAB, (3, 5))}
    expected = kl(
        forward(student, batch).logits, forward(teacher, batch).logits, batch["labels"] != -100
    )
    trainer = one_step(student, arguments, batch, otkd.KLLoss(), teacher=teacher)
    assert logged(trainer)[0] == pytest.approx(expected, rel=1e-3)


def test_labels_that_a_model_changes_in_place_are_kept(arguments):
    """FSMT replaces −100 by padding in the labels from which it derives its decoder's input."""
    build, batch = FSMT
    student, teacher, batch = build(0), build(1), batch()
    labels = batch["labels"]
    # Its own loss would read the source text instead of the labels.
    derived = student.prepare_decoder_input_ids_from_labels(labels.clone())
    given = batch | {"decoder_input_ids": derived}
    own, theirs = forward(student, given).logits, forward(teacher, given).logits
    terms = {"kl": (1.0, otkd.KLLoss()), "ce": (1.0, "ce")}
    trainer = one_step(student, arguments, batch, otkd.WeightedLoss(terms), teacher=teacher)
    assert (labels == -100).any()
    assert logged(trainer, "loss/kl")[0] == pytest.approx(kl(own, theirs, labels != -100), rel=1e-3)
    hard = cross_entropy(own.flatten(0, 1), labels.flatten())
    assert logged(trainer, "loss/ce")[0] == pytest.approx(hard.item(), rel=1e-4)


# Mixtures of experts


@pytest.mark.parametrize("kind", MIXTURES)
def test_the_auxiliary_loss_of_experts_is_added_as_the_plain_trainer_adds_it(arguments, kind):
    build, batch = MIXTURES[kind]
    batch = batch()
    # Without padding in the labels: the plain Trainer counts items before the shift.
    batch["labels"] = batch["labels"].clamp(min=0)
    student = build(0)
    student.config.output_router_logits = True
    if kind == "switch":  # reads its argument alone
        student.forward = functools.partial(student.forward, output_router_logits=True)
    plain = Trainer(
        copy.deepcopy(student),
        arguments(per_device_train_batch_size=3),
        train_dataset=examples(batch),
        data_collator=stack,
    )
    own = forward(student, batch).loss.item()
    trainer = one_step(student, arguments, batch, otkd.get_loss("ce"))
    plain.train()
    assert logged(trainer)[0] == pytest.approx(own, rel=1e-4)
    assert logged(trainer, "loss/auxiliary")[0] > 1e-4
    torch.testing.assert_close(weights(trainer.model), weights(plain.model), rtol=1e-4, atol=1e-6)


def test_the_auxiliary_losses_of_microbatches_are_averaged(arguments):
    build, batch = MIXTURES["mixtral"]
    batch = {name: torch.cat([values, values]) for name, values in batch().items()}
    runs = []
    for size, steps in ((6, 1), (3, 2)):
        student = build(0)
        student.config.output_router_logits = True
        trainer = DistillationTrainer(
            student,
            arguments(per_device_train_batch_size=size, gradient_accumulation_steps=steps),
            train_dataset=examples(batch),
            data_collator=stack,
            teacher=build(1),
            loss=otkd.KLLoss(),
        )
        trainer.train()
        runs.append((trainer, weights(student)))
    torch.testing.assert_close(runs[1][1], runs[0][1], rtol=1e-4, atol=1e-6)
    for name in ("loss", "loss/auxiliary"):
        assert logged(runs[1][0], name) == pytest.approx(logged(runs[0][0], name), rel=1e-4)


def test_a_penalty_of_the_logits_is_added(arguments):
    """As Bamba has it."""
    student, batch = tiny_llama(0), causal_text()
    student.z_loss_coefficient = 0.5
    own = forward(student, batch)
    expected = own.loss + 0.5 * own.logits.logsumexp(-1).square().mean()
    trainer = one_step(student, arguments, batch, otkd.get_loss("ce"))
    assert logged(trainer)[0] == pytest.approx(expected.item(), rel=1e-4)


# Refused before training


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("kind", REFUSED)
def test_models_without_logits_of_classes_are_refused_by_name(arguments, kind, role):
    build, words = REFUSED[kind]
    model = build(0)
    models = {"model": model, "teacher": tiny_gpt2(1)}
    if role == "teacher":
        if kind == "two heads":
            pytest.skip("a second head does no harm in a teacher")
        models = {"model": tiny_gpt2(0), "teacher": model}
    with pytest.raises(ValueError, match=rf"(?s)the {role} {type(model).__name__}.*{words}"):
        DistillationTrainer(args=arguments(), train_dataset=[{}], loss=otkd.KLLoss(), **models)


class Own(nn.Module):
    """A module of one's own, whose forward names no labels."""

    def __init__(self, shape, give=lambda logits: logits, classes=VOCAB):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, classes)
        self.shape, self.give = shape, give

    def forward(self, input_ids):
        return self.give(self.embedding(input_ids).reshape(len(input_ids), *self.shape))


@pytest.mark.parametrize(
    ("shape", "give", "words"),
    [
        ((7, VOCAB), lambda x: (x, x), "returns no logits, but a tuple"),
        ((7, VOCAB), lambda x: {"out": x, "aux": x}, "returns no logits, but out, aux"),
        ((7, VOCAB), lambda x: {"logits": x, "box_logits": x}, "box_logits besides logits"),
        ((7, VOCAB), lambda x: {"logits": (x, x)}, "must be a tensor, got tuple"),
        ((7, VOCAB), lambda x: x[..., :1], "one class"),
        ((7, VOCAB), lambda x: x[:, 0, 0], "one number per example"),
        ((7, 1, VOCAB), lambda x: x, "4 dimensions"),
    ],
)
def test_outputs_that_are_no_logits_are_refused_at_the_first_batch(arguments, shape, give, words):
    student = Own(shape, give)
    before = weights(student)
    batch = {"input_ids": causal_text()["input_ids"]}
    with pytest.raises(ValueError, match=words):
        one_step(student, arguments, batch, otkd.KLLoss(), teacher=Own(shape, give))
    assert torch.equal(weights(student), before)


@pytest.mark.parametrize("loss", ["kl", "sinkd"])
@pytest.mark.parametrize(
    ("labels", "error", "words"),
    [
        (torch.tensor([0, 1, CLASSES]), ValueError, "1 labels are not a class of the student Bert"),
        (torch.tensor([0, 1, -1]), ValueError, "the first is -1"),
        (torch.tensor([0.0, 1.0, 2.0]), TypeError, "integer class indices, got torch.float32"),
        (torch.rand(3, CLASSES), TypeError, "soft labels"),
        (torch.zeros(3, CLASSES).long(), ValueError, "soft labels and several labels"),
        (torch.zeros(3, 7).long(), ValueError, "one label per example"),
    ],
)
def test_labels_that_are_no_classes_are_refused(arguments, loss, labels, error, words):
    student = tiny_bert(0)
    before = weights(student)
    with pytest.raises(error, match=words):
        one_step(
            student, arguments, sequence() | {"labels": labels}, otkd.get_loss(loss),
            teacher=tiny_bert(1),
        )  # fmt: skip
    assert torch.equal(weights(student), before)


@pytest.mark.parametrize("build", [tiny_llama, tiny_t5, ENCODER_DECODERS["m2m100"][0]])
def test_tokens_out_of_range_are_refused_before_they_are_embedded(arguments, build):
    batch = causal_text()
    batch["labels"][0, 3] = VOCAB
    with pytest.raises(
        ValueError, match=f"the first is {VOCAB}. Labels must be whole numbers from 0"
    ):
        one_step(build(0), arguments, batch, otkd.KLLoss(), teacher=build(1))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_labels_of_other_integers_are_classes_too(arguments, dtype):
    losses = []
    for labels in (sequence()["labels"], sequence()["labels"].to(dtype)):
        trainer = one_step(
            tiny_bert(0), arguments, sequence() | {"labels": labels}, otkd.SinKDLoss(),
            teacher=tiny_bert(1),
        )  # fmt: skip
        losses.append(logged(trainer)[0])
    assert losses[0] == pytest.approx(losses[1])


def test_hard_labels_of_a_loss_of_its_own():
    logits = torch.randn(4, 3)
    labels = torch.tensor([0, 2, -100, 1])
    expected = cross_entropy(logits, labels)
    for dtype in (torch.int8, torch.int32, torch.int64):
        torch.testing.assert_close(otkd.get_loss("ce")(logits, labels=labels.to(dtype)), expected)
    for wrong in (3, -1):
        with pytest.raises(ValueError, match=f"the first is {wrong}"):
            otkd.get_loss("ce")(logits, labels=labels.where(labels != 2, wrong))
    with pytest.raises(TypeError, match=r"integer class indices, got torch\.float64"):
        otkd.get_loss("ce")(logits, labels=labels.double())
    # A class that does not count may have any name.
    otkd.get_loss("ce")(logits, labels=labels.where(labels != 2, 7), mask=labels != 2)


# Two kinds of models, two vocabularies, two orders of the classes


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (tiny_gpt2(0), built("BertForMaskedLM", **BERT)),
        (built("BertForMaskedLM", **BERT), tiny_llama(1)),
        (tiny_llama(0), tiny_t5(1)),
        (tiny_t5(0), tiny_gpt2(1)),
        (tiny_t5(0), built("BertForMaskedLM", **BERT)),
        (tiny_gpt2(0), tiny_bert(1)),
    ],
)
def test_a_teacher_that_predicts_another_token_is_refused(arguments, student, teacher):
    options = {"args": arguments(), "train_dataset": [{}], "loss": otkd.KLLoss()}
    with pytest.raises(ValueError, match=r"at each position the student \w+ predicts .*shift="):
        DistillationTrainer(student, teacher=teacher, **options)
    DistillationTrainer(student, teacher=teacher, shift=False, **options)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (tiny_llama(0), tiny_llama(1, vocab=VOCAB + 21)),
        (built("BertForMaskedLM", **BERT), built("BertForMaskedLM", **BERT | {"vocab_size": 50})),
        (tiny_gpt2(0), tiny_llama(1, vocab=50)),
        (tiny_t5(0), built("T5ForConditionalGeneration", vocab_size=50, d_model=16, d_kv=8,
                           d_ff=16, num_layers=1, num_heads=2)),
    ],
)  # fmt: skip
def test_a_teacher_of_another_tokenizer_is_refused(arguments, student, teacher):
    options = {"args": arguments(), "train_dataset": [{}], "teacher": teacher}
    bridging = [otkd.UniversalLogitLoss(),
                otkd.WeightedLoss({"uld": (1.0, "uld"), "ce": (1.0, "ce")})]  # fmt: skip
    for loss in bridging:
        with pytest.raises(ValueError, match=r"29 tokens and the teacher \w+ 50.*same input_ids"):
            DistillationTrainer(student, loss=loss, **options)
    # Padding of one vocabulary, as the loss says.
    DistillationTrainer(student, loss=otkd.KLLoss(vocab_size=VOCAB), **options)
    DistillationTrainer(student, loss=otkd.UniversalLogitLoss(vocab_size=VOCAB), **options)


@pytest.mark.parametrize("kind", ["whisper", "marian", "vision-encoder-decoder"])
def test_a_decoder_of_another_tokenizer_is_refused(arguments, kind):
    """Student and teacher read the same sound, image or text, but the labels are the student's."""
    model, batch = DECODERS[kind]
    batch, padded = batch(), otkd.KLLoss(vocab_size=VOCAB)
    with pytest.raises(ValueError, match=r"29 tokens and the teacher \w+ 50.*same labels"):
        one_step(model(VOCAB), arguments, batch, otkd.UniversalLogitLoss(), teacher=model(50))
    one_step(model(VOCAB), arguments, batch, padded, teacher=model(50))
    batch["labels"][0, 0] = 40
    with pytest.raises(ValueError, match=r"50 tokens and the teacher \w+ 29.*same labels"):
        one_step(model(50), arguments, batch, padded, teacher=model(VOCAB))


def test_a_token_that_the_teacher_lacks_is_refused_before_it_reads_it(arguments):
    student = tiny_llama(0, vocab=50)
    batch = causal_text()
    batch["input_ids"][0, 0] = 40
    with pytest.raises(ValueError, match="50 tokens and the teacher GPT2LMHeadModel 29"):
        one_step(student, arguments, batch, otkd.KLLoss(), teacher=tiny_gpt2(1))


def test_classifiers_of_two_tokenizers_are_refused(arguments):
    teacher = built("BertForSequenceClassification", **BERT | {"vocab_size": 50}, num_labels=3)
    with pytest.raises(ValueError, match="resize_token_embeddings"):
        DistillationTrainer(
            tiny_bert(0), arguments(), train_dataset=[{}], teacher=teacher, loss=otkd.KLLoss()
        )
    teacher.resize_token_embeddings(VOCAB)
    one_step(tiny_bert(0), arguments, sequence(), otkd.KLLoss(), teacher=teacher)


@pytest.mark.parametrize(
    ("ours", "theirs", "moved"),
    [
        (("no", "maybe", "yes"), ("yes", "maybe", "no"), True),
        (("no", "maybe", "yes"), ("MAYBE", "No", "yes"), True),
        (("not-x", "x", "y"), ("z", "not x", "w"), True),
        (("no", "maybe", "yes"), ("No", "maybe", "YES"), False),
        (("no", "maybe", "yes"), ("negative", "neutral", "positive"), False),
        (("no", "maybe", "yes"), ("LABEL_0", "LABEL_1", "LABEL_2"), False),
    ],
)
def test_classes_in_another_order_are_refused(arguments, ours, theirs, moved):
    student, teacher = tiny_bert(0), tiny_bert(1)
    student.config.id2label = dict(enumerate(ours))
    teacher.config.id2label = dict(enumerate(theirs))
    options = {"train_dataset": [{}], "teacher": teacher, "loss": otkd.KLLoss()}
    if not moved:
        DistillationTrainer(student, arguments(), **options)
        return
    with pytest.raises(ValueError, match="in a different order"):
        DistillationTrainer(student, arguments(), **options)


# Labels that no forward pass names


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("name", ["labels", "shift_labels", "tags"])
def test_labels_count_where_no_model_names_them(arguments, stored, name):
    student, teacher = Own((7, VOCAB)), Own((7, VOCAB))
    batch = causal_text()
    inputs, labels = {"input_ids": batch["input_ids"]}, batch["labels"]
    with torch.no_grad():
        logits, teacher_logits = student(**inputs), teacher(**inputs)
    trainer = DistillationTrainer(
        student,
        arguments(per_device_train_batch_size=3, label_names=["tags"] if name == "tags" else None),
        train_dataset=examples(inputs | {name: labels}),
        data_collator=stack,
        teacher=teacher_logits if stored else teacher,
        loss=otkd.KLLoss(),
    )
    trainer.train()
    expected = kl(logits, teacher_logits, labels != -100)
    assert logged(trainer)[0] == pytest.approx(expected, rel=1e-4)


class Around(nn.Module):
    """A module of one's own around a model, which hides its class."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, **inputs):
        return {"logits": self.inner(**inputs).logits}


def test_a_module_of_ones_own_is_shifted_as_its_teacher_is(arguments):
    student, teacher, batch = tiny_gpt2(0), tiny_gpt2(1), causal_text()
    found = []
    for model, options in (
        (student, {}),
        (Around(student), {}),
        (Around(student), {"shift": False}),
    ):
        model = copy.deepcopy(model)
        loss = otkd.WeightedLoss({"kl": (1.0, "kl"), "ce": (1.0, "ce")})
        trainer = one_step(model, arguments, batch, loss, teacher=copy.deepcopy(teacher), **options)
        found.append(logged(trainer)[0])
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2] != pytest.approx(found[0], rel=1e-2)


def test_a_forward_pass_that_requires_labels_gets_them(arguments):
    class Requires(Own):
        def forward(self, input_ids, labels):
            assert labels.shape == input_ids.shape
            return super().forward(input_ids)

    batch = {k: v for k, v in causal_text().items() if k != "attention_mask"}
    one_step(Requires((7, VOCAB)), arguments, batch, otkd.KLLoss(), teacher=Requires((7, VOCAB)))


# Wrappers


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **inputs):
        return self.module(*args, **inputs)


class Adapter(nn.Module):
    """As PEFT has it."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model
        self.config = model.config

    def get_base_model(self):
        return self.base_model

    def forward(self, *args, **inputs):
        return self.base_model(*args, **inputs)


class Child(transformers.GPT2LMHeadModel):
    """A class of one's own that no mapping of transformers has."""


def compiled(model):
    return torch.compile(model, backend="eager")


WRAPPERS = {
    "compiled": compiled,
    "adapter": Adapter,
}


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_models_inside_wrappers_are_the_same_models(arguments, wrap):
    runs = []
    for around in (lambda model: model, WRAPPERS[wrap]):
        student, teacher = tiny_gpt2(0), tiny_gpt2(1)
        trainer = one_step(
            around(student), arguments, causal_text(), otkd.KLLoss(), teacher=Adapter(teacher)
        )
        assert trainer.shift
        runs.append((logged(trainer)[0], weights(student)))
    assert runs[1][0] == pytest.approx(runs[0][0], rel=1e-5)
    torch.testing.assert_close(runs[1][1], runs[0][1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "wrap",
    [Wrapper, lambda m: compiled(Wrapper(m)), lambda m: Wrapper(compiled(Adapter(m))),
     torch.optim.swa_utils.AveragedModel, nn.DataParallel],
)  # fmt: skip
def test_wrappers_are_looked_through(wrap):
    from otkd.integrations.models import describe, unwrapped

    model = tiny_gpt2(0)
    found = describe(wrap(model))
    assert found == describe(unwrapped(wrap(model)))
    assert found.shifts
    assert found.name == "GPT2LMHeadModel"


def test_a_class_of_ones_own_is_what_its_parent_is():
    from otkd.integrations.models import describe

    with torch.device("meta"):
        child = Child(transformers.GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1))
    assert describe(child).shifts


def test_prompts_of_virtual_tokens_are_refused(arguments):
    class Prompt(Adapter):
        active_peft_config = type(
            "Config",
            (),
            {"is_prompt_learning": True, "peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4},
        )
        peft_config = {"default": active_peft_config}  # noqa: RUF012

    with pytest.raises(ValueError, match="prompt tuning with 4 virtual tokens"):
        DistillationTrainer(
            Prompt(tiny_gpt2(0)), arguments(), train_dataset=[{}], teacher=tiny_gpt2(1),
            loss=otkd.KLLoss(),
        )  # fmt: skip


# Packed documents


def packed(name):
    """Documents of 3 and 2 tokens in one row, then in the other order."""
    ids = torch.randint(3, VOCAB, (2, 5), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids}
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]])
    batch["position_ids"] = positions
    if name == "seq_idx":
        batch |= {"seq_idx": (positions == 0).long().cumsum(1).int()}
    if name == "attention_mask":
        batch |= {"attention_mask": (positions == 0).long().cumsum(1)}
    counted = (positions != 0)[:, 1:]
    return batch, counted


@pytest.mark.parametrize("labels", [None, "labels", "shift_labels"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_the_first_token_of_a_packed_document_does_not_count(arguments, build, labels):
    student, teacher = build(0), build(1)
    batch, counted = packed("position_ids")
    # With a cache, transformers does not look for packed documents.
    own, theirs = (forward(model, batch | {"use_cache": False}) for model in (student, teacher))
    expected = kl(own.logits[:, :-1], theirs.logits[:, :-1], counted)
    if labels == "labels":
        batch["labels"] = batch["input_ids"]
    elif labels == "shift_labels":
        ids = batch["input_ids"]
        batch["shift_labels"] = nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    trainer = one_step(student, arguments, batch, otkd.KLLoss(), teacher=teacher)
    assert logged(trainer)[0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["position_ids", "seq_idx", "attention_mask", "cu_seq_lens_q"])
def test_documents_are_told_by_any_of_their_marks(name):
    from otkd.integrations.batches import find_targets

    batch, counted = packed(name)
    if name == "cu_seq_lens_q":
        batch = {"input_ids": batch["input_ids"][:1]}
        batch |= {"cu_seq_lens_q": torch.tensor([0, 3, 5], dtype=torch.int32)}
        counted = counted[:1]
    elif name != "position_ids":
        del batch["position_ids"]
    labels, mask = find_targets(batch, shift=True, mask_name="attention_mask")
    assert labels is None
    assert torch.equal(mask != 0, counted)
    ids = batch["input_ids"]
    labels, mask = find_targets(batch | {"labels": ids}, shift=True, mask_name="attention_mask")
    assert mask is None
    assert torch.equal(labels, ids[:, 1:].masked_fill(~counted, -100))


def test_a_model_inside_a_model_sees_packed_documents(arguments):
    """Its cache is set in a configuration of its own, and with it documents see each other."""
    student = OTHERS["vision-language"][0](0)
    inner = student.model.language_model
    teacher = transformers.LlamaForCausalLM(inner.config)
    teacher.model, teacher.lm_head = copy.deepcopy(inner), copy.deepcopy(student.lm_head)
    batch, _ = packed("position_ids")
    for models in ((student, teacher), (teacher, student)):
        student, teacher = map(copy.deepcopy, models)
        trainer = one_step(student, arguments, batch, otkd.KLLoss(), teacher=teacher)
        assert logged(trainer)[0] == pytest.approx(0, abs=1e-6)


def test_a_student_reads_an_evaluation_set_as_its_teacher_does(arguments):
    """The cache of T5Gemma, which it uses in evaluation, changes its masks."""
    build, batch = ENCODER_DECODERS["t5gemma"]
    trainer = DistillationTrainer(
        build(0),
        arguments(per_device_eval_batch_size=3),
        train_dataset=[{}],
        eval_dataset=examples(batch()),
        data_collator=stack,
        teacher=build(0),
        loss=otkd.KLLoss(),
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(0, abs=1e-6)


def test_a_mask_over_pairs_of_tokens_needs_labels(arguments):
    batch = {"input_ids": causal_text()["input_ids"],
             "attention_mask": torch.ones(3, 1, 7, 7).tril().bool()}  # fmt: skip
    with pytest.raises(ValueError, match="a mask over pairs of tokens"):
        one_step(tiny_llama(0), arguments, batch, otkd.KLLoss(), teacher=tiny_llama(1))
    batch["labels"] = causal_text()["labels"]
    one_step(tiny_llama(0), arguments, batch, otkd.KLLoss(), teacher=tiny_llama(1))


def test_shift_of_a_classifier_is_refused(arguments):
    with pytest.raises(ValueError, match="have no positions"):
        one_step(
            tiny_bert(0), arguments, sequence(), otkd.KLLoss(), teacher=tiny_bert(1), shift=True
        )


def test_logits_for_more_positions_than_labels_are_refused(arguments):
    batch = causal_text()
    batch["labels"] = batch["labels"][:, :5]
    with pytest.raises(ValueError, match=r"LlamaForCausalLM returns logits for positions \(3, 6\)"):
        one_step(tiny_llama(0), arguments, batch, otkd.KLLoss(), teacher=tiny_llama(1))


def test_classes_that_are_not_last_are_refused(arguments):
    batch = {"input_ids": torch.randint(VOCAB, (3, 4, 4)), "labels": torch.zeros(3, 4, 4).long()}
    student = Own((4, 4, VOCAB), lambda logits: logits.movedim(-1, 1))
    with pytest.raises(ValueError, match=r"movedim\(1, -1\)"):
        one_step(student, arguments, batch, otkd.KLLoss(), teacher=copy.deepcopy(student))
    right = Own((4, 4, VOCAB))
    one_step(right, arguments, batch, otkd.KLLoss(), teacher=Own((4, 4, VOCAB)))
