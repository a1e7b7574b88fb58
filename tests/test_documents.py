"""The code that README and docs show runs as shown."""

import importlib
import json
import re
import shlex
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import mobilenets_zoo as mz

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path: Path) -> list[tuple[str, str]]:
    """Returns (language, code) of a document's fenced blocks."""
    return re.findall(r"^```(\w+)\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(
    "path",
    [path for path in DOCUMENTS if re.search("^```(python|console)", path.read_text(), re.M)],
    ids=lambda p: p.name,
)
def test_code_runs_as_shown(path, run, tmp_path, monkeypatch):
    """A document's Python blocks run in one session; commands of ours run in between, where they stand.

    The README's run with what its first command installs, and blocks that classify the same photo agree.
    """
    pytest.importorskip("onnxscript")
    if path.name == "README.md":
        for name in ("onnx", "onnxruntime", "onnxscript"):
            monkeypatch.setitem(sys.modules, name, None)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    stripes = np.linspace(0, 255, 100 * 50 * 3).reshape(50, 100, 3).astype(np.uint8)
    Image.fromarray(stripes[:, np.arange(100) ** 2 % 100]).save(tmp_path / "photo.jpg", exif=exif)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": path.stem}
    ran, answers, best = 0, [], []
    for language, code in blocks(path):
        if language == "python":
            exec(compile(code, path.name, "exec"), names)
            ran += 1
            if "probabilities" in names:
                answers.append(np.ravel(names["probabilities"]))
        elif language == "console":
            for line in code.splitlines():
                assert line.startswith(("mobilenets-zoo ", "pip install ", "python benchmarks/", "python -m pytest"))
                if line.startswith("mobilenets-zoo "):
                    code_, out, err = run(*shlex.split(line)[1:])
                    assert code_ == 0, err
                    if "--json" in line:
                        best = [row["probability"] for row in json.loads(out)["images"][0]["predictions"]]
                    ran += 1
    assert len(answers) == (2 if path.name == "index.md" else 0)
    assert bool(best) == bool(answers)
    for answer in answers:  # as the command line's
        assert np.sort(answer)[::-1][: len(best)] == pytest.approx(best, abs=1e-3)
    assert ran or path.name in ("contributing.md", "training.md")


COMMAND = re.compile(r"(?:mobilenets-zoo|python benchmarks/\w+\.py) [^`\n]+")
TEXTS = [*DOCUMENTS, ROOT / "benchmarks" / "model_card.md"]


@pytest.mark.parametrize(
    "path", [path for path in TEXTS if COMMAND.search(path.read_text())], ids=lambda path: path.name
)
def test_commands_take_the_options_that_are_shown(path, run, capfd):
    """Every command of ours in a text, with its options, and the recipes that it names."""
    for command in COMMAND.findall(path.read_text()):
        words = re.sub(r"[][|]", " ", command.partition("  ")[0]).split()
        if words[0] == "mobilenets-zoo":
            text = run(words[1], "--help")[1]
        else:
            assert (ROOT / words[1]).is_file(), command
            with pytest.raises(SystemExit):
                importlib.import_module(Path(words[1]).stem).main(["--help"])
            text = capfd.readouterr().out
        for word in words:
            assert not word.startswith("--") or re.search(rf"{word}\b", text), command
            assert not (word.endswith(".toml") and "TAG" not in word) or (ROOT / word).is_file() or "$" in word, command


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_and_images_exist(path):
    for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


def test_the_map_names_every_file():
    text = (ROOT / "docs" / "design.md").read_text()
    parts = text[text.index("```text") :].partition("```\n")[0]
    folders = ("mobilenets_zoo", "benchmarks")
    files = [*ROOT.glob("*.py"), *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]
    helpers = [path for path in (ROOT / "tests").glob("*.py") if not path.name.startswith("test_")]
    missing = [str(path.relative_to(ROOT)) for path in [*files, *helpers] if path.name not in parts]
    assert not missing
    named = set(re.findall(r"[\w/]+\.py", parts))
    existing = {path.name for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), *ROOT.glob("*/*/*.py")]}
    assert named <= existing


def test_the_api_page_has_every_module():
    text = (ROOT / "docs" / "api.md").read_text()
    modules = {name for name in mz.__all__ if isinstance(getattr(mz, name), types.ModuleType)}
    assert {name for name in modules if f"automodule:: mz.{name}\n" not in text} == {"models"}  # its classes are mz's


def test_the_citation_names_the_version():
    assert f"\nversion: {mz.__version__}\n" in (ROOT / "CITATION.cff").read_text()
