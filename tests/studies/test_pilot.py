"""The pilot study of objectives, with a tiny random teacher and reviews of random words."""

from __future__ import annotations

import json
import random

import pytest
import torch

pytest.importorskip("transformers")

import pilot
import pilot_objectives
import pilot_training
from typer.testing import CliRunner

import otkd
from tests.models import VOCAB, save_tokenizer, tiny_llama

pytestmark = pytest.mark.usefixtures("seeded")

PROTOCOL = """
layers = 1
sequences = 8
held_out = 4
length = 6
batch = 2
warmup = 1
clip = 1.0
distant = {steps = 3, learning_rate = 1e-2}
close = {steps = 2, learning_rate = 1e-3}
preparation = {steps = 5, learning_rate = 1e-2}
"""


class Command:
    """The command on a folder of its own."""

    def __init__(self, folder):
        self.folder, self.results = folder, folder / "results"
        self.protocol = folder / "protocol.toml"
        self.protocol.write_text(PROTOCOL, encoding="utf-8")
        self.teacher = folder / "teacher"
        tiny_llama().save_pretrained(self.teacher)
        save_tokenizer(self.teacher, VOCAB)

    def __call__(self, *arguments):
        result = CliRunner().invoke(pilot.app, [*map(str, arguments)])
        print(result.output)  # shown by pytest if a test fails
        return result

    def run(self, objectives, *, start="distant", seeds="0", results=None):
        folder = self.results if results is None else self.folder / results
        return self(
            *("run", "--start", start, "--objectives", objectives, "--seeds", seeds),
            *("--output-dir", folder, "--protocol", self.protocol, "--teacher", self.teacher),
        )

    def result(self, objective, *, start="distant", seed=0, results="results"):
        path = self.folder / results / start / objective / f"seed-{seed}.json"
        return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def command(tmp_path, monkeypatch):
    draw = random.Random(0)
    words = [f"w{index}" for index in range(3, VOCAB)]
    reviews = {" ".join(draw.choices(words, k=8)): 0 for _ in range(2100)}
    monkeypatch.setattr("otkd.tasks.causal_lm.text.package_texts", lambda *_, **__: reviews)
    monkeypatch.setenv("OTKD_CACHE", str(tmp_path / "cache"))
    return Command(tmp_path)


def test_a_study_writes_a_result_for_every_run_once(command):
    assert command.run("kl,sinkhorn", seeds="0,1").exit_code == 0
    result = command.result("sinkhorn", seed=1)
    assert result["status"] == "finished"
    assert result["steps"] == 3
    assert [point["step"] for point in result["curve"]] == [0]
    assert {len(values) for values in result["held_out"].values()} == {4}
    assert result["held_out"]["kl"] != command.result("sinkhorn")["held_out"]["kl"]
    again = command.run("kl,sinkhorn", seeds="0,1")
    assert again.output.count("finished before") == 4
    assert command.result("sinkhorn", seed=1) == result
    table = command("table", "--output-dir", command.results)
    assert "sinkhorn" in table.output
    assert "±" in table.output


def test_stored_states_give_the_teachers_logits(command):
    protocol = pilot.load_protocol(command.protocol)
    material = pilot.Material(protocol, command.teacher, lambda *_: lambda _: None)
    for part in ("train", "preparation", "held_out"):
        sequences = material.sequences(part)
        with torch.no_grad():
            logits = material.teacher(sequences.inputs).logits
        torch.testing.assert_close(material.teacher_logits(sequences.states), logits)
        assert torch.equal(sequences.inputs[:, 1:], sequences.labels[:, :-1])


def test_wasd_is_an_objective(command):
    pytest.importorskip("faiss")
    assert command.run("wasd,kl").exit_code == 0
    wasd, kl = command.result("wasd"), command.result("kl")
    assert wasd["status"] == "finished"
    assert wasd["held_out"]["kl"] != kl["held_out"]["kl"]


@pytest.mark.parametrize("start", ["distant", "close"])
def test_an_interrupted_run_ends_as_one_that_was_not(command, monkeypatch, start):
    monkeypatch.setattr(pilot_training, "CHECKPOINT_EVERY", 1)
    backward, calls = pilot_training._backward, []

    def interrupted(*arguments):
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return backward(*arguments)

    monkeypatch.setattr(pilot_training, "_backward", interrupted)
    stopped = command.run("jsd", start=start)
    assert stopped.exit_code == 130
    assert "the same command continues" in stopped.output
    assert command.run("jsd", start=start).exit_code == 0
    monkeypatch.setattr(pilot_training, "_backward", backward)
    # The student that "close" starts from is trained again too.
    monkeypatch.setenv("OTKD_CACHE", str(command.folder / "other cache"))
    assert command.run("jsd", start=start, results="whole").exit_code == 0
    resumed, whole = (command.result("jsd", start=start, results=r) for r in ("results", "whole"))
    for name in ("held_out", "log", "curve", "settings"):
        assert resumed[name] == whole[name]
    assert len(calls) == {"distant": 4, "close": 8}[start]
    assert not [*(command.folder / "cache" / "pilot" / "work").rglob("checkpoint.pt")]


def test_a_run_that_diverges_is_a_result(command, monkeypatch):
    monkeypatch.setattr(pilot_training, "_backward", lambda *_: (float("nan"), 1.0))
    assert command.run("tvd").exit_code == 0
    assert command.result("tvd")["status"] == "diverged"
    assert "1 diverged" in command("table", "--output-dir", command.results).output


def test_results_with_other_settings_are_kept(command):
    command.run("kl")
    before = command.result("kl")
    command.protocol.write_text(PROTOCOL.replace("steps = 3", "steps = 4"), encoding="utf-8")
    refused = command.run("kl")
    assert refused.exit_code == 1
    assert "other settings (protocol)" in refused.output
    assert command.result("kl") == before


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("layers = 1", "layers = 0", "layers"),
        ("clip", "klip", "clip is missing"),
        ("clip", "klip = 1.0\nclip", "klip"),
        ("batch = 2", "batch = 9", "batch must be at most sequences"),
        ("sequences = 8", "sequences = 8000", "needs 16,000 reviews"),
    ],
)
def test_a_wrong_protocol_is_refused(command, old, new, message):
    command.protocol.write_text(PROTOCOL.replace(old, new), encoding="utf-8")
    refused = command.run("kl")
    assert refused.exit_code == 1
    assert message in refused.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objectives": "k"}, "There is no objective"),
        ({"objectives": "kl", "start": "far"}, "distant, close"),
        ({"objectives": "kl", "seeds": "0,x"}, "whole numbers"),
    ],
)
def test_wrong_options_are_refused(command, options, message):
    refused = command.run(**options)
    assert refused.exit_code == 1
    assert message in refused.output


def test_an_objective_that_otkd_does_not_have_is_skipped(command, monkeypatch):
    monkeypatch.delattr(otkd, "TransportKLLoss", raising=False)
    name = "transport_kl-forward-10-0.1-embedding"
    result = command.run(f"{name},kl")
    assert result.exit_code == 0
    assert "is skipped" in result.output
    assert not (command.results / "distant" / name).exists()
    assert command.result("kl")["status"] == "finished"


@pytest.mark.parametrize("name", pilot_objectives.OBJECTIVES)
def test_every_objective_has_a_gradient(name):
    objective = pilot_objectives.get_objective(name)
    if not objective.available:
        pytest.skip(f"otkd has no {objective.requires}")
    schedule = objective.build(torch.randn(VOCAB, 4))
    logits = torch.randn(3, VOCAB, requires_grad=True)
    for done in (0.0, 0.5):
        schedule(done)(logits, torch.randn(3, VOCAB), labels=torch.tensor([0, 1, 2])).backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad != 0).any()
