"""Timings and generated tables: what is timed, counted and refused."""

import dataclasses
import json
import random
import re
import time

import compress
import finetuning
import groups
import latency
import numpy as np
import pytest
import tables
import timm
import torch
from conftest import ROOT
from latency import Cell, Form, Textbook
from measuring import interleaved
from report import figures, finetuning_tables, latency_tables, model_tables, training_tables
from torch import nn

import mobilenets_zoo as mz


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


@pytest.mark.parametrize("name", timm.list_models("*_cifar100"))
def test_no_finished_run_is_far_ahead_of_the_bundled_one(name):
    """README: the best is bundled, or one within 0.03 points of it."""
    entry = mz.pretrained.default_entry(name)
    others = [row for row in training_tables.experiments() if row["images"] == "test" and row["params"]]
    measured = [float(row["top1"]) for row in others if (row["model"], int(row["params"])) == (name, entry.params)]
    own = [row for row in model_tables.results() if (row["model"], row["params"]) == (name, entry.params)]
    measured += [row["evaluation"]["top1"] for row in own]
    assert len(measured) == model_tables.measured_runs(name, entry.params)
    assert entry.top1 >= max(measured) - 0.031


def test_experiments_fit_one_short_table():
    table = training_tables.experiments_table().splitlines()[2:]
    assert 0 < len(table) <= 15
    shown = sum(row.rpartition(" | ")[2].count(";") + 1 for row in table)
    assert shown == sum(row["comparison"] != training_tables.FIVE_EPOCHS for row in training_tables.experiments())


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "figures").glob("*.svg")), ids=lambda path: path.stem)
def test_pictures_have_no_boxes(path):
    """They stand on white pages and on dark ones."""
    fills = re.findall(r'<path d="M 0 [^"]*" style="fill: ([^;"]+)', path.read_text())
    assert set(fills) == {"none"}
    assert not re.search("#fff|#000|white|black", path.read_text())


def test_names_in_pictures_cover_neither_marks_nor_one_another():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure, data = pyplot.figure(), figures.accuracy_over_macs()
    figures.draw_accuracy(figure, data)
    axes = figure.axes[0]
    names = [text for text in axes.texts if text.get_text()]
    boxes = [name.get_window_extent() for name in names]
    marks = axes.transData.transform(np.concatenate([line.get_xydata() for line in axes.get_lines()]))
    pyplot.close(figure)
    _, *named = data["points"].values()  # the original's are our networks
    assert len(names) == sum(map(len, named)) == len(mz.manifest()) + len(figures.PUBLISHED)
    assert not any(box.contains(*mark) for box in boxes for mark in marks)
    assert all(box.count_overlaps(boxes) == 1 for box in boxes)  # with itself


def test_the_legend_names_every_line_and_covers_no_panel():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    rows = [
        {"data": data, "model": f"mobilenetv1_{name}_cifar100", "method": method, "images": [10, 100], "top1": [50, 60]}
        for data, names in (("cifar10", ("a", "b")), ("cifar100-coarse", ("b", "c")))
        for name in names
        for method in figures.METHODS
    ]
    figure = pyplot.figure(layout="constrained")
    figures.draw_finetuning(figure, rows)
    figure.draw_without_rendering()
    legend = figure.legends[0]
    pyplot.close(figure)
    expected = {f"v1_{name}, {method}" for name in "abc" for method in figures.METHODS}
    assert {text.get_text() for text in legend.texts} == expected
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    assert len(boxes) == 2
    assert not legend.get_window_extent().count_overlaps(boxes)


def test_fine_tuning_is_measured_row_by_row(tmp_path, monkeypatch):
    out, trained = tmp_path / "finetuning.csv", []
    arguments = ["digits", "--models", "mobilenetv1_w025_cifar100", "--per-class", "3", "--seeds", "2", f"--out={out}"]
    original = finetuning.Run.train

    def train(run, progress):
        trained.append((run.settings.seed, run.settings.freeze, run.settings.scratch, len(run.images)))
        run.epochs = min(run.epochs, 1)
        return original(run, progress)

    monkeypatch.setattr(finetuning.Run, "train", train)
    assert finetuning.main([*arguments, "--methods", "classifier"]) == 0
    assert finetuning.main(arguments) == 0
    assert sorted(trained) == sorted((seed, *how, 30) for seed in (0, 1) for how in ((0, 0), (1, 0), (0, 1)))
    assert finetuning.main(arguments) == 0
    assert len(trained) == 6
    monkeypatch.setattr(finetuning_tables, "RESULTS", out)
    assert finetuning_tables.results("cifar10") == {}
    means = {method: np.mean(cells[3]) for (_, method), cells in finetuning_tables.results("digits").items()}
    assert means["scratch"] < means["classifier"] > 50
    row = finetuning_tables.finetuning_table("digits").splitlines()[2]
    assert re.fullmatch(r"\| `v1_w025` \| fine-tuned \| [\d.]+ ± [\d.]+ \(2\) \|", row)


# Timings


def test_textbook_form_does_the_condensed_work():
    condensed = timm.create_model("mobilenetv2_lgc_cifar100", condensed=True).eval()
    textbook = latency.replaced(condensed, mz.CondensedConv2d, Textbook)
    assert mz.profile(textbook) == mz.profile(condensed)
    kinds = [type(module) for module in textbook.modules()]
    assert kinds.count(Textbook) == 34
    assert mz.CondensedConv2d not in kinds


def test_cifar_mobilenet_v2_has_the_usual_cost():
    assert round(mz.profile(latency.cifar_mobilenet_v2()).macs / 1e6) == 88


def test_what_is_shipped_is_timed_and_named():
    name = "mobilenetv2_lgc_proj_cifar100"
    forms = list(latency.model_forms(name))
    assert [(form.form, form.precision) for form in forms] == [
        *((form, "fp32") for form in ("plain", "textbook", "condensed", "optimized")),
        *((form, "int8") for form in ("plain", "optimized")),
    ]
    model, entry = timm.create_model(name, pretrained=True).eval(), mz.pretrained.default_entry(name)
    assert {form.weight for form in forms} == {entry.name}
    x = torch.randn(1, 3, 32, 32)
    for form in (form for form in forms if form.form != "textbook"):  # whose channels have another order
        mz.check_equivalent(model, form.network, x, tolerance=1e-4)
    costs = [form.row()["macs"] for form in forms]
    assert costs[2] == entry.macs
    # The optimized network's own multiply-adds: neither the condensed one's nor those of the dense one for int8.
    assert costs[3] == mz.profile(mz.optimize_for_inference(model)).macs < costs[5] < costs[2] < costs[0]


def test_networks_that_are_not_shipped_name_no_weight():
    made_up = [form for form in latency.model_forms("mobilenetv2_gc_cifar100") if form.model == latency.LIMIT]
    peer = list(latency.model_forms("timm mobilenetv3_small_100"))
    assert [form.weight for form in [*made_up, *peer]] == [None, None]


def test_forms_take_turns():
    random.seed(0)
    calls: list[int] = []
    times = interleaved([lambda i=i: calls.append(i) for i in range(3)], seconds=0.0)
    assert [len(values) for values in times] == [5] * 3
    turns = [tuple(calls[i : i + 3]) for i in range(6, len(calls), 3)]
    assert all(sorted(turn) == [0, 1, 2] for turn in turns)
    assert len(set(turns)) > 1  # in changing order


def test_each_pass_times_new_sessions_in_random_order(monkeypatch):
    random.seed(0)
    made: list[str] = []

    def runner(form, cell):
        made.append(form.model)
        return lambda: time.sleep(0.003 if form.model == "slow" else 0.0)

    monkeypatch.setattr(latency, "runner", runner)
    forms = [Form(model, "plain", None, nn.Conv2d(3, 4, 1)) for model in ("slow", "fast", "faster")]
    cells = [Cell("eager", 2, 1), Cell("eager", 1, 2), Cell("onnxruntime", 1, 1), Cell("eager", 1, 1, "int8")]
    rows = latency.time_cells(forms, cells, 0.0)
    assert [(row["batch"], row["model"]) for row in rows] == [(b, form.model) for b in (1, 2) for form in forms]
    assert len({tuple(made[i : i + 3]) for i in range(0, len(made), 3)}) > 1
    assert all(made.count(form.model) == 2 * latency.PASSES == 2 * len(rows[0]["passes"]) for form in forms)
    assert all((row["ms"] >= 3.0 / row["batch"]) == (row["model"] == "slow") for row in rows)
    assert torch.get_num_threads() == 1


def test_ratios_are_taken_within_a_pass(monkeypatch):
    cell = dict(threads=1, batch=1)
    reference = latency_tables.REFERENCE | cell | dict(passes=[2.0, 3.0, 2.0])
    fast = cell | dict(model="fast", form="plain", passes=[1.0, 2.0, 1.0])
    monkeypatch.setattr(latency_tables, "latency", lambda: {"rows": [fast, reference]})
    assert latency_tables._ratio("fast", "plain", cell) == "2.00"
    assert latency_tables._ratio("fast", "plain", cell | dict(batch=64)) == "-"


@pytest.mark.slow
def test_run_writes_one_document(tmp_path, monkeypatch):
    """The fastest form alone, exported in this process."""
    pytest.importorskip("onnxscript")
    forms = latency.model_forms
    monkeypatch.setattr(latency, "model_forms", lambda *args: [f for f in forms(*args) if f.form == "optimized"])
    monkeypatch.setattr(latency, "export_all", lambda names, folder: latency.export(names[0], folder))
    monkeypatch.setattr(latency, "CALIBRATION_IMAGES", 4)
    out, name = tmp_path / "latency.json", "mobilenetv1_w025_cifar100"
    assert latency.main(["--models", name, "--seconds", "0", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    cells = [(row["runtime"], row["precision"], row["threads"], row["batch"]) for row in rows]
    assert cells == [(c.runtime, c.precision, c.threads, c.batch) for c in latency.EAGER_CELLS + latency.ORT_CELLS]
    assert {row["weight"] for row in rows} == {mz.pretrained.default_entry(name).name}
    assert all(row["bytes"] > 0 for row in rows if row["runtime"] == "onnxruntime")


# Groups


@pytest.mark.parametrize("row", groups.ROWS)
def test_rows_of_groups_are_recipes_of_networks_that_can_start(row):
    recipe = groups.recipe_of(row)
    assert recipe.size_at(0) == 32
    cost = mz.profile(timm.create_model(recipe.model, **recipe.model_args))
    assert cost.macs <= 301e6


def test_rows_of_groups_were_measured_with_todays_settings():
    """Else the table would compare what doesn't compare."""
    for row in groups.load_results()["rows"]:
        settings = json.loads(json.dumps(dataclasses.asdict(groups.recipe_of(row["row"]))))
        assert settings.items() <= row.items(), row["row"]


def test_foreign_networks_are_pruned_by_both_rules():
    torch.manual_seed(0)
    dense = timm.create_model("mobilenetv3_small_050", num_classes=100).eval()
    random = np.random.default_rng(0)
    classes = tuple(map(str, range(100)))
    data = mz.data.ImageSet(random.integers(0, 256, (256, 32, 32, 3), np.uint8), np.arange(256) % 100, classes)
    calibration = compress.pixels(random.integers(0, 256, (96, 32, 32, 3), np.uint8), 64)
    # The others see one pixel of an image and need more images.
    networks, row = compress.pruned(dense, calibration, 64, match=lambda name, _: "pw" in name)
    assert row["condensed_macs"] < row["macs"]
    before = compress.answers(dense, data.images, 64)
    after = {rule: compress.answers(network, data.images, 64) for rule, network in networks.items()}
    for rule, network in networks.items():
        assert np.array_equal(compress.answers(mz.condense(network), data.images, 64), after[rule])
    timed = compress.time_share(dense, mz.optimize_for_inference(networks["images"], input_size=(3, 64, 64)), 64, 0.1)
    assert timed["ms"] > 0
    assert len(timed["shares"]) == latency.PASSES
    agreement = {rule: (answers == before).mean() for rule, answers in after.items()}
    assert agreement["images"] >= agreement["magnitude"]
    weights = [parameter.clone() for parameter in networks["images"].parameters()]
    compress.train(networks["images"], data, 64, epochs=1, lr=1e-3, seed=0)
    assert any(not torch.equal(a, b) for a, b in zip(weights, networks["images"].parameters(), strict=True))
    assert not networks["images"].training
