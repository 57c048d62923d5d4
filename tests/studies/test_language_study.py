"""The tables of docs/causal_lm.md are those of the committed result files."""

import dataclasses
import shutil
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import study_tables

from otkd.study.results import read_result, write_result


def test_the_page_shows_the_results():
    page = study_tables.PAGE.read_text(encoding="utf-8")
    assert page.count("<!-- table: ") > 0
    assert study_tables.updated(page, study_tables.HERE / "results") == page


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
