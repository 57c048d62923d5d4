"""The recipes as a user runs them, on tiny models: losses, accumulation, resuming, bad input."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")

import kd
import sft
import transformers
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from tests.models import VOCAB, save_tokenizer, tiny_llama

EXAMPLES = Path(sft.__file__).parent
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} w3 {{ m.content }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}assistant w3 {% endif %}"
)
ROWS, STEPS = 8, 3
# All rows are one batch, so that their order does not matter, and the optimiser is simple.
PLAIN = ["--optim", "sgd", "--learning-rate", "0.1", "--lr-scheduler-type", "constant"]
PLAIN += ["--weight-decay", "0", "--max-grad-norm", "0", "--num-train-epochs", str(STEPS)]


def words(count, start):
    return " ".join(f"w{4 + (start + 5 * i) % (VOCAB - 4)}" for i in range(count))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a student, a teacher, their tokenizer, and instructions."""
    folder = tmp_path_factory.mktemp("world")
    for seed, name in enumerate(("student", "teacher")):
        tiny_llama(seed).save_pretrained(folder / name)
        save_tokenizer(folder / name, VOCAB)
        (folder / name / "chat_template.jinja").write_text(TEMPLATE)
    rows = [
        {"instruction": words(1 + i % 4, i), "output": words(1 + i % 5, 2 * i)} for i in range(ROWS)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def options(world, tmp_path, monkeypatch):
    """The options of a command that writes to a folder ``run`` of the test."""
    monkeypatch.setenv("CI", "1")  # no telemetry
    level = transformers.logging.get_verbosity()
    yield {
        "--teacher": world / "teacher",
        "--student": world / "student",
        "--train-file": world / "rows.jsonl",
        "--max-length": 32,
        "--output-dir": tmp_path / "run",
        "--disable-tqdm": True,
    }
    transformers.logging.set_verbosity(level)


@pytest.fixture
def run(options):
    """Runs a recipe in this process; returns the folder of its run."""

    def run(recipe, *more, **changed):
        given = options | {f"--{name.replace('_', '-')}": value for name, value in changed.items()}
        argv = [str(part) for name, value in given.items() for part in (name, value)]
        recipe.main([*argv, *map(str, more)])
        return Path(given["--output-dir"])

    return run


def logged(folder, name="loss"):
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history if name in entry]


def weights(folder):
    return load_file(folder / "student" / "model.safetensors")


def assert_same(ours, theirs, tolerance=0.0):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=tolerance, atol=tolerance)


# Losses, against a training loop that only uses torch


def batch(folder):
    """Ids, mask and labels of all rows; the template written out by hand."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "teacher")
    ids, labels = [], []
    for line in (folder / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(f"user w3 {row['instruction']} <eos> assistant w3").input_ids
        answer = tokenizer(f"{row['output']} <eos>").input_ids
        ids.append(torch.tensor(prompt + answer))
        labels.append(torch.tensor([-100] * len(prompt) + answer))
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(row) for row in ids], batch_first=True)
    return pad(ids, batch_first=True), mask, pad(labels, batch_first=True, padding_value=-100)


def naive_losses(folder, objective, steps=STEPS, rate=0.1):
    """Losses and weights of plain gradient descent on all rows."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    student, teacher = load(folder / "student"), load(folder / "teacher")
    ids, mask, labels = batch(folder)
    counted, losses = labels[:, 1:] != -100, []
    for _ in range(steps):
        logits = student(ids, mask).logits[:, :-1][counted]
        with torch.no_grad():
            theirs = teacher(ids, mask).logits[:, :-1][counted]
        loss = objective(logits, theirs, labels[:, 1:][counted])
        student.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in student.parameters():
                parameter -= rate * parameter.grad
        losses.append(loss.item())
    return losses, student.state_dict()


def ce(student, teacher, labels):
    return cross_entropy(student, labels)


def kl(student, teacher, labels):
    p = teacher.softmax(-1)
    return (p * (p.log() - student.log_softmax(-1))).sum(-1).mean()


def warm_reverse_kl(student, teacher, labels):
    q, p = (logits.div(2).softmax(-1) for logits in (student, teacher))
    return 4 * (q * (q.log() - p.log())).sum(-1).mean()


def stored_kl(student, teacher, labels, k=5):
    """KL between the k most probable tokens of the teacher and all others as one."""
    p, q = teacher.softmax(-1), student.softmax(-1)
    top = p.topk(k).indices
    p, q = p.gather(-1, top), q.gather(-1, top)
    p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, q))
    return (p * (p / q).log()).sum(-1).mean()


def mixed(student, teacher, labels):
    return 0.75 * kl(student, teacher, labels) + 0.25 * ce(student, teacher, labels)


PINNED = {
    "sft": (sft, [], ce),
    "kd": (kd, [], kl),
    "kd with a loss": (
        kd,
        ["--loss", "rkl", "--loss-args", '{"temperature": 2}'],
        warm_reverse_kl,
    ),
    "kd stored": (kd, ["--stored-tokens", "5"], stored_kl),
    "kd with cross-entropy": (kd, ["--ce-weight", "0.25"], mixed),
}


@pytest.mark.parametrize("name", PINNED)
def test_losses_are_those_of_a_plain_training_loop(world, run, name):
    recipe, more, objective = PINNED[name]
    folder = run(recipe, *PLAIN, *more)
    losses, trained = naive_losses(world, objective)
    assert logged(folder) == pytest.approx(losses, abs=1e-4)
    assert abs(losses[0] - losses[-1]) > 1e-3  # the steps differ by more than the tolerance
    assert_same(weights(folder), {name: trained[name] for name in weights(folder)}, 1e-4)


@pytest.mark.parametrize("recipe", [sft, kd])
def test_accumulation_equals_the_full_batch(run, tmp_path, recipe):
    runs = [
        run(
            recipe,
            *PLAIN,
            output_dir=tmp_path / str(size),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        )
        for size, steps in ((8, 1), (2, 4))
    ]
    assert logged(runs[0]) == pytest.approx(logged(runs[1]), abs=1e-5)
    assert_same(weights(runs[0]), weights(runs[1]), 1e-5)


def test_a_stored_teacher_is_reused_and_checked(run, world, tmp_path, capsys):
    stored = ["--stored-tokens", 5, "--teacher-folder", tmp_path / "stored"]
    first = run(kd, *PLAIN, *stored)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "stored").iterdir()}
    again = run(kd, *PLAIN, *stored, output_dir=tmp_path / "again")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "stored").iterdir()} == made
    assert_same(weights(first), weights(again))
    other = tmp_path / "other.jsonl"
    other.write_text((world / "rows.jsonl").read_text().replace("w9", "w10"))
    for changed, said in (
        ({"train_file": other}, "rows"),
        ({"teacher": world / "student"}, "teacher_weights"),
        ({"loss_args": '{"temperature": 2}'}, "temperature"),
    ):
        with pytest.raises(SystemExit, match="1"):
            run(kd, *PLAIN, *stored, output_dir=tmp_path / said, **changed)
        assert f"made with other settings ({said})" in " ".join(capsys.readouterr().err.split())
    (file,) = (tmp_path / "stored").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    with pytest.raises(SystemExit, match="1"):
        run(kd, *PLAIN, *stored, output_dir=tmp_path / "damaged")
    assert "damaged" in capsys.readouterr().err


def test_adapters_are_trained_and_merged(run, world):
    pytest.importorskip("peft")
    folder = run(sft, *PLAIN, "--lora-r", 2)
    assert logged(folder)[0] == pytest.approx(naive_losses(world, ce)[0][0], abs=1e-4)
    before = load_file(world / "student" / "model.safetensors")
    changed = {name for name, tensor in weights(folder).items() if not tensor.equal(before[name])}
    assert changed == {name for name in before if "proj" in name}


def test_an_evaluation_reads_the_rows_that_are_held_out(run, world):
    folder = run(kd, *PLAIN, "--eval-rows", 3, "--eval-strategy", "epoch")
    load = transformers.AutoModelForCausalLM.from_pretrained
    student, teacher = load(folder / "student"), load(world / "teacher")
    ids, mask, labels = (tensor[:3] for tensor in batch(world))
    counted = labels[:, 1:] != -100
    logits, theirs = (m(ids, mask).logits[:, :-1][counted] for m in (student, teacher))
    expected = kl(logits, theirs, None).item()
    assert logged(folder, "eval_loss")[-1] == pytest.approx(expected, abs=1e-4)


# Interruptions


SHUFFLED = ["--per-device-train-batch-size", "2", "--num-train-epochs", "3"]
SHUFFLED += ["--save-strategy", "steps", "--save-steps", "3", "--lora-r", "2"]
RESUMED = {"sft": (sft, []), "kd stored": (kd, ["--stored-tokens", "5"])}


@pytest.mark.parametrize("name", RESUMED)
def test_an_interrupted_run_ends_with_the_same_weights(run, tmp_path, monkeypatch, capsys, name):
    recipe, more = RESUMED[name]
    whole = run(recipe, *SHUFFLED, *more, output_dir=tmp_path / "whole")
    steps, step = 0, transformers.Trainer.training_step

    def interrupted(*args, **kwargs):
        nonlocal steps
        steps += 1
        if steps == 8:  # in the second epoch, after a checkpoint in its middle
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    with monkeypatch.context() as context:
        context.setattr(transformers.Trainer, "training_step", interrupted)
        with pytest.raises(SystemExit, match="130"):
            run(recipe, *SHUFFLED, *more)
    assert "the same command continues" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run" / "student").exists()
    resumed = run(recipe, *SHUFFLED, *more)
    assert "resumed from" in capsys.readouterr().err
    assert_same(weights(resumed), weights(whole))
    assert run(recipe, *SHUFFLED, *more) == resumed
    assert "nothing to do" in capsys.readouterr().err


def test_a_killed_run_ends_with_the_same_weights(run, options, tmp_path):
    """Also if the last checkpoint is incomplete."""
    more = ["--num-train-epochs", "60", "--per-device-train-batch-size", "4"]
    argv = [str(part) for name, value in options.items() for part in (name, value)]
    command = [sys.executable, str(EXAMPLES / "sft.py"), *argv, *more]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        while not [*(tmp_path / "run").glob("checkpoint-*/otkd-files.json")]:
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "run" / "student").exists()
    last = max((tmp_path / "run").glob("checkpoint-*"), key=lambda path: path.stat().st_mtime_ns)
    (last / "optimizer.pt").unlink(missing_ok=True)
    killed = run(sft, *more)
    whole = run(sft, *more, output_dir=tmp_path / "whole")
    assert_same(weights(killed), weights(whole))


def test_a_folder_of_other_settings_is_refused(run, tmp_path, capsys):
    run(sft, *PLAIN)
    before = weights(tmp_path / "run")
    with pytest.raises(SystemExit, match="1"):
        run(sft, *PLAIN, "--seed", 11)
    said = " ".join(capsys.readouterr().err.split())
    assert "run with other settings: seed: 10 there, 11 now" in said
    assert_same(weights(tmp_path / "run"), before)
    (tmp_path / "run" / "settings.json").unlink()
    with pytest.raises(SystemExit, match="1"):
        run(sft, *PLAIN)
    assert "models that no recipe wrote" in " ".join(capsys.readouterr().err.split())


# Bad input


@pytest.fixture
def refused(run, capsys, tmp_path):
    """Runs a recipe that must end with status 1 before training; returns what it said."""

    def refused(recipe=kd, *more, **changed):
        with pytest.raises(SystemExit, match="1"):
            run(recipe, *more, **changed)
        assert not [*tmp_path.glob("run/checkpoint-*")]
        return " ".join(capsys.readouterr().err.split())

    return refused


def test_tokenizers_that_differ_are_refused(refused, world, tmp_path):
    shutil.copytree(world / "student", tmp_path / "other")
    save_tokenizer(tmp_path / "other", VOCAB - 1)
    said = refused(student=tmp_path / "other")
    assert f"have {VOCAB - 1} and {VOCAB} tokens, and 'w{VOCAB - 1}' is missing in one" in said


def test_a_folder_without_weights_is_refused(refused, world, tmp_path):
    for role in ("teacher", "student"):
        shutil.copytree(world / role, tmp_path / role)
        (tmp_path / role / "model.safetensors").unlink()
        said = refused(**{role: tmp_path / role})
        assert str(tmp_path / role) in said.replace(" ", "") or f"{role}' could not" in said
        assert "no file named model.safetensors" in said


def test_models_that_are_smaller_than_their_tokenizer_are_refused(refused, world, tmp_path):
    tiny_llama(vocab=VOCAB - 3).save_pretrained(tmp_path / "small")
    save_tokenizer(tmp_path / "small", VOCAB)
    said = refused(student=tmp_path / "small")
    assert f"has {VOCAB} tokens, but the student only {VOCAB - 3}" in said


def test_padded_vocabularies_are_compared_without_their_padding(run, world, tmp_path):
    padded = tiny_llama(1)
    padded.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    shutil.copytree(world / "teacher", tmp_path / "padded")
    padded.save_pretrained(tmp_path / "padded")
    plain = run(kd, *PLAIN, output_dir=tmp_path / "plain")
    for more in ([], ["--stored-tokens", VOCAB]):
        folder = run(
            kd, *PLAIN, *more, teacher=tmp_path / "padded", output_dir=tmp_path / f"run{len(more)}"
        )
        assert logged(folder) == pytest.approx(logged(plain), abs=1e-5)


BAD_OPTIONS = {
    "loss": (["--loss", "kll"], "unknown loss 'kll'"),
    "loss-args": (["--loss-args", "{"], "is not a JSON object"),
    "argument": (["--loss-args", '{"alpha": 1}'], "alpha"),
    "reduction": (["--loss-args", '{"reduction": "none"}'], "does not return a scalar"),
    "eval-rows": (["--eval-rows", "8"], "has 8 rows, of which at least one"),
    "max-length": (["--max-length", "64"], "the student reads at most 32 tokens"),
    "long prompt": (["--max-length", "6"], "rows.jsonl, line 1: the prompt has"),
    "layers": (["--student-layers", "9"], "the teacher has 2 layers"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options_are_refused(refused, options, name):
    more, message = BAD_OPTIONS[name]
    if name == "layers":
        del options["--student"]
    assert message in refused(kd, *more)


def test_bad_rows_are_named(refused, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"instruction": "w5", "output": "w6"}\n{"instruction": "w5", "output": ""}\n')
    assert f"{path.name}, line 2: the answer" in refused(train_file=path)


NAMES = ["sft", "kd"]


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_short_and_documented(name):
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    head = text.split('"""')[1]
    assert len(text.splitlines()) <= 150
    assert f"python examples/causal_lm/{name}.py" in head
    assert "Limits:" in head
    assert f"`{name}.py`" in (EXAMPLES / "README.md").read_text(encoding="utf-8")
