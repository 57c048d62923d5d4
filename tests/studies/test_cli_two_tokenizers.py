"""The command `otkd compare` with students that have a tokenizer of their own."""

from __future__ import annotations

import json
import os

import pytest
import torch
import transformers
from typer.testing import CliRunner

import otkd
from otkd.cli.app import app
from otkd.study.results import read_result
from otkd.tasks.causal_lm import byte_metrics, with_vocabulary
from tests.models import tiny_gpt2, tiny_llama
from tests.small_tokenizers import byte_level, sentencepiece

WORDS = ("the", "sea", "seal", "sees", "a", "café", "where", "中文", "old", "books", "and", "sings")
OPTIONS = ("--max-length", "24", "--student-layers", "1", "--batch-size", "4")
FP32 = ("--precision", "fp32")
RATE = ("--learning-rate", "3e-2")


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)


def lines(seed, number):
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(WORDS), (number, 9), generator=generator)
    return [" ".join(WORDS[i] for i in row[: 3 + i % 7]) for i, row in enumerate(draws)]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for part, seed, number in (("train", 0, 16), ("dev", 1, 10)):
        (folder / f"{part}.txt").write_text("\n".join(lines(seed, number)) + "\n", encoding="utf-8")
    return folder


def save_teacher(folder, made, build=tiny_llama):
    backend, special = made
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.pad_token = tokenizer.eos_token
    build(3, vocab=len(tokenizer) + 6).save_pretrained(folder)  # its logits are padded
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("models") / "teacher", byte_level(290))


def compare(texts, teacher, out, *more, task="text", command="compare", tokens=265):
    named = ("--data-dir", texts, "--teacher", teacher, "--output-dir", out)
    own = () if tokens is None else ("--student-vocabulary", tokens)
    arguments = [command, task, *named, *OPTIONS, *FP32, *own, *more]
    return CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def trained(texts, teacher, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    losses = "kl,ce,uld,hybrid,transport_kl,sinkhorn"
    more = ("--losses", losses, "--seeds", "1", *RATE)
    result = compare(texts, teacher, out, *more)
    assert result.exit_code == 0, result.output
    return out / "text", result.output


def test_all_kinds_of_losses_are_compared(trained):
    folder, output = trained
    for word in ("bits per byte", "KL of the next byte", "agreement", "both tokenizers share"):
        assert word in output
    found = {path.parent.name: read_result(path) for path in folder.glob("*/0.json")}
    assert set(found) == {"kl", "ce", "uld", "hybrid", "transport_kl", "sinkhorn"}
    assert len({result.metrics["bits_per_byte"] for result in found.values()}) == 6
    assert found["kl"].metrics["next_byte_kl"] < found["ce"].metrics["next_byte_kl"]
    assert found["kl"].settings["student_vocabulary"] == 265
    teacher = read_result(folder / "teacher" / "result.json")
    assert teacher.metrics.keys() == {"bits_per_byte", "next_byte_kl"}
    assert teacher.headline == "bits_per_byte"


@pytest.fixture(scope="module")
def saved(texts, teacher, tmp_path_factory):
    out = tmp_path_factory.mktemp("train")
    result = compare(texts, teacher, out, "--loss", "kl", *RATE, command="train")
    assert result.exit_code == 0, result.output
    return out


def test_the_metrics_are_those_of_the_saved_student(saved, trained, teacher, texts):
    folder, _ = trained
    found = read_result(saved / "results.json")
    assert found.metrics == read_result(folder / "kl" / "0.json").metrics
    student, own = load(saved / "student")
    model, tokenizer = load(teacher)
    assert len(own) == 265
    rows = [
        own(text).input_ids[:24] for text in (texts / "dev.txt").read_text("utf-8").splitlines()
    ]
    expected = byte_metrics(student, model, own, tokenizer, [{"input_ids": ids} for ids in rows])
    assert found.metrics["bits_per_byte"] == pytest.approx(expected.student_bits_per_byte, rel=1e-4)
    assert found.metrics["next_byte_kl"] == pytest.approx(expected.first_byte_kl, rel=1e-3)
    assert found.agreement == pytest.approx(expected.same_first_byte)
    stored = read_result(folder / "teacher" / "result.json").metrics["bits_per_byte"]
    assert stored == pytest.approx(expected.teacher_bits_per_byte, rel=1e-4)


def load(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def test_the_student_is_trained_with_the_teacher_itself(saved, teacher, texts, tmp_path):
    """The run trains as the trainer does with a teacher in memory."""
    from otkd.alignment import token_map
    from otkd.integrations.transformers import DistillationTrainer
    from otkd.tasks.causal_lm import padding_collator, student_of

    model, tokenizer = load(teacher)
    written = (texts / "train.txt").read_text("utf-8").splitlines()
    own = tokenizer.train_new_from_iterator(written, 265)
    between = token_map(own, tokenizer)
    student = with_vocabulary(student_of(model, 1), between)
    rows = [own(text).input_ids[:24] for text in written]
    DistillationTrainer(
        model=student,
        loss=otkd.PushforwardLoss(between, vocab_size=between.vocab_size),
        teacher=model,
        teacher_tokenizer=tokenizer,
        processing_class=own,
        train_dataset=[{"input_ids": ids, "labels": ids} for ids in rows],
        data_collator=padding_collator(own),
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            learning_rate=3e-2,
            num_train_epochs=1,
            weight_decay=0.0,
            optim="adamw_torch_fused",
            report_to="none",
            save_strategy="no",
            seed=0,
            use_cpu=True,
        ),
    ).train()
    found, _ = load(saved / "student")
    for name, weight in found.state_dict().items():
        torch.testing.assert_close(weight, student.state_dict()[name], rtol=1e-3, atol=1e-3)


def test_costs_between_two_vocabularies(texts, teacher, tmp_path):
    scores = set()
    for cost in ("embedding", "permuted", "prefix", "embedding+prefix"):
        more = ("--losses", "sinkhorn", "--seeds", "1", "--token-cost", cost)
        result = compare(texts, teacher, tmp_path / cost, *more, *RATE)
        assert result.exit_code == 0, result.output
        found = read_result(tmp_path / cost / "text" / "sinkhorn" / "0.json")
        scores.add(found.metrics["bits_per_byte"])
    assert len(scores) == 4


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--losses", "kl", "--token-cost", "discrete"), "no effect on kl"),
        (("--losses", "sinkhorn", "--token-cost", "discrete"), "two vocabularies"),
        (("--losses", "wasd"), "two vocabularies"),
        (("--losses", "sinkd"), "two vocabularies"),
        (("--losses", "kl+wasserstein"), "two vocabularies"),
        (("--losses", "kl", "--student", "elsewhere"), "leave --student out"),
        (("--losses", "kl", "--rouge-rows", "2"), "need prompts"),
        (("--losses", "seqkd"), "need prompts"),
        (("--losses", "hybrd"), "and of language models hybrid, seqkd and wasd"),
        (("--losses", "kl", "--student-vocabulary", "5000"), "choose this number, or more texts"),
    ],
)
def test_what_is_not_possible_is_refused(texts, teacher, tmp_path, options, reason):
    result = compare(texts, teacher, tmp_path, *options)
    assert result.exit_code != 0
    assert reason in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (["the sea", "a"], "line 2: the text has 1 tokens"),
        (["the sea", "🤦🏽 sings"], "have two positions in common. Raise it."),
    ],
)
def test_texts_that_are_too_short_are_refused(teacher, tmp_path, rows, reason):
    for part in ("train", "dev"):
        (tmp_path / f"{part}.txt").write_text("\n".join(rows), encoding="utf-8")
    more = ("--losses", "kl", "--max-length", "2")
    result = compare(tmp_path, teacher, tmp_path / "out", *more, tokens=258)
    assert result.exit_code == 1
    assert reason in " ".join(result.output.split())
    assert ".." not in result.output


def test_a_teacher_whose_context_is_too_short_is_refused(tmp_path):
    teacher = save_teacher(tmp_path / "teacher", byte_level(258), tiny_gpt2)
    for part in ("train", "dev"):
        (tmp_path / f"{part}.txt").write_text("the sea " * 40 + "\n" + "the sea " * 30)
    result = compare(tmp_path, teacher, tmp_path / "out", "--losses", "kl", tokens=264)
    assert result.exit_code == 1
    assert "tokens of the teacher, which reads at most 32" in " ".join(result.output.split())


def test_other_kinds_of_tokenizers_are_refused(texts, tmp_path):
    teacher = save_teacher(tmp_path / "teacher", sentencepiece(340))
    result = compare(texts, teacher, tmp_path / "out", "--losses", "kl")
    assert result.exit_code == 1
    assert "needs a teacher with byte-level BPE" in " ".join(result.output.split())


def test_a_small_vocabulary_or_another_kind_of_task_is_refused(texts, teacher, tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"instruction": "a", "output": "b"}))
    (tmp_path / "dev.jsonl").write_text(json.dumps({"instruction": "a", "output": "b"}))
    result = compare(tmp_path, teacher, tmp_path / "out", "--losses", "kl", task="instructions")
    assert "is for texts" in " ".join(result.output.split())
    result = compare(texts, teacher, tmp_path, "--losses", "kl", tokens=256)
    assert result.exit_code != 0
    assert "257" in result.output


def test_hybrid_needs_two_vocabularies(texts, teacher, tmp_path):
    result = compare(texts, teacher, tmp_path, "--losses", "hybrid", tokens=None)
    assert result.exit_code != 0
    assert "two vocabularies" in " ".join(result.output.split())
