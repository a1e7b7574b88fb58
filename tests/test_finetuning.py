"""Fine-tuning: what is read, what is trained, what is written, how a run ends and goes on."""

import json
import os
import shutil
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
from conftest import ROOT
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file
from timm.data import create_transform, resolve_model_data_config

import mobilenets_zoo as mz
from mobilenets_zoo import finetuning
from mobilenets_zoo.finetuning import Settings

W025, LGC = "mobilenetv1_w025_cifar100", "mobilenetv2_lgc_cifar100"


def picture(label, seed, size=(20, 30)):
    pixels = np.random.default_rng(seed).integers(0, 60, (*size, 3), dtype=np.uint8)
    pixels[..., 2 if label == 0 else 0] += 150
    return Image.fromarray(pixels)


def make_folder(path, count=6):
    for label, name in enumerate(("blue", "red")):
        (path / name).mkdir(parents=True)
        for i in range(count):
            picture(label, i).save(path / name / f"{i}.png")


@pytest.fixture
def folder(tmp_path):
    make_folder(tmp_path / "images")
    return tmp_path / "images"


@pytest.fixture
def without_onnx(monkeypatch):
    """Exporting takes seconds: one test does it, the others find what a user without the package onnx finds."""

    def missing(*args, **kwargs):
        raise ImportError("onnx is missing")

    monkeypatch.setattr(mz, "export_onnx", missing)


def finetune(folder, out, name=W025, progress=None, resume=False, **settings):
    with progress or Progress(console=Console(quiet=True)) as shown:
        return finetuning.finetune(name, str(folder), out, Settings(**settings), shown, resume=resume)


def read(folder, model=None):
    model = model or finetuning.create(W025, Settings(scratch=True, size=16))
    return [mz.data.read_split(str(folder), split, model) for split in ("train", "test")]


def test_the_command_writes_what_the_library_reads(folder, tmp_path, run):
    out = tmp_path / "out"
    code, text, err = run("finetune", W025, "--data", folder, "--out", out, "--epochs", 2, "--batch-size", 5)
    assert code == 0, err
    assert "epoch 2/2: loss" in err
    result = json.loads((out / "result.json").read_text())
    held_out = result["evaluation"]["images"]
    assert f"top-1 100.0 % of {held_out} held-out images" in text
    assert (result["train_images"] + held_out, result["finished"], len(result["history"])) == (12, True, 2)
    assert not (out / "checkpoint.pt").exists()
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    assert list(model.pretrained_cfg["label_names"]) == ["blue", "red"]
    image = picture(1, 99, (32, 32))
    probabilities = model(create_transform(**resolve_model_data_config(model))(image)[None]).softmax(1)
    onnx = mz.OnnxClassifier(out / "model.onnx")
    assert onnx(np.asarray(image)[None]) == pytest.approx(probabilities.detach().numpy(), abs=1e-4)
    assert probabilities.argmax() == 1


def test_freezing_keeps_the_trunk_and_its_result_is_tuned_again(folder, tmp_path, run, without_onnx):
    out = tmp_path / "out"
    finetune(folder, out, LGC, freeze=True)
    mz.save_weights(finetuning.create(LGC, Settings()), tmp_path / "start.safetensors")
    start, stored = load_file(tmp_path / "start.safetensors"), load_file(out / "model.safetensors")
    assert {key for key in start if not torch.equal(start[key], stored[key])} == {
        "classifier.weight",
        "classifier.bias",
    }
    command = ["finetune", f"local-dir:{out}", "--data", folder, "--out", out, "--freeze", "--size", 24]
    assert run(*command)[0] == 2
    code, _, err = run(*command, "--force")
    assert code == 0
    assert "model.onnx isn't written: onnx is missing" in err
    assert list(timm.create_model(f"local-dir:{out}").pretrained_cfg["input_size"]) == [3, 24, 24]
    (out / "model.onnx").write_bytes(b"of other weights")
    assert run(*command, "--force")[0] == 0
    assert not (out / "model.onnx").exists()
    (folder / "red" / "0.png").write_bytes(b"nothing")
    code, _, err = run(*command, "--force")
    assert code == 2
    assert "0.png: not a readable image" in err
    assert (out / "model.safetensors").exists()


def test_photos_reach_the_network_as_everywhere_else(tmp_path):
    """Photos of 2:1 that are stored lying on their side, and a grey one of 16 bits."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(2):
            picture(i, i, (100, 50)).save(tmp_path / name / f"{i}.jpg", exif=exif)
    grey = np.linspace(0, 65535, 60 * 40).reshape(60, 40).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "b" / "grey.png")
    model = finetuning.create(W025, Settings(size=24)).eval()
    train, test = read(tmp_path, model)
    transform = create_transform(**resolve_model_data_config(model))
    expected = torch.stack([transform(mz.data.read_image(f.read_bytes(), "")) for f in tmp_path.glob("?/*")])
    cfg, images = model.pretrained_cfg, torch.from_numpy(np.concatenate([train.images, test.images]))
    with torch.no_grad():
        logits, seen = model(expected), model(mz.evaluation.preprocess(images, cfg["mean"], cfg["std"]))
    assert seen.shape == (5, 100)
    assert torch.allclose(seen[seen[:, 0].argsort()], logits[logits[:, 0].argsort()], atol=1e-4)


@pytest.mark.parametrize("kind", ["folders", "parquet"])
@pytest.mark.parametrize(
    "parts", [("",), ("train",), ("train", "test"), ("Training", "val"), ("train", "Valid", "more")]
)
def test_layouts_of_the_data(tmp_path, kind, parts):
    for part in parts:
        count = 5 if part in ("", "train", "Training") else 3
        make_folder(tmp_path / part, count)
        if kind == "parquet":
            files = sorted((tmp_path / part).glob("*/*.png"))
            images = [{"bytes": file.read_bytes(), "path": ""} for file in files]
            table = pa.table({"img": images, "label": [0] * count + [1] * count})
            shutil.rmtree(tmp_path / part)
            tmp_path.mkdir(exist_ok=True)
            split = "train" if part in ("", "train", "Training") else "test"
            if part != "more":
                pq.write_table(table, tmp_path / f"{split}-0.parquet")
    train, test = read(tmp_path)
    if len(parts) > 1:
        assert (len(train), len(test)) == (10, 6)
    else:
        assert len(train) + len(test) == 10
    if kind == "parquet" and parts == ("train",):
        assert [len(part) for part in read(tmp_path / "train-0.parquet")] == [len(train), len(test)]
    assert train.images.shape[1:] == (16, 16, 3)
    assert set(test.labels) == {0, 1}
    for part in (train, test):
        assert np.array_equal(part.images[..., 0].mean((1, 2)) > part.images[..., 2].mean((1, 2)), part.labels)
    if len(parts) == 1:
        assert not {image.tobytes() for image in train.images} & {image.tobytes() for image in test.images}


def test_train_may_be_a_class(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "red").rename(tmp_path / "train")
    train, _ = read(tmp_path)
    assert train.classes == ("blue", "train")
    (tmp_path / "train").rename(tmp_path / "nested")
    (tmp_path / "train").mkdir()
    (tmp_path / "nested").rename(tmp_path / "train" / "nested")
    with pytest.raises(ValueError, match="blue: holds images beside train, which would be left out; move it away"):
        read(tmp_path)


def test_every_format_is_read_and_nothing_hidden(folder):
    picture(0, 7).save(folder / "blue" / "more.GIF", format="gif")
    picture(0, 8).save(folder / "blue" / ".hidden.png")
    (folder / "blue" / "notes.txt").write_text("not an image")
    (folder / "blue" / "folder.png").mkdir()
    for name in (".thumbnails", "__MACOSX"):
        (folder / name).mkdir()
        picture(0, 9).save(folder / name / "0.png")
    train, test = read(folder)
    assert (train.classes, len(train) + len(test)) == (("blue", "red"), 13)
    (folder / "blue" / "phone.HEIC").write_text("not read, and not left out without a word")
    with pytest.raises(ValueError, match=r"phone\.HEIC: \.HEIC can't be read; make it a JPEG"):
        read(folder)
    (folder / "blue" / "phone.HEIC").unlink()
    (folder / "blue" / "about.parquet").write_text("not what holds the images")
    assert len(read(folder)[0]) == len(train)
    (folder / "red" / "moved.png").symlink_to(folder / "nowhere.png")
    with pytest.raises(ValueError, match=r"moved\.png: No such file or directory; give a file that can be read"):
        read(folder)
    shutil.rmtree(folder / "red")
    (folder / "red").mkdir()
    with pytest.raises(ValueError, match="red: holds no images"):
        read(folder)


@pytest.mark.parametrize("scratch", [False, True])
def test_masks_are_finished_and_kept(folder, tmp_path, scratch, without_onnx):
    finetune(folder, tmp_path / "out", LGC, epochs=1, scratch=scratch, size=16)
    start = finetuning.create(LGC, Settings(scratch=scratch))
    tuned = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, condensed=False)
    for before, after in zip(mz.learned_layers(start).values(), mz.learned_layers(tuned).values(), strict=True):
        assert torch.equal(before.mask, after.mask)


@pytest.mark.parametrize(("count", "epochs"), [(10, 40), (500, 20), (1000, 10), (10_000, 5)])
def test_many_images_are_shown_fewer_times(count, epochs):
    images = mz.data.ImageSet(np.zeros((count, 8, 8, 3), np.uint8), np.arange(count) % 2, ("blue", "red"))
    for settings, expected in ((Settings(), epochs), (Settings(epochs=7), 7), (Settings(freeze=True), 0)):
        run = finetuning.Run(finetuning.create(W025, Settings(scratch=True)), images, settings)
        assert run.epochs == expected


def test_only_a_pretrained_start_takes_smaller_steps_near_the_input():
    images = mz.data.ImageSet(np.zeros((4, 8, 8, 3), np.uint8), np.arange(4) % 2, ("blue", "red"))
    for scratch in (False, True):
        settings = Settings(scratch=scratch)
        run = finetuning.Run(finetuning.create(W025, settings), images, settings)
        steps = {group["lr"] * group.get("lr_scale", 1.0) for group in run.optimizer.param_groups}
        assert (len(steps) == 1) == scratch
        assert max(steps) == pytest.approx(finetuning.LR * (1 if scratch else (len(images) / 1000) ** 0.5))
        for flip in (True, False):
            run = finetuning.Run(run.model, images, Settings(flip=flip))
            assert run.view.transforms[1].p == 0.5 * flip


class Interrupting(Progress):
    """Presses Ctrl-C in the second epoch, or another."""

    epoch = 2

    def update(self, task, *, description=None, **kwargs):
        super().update(task, description=description, **kwargs)
        if description and description.startswith(f"epoch {self.epoch}"):
            raise KeyboardInterrupt


@pytest.mark.parametrize("epoch", [1, 2])
def test_interrupted_and_resumed_is_as_if_never_interrupted(folder, tmp_path, without_onnx, monkeypatch, epoch):
    monkeypatch.setattr(Interrupting, "epoch", epoch)
    settings = dict(epochs=3, batch_size=4)
    finetune(folder, tmp_path / "whole", **settings)
    out = tmp_path / "out"
    stopped = finetune(folder, out, progress=Interrupting(console=Console(quiet=True)), **settings)
    assert (stopped["finished"], len(stopped["history"])) == (False, epoch - 1)
    timm.create_model(f"local-dir:{out}", pretrained=True)
    with pytest.raises(ValueError, match="a run with other settings"):
        finetune(folder, out, resume=True, **settings, lr=0.01)
    picture(0, 77).save(folder / "red" / "more.png")
    with pytest.raises(ValueError, match="a run with other images"):
        finetune(folder, out, resume=True, **settings)
    (folder / "red" / "more.png").unlink()
    assert finetune(folder, out, resume=True, **settings)["finished"]
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_killed_and_resumed_is_as_if_never_killed(folder, tmp_path, without_onnx):
    settings = dict(epochs=2, batch_size=4, size=16)
    finetune(folder, tmp_path / "whole", **settings)
    out = tmp_path / "out"
    options = ["--data", folder, "--out", out, "--epochs", 2, "--batch-size", 4, "--size", 16]
    command = [sys.executable, "-m", "mobilenets_zoo", "finetune", W025, *map(str, options)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        while not (out / "checkpoint.pt").exists():
            assert process.poll() is None
            time.sleep(0.001)
        process.kill()
    assert finetune(folder, out, resume=True, **settings)["finished"]
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_damaged_checkpoint_is_one_line(folder, tmp_path, without_onnx):
    out, settings = tmp_path / "out", dict(epochs=3, batch_size=4, size=16)
    finetune(folder, out, progress=Interrupting(console=Console(quiet=True)), **settings)
    whole = (out / "checkpoint.pt").read_bytes()
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    del state["optimizer"]
    torch.save(state, tmp_path / "partial.pt")
    for content in (whole[: len(whole) // 2], b"", b"text", (tmp_path / "partial.pt").read_bytes()):
        (out / "checkpoint.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"checkpoint\.pt can't be read .* start anew with --force"):
            finetune(folder, out, resume=True, **settings)


def test_a_run_over_its_own_start_loses_nothing_when_it_fails(folder, tmp_path, without_onnx):
    out = tmp_path / "out"
    finetune(folder, out, freeze=True)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with Progress(console=Console(quiet=True)) as progress, pytest.raises(ValueError, match="diverges"):
        finetuning.finetune(f"local-dir:{out}", str(folder), out, Settings(lr=1e6), progress, force=True)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.name in before} == before


def test_other_labels_are_another_run(folder, tmp_path, without_onnx):
    settings = dict(epochs=3, batch_size=4)
    finetune(folder, tmp_path / "out", progress=Interrupting(console=Console(quiet=True)), **settings)
    (folder / "red").rename(folder / "zed")
    with pytest.raises(ValueError, match="other images"):
        finetune(folder, tmp_path / "out", resume=True, **settings)


@pytest.mark.parametrize("error", [ImportError, ValueError, RuntimeError])
def test_the_result_stays_where_a_network_cannot_be_exported(folder, tmp_path, run, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error("can't be exported; run pip install 'mobilenets-zoo[onnx]'")

    monkeypatch.setattr(mz, "export_onnx", fail)
    out = tmp_path / "out"
    code, text, err = run("finetune", W025, "--data", folder, "--out", out, "--freeze")
    assert code == 0
    assert "model.onnx isn't written: can't be exported; run pip install 'mobilenets-zoo[onnx]'" in err
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors", "result.json"}
    assert f"{json.loads((out / 'result.json').read_text())['evaluation']['top1']:.1f} %" in text


def test_stopped_while_it_exports_and_resumed(folder, tmp_path, run, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(mz, "export_onnx", stop)
    arguments = ["finetune", W025, "--data", folder, "--out", tmp_path / "out", "--freeze"]
    code, _, err = run(*arguments)
    assert code == 130
    assert "stopped; go on with --resume" in err
    written = (tmp_path / "out" / "model.safetensors").read_bytes()
    monkeypatch.setattr(mz, "export_onnx", lambda *args, **kwargs: None)
    assert run(*arguments, "--resume")[0] == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == written
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


def test_stopped_before_anything_was_learned(folder, tmp_path, run, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(finetuning.Run, "fit_classifier", stop)
    arguments = ("finetune", W025, "--data", folder, "--out", tmp_path / "out")
    code, _, err = run(*arguments)
    assert code == 130
    assert "stopped before anything was learned" in err
    assert not list((tmp_path / "out").iterdir())
    # Another run's checkpoint, which this one was to replace, is nothing to go on from.
    monkeypatch.setattr(finetuning, "create", stop)
    (tmp_path / "out" / "checkpoint.pt").write_bytes(b"old")
    os.utime(tmp_path / "out" / "checkpoint.pt", (0, 0))
    assert "stopped before anything was learned" in run(*arguments, "--force")[2]
    assert "go on with --resume" in run(*arguments, "--resume")[2]


def test_every_batch_has_at_least_two_images(tmp_path):
    """A map of one pixel, as this network's last one is at 32 pixels, and one image give BatchNorm a single value."""
    images = mz.data.ImageSet(np.zeros((11, 32, 32, 3), np.uint8), np.arange(11) % 2, ("blue", "red"))
    settings = Settings(scratch=True, batch_size=5, epochs=1)
    run = finetuning.Run(timm.create_model("mobilenetv3_small_050"), images, settings)
    with Progress(console=Console(quiet=True)) as progress:
        assert "epoch 1/1" in run.epoch(progress, None)


def test_any_timm_network_is_tuned_and_an_unfinished_one_is_exported(folder, tmp_path, run, monkeypatch):
    """From a folder as timm writes it, over one that was interrupted, to one that the commands read."""
    foreign = timm.create_model("mobilenetv3_small_050", num_classes=3)
    timm.models.save_for_hf(foreign, tmp_path / "foreign", safe_serialization=True)
    out, name = tmp_path / "out", f"local-dir:{tmp_path / 'foreign'}"
    settings = dict(epochs=3, batch_size=5, size=32)
    assert not finetune(folder, out, name, Interrupting(console=Console(quiet=True)), **settings)["finished"]
    unfinished = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert (type(unfinished), unfinished.num_classes) == (type(foreign), 2)
    assert json.loads(run("info", f"local-dir:{out}", "--json")[1])["input_size"] == [3, 32, 32]
    code, _, err = run("export", f"local-dir:{out}", tmp_path / "model.onnx", "--with-preprocessing")
    assert code == 0, err
    assert mz.OnnxClassifier(tmp_path / "model.onnx").metadata["class_names"] == ["blue", "red"]
    monkeypatch.setattr(mz, "export_onnx", lambda *args, **kwargs: None)  # once is enough
    result = finetune(folder, out, name, resume=True, **settings)
    assert len(result["history"]) == 3
    picture(1, 99).save(tmp_path / "red.png")
    document = json.loads(run("predict", tmp_path / "red.png", "--model", f"local-dir:{out}", "--json")[1])
    assert {row["class"] for row in document["images"][0]["predictions"]} == {"red", "blue"}


def test_what_was_trained_with_is_what_is_measured_with(tmp_path, run, monkeypatch):
    """A folder that holds none of CIFAR's files, at another size, with names that rich would take for markup."""
    photos, out = tmp_path / "photos", tmp_path / "out"
    make_folder(photos)
    (photos / "red").rename(photos / "red[b]")
    with monkeypatch.context() as patch:
        patch.setattr(mz, "export_onnx", lambda *args, **kwargs: None)
        code, text, err = run("finetune", W025, "--data", photos, "--out", out, "--freeze", "--size", 24)
    assert code == 0, err
    code, measured, err = run("evaluate", f"local-dir:{out}", "--data", photos, "--json")
    assert code == 0, err
    assert f"top-1 {json.loads(measured)['top1']:.1f} % of {json.loads(measured)['images']} held-out" in text
    code, text, err = run("export", f"local-dir:{out}", tmp_path / "model.onnx", "--int8", "--data", photos)
    assert code == 0, err
    assert f"on the {json.loads(measured)['images']} test images" in text
    picture(1, 99).save(tmp_path / "red.png")
    assert "red[b]" in run("predict", tmp_path / "red.png", "--model", f"local-dir:{out}")[1]
    (photos / "red[b]").rename(photos / "zed")
    code, _, err = run("evaluate", f"local-dir:{out}", "--data", photos)
    assert code == 2
    assert "the model's classes are blue, red[b], the data's blue, zed" in err


def test_the_average_holds_its_share_of_the_start(folder):
    """After a single step, too, whose average timm would take for the weights themselves."""
    train, _ = read(folder)
    for batch_size in (2, 10):
        run = finetuning.Run(finetuning.create(W025, Settings()), train, Settings(epochs=1, batch_size=batch_size))
        run.model.eval()
        key = "stem.conv.weight"
        start = run.model.state_dict()[key].clone()
        with Progress(console=Console(quiet=True)) as progress:
            run.epoch(progress, None)
        last, average = run.model.state_dict()[key], run.average.module.state_dict()[key]
        if run.steps == 1:
            torch.testing.assert_close(average, finetuning.START_SHARE * start + (1 - finetuning.START_SHARE) * last)
        assert (average - start).norm() < (last - start).norm()
        assert run.average.decay ** (run.epochs * run.steps) == pytest.approx(finetuning.START_SHARE)


def test_a_killed_writer_leaves_nothing_that_stands_in_the_way(folder, tmp_path, without_onnx):
    out = tmp_path / "out"
    out.mkdir()
    for name in (".checkpoint.pt.0123456789abcdef.tmp", ".model.safetensors.0123456789abcdef.tmp"):
        (out / name).write_bytes(b"half")
    result = finetune(folder, out, epochs=1)
    assert result["finished"]
    assert 0 < result["lr"] < finetuning.LR  # what was used, not what was asked for
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors", "result.json"}


def test_a_network_with_another_classifier_is_refused(tmp_path):
    timm.models.save_for_hf(timm.create_model("resnetv2_18", num_classes=3), tmp_path, safe_serialization=True)
    with pytest.raises(ValueError, match="isn't one linear layer"):
        finetuning.create(f"local-dir:{tmp_path}", Settings())
    with pytest.raises(ValueError, match="more than its classifier makes its outputs"):  # an auxiliary head
        finetuning.create("volo_d1_224", Settings(scratch=True))


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"batch_size": 0}, {"size": -3}])
def test_settings_that_cannot_be(wrong):
    with pytest.raises(ValueError, match="must be 1 or larger"):
        Settings(**wrong)


def test_what_cannot_be_stored_is_not_trained(folder, tmp_path, run, monkeypatch):
    def tied(*args):
        model = create(*args)
        model.stem.bn.bias = model.stem.bn.weight
        return model

    create = finetuning.create
    monkeypatch.setattr(finetuning, "create", tied)
    monkeypatch.setattr(finetuning, "Run", None)
    code, _, err = run("finetune", W025, "--data", folder, "--out", tmp_path / "out")
    assert (code, "share memory" in err) == (2, True)
    monkeypatch.setattr(timm, "__version__", "1.0.21")
    assert "needs timm 1.0.31 or newer, this is 1.0.21" in run("finetune", W025, "--data", folder, "--out", "out")[2]


def test_sigterm_saves_what_was_learned(folder, tmp_path, run, monkeypatch):
    out = tmp_path / "out"
    original, before = finetuning.evaluate, signal.getsignal(signal.SIGTERM)

    def evaluate_or_stop(*args):
        if (out / "checkpoint.pt").exists():
            signal.raise_signal(signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(finetuning, "evaluate", evaluate_or_stop)
    assert run("finetune", W025, "--data", folder, "--out", out)[0] == 130
    signal.signal(signal.SIGTERM, before)
    assert {path.name for path in out.iterdir()} == {"checkpoint.pt", "config.json", "model.safetensors", "result.json"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "no/such"], "no/such: no such folder; give one with a folder of images for each class"),
        (["--data", "images/red"], "folder of images for each class"),
        (["--out", "images/out"], "lies in the folder of the images"),
        (["--out", "full"], "full exists; choose another folder"),
        (["--out", "full/mine.txt", "--force"], "mine.txt is a file"),
        (["--out", "full", "--resume"], "nothing was interrupted there"),
        (["--epochs", "0"], "--epochs"),
        (["--batch-size", "0"], "--batch-size"),
        (["--size", "0"], "--size"),
        (["--device", "meta"], "meta"),
        (["local-dir:full"], "local-dir:full can't be loaded: "),
        (["--lr", "1e6"], "the loss diverges"),
        (["--lr", "inf"], "lr must be finite and above 0"),
        (["--layer-decay", "nan"], "at most 1, not lr=None and layer_decay=nan"),
        (["--seed", str(2**32)], "--seed"),
        (["--data", "single"], "single: at least two images of a class are needed"),
        (["--data", "uneven"], "too few images to train and test with, of blue"),
        (["--data", "alone"], "at least two classes are needed"),
        (
            ["--data", "odd"],
            "odd: holds no images; give a folder with a folder of images for each class, or with train-",
        ),
        (["--data", "differing"], "classes without either training or test images: green, red"),
        (["local-dir:fixed", "--size", "48"], "can't take images of 48x48 pixels: Input height (48) doesn't match"),
    ],
)
def test_bad_input_is_one_line(options, message, folder, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "full" / "config.json").write_text("{}")
    make_folder(tmp_path / "single", count=1)
    make_folder(tmp_path / "uneven", count=2)
    (tmp_path / "uneven" / "blue" / "0.png").unlink()
    make_folder(tmp_path / "alone")
    shutil.rmtree(tmp_path / "alone" / "blue")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "0000.parquet").write_bytes(b"of another name")
    if "local-dir:fixed" in options:
        arguments = {"depth": 1, "num_classes": 2}
        vit = timm.create_model("vit_tiny_patch16_224", **arguments)
        timm.models.save_for_hf(vit, tmp_path / "fixed", model_args=arguments, safe_serialization=True)
    for split in ("train", "test"):
        make_folder(tmp_path / "differing" / split, count=2)
    (tmp_path / "differing" / "test" / "red").rename(tmp_path / "differing" / "test" / "green")
    name = [] if options[0].startswith("local-dir:") else [W025]
    code, out, err = run("finetune", *name, "--data", "images", "--out", "out", *options)
    assert code == 2
    assert not out
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"
