"""Protocols of `otkd compare`: what they fix, tuning, evaluations, processes side by side."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers

import otkd
from otkd.integrations.annealing import TemperatureAnnealing
from otkd.study import training
from otkd.study.kinds import make_experiment
from otkd.study.messages import StudyError
from otkd.study.objectives import build_objective, objective_options
from otkd.study.plan import best_candidate
from otkd.study.protocols import Objective, Tuning, load_protocol
from otkd.study.results import read_result
from otkd.study.runs import Run
from otkd.study.settings import Settings
from otkd.tasks import Task, get_task, task_names
from otkd.teachers import DenseTeacher
from tests.studies.test_cli import WORDS, make_result, otkd_command, said, save_bert, start_command

CLASSIFICATION = [name for name in task_names() if isinstance(get_task(name), Task)]
GLUE = [name for name in CLASSIFICATION if name != "rotten-tomatoes"]
HEADERS = {
    "SST-2": "sentence\tlabel",
    "MNLI": "index\tsentence1\tsentence2\tgold_label",
    "MRPC": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
    "RTE": "index\tsentence1\tsentence2\tlabel",
    "QNLI": "index\tquestion\tsentence\tlabel",
    "QQP": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
    "WNLI": "index\tsentence1\tsentence2\tlabel",
}
QUICK = ("--epochs", 1, "--teacher-epochs", 1, "--max-length", 32, "--student-layers", 2)
QUICK += ("--precision", "fp32")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    """All of GLUE's tasks in its official layout, few rows each, more of the largest."""
    root = tmp_path_factory.mktemp("glue")
    for title in ("CoLA", *HEADERS):
        (root / title).mkdir()
        splits = ("matched", "mismatched") if title == "MNLI" else (None,)
        names = ["train.tsv", *(f"dev_{name}.tsv" if name else "dev.tsv" for name in splits)]
        for name in names:
            count = train_rows(title) if name == "train.tsv" else 20
            lines = [row(title, index) for index in range(count)]
            if title in HEADERS:
                lines.insert(0, HEADERS[title])
            if title == "QQP":
                lines.insert(3, "7\t8\t9\tit is broken")
            (root / title / name).write_text("\n".join(lines) + "\n")
    return root


def train_rows(title):
    return 100 if title in ("MNLI", "QNLI", "QQP") else 40


def row(title, index):
    first = " ".join(WORDS[15 + (index + step) % 4] for step in range(index % 5 + 1)) + ' is " wet'
    second = "it is not wet ." if index % 2 else "it is wet ."
    entails = "not_entailment" if index % 2 else "entailment"
    inference = ("entailment", "neutral", "contradiction")[index % 3]
    return {
        "CoLA": f"gj04\t{index % 2}\t*\t{first} {second}",
        "SST-2": f"{first} {second}\t{index % 2}",
        "MNLI": f"{index}\t{first}\t{second}\t{inference}",
        "MRPC": f"{index % 2}\t1\t2\t{first}\t{second}",
        "RTE": f"{index}\t{first}\t{second}\t{entails}",
        "QNLI": f"{index}\t{first}\t{second}\t{entails}",
        "QQP": f"{index}\t1\t2\t{first}\t{second}\t{index % 2}",
        "WNLI": f"{index}\t{first}\t{second}\t{index % 2}",
    }[title]


# What the files say -------------------------------------------------------------------------------

AUTHOR = {  # mode, batch, epochs, learning rate, alpha, T; the teacher's batch, epochs, rate
    "cola": (False, 16, 20, 5e-5, 0.9, 1, 2, 8, 2e-5),
    "sst2": (False, 32, 2, 4e-5, 0.9, 2, 16, 10, 2e-5),
    "mnli": (True, 16, 10, 4e-5, 0.8, 3, 128, 7, 1e-5),
    "mrpc": (True, 16, 3, 3e-5, 1, 4, 8, 10, 5e-5),
    "rte": (False, 16, 5, 2e-5, 0.9, 3.5, 15, 10, 3e-5),
    "qnli": (False, 16, 6, 3e-5, 0.8, 3, 8, 8, 2e-5),
    "qqp": (True, 32, 8, 4e-5, 1, 4, 8, 5, 3e-6),
}


@pytest.mark.parametrize("task", AUTHOR)
def test_author_is_the_published_protocol(task):
    protocol = load_protocol("author")
    settings = protocol.resolve(Settings(task), given=())
    fields = ("anneal", "batch_size", "epochs", "learning_rate", "alpha", "temperature")
    fields += ("teacher_batch_size", "teacher_epochs", "teacher_learning_rate")
    assert tuple(getattr(settings, name) for name in fields) == AUTHOR[task]
    assert (settings.evaluate_every, settings.score, settings.max_length) == (5, "best", 128)
    assert not settings.freeze_embeddings
    assert not settings.group_by_length
    objectives = {each.name: each for each in protocol.objectives(settings, given=())}
    assert list(objectives) == ["kl", "rkl", "jsd", "tvd", "sinkd"]
    chosen = objectives["sinkd"].settings
    ours = build_objective("sinkd", objective_options("sinkd", chosen))
    published = otkd.SinKDLoss.author(chosen.alpha, 0.8, temperature=chosen.temperature)
    logits, labels = torch.randn(2, 16, 2), torch.randint(0, 2, (16,))
    assert torch.equal(ours(*logits, labels=labels), published(*logits, labels=labels))
    # The baseline is the same objective, less the transport; no T² in either.
    kl = build_objective("kl", objective_options("kl", objectives["kl"].settings))
    assert not kl.terms["kl"].rescale_t2
    student = logits[0].clone().requires_grad_()
    without = otkd.SinKDLoss.author(chosen.alpha, 0.0, temperature=chosen.temperature)
    gradients = [
        torch.autograd.grad(loss(student, logits[1], labels=labels), student)[0]
        for loss in (kl, without)
    ]
    torch.testing.assert_close(*gradients)


# Of all settings that a protocol resolves to, so that its results can still be resumed.
RESOLVED = {
    "author": "2cad064c88b5ea37",
    "fair": "1df19b3308a03b2f",
    "pilot": "5ab9b181db28ae09",
    "sensitivity": "2e050b618d3b8af8",
}


@pytest.mark.parametrize("name", RESOLVED)
def test_protocols_resolve_to_the_settings_of_their_results(name):
    protocol = load_protocol(name)
    shared = protocol.tuning.settings if protocol.tuning else {}
    resolved = []
    # Of the options of losses, a result depends only on those of its own loss.
    of_losses = {o for loss in otkd.list_losses() for o in objective_options(loss, Settings("rte"))}
    # Settings that came later have no effect with their defaults, and are not in result files.
    of_losses |= {
        "student_vocabulary",
        "text_column",
        "token_cost",
        "warmup",
        "answer_tokens",
        "rouge_rows",
        "rouge_seed",
    }
    for task in CLASSIFICATION:
        for objective in protocol.objectives(protocol.resolve(Settings(task), ()), ()):
            for each in (objective, *objective.tried(**shared)):
                values = dataclasses.asdict(each.settings)
                shared_by_losses = {k: v for k, v in values.items() if k not in of_losses}
                candidates = list(map(dict, each.candidates))
                options = objective_options(each.loss, each.settings)
                resolved.append([task, each.name, each.loss, shared_by_losses, candidates, options])
    text = json.dumps([protocol.title, protocol.seeds, resolved], sort_keys=True, default=str)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == RESOLVED[name]


def test_fair_gives_every_loss_the_same_budget():
    protocol = load_protocol("fair")
    settings = protocol.resolve(Settings("sst2"), given=())
    assert protocol.seeds >= 5
    assert settings.score == "last"
    assert settings.max_train_rows == 10_000
    objectives = protocol.objectives(settings, given=())
    # Hard labels have nothing of their own to choose.
    assert {len(each.candidates) for each in objectives if each.name != "ce"} == {6}
    names = {"ce", "kl", "rkl", "jsd", "tvd", "sinkd", "batch_l1", "batch_hidden", "batch_sample"}
    assert names <= {each.name for each in objectives}
    assert len({(each.settings.epochs, each.settings.learning_rate) for each in objectives}) == 1


def test_the_command_line_comes_before_the_protocol():
    protocol = load_protocol("author")
    settings = protocol.resolve(Settings("rte", epochs=1, alpha=0.5), given={"epochs", "alpha"})
    assert (settings.epochs, settings.alpha, settings.temperature) == (1, 0.5, 3.5)
    (objective,) = protocol.objectives(
        dataclasses.replace(settings, author=False), given={"author"}, names=["sinkd"]
    )
    assert not objective.settings.author


def test_the_command_line_comes_before_candidates_and_tuning():
    protocol = load_protocol("fair")
    given = {"temperature", "learning_rate"}
    settings = protocol.resolve(Settings("rte", temperature=3, learning_rate=1e-3), given)
    (kl,) = protocol.objectives(settings, given, ["kl"])
    assert kl.candidates == ({"alpha": 0.9}, {"alpha": 0.5})
    tried = kl.tried(**protocol.tuning.without(given).settings)
    assert {(t.settings.temperature, t.settings.learning_rate) for t in tried} == {(3, 1e-3)}
    # Nothing is left to choose where all of it was given.
    assert not protocol.objectives(settings, {*given, "alpha"}, ["kl"])[0].candidates
    # And nothing changes where nothing of it was.
    (kl,) = protocol.objectives(settings, {"epochs"}, ["kl"])
    assert kl.candidates == protocol.losses["kl"]["candidates"]
    assert protocol.tuning.without({"epochs"}) == protocol.tuning


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[losses.kl]\ntemprature = 1", "did you mean 'temperature'"),
        ("[settings]\nepochs = 1", "losses is missing"),
        ("[tasks.coal]\nepochs = 1\n[losses.kl]", "cola"),
        ("[losses.kl]\ncandidates = [{ temperature = 1 }]", r"no \[tuning\]"),
        (
            "[losses.kl]\n[tuning]\ntrain_rows = 0\nheld_out = 0.1",
            "tuning.train_rows must be at least 1, got 0",
        ),
        ("[losses.kl]\nmax_length = 3", "losses.kl.max_length is not known"),
        ("losses = ", "Invalid value"),
        ("losses = 1", "losses must be a valid dictionary"),
        ('seeds = "x"\n[losses.kl]', "mine.toml: seeds must be a valid integer, got 'x'"),
        ("title = 1\n[losses.kl]", "title must be a valid string, got 1"),
        (
            '[settings]\nepochs = "3"\n[losses.kl]',
            "epochs must be a valid integer, got '3'",
        ),
        (
            "[settings]\nepochs = true\n[losses.kl]",
            "epochs must be a valid integer, got True",
        ),
        (
            "[settings]\nmax_train_rows = 3.5\n[losses.kl]",
            "settings.max_train_rows must be a valid integer, got 3.5",
        ),
        (
            "[tasks.rte]\nepochs = 3.5\n[losses.kl]",
            "tasks.rte.epochs must be a valid integer",
        ),
        (
            '[tasks.rte]\nfreeze_embeddings = "no"\n[losses.kl]',
            "tasks.rte.freeze_embeddings must be a valid boolean, got 'no'",
        ),
        ('[losses.kl]\nalpha = "1"', "losses.kl.alpha must be a valid number, got '1'"),
        ("[losses.kl]\nrescale_t2 = 1", "rescale_t2 must be a valid boolean, got 1"),
        ("[losses.kl]\nloss = 3", "losses.kl.loss must be a valid string, got 3"),
        ("[losses]\nkl = 3", "losses.kl must be a valid"),
        ("[losses.kl]\ncandidates = 3", "losses.kl.candidates must be a valid list, got 3"),
        ("[losses.kl]\ncandidates = [3]", r"losses.kl.candidates\[0\] must be a valid"),
        ("[losses.kl]\ncandidates = [{ batch_cost = 1 }]", "batch_cost must be 'l1', 'euclidean'"),
        (
            '[losses.kl]\n[tuning]\ntrain_rows = "9"',
            "train_rows must be a valid integer, got '9'",
        ),
        ("[losses.kl]\n[tuning]\ntrain_rows = 9", "tuning.held_out is missing"),
        ("[loses.kl]", "did you mean 'losses'"),
    ],
)
def test_mistakes_in_a_protocol_are_named(tmp_path, text, message):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(StudyError, match=message):
        load_protocol(str(path))


def test_a_whole_number_is_a_number(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("[settings]\nlearning_rate = 1\n[losses.kl]")
    rate = load_protocol(str(path)).settings["learning_rate"]
    assert (rate, type(rate)) == (1.0, float)


def test_protocols_and_losses_that_do_not_exist_are_named(teacher, glue, tmp_path):
    for name in ("unfair", "published"):
        with pytest.raises(StudyError, match=r"author, fair, pilot, sensitivity; "):
            load_protocol(name)
    with pytest.raises(StudyError, match=r"no protocol 'fiar'; did you mean 'fair'\?"):
        load_protocol("fiar")
    with pytest.raises(StudyError, match=r"no loss 'skl'; did you mean 'kl'\? It has kl, rkl"):
        load_protocol("author").objectives(Settings("rte"), (), ["skl"])
    arguments = ["--teacher", teacher, "--data-dir", glue, "--output-dir", tmp_path]
    result = otkd_command("compare", "rte", *arguments)
    assert result.exit_code == 1
    assert "a --protocol" in said(result)
    result = otkd_command("compare", "rte", "--losses", "kl", "--workers", 0, *arguments)
    assert "--workers must lie between 1 and" in said(result)
    result = otkd_command("compare", "rte", "--losses", "kl", "--score", "best", *arguments)
    assert "--score best needs --evaluate-every" in said(result)
    result = otkd_command(
        *("train", "rte", "--loss", "kl", "--epsilon", 2, "--max-length", 64), *arguments
    )
    assert "--epsilon has no effect on kl" in said(result)
    result = otkd_command("train", "rte", "--loss", "kl", "--score", "best", *arguments)
    assert "No such option" in said(result)  # the student that is saved is the last


# From end to end ----------------------------------------------------------------------------------


# Its 6 candidates per loss make the fair protocol slow; the tasks differ in their data only.
@pytest.mark.parametrize(("protocol", "tasks"), [("author", GLUE), ("fair", ["mnli"])])
def test_every_task_of_glue_runs_under_the_protocols(teacher, glue, tmp_path, protocol, tasks):
    result = otkd_command(
        *("compare", ",".join(tasks), "--protocol", protocol, "--losses", "kl,sinkd"),
        *("--seeds", 1, "--teacher", teacher, "--data-dir", glue, "--output-dir", tmp_path, *QUICK),
        *(("--batch-size", 4) if protocol == "author" else ()),
        *("--workers", 1),
    )
    assert result.exit_code == 0, result.output
    for task in tasks:
        saved = read_result(tmp_path / protocol / task / "sinkd" / "0.json")
        assert saved.settings["loss.author"]
        assert saved.rows["train"] == train_rows(get_task(task).title)
        steps = [evaluation["step"] for evaluation in saved.evaluations]
        if protocol == "author":
            assert steps == [*range(5, saved.steps + 1, 5)]
            assert saved.steps == saved.rows["train"] / 4
            best = max(evaluation[saved.headline] for evaluation in saved.evaluations)
            assert saved.score == best
        else:
            assert steps == [saved.steps]
    matched = read_result(tmp_path / protocol / "mnli" / "kl" / "0.json").metrics
    assert set(matched) == {"matched_accuracy", "mismatched_accuracy"}


TUNED = """
seeds = 2
[settings]
epochs = 1
batch_size = 8
max_length = 32
student_layers = 2
precision = "fp32"
teacher_epochs = 2
teacher_learning_rate = 5e-3
[losses.kl]
candidates = [{ learning_rate = 1e-7 }, { learning_rate = 2e-2, epochs = 8 }]
[losses.mine]
loss = "sinkd"
batch_cost = "hidden"
debias = true
candidates = [{ sinkhorn_weight = 0.1 }, { sinkhorn_weight = 1 }]
[tuning]
train_rows = 24
held_out = 0.25
"""


@pytest.fixture(scope="module")
def tuned(teacher, glue, tmp_path_factory):
    """A comparison with tuning, done with two processes."""
    root = tmp_path_factory.mktemp("tuned")
    (root / "mine.toml").write_text(TUNED)
    command = ["compare", "rte", "--protocol", root / "mine.toml", "--teacher", teacher]
    command += ["--data-dir", glue, "--output-dir", root, "--workers", min(2, os.cpu_count())]
    result = otkd_command(*command)
    assert result.exit_code == 0, result.output
    return root / "mine" / "rte", command, result


def test_each_loss_is_trained_with_its_best_candidate(tuned):
    folder, _, _ = tuned
    for name, field in (("kl", "learning_rate"), ("mine", "loss.sinkhorn_weight")):
        tried = [read_result(folder / name / "tuning" / f"{number}.json") for number in (0, 1)]
        best = max(tried, key=lambda result: result.score)
        finals = [read_result(folder / name / f"{seed}.json") for seed in (0, 1)]
        for final in finals:
            assert final.settings[field] == best.settings[field]
            assert "held_out" not in final.settings
            assert final.rows == {"train": 40, "dev": 20}
        assert {final.seed for final in finals} == {0, 1}
        assert tried[0].rows == {"train": 24, "dev": 10}
        assert tried[0].settings["held_out"] == 0.25


@pytest.mark.parametrize(("scores", "best"), [((0.1, 0.3, 0.2), 1), ((0.2, 0.1, 0.2), 0)])
def test_the_best_candidate_is_chosen_and_the_first_of_equals(tmp_path, scores, best):
    candidates = tuple({"temperature": float(number)} for number in (1, 2, 3))
    objective = Objective("kl", "kl", Settings("rte"), candidates)
    done = {
        Run(tried, 0, tmp_path / f"{number}.json", tmp_path, tuning=True): make_result("kl", 0, s)
        for number, (tried, s) in enumerate(zip(objective.tried(), scores, strict=True))
    }
    assert best_candidate(objective, done) == objective.tried()[best]
    other = Objective("jsd", "jsd", Settings("rte"))
    assert best_candidate(other, done) is other


def test_options_hold_in_tuning_and_students(teacher, glue, tmp_path):
    (tmp_path / "mine.toml").write_text(f"{TUNED}learning_rate = 5e-3\n")
    command = ["compare", "rte", "--protocol", tmp_path / "mine.toml", "--losses", "kl"]
    command += ["--seeds", 1, "--teacher", teacher, "--data-dir", glue, "--output-dir", tmp_path]
    result = otkd_command(*command, "--learning-rate", 1e-3, "--workers", 1)
    assert result.exit_code == 0, result.output
    folder = tmp_path / "mine" / "rte" / "kl"
    tried = [read_result(path).settings for path in sorted(folder.glob("tuning/*.json"))]
    assert [each["epochs"] for each in tried] == [1, 8]
    settings = [*tried, read_result(folder / "0.json").settings]
    assert {each["learning_rate"] for each in settings} == {1e-3}


def test_held_out_rows_are_not_trained_on(teacher, glue, tmp_path):
    settings = Settings("rte", teacher=str(teacher), data_dir=glue, max_length=32, precision="fp32")
    settings = dataclasses.replace(settings, student_layers=2)
    objective = Objective("kl", "kl", settings)
    experiment = make_experiment(settings, [objective], tmp_path, Tuning(1000, 0.25))
    rows = experiment.tuning_rows
    assert len(rows.held_out) == 10
    assert sorted([*rows.index, *rows.held_out]) == list(range(40))
    labels = torch.tensor(experiment.data.train["label"][:])
    assert torch.equal(rows.dev["dev"].labels, labels[rows.held_out])
    assert rows.train["labels"][:] == labels[rows.index].tolist()


def test_one_process_gives_what_two_give_and_finished_runs_are_kept(tuned):
    folder, command, _ = tuned
    again = folder / "mine" / "1.json"
    before, other = read_result(again), (folder / "kl" / "0.json").stat().st_mtime_ns
    again.unlink()
    # On another machine the teacher's weights may be gone; what it said is enough.
    for path in (folder / "teacher" / "model").glob("*"):
        path.unlink()
    result = otkd_command(*command[:-1], 1)
    assert result.exit_code == 0, result.output
    assert "kept: 3 of 4" in said(result)
    after = read_result(again)
    assert after.settings == before.settings
    assert after.metrics == before.metrics
    assert (folder / "kl" / "0.json").stat().st_mtime_ns == other


def test_students_of_hidden_costs_need_the_teachers_states(tuned):
    folder, command, _ = tuned
    (folder / "teacher" / "train-features.safetensors").unlink()
    for path in (folder / "teacher" / "model").glob("*"):
        path.unlink(missing_ok=True)
    result = otkd_command(*command[:-1], 1)
    # Those that are done need them no more.
    assert result.exit_code == 0, result.output
    assert "kept: 4 of 4" in said(result)
    (folder / "mine" / "1.json").unlink()
    result = otkd_command(*command[:-1], 1)
    assert result.exit_code == 1
    assert "the weights of the teacher, which compute them, are not in" in said(result)
    result = otkd_command(*command[:-1], 1, "--losses", "kl")
    assert result.exit_code == 0, result.output


@pytest.mark.skipif(os.cpu_count() == 1, reason="needs two cores")
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_processes_stop_and_go_on(teacher, glue, tmp_path, kind):
    command = ["compare", "rte,wnli", "--losses", "ce,kl", "--seeds", 2, "--workers", 2]
    command += ["--teacher", teacher, "--data-dir", glue, "--output-dir", tmp_path, *QUICK]
    command += ["--epochs", 6]
    process = start_command(*command, start_new_session=True)
    deadline = time.monotonic() + 120
    # The second kind needs no result: a worker takes seconds to start.
    awaited = "*/[0-9].json" if kind == signal.SIGINT else "teacher/result.json"
    while process.poll() is None and time.monotonic() < deadline:
        if list((tmp_path / "rte").glob(awaited)) and len(children_of(process.pid)) > 2:
            break
        time.sleep(0.02)
    # A terminal interrupts the whole group, a supervisor ends the process it knows.
    (os.killpg if kind == signal.SIGINT else os.kill)(process.pid, kind)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + kind, output
    assert ("Interrupted" in output) == (kind == signal.SIGINT)
    assert "finished runs are kept" in output
    assert "Traceback" not in output
    deadline = time.monotonic() + 30
    while children_of(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not children_of(process.pid)
    if kind == signal.SIGTERM:  # ended before the first student
        return
    result = otkd_command(*command, "--workers", 1)
    assert result.exit_code == 0, result.output
    for task in ("rte", "wnli"):
        assert len(list((tmp_path / task).glob("*/[0-9].json"))) == 4


def children_of(group):
    """Processes of a group, where the system lists them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(path)
    return found


# Evaluations and annealing ------------------------------------------------------------------------


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def experiment(teacher, glue, tmp_path_factory):
    settings = Settings("rte", teacher=str(teacher), data_dir=glue, max_length=32, precision="fp32")
    settings = dataclasses.replace(settings, student_layers=2)
    folder = tmp_path_factory.mktemp("experiment")
    return make_experiment(settings, [Objective("kl", "kl", settings)], folder)


def test_evaluations_and_temperatures_survive_an_interruption(experiment, tmp_path):
    schedule = training.Schedule(3, 8, 1e-3, seed=0, bf16=False, evaluate_every=2)
    stored = DenseTeacher(torch.randn(40, 2, generator=torch.Generator().manual_seed(0)))

    def run(folder, stop_after=None):
        loss = otkd.KLLoss(temperature=4)
        temperatures, done = [], []
        student = experiment.build_student(0)

        def on_steps(steps):
            done.append(steps)
            temperatures.append(loss.temperature)
            if stop_after is not None and sum(done) >= stop_after:
                raise Stop

        def evaluate(model):
            total = sum(float(parameter.detach().sum()) for parameter in model.parameters())
            return {"weights": total}

        try:
            took = training.fit(
                student, experiment.student_rows.train,
                experiment.collator(experiment.student_tokenizer), schedule,
                folder, loss=loss, teacher=stored, callbacks=[TemperatureAnnealing(loss)],
                evaluate=evaluate, on_steps=on_steps,
            )  # fmt: skip
        except Stop:
            took = None
        return took, temperatures

    whole, temperatures = run(tmp_path / "whole")
    assert [step for step, _ in whole.evaluations] == [2, 4, 6, 8, 10, 12, 14, 15]
    assert temperatures[1:] == [4.0] * 5 + [2.5] * 5 + [1.0] * 5
    run(tmp_path / "cut", stop_after=13)
    resumed, temperatures = run(tmp_path / "cut")
    assert resumed.evaluations == whole.evaluations
    assert temperatures[1:] == [1.0] * 5


def test_one_epoch_keeps_the_temperature():
    loss = otkd.KLLoss(temperature=3)
    state = transformers.TrainerState(epoch=0.0)
    state.num_train_epochs = 1
    TemperatureAnnealing(loss).on_epoch_begin(None, state, None)
    assert loss.temperature == 3
    with pytest.raises(TypeError, match=r"loss.terms\[name\]"):
        TemperatureAnnealing(otkd.SinKDLoss())
    with pytest.raises(ValueError, match="end"):
        TemperatureAnnealing(loss, end=0)


@pytest.mark.parametrize(
    ("epoch", "temperature"),
    [(0.0, 5.0), (0.75, 5.0), (1.0, 3.0), (2 - 1e-9, 1.0), (1.5, 3.0), (2.0, 1.0), (2.5, 1.0)],
)
def test_a_training_resumed_within_an_epoch_keeps_its_temperature(epoch, temperature):
    loss = otkd.KLLoss(temperature=5)
    state = transformers.TrainerState(epoch=epoch)
    state.num_train_epochs = 3
    TemperatureAnnealing(loss).on_epoch_begin(None, state, None)
    assert loss.temperature == temperature


def test_annealing_needs_the_number_of_epochs():
    loss = otkd.KLLoss(temperature=5)
    state = transformers.TrainerState(epoch=0.0)
    state.num_train_epochs = sys.maxsize
    with pytest.raises(ValueError, match="number of epochs"):
        TemperatureAnnealing(loss).on_epoch_begin(None, state, None)


def test_evaluation_changes_nothing(experiment):
    """Neither the weights nor the noise of a training depend on how often one looks."""
    weights = []
    for every in (None, 1):
        schedule = training.Schedule(1, 8, 1e-3, seed=0, bf16=False, evaluate_every=every)
        student = experiment.build_student(0)
        folder = experiment.folder / f"work-{every}"
        training.fit(
            student, experiment.student_rows.train,
            experiment.collator(experiment.student_tokenizer), schedule, folder,
            evaluate=lambda model: {
                name: float(logits.sum())
                for name, logits in experiment.predict(model, experiment.student_rows).items()
            },
            on_steps=lambda steps: None,
        )  # fmt: skip
        weights.append(student.state_dict())
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def test_result_files_name_no_settings_a_loss_does_not_have(tuned):
    folder, _, _ = tuned
    settings = json.loads((folder / "kl" / "0.json").read_text())["settings"]
    assert not {"loss.batch_cost", "loss.sinkhorn_weight", "loss.author"} & set(settings)


def test_a_protocol_sets_the_price_of_a_loss_and_tries_others(tmp_path):
    path = tmp_path / "prices.toml"
    path.write_text(
        '[tuning]\ntrain_rows = 9\nheld_out = 0.5\n[losses.forgiving]\nloss = "transport_kl"\n'
        "price = 5.0\nsmoothing = 0.5\ncandidates = [{ price = 10.0 }, { direction = 'reverse' }]"
    )
    protocol = load_protocol(str(path))
    (objective,) = protocol.objectives(protocol.resolve(Settings("rte"), ()), ())
    tried = [objective_options(each.loss, each.settings) for each in objective.tried()]
    names = ("price", "smoothing", "direction")
    assert [tuple(options[name] for name in names) for options in tried] == [
        (10.0, 0.5, "forward"),
        (5.0, 0.5, "reverse"),
    ]
