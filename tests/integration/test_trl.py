"""TRL's trainer with losses of otkd: its losses, its steps, given completions, refusals."""

from __future__ import annotations

import importlib
import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

# Its message, the reason for skipping, names the package or the version that is missing.
pytest.importorskip("otkd.integrations.trl", exc_type=ImportError)

import transformers
import trl
from datasets import Dataset

import otkd
from otkd.costs import EmbeddingCost
from otkd.integrations.trl import DistillationTrainer
from otkd.integrations.trl.heads import head_logits, logit_factor
from otkd.supports import Dense
from tests.integration import framework_runs
from tests.integration.test_causal_lm import _COMMON
from tests.integration.test_distributed import launch
from tests.models import PLAIN_TRAINING, VOCAB, save_tokenizer, tiny_llama

pytestmark = [
    pytest.mark.usefixtures("seeded"),
    # TRL 1.16 calls methods that this version of transformers has renamed.
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set"),
]

LENGTHS = (2, 5, 1, 4, 3, 2, 6, 3)
EMBEDDING = tiny_llama(1).get_input_embeddings().weight.detach()
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} w3 {{ m.content }} <eos> w4 {% endfor %}"
    "{% if add_generation_prompt %}assistant w3 {% endif %}"
)


@pytest.fixture(autouse=True)
def without_telemetry(monkeypatch):
    monkeypatch.setenv("CI", "1")


@pytest.fixture
def tokenizer(tmp_path):
    save_tokenizer(tmp_path / "tokenizer", VOCAB)
    return transformers.AutoTokenizer.from_pretrained(
        tmp_path / "tokenizer", padding_side="left", chat_template=TEMPLATE
    )


def words(count, start):
    return " ".join(f"w{3 + (start + 5 * i) % (VOCAB - 3)}" for i in range(count))


ROWS = [
    {"prompt": words(1 + i % 3, i), "completion": words(n, 2 * i)} for i, n in enumerate(LENGTHS)
]


@pytest.fixture
def build(tmp_path, tokenizer):
    """A trainer of the first tiny model with the second as its teacher, on the CPU in float32."""

    def build(
        loss=None, *, kind=DistillationTrainer, rows=ROWS, student=None, teacher=None, **given
    ):
        own = ("off_policy", "peft_config", "eval_dataset", "tools", "processing_class")
        options = {name: given.pop(name) for name in own if name in given}
        defaults = {
            **PLAIN_TRAINING,
            "output_dir": str(tmp_path / "run"),
            "bf16": False,
            "gradient_checkpointing": False,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "num_train_epochs": 1,
            "max_completion_length": 5,
            "shuffle_dataset": False,
        }
        if kind is DistillationTrainer:
            options["loss"] = otkd.KLLoss() if loss is None else loss
        return kind(
            tiny_llama(0) if student is None else student,
            tiny_llama(1) if teacher is None else teacher,
            trl.DistillationConfig(**(defaults | given)),
            Dataset.from_list(rows),
            **({"processing_class": tokenizer} | options),
        )

    return build


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def trained(trainer):
    before = weights(trainer.model)
    trainer.train()
    assert not torch.equal(weights(trainer.model), before)
    return trainer


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def batch_of(trainer, rows=ROWS, *, tools=False):
    """The batch that TRL makes of the rows, in which some tokens may be the results of tools."""
    batch = trainer._generate_and_score_completions(rows)
    if tools:
        batch["tool_mask"] = torch.ones_like(batch["completion_mask"])
        batch["tool_mask"][:, 1::3] = 0
        counted = (batch["completion_mask"] * batch["tool_mask"]).sum()
        batch["num_items_in_batch"] = counted
    return batch


def value_and_gradient(trainer, batch):
    trainer.model.train().zero_grad()
    value = trainer.compute_loss(trainer.model, batch)
    value.backward()
    return value.detach(), torch.cat([p.grad.flatten() for p in trainer.model.parameters()])


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# Logits


_MAMBA = {"d_ssm": 16, "n_heads": 2, "d_head": 8, "n_groups": 1, "d_state": 4, "chunk_size": 4}
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4}
KINDS = {
    "Llama": ({}, 1.0),
    "Gemma2": ({"layer_types": ["full_attention"] * 2, "final_logit_softcapping": 0.2}, 1.0),
    "Cohere": ({"logit_scale": 0.3}, 0.3),
    "Granite": ({"logits_scaling": 4.0}, 0.25),
    "HyperCLOVAX": ({"logits_scaling": 4.0}, 4.0),
    "FalconH1": (
        {"lm_head_multiplier": 0.3} | {f"mamba_{name}": size for name, size in _MAMBA.items()},
        0.3,
    ),
    "MiniCPM3": (
        {"dim_model_base": 4, "num_key_value_heads": 2, "v_head_dim": 8, "head_dim": 4} | _LATENT,
        0.25,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_model(kind):
    """For each family of models that scales or caps its logits."""
    options, factor = KINDS[kind]
    model_class = getattr(transformers, f"{kind}ForCausalLM", None)
    if model_class is None:
        pytest.skip(f"this version of transformers has no {kind}")
    model = model_class(
        model_class.config_class(**(_COMMON | {"num_hidden_layers": 2} | options))
    ).eval()
    ids = torch.arange(3, 15).view(2, 6)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        hidden = model.base_model(input_ids=ids).last_hidden_state
        plain = model.get_output_embeddings()(hidden)
        close(head_logits(model, hidden), expected)
    assert logit_factor(model.config) == pytest.approx(factor)
    changed = factor != 1 or "final_logit_softcapping" in options
    assert torch.allclose(plain, expected, rtol=1e-2) != changed


def test_the_factor_of_muse_glimmer():
    assert logit_factor(transformers.LlamaConfig(output_multiplier=0.3)) == 0.3


# Losses


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tools", [False, True])
@pytest.mark.parametrize(
    ("beta", "loss"),
    [(0.0, otkd.KLLoss), (1.0, otkd.ReverseKLLoss), (0.3, partial(otkd.JSDLoss, beta=0.3))],
)
def test_losses_are_those_of_trl(build, beta, loss, tools, temperature):
    """Beta 0 is KL(teacher ‖ student), which is KLLoss; beta 1 is ReverseKLLoss."""
    ours = build(loss(temperature=temperature, rescale_t2=False), off_policy=True)
    theirs = build(kind=trl.DistillationTrainer, beta=beta, temperature=temperature)
    batch = batch_of(ours, tools=tools)
    value, gradient = value_and_gradient(ours, batch)
    expected, expected_gradient = value_and_gradient(theirs, batch)
    close(value, expected)
    close(gradient, expected_gradient)
    if temperature == 1:  # TRL's entropy is that at the temperature of its loss
        entropies = [trainer._metrics["train"]["entropy"] for trainer in (ours, theirs)]
        assert entropies[0] == pytest.approx(entropies[1], rel=1e-5)


def test_the_two_directions_differ(build):
    """On the batch of the comparison with TRL, so that it would notice if they were confused."""
    runs = [build(loss(), off_policy=True) for loss in (otkd.KLLoss, otkd.ReverseKLLoss)]
    values = [run.compute_loss(run.model, batch_of(run)).item() for run in runs]
    assert abs(values[0] / values[1] - 1) > 1e-2


LOSSES = {
    "kl": otkd.KLLoss,
    "sinkhorn": lambda: otkd.SinkhornLoss(embedding=EMBEDDING),
    "transport_kl": lambda: otkd.TransportKLLoss(embedding=EMBEDDING),
}
EVERY_REDUCTION = {
    **LOSSES,
    "sum": lambda: otkd.KLLoss(reduction="sum"),
    "sequence_mean": lambda: otkd.ReverseKLLoss(reduction="sequence_mean"),
    "weighted": lambda: otkd.WeightedLoss({"kl": (0.7, otkd.KLLoss()), "ce": (0.3, "ce")}),
}


@pytest.mark.parametrize("name", [*EVERY_REDUCTION, "hidden"])
def test_losses_are_those_of_the_call(build, name):
    """The same loss, called with the logits that the models return."""
    loss = otkd.BatchSinkhornLoss("hidden") if name == "hidden" else EVERY_REDUCTION[name]()
    trainer = build(loss, off_policy=True)
    batch = batch_of(trainer, tools=True)
    value = trainer.compute_loss(trainer.model, batch).detach()
    inputs = {
        "input_ids": torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
        "attention_mask": torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1),
        "output_hidden_states": True,
    }
    keep = slice(batch["prompt_ids"].shape[1] - 1, -1)
    counted = (batch["completion_mask"] * batch["tool_mask"]) != 0
    with torch.no_grad():
        student, teacher = (m(**inputs) for m in (trainer.model, tiny_llama(1).eval()))
    expected = loss(
        student.logits[:, keep],
        teacher.logits[:, keep],
        labels=batch["completion_ids"].masked_fill(~counted, -100),
        student_features=student.hidden_states[-1][:, keep],
        teacher_features=teacher.hidden_states[-1][:, keep],
    )
    close(value, expected)
    assert value > 0


# Training


@pytest.mark.parametrize("name", LOSSES)
def test_training_on_generated_completions(build, name):
    """With TRL's defaults of precision and checkpointing."""
    loss = LOSSES[name]()
    trainer = trained(
        build(
            loss,
            bf16=True,
            gradient_checkpointing=True,
            eval_dataset=Dataset.from_list(ROWS[:4]),
            eval_strategy="epoch",
            num_train_epochs=2,
        )
    )
    losses = logged(trainer, "loss")
    assert len(losses) == 4
    assert all(math.isfinite(value) and value > 0 for value in losses)
    assert math.isfinite(logged(trainer, "eval_loss")[-1])
    assert len(logged(trainer, "entropy")) == len(losses)
    if name != "kl":
        assert all(n >= 1 for n in logged(trainer, "solver/iterations"))


def test_training_brings_the_student_nearer_to_its_teacher(build):
    rows = Dataset.from_list(ROWS)
    trainer = build(off_policy=True, eval_dataset=rows, learning_rate=0.5, num_train_epochs=10)
    before = trainer.evaluate()["eval_loss"]
    trained(trainer)
    assert trainer.evaluate()["eval_loss"] < 0.7 * before


def test_the_teacher_stays_as_it_is(build):
    teacher = tiny_llama(1)
    before = weights(teacher)
    trained(build(teacher=teacher, off_policy=True))
    assert torch.equal(weights(teacher), before)


@pytest.mark.parametrize("name", EVERY_REDUCTION)
def test_accumulation_equals_the_full_batch(build, name):
    runs = [
        trained(
            build(
                EVERY_REDUCTION[name](),
                off_policy=True,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=steps,
                learning_rate=0.01 if name == "sum" else 0.1,
            )
        )
        for size, steps in ((8, 1), (2, 4), (1, 8))
    ]
    for run in runs[1:]:
        close(weights(run.model), weights(runs[0].model))
        assert logged(run, "loss") == pytest.approx(logged(runs[0], "loss"), rel=1e-4)
        if name == "weighted":
            terms = [0.7 * logged(run, "loss/kl")[0], 0.3 * logged(run, "loss/ce")[0]]
            assert sum(terms) == pytest.approx(logged(run, "loss")[0], rel=1e-4)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_an_adapter_is_trained_and_nothing_else(build, targets):
    peft = pytest.importorskip("peft")
    student = tiny_llama(0)
    base = weights(student)
    config = peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    trainer = build(student=student, peft_config=config, off_policy=True, num_train_epochs=2)
    plain = build(off_policy=True)
    # LoRA starts as the identity, so the first loss is that without an adapter.
    first, expected = (t.compute_loss(t.model, batch_of(t)).detach() for t in (trainer, plain))
    close(first, expected)
    trainer.train()
    named = dict(trainer.model.named_parameters())
    assert all(p.requires_grad == ("lora" in name) for name, p in named.items())
    assert any(p.abs().sum() > 0 for name, p in named.items() if "lora_B" in name)
    frozen = [p.detach().flatten() for name, p in named.items() if "lora" not in name]
    assert torch.equal(torch.cat(frozen), base)


def test_two_processes_train_as_one(tmp_path):
    """Also with the stock Trainer; and the loss of sharded models is that of whole ones."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("needs torch.distributed with gloo")
    one = framework_runs.runs(tmp_path)
    for part in launch(tmp_path, Path(framework_runs.__file__), 2):
        assert part.keys() == one.keys()
        for name, expected in one.items():
            for entry, value in expected.items():
                torch.testing.assert_close(part[name][entry], value, rtol=1e-5, atol=1e-6, msg=name)


# Given completions


def test_given_texts_are_what_is_trained_on(build, tokenizer):
    trainer = build(off_policy=True, max_completion_length=4)
    batch = batch_of(trainer)
    for row, ids, mask in zip(ROWS, batch["completion_ids"], batch["completion_mask"], strict=True):
        expected = [*tokenizer(row["completion"]).input_ids, tokenizer.eos_token_id][:4]
        assert ids[mask != 0].tolist() == expected
    prompts = [
        ids[m != 0] for ids, m in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
    ]
    assert [p.tolist() for p in prompts] == [tokenizer(row["prompt"]).input_ids for row in ROWS]
    assert batch["num_items_in_batch"] == sum(min(n + 1, 4) for n in LENGTHS)
    assert batch["num_sequences_in_batch"] == len(ROWS)


def test_given_messages_follow_the_template(build, tokenizer):
    row = {
        "prompt": [{"role": "user", "content": "w5 w6"}],
        "completion": [{"role": "assistant", "content": "w7 w8"}],
    }
    trainer = build(off_policy=True, rows=[row] * 4)
    batch = batch_of(trainer, [row])
    # What the template writes after the end of the turn is not part of the completion.
    assert tokenizer.decode(batch["completion_ids"][0]) == "w7 w8 <eos>"
    trained(trainer)


def test_a_completion_whose_first_token_joins_the_prompt_is_tokenised_alone(build):
    """The last word of the prompt and the first of the completion are one word when joined."""
    rows = [{"prompt": "w5 w", "completion": "6 w7"}]
    trainer = build(off_policy=True, rows=rows * 4)
    batch = batch_of(trainer, rows)
    ids = trainer.processing_class("6 w7").input_ids
    assert batch["completion_ids"][0].tolist() == [*ids, trainer.processing_class.eos_token_id]


def test_a_template_that_changes_the_prompt_is_refused(build, tokenizer):
    tokenizer.chat_template = (
        "w{{ 4 + messages | length }} {% for m in messages %}{{ m.content }} {% endfor %}"
    )
    row = {
        "prompt": [{"role": "user", "content": "w5"}],
        "completion": [{"role": "assistant", "content": "w7"}],
    }
    trainer = build(off_policy=True, rows=[row] * 4)
    with pytest.raises(ValueError, match="in the same way when a completion follows"):
        trainer.train()


WRONG_COMPLETIONS = {
    "no column": ([{"prompt": "w3"}] * 4, "column 'completion'.*columns are prompt"),
    "empty": ([*ROWS[:3], {"prompt": "w3", "completion": ""}], "non-empty text.*prompt 'w3'"),
    "missing": ([*ROWS[:3], {"prompt": "w3", "completion": None}], "non-empty text.*it is None"),
    "kinds": (
        [{"prompt": [{"role": "user", "content": "w3"}], "completion": "w4"}] * 4,
        "one message of the role 'assistant'",
    ),
    "roles": (
        [
            {
                "prompt": [{"role": "user", "content": "w3"}],
                "completion": [{"role": "user", "content": "w4"}],
            }
        ]
        * 4,
        "one message of the role 'assistant'",
    ),
}


@pytest.mark.parametrize("name", WRONG_COMPLETIONS)
def test_wrong_completions_are_refused_before_training(build, name):
    rows, message = WRONG_COMPLETIONS[name]
    with pytest.raises(ValueError, match=message):
        build(off_policy=True, rows=rows)
    with pytest.raises(ValueError, match=message):
        build(off_policy=True, eval_dataset={"one": Dataset.from_list(rows)})


# Vocabularies


def padded(seed, vocab):
    """A model whose logits and embedding have rows for tokens that do not exist."""
    model = tiny_llama(seed)
    model.resize_token_embeddings(vocab, mean_resizing=False)
    return model


def bridge(teacher):
    return EmbeddingCost(EMBEDDING, teacher.get_input_embeddings().weight.detach()[:VOCAB])


def test_a_padded_teacher_gives_the_loss_of_the_unpadded_one(build):
    teacher = padded(1, VOCAB + 3)
    losses = {
        "kl": (otkd.KLLoss(), otkd.KLLoss(vocab_size=VOCAB)),
        "two vocabularies": (
            otkd.SinkhornLoss(embedding=EMBEDDING, support=Dense()),
            otkd.SinkhornLoss(bridge(teacher), vocab_size=(VOCAB, VOCAB), support=Dense()),
        ),
    }
    for plain, sliced in losses.values():
        runs = [
            trained(build(plain, off_policy=True)),
            trained(build(sliced, teacher=teacher, off_policy=True)),
        ]
        close(weights(runs[1].model), weights(runs[0].model))


def test_other_vocabularies_are_refused_by_name(build):
    teacher = tiny_llama(1, vocab=VOCAB + 3)
    sizes = f"student LlamaForCausalLM has {VOCAB} tokens and the teacher LlamaForCausalLM"
    for loss in (otkd.KLLoss(), otkd.SinkhornLoss(EmbeddingCost(EMBEDDING, torch.randn(32, 32)))):
        with pytest.raises(ValueError, match=rf"{sizes} {VOCAB + 3}.*vocab_size="):
            build(loss, teacher=teacher)
    fewer = tiny_llama(1, vocab=VOCAB - 3)
    with pytest.raises(ValueError, match=f"the tokenizer has {VOCAB}"):
        build(otkd.KLLoss(vocab_size=VOCAB - 3), teacher=fewer)


# Refusals


REFUSED = {
    "beta": (otkd.KLLoss, {"beta": 0.5}, ValueError, r"JSDLoss\(beta="),
    "none": (lambda: otkd.KLLoss(reduction="none"), {}, ValueError, "does not return a scalar"),
    "labels": (otkd.CrossEntropyLoss, {}, ValueError, "off_policy=True"),
    "no loss": (lambda: torch.nn.KLDivLoss(), {}, TypeError, "otkd loss"),
    "flag": (otkd.KLLoss, {"off_policy": "yes"}, TypeError, "off_policy"),
    "columns": (
        otkd.KLLoss,
        {"off_policy": True, "remove_unused_columns": True},
        ValueError,
        "remove_unused_columns",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_contradict_each_other_are_refused(build, name):
    loss, options, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        build(loss(), **options)


def test_what_training_would_change_or_not_train_is_refused(build):
    student = tiny_llama(0)
    with pytest.raises(ValueError, match="teacher is the student"):
        build(student=student, teacher=student)
    with pytest.raises(ValueError, match="teacher_model is missing"):
        DistillationTrainer(student, loss=otkd.KLLoss())
    loss = otkd.SinkhornLoss(embedding=EMBEDDING)
    loss.register_parameter("scale", torch.nn.Parameter(torch.ones(())))
    with pytest.raises(ValueError, match="has trainable parameters, which TRL's trainer"):
        build(loss)


# Other versions


@pytest.fixture
def forgotten(monkeypatch):
    """The integration as if it had not been imported yet."""
    for name in [name for name in sys.modules if name.startswith("otkd.integrations.trl")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.usefixtures("forgotten")
def test_a_missing_trl_is_named_with_its_installation(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=r"needs trl, which is not installed: .*\[trl\]"):
        importlib.import_module("otkd.integrations.trl")


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("version", ["1.17.0", "1.160.0", "0.20.0", "2.0"])
def test_another_trl_is_refused_by_version(version, monkeypatch, tmp_path):
    folder = tmp_path / f"trl-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: trl\nVersion: {version}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=rf"TRL 1\.16, but TRL {version} is.*trl>=1\.16,<1\.17"):
        importlib.import_module("otkd.integrations.trl")
