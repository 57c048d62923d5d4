"""Texts as rows of a language task: from files and data sets, and as tokens."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")

import datasets
import transformers
from tokenizers.processors import TemplateProcessing

from otkd.tasks import DataError, get_task
from otkd.tasks.causal_lm.loading import Text, encode_rows, load_language_task
from tests.models import VOCAB, save_tokenizer


def load(folder, **options):
    return load_language_task(get_task("text"), folder, **options)  # pyright: ignore


def test_lines_end_as_on_any_system(tmp_path):
    unusual = "naïve 日本\u2028🙂 \x0b\x85"  # none of these ends a line
    (tmp_path / "train.txt").write_bytes(f"\ufeffw3 w4\r\n\r\n{unusual}\rw5\n".encode())
    (tmp_path / "dev.txt").write_bytes(b"w3 w4")
    data = load(tmp_path)
    assert [row.text for row in data.train] == ["w3 w4", unusual, "w5"]
    assert data.train[1].where == f"{tmp_path / 'train.txt'}, line 3"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": None}, "line 2: no text in the column 'text'"),
        ({"text": 5}, "line 2: no text in the column 'text'"),
        ({"text": "w3 \ud800 w4"}, r"line 2: \\ud800 is half of a surrogate pair"),
        (["w3"], "line 2: .* is not a JSON object"),
    ],
)
def test_a_row_without_a_text_is_named(tmp_path, row, message):
    for name in ("train", "dev"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "w3 🙂"}}\n{json.dumps(row)}\n')
    with pytest.raises(DataError, match=message):
        load(tmp_path)


def test_a_data_set_of_the_hub_is_read_likewise(monkeypatch):
    rows = {"train": {"text": ["w3 w4", "", "w5 w6"]}, "validation": {"text": ["w3 w4", None]}}
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, split: datasets.Dataset.from_dict(rows[split])
    )
    with pytest.raises(DataError, match="some/set, row 2: no text in the column 'text'"):
        load("some/set")
    rows["validation"]["text"].pop()
    assert [row.text for row in load("some/set").train] == ["w3 w4", "w5 w6"]
    with pytest.raises(DataError, match="no column 'words' but text"):
        load("some/set", text_column="words")


def test_a_long_text_is_cut_at_its_end_only(tmp_path):
    """Also by a tokenizer that is set to cut on the left, and to add an end."""
    save_tokenizer(tmp_path, VOCAB)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, truncation_side="left")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    rows = encode_rows([Text("a", "w3 w4 w5 w6"), Text("b", "w7")], tokenizer, max_length=4)
    assert rows["input_ids"][:] == [[1, 3, 4, 5], [1, 7, 2]]
    assert rows["labels"][:] == rows["input_ids"][:]
    assert rows["length"][:] == [4, 3]
