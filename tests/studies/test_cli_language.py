"""The command `otkd compare` on texts and instructions, with tiny language models."""

from __future__ import annotations

import json
import os
import platform
import shutil
from pathlib import Path

import pytest
import study_tables
import torch
import transformers
from tokenizers.processors import TemplateProcessing
from typer.testing import CliRunner

import otkd
from otkd.cli.app import app
from otkd.study import held_out
from otkd.study.objectives import build_objective, objective_options
from otkd.study.results import read_result
from otkd.study.settings import Settings
from otkd.study.states import StoredStates
from otkd.study.summary import summarise
from otkd.study.wasd import Wasd
from otkd.tasks.causal_lm import answer_files, read_instructions, rouge_l
from tests.models import save_tokenizer, tiny_gpt2, tiny_llama

VOCAB = 40
OPTIONS = ("--max-length", "8", "--student-layers", "1", "--batch-size", "4", "--precision", "fp32")


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)


def save_model(folder, model=None, vocab=VOCAB):
    (model or tiny_llama(3, vocab=vocab)).save_pretrained(folder)
    save_tokenizer(str(folder), vocab)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "llama")


def words(seed, number):
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{i}" for i in torch.randint(3, VOCAB, (number,), generator=generator))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "train.txt").write_text("\n".join(words(i, 3 + i % 9) for i in range(16)) + "\n")
    rows = [{"text": words(100 + i, 3 + i % 9), "other": i} for i in range(10)]
    (folder / "dev.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


@pytest.fixture(scope="module")
def instructions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("instructions")
    for part, number in (("train", 12), ("dev", 6)):
        rows = [
            {"instruction": words(i, 2), "input": "", "output": words(50 + i, 2 + i % 4)}
            for i in range(number)
        ]
        (folder / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def otkd_command(*arguments):
    arguments = [str(argument) for argument in arguments]
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})


def compare(task, folder, teacher, out, *more):
    named = ("--data-dir", folder, "--teacher", teacher, "--output-dir", out)
    return otkd_command("compare", task, *named, *OPTIONS, *more)


def test_a_comparison_on_texts_measures_what_it_says(teacher, texts, tmp_path):
    result = compare("text", texts, teacher, tmp_path, "--losses", "kl,ce", "--seeds", "2")
    assert result.exit_code == 0, result.output
    for word in ("cross-entropy", "KL(p‖q)", "agreement", "2 seeds per loss, 16 training"):
        assert word in result.output
    assert "Objective: the loss alone. ce is used alone." in " ".join(result.output.split())
    assert "…" not in result.output  # no number is cut to the width of the terminal
    assert "-0.000" not in result.output
    found = read_result(tmp_path / "text" / "teacher" / "result.json")
    # The teacher's metrics, from the texts alone.
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(teacher)
    rows = [json.loads(line)["text"] for line in (texts / "dev.jsonl").read_text().splitlines()]
    losses, hits = [], []
    for text in rows:
        ids = tokenizer(text, return_tensors="pt").input_ids[:, :8]
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
        hits.append(logits.argmax(-1) == ids[0, 1:])
    assert found.metrics["cross_entropy"] == pytest.approx(
        torch.cat(losses).mean().item(), rel=1e-4
    )
    assert found.metrics["accuracy"] == pytest.approx(torch.cat(hits).float().mean().item())
    assert found.metrics["kl"] == pytest.approx(0, abs=1e-6)
    kl, ce = (read_result(tmp_path / "text" / name / "0.json") for name in ("kl", "ce"))
    assert kl.metrics["kl"] < ce.metrics["kl"]
    assert kl.rows == {"train": 16, "dev": 10}
    assert kl.steps == 4
    assert 0 <= kl.agreement <= 1
    # Finished runs are kept, and other settings are refused.
    again = compare("text", texts, teacher, tmp_path, "--losses", "kl,ce", "--seeds", "2")
    assert "Finished runs that are kept: 4 of 4" in again.output
    other = compare("text", texts, teacher, tmp_path, "--losses", "kl", "--learning-rate", "1e-2")
    assert other.exit_code != 0
    assert "learning_rate" in other.output
    assert (tmp_path / "text" / "comparison.png").stat().st_size > 1000


def test_the_student_is_trained_with_the_teacher_itself(teacher, texts, tmp_path):
    """Stored states give the student that a teacher in memory gives."""
    from otkd.integrations.transformers import DistillationTrainer
    from otkd.tasks.causal_lm import padding_collator, student_of

    more = ("--losses", "kl", "--seeds", "1", "--learning-rate", "1e-2", "--warmup", "0")
    assert compare("text", texts, teacher, tmp_path / "out", *more).exit_code == 0
    found = read_result(tmp_path / "out" / "text" / "kl" / "0.json")
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(teacher)
    lines = (texts / "train.txt").read_text().splitlines()
    rows = [{"input_ids": tokenizer(text).input_ids[:8]} for text in lines]
    student = student_of(model, 1)
    DistillationTrainer(
        model=student,
        loss=otkd.KLLoss(),
        teacher=model,
        train_dataset=[{**row, "labels": row["input_ids"]} for row in rows],
        data_collator=padding_collator(tokenizer),
        args=transformers.TrainingArguments(
            str(tmp_path / "trainer"),
            per_device_train_batch_size=4,
            num_train_epochs=1,
            learning_rate=1e-2,
            weight_decay=0.0,
            optim="adamw_torch_fused",
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            seed=0,
        ),
    ).train()
    values = []
    for line in (texts / "dev.jsonl").read_text().splitlines():
        ids = tokenizer(json.loads(line)["text"], return_tensors="pt").input_ids[:, :8]
        with torch.no_grad():
            ours, theirs = (each.eval()(ids).logits[0, :-1] for each in (student, model))
        values.append(otkd.KLLoss(reduction="none")(ours, theirs))
    assert found.metrics["kl"] == pytest.approx(torch.cat(values).mean().item(), rel=1e-3)


def test_an_interrupted_teacher_continues(teacher, texts, tmp_path, monkeypatch):
    """Its states are kept in parts; a damaged part is computed again."""
    monkeypatch.setattr(held_out, "_BATCH", 2)
    monkeypatch.setattr(held_out, "_SHARD", 2)
    run = held_out.HeldOut.run
    ran = []

    def counting(self, model, **options):
        for found in run(self, model, **options):
            ran.append(1)
            if len(ran) == limit:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(held_out.HeldOut, "run", counting)
    more = ("--losses", "ce", "--seeds", "1")
    for limit in (9, 10**6):  # two for the check, then four in two whole parts, one in a third
        ran.clear()
        result = compare("text", texts, teacher, tmp_path / "cut", *more)
        if limit == 9:
            assert result.exit_code == 130
            parts = sorted((tmp_path / "cut" / "text" / "teacher").glob("**/states-*"))
            assert len(parts) == 3
            parts[0].write_bytes(parts[0].read_bytes()[:-9] + b"otherwise")
    assert result.exit_code == 0, result.output
    assert "computed again" in " ".join(result.output.split())
    limit = 10**6
    assert compare("text", texts, teacher, tmp_path / "whole", *more).exit_code == 0
    one, other = (
        StoredStates.load(tmp_path / name / "text" / "teacher" / "train-states.safetensors")
        for name in ("cut", "whole")
    )
    assert torch.equal(one.tokens.states, other.tokens.states)
    assert not list((tmp_path / "cut").glob("**/states-*"))


def test_the_best_evaluation_has_the_agreement_of_its_own_student(teacher, texts, tmp_path):
    """And not that of the student after the last step."""
    more = ("--losses", "kl", "--seeds", "1", "--evaluate-every", "1", "--score", "best")
    more = (*more, "--epochs", "3", "--learning-rate", "0.1")
    result = compare("text", texts, teacher, tmp_path, *more)
    assert result.exit_code == 0, result.output
    found = read_result(tmp_path / "text" / "kl" / "0.json")
    best = min(found.evaluations, key=lambda each: each["cross_entropy"])
    assert best["agreement"] != found.evaluations[-1]["agreement"]
    assert {**found.metrics, "agreement": found.agreement, "step": best["step"]} == best


def test_a_deep_teacher_is_read_in_float32_where_students_train_in_bf16(texts, tmp_path):
    """In bf16 its logits differ by more than the rounding of one layer."""
    deep = save_model(tmp_path / "deep", tiny_llama(3, vocab=VOCAB, layers=24))
    out = tmp_path / "out"
    more = ("--losses", "kl", "--seeds", "1", "--precision", "bf16")
    result = compare("text", texts, deep, out, *more)
    assert result.exit_code == 0, result.output
    model = transformers.AutoModelForCausalLM.from_pretrained(deep).eval()
    stored = StoredStates.load(out / "text" / "teacher" / "train-states.safetensors")
    tokenizer = transformers.AutoTokenizer.from_pretrained(deep)
    text = (texts / "train.txt").read_text().splitlines()[0]
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :8]
    with torch.no_grad():
        torch.testing.assert_close(stored[0].logits(), model(ids).logits[0])


def test_a_single_student_is_saved_as_a_language_model(teacher, texts, tmp_path):
    named = ("--data-dir", texts, "--teacher", teacher, "--output-dir", tmp_path)
    result = otkd_command("train", "text", "--loss", "jsd", *named, *OPTIONS, "--no-anneal")
    assert result.exit_code == 0, result.output
    student = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert student.config.num_hidden_layers == 1
    assert read_result(tmp_path / "results.json").settings["loss.alpha"] == 1


def test_a_student_reads_the_tokens_of_its_teacher(teacher, instructions, tmp_path):
    """Its own tokenizer adds a token and has no chat template: every position would be shifted."""
    template = "{% for m in messages %}<bos> {{ m['content'] }} {% endfor %}<eos>"
    for folder, change in (("teacher", {"chat_template": template}), ("student", {})):
        shutil.copytree(teacher, tmp_path / folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(teacher, **change)
        if folder == "student":
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single="<bos> $A", special_tokens=[("<bos>", 1)]
            )
        tokenizer.save_pretrained(tmp_path / folder)
    out = tmp_path / "out"
    named = ("--data-dir", instructions, "--teacher", tmp_path / "teacher", "--output-dir", out)
    student = ("--student", tmp_path / "student", "--max-length", "16", "--learning-rate", "1e-9")
    result = otkd_command("train", "instructions", "--loss", "kl", *named, *OPTIONS, *student)
    assert result.exit_code == 0, result.output
    # The student is a copy of the teacher, so there is nothing to learn.
    found = read_result(out / "results.json")
    assert found.metrics["kl"] == pytest.approx(0, abs=1e-5)
    assert found.agreement == 1
    saved = transformers.AutoTokenizer.from_pretrained(out / "student")
    assert saved.chat_template == template
    assert saved("w3").input_ids == [3]


def test_only_the_answers_to_instructions_count(teacher, instructions, tmp_path):
    losses = "transport_kl,kl+sinkhorn"
    more = ("--losses", losses, "--seeds", "1", "--max-length", "64", "--token-cost", "permuted")
    model = tiny_llama(4, vocab=VOCAB)
    model.config.max_position_embeddings = 64
    long = save_model(tmp_path / "teacher", model)
    result = compare("instructions", instructions, long, tmp_path / "out", *more)
    assert result.exit_code == 0, result.output
    found = read_result(tmp_path / "out" / "instructions" / "kl+sinkhorn" / "0.json")
    assert found.settings["loss.token_cost"] == "permuted"
    assert found.rows == {"train": 12, "dev": 6}


def test_a_protocol_can_list_wasd(texts, tmp_path):
    pytest.importorskip("faiss")
    model = tiny_llama(3, vocab=VOCAB)
    table = model.get_input_embeddings().weight.data  # of tokens so near that the kernel joins them
    table.mul_(0.03).add_(torch.linspace(-0.1, 0.1, table.shape[1]))
    teacher = save_model(tmp_path / "teacher", model)
    protocol = tmp_path / "near.toml"
    protocol.write_text(
        "seeds = 1\n[losses.wasd]\ntemperature = 2.0\n"
        '[losses.permuted]\nloss = "wasd"\ntemperature = 2.0\ntoken_cost = "permuted"\n'
    )
    result = compare("text", texts, teacher, tmp_path / "out", "--protocol", protocol)
    assert result.exit_code == 0, result.output
    folder = tmp_path / "out" / "near" / "text"
    one, other = (read_result(folder / name / "0.json") for name in ("wasd", "permuted"))
    assert one.settings["loss"] == other.settings["loss"] == "wasd"
    assert other.settings["loss.token_cost"] == "permuted"
    assert one.metrics != other.metrics


def test_wasd_has_the_temperature_of_the_paper():
    """That of the student; the teacher's is 1."""
    pytest.importorskip("faiss")
    embedding, student, teacher = torch.randn(3, 20, 20).unbind()
    settings = Settings("text", temperature=2.0, alpha=1.0)
    built = build_objective("wasd", objective_options("wasd", settings), embedding)
    expected = Wasd(embedding, temperature=2.0, teacher_temperature=1.0)(student, teacher)
    labels = torch.zeros(20, dtype=torch.long)
    torch.testing.assert_close(built(student, teacher, labels=labels), expected)


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """A teacher that reads a prompt in the template of Alpaca, and an answer."""
    model = tiny_llama(4, vocab=VOCAB)
    model.config.max_position_embeddings = 96
    return save_model(tmp_path_factory.mktemp("models") / "long", model)


ANSWERING = ("--max-length", "64", "--answer-tokens", "6", "--seeds", "1")


def test_seqkd_trains_on_the_answers_of_the_teacher(long, instructions, tmp_path):
    more = (*ANSWERING, "--losses", "seqkd,kl", "--learning-rate", "1e-2")
    result = compare("instructions", instructions, long, tmp_path / "out", *more)
    assert result.exit_code == 0, result.output
    assert "seqkd is ce with the teacher's own answers" in " ".join(result.output.split())
    folder = tmp_path / "out" / "instructions"
    found = read_result(folder / "seqkd" / "0.json")
    assert found.settings["loss.answer_tokens"] == 6
    assert "loss.answer_tokens" not in read_result(folder / "kl" / "0.json").settings
    # The file has the format of the data: hard labels on it are the same training.
    (tmp_path / "data").mkdir()
    answers = folder / "teacher" / "answers-6.jsonl"
    lines = answers.read_text().splitlines()
    assert [json.loads(line)["instruction"] for line in lines] == [
        json.loads(line)["instruction"]
        for line in (instructions / "train.jsonl").read_text().splitlines()
    ]
    assert len({json.loads(line)["output"] for line in lines}) == len(lines)
    shutil.copy(answers, tmp_path / "data" / "train.jsonl")
    shutil.copy(instructions / "dev.jsonl", tmp_path / "data" / "dev.jsonl")
    more = ("--max-length", "64", "--seeds", "1", "--losses", "ce", "--learning-rate", "1e-2")
    assert compare("instructions", tmp_path / "data", long, tmp_path / "ce", *more).exit_code == 0
    expected = read_result(tmp_path / "ce" / "instructions" / "ce" / "0.json")
    assert found.metrics["cross_entropy"] == expected.metrics["cross_entropy"]
    assert found.steps == expected.steps
    more = (*ANSWERING, "--losses", "seqkd", "--answer-tokens", "34")
    result = compare("instructions", instructions, long, tmp_path / "other", *more)
    assert "are more than the 96 tokens" in " ".join(result.output.split())


def test_rouge_is_that_of_the_answers_to_the_first_prompts(long, instructions, tmp_path):
    pytest.importorskip("rouge_score")
    rouge = (*ANSWERING, "--losses", "kl", "--rouge-rows", "4")
    found = {}
    for name, more in {"greedy": (), "sampled": ("--rouge-seed", "5")}.items():
        result = compare("instructions", instructions, long, tmp_path / name, *rouge, *more)
        assert result.exit_code == 0, result.output
        shown = " ".join(result.output.split())
        assert "Rouge-L: of answers of at most 6 tokens to 4 development prompts, " in shown
        found[name] = read_result(tmp_path / name / "instructions" / "kl" / "0.json")
    assert "sampled with seed 5" in shown
    assert found["greedy"].settings["rouge_rows"] == 4
    # The teacher's greedy answers, token by token.
    model = transformers.AutoModelForCausalLM.from_pretrained(long).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(long)
    rows = read_instructions(instructions / "dev.jsonl")[:4]
    answers = []
    for row in rows:
        tokens = row.prompt_tokens(tokenizer)
        for _ in range(6):
            with torch.no_grad():
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
            if tokens[-1] == tokenizer.eos_token_id:
                break
        start = len(row.prompt_tokens(tokenizer))
        answers.append(tokenizer.decode(tokens[start:], skip_special_tokens=True))
    expected = rouge_l(answers, [row.answers for row in rows]) / 100
    assert found["greedy"].teacher_metrics["rouge_l"] == pytest.approx(expected)
    assert found["sampled"].teacher_metrics["rouge_l"] != pytest.approx(expected)
    assert 0 <= found["greedy"].metrics["rouge_l"] <= 1
    assert "rouge_l" not in found["greedy"].evaluations[-1]


def test_rouge_is_refused_where_it_cannot_be_measured(long, texts, instructions, tmp_path):
    for task, folder, more, message in (
        ("text", texts, (), "need prompts"),
        ("rte", texts, (), "is for the task instructions"),
        ("instructions", instructions, ("--evaluate-every", "1", "--score", "best"), "score last"),
        ("instructions", instructions, ("--rouge-rows", "7"), "has only 6 development prompts"),
    ):
        named = (*ANSWERING, "--losses", "kl", "--rouge-rows", "4", *more)
        result = compare(task, folder, long, tmp_path / "out", *named)
        assert result.exit_code == 1
        assert message in " ".join(result.output.split())
    result = compare("text", texts, long, tmp_path / "out", "--losses", "kl", "--rouge-seed", "4")
    assert "--rouge-seed needs --rouge-rows" in " ".join(result.output.split())


def test_an_interrupted_generation_of_answers_continues(long, instructions, tmp_path, monkeypatch):
    more = (*ANSWERING, "--losses", "seqkd")
    assert compare("instructions", instructions, long, tmp_path / "whole", *more).exit_code == 0
    teacher = tmp_path / "out" / "instructions" / "teacher"
    whole = (tmp_path / "whole" / "instructions" / "teacher" / "answers-6.jsonl").read_text()
    sample = answer_files.sampled_answers

    def interrupted(*arguments, **options):
        yield next(sample(*arguments, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(answer_files, "sampled_answers", interrupted)
    assert compare("instructions", instructions, long, tmp_path / "out", *more).exit_code == 130
    (unfinished,) = (teacher / "answers.partial").glob("answers*.jsonl")
    assert whole.startswith(unfinished.read_text())
    asked = []

    def counted(model, tokenizer, prompts, **options):
        asked.append(len(prompts))
        return sample(model, tokenizer, prompts, **options)

    monkeypatch.setattr(answer_files, "sampled_answers", counted)
    for _ in range(2):  # the second time nothing is left to do
        result = compare("instructions", instructions, long, tmp_path / "out", *more)
        assert result.exit_code == 0, result.output
    assert asked == [4]  # of 12 prompts
    assert (teacher / "answers-6.jsonl").read_text() == whole
    assert not (teacher / "answers.partial").exists()
    # Answers that are lost are generated again; finished runs do not need them.
    (teacher / "answers-6.jsonl").write_text("lost")
    result = compare("instructions", instructions, long, tmp_path / "out", *more, "--seeds", "2")
    assert result.exit_code == 0, result.output
    assert "they are generated again" in " ".join(result.output.split())
    assert (teacher / "answers-6.jsonl").read_text() == whole


def test_the_best_candidate_has_the_lowest_cross_entropy(teacher, texts, tmp_path):
    protocol = tmp_path / "rates.toml"
    protocol.write_text(
        "seeds = 1\n[tuning]\ntrain_rows = 8\nheld_out = 0.25\n"
        "[losses.kl]\ncandidates = [{learning_rate = 1e-9}, {learning_rate = 1e-2}]\n"
    )
    more = ("--protocol", protocol)
    result = compare("text", texts, teacher, tmp_path / "out", *more)
    assert result.exit_code == 0, result.output
    folder = tmp_path / "out" / "rates" / "text" / "kl"
    scores = [read_result(folder / "tuning" / f"{n}.json").score for n in (0, 1)]
    assert scores[1] < scores[0]
    assert read_result(folder / "0.json").settings["learning_rate"] == 1e-2
    assert summarise([read_result(folder / "0.json")])[0].metrics["cross_entropy"].mean > 0


def test_the_tuned_protocol_chooses_by_rows_that_are_held_out(long, instructions, tmp_path):
    """With candidates of SeqKD, which are trained on some of the teacher's answers."""
    pytest.importorskip("rouge_score")
    file = study_tables.HERE / "tuned.toml"
    more = (*ANSWERING, "--rouge-rows", "3", "--losses", "kl,seqkd", "--protocol", file)
    result = compare("instructions", instructions, long, tmp_path, *more)
    assert result.exit_code == 0, result.output
    folder = tmp_path / "tuned" / "instructions"
    for loss, parameters in (
        ("kl", {"learning_rate", "loss.temperature"}),
        ("seqkd", {"learning_rate"}),
    ):
        tried = [read_result(path) for path in sorted((folder / loss / "tuning").glob("*.json"))]
        assert [each.rows for each in tried] == [{"train": 11, "dev": 1}] * 6
        assert all("rouge_l" not in each.metrics for each in tried)
        best = min(tried, key=lambda each: each.metrics["cross_entropy"])
        student = read_result(folder / loss / "0.json")
        for name in parameters:
            assert student.settings[name] == best.settings[name]
        assert student.rows == {"train": 12, "dev": 6}
        assert 0 <= student.metrics["rouge_l"] <= 1


@pytest.mark.parametrize(
    ("task", "more", "message"),
    [
        ("text", ("--losses", "wasserstein"), "use sinkhorn"),
        ("text", ("--losses", "sinkd", "--batch-cost", "hidden"), "for classifiers"),
        ("text", ("--losses", "wasd", "--token-cost", "discrete"), "embedding or permuted"),
        ("rte", ("--losses", "kl+wasd"), "is for language models"),
        ("rte", ("--losses", "seqkd"), "is for language models"),
        ("text", ("--losses", "seqkd"), "only the task instructions has"),
        ("text", ("--losses", "kl+seqkd"), "use --alpha"),
        ("text", ("--losses", "kl", "--answer-tokens", "8"), "no effect on kl"),
        ("text", ("--losses", "kl+ce"), "--alpha"),
        ("text", ("--losses", "kl+jsd+kl"), "only once"),
        ("text", ("--losses", "kl", "--anneal", "--epochs", "3"), "--temperature 1"),
        ("text", ("--losses", "kl", "--anneal", "--temperature", "3"), "--epochs 1"),
        ("text", ("--losses", "kl", "--text-column", "words"), "--text-column"),
        ("text", ("--losses", "kl", "--max-length", "1"), "at least 2 tokens"),
        ("text", ("--losses", "kl", "--max-length", "99"), "at most 32 tokens"),
        ("text", ("--losses", "kl", "--student-layers", "7"), "2 layers"),
        ("instructions", ("--losses", "kl"), "lacks"),
        ("reviews", ("--losses", "kl"), "leave --data-dir out"),
    ],
)
def test_what_cannot_work_is_refused_before_any_training(
    teacher, texts, tmp_path, task, more, message
):
    result = compare(task, texts, teacher, tmp_path / "out", *more)
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())
    assert not list((tmp_path / "out").glob("**/*.safetensors"))


def test_data_that_is_missing_or_empty_is_named(teacher, texts, tmp_path):
    result = otkd_command("compare", "text", "--losses", "kl", "--teacher", teacher)
    assert "or train.txt and dev.txt, or the name" in " ".join(result.output.split())
    for content, message in (("w3\n", "has 1 tokens"), ("\n\n", "has no texts")):
        (tmp_path / "train.txt").write_text(content)
        (tmp_path / "dev.txt").write_text("w3 w4\n")
        result = compare("text", tmp_path, teacher, tmp_path.parent / "out", "--losses", "kl")
        assert result.exit_code == 1
        assert message in " ".join(result.output.split())
        assert "train.txt" in result.output


def test_another_tokenizer_and_capped_logits_are_refused(teacher, texts, tmp_path):
    student = save_model(tmp_path / "student", vocab=VOCAB + 5)
    result = compare(
        "text", texts, teacher, tmp_path / "out", "--losses", "kl", "--student", student
    )
    assert "has another tokenizer" in " ".join(result.output.split())
    padded = save_model(tmp_path / "padded", tiny_llama(3, vocab=VOCAB + 8))
    result = compare(
        "text", texts, teacher, tmp_path / "out", "--losses", "kl", "--student", padded
    )
    assert "resize_token_embeddings(40)" in " ".join(result.output.split())
    assert not list((tmp_path / "out").glob("**/*.safetensors"))
    config = transformers.Gemma2Config(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.1,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    capped = save_model(tmp_path / "capped", transformers.Gemma2ForCausalLM(config))
    result = compare("text", texts, capped, tmp_path / "out", "--losses", "kl")
    assert result.exit_code == 1
    assert "soft-capping" in result.output


def test_models_that_cannot_be_read_whole_are_refused(teacher, texts, tmp_path):
    headless = save_model(tmp_path / "headless", tiny_llama(3, vocab=VOCAB).model)
    for option in ("--teacher", "--student"):
        more = (option, headless, "--losses", "kl")
        result = compare("text", texts, teacher, tmp_path / "out", *more)
        assert result.exit_code == 1
        assert "would be random: lm_head.weight." in " ".join(result.output.split())
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        damaged = shutil.copytree(teacher, tmp_path / name)
        content = (damaged / name).read_bytes()
        (damaged / name).write_bytes(content[: len(content) // 2])
        result = compare("text", texts, damaged, tmp_path / "out", "--losses", "kl")
        assert isinstance(result.exception, SystemExit), result.exception
        assert "could not be loaded by Auto" in " ".join(result.output.split())


def test_without_a_padding_token_the_end_of_a_text_pads(texts, tmp_path):
    """As for GPT-2. The texts differ in length, and what pads them changes no number."""
    found = []
    for name in ("padded", "unpadded"):
        folder = save_model(tmp_path / name, tiny_gpt2(vocab=VOCAB))
        if name == "unpadded":
            backend = transformers.AutoTokenizer.from_pretrained(folder).backend_tokenizer
            for path in folder.glob("*token*"):
                path.unlink()
            tokenizer = transformers.PreTrainedTokenizerFast(
                tokenizer_object=backend, bos_token="<eos>", eos_token="<eos>"
            )
            tokenizer.save_pretrained(folder)
            assert transformers.AutoTokenizer.from_pretrained(folder).pad_token is None
        out = tmp_path / f"{name}-out"
        result = compare("text", texts, folder, out, "--losses", "kl", "--seeds", "1")
        assert result.exit_code == 0, result.output
        found.append(read_result(out / "text" / "kl" / "0.json"))
    padded, unpadded = found
    assert unpadded.metrics == pytest.approx(padded.metrics, rel=1e-5)
    assert unpadded.teacher_metrics == pytest.approx(padded.teacher_metrics, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "message"),
    [("model.layers.0.mlp.up_proj.weight", "states are not"), ("lm_head.weight", "logits on the")],
)
def test_a_teacher_with_a_weight_of_nan_is_refused(texts, tmp_path, name, message):
    model = tiny_llama(3, vocab=VOCAB)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[5] = torch.nan
    broken = save_model(tmp_path / "broken", model)
    result = compare("text", texts, broken, tmp_path / "out", "--losses", "kl")
    assert result.exit_code == 1
    said = " ".join(result.output.split())
    assert "broken cannot be the teacher" in said
    assert message in said


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86 processors alone are known")
@pytest.mark.skipif(torch.accelerator.is_available(), reason="an accelerator trains")
def test_a_precision_that_the_processor_emulates_is_noticed(teacher, texts, tmp_path):
    flags = Path("/proc/cpuinfo")
    if not flags.is_file() or not hasattr(torch.cpu, "get_capabilities"):
        pytest.skip("what the processor has is not known")
    emulated = not {"avx512_bf16", "amx_bf16"} & set(flags.read_text().split())
    for precision, expected in (("bf16", emulated), ("fp32", False)):
        more = ("--losses", "ce", "--seeds", "1", "--precision", precision)
        result = compare("text", texts, teacher, tmp_path / precision, *more)
        assert result.exit_code == 0, result.output
        assert ("no instructions for it" in " ".join(result.output.split())) == expected
