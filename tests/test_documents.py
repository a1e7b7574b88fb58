"""The code that README and model cards show runs as shown."""

import re
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image

from mobilenets_zoo import pretrained
from mobilenets_zoo.publish import build_folder


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_readme_code_runs():
    blocks = python_blocks((ROOT / "README.md").read_text())
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


@pytest.mark.parametrize("entry", pretrained.manifest().values(), ids=lambda entry: entry.name)
def test_card_code_runs(entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """All blocks of a card in one session, with the built folder in the repository's place."""
    folder = build_folder(entry, tmp_path / "repository")
    Image.new("RGB", (50, 40), "green").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = python_blocks((folder / "README.md").read_text())
    assert len(blocks) >= 5
    for block in blocks:
        exec(compile(block.replace(f"hf-hub:{entry.hub_id}", f"local-dir:{folder}"), "card", "exec"), names)
    assert (tmp_path / "model.onnx").is_file()
