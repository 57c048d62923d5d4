"""The tables of docs/causal_lm.md are those of the committed result files."""

import dataclasses
import shutil
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import study_tables

from otkd.study.kinds import make_experiment
from otkd.study.objectives import objective_options
from otkd.study.protocols import load_protocol
from otkd.study.results import read_result, write_result
from otkd.study.settings import Settings
from otkd.tasks import get_task
from tests.models import VOCAB, save_tokenizer, tiny_llama


@pytest.mark.parametrize("path", study_tables.PAGES, ids=lambda path: path.stem)
def test_the_page_shows_the_results(path):
    page = path.read_text(encoding="utf-8")
    assert study_tables.updated(page, study_tables.HERE / "results") == page


def test_every_committed_study_has_a_table():
    pages = "".join(path.read_text(encoding="utf-8") for path in study_tables.PAGES)
    results = study_tables.HERE / "results"
    studies = {path.parents[1].relative_to(results) for path in results.glob("*/*/teacher/*")}
    assert studies
    for study in studies:
        assert f"<!-- table: {' '.join(study.parts)} -->" in pages


def test_differences_are_between_runs_with_the_same_seed(tmp_path):
    folder = tmp_path / "one-rate" / "instructions"
    shutil.copytree(study_tables.HERE / "results" / "one-rate" / "instructions", folder)
    one = read_result(folder / "kl" / "0.json")
    for seed, baseline, other in ((0, 5.0, 5.3), (1, 6.0, 6.2), (2, 5.5, 5.9)):
        for loss, value in (("kl", baseline), ("tvd", other)):
            settings = {**one.settings, "seed": seed, "loss": loss}
            metrics = {**one.metrics, "cross_entropy": value}
            result = dataclasses.replace(
                one, seed=seed, loss=loss, settings=settings, metrics=metrics
            )
            write_result(folder / loss / f"{seed}.json", result)
    (line,) = (
        line for line in study_tables.table(folder, "one-rate").splitlines() if "| tvd |" in line
    )
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[2] == "3"
    # The mean of .3, .2 and .4, and the t-interval of their standard error of .0577.
    assert cells[-2] == "**+0.300 ± 0.248**"


def test_the_committed_results_are_those_of_the_protocol(tmp_path):
    """A result whose settings the code would name otherwise would be refused."""
    model = tiny_llama(0, layers=6)
    model.config.max_position_embeddings = 384
    model.save_pretrained(tmp_path / "teacher")
    save_tokenizer(tmp_path / "teacher", VOCAB)
    for part in ("train", "dev"):
        (tmp_path / f"{part}.jsonl").write_text('{"instruction": "w3", "output": "w4"}\n')
    protocol = load_protocol(str(study_tables.HERE / "one-rate.toml"))
    given = Settings("instructions", data_dir=tmp_path, teacher=str(tmp_path / "teacher"))
    given = dataclasses.replace(given, **get_task("instructions").defaults)
    settings = protocol.resolve(given, ())
    objectives = {each.name: each for each in protocol.objectives(settings, ())}
    experiment = make_experiment(settings, [*objectives.values()], tmp_path / "out")
    folder = study_tables.HERE / "results" / "one-rate" / "instructions"
    paths = [*folder.glob("*/*.json")]
    assert len(paths) >= 3
    of_data = {"data_digest", "train_rows", "dev_rows", "teacher", "teacher_weights"}
    for path in paths:
        found = read_result(path)
        wanted = experiment.teacher_settings
        if found.loss != "teacher":
            wanted = experiment.student_settings(objectives[found.loss], found.seed)
        assert found.settings.keys() == wanted.keys()
        assert {n: v for n, v in found.settings.items() if n not in of_data} == {
            n: v for n, v in experiment.as_run(wanted).items() if n not in of_data
        }


def test_tuning_gives_every_loss_the_same_budget():
    protocol = load_protocol(str(study_tables.HERE / "tuned.toml"))
    settings = protocol.resolve(Settings("instructions"), ())
    assert settings.score == "last"
    for objective in protocol.objectives(settings, ()):
        tried = [dict(each) for each in objective.candidates]
        assert len({str(each) for each in tried}) == 6
        rates = {each.pop("learning_rate") for each in tried}
        parameters = {name for each in tried for name in each}
        assert (len(rates), len(parameters)) in {(3, 1), (6, 0)}, objective.name
        # A parameter without an effect would be no tuning.
        assert parameters <= objective_options(objective.loss, settings).keys()


def test_a_loss_of_which_a_run_diverged_has_no_means(tmp_path):
    folder = tmp_path / "instructions"
    shutil.copytree(study_tables.HERE / "results" / "one-rate" / "instructions", folder)
    one = read_result(folder / "kl" / "0.json")
    settings = {**one.settings, "loss": "tvd"}
    lost = dataclasses.replace(
        one, loss="tvd", settings=settings, metrics={}, agreement=None, status="diverged",
        reason="the loss is nan",
    )  # fmt: skip
    write_result(folder / "tvd" / "0.json", lost)
    assert "| tvd | 1 | diverged |" in study_tables.table(Path(folder), "one-rate")
