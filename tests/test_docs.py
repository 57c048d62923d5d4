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
    assert len(blocks) == 6
    exec(compile("\n".join(blocks), "training.md", "exec"), {})
