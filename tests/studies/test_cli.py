"""The command `otkd`, run as it is typed, on tiny models and files written here."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from typer.testing import CliRunner

import otkd
from otkd.cli.app import app
from otkd.study import models, runs, training, workers
from otkd.study.messages import StudyError
from otkd.study.objectives import build_objective, objective_options
from otkd.study.prediction import Precision, Predictor, measure_precision, read_precision
from otkd.study.report import comparison_table, explanation, metric_title
from otkd.study.results import Result, read_result, write_result
from otkd.study.settings import Settings
from otkd.study.summary import estimate, summarise
from otkd.study.work import check_work, claim
from otkd.tasks import encode, get_task, load_task
from otkd.teachers import DenseTeacher

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "it", "is", "not", "wet", "dry"]
WORDS += [*"!.,?", "so", *"abcd"]
SMALL = ("--epochs", "2", "--teacher-epochs", "1", "--batch-size", "8", "--max-length", "32")
SMALL += ("--teacher-batch-size", "8")
SMALL += ("--student-layers", "2", "--precision", "fp32", "--learning-rate", "1e-3")


def save_tokenizer(folder):
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    transformers.BertTokenizerFast(vocab=vocabulary, model_max_length=64).save_pretrained(folder)


def save_bert(folder, **config):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        **config,
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """For runs this short it takes longer to start another process than to do them."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    root = tmp_path_factory.mktemp("glue")
    rows = ["index\tsentence1\tsentence2\tlabel"]
    for index in range(40):
        same = index % 2 == 0
        words = " ".join(WORDS[15 + (index + step) % 4] for step in range(index % 5 + 1))
        other = "it is wet" if same else "it is not wet"
        label = "entailment" if same else "not_entailment"
        rows.append(f'{index}\tit is " wet {words}\t{other} .\t{label}')
    (root / "RTE").mkdir()
    (root / "RTE" / "train.tsv").write_text("\n".join(rows) + "\n")
    (root / "RTE" / "dev.tsv").write_text("\n".join(rows[:21]) + "\n")
    return root


@pytest.fixture
def arguments(teacher, glue, tmp_path):
    """The options that every run here shares."""
    return ["--data-dir", glue, "--teacher", teacher, "--output-dir", tmp_path / "out", *SMALL]


def otkd_command(*arguments):
    """Run the command in this process, as a user would type it."""
    # Trainer collects garbage in every run; what was imported since the last freeze is never any.
    gc.freeze()
    return CliRunner().invoke(
        app, [str(argument) for argument in arguments], env={"COLUMNS": "160"}
    )


def start_command(*arguments, **options):
    """Start it in a process of its own, which can be interrupted however the tests were started."""
    return subprocess.Popen(
        [sys.executable, "-m", "otkd.cli.app", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # A shell starts what it runs in the background without it, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )


def said(result):
    """All output on one line, without the line breaks that a terminal's width puts in."""
    return " ".join(result.output.split())


def test_version_and_help_load_no_training_library():
    code = (
        "import sys; sys.argv = ['otkd', '--help']\n"
        "from otkd.cli.app import app\n"
        "try: app()\nexcept SystemExit as stop: assert not stop.code\n"
        "assert not {'transformers', 'datasets', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
    assert otkd_command("--version").output.strip() == f"otkd {otkd.__version__}"


def test_losses_lists_the_registry():
    result = otkd_command("losses")
    assert result.exit_code == 0
    for name in otkd.list_losses():
        assert f" {name} " in result.output
    assert "beta=0.5" in result.output
    # These belong to base classes; no loss takes them.
    assert "formula" not in result.output
    assert "args" not in result.output


@pytest.fixture(scope="module")
def compared(teacher, glue, tmp_path_factory):
    """A finished comparison: two losses, one seed."""
    folder = tmp_path_factory.mktemp("compared")
    result = otkd_command(
        *("compare", "rte", "--losses", "kl,sinkd", "--seeds", 1, "--output-dir", folder),
        *("--data-dir", glue, "--teacher", teacher, "--workers", 1, *SMALL),
    )
    assert result.exit_code == 0, result.output
    return folder, result


def test_compare_writes_table_files_and_plot(compared):
    folder, result = compared
    lines = [line for line in result.stdout.splitlines() if "│" in line]
    first_cells = [line.split("│")[1].strip() for line in lines]
    assert first_cells == ["teacher", "kl", "sinkd"]
    assert "± –" in lines[1]
    assert "1 seed per loss, 40 training and 20 development rows" in said(result)
    assert (folder / "rte" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((folder / "rte" / "summary.json").read_text())
    assert [entry["loss"] for entry in summary["losses"]] == ["kl", "sinkd"]
    assert summary["losses"][0]["metrics"]["accuracy"]["interval"] is None


def test_result_files_say_how_they_were_made(compared):
    folder, _ = compared
    path = folder / "rte" / "kl" / "0.json"
    content = json.loads(path.read_text())
    assert content["settings"]["epochs"] == 2
    assert content["settings"]["loss.temperature"] == 2.0
    assert content["settings"]["loss.alpha"] == 0.9
    assert content["steps"] == 10
    assert content["seconds_per_step"] == pytest.approx(content["seconds"] / 10)
    assert content["rows"] == {"train": 40, "dev": 20}
    assert set(content["versions"]) == {"otkd", "torch", "transformers", "python"}
    assert 0 <= content["agreement"] <= 1
    teacher = read_result(folder / "rte" / "teacher" / "result.json")
    assert content["teacher_metrics"] == teacher.metrics
    assert teacher.majority_metrics.keys() == teacher.metrics.keys()
    assert platform.node() not in path.read_text()
    assert not list(folder.rglob("*.partial"))
    logits = DenseTeacher.load(folder / "rte" / "teacher" / "train-logits.safetensors")
    assert logits.values.shape == (40, 2)


def test_a_missing_result_alone_is_done_again_with_the_same_outcome(compared, glue, teacher):
    folder, _ = compared
    kl, sinkd = (folder / "rte" / loss / "0.json" for loss in ("kl", "sinkd"))
    before, other = read_result(kl), sinkd.stat().st_mtime_ns
    kl.unlink()
    result = otkd_command(
        *("compare", "rte", "--losses", "kl,sinkd", "--seeds", 1, "--output-dir", folder),
        *("--data-dir", glue, "--teacher", teacher, *SMALL),
    )
    assert "kept: 1 of 2" in said(result)
    assert read_result(kl).metrics == before.metrics
    assert sinkd.stat().st_mtime_ns == other


def test_other_settings_are_refused_until_overwritten(arguments, tmp_path):
    compare = ["compare", "rte", "--losses", "ce", "--seeds", 1, *arguments]
    assert otkd_command(*compare).exit_code == 0
    path = tmp_path / "out" / "rte" / "ce" / "0.json"
    before = path.read_bytes()
    changed = [*compare, "--epochs", 1]
    result = otkd_command(*changed)
    assert result.exit_code == 1
    assert "epochs: 2 there, 1 now" in said(result)
    assert "--output-dir" in said(result)
    assert "--overwrite" in said(result)
    assert path.read_bytes() == before
    # What none of the losses depends on is no other setting.
    assert "--temperature has no effect on ce" in said(otkd_command(*compare, "--temperature", 3))
    assert path.read_bytes() == before
    assert otkd_command(*changed, "--overwrite").exit_code == 0
    assert read_result(path).settings["epochs"] == 1


def test_another_precision_is_refused_whoever_chose_it(arguments, tmp_path):
    compare = ["compare", "rte", "--losses", "ce", "--seeds", 1, *arguments]
    folder = tmp_path / "out" / "rte"
    student, choice = folder / "ce" / "0.json", folder / "precision.json"
    assert otkd_command(*compare).exit_code == 0
    # The machine's choice is the same as one that is asked for; where it is another, it is refused.
    choice.write_text('{"name": "fp32", "reason": "this machine"}')
    assert "kept: 1 of 1" in said(otkd_command(*compare, "--precision", "auto"))
    choice.write_text('{"name": "bf16", "reason": "another machine"}')
    result = otkd_command(*compare, "--precision", "auto")
    assert result.exit_code == 1
    assert "precision: fp32 there, bf16 now" in said(result)
    assert otkd_command(*compare, "--precision", "auto", "--overwrite").exit_code == 0
    done = read_result(student)
    assert (done.settings["precision"], done.precision) == ("auto", "bf16")
    # Students have their own, finished or not.
    write_result(student, dataclasses.replace(done, precision="fp32"))
    result = otkd_command(*compare, "--precision", "auto")
    assert f"{student} was made with other settings: precision: fp32" in said(result)
    student.unlink()
    (student.parent / "0.partial").mkdir()
    begun = student.parent / "0.partial" / "settings.json"
    begun.write_text(json.dumps(done.settings | {"precision": "fp32"}))
    result = otkd_command(*compare, "--precision", "auto")
    assert f"{begun.parent} was made with other settings: precision: fp32" in said(result)


@pytest.mark.parametrize("damage", ["cut", "edited", "other"])
def test_corrupt_results_are_done_again(arguments, tmp_path, damage):
    compare = ["compare", "rte", "--losses", "ce", "--seeds", 1, *arguments]
    assert otkd_command(*compare).exit_code == 0
    path = tmp_path / "out" / "rte" / "ce" / "0.json"
    good, text = read_result(path), path.read_text()
    damaged = {
        "cut": text[: len(text) // 2],
        "edited": text.replace('"epochs": 2', '"epochs": 3'),
        "other": "[]",
    }
    path.write_text(damaged[damage])
    result = otkd_command(*compare)
    assert result.exit_code == 0
    assert "the run is done again" in said(result)
    assert read_result(path).metrics == good.metrics


def test_a_damaged_teacher_is_redone_and_its_students_kept(arguments, tmp_path):
    compare = ["compare", "rte", "--losses", "kl", "--seeds", 1, *arguments]
    assert otkd_command(*compare).exit_code == 0
    student = tmp_path / "out" / "rte" / "kl" / "0.json"
    logits = tmp_path / "out" / "rte" / "teacher" / "train-logits.safetensors"
    before, written = logits.read_bytes(), student.stat().st_mtime_ns
    logits.write_bytes(before[:-4] + b"\0\0\0\0")
    result = otkd_command(*compare)
    assert "the teacher is redone" in said(result)
    assert logits.read_bytes() == before
    # The same seed gives the same teacher, so what it taught before still stands.
    assert student.stat().st_mtime_ns == written


def test_students_of_another_teacher_are_refused(arguments, tmp_path, monkeypatch):
    compare = ["compare", "rte", "--losses", "kl", "--seeds", 1, *arguments]
    assert otkd_command(*compare).exit_code == 0
    folder = tmp_path / "out" / "rte"
    student = folder / "kl" / "0.json"
    ours = read_result(student)
    write_result(student, dataclasses.replace(ours, teacher_logits="another"))
    theirs = student.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(runs, "fit", lambda *a, **k: pytest.fail("trained"))
        result = otkd_command(*compare)
        assert result.exit_code == 1
        assert f"{student} was made with another teacher: teacher_logits: another" in said(result)
        # A teacher that is not there may come out the same, which shows when it is trained.
        shutil.rmtree(folder / "teacher")
        result = otkd_command(*compare)
        assert result.exit_code == 1
        assert "The teacher of 1 finished runs is missing and is trained again" in said(result)
        assert "made with another teacher" in said(result)
    assert student.read_bytes() == theirs
    assert otkd_command(*compare, "--overwrite").exit_code == 0
    done = read_result(student)
    assert (done.teacher_logits, done.metrics) == (ours.teacher_logits, ours.metrics)


def test_unfinished_students_of_another_teacher_begin_anew(tmp_path):
    settings = {"epochs": 2, "teacher_logits": "one"}
    (claim(tmp_path / "work", settings) / "checkpoint-1").mkdir()
    # Before there is a teacher none is asked for.
    check_work(tmp_path / "work", {"epochs": 2}, overwrite=False)
    assert (claim(tmp_path / "work", settings) / "checkpoint-1").is_dir()
    work = claim(tmp_path / "work", {**settings, "teacher_logits": "another"})
    assert not (work / "checkpoint-1").exists()


def test_interrupted_comparison_goes_on_where_it_stopped(arguments, tmp_path, monkeypatch):
    compare = ["compare", "rte", "--losses", "ce,kl", "--seeds", 2, *arguments]
    folder, run = tmp_path / "out" / "rte", workers.run_student

    def interrupted(*arguments):
        if (folder / "ce" / "0.json").exists():
            raise KeyboardInterrupt  # as Python does for Ctrl-C
        return run(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(workers, "run_student", interrupted)
        result = otkd_command(*compare)
    assert result.exit_code == 130, result.output
    assert "Interrupted: finished runs are kept" in said(result)
    assert [path.parent.name for path in folder.glob("*/[0-9].json")] == ["ce"]
    written = (folder / "ce" / "0.json").stat().st_mtime_ns
    result = otkd_command(*compare)
    assert result.exit_code == 0, result.output
    assert (folder / "ce" / "0.json").stat().st_mtime_ns == written
    assert len(list(folder.glob("*/[0-9].json"))) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--losses", "kl,jds"], "jsd"),
        (["--losses", ","], "names no loss"),
        (["--iterations", 5], "--iterations has no effect on kl"),
        (["--losses", "sinkhorn,ce", "--batch-cost", "l1"], "no effect on sinkhorn, ce"),
        (["--losses", "sinkd", "--author", "--debias"], "--debias has no effect on sinkd"),
        (["--losses", "sinkhorn", "--price", 3], "--price has no effect on sinkhorn"),
        (["--losses", "transport_kl", "--epsilon", 1], "--epsilon has no effect on transport_kl"),
        (["--losses", "transport_kl", "--direction", "reverse"], "requires smoothing below 1"),
        (["--losses", "transport_kl", "--direction", "back"], "must be 'forward' or 'reverse'"),
        (["--seeds", 0], "--seeds must be at least 1, got 0"),
        (["--epochs", 0], "--epochs must be at least 1, got 0"),
        (["--max-train-rows", 0], "--max-train-rows must be at least 1, got 0"),
        (["--temperature", "nan"], "--temperature must be a finite number, got nan"),
        (["--alpha", 1.5], "--alpha must be at most 1, got 1.5"),
        (["--precision", "fp8"], "--precision must be 'auto', 'fp32' or 'bf16', got 'fp8'"),
        (["--data-dir", "/nowhere"], "/nowhere does not exist"),
        (["--student-layers", 5], "has only 4 layers"),
        (["--max-length", 65], "reads at most 64 tokens"),
        (["--output-dir", Path(__file__) / "out"], "cannot be written to"),
        (["--teacher", "./no-such-model"], "could not be loaded"),
    ],
)
def test_mistakes_show_before_anything_is_trained(
    arguments, tmp_path, monkeypatch, changes, message
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(training, "fit", lambda *a, **k: pytest.fail("trained"))
    monkeypatch.setattr(runs, "fit", lambda *a, **k: pytest.fail("trained"))
    result = otkd_command("compare", "rte", "--losses", "kl", *arguments, *changes)
    assert result.exit_code == 1, result.output
    assert message in said(result)
    assert "Traceback" not in result.output


def test_unknown_task_and_bad_rows_are_named(arguments, tmp_path):
    result = otkd_command("compare", "rt", "--losses", "kl", *arguments)
    assert result.exit_code == 1
    assert "did you mean 'rte'?" in said(result)
    (tmp_path / "WNLI").mkdir()
    for split in ("train", "dev"):
        (tmp_path / "WNLI" / f"{split}.tsv").write_text("sentence1\tsentence2\tlabel\na\tb\n")
    result = otkd_command("compare", "wnli", "--losses", "kl", *arguments, "--data-dir", tmp_path)
    assert result.exit_code == 1
    assert "train.tsv, line 2: 2 tab-separated fields; expected 3" in said(result)


def test_two_development_splits_and_three_classes(arguments, tmp_path):
    rows = ["index\tsentence1\tsentence2\tgold_label"]
    names = ("entailment", "neutral", "contradiction")
    rows += [
        f"{index}\tit is wet\ta b {WORDS[5 + index]}\t{names[index % 3]}" for index in range(9)
    ]
    (tmp_path / "MNLI").mkdir()
    for split in ("train", "dev_matched", "dev_mismatched"):
        kept = rows[:6] if split == "dev_mismatched" else rows
        (tmp_path / "MNLI" / f"{split}.tsv").write_text("\n".join(kept) + "\n")
    result = otkd_command(
        *("compare", "mnli", "--losses", "wasserstein", "--seeds", 1, *arguments),
        *("--data-dir", tmp_path, "--epochs", 1),
    )
    assert result.exit_code == 0, result.output
    assert "accuracy (matched)" in result.stdout
    assert "0.9 · loss + 0.1 · ce" in result.stdout
    saved = read_result(tmp_path / "out" / "mnli" / "wasserstein" / "0.json")
    assert set(saved.metrics) == {"matched_accuracy", "mismatched_accuracy"}
    assert saved.headline == "matched_accuracy"
    assert saved.rows == {"train": 9, "dev": 9 + 5}


@pytest.mark.parametrize("name", otkd.list_losses())
def test_every_registered_loss_is_an_objective(name):
    settings = Settings("rte", temperature=3.0, epsilon=0.5)
    options = objective_options(name, settings)
    assert ("alpha" in options) == (name != "ce")
    assert options.get("temperature", 3.0) == 3.0
    torch.manual_seed(0)
    loss = build_objective(name, options, torch.randn(3, 8))
    student = torch.randn(6, 3, requires_grad=True)
    value = loss(student, torch.randn(6, 3), labels=torch.tensor([0, 1, 2, 0, 1, 2]))
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()
    assert student.grad.abs().sum() > 0


def test_transport_kl_takes_its_price_from_the_settings():
    chosen = {"price": 3.0, "smoothing": 0.5, "direction": "reverse"}
    for settings in (chosen, {}):
        options = objective_options("transport_kl", Settings("rte", **settings))
        loss = build_objective("transport_kl", options, torch.randn(3, 8)).terms["transport_kl"]
        default = otkd.TransportKLLoss("discrete").settings
        assert loss.settings == dataclasses.replace(default, **settings)
    assert not chosen.keys() & objective_options("sinkhorn", Settings("rte", **chosen)).keys()


def test_missing_extra_names_the_command(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "datasets" else found(name)
    )
    result = otkd_command("train", "rte", "--loss", "kl")
    assert result.exit_code == 1
    assert "needs datasets, which is not installed: pip install '.[train]'" in said(result)


def test_train_saves_a_student_that_loads(arguments, tmp_path):
    train = ["train", "rte", "--loss", "sinkhorn", "--epsilon", 0.5, "--seed", 3, *arguments]
    result = otkd_command(*train)
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    saved = read_result(out / "results.json")
    assert (saved.loss, saved.seed) == ("sinkhorn", 3)
    student = transformers.AutoModelForSequenceClassification.from_pretrained(out / "student")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "student")
    assert student.config.num_hidden_layers == 2
    assert student.config.id2label == {0: "entailment", 1: "not_entailment"}
    data = load_task(get_task("rte"), arguments[1])
    rows = encode(data.dev["dev"], tokenizer, 32)
    logits = Predictor(rows, tokenizer, bf16=False).logits(student)
    labels = torch.tensor(data.dev["dev"]["label"][:])
    assert (logits.argmax(-1) == labels).float().mean().item() == pytest.approx(saved.score)
    written = (out / "results.json").stat().st_mtime_ns
    assert otkd_command(*train).exit_code == 0
    assert (out / "results.json").stat().st_mtime_ns == written
    # The teacher of this run is itself a classifier to be taken as it is.
    again = ["--output-dir", tmp_path / "again", "--teacher", out / "teacher" / "model"]
    result = otkd_command(*train, *again, "--no-finetune-teacher")
    assert result.exit_code == 0, result.output
    first, second = (
        read_result(folder / "teacher" / "result.json") for folder in (out, tmp_path / "again")
    )
    assert second.steps == 0
    assert second.metrics == first.metrics


def test_teachers_taken_as_they_are_must_fit_the_task(tmp_path):
    task = get_task("rte")
    config = transformers.BertConfig(architectures=["BertModel"])
    with pytest.raises(StudyError, match="not a classifier"):
        models.check_is_classifier("x", config, task)
    config = transformers.BertConfig(architectures=["BertForSequenceClassification"], num_labels=3)
    with pytest.raises(StudyError, match="3 classes but RTE has 2"):
        models.check_is_classifier("x", config, task)
    config = transformers.BertConfig(
        architectures=["BertForSequenceClassification"],
        id2label={0: "not_entailment", 1: "entailment"},
    )
    with pytest.raises(StudyError, match="orders its classes not_entailment, entailment"):
        models.check_is_classifier("x", config, task)


def test_students_depend_on_their_seed_alone(teacher):
    task = get_task("rte")
    first, again, other = (
        models.build_student(str(teacher), None, 2, task, seed) for seed in (0, 0, 1)
    )
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)
    )
    assert not torch.equal(models.class_head(first).weight, models.class_head(other).weight)
    whole = models.load_classifier(str(teacher), task, 0)
    kept = [0, 3]
    for layer, source in zip(first.bert.encoder.layer, kept, strict=True):
        expected = whole.bert.encoder.layer[source].attention.self.query.weight
        assert torch.equal(layer.attention.self.query.weight, expected)
    # A head that the teacher's own checkpoint brings is not the student's.
    assert not torch.equal(models.class_head(first).weight, models.class_head(whole).weight)


def test_layers_are_found_in_other_encoders_or_refused():
    config = transformers.DistilBertConfig(
        vocab_size=20, dim=16, n_layers=4, n_heads=2, hidden_dim=32
    )
    model = transformers.DistilBertForSequenceClassification(config)
    models.keep_layers(model, 2)
    assert len(model.distilbert.transformer.layer) == model.config.n_layers == 2
    config = transformers.GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=8)
    with pytest.raises(StudyError, match=r"GPT2ForSequenceClassification.*--student"):
        models.keep_layers(transformers.GPT2ForSequenceClassification(config), 1)


class Stop(Exception):
    pass


class RowOrder(torch.nn.Module):
    """A loss that notes which rows it is given, and in which order."""

    needs_teacher = True

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, student_logits, teacher_logits, **kwargs):
        self.seen += teacher_logits[:, 0].int().tolist()
        return student_logits.square().mean()


@pytest.fixture(scope="module")
def training_parts(teacher, glue):
    """A student's maker and its encoded rows."""
    tokenizer = models.load("AutoTokenizer", str(teacher))
    rows = encode(load_task(get_task("rte"), glue).train, tokenizer, 32)
    return lambda: models.build_student(str(teacher), None, 2, get_task("rte"), 0), rows, tokenizer


def test_training_resumes_from_the_last_complete_epoch(training_parts, tmp_path):
    make_student, rows, tokenizer = training_parts
    schedule = training.Schedule(epochs=3, batch_size=8, learning_rate=1e-3, seed=0, bf16=False)
    stored = DenseTeacher(torch.arange(40.0)[:, None].expand(40, 2))

    def run(folder, stop_after=None):
        done, student, order = [], make_student(), RowOrder()

        def on_steps(steps):
            done.append(steps)
            if stop_after is not None and sum(done) >= stop_after:
                raise Stop

        try:
            took = training.fit(
                student, rows, transformers.DataCollatorWithPadding(tokenizer), schedule, folder,
                loss=order, teacher=stored, on_steps=on_steps,
            )  # fmt: skip
        except Stop:
            took = None
        return student, order.seen, took, done

    whole, order, took, _ = run(tmp_path / "whole")
    assert took.steps == schedule.steps(40) == 15
    assert sorted(order[:40]) == list(range(40))
    _, cut_order, _, _ = run(tmp_path / "cut", stop_after=13)
    assert cut_order == order[: len(cut_order)]
    # A checkpoint that was being written when the process died is passed over.
    (tmp_path / "cut" / "checkpoint-15").mkdir()
    (tmp_path / "cut" / "checkpoint-15" / "trainer_state.json").write_text('{"epo')
    resumed, rest, took, done = run(tmp_path / "cut")
    assert done[0] == 10
    assert took.steps == 15
    assert took.seconds > 0
    assert rest == order[80:]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_predictions_keep_the_order_of_the_rows(training_parts):
    make_student, rows, tokenizer = training_parts
    student = make_student().eval()
    logits = Predictor(rows, tokenizer, bf16=False).logits(student)
    columns = ("input_ids", "attention_mask", "token_type_ids")
    for index in (0, 4, 39):
        row = {name: torch.tensor([rows[index][name]]) for name in columns}
        with torch.no_grad():
            expected = student(**row).logits[0]
        torch.testing.assert_close(logits[index], expected)


def test_frozen_embeddings_do_not_train(teacher):
    model = models.load_classifier(str(teacher), get_task("rte"), 0)
    models.freeze_embeddings(model)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen
    assert all(".embeddings." in name for name in frozen)


def test_precision_is_measured_once_and_kept(teacher, tmp_path):
    model = models.load_classifier(str(teacher), get_task("rte"), 0)
    batch = {"input_ids": torch.ones(4, 8, dtype=torch.long), "labels": torch.tensor([0, 1, 0, 1])}
    precision = measure_precision(model, batch, torch.device("cpu"))
    assert precision.name in ("fp32", "bf16")
    assert precision.bf16 == (precision.name == "bf16")
    assert "times as fast in bf16" in precision.reason
    assert all(parameter.grad is None for parameter in model.parameters())
    assert read_precision(tmp_path / "none.json") is None
    (tmp_path / "precision.json").write_text('{"name": "bf16", "reason": "kept"}')
    assert read_precision(tmp_path / "precision.json") == Precision("bf16", "kept")


def make_result(loss, seed, score, task="mrpc"):
    metrics = {"f1": score, "accuracy": score - 0.1}
    return Result(
        task=task, loss=loss, seed=seed,
        settings={"loss": loss, "loss.alpha": 0.9, "epochs": 1, "freeze_embeddings": False},
        headline="f1", metrics=metrics, teacher_metrics=metrics, agreement=0.9, teacher_logits="x",
        rows={"train": 10, "dev": 5}, steps=4, seconds=2.0, precision="fp32",
        versions={"otkd": "0"}, machine={"cores": 1},
    )  # fmt: skip


def test_intervals_are_t_intervals_over_seeds():
    assert estimate([0.5]).interval is None
    # Two values: half their distance times t(.975, 1) = 12.7062; five: t(.975, 4) = 2.77645.
    assert estimate([0.4, 0.6]).interval == pytest.approx(0.1 * 12.7062, rel=1e-5)
    five = [0.1, 0.2, 0.3, 0.4, 0.5]
    assert estimate(five).interval == pytest.approx(2.77645 * (0.025 / 5) ** 0.5, rel=1e-5)


def test_reports_come_from_result_files_alone(tmp_path):
    made = [make_result(loss, seed, 0.8 + seed / 10) for loss in ("kl", "jsd") for seed in (1, 0)]
    for index, result in enumerate(made):
        write_result(tmp_path / f"{index}.json", result)
    read = [read_result(tmp_path / f"{index}.json") for index in range(4)]
    assert read == made
    summary = summarise(read)[1]
    assert (summary.loss, summary.seeds, summary.scores) == ("jsd", (0, 1), (0.8, 0.9))
    table = comparison_table(make_result("teacher", 0, 0.95), read)
    assert table.columns[1].header == "F1"
    assert "2 seeds per loss" in explanation(made[0], read)
    assert metric_title("mismatched_accuracy") == "accuracy (mismatched)"
