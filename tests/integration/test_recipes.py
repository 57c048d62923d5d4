"""The recipes as a user runs them, on tiny models: losses, accumulation, resuming, bad input."""

from __future__ import annotations

import importlib
import json
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")

import akl
import evaluate
import kd
import seqkd
import sft
import transformers
import wasd
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


def batch(folder, longest=None):
    """Ids, mask and labels of all rows; the template written out by hand, and answers cut."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "teacher")
    ids, labels = [], []
    for line in (folder / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(f"user w3 {row['instruction']} <eos> assistant w3").input_ids
        answer = tokenizer(f"{row['output']} <eos>").input_ids[:longest]
        ids.append(torch.tensor(prompt + answer))
        labels.append(torch.tensor([-100] * len(prompt) + answer))
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(row) for row in ids], batch_first=True)
    return pad(ids, batch_first=True), mask, pad(labels, batch_first=True, padding_value=-100)


def naive_losses(folder, objective, steps=STEPS, rate=0.1, longest=None):
    """Losses and weights of plain gradient descent on all rows."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    student, teacher = load(folder / "student"), load(folder / "teacher")
    ids, mask, labels = batch(folder, longest)
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


def akl_of(student, teacher, labels):
    values, pair = [], (teacher.double().softmax(-1), student.double().softmax(-1))
    for p, q in zip(*pair, strict=True):
        order = p.argsort(descending=True)
        before = p[order].cumsum(0) - p[order]
        head = torch.zeros(len(p), dtype=torch.bool)
        head[order[before <= 0.5]] = True  # with the token that exceeds half of the mass
        gaps = [(p - q).abs()[part].sum().detach() for part in (head, ~head)]
        forward, reverse = (p * (p / q).log()).sum(), (q * (q / p).log()).sum()
        values.append((gaps[0] * forward + gaps[1] * reverse) / sum(gaps))
    return torch.stack(values).mean()


def cosine_kernel(embedding, k=8):
    unit = embedding.double() / embedding.double().norm(dim=-1, keepdim=True)
    costs = 1 - unit @ unit.T
    near = costs.argsort(dim=-1)[:, : k + 1]
    kept = torch.zeros_like(costs, dtype=torch.bool).scatter(1, near, True)
    kernel = (-costs / 0.001).exp().masked_fill(~(kept | kept.T), 0.0)
    return kernel.fill_diagonal_(1.0)


def naive_wasd(p, q, kernel, *, assistant):
    """The value for one position, by scalings with a whole matrix."""
    r = q
    if assistant:
        mixture = (0.5 * p**3 + 0.5 * q**3) ** (1 / 3)
        r = mixture / mixture.sum()
    u, v, a = r, p, torch.ones_like(r)
    for _ in range(10):
        u = r / (kernel @ v)
        v = p / (kernel.T @ u)
        a = (a / (kernel @ (r * a))).sqrt()
    return 100 * (r * (0.001 * (u.log() - a.log())).detach()).sum()


PINNED = {
    "sft": (sft, [], ce),
    "akl": (akl, [], akl_of),
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


@pytest.mark.parametrize("assistant", [False, True])
def test_wasd_has_its_own_arithmetic(world, run, tmp_path, assistant):
    pytest.importorskip("faiss")
    near = tmp_path / "near"
    shutil.copytree(world, near)
    teacher = transformers.AutoModelForCausalLM.from_pretrained(near / "teacher")
    embedding = teacher.get_input_embeddings().weight.detach()
    embedding.mul_(0.03).add_(torch.linspace(-0.1, 0.1, embedding.shape[1]))  # near tokens
    teacher.save_pretrained(near / "teacher")
    kernel = cosine_kernel(embedding)
    assert ((kernel > 0.1) & (kernel < 0.9)).float().mean() > 0.1

    def objective(student, teacher, labels):
        pair = teacher.double().softmax(-1), (student.double() / 2).softmax(-1)
        values = [naive_wasd(p, q, kernel, assistant=assistant) for p, q in zip(*pair, strict=True)]
        return torch.stack(values).mean()

    more = ["--learning-rate", "3", *(["--assistant", "0.5"] if assistant else [])]
    folder = run(wasd, *PLAIN, *more, teacher=near / "teacher")
    losses, trained = naive_losses(near, objective, rate=3.0)
    assert logged(folder) == pytest.approx(losses, abs=1e-4)
    assert abs(losses[0] - losses[-1]) > 1e-3
    assert_same(weights(folder), {name: trained[name] for name in weights(folder)}, 1e-4)


def test_wasd_without_near_tokens_is_nearly_reverse_kl():
    """Where the kernel is the identity: Σ r·(log(r/p) + 0.05·log r), by hand."""
    pytest.importorskip("faiss")
    student, teacher = torch.randn(2, 7, 12).unbind()
    loss = wasd.Wasd(torch.eye(12), temperature=2.0, teacher_temperature=1.0)
    r, p = (student / 2).softmax(-1), teacher.softmax(-1)
    expected = (r * ((r / p).log() + 0.05 * r.log())).sum(-1)
    torch.testing.assert_close(loss(student, teacher), expected.mean(), rtol=1e-3, atol=1e-4)
    mask = torch.tensor([True, False] * 3 + [False])
    masked = student.masked_fill(~mask.unsqueeze(-1), float("nan"))
    value = loss(masked, teacher, mask=mask)
    torch.testing.assert_close(value, expected[mask].mean(), rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="not finite"):
        loss(masked, teacher)
    with pytest.raises(ValueError, match="alpha < 1"):
        wasd.Wasd(torch.eye(12), assistant=1.0)


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


def held_out_loss(world, folder, objective, rows):
    """Of the trained student, on the first rows of the data."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    student, teacher = load(folder / "student"), load(world / "teacher")
    ids, mask, labels = (tensor[:rows] for tensor in batch(world))
    counted = labels[:, 1:] != -100
    with torch.no_grad():
        pair = (m(ids, mask).logits[:, :-1][counted] for m in (student, teacher))
        return objective(*pair, None).item()


@pytest.mark.parametrize("stored", [0, VOCAB])
def test_an_evaluation_reads_the_rows_that_are_held_out(run, world, stored):
    held_out = ["--eval-rows", 3, "--eval-strategy", "epoch", "--stored-tokens", stored]
    folder = run(kd, *PLAIN, *held_out)
    expected = held_out_loss(world, folder, kl, 3)
    assert logged(folder, "eval_loss")[-1] == pytest.approx(expected, abs=1e-4)


def test_the_teacher_answers_once_and_its_answers_are_trained_on(run, world, tmp_path, capsys):
    file = tmp_path / "answers.jsonl"
    options = [*PLAIN, "--max-new-tokens", 8, "--answers-file", file]
    first = run(seqkd, *options)
    made, rows = file.stat().st_mtime_ns, file.read_text().splitlines()
    given = (world / "rows.jsonl").read_text().splitlines()
    assert [json.loads(row)["instruction"] for row in rows] == [
        json.loads(row)["instruction"] for row in given
    ]
    # Supervised training on the same file is the same training, as it has the format of the data.
    assert_same(
        weights(first), weights(run(sft, *PLAIN, train_file=file, output_dir=tmp_path / "sft"))
    )
    run(seqkd, *options, output_dir=tmp_path / "again")
    assert file.stat().st_mtime_ns == made
    with pytest.raises(SystemExit, match="1"):
        run(seqkd, *options, "--seed", 11, output_dir=tmp_path / "other")
    assert "made with other settings (seed)" in " ".join(capsys.readouterr().err.split())


def test_an_interrupted_generation_continues_with_the_same_answers(run, world, tmp_path):
    rows = (world / "rows.jsonl").read_text().splitlines()
    (tmp_path / "many.jsonl").write_text("\n".join(rows * 3))
    options = {"train_file": tmp_path / "many.jsonl"}
    more = ["--max-steps", 1, "--max-new-tokens", 6, "--save-strategy", "no", "--answers-file"]
    run(seqkd, *more, tmp_path / "whole.jsonl", **options, output_dir=tmp_path / "whole")
    whole = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    # Killed in the second of three batches, while it wrote a line.
    (tmp_path / "cut.partial.jsonl").write_text("".join(whole[:11]) + whole[11][:9])
    shutil.copy(tmp_path / "whole.made-of.json", tmp_path / "cut.made-of.json")
    run(seqkd, *more, tmp_path / "cut.jsonl", **options, output_dir=tmp_path / "cut")
    assert (tmp_path / "cut.jsonl").read_text().splitlines(keepends=True) == whole
    assert not (tmp_path / "cut.partial.jsonl").exists()


# Answers of the student


@pytest.fixture
def on_policy():
    """The recipes that need TRL, by their names."""
    pytest.importorskip("otkd.integrations.trl", exc_type=ImportError)
    names = ("gkd", "minillm", "distillm", "distillm2")
    return {name: importlib.import_module(name) for name in names}


SHORT = ["--max-completion-length", "6"]
# Near 0, so that the most probable token is always sampled.
GREEDY = [*SHORT, "--temperature", "1e-6"]


def greedy_rows(world, longest=6):
    """The prompts with the most probable answers of the student, and the lengths of the prompts."""
    student = transformers.AutoModelForCausalLM.from_pretrained(world / "student")
    ids, mask, labels = batch(world)
    for row, counted, known in zip(ids, labels != -100, mask, strict=True):
        row = row[(known != 0) & ~counted]
        start = len(row)
        while len(row) < start + longest and (len(row) == start or row[-1] != 2):  # <eos>
            with torch.no_grad():
                row = torch.cat([row, student(row[None]).logits[0, -1:].argmax(-1)])
        yield row, start


def first_loss_on_greedy_answers(world, objective):
    load = transformers.AutoModelForCausalLM.from_pretrained
    student, teacher = load(world / "student"), load(world / "teacher")
    pairs = []
    for row, start in greedy_rows(world):
        with torch.no_grad():
            pairs.append([m(row[None]).logits[0, start - 1 : -1] for m in (student, teacher)])
    return objective(*map(torch.cat, zip(*pairs, strict=True)), None).item()


def rkl(student, teacher, labels):
    return kl(teacher, student, labels)


def jsd(student, teacher, labels, beta=0.25):
    q, p = student.softmax(-1), teacher.softmax(-1)
    m = beta * p + (1 - beta) * q
    forward, reverse = (p * (p / m).log()).sum(-1), (q * (q / m).log()).sum(-1)
    return (beta * forward + (1 - beta) * reverse).mean()


def skl(student, teacher, labels, alpha=0.1):
    q, p = student.softmax(-1), teacher.softmax(-1)
    return (p * (p / (alpha * p + (1 - alpha) * q)).log()).sum(-1).mean()


def srkl(student, teacher, labels):
    return skl(teacher, student, labels)


GIVEN = {
    "gkd": (["--student-share", "0", "--jsd-beta", "0.25"], jsd),
    "gkd, kl": (["--student-share", "0", "--jsd-beta", "0"], kl),
    "gkd, reverse": (["--student-share", "0", "--jsd-beta", "1"], rkl),
    "distillm": (["--eval-rows", "1"], skl),
    "distillm, reverse": (["--eval-rows", "1", "--direction", "reverse"], srkl),
}


@pytest.mark.parametrize("name", GIVEN)
def test_on_the_answers_of_the_data_losses_are_those_of_a_plain_loop(
    world, run, on_policy, tmp_path, name
):
    more, objective = GIVEN[name]
    rows = (world / "rows.jsonl").read_text().splitlines()
    held_out = rows[-1:] if "--eval-rows" in more else []
    (tmp_path / "rows.jsonl").write_text("\n".join([*held_out, *rows]))
    recipe = on_policy[name.partition(",")[0]]
    folder = run(recipe, *PLAIN, *SHORT, *more, train_file=tmp_path / "rows.jsonl")
    losses, trained = naive_losses(world, objective)
    assert logged(folder) == pytest.approx(losses, abs=1e-4)
    assert logged(folder, "share") == [0] * STEPS
    assert_same(weights(folder), {name: trained[name] for name in weights(folder)}, 1e-4)


SAMPLED = {
    "gkd": (["--student-share", "1", "--jsd-beta", "0.25"], jsd),
    "minillm": ([], rkl),
    "distillm2": (["--student-share", "1"], srkl),
}


@pytest.mark.parametrize("name", SAMPLED)
def test_on_answers_of_the_student_the_first_loss_is_that_of_its_own_tokens(
    world, run, on_policy, name
):
    more, objective = SAMPLED[name]
    folder = run(on_policy[name], *PLAIN, *GREEDY, *more)
    expected = first_loss_on_greedy_answers(world, objective)
    assert logged(folder)[0] == pytest.approx(expected, abs=1e-4)
    given, _ = naive_losses(world, objective, steps=1)
    assert abs(given[0] - expected) > 1e-3  # on the answers of the data it is another


def test_an_evaluation_reads_the_answers_of_the_data(world, run, on_policy):
    held_out = ["--eval-rows", 3, "--eval-strategy", "epoch", "--student-share", 1]
    held_out += ["--per-device-train-batch-size", 5]
    folder = run(on_policy["gkd"], *PLAIN, *SHORT, *held_out, "--jsd-beta", 0)
    expected = held_out_loss(world, folder, kl, 3)
    assert logged(folder, "eval_loss")[-1] == pytest.approx(expected, abs=1e-4)


def test_distillm2_has_a_loss_of_its_own_on_answers_of_the_teacher(world, run, on_policy, tmp_path):
    shutil.copytree(world, tmp_path / "world")
    file = tmp_path / "answers.jsonl"
    more = ["--student-share", 0, "--answers-file", file]
    folder = run(on_policy["distillm2"], *PLAIN, *SHORT, *more)
    shutil.copy(file, tmp_path / "world" / "rows.jsonl")
    losses, trained = naive_losses(tmp_path / "world", skl, longest=6)
    assert logged(folder) == pytest.approx(losses, abs=1e-4)
    assert_same(weights(folder), {name: trained[name] for name in weights(folder)}, 1e-4)


def test_the_share_grows_with_the_validation_loss(run, on_policy, tmp_path):
    share = on_policy["distillm"].adaptive_share
    assert share([], 0.1) == share([1.0], 0.1) == share([1.0, 1.05, 0.5, 1.05], 0.1) == 0
    assert share([1.0, 1.1, 1.1], 0.1) == pytest.approx(0.1)
    assert share([1.0, 1.1, 1.3, 0.2], 0.1) == pytest.approx(0.2)
    assert share([float(i) for i in range(20)], 0.1) == 1
    # Below any loss, so that every evaluation raises the share.
    more = ["--eval-rows", 2, "--loss-epsilon", -100, "--per-device-train-batch-size", 3]
    folder = run(on_policy["distillm"], *PLAIN, *SHORT, *more)
    assert logged(folder, "share") == pytest.approx([0, 0, 0.1, 0.1, 0.2, 0.2])
    assert len(logged(folder, "eval_loss")) == 1 + STEPS


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_on_policy_accumulation_equals_the_full_batch(run, on_policy, tmp_path, share):
    runs = [
        run(
            on_policy["gkd"],
            *(*PLAIN, *SHORT, "--student-share", share),
            output_dir=tmp_path / str(size),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        )
        for size, steps in ((8, 1), (2, 4))
    ]
    assert logged(runs[0]) == pytest.approx(logged(runs[1]), abs=1e-5)
    assert_same(weights(runs[0]), weights(runs[1]), 1e-5)


def test_on_policy_refusals(refused, on_policy):
    gkd, distillm = on_policy["gkd"], on_policy["distillm"]
    assert "there are only 8" in refused(gkd, *SHORT, "--per-device-train-batch-size", 9)
    assert "no room for a prompt" in refused(gkd, "--max-completion-length", 32)
    assert "line 1: the prompt has" in refused(gkd, "--max-completion-length", 28)
    assert "share of the student's answers is 2" in refused(gkd, *SHORT, "--student-share", 2)
    assert "beta" in refused(gkd, *SHORT, "--jsd-beta", 2)
    assert "needs validation" in refused(distillm, *SHORT, "--eval-rows", 0)
    assert "the same value" in refused(distillm, *SHORT, "--save-strategy", "steps")
    assert "'forward', 'reverse'" in refused(distillm, *SHORT, "--direction", "both")


# Evaluation


def measure(world, tmp_path, *more):
    file = tmp_path / "measured.json"
    argv = ["--teacher", world / "teacher", "--data", world / "rows.jsonl", "--max-length", 32]
    argv += ["--max-new-tokens", 6, "--batch-size", 3, "--output", file, *more]
    evaluate.main([str(part) for part in argv])
    return json.loads(file.read_text())


def test_an_evaluation_has_the_metrics_of_a_plain_computation(world, tmp_path, capsys):
    pytest.importorskip("rouge_score")
    found = measure(world, tmp_path, "--students", world / "student", "--seeds", 1, 2, 3)
    load = transformers.AutoModelForCausalLM.from_pretrained
    ids, mask, labels = batch(world)
    counted = labels[:, 1:] != -100
    with torch.no_grad():
        ours, theirs = (
            load(world / name)(ids, mask).logits[:, :-1][counted] for name in ("student", "teacher")
        )
    student, teacher = found["models"][str(world / "student")], found["models"]["teacher"]
    assert found["rows"] == ROWS
    assert student["cross_entropy"] == pytest.approx(ce(ours, None, labels[:, 1:][counted]).item())
    assert student["kl"] == pytest.approx(kl(ours, theirs, None).item(), rel=1e-4)
    assert student["reverse_kl"] == pytest.approx(kl(theirs, ours, None).item(), rel=1e-4)
    agree = (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()
    assert student["agreement"] == pytest.approx(agree)
    assert teacher["kl"] == pytest.approx(0, abs=1e-6)
    assert teacher["agreement"] == 1
    assert len(set(student["rouge_l"])) == 3  # every seed has answers of its own
    assert all(0 <= score <= 100 for score in student["rouge_l"])
    shown = capsys.readouterr().out
    spread = statistics.stdev(student["rouge_l"])
    assert f"{statistics.mean(student['rouge_l']):.2f} ± {spread:.2f}" in shown
    again = measure(world, tmp_path, "--students", world / "student", "--seeds", 2)
    assert again["models"][str(world / "student")]["rouge_l"] == student["rouge_l"][1:2]


def test_an_evaluation_refuses_before_it_starts_and_ends_cleanly(
    world, tmp_path, monkeypatch, capsys
):
    for student, said in ((tmp_path / "absent", "absent"), (tmp_path / "other", "tokenizers")):
        if student.name == "other":
            shutil.copytree(world / "student", student)
            save_tokenizer(student, VOCAB - 1)
        with pytest.raises(SystemExit, match="1"):
            measure(world, tmp_path, "--students", world / "student", student)
        assert said in capsys.readouterr().err

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("otkd.tasks.causal_lm.answers.sampled_answers", interrupt)
    with pytest.raises(SystemExit, match="130"):
        measure(world, tmp_path, "--students", world / "student")
    assert "the same command starts again" in " ".join(capsys.readouterr().err.split())
    assert not [*tmp_path.glob("*.json")]


# Interruptions


SHUFFLED = ["--per-device-train-batch-size", "2", "--num-train-epochs", "3"]
SHUFFLED += ["--save-strategy", "steps", "--save-steps", "3"]
RESUMED = {
    "sft": ["--lora-r", "2"],
    "kd": ["--stored-tokens", "5"],
    "gkd": SHORT,
    "distillm": [*SHORT, "--eval-rows", "2", "--eval-strategy", "steps", "--eval-steps", "2"],
}
RESUMED["distillm"] += ["--loss-epsilon", "-100"]  # every evaluation raises the share


@pytest.mark.parametrize("name", RESUMED)
def test_an_interrupted_run_ends_with_the_same_weights(
    run, tmp_path, monkeypatch, capsys, request, name
):
    recipe, more = {"sft": sft, "kd": kd}.get(name), RESUMED[name]
    if recipe is None:
        recipe = request.getfixturevalue("on_policy")[name]
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
    more = ["--num-train-epochs", "15", "--per-device-train-batch-size", "4"]
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
        assert not [*tmp_path.glob("run/*")]
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
    for number, more in enumerate(([], ["--stored-tokens", VOCAB], ["--loss", "sinkhorn"])):
        # All tokens are stored, so that the plain run has the same losses without that option.
        expected = [] if "--stored-tokens" in more else more
        plain = run(kd, *PLAIN, *expected, output_dir=tmp_path / f"plain-{number}")
        folder = run(
            kd,
            *(*PLAIN, *more),
            teacher=tmp_path / "padded",
            output_dir=tmp_path / f"padded-{number}",
        )
        assert logged(folder) == pytest.approx(logged(plain), rel=1e-4)


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


NAMES = ["sft", "seqkd", "kd", "gkd", "minillm", "distillm", "distillm2", "akl", "wasd", "evaluate"]


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_short_and_documented(name):
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    head = text.split('"""')[1]
    assert len(text.splitlines()) <= 150
    assert f"python examples/causal_lm/{name}.py" in head
    assert "Limits:" in head
    assert f"`{name}.py`" in (EXAMPLES / "README.md").read_text(encoding="utf-8")
