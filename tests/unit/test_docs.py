"""The code in the documentation runs as it is written there."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


def code_of(path):
    """The Python blocks of a page as one program, and their number."""
    blocks = re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
    return compile("\n".join(blocks), path.name, "exec"), len(blocks)


@pytest.mark.usefixtures("seeded")
def test_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, blocks = code_of(DOCS / "training.md")
    assert blocks >= 5  # a block that is not found is not run
    exec(code, {})


@pytest.mark.usefixtures("seeded")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")
# TRL 1.16 uses names that newer versions of transformers have replaced.
@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
@pytest.mark.parametrize(
    ("page", "needs"),
    [
        ("README.md", "transformers"),
        ("docs/transformers.md", "transformers"),
        ("docs/trl.md", "otkd.integrations.trl"),
    ],
)
def test_a_page_trains_a_causal_language_model(page, needs, tmp_path, monkeypatch):
    pytest.importorskip(needs, exc_type=ImportError)
    datasets = pytest.importorskip("datasets")
    from tests.models import VOCAB, save_tokenizer, tiny_llama

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CI", "1")  # TRL sends no telemetry
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for seed, name in enumerate(("teacher", "student")):
        tiny_llama(seed).save_pretrained(f"path/to/{name}")
        save_tokenizer(f"path/to/{name}", VOCAB)
    Path("corpus.txt").write_text("w3 w4 w5 w6\nw7 w8 w9\n" * 4, encoding="utf-8")
    Path("prompts.jsonl").write_text('{"prompt": "w3 w4"}\n' * 8, encoding="utf-8")
    code, blocks = code_of(DOCS.parent / page)
    assert blocks
    exec(code, {})
    assert list(Path("output").glob("checkpoint-*/model.safetensors"))


@pytest.mark.usefixtures("seeded")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")
def test_two_tokenizers(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OTKD_CACHE", str(tmp_path))
    code, blocks = code_of(DOCS / "two_tokenizers.md")
    assert blocks == 4
    run = {}
    exec(code, run)
    assert run["value"].isfinite()
    assert run["metrics"].bytes > 50
    assert run["trainer"].state.global_step == 1
    assert len(run["found"]) >= 2


def test_the_readme_names_what_is_installed():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11 and later
    project = tomllib.loads((DOCS.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    (install,) = re.findall(r"^## Install\n\n.*?\n\n", readme, re.DOTALL | re.MULTILINE)
    for dependency in project["dependencies"]:
        name = re.match(r"[\w.-]+", dependency)[0]
        assert re.search(rf"\b{name}\b", install, re.IGNORECASE), name
