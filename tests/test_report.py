"""The generated tables: what they count, what they refuse, and a model that has just been added."""

import json
import os
import shutil
import subprocess
import sys

import tables
from conftest import ROOT
from report import latency_tables, model_tables, training_tables

TOY = '''

@register_model
def toy_cifar100(pretrained: bool = False, **kwargs: Any) -> MobileNetV1:
    """A toy."""
    return _create_mobilenetv1("toy_cifar100", pretrained, **dict(dict(width_mult=0.125), **kwargs))
'''


def test_a_new_model_needs_what_contributing_says_and_no_more(tmp_path):
    """A function and a line in WEIGHTS: tables, list and info then show the model, without weights and times."""
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
    for name in ("mobilenets_zoo", "benchmarks", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    shutil.copy(ROOT / "README.md", tmp_path)
    family = tmp_path / "mobilenets_zoo" / "models" / "mobilenetv1.py"
    text = family.read_text()
    assert text.count("WEIGHTS = (\n") == 1
    family.write_text(text.replace("WEIGHTS = (\n", 'WEIGHTS = (\n    "toy_cifar100.untrained",\n') + TOY)

    def run(*command: str) -> str:
        env = {**os.environ, "PYTHONPATH": str(tmp_path)}
        result = subprocess.run([sys.executable, *command], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    program = """
import sys
sys.path.insert(0, "benchmarks")
import tables
for path, text in tables.generated().items():
    path.write_text(text)
from report.figures import all_figures
print(len(all_figures()))
"""
    assert int(run("-c", program)) > 3
    assert "| `toy_cifar100` |" in (tmp_path / "README.md").read_text()
    assert json.loads((tmp_path / "mobilenets_zoo" / "profiles.json").read_text())["toy_cifar100"]["ms"] is None
    command = "from mobilenets_zoo.cli import main; main()"
    rows = {row["name"]: row for row in json.loads(run("-c", command, "list", "--json"))}
    assert rows["toy_cifar100"]["weights"] is None
    assert rows["toy_cifar100"]["params"] < rows["mobilenetv1_w025_cifar100"]["params"]
    assert json.loads(run("-c", command, "info", "toy_cifar100", "--json"))["description"] == "A toy."


def test_timings_of_other_weights_fail_the_check(monkeypatch, capsys):
    weights = [entry.name for entry in model_tables.default_weights().values()]
    rows = [dict(weight=weight) for weight in [None, "mobilenetv2_cifar100.old", *weights[1:]]]
    monkeypatch.setattr(latency_tables, "latency", lambda: {"rows": rows})
    assert tables.main(["--check"]) == 1
    error = capsys.readouterr().err
    assert "mobilenetv2_cifar100.old isn't what" in error
    assert f"{weights[0]} wasn't timed" in error
    assert latency_tables.not_shipped({*weights[1:], "mobilenetv2_cifar100.old"}) == ""


def test_runs_are_those_measured_on_test_images(monkeypatch):
    """Not those on held-out images, nor those of the model at another width."""
    row = dict(model="m", images="test", params="10")
    rows = [row, row | dict(images="held-out", params=""), row | dict(params="5"), row | dict(model="n")]
    monkeypatch.setattr(model_tables, "experiments", lambda: rows)
    monkeypatch.setattr(model_tables, "results", lambda: [dict(model="m", params=10)])
    assert model_tables.measured_runs("m", 10) == 2


def test_experiments_fit_one_short_table():
    table = training_tables.experiments_table().splitlines()[2:]
    assert 0 < len(table) <= 15
    shown = sum(row.rpartition(" | ")[2].count(";") + 1 for row in table)
    assert shown == sum(row["comparison"] != training_tables.FIVE_EPOCHS for row in training_tables.experiments())
