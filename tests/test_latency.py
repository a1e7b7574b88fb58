"""The latency benchmark: its forms, its cells and what it writes."""

import json
import time

import latency
import pytest
import timm
import torch
from conftest import with_random_masks
from measuring.timing import MIN_ROUNDS, interleaved
from report import latency_tables
from rich.progress import Progress
from torch import nn

import mobilenets_zoo as mz


def test_textbook_form_does_the_condensed_work():
    model = with_random_masks(timm.create_model("mobilenetv2_lgc_cifar100")).eval()
    textbook, condensed = latency.textbook(model), mz.condense(model)
    assert mz.profile(textbook) == mz.profile(condensed)
    assert sum(isinstance(module, latency.Textbook) for module in textbook.modules()) == 34
    assert not any(isinstance(module, mz.CondensedConv2d) for module in textbook.modules())


def test_cifar_mobilenet_v2_has_the_usual_cost():
    assert round(mz.profile(latency.cifar_mobilenet_v2()).macs / 1e6) == 88


def test_forms_and_weights_are_named():
    entries = latency.build_forms(["mobilenetv2_lgc_proj_cifar100", "mobilenetv1_w025_cifar100"], peers=False)
    forms = [(entry["model"], entry["form"]) for entry in entries]
    learned, dense = "mobilenetv2_lgc_proj_cifar100", "mobilenetv1_w025_cifar100"
    assert forms == [
        *((learned, form) for form in ("plain", "textbook", "condensed", "optimized")),
        *((dense, form) for form in ("plain", "optimized")),
    ]
    assert entries[-1]["weights"] == mz.pretrained.default_entry(dense).tag
    assert entries[2]["macs"] == mz.profiling.deployed_profiles()[learned].macs


def test_forms_take_turns():
    calls: list[int] = []
    times = interleaved([lambda i=i: calls.append(i) for i in range(3)], seconds=0.0)
    assert [len(values) for values in times] == [MIN_ROUNDS] * 3
    timed = calls[6:]
    assert all(sorted(timed[i : i + 3]) == [0, 1, 2] for i in range(0, len(timed), 3))


def test_summary_takes_each_pass_on_its_own():
    fast, slow = [0.008 * (i + 1) for i in range(11)], [0.016] * 3 + [0.08] * 8
    values = latency.summary([slow, fast, fast], batch=8)
    assert (values["ms"], values["passes"]) == (6.0, [10.0, 6.0, 6.0])
    assert values["p10"] == pytest.approx(2.0, abs=0.5)
    assert values["p90"] == pytest.approx(10.0, abs=0.5)


def test_ratios_are_taken_within_a_pass():
    reference = dict(zip(("model", "form"), latency_tables.REFERENCE, strict=True))
    fast = dict(model="fast", form="plain", threads=1)
    rows = [
        fast | dict(batch=1, passes=[1.0, 2.0, 1.0]),
        fast | dict(batch=64, passes=[1.5, 1.0, 1.0]),
        fast | reference | dict(batch=1, passes=[2.0, 3.0, 2.0]),
        fast | reference | dict(batch=64, passes=[1.0, 4.0, 1.0]),
    ]
    cells = [dict(threads=1, batches=batches) for batches in ((1,), (64,), (1, 64), (8,))]
    document = {"rows": rows}
    assert latency_tables.ratios(document, "fast", "plain", **cells[0]) == [2.0, 1.5, 2.0]
    assert latency_tables.ratio_rows(document, cells)[0] == ["fast", "plain", "2.00", "1.00", "1.00", "-"]
    # The best batch is the best of each pass: 1.0, 3.0, 1.0 over 1.0, 1.0, 1.0.
    assert latency_tables.ratios(document, "fast", "plain", **cells[2]) == [1.0, 3.0, 1.0]
    assert latency_tables.ratios(document, "fast", "plain", **cells[3]) == []


def test_run_writes_one_document(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(latency, "BATCHES", {"onnxruntime": (1, 2), "openvino": (1,), "eager": (1,)})
    monkeypatch.setattr(latency, "PEERS", {"peer": lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten())})
    out = tmp_path / "latency.json"
    runtimes = ["onnxruntime", "eager"]
    arguments = ["--models", "mobilenetv1_w025_cifar100", "--seconds", "0", "--out", str(out), "--runtimes", *runtimes]
    assert latency.main(arguments) == 0
    document = json.loads(out.read_text())
    assert {row["runtime"] for row in document["rows"]} == set(runtimes)
    assert len(document["files"]) == 6  # plain, optimized and the peer, in fp32 and int8
    assert all(file["bytes"] > 0 and file["peak_mib"] > 0 for file in document["files"])
    assert all(row["p10"] <= row["ms"] <= row["p90"] for row in document["rows"])
    passes = {"onnxruntime": latency.PASSES, "eager": 1}
    assert all(len(row["passes"]) == passes[row["runtime"]] for row in document["rows"])


def test_files_are_timed_in_new_sessions_each_pass(monkeypatch):
    made: list[str] = []

    def runner(path, threads):
        made.append(path)
        return lambda x: time.sleep(0.003 if path == "slow" else 0.0)

    monkeypatch.setattr(latency, "ort_runner", runner)
    monkeypatch.setattr(latency, "BATCHES", {"onnxruntime": (1, 2)})
    files = [dict(model=path, form="plain", precision="fp32", path=path) for path in ("slow", "fast", "faster")]
    with Progress(disable=True) as progress:
        rows = latency.time_files(files, "onnxruntime", 0.0, progress)
    cells = [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert [(row["threads"], row["batch"], row["model"]) for row in rows] == [
        (*cell, file["model"]) for cell in cells for file in files
    ]
    assert all(made.count(file["path"]) == latency.PASSES * len(cells) for file in files)
    # Sessions are made in random order; times still belong to the file that took them.
    assert all((row["ms"] >= 3.0 / row["batch"]) == (row["model"] == "slow") for row in rows)


def test_eager_keeps_the_thread_count_it_promises():
    entries = [dict(model="m", form="plain", network=nn.Conv2d(3, 4, 1))]
    with Progress(disable=True) as progress:
        rows = latency.time_eager(entries, 0.0, progress)
    assert {(row["threads"], row["layout"]) for row in rows} == {
        (threads, layout) for threads in latency.THREADS for layout in ("NCHW", "channels_last")
    }
    assert torch.get_num_threads() == latency.THREADS[0]


def test_random_weights_keep_their_biases_in_the_file(tmp_path, monkeypatch):
    onnx = pytest.importorskip("onnx")
    monkeypatch.setattr(mz.pretrained, "manifest", dict)  # as before a model has weights
    model, weights = latency.zoo_model("mobilenetv2_lgc_gc_cifar100")
    assert weights == "random"
    mz.export_onnx(mz.optimize_for_inference(model), tmp_path / "model.onnx")
    convolutions = [node for node in onnx.load(tmp_path / "model.onnx").graph.node if node.op_type == "Conv"]
    without_bias = sum(len(node.input) == 2 for node in convolutions)
    assert without_bias == sum(name.endswith("shortcut.weight") for name in model.state_dict())
    assert len(convolutions) > 50
