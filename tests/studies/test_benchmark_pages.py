"""The pages about benchmarks are generated from the result files, and the result files agree."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PLACES = sorted(
    path.relative_to(RESULTS).with_suffix("").as_posix()
    for path in RESULTS.glob("*/*.json")
    if path.parent.name != "glue"
)


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def load(place: str, results: Path = RESULTS) -> dict:
    return json.loads((results / f"{place}.json").read_text("utf-8"))


def test_the_pages_are_those_that_the_result_files_give():
    report = importlib.import_module("report")
    pages = report.pages(RESULTS, ROOT)
    assert len(pages) == 4
    for path, text in pages.items():
        assert path.read_text("utf-8") == text, f"run benchmarks/report.py to renew {path.name}"


def test_the_summary_fits_on_one_page():
    assert len((ROOT / "docs" / "benchmarks.md").read_text("utf-8").splitlines()) <= 150


@pytest.fixture
def results(tmp_path) -> Path:
    """A few of the result files, which a test may change."""
    for place in ("vocabulary/topk", "vocabulary/accuracy", "gpu/transport"):
        target = tmp_path / f"{place}.json"
        target.parent.mkdir(exist_ok=True)
        shutil.copy(RESULTS / f"{place}.json", target)
    return tmp_path


def test_the_full_page_has_every_number_and_names_what_is_missing(results):
    full = importlib.import_module("full")
    text = full.page(results, {"vocabulary/accuracy": "topk-error.svg"})
    found = load("vocabulary/topk")["cases"][0]["times"]["F.kl_div"]
    assert f"| F.kl_div | {found['median']:.3g} ({found['low']:.3g}–{found['high']:.3g}) |" in text
    assert "`batch/few_classes`: not measured." in text
    assert "`gpu/transport`: not measured (no GPU)." in text
    assert "(topk-error.svg)" in text


def test_notes_are_printed_under_their_rows(results):
    full = importlib.import_module("full")
    (results / "notes.toml").write_text('[vocabulary]\ntopk = "Slower, for a reason."\n', "utf-8")
    text = full.page(results, {})
    assert text.index("#### `vocabulary/topk`") < text.index("Slower, for a reason.")
    assert text.index("Slower, for a reason.") < text.index("#### `vocabulary/accuracy`")
    (results / "vocabulary" / "topk.json").unlink()
    with pytest.raises(ValueError, match="vocabulary/topk"):
        full.page(results, {})


def test_a_page_cannot_quote_what_was_not_measured(results):
    facts = importlib.import_module("facts").Facts(results)
    assert facts.time("vocabulary/topk", "zipf-clustered", "F.kl_div", "otkd") > 1
    with pytest.raises(ValueError, match="gpu/transport"):
        facts.time("gpu/transport", "dense, float32", "F.kl_div", "otkd, torch")


def test_ratios_and_errors_are_rounded_to_two_digits():
    facts = importlib.import_module("facts")
    found = [facts.ratio(x) for x in (0.00566, 0.2521, 1.0797, 3.485, 14.2, 1363.8)]
    assert found == ["0.0057", "0.25", "1.08", "3.5", "14", "1,400"]
    assert [facts.error(x) for x in (6.3e-6, 0.00165, 0.0338, 0.337)] == [
        "6e-6",
        "0.17 %",
        "3.4 %",
        "34 %",
    ]


def test_the_figures_are_drawn_from_the_results(results, tmp_path):
    importlib.import_module("figures").draw_all(results, tmp_path / "images")
    (drawing,) = (tmp_path / "images").iterdir()
    text = drawing.read_text("utf-8")
    assert text.rstrip().endswith("</svg>")
    assert "flat, clustered embedding" in text


def test_every_row_has_a_place_on_the_full_page():
    pytest.importorskip("transformers")
    groups = importlib.import_module("run").GROUPS
    sections = [s for part in importlib.import_module("full").PARTS.values() for s in part.values()]
    listed = [place for section in sections for place in section]
    assert sorted(listed) == sorted(f"{g}/{row}" for g, rows in groups.items() for row in rows)


@pytest.mark.parametrize("place", PLACES)
def test_stored_results_are_measured_or_say_why_not(place):
    result = load(place)
    assert result["schema"] == 1
    assert result["row"] == place.partition("/")[2]
    assert result["measured"] or result["reason"]
    for case in result["cases"] if result["measured"] else ():
        ours, *_ = case.get("peers") or [None]
        for name, ratio in case.get("times", {}).items():
            theirs, own = (case["peers"][peer]["seconds"]["median"] for peer in (name, ours))
            assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
            assert 0.7 * ratio["low"] <= theirs / own <= 1.5 * ratio["high"]  # peer ÷ otkd


@pytest.mark.parametrize("place", PLACES)
def test_stored_targets_follow_from_the_stored_cases(place):
    pytest.importorskip("transformers")
    group, _, row = place.partition("/")
    measure = importlib.import_module("run").GROUPS[group][row]
    name = "topk_targets" if row == "topk_large" else f"{row}_targets"
    targets = getattr(importlib.import_module(measure.__module__), name, None)
    result = load(place)
    assert result["targets"] == (targets(result["cases"]) if targets else [])
