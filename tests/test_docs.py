"""The code of the documentation runs as it stands there."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.usefixtures("seeded")
def test_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (DOCS / "training.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 5  # a block that is not found is not run
    exec(compile("\n".join(blocks), "training.md", "exec"), {})


def test_the_readme_names_what_is_installed():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11 and later
    project = tomllib.loads((DOCS.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    (install,) = re.findall(r"^Install: .*?\n\n", readme, re.DOTALL | re.MULTILINE)
    for dependency in project["dependencies"]:
        name = re.match(r"[\w.-]+", dependency)[0]
        assert re.search(rf"\b{name}\b", install, re.IGNORECASE), name
