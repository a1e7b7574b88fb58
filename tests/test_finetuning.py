"""Fine-tuning: what is read, what is trained, what is written, how a run ends and goes on."""

import io
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from rich.progress import Progress
from safetensors.torch import load_file
from timm.data import create_transform, resolve_model_data_config

import mobilenets_zoo as mz
from mobilenets_zoo import finetuning
from mobilenets_zoo.finetuning import Settings

pytestmark = pytest.mark.usefixtures("without_onnx")
W025, LGC = "mobilenetv1_w025_cifar100", "mobilenetv2_lgc_cifar100"


def picture(label, seed, size=(20, 30)):
    pixels = np.random.default_rng(seed).integers(0, 60, (*size, 3), dtype=np.uint8)
    pixels[..., 2 if label == 0 else 0] += 150
    return Image.fromarray(pixels)


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "images")


@pytest.fixture
def without_onnx(monkeypatch, request):
    """Exporting takes seconds: one test does it, the others find what a user without the package onnx finds."""

    def missing(*args, **kwargs):
        raise ImportError("onnx is missing")

    if "onnx" not in request.keywords:
        monkeypatch.setattr(mz, "export_onnx", missing)


def make_folder(path, count=6):
    for label, name in enumerate(("blue", "red")):
        (path / name).mkdir(parents=True)
        for i in range(count):
            picture(label, i).save(path / name / f"{i}.png")
    return path


def make_parquet(path):
    path.mkdir()
    for split in ("train", "test"):
        rows = []
        for i in range(6):
            content = io.BytesIO()
            picture(i % 2, i, (32, 32)).save(content, "PNG")
            rows.append({"bytes": content.getvalue(), "path": ""})
        pq.write_table(pa.table({"img": rows, "label": [0, 1] * 3}), path / f"{split}-0.parquet")
    return path


def test_the_command_writes_what_the_library_reads(folder, tmp_path, run):
    out = tmp_path / "out"
    code, text, err = run("finetune", W025, "--data", folder, "--out", out, "--epochs", 2, "--batch-size", 5)
    assert code == 0, err
    assert "top-1 100.0 % of 2 held-out images" in text
    assert "epoch 2/2: loss" in err
    result = json.loads((out / "result.json").read_text())
    assert (result["train_images"], result["finished"], len(result["history"])) == (10, True, 2)
    assert not (out / "checkpoint.pt").exists()
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    assert list(model.pretrained_cfg["label_names"]) == ["blue", "red"]
    image = picture(1, 99, (32, 32))
    probabilities = model(create_transform(**resolve_model_data_config(model))(image)[None]).softmax(1)
    onnx = mz.OnnxClassifier(out / "model.onnx")
    assert onnx(np.asarray(image)[None]) == pytest.approx(probabilities.detach().numpy(), abs=1e-4)
    assert probabilities.argmax() == 1
    again, _, err = run(
        "finetune", f"local-dir:{out}", "--data", folder, "--out", tmp_path / "2", "--freeze", "--size", 24
    )
    assert again == 0, err
    assert timm.create_model(f"local-dir:{tmp_path / '2'}").pretrained_cfg["input_size"] == (3, 24, 24)


def test_photos_reach_the_network_as_everywhere_else(tmp_path):
    """A 2:1 photo that is stored lying on its side, and a grey one of 16 bits."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(2):
            picture(i, i, (100, 50)).save(tmp_path / name / f"{i}.jpg", exif=exif)
    grey = np.linspace(0, 65535, 60 * 40).reshape(60, 40).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "b" / "grey.png")
    model = finetuning.create(W025, Settings(size=24)).eval()
    train, test = finetuning.read_data(str(tmp_path), model)
    transform = create_transform(**resolve_model_data_config(model))
    files = [*tmp_path.glob("a/*.jpg"), *tmp_path.glob("b/*")]
    expected = torch.stack([transform(mz.data.read_image(file.read_bytes(), "")) for file in files])
    images = torch.from_numpy(np.concatenate([train.images, test.images]))
    seen = mz.evaluation.preprocess(images, model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    assert seen.shape == (5, 3, 24, 24)
    with torch.no_grad():
        assert model(seen).sum(0) == pytest.approx(model(expected).sum(0), abs=1e-3)


@pytest.mark.parametrize("parts", [(), ("train",), ("train", "test"), ("train", "val"), "parquet"])
def test_layouts_of_the_data(tmp_path, parts):
    if parts == "parquet":
        make_parquet(tmp_path / "data")
    for part in [] if parts == "parquet" else parts or [""]:
        make_folder(tmp_path / "data" / part, 3 if part in ("test", "val") else 5)
    train, test = finetuning.read_data(str(tmp_path / "data"), finetuning.create(W025, Settings(scratch=True)))
    assert (len(train), len(test)) == {"parquet": (6, 6)}.get(parts, (10, 6) if len(parts) == 2 else (8, 2))
    assert set(test.labels) == {0, 1}


def finetune(folder, out, name=W025, progress=None, resume=False, **settings):
    with progress or Progress(disable=True) as shown:
        return finetuning.finetune(name, str(folder), out, Settings(**settings), shown, resume=resume)


def test_a_frozen_trunk_stays_as_it_is(folder, tmp_path):
    finetune(folder, tmp_path / "out", freeze=True)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    mz.save_weights(finetuning.create(W025, Settings()), tmp_path / "start.safetensors")
    start = load_file(tmp_path / "start.safetensors")
    assert {key for key in start if not torch.equal(start[key], stored[key])} == {
        "classifier.weight",
        "classifier.bias",
    }


@pytest.mark.parametrize("scratch", [False, True])
def test_masks_are_finished_and_kept(folder, tmp_path, scratch):
    finetune(folder, tmp_path / "out", LGC, epochs=1, scratch=scratch, size=16)
    start = finetuning.create(LGC, Settings(scratch=scratch))
    tuned = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, condensed=False)
    for before, after in zip(mz.learned_layers(start).values(), mz.learned_layers(tuned).values(), strict=True):
        assert torch.equal(before.mask, after.mask)


class Interrupting(Progress):
    """Presses Ctrl-C in the second epoch."""

    def update(self, task, *, description=None, **kwargs):
        super().update(task, description=description, **kwargs)
        if description and description.startswith("epoch 2"):
            raise KeyboardInterrupt


def test_interrupted_and_resumed_is_as_if_never_interrupted(folder, tmp_path):
    settings = dict(epochs=3, batch_size=4)
    finetune(folder, tmp_path / "whole", **settings)
    out = tmp_path / "out"
    stopped = finetune(folder, out, progress=Interrupting(disable=True), **settings)
    assert (stopped["finished"], len(stopped["history"])) == (False, 1)
    timm.create_model(f"local-dir:{out}", pretrained=True)
    with pytest.raises(ValueError, match="a run with other settings"):
        finetune(folder, out, resume=True, **settings, lr=0.01)
    picture(0, 77).save(folder / "red" / "more.png")
    with pytest.raises(ValueError, match="a run with other images"):
        finetune(folder, out, resume=True, **settings)
    (folder / "red" / "more.png").unlink()
    assert finetune(folder, out, resume=True, **settings)["finished"]
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("kind", "code"), [(signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_killed_command_goes_on(folder, tmp_path, kind, code):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "mobilenets_zoo.cli"]
    command = [sys.executable, "-c", "from mobilenets_zoo.cli import main; main()"]
    command += ["finetune", W025, "--data", str(folder), "--out", str(out), "--epochs", "100000"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not (out / "checkpoint.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(kind)
        assert process.wait(120) == code
    assert (out / "checkpoint.pt").exists()
    assert (out / "model.safetensors").exists() == (kind == signal.SIGTERM)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nonsense"], "nonsense"),
        (["--data", "no/such"], "no/such"),
        (["--data", "images/red"], "folder of images for each class"),
        (["--out", "images/out"], "lies in the folder of the images"),
        (["--out", "full"], "full exists; choose another folder"),
        (["--out", "full", "--resume"], "no such checkpoint"),
        (["--epochs", "0"], "--epochs"),
        (["--batch-size", "0"], "--batch-size"),
        (["--size", "0"], "--size"),
        (["--device", "cuda:99"], "cuda"),
        (["--lr", "1e6"], "the loss diverges"),
    ],
)
def test_bad_input_is_one_line(options, message, folder, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    name = [] if options == ["nonsense"] else [W025]
    code, out, err = run("finetune", *name, "--data", "images", "--out", "out", *options)
    assert code == 2
    assert not out
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"


def test_force_replaces_a_run_and_a_broken_image_is_named(folder, tmp_path, run):
    out = tmp_path / "out"
    finetune(folder, out, freeze=True)
    before = (out / "model.safetensors").read_bytes()
    command = ["finetune", W025, "--data", folder, "--out", out, "--freeze", "--size", 24]
    assert run(*command)[0] == 2
    assert run(*command, "--force")[0] == 0
    assert (out / "model.safetensors").read_bytes() != before
    (folder / "red" / "0.png").write_bytes(b"nothing")
    code, _, err = run(*command, "--force")
    assert code == 2
    assert "0.png: not a readable image" in err
