"""`otkd align`: how well two tokenizers correspond on the lines of a file."""

import json

import pytest
from typer.testing import CliRunner

from otkd.alignment import audit, common_positions, token_ends
from otkd.cli.app import app

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("transformers")

from tests.small_tokenizers import tokenizer_of  # noqa: E402

TEXTS = ["the cat sat on the mat", "a café in the old town, 7 cats", "  tabs\tand spaces 中"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("OTKD_CACHE", str(tmp_path / "cache"))
    for name in ("byte-level", "wordpiece", "sentencepiece"):
        tokenizer_of(name).save_pretrained(tmp_path / name)
    (tmp_path / "texts.txt").write_text("\n\n".join(TEXTS) + "\n", "utf-8")
    return tmp_path


def otkd_align(folder, student, teacher, *more):
    arguments = [folder / student, folder / teacher, "--text", folder / "texts.txt", *more]
    return CliRunner().invoke(
        app, ["align", *(str(argument) for argument in arguments)], env={"COLUMNS": "160"}
    )


def test_shares_are_those_of_the_texts(folder):
    one, other = tokenizer_of("wordpiece"), tokenizer_of("byte-level")
    found = audit(one, other, TEXTS)
    common = ends = occurrences = tabs = 0
    for text in TEXTS:
        sides = [token_ends(tokenizer, text) for tokenizer in (one, other)]
        common += len(common_positions(*sides))
        ends += len({end for end in sides[1].ends if end >= 0})
        occurrences += len(sides[1].ids)
        tabs += sides[1].ids.count(other.convert_tokens_to_ids("ĉ"))
    assert found.boundaries == common
    assert found.boundary_share["teacher"] == common / ends
    assert found.tokens["teacher"] == ends
    for shares in (found.coverage, found.vocabulary):
        assert sum(shares.values()) == pytest.approx(1)
    assert found.coverage["embedding only"] == tabs / occurrences > 0  # WordPiece writes no tab
    assert 0 < found.coverage["exact match"] < 1
    shares = [token.share for token in found.worst]
    assert shares == sorted(shares, reverse=True)
    rest = 1 - found.coverage["exact match"]
    every = audit(one, other, TEXTS, worst=999).worst
    assert sum(token.share for token in every) == pytest.approx(rest)
    for token in every:
        if token.coverage == "embedding only":
            assert token.student is None
        elif token.student is not None:  # otherwise, longer tokens begin with it
            assert token.text.startswith(token.student) or not token.text.strip().isascii()


def test_identical_tokenizers_have_everything_in_common(folder):
    tokenizer = tokenizer_of("byte-level")
    found = audit(tokenizer, tokenizer, TEXTS)
    assert found.boundary_share == {"student": 1, "teacher": 1}
    assert found.coverage["exact match"] == found.vocabulary["exact match"] == 1
    assert found.worst == ()
    with pytest.raises(ValueError, match="needs a text"):
        audit(tokenizer, tokenizer, [""])


def test_a_table_and_json(folder):
    output = folder / "out" / "audit.json"
    done = otkd_align(folder, "wordpiece", "byte-level", "--output", output, "--worst", 3)
    assert done.exit_code == 0, done.output
    found = audit(tokenizer_of("wordpiece"), tokenizer_of("byte-level"), TEXTS, worst=3)
    saved = json.loads(output.read_text("utf-8"))
    assert found.as_dict().items() <= saved.items()
    assert saved["student"] == str(folder / "wordpiece")
    assert f"{found.coverage['exact match']:.2%}" in done.stdout
    assert f"{found.boundary_share['student']:.2%}" in done.stdout
    assert len(saved["worst"]) == 3
    assert repr(found.worst[0].text) in done.stdout
    file = folder / "byte-level" / "tokenizer.json"
    assert otkd_align(folder, "wordpiece", file).exit_code == 0


def test_refusals_are_sentences(folder):
    backend = tokenizers.Tokenizer.from_file(str(folder / "byte-level" / "tokenizer.json"))
    backend.normalizer = tokenizers.normalizers.Lowercase()
    (folder / "lower.json").write_text(backend.to_str(), "utf-8")
    (folder / "texts.txt").write_text("The cat\n", "utf-8")
    done = otkd_align(folder, "wordpiece", "lower.json")
    assert done.exit_code == 1
    assert "changes the text" in done.output
    assert "With --normalize, this command does so" in done.output
    assert otkd_align(folder, "wordpiece", "lower.json", "--normalize").exit_code == 0
    for change, message in (
        (lambda: (folder / "texts.txt").write_text("\n \n"), "holds no text"),
        (lambda: (folder / "texts.txt").write_bytes(b"\xff"), "is not a text in UTF-8"),
        (lambda: (folder / "texts.txt").unlink(), "No such file"),
    ):
        change()
        done = otkd_align(folder, "wordpiece", "byte-level")
        assert done.exit_code == 1
        assert message in done.output
    done = otkd_align(folder, "texts", "byte-level")
    assert done.exit_code == 1
    assert "holds no tokenizer that can be read" in done.output
