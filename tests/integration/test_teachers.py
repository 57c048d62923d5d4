"""Teachers that are models: the student without adapters, mixtures, and one per example."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from transformers import DataCollatorWithFlattening, TrainerCallback

import otkd
from otkd.integrations.adapters import base_model
from otkd.integrations.transformers import DistillationTrainer
from tests.integration.test_trainer import (
    Hints,
    arguments,
    logged,
    mixed_loss,
    pad,
    sentences,
    texts,
    trained,
    weights,
)
from tests.models import VOCAB, tiny_bert, tiny_gpt2, tiny_llama, tiny_masked_lm

__all__ = ["arguments"]  # a fixture
pytestmark = [
    pytest.mark.usefixtures("seeded"),
    # Of peft, and of the older name of an option that every supported version knows.
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
]


def assert_same(one, other, *, rtol=1e-4, atol=1e-6):
    torch.testing.assert_close(weights(one.model), weights(other.model), rtol=rtol, atol=atol)
    assert logged(one, "loss") == pytest.approx(logged(other, "loss"), rel=1e-4)


def run(args, teacher, *, student=None, examples=None, collator=pad, loss=None, **options):
    trainer_options = {
        name: options.pop(name) for name in ("teacher_weights", "callbacks") if name in options
    }
    return trained(
        tiny_llama(0) if student is None else student,
        args(**{"num_train_epochs": 2} | options),
        train_dataset=texts() if examples is None else examples,
        data_collator=collator,
        teacher=teacher,
        loss=mixed_loss() if loss is None else loss,
        **trainer_options,
    )


# The student without its adapters


def with_adapters(model, **config):
    peft = pytest.importorskip("peft")
    config = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | config
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return peft.get_peft_model(model, peft.LoraConfig(**config))


def trained_adapters(**config):
    """A LoRA student that has already moved away from its base model."""
    student = with_adapters(tiny_llama(0), **config)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(4)
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return student


@pytest.mark.parametrize("config", [{}, {"lora_dropout": 0.3}, {"modules_to_save": ["lm_head"]}])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_base_model_is_the_teacher_that_a_copy_of_it_is(arguments, config, checkpointing):
    runs, loss = [], otkd.WeightedLoss({"kl": (1.0, otkd.KLLoss()), "ce": (0.5, "ce")})
    for teacher in ("base_model", tiny_llama(0)):
        runs.append(
            run(
                arguments,
                teacher,
                student=trained_adapters(**config),
                loss=loss,
                gradient_checkpointing=checkpointing,
                weight_decay=0.0,
            )
        )
    assert_same(*runs, rtol=1e-5, atol=1e-7)
    assert logged(runs[0], "loss/kl")[0] > 1e-4
    named = dict(runs[0].model.named_parameters())
    assert all(p.requires_grad == ("lora" in n or "modules_to_save" in n) for n, p in named.items())
    base = dict(tiny_llama(0).named_parameters())
    for name, parameter in runs[0].model.get_base_model().named_parameters():
        if name.replace(".base_layer", "") in base:
            assert torch.equal(parameter, base[name.replace(".base_layer", "")])


def test_without_adapters_there_is_no_dropout_and_everything_is_as_before_afterwards():
    model = with_adapters(tiny_gpt2(0), lora_dropout=0.5, fan_in_fan_out=True).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    model.get_base_model().transformer.ln_f.eval()
    for name, parameter in model.named_parameters():
        if "lora_A" in name and ".0." in name:
            parameter.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    ids = torch.randint(3, VOCAB, (2, 5))
    with base_model(model), torch.no_grad():
        assert not any(module.training for module in model.modules())
        first, second = model(input_ids=ids).logits, model(input_ids=ids).logits
    expected = tiny_gpt2(0).eval()(input_ids=ids).logits
    torch.testing.assert_close(first, expected)
    assert torch.equal(first, second)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    with pytest.raises(ZeroDivisionError), base_model(model):
        _ = 1 / 0
    assert [module.training for module in model.modules()] == modes
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_the_base_model_runs_without_gradient_and_without_a_copy(arguments):
    student = trained_adapters()
    seen = []
    student.get_base_model().register_forward_hook(
        lambda module, *_: seen.append((module.training, torch.is_grad_enabled()))
    )
    trainer = run(arguments, "base_model", student=student, num_train_epochs=1)
    assert seen == [(False, False), (True, True)] * 2
    assert trainer.teacher == "base_model"
    held = [m for m in vars(trainer).values() if isinstance(m, nn.Module) and m is not student]
    assert not any(isinstance(module, nn.Embedding) for m in held for module in m.modules())
    assert trainer.evaluate(texts())["eval_loss"] > 0


def test_accumulation_with_adapters_equals_the_full_batch(arguments):
    runs = [
        run(
            arguments, "base_model", student=trained_adapters(),
            per_device_train_batch_size=size, gradient_accumulation_steps=steps,
        )
        for size, steps in ((8, 1), (2, 4))
    ]  # fmt: skip
    assert_same(*runs, rtol=1e-5, atol=1e-7)


def test_a_base_model_that_does_not_exist_or_is_trained_is_refused(arguments):
    options = {"args": arguments(), "train_dataset": texts(), "loss": otkd.KLLoss()}
    with pytest.raises(ValueError, match="LlamaForCausalLM is not a PeftModel"):
        DistillationTrainer(tiny_llama(0), teacher="base_model", **options)
    student = with_adapters(tiny_gpt2(0), bias="all", fan_in_fan_out=True)
    with (
        pytest.warns(UserWarning, match="disabling adapter layers with bias"),
        pytest.raises(ValueError, match=r"own parameters are trained too, such as .*bias"),
    ):
        DistillationTrainer(student, teacher="base_model", **options)
    with pytest.raises(TypeError, match=r'"base_model".*got str'):
        DistillationTrainer(with_adapters(tiny_llama(0)), teacher="base", **options)


# Mixtures


def mixture(teachers, shares, temperature, batch):
    """Logits of the mean of the tempered distributions, as it is defined."""
    total = 0
    with torch.no_grad():
        for teacher, share in zip(teachers, shares, strict=True):
            logits = teacher.eval()(**batch).logits.double()
            total = total + share * (logits / temperature).softmax(-1)
    return temperature * total.log()


SHARES = [0.6, 0.3, 0.1]


@pytest.mark.parametrize("temperatures", [(1.0, None), (2.0, None), (2.0, 0.5)])
@pytest.mark.parametrize("name", ["kl", "jsd", "tvd", "sinkhorn"])
def test_a_mixture_is_one_of_the_tempered_distributions(arguments, name, temperatures):
    temperature, own = temperatures
    options = {"temperature": temperature, "teacher_temperature": own}
    if name == "sinkhorn":
        options["cost"] = "discrete"
    loss = otkd.get_loss(name, **options)
    teachers, examples = [tiny_llama(1), tiny_gpt2(2), tiny_llama(3)], texts()
    with torch.no_grad():  # the more peaked they are, the more their temperature matters
        teachers[0].lm_head.weight.mul_(8)
        teachers[2].lm_head.weight.mul_(8)
    batch = pad(examples)
    labels = batch.pop("labels")[:, 1:]
    logits = mixture(teachers, SHARES, own or temperature, batch)[:, :-1].float()
    with torch.no_grad():
        student = tiny_llama(0).eval()(**batch).logits[:, :-1]
    expected = loss(student, logits, labels=labels).item()
    trainer = run(
        arguments, teachers, teacher_weights=SHARES, loss=loss, per_device_train_batch_size=8,
        num_train_epochs=1,
    )  # fmt: skip
    assert logged(trainer, "loss") == [pytest.approx(expected, rel=1e-4)]
    if (own or temperature) != 1:  # tempering the mixture would be another teacher
        other = mixture(teachers, SHARES, 1.0, batch)[:, :-1].float()
        assert loss(student, other, labels=labels).item() != pytest.approx(expected, rel=1e-2)


def test_a_mixture_follows_an_annealed_temperature(arguments):
    class Anneal(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            loss.temperature = 3.0 - round(state.epoch or 0)

    teachers, examples = [tiny_llama(1), tiny_llama(2)], texts()
    batch = pad(examples)
    labels = batch.pop("labels")[:, 1:]
    loss = otkd.KLLoss()
    trainer = run(
        arguments, teachers, teacher_weights=[0.5, 0.5], loss=loss, callbacks=[Anneal()],
        per_device_train_batch_size=8, learning_rate=1e-5,
    )  # fmt: skip
    with torch.no_grad():
        student = tiny_llama(0).eval()(**batch).logits[:, :-1]
    for value, temperature in zip(logged(trainer, "loss"), (3.0, 2.0), strict=True):
        logits = mixture(teachers, [0.5, 0.5], temperature, batch)[:, :-1].float()
        found = otkd.KLLoss(temperature=temperature)(student, logits, labels=labels)
        assert value == pytest.approx(found.item(), rel=1e-4)


def test_a_mixture_holds_the_logits_of_one_teacher_at_a_time(arguments):
    alive, most = weakref.WeakSet(), []

    class Logits(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.model = tiny_llama(seed)

        def forward(self, input_ids, attention_mask):
            most.append(len(alive))
            logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
            alive.add(logits)
            return {"logits": logits}

    run(arguments, [Logits(k) for k in (1, 2, 3, 4)], teacher_weights=[0.25] * 4)
    assert most == [0] * 16


def test_a_token_that_no_teacher_believes_in_has_no_mass(arguments):
    class Sure(nn.Module):
        def __init__(self, token):
            super().__init__()
            self.token = token

        def forward(self, input_ids):
            logits = torch.full((*input_ids.shape, VOCAB), -torch.inf)
            logits[..., self.token] = 0
            return {"logits": logits}

    examples, loss = texts(), otkd.KLLoss()
    batch = pad(examples)
    counted = batch["labels"][:, 1:] != -100
    with torch.no_grad():
        student = tiny_llama(0).eval()(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        )
    shares = torch.tensor([0.75, 0.25])
    log_q = student.logits[:, :-1].log_softmax(-1)[..., [3, 4]]
    expected = (shares * (shares.log() - log_q)).sum(-1)[counted].mean().item()
    trainer = run(
        arguments, [Sure(3), Sure(4)], teacher_weights=shares.tolist(), loss=loss,
        per_device_train_batch_size=8, num_train_epochs=1,
    )  # fmt: skip
    assert logged(trainer, "loss") == [pytest.approx(expected, rel=1e-4)]


def test_padded_vocabularies_of_a_mixture_are_cut_before_they_are_mixed(arguments):
    teachers = [tiny_llama(1), tiny_llama(2)]
    padded = copy.deepcopy(teachers[1])
    padded.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    loss = otkd.KLLoss(vocab_size=VOCAB)
    runs = [
        run(arguments, each, teacher_weights=[0.5, 0.5], loss=loss)
        for each in (teachers, [teachers[0], padded])
    ]
    assert_same(*runs)


class Own(nn.Module):
    """A student of which nothing is known."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, VOCAB)

    def forward(self, input_ids):
        return {"logits": self.embedding(input_ids)}


def test_what_is_no_mixture_is_refused(arguments):
    two = [tiny_llama(1), tiny_llama(2)]
    larger = [tiny_llama(1), tiny_llama(2, vocab=VOCAB + 3)]
    temperatures = otkd.WeightedLoss(
        {"kl": (1.0, otkd.KLLoss()), "jsd": (1.0, otkd.JSDLoss(temperature=2.0))}
    )
    refused = [
        ({"teacher": two, "teacher_weights": [0.5]}, ValueError, "must be 2 positive numbers"),
        ({"teacher": two, "teacher_weights": [1.5, -0.5]}, ValueError, "must be 2 positive"),
        ({"teacher": two, "teacher_weights": [0.5, float("nan")]}, ValueError, "2 positive"),
        ({"teacher": two, "teacher_weights": [0.5, 0.6]}, ValueError, "which add up to 1.1"),
        ({"teacher": two[0], "teacher_weights": [1.0]}, ValueError, "those of several models"),
        ({"teacher_weights": [1.0], "loss": "ce"}, ValueError, "those of several models"),
        ({"teacher": []}, TypeError, "several teachers must be models, got none"),
        ({"teacher": [two[0], torch.ones(8, 3)]}, TypeError, "got LlamaForCausalLM, Tensor"),
        ({"teacher": larger}, ValueError, r"\(teacher 1\) 32, but both read the same input_ids"),
        (
            {"teacher": larger, "loss": otkd.KLLoss(vocab_size=VOCAB)},
            ValueError,
            r"\(teacher 0\) predicts 29, LlamaForCausalLM \(teacher 1\) predicts 32",
        ),
        (
            {"teacher": larger, "teacher_weights": [0.5, 0.5]},
            ValueError,
            r"\(teacher 1\) 32, but both read the same input_ids",
        ),
        ({"teacher": [two[0], tiny_bert(1)]}, ValueError, r"BertForSequence\w+ \(teacher 1\)"),
        (
            {"teacher": two, "teacher_weights": [0.5, 0.5], "loss": temperatures},
            ValueError,
            "read their teacher at 1.0 and 2.0",
        ),
        (
            {"teacher": two, "teacher_weights": [0.5, 0.5], "loss": Hints()},
            ValueError,
            "features, of which there is no mixture",
        ),
    ]
    for options, error, message in refused:
        options = {"train_dataset": texts(), "loss": otkd.KLLoss()} | options
        if options["loss"] == "ce":
            options["loss"] = otkd.get_loss("ce")
        with pytest.raises(error, match=message):
            DistillationTrainer(tiny_llama(0), arguments(), data_collator=pad, **options)
    with pytest.raises(ValueError, match="some of them are causal language models"):
        DistillationTrainer(
            Own(), arguments(), train_dataset=texts(), loss=otkd.KLLoss(),
            teacher=[two[0], tiny_masked_lm(1)],
        )  # fmt: skip
    student = tiny_llama(0)
    with pytest.raises(ValueError, match="the teacher is the student"):
        DistillationTrainer(
            student, arguments(), train_dataset=texts(), loss=otkd.KLLoss(),
            teacher=[two[0], student], teacher_weights=[0.5, 0.5],
        )  # fmt: skip


# One teacher per example


INDEX = [0, 2, 0, 0, 2, 2, 0, 2]  # the second of three teachers has no example


def with_index(examples, index=INDEX):
    return [each | {"teacher_index": k} for each, k in zip(examples, index, strict=True)]


@pytest.mark.parametrize("hub", [True, False])
def test_each_example_has_its_own_teacher_and_no_other_runs_on_it(arguments, hub):
    teachers, examples = [tiny_llama(k) for k in (1, 2, 3)], with_index(texts())
    seen = [[], [], []]
    for teacher, ids in zip(teachers, seen, strict=True):
        teacher.register_forward_pre_hook(
            lambda _, __, given, ids=ids: ids.extend(given["input_ids"][:, :2].tolist()),
            with_kwargs=True,
        )
    stored = []
    batch = pad(texts())
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        logits = [tiny_llama(k).eval()(**inputs).logits for k in (1, 2, 3)]
    stored = torch.stack([logits[k][row] for row, k in enumerate(INDEX)])
    dataset = pytest.importorskip("datasets").Dataset.from_list(examples) if hub else examples
    several = run(arguments, teachers, examples=dataset)
    assert_same(several, run(arguments, stored))
    for number, ids in enumerate(seen):
        own = [each["input_ids"][:2] for each in examples if each["teacher_index"] == number]
        assert ids == own * 2


@pytest.mark.parametrize("flash", [True, False])
def test_packed_examples_have_their_own_teachers(arguments, flash):
    teachers, examples = [tiny_llama(k) for k in (1, 2, 3)], with_index(texts())
    unmasked = [{k: v for k, v in e.items() if k != "attention_mask"} for e in examples]
    seen = []
    teachers[2].register_forward_pre_hook(lambda _, __, given: seen.append(given), with_kwargs=True)
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=flash)
    packed = run(arguments, teachers, examples=unmasked, collator=collator)
    assert_same(packed, run(arguments, teachers, examples=examples))
    given = seen[1]  # of the second batch, whose last two examples it shares with the first
    lengths = [len(e["input_ids"]) for e in examples[4:] if e["teacher_index"] == 2]
    assert given["input_ids"].shape == (1, sum(lengths))
    if flash:
        assert given["cu_seq_lens_q"].diff().tolist() == lengths
        assert given["max_length_k"] == max(lengths)


def test_accumulation_with_a_teacher_per_example_equals_the_full_batch(arguments):
    teachers = [tiny_llama(k) for k in (1, 2, 3)]
    runs = [
        run(
            arguments, teachers, examples=with_index(texts()),
            per_device_train_batch_size=size, gradient_accumulation_steps=steps,
        )
        for size, steps in ((8, 1), (2, 4), (1, 8))
    ]  # fmt: skip
    for each in runs[1:]:
        assert_same(each, runs[0])


def test_a_student_of_ones_own_is_shifted_as_its_teachers_are(arguments):
    teachers = [tiny_llama(1), tiny_llama(2)]
    trainer = run(arguments, teachers, student=Own(), teacher_weights=[0.5, 0.5])
    assert trainer.shift


def test_a_mixture_accumulates_to_the_full_batch(arguments):
    teachers = [tiny_llama(k) for k in (1, 2, 3)]
    runs = [
        run(
            arguments, teachers, teacher_weights=SHARES,
            per_device_train_batch_size=size, gradient_accumulation_steps=steps,
        )
        for size, steps in ((8, 1), (2, 4))
    ]  # fmt: skip
    assert_same(*runs)


def test_classifiers_and_features_of_a_teacher_per_example(arguments):
    examples = with_index(sentences(), [0, 1] * 4)
    trainer = trained(
        tiny_bert(0),
        arguments(),
        train_dataset=examples,
        eval_dataset=examples,
        data_collator=pad,
        teacher=[tiny_bert(1), tiny_bert(2)],
        loss=Hints(),
    )
    assert trainer.evaluate()["eval_loss"] > 0


def test_wrong_numbers_of_teachers_are_refused(arguments):
    teachers = [tiny_llama(1), tiny_llama(2)]
    cases = [
        (texts(), ValueError, "the batch has no 'teacher_index'"),
        (with_index(texts()), ValueError, "must be from 0 to 1, one of 2 teachers, got 2"),
        (with_index(texts(), [-1] * 8), ValueError, "from 0 to 1"),
        (with_index(texts(), [0.5] * 8), TypeError, "one whole number per example"),
    ]
    for examples, error, message in cases:
        with pytest.raises(error, match=message):
            run(arguments, teachers, examples=examples)

    def with_pictures(rows):
        return pad(rows) | {"pixels": torch.ones(3, 2)}

    with pytest.raises(ValueError, match=r"'pixels' of the batch has shape \(3, 2\)"):
        run(arguments, teachers, examples=with_index(texts(), [0, 1] * 4), collator=with_pictures)


# What belongs to the student alone


def test_checkpointing_of_activations_is_the_students_alone(arguments):
    teacher = tiny_llama(1)
    calls = []
    teacher.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    plain = run(arguments, tiny_llama(1))
    assert_same(run(arguments, teacher, gradient_checkpointing=True), plain, rtol=0, atol=0)
    assert len(calls) == 4  # once in each step, so nothing is computed again
    assert not getattr(teacher, "is_gradient_checkpointing", False)


def test_student_and_teacher_run_under_the_same_autocast(arguments):
    seen = {}

    def built(seed, name):
        model = tiny_llama(seed)
        model.lm_head.register_forward_hook(lambda *given: seen.update({name: given[2].dtype}))
        return model

    teacher = built(1, "teacher")
    run(arguments, teacher, student=built(0, "student"), bf16=True)
    assert seen == {"student": torch.bfloat16, "teacher": torch.bfloat16}
    assert all(parameter.dtype == torch.float32 for parameter in teacher.parameters())
    run(arguments, tiny_llama(1).bfloat16(), student=built(0, "student"))
    assert seen["student"] == torch.float32
