"""What the command reuses is what it wrote: results, weights, states and checkpoints."""

# ruff: noqa: F811 (fixtures are imported by the names by which tests ask for them)

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from otkd.cli.options import make_settings
from otkd.files import file_digest
from otkd.losses.batch import BatchSinkhornLoss
from otkd.study import runs, teachers, training
from otkd.study.messages import StudyError
from otkd.study.protocols import load_protocol
from otkd.study.report import comparison_table, explanation, save_plot
from otkd.study.results import (
    DIVERGED,
    CorruptResultError,
    _content_hash,
    read_result,
    settings_hash,
    write_result,
)
from otkd.study.reuse import find_result
from otkd.study.settings import Settings
from otkd.study.summary import summarise, summary_json
from otkd.study.work import last_whole_checkpoint
from otkd.teachers import DenseTeacher
from otkd.tensor_files import save_tensors
from tests.studies.test_cli import (  # noqa: F401
    Stop,
    arguments,
    glue,
    make_result,
    one_process,
    otkd_command,
    said,
    teacher,
    training_parts,
)


def whole_result():
    """One with something in every field."""
    return dataclasses.replace(
        make_result("kl", 3, 0.8),
        settings={"task": "mrpc", "loss": "kl", "seed": 3, "epochs": 2, "loss.alpha": 0.9},
        majority_metrics={"f1": 0.5, "accuracy": 0.6},
        evaluations=[{"step": 2, "f1": 0.7, "accuracy": 0.5}],
        files={"student/config.json": "ab"},
    )


def written(path, result=None):
    write_result(path, result or whole_result())
    return json.loads(path.read_text())


def sealed(content):
    """The content with hashes that fit, as only one who means to deceive would write it."""
    body = {name: value for name, value in content.items() if name != "content_hash"}
    return {**body, "content_hash": _content_hash(body)}


def read_or_refused(path):
    """The result, or None if it is refused in one sentence."""
    try:
        return read_result(path)
    except CorruptResultError as error:
        message = str(error)
    assert str(path) in message
    assert len(message.splitlines()) == 1
    return None


OTHERS = [None, True, "", "x", -1, 0, 2**70, 1.5, -0.5, 1e300, [], [[]], ["x"], {}, {"x": {"x": 1}}]


@pytest.mark.parametrize("schema", [1, 2])
def test_no_field_can_be_changed_unnoticed(tmp_path, schema):
    path = tmp_path / "3.json"
    content = written(path)
    result = read_result(path)
    if schema == 1:
        del content["content_hash"], content["status"], content["reason"]
        content["schema"] = 1
        path.write_text(json.dumps(content))
        assert read_result(path) == result
    decided = {"schema", "settings_hash", "settings", "status", "content_hash"}
    for name in content:
        without = {key: value for key, value in content.items() if key != name}
        for changed in (without, *({**content, name: other} for other in OTHERS)):
            path.write_text(json.dumps(changed))
            found = read_or_refused(path)
            if schema == 2 and changed != content:
                assert found is None, name
            if found is not None and name in decided:
                assert found == result, name
            # Even where the hash is made to fit, what is read is a result that can be written.
            path.write_text(json.dumps(sealed({**changed, "schema": 2})))
            found = read_or_refused(path)
            if found is not None:
                write_result(path, found)
                assert read_result(path) == found
                assert isinstance(comparison_table(result, [found]).row_count, int)


def test_tables_in_a_result_hold_numbers_alone(tmp_path):
    path = tmp_path / "3.json"
    content = written(path)
    for name in ("metrics", "teacher_metrics", "majority_metrics", "rows", "evaluations"):
        for other in (None, "0.8", True, [0.8], {"x": 0.8}, 2**70, -7, 1e308):
            tables = content[name] if isinstance(content[name], list) else [content[name]]
            damaged = [{**tables[0], key: other} for key in tables[0]]
            for table in damaged:
                changed = {**content, name: [table] if name == "evaluations" else table}
                path.write_text(json.dumps(sealed(changed)))
                assert read_or_refused(path) is None or (name, other) in {
                    ("rows", 2**70),
                    ("evaluations", 2**70),
                }, (name, other)


def test_any_damage_of_the_file_is_one_sentence(tmp_path):
    path = tmp_path / "0.json"
    written(path)
    whole = path.read_bytes()
    for length in range(0, len(whole.rstrip()), 37):
        path.write_bytes(whole[:length])
        assert read_or_refused(path) is None
    for place in range(0, len(whole), 101):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        assert read_or_refused(path) is None
    text = whole.decode()
    for damage in (
        b"\x00" * 100,
        os.urandom(1000),
        b"\xef\xbb\xbf" + whole,
        text.encode("utf-16"),
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"null",
        b"[]",
        b"1" * 5000,
        text.replace('"seed": 3', '"seed": 3, "seed": 3').encode(),
        text.replace("0.8", "NaN").encode(),
        text.replace("0.8", "-Infinity").encode(),
        text.replace("0.8", "1e999").encode(),
        text.replace('"loss": "kl"', '"loss": "\\ud800"').encode(),
        whole + b"x",
        whole + whole,
    ):
        path.write_bytes(damage)
        assert read_or_refused(path) is None
    path.write_bytes(b" " * (64 * 2**20 + 1))
    assert read_or_refused(path) is None
    path.unlink()
    path.mkdir()
    assert read_or_refused(path) is None
    with pytest.raises(FileNotFoundError):
        read_result(tmp_path / "1.json")
    # Order and spacing are not content.
    (tmp_path / "2.json").write_text(json.dumps(dict(reversed(json.loads(whole).items()))))
    assert read_result(tmp_path / "2.json") == read_or_refused(tmp_path / "2.json")


def test_results_that_are_not_numbers_are_not_written(tmp_path):
    for wrong in ({"f1": float("nan")}, {"f1": float("inf")}, {}):
        with pytest.raises(ValueError, match="metric"):
            write_result(tmp_path / "0.json", dataclasses.replace(whole_result(), metrics=wrong))
    assert not (tmp_path / "0.json").exists()


def test_a_result_of_another_loss_is_done_again(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    result = whole_result()
    written(tmp_path / "3.json")
    settings = {**result.settings, "precision": "fp32"}
    found = [find_result(tmp_path / "3.json", settings, loss=loss) for loss in ("kl", "kl_again")]
    assert found == [result, None]
    assert "is a result of kl, not of kl_again; the run is done again" in caplog.text


def test_committed_results_are_read():
    root = Path(__file__).parents[2] / "benchmarks" / "results" / "glue"
    paths = [path for path in root.rglob("*.json") if path.stem.isdecimal()]
    paths += root.rglob("teacher/result.json")
    assert len(paths) > 100
    for path in paths:
        result = read_result(path)
        assert not result.diverged
        assert settings_hash(result.settings) == json.loads(path.read_text())["settings_hash"]


def diverged(loss, seed):
    return dataclasses.replace(
        make_result(loss, seed, 0.5),
        metrics={},
        agreement=None,
        status=DIVERGED,
        reason="the training loss is nan",
    )


def test_reports_give_no_mean_where_a_seed_diverged(tmp_path):
    results = [make_result("kl", 0, 0.8), diverged("kl", 1), make_result("ce", 0, 0.7)]
    results += [make_result("ce", 1, 0.9), diverged("jsd", 0), diverged("jsd", 1)]
    for number, result in enumerate(results):
        write_result(tmp_path / f"{number}.json", result)
        assert read_result(tmp_path / f"{number}.json") == result
    best = make_result("teacher", 0, 0.95)
    kl, ce, jsd = summarise(results)
    assert (kl.seeds, kl.scores, kl.metrics, kl.agreement) == ((0,), (0.8,), {}, None)
    assert kl.diverged == ({"seed": 1, "step": 4, "reason": "the training loss is nan"},)
    assert ce.metrics["f1"].mean == pytest.approx(0.8)
    assert (jsd.seeds, jsd.seconds, len(jsd.diverged)) == ((), None, 2)
    table = comparison_table(best, results)
    scores = list(table.columns[1].cells)
    assert [scores[1], scores[3]] == ["1 of 2 diverged", "2 of 2 diverged"]
    text = explanation(best, results)
    assert text.startswith("2 seeds per loss")
    assert "Diverged: kl, seed 1, after 4 steps (the training loss is nan); jsd, seed 0" in text
    saved = json.loads(json.dumps(summary_json(best, results)))["losses"]
    assert [len(each["diverged"]) for each in saved] == [1, 0, 2]
    assert saved[0]["metrics"] == {}
    save_plot(tmp_path / "plot.png", best, results)
    assert (tmp_path / "plot.png").stat().st_size > 0


PROTOCOL = """
title = "Rates"
seeds = 1
[tuning]
train_rows = 20
held_out = 0.25
[losses.wild]
loss = "kl"
learning_rate = 1e30
[losses.kl]
candidates = [{ learning_rate = 1e30 }, { learning_rate = 1e-3 }]
[losses.jsd]
candidates = [{ learning_rate = 1e30 }, { learning_rate = 1e25 }]
"""


@pytest.fixture
def rates(arguments, tmp_path):
    """A comparison in which some students, candidates and all candidates of a loss diverge."""
    path = tmp_path / "rates.toml"
    path.write_text(PROTOCOL)
    options = [str(each) for each in arguments]
    place = options.index("--learning-rate")
    del options[place : place + 2]
    return ["compare", "rte", "--protocol", path, *options]


def test_students_that_diverge_are_recorded_and_the_others_go_on(rates, tmp_path, monkeypatch):
    result = otkd_command(*rates)
    assert result.exit_code == 0, result.output
    text, folder = said(result), tmp_path / "out" / "rates" / "rte"
    assert "1 of 1 diverged" in result.stdout
    assert "All 2 candidates of jsd diverged; its students are trained with the first" in text
    wild, kl = read_result(folder / "wild" / "0.json"), read_result(folder / "kl" / "0.json")
    assert (wild.status, wild.metrics, wild.agreement) == (DIVERGED, {}, None)
    assert wild.steps >= 1
    assert wild.reason
    assert not wild.files
    assert kl.settings["learning_rate"] == 1e-3
    assert not kl.diverged
    assert read_result(folder / "kl" / "tuning" / "0.json").diverged
    losses = json.loads((folder / "summary.json").read_text())["losses"]
    assert [len(each["diverged"]) for each in losses] == [1, 0, 1]
    assert not list(folder.rglob("*.partial"))
    # Given again, nothing is trained; with --overwrite what diverged is.
    trained = []
    fit = runs.fit
    monkeypatch.setattr(runs, "fit", lambda *a, **k: trained.append(1) or fit(*a, **k))
    again = otkd_command(*rates)
    assert (again.exit_code, trained) == (0, [])
    assert "1 of 1 diverged" in again.stdout
    again = otkd_command(*rates, "--overwrite")
    assert (again.exit_code, len(trained)) == (0, 5)
    assert "is of a run that diverged; the run is done again" in said(again)


def test_a_teacher_or_a_single_student_that_diverges_is_one_sentence(arguments, tmp_path):
    train = ["train", "rte", "--loss", "kl", *arguments]
    result = otkd_command(*train, "--teacher-learning-rate", "1e30")
    assert result.exit_code == 1
    assert "The teacher diverged, after " in said(result)
    assert "lower --teacher-learning-rate (1e+30)" in said(result)
    assert not (tmp_path / "out" / "teacher" / "result.json").exists()
    for _ in range(2):
        result = otkd_command(*train, "--learning-rate", "1e30", "--overwrite")
        assert result.exit_code == 1
        assert "The student diverged after" in said(result)
        assert read_result(tmp_path / "out" / "results.json").diverged
        assert not (tmp_path / "out" / "student").exists()


class Fails(torch.nn.Module):
    """A loss that raises, or gives what is not finite, at its third call."""

    needs_teacher = True

    def __init__(self, outcome):
        super().__init__()
        self.outcome, self.calls = outcome, 0

    def forward(self, student_logits, teacher_logits, **kwargs):
        self.calls += 1
        if self.calls == 3 and isinstance(self.outcome, Exception):
            raise self.outcome
        return student_logits.square().mean() * (self.outcome if self.calls == 3 else 1)


@pytest.mark.parametrize(
    "outcome",
    [
        float("nan"),
        float("inf"),
        ValueError("1 of 2 positions have NaN"),
        RuntimeError("the input contains non-finite values"),
        OverflowError("math range error"),
    ],
)
def test_numbers_that_are_not_finite_stop_a_training(training_parts, tmp_path, outcome):
    with pytest.raises(training.DivergedError) as raised:
        fitted(training_parts, tmp_path, loss=Fails(outcome))
    assert raised.value.took.steps == 2
    assert raised.value.reason


def test_other_errors_of_a_loss_are_not_taken_for_divergence(training_parts, tmp_path):
    with pytest.raises(ValueError, match="a mistake"):
        fitted(training_parts, tmp_path, loss=Fails(ValueError("a mistake of inference")))


def fitted(parts, folder, *, loss=None, stop_after=None, features=None, **options):
    """A student after three epochs of five steps, and its evaluations."""
    make_student, rows, tokenizer = parts
    student, done = make_student(), []
    torch.manual_seed(5)
    stored = DenseTeacher(torch.randn(40, 2), features)
    schedule = training.Schedule(
        **{"epochs": 3, "batch_size": 8, "learning_rate": 1e-3, "seed": 0, "bf16": False, **options}
    )

    def on_steps(steps):
        done.append(steps)
        if stop_after is not None and sum(done) >= stop_after:
            raise Stop

    took = None
    with contextlib.suppress(Stop):
        took = training.fit(
            student, rows, transformers.DataCollatorWithPadding(tokenizer), schedule, folder,
            loss=loss, teacher=stored if loss is not None else None, on_steps=on_steps,
            evaluate=lambda model: {"norm": model.classifier.weight.norm().item()},
        )  # fmt: skip
    return student.state_dict(), took and took.evaluations, done


def damage_of(name):
    def cut(path):
        path.write_bytes(path.read_bytes()[:-20])

    def empty(path):
        path.write_bytes(b"")

    return {"cut": cut, "empty": empty, "gone": Path.unlink}[name]


FILES = ("rng_state.pth", "optimizer.pt", "scheduler.pt", "trainer_state.json", "model.safetensors")


def test_a_resumed_training_is_the_uninterrupted_one_whatever_checkpoint_is_damaged(
    training_parts, tmp_path, caplog
):
    caplog.set_level(logging.INFO)
    whole, evaluations, _ = fitted(training_parts, tmp_path / "whole", evaluate_every=2)
    fitted(training_parts, tmp_path / "cut", evaluate_every=2, stop_after=13)
    assert {path.name for path in (tmp_path / "cut").iterdir()} == {"checkpoint-5", "checkpoint-10"}
    cases = [(name, "gone", 5) for name in FILES]
    cases += [("rng_state.pth", "empty", 5), ("model.safetensors", "cut", 5), (None, None, 10)]
    cases += [("otkd-files.json", "cut", 5), ("otkd-files.json", "gone", 5)]
    for name, kind, resumed_at in cases:
        folder = tmp_path / f"{name}-{kind}"
        shutil.copytree(tmp_path / "cut", folder)
        if name is not None:
            damage_of(kind)(folder / "checkpoint-10" / name)
        resumed, again, done = fitted(training_parts, folder, evaluate_every=2)
        assert done[0] == resumed_at
        assert again == evaluations
        assert all(torch.equal(value, resumed[key]) for key, value in whole.items()), name
        message = caplog.text
        caplog.clear()
        assert (name is None) == ("checkpoint-10" not in message)
    # Without any that is whole it begins anew, and says so.
    for path in (tmp_path / "cut").iterdir():
        (path / "rng_state.pth").unlink()
    resumed, _, done = fitted(training_parts, tmp_path / "cut", evaluate_every=2)
    assert done[0] == 0
    assert "the training starts again" in caplog.text
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


@pytest.mark.parametrize("group_by_length", [True, False])
@pytest.mark.parametrize("epochs", [1, 3])
def test_a_training_resumes_within_an_epoch(
    training_parts, tmp_path, monkeypatch, group_by_length, epochs
):
    """Interrupted twice, and the second time in the epoch in which it was resumed."""
    options = {"evaluate_every": 2, "group_by_length": group_by_length, "epochs": epochs}
    whole, evaluations, _ = fitted(training_parts, tmp_path / "whole", **options)
    monkeypatch.setattr(training, "_SAVE_AFTER", 0.0)
    folder, steps = tmp_path / "cut", 5 * epochs
    for stop_after, resumed_at in ((steps - 3, 0), (steps - 1, steps - 4)):
        _, _, done = fitted(training_parts, folder, stop_after=stop_after, **options)
        assert done[0] == resumed_at
    resumed, again, done = fitted(training_parts, folder, **options)
    assert done == [steps - 2, 1, 1]
    assert again == evaluations
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


def test_a_training_resumes_within_the_epoch_after_a_checkpoint_at_the_end_of_one(
    training_parts, tmp_path, monkeypatch
):
    whole, _, _ = fitted(training_parts, tmp_path / "whole")
    fitted(training_parts, tmp_path / "cut", stop_after=7)
    monkeypatch.setattr(training, "_SAVE_AFTER", 0.0)
    _, _, done = fitted(training_parts, tmp_path / "cut", stop_after=9)
    assert done[0] == 5
    resumed, _, done = fitted(training_parts, tmp_path / "cut")
    assert done[0] == 8
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


@pytest.mark.parametrize("group_by_length", [True, False])
def test_a_loss_with_parameters_resumes_as_it_was(training_parts, tmp_path, group_by_length):
    def run(folder, **options):
        torch.manual_seed(1)
        loss = BatchSinkhornLoss(cost="hidden", projection=torch.nn.Linear(16, 24, bias=False))
        features = torch.linspace(-1, 1, 40 * 24).reshape(40, 24)
        state, _, done = fitted(
            training_parts, folder, loss=loss, features=features, group_by_length=group_by_length,
            **options,
        )  # fmt: skip
        return {**state, "projection": loss.state_dict()}, done

    whole, _ = run(tmp_path / "whole")
    run(tmp_path / "cut", stop_after=12)
    resumed, done = run(tmp_path / "cut")
    assert done[0] == 10
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


def test_a_checkpoint_of_other_settings_is_passed_over(training_parts, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    for name, epochs in (("one", 3), ("other", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "settings.json").write_text(json.dumps({"epochs": epochs}))
        fitted(training_parts, tmp_path / name, epochs=epochs, stop_after=6)
    shutil.rmtree(tmp_path / "one" / "checkpoint-5")
    shutil.copytree(tmp_path / "other" / "checkpoint-5", tmp_path / "one" / "checkpoint-5")
    assert last_whole_checkpoint(tmp_path / "one") is None
    assert "is of a run with other settings" in caplog.text
    assert last_whole_checkpoint(tmp_path / "other") is not None


class Killed(BaseException):
    """Ends a command between two steps, as the system may do; nothing handles it."""


def test_a_saved_student_is_the_one_of_its_result(arguments, tmp_path, monkeypatch):
    train = ["train", "rte", "--loss", "kl", *arguments]
    out = tmp_path / "out"
    assert otkd_command(*train).exit_code == 0
    good = read_result(out / "results.json")
    weights = (out / "student" / "model.safetensors").read_bytes()
    assert {"student/model.safetensors", "student/tokenizer.json"} <= good.files.keys()
    # Killed after the student is saved and before its result is: neither is taken for the other's.
    save = runs.save_model

    def save_and_die(*arguments):
        save(*arguments)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(runs, "save_model", save_and_die)
        with pytest.raises(Killed):
            otkd_command(*train, "--seed", 7, "--overwrite")
    assert (out / "student" / "model.safetensors").read_bytes() != weights
    assert otkd_command(*train, "--overwrite").exit_code == 0
    assert (out / "student" / "model.safetensors").read_bytes() == weights
    for name, kind in (
        ("student/model.safetensors", "cut"),
        ("student/tokenizer.json", "gone"),
        ("teacher/model/model.safetensors", "cut"),
    ):
        damage_of(kind)(out / name)
        result = otkd_command(*train)
        assert result.exit_code == 0, result.output
        assert f"{out / name} is not the file that" in said(result)
        assert read_result(out / "results.json").metrics == good.metrics
        assert (out / "student" / "model.safetensors").read_bytes() == weights
    # A result that does not say which student it is of, as older ones, vouches for none.
    write_result(out / "results.json", dataclasses.replace(good, files={}))
    assert "does not list the files of its student" in said(otkd_command(*train))


def test_the_teachers_states_are_checked_before_they_are_used(arguments, tmp_path):
    options = ["--losses", "batch_sinkhorn", "--batch-cost", "hidden", "--seeds", 1, *arguments]
    assert otkd_command("compare", "rte", *options).exit_code == 0
    folder = tmp_path / "out" / "rte"
    student, states = folder / "batch_sinkhorn" / "0.json", folder / "teacher" / teachers._FEATURES
    good, whole = read_result(student), states.read_bytes()
    listed = read_result(folder / "teacher" / "result.json")
    assert listed.files[states.name] == file_digest(states)
    for damage in ("cut", "other", "nan", "rows", "unlisted"):
        wrong = {
            "other": torch.randn(40, 16).half(),
            "nan": torch.full((40, 16), float("nan")).half(),
            "rows": torch.randn(39, 16).half(),
        }
        if damage in wrong:
            save_tensors(states, {"features": wrong[damage]})
        elif damage == "cut":
            damage_of("cut")(states)
        files = dict(listed.files)
        if damage in ("nan", "rows"):  # even where the hash fits
            files[states.name] = file_digest(states)
        if damage == "unlisted":
            del files[states.name]
        result = dataclasses.replace(listed, files=files)
        write_result(folder / "teacher" / "result.json", result)
        student.unlink()
        result = otkd_command("compare", "rte", *options)
        assert result.exit_code == 0, result.output
        assert "computed again" in said(result), damage
        assert states.read_bytes() == whole
        assert read_result(student).metrics == good.metrics
    # The weights give the states: if they are not the teacher's, it is trained again.
    states.unlink()
    damage_of("cut")(folder / "teacher" / "model" / "model.safetensors")
    student.unlink()
    assert "the teacher is redone" in said(otkd_command("compare", "rte", *options))
    assert states.read_bytes() == whole
    # Logits that cannot be these rows' are no teacher, whatever their hash.
    logits = folder / "teacher" / "train-logits.safetensors"
    for values in (torch.zeros(39, 2), torch.zeros(40, 3), torch.full((40, 2), float("inf"))):
        before = read_result(folder / "teacher" / "result.json")
        DenseTeacher(values).save(logits)
        files = {**before.files, logits.name: file_digest(logits)}
        changed = dataclasses.replace(before, files=files)
        write_result(folder / "teacher" / "result.json", changed)
        assert "the teacher is redone" in said(otkd_command("compare", "rte", *options))


def numbers():
    """The settings that are numbers, with their bounds."""
    for name, field in Settings.__pydantic_fields__.items():
        bounds = {
            key: getattr(each, key)
            for each in field.metadata
            for key in ("ge", "gt", "le")
            if hasattr(each, key)
        }
        if bounds:
            yield name, "int" in str(field.annotation), bounds


@pytest.mark.parametrize(("name", "integral", "bounds"), list(numbers()))
def test_numbers_out_of_range_are_refused_by_name(name, integral, bounds, tmp_path):
    least, most = bounds.get("ge", bounds.get("gt")), bounds.get("le")
    values = [-1, 10**400, -(10**30)] if integral else [-1.0, float("nan"), float("inf")]
    values += [] if most is None else [most + 1]
    values += [0] if least > 0 or "gt" in bounds else []
    for value in values:
        with pytest.raises(StudyError) as raised:
            make_settings({"task": "rte", name: value})
        assert f"--{name.replace('_', '-')} must be " in str(raised.value)
        assert ", got " in str(raised.value)
        path = tmp_path / "p.toml"
        path.write_text(f"[settings]\n{name} = {value}\n[losses.kl]\n")
        with pytest.raises(StudyError, match=rf"p.toml: settings.{name} must be .*, got "):
            load_protocol(str(path))


@pytest.mark.parametrize(
    ("command", "changes", "message"),
    [
        (
            "compare",
            ["--seeds", 3_000_000],
            "--seeds must be at most 10000, got 3000000",
        ),
        ("compare", ["--seeds", -1], "--seeds must be at least 1, got -1"),
        ("compare", ["--workers", 10**6], "--workers must lie between 1 and"),
        ("compare", ["--workers", 0], "--workers must lie between 1 and"),
        ("compare", ["--max-length", 2], "--max-length 2: an input of"),
        ("train", ["--seed", 2**32], "--seed must be at most 4294967295"),
        ("train", ["--seed", -1], "--seed must be at least 0"),
        (
            "train",
            ["--teacher-seed", 2**32],
            "--teacher-seed must be at most 4294967295",
        ),
        (
            "train",
            ["--temperature", "1e-300"],
            "--temperature must be at least 0.001",
        ),
        ("train", ["--epsilon", "1e-300"], "--epsilon must be at least 0.000001"),
        ("train", ["--price", 0], "--price must be at least 0.000001, got 0"),
        ("train", ["--smoothing", 2], "--smoothing must be at most 1, got 2"),
        ("train", ["--learning-rate", "nan"], "--learning-rate must be a finite number, got nan"),
        (
            "train",
            ["--epochs", 10**9],
            "--epochs must be at most 10000, got 1000000000",
        ),
    ],
)
def test_extreme_options_are_refused_before_anything_is_loaded(
    arguments, monkeypatch, command, changes, message
):
    monkeypatch.setattr(teachers, "fit", lambda *a, **k: pytest.fail("trained"))
    loss = ["--losses", "sinkhorn"] if command == "compare" else ["--loss", "sinkhorn"]
    result = otkd_command(command, "rte", *loss, *arguments, *changes)
    assert result.exit_code == 1, result.output
    assert message in said(result)
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds = 3000000\n[losses.kl]", "seeds must be at most 10000, got 3000000"),
        (
            "[losses.kl]\ntemperature = 1e200",
            "losses.kl.temperature must be at most 10000",
        ),
        (
            "[tuning]\ntrain_rows = 9\nheld_out = 0.5\n[losses.kl]\n"
            "candidates = [{ epsilon = 1e-300 }]",
            r"losses.kl.candidates\[0\].epsilon must be at least 0.000001",
        ),
        (
            "[tuning]\ntrain_rows = 9\nheld_out = 0.5\nlearning_rate = nan\n[losses.kl]",
            "tuning.learning_rate must be a finite number, got nan",
        ),
        ("[tuning]\ntrain_rows = 0\nheld_out = 0.5\n[losses.kl]", "tuning.train_rows must"),
        (
            "[tuning]\ntrain_rows = 9\nheld_out = nan\n[losses.kl]",
            "tuning.held_out must be a finite number",
        ),
    ],
)
def test_protocol_files_have_the_same_ranges(tmp_path, text, message):
    path = tmp_path / "p.toml"
    path.write_text(text + "\n")
    with pytest.raises(StudyError, match=message):
        load_protocol(str(path))
