"""Training on a made-up data set of ten classes: what it learns, and that nothing is lost."""

import copy
import csv
import dataclasses
import errno
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import evaluate
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soft_labels
import timm
import torch
import train
from conftest import ROOT
from PIL import Image
from soft_labels import SoftLabels, pack
from torch.nn import functional as F
from training import student
from training.augment import count_views, crop_and_mirror, cutmix_box, resize
from training.compiled_layers import batch_norm_act, compile_layers, depthwise_conv3x3
from training.cpu_layers import spare_cpu
from training.initial_weights import transfer
from training.recipe import RUNS, Recipe, load_recipe
from training.student import Student

import mobilenets_zoo as mz
from mobilenets_zoo.evaluation import preprocess

SHORT = """
tag = "test"
epochs = 3
batch_size = 32
optimizer = "nesterov"
lr = 0.1
momentum = 0.9
weight_decay = 0.0001
ema_decay = 0.9
bn_batches = 0
cutmix = 0
precision = "fp32"
soft_labels = ""
ce_weight = 1
kd_weight = 0
"""
BASE = 'model = "mobilenetv1_w025_cifar100"\nsizes = [[0.4, 8], [0.6, 16]]' + SHORT
SMALL = "model_args = { width_mult = 0.25, expand_ratio = 2 }\nsizes = [[1.0, 8]]"
LGC = f'model = "mobilenetv2_lgc_cifar100"\n{SMALL}' + SHORT


def write_data(folder: Path, seed: int) -> Path:
    """Ten classes told apart by colour, 16 + 4 images each, in the Hub's layout."""
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(seed)
    for split, per_class in (("train", 16), ("test", 4)):
        images, labels = [], np.repeat(np.arange(10), per_class)
        for label in labels:
            colour = np.array([label * 25, 255 - label * 25, (label * 77) % 256])
            pixels = (colour + generator.normal(0, 20, (32, 32, 3))).clip(0, 255).astype(np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            images.append({"bytes": buffer.getvalue(), "path": ""})
        pq.write_table(pa.table({"img": images, "label": labels}), folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), seed=0)


@pytest.fixture(autouse=True)
def one_thread():
    """Results are the same bit by bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def trainers(monkeypatch) -> list[train.Trainer]:
    """All trainers that reached their end."""
    finished = []
    original = train.Trainer.finish
    monkeypatch.setattr(train.Trainer, "finish", lambda self: (finished.append(self), original(self)))
    return finished


def write_recipe(folder: Path, text: str = BASE, name: str = "recipe", **changes) -> Path:
    values = "".join(f"{key} = {json.dumps(value)}\n" for key, value in changes.items())
    kept = [line for line in text.strip().splitlines() if line.partition(" = ")[0] not in changes]
    path = folder / f"{name}.toml"
    path.write_text("\n".join(kept) + "\n" + values)
    return path


def run(recipe: Path | list[Path], data: Path, out: Path, *arguments: str) -> int:
    recipes = recipe if isinstance(recipe, list) else [recipe]
    return train.main([*map(str, recipes), "--data", str(data), "--out", str(out), "--device", "cpu", *arguments])


def log(out: Path) -> list[dict[str, str]]:
    """The rows of a log, without run times."""
    rows = csv.DictReader((out / "log.csv").read_text().splitlines())
    return [{name: row[name] for name in row if name not in ("seconds", "images_per_second")} for row in rows]


def same_outcome(a: Path, b: Path) -> bool:
    return log(a) == log(b) and (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


def checkpoint_step(out: Path) -> int:
    return torch.load(out / train.CHECKPOINT, weights_only=True)["step"]


# Recipes


@pytest.mark.parametrize("path", sorted(RUNS.glob("*/recipe.toml")), ids=lambda path: path.parent.name)
def test_shipped_recipes_are_those_of_their_results(path):
    recipe, measured = load_recipe(path), path.parent / "result.json"
    assert path.parent.name == recipe.name
    assert f"# python benchmarks/train.py {path.relative_to(ROOT)} --data DIR --out DIR" in path.read_text()
    assert measured.exists() != ("# Not run yet" in path.read_text())
    if measured.exists() and not recipe.pretraining:  # the teacher was never measured on test images
        result = json.loads(measured.read_text())
        younger = {"calibration_images": 0, "sharing": 0.0, "teacher": ""}  # keys that not all results have
        assert json.loads(json.dumps(dataclasses.asdict(recipe))) == younger | result["recipe"]
        assert result["taught_by"] == evaluate.taught_by(recipe)
    assert not recipe.soft_labels or (ROOT / "benchmarks" / recipe.soft_labels).exists()
    kept = RUNS / recipe.init_from / "model.safetensors"
    assert not recipe.init_from or recipe.pretraining or recipe.init_from in mz.manifest() or kept.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(learning_rate=1), "unknown keys learning_rate; known are model"),
        (dict(epochs=0), "at least 1"),
        (dict(precision="fp8"), "'bf16' or 'fp32'"),
        (dict(sizes=[[0.5, 32]]), "add up to 1"),
        (dict(cutmix=1.5), r"cutmix must be in \[0, 1\]"),
        (dict(soft_labels="labels.safetensors"), "goes together"),
        (dict(teacher="runs/t", soft_labels="labels.safetensors", kd_weight=1), "exclude one another"),
        (dict(init_from="package:a/b.pth"), "go together"),
        (dict(init_sha256="0"), "go together"),
        (dict(sharing=0.5), "sharing needs calibration_images"),
        (dict(text='model = "x"'), "missing .* 'tag' and 'epochs'"),
        (dict(text="model = "), "Invalid value"),
    ],
)
def test_bad_recipes_name_the_file_and_the_reason(tmp_path, changes, message):
    with pytest.raises(ValueError, match=rf"recipe\.toml: .*{message}"):
        load_recipe(write_recipe(tmp_path, **changes))


def test_sizes_follow_their_shares():
    recipe = Recipe("m", "t", 36, sizes=((0.3333333, 16), (0.2777778, 24), (0.3888889, 32)))
    assert [recipe.size_at(epoch) for epoch in range(36)] == [16] * 12 + [24] * 10 + [32] * 14


# Training


def test_it_learns_and_writes_what_it_promises(tmp_path, data):
    recipe = write_recipe(tmp_path, epochs=30, bn_batches=4, lr=0.05, seed=1)  # with others some end near chance
    assert run(recipe, data, tmp_path / "out", "--holdout") == 0
    rows = log(tmp_path / "out")
    assert [row["epoch"] for row in rows] == [str(i + 1) for i in range(30)]
    assert {row["size"] for row in rows} == {"8", "16"}
    assert float(rows[-1]["train_loss"]) < 0.5 * float(rows[0]["train_loss"])
    assert float(rows[-1]["holdout_top1"]) > 30  # chance is 10
    assert "torch" in json.loads((tmp_path / "out" / "run.json").read_text())
    overlay = {"file": str(tmp_path / "out" / "model.safetensors"), "num_classes": 10}
    model = timm.create_model("mobilenetv1_w025_cifar100", pretrained=True, pretrained_cfg_overlay=overlay)
    assert mz.evaluation.evaluate(model, mz.data.load_images(data, "test")).top1 > 60


def test_a_killed_run_resumes_bit_by_bit(tmp_path, data):
    """kill -9 in the middle of an epoch of two networks, with everything that draws random numbers.

    The killed process writes a checkpoint at every step and dies as it begins its ninth.
    """
    shared = dict(cutmix=0.5, epochs=4, sizes=[[0.5, 8], [0.5, 16]])
    recipes = [
        write_recipe(tmp_path, BASE, "a", **shared),
        write_recipe(tmp_path, LGC, "b", optimizer="nmuon", **shared),
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(recipes, data, whole) == 0
    program = """
import os, signal, sys, torch, train
torch.set_num_threads(1)
train.CHECKPOINT_SECONDS = 0
batch = train.Trainer.batch
def killed_batch(self, *args):
    return os.kill(os.getpid(), signal.SIGKILL) if self.step == 8 else batch(self, *args)
train.Trainer.batch = killed_batch
train.main()
"""
    arguments = [*map(str, recipes), "--data", str(data), "--out", str(killed), "--device", "cpu"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT)])}
    process = subprocess.run([sys.executable, "-c", program, *arguments], env=env, capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert checkpoint_step(killed) == 8
    assert not list(killed.rglob("model.safetensors"))
    assert run(recipes, data, killed, "--resume") == 0
    for recipe in recipes:
        name = load_recipe(recipe).name
        assert same_outcome(whole / name, killed / name)


def test_sigterm_saves_and_stops(tmp_path, data, monkeypatch, capsys):
    original, before = train.Trainer.batch, signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(train.Trainer, "batch", lambda *args: (signal.raise_signal(signal.SIGTERM), original(*args))[1])
    assert run(write_recipe(tmp_path), data, tmp_path / "out") == 143
    signal.signal(signal.SIGTERM, before)
    assert "--resume goes on" in " ".join(capsys.readouterr().err.split())
    assert checkpoint_step(tmp_path / "out") == 1


def test_time_budget_stops_and_resumes(tmp_path, data):
    recipe = write_recipe(tmp_path)
    assert run(recipe, data, tmp_path / "whole") == 0
    for step in (1, 2):
        assert run(recipe, data, tmp_path / "parts", "--time-budget", "0", "--resume") == 0
        assert checkpoint_step(tmp_path / "parts") == step
    assert run(recipe, data, tmp_path / "parts", "--resume") == 0
    assert same_outcome(tmp_path / "whole", tmp_path / "parts")


def test_resuming_needs_the_same_recipe_and_images_and_a_whole_checkpoint(tmp_path, data, capsys):
    recipe, out = write_recipe(tmp_path), tmp_path / "out"
    other_recipe = write_recipe(tmp_path, name="other", lr=0.2)
    other_data = write_data(tmp_path / "data", seed=1)
    run(recipe, data, out, "--holdout", "--time-budget", "0")
    before = (out / train.CHECKPOINT).read_bytes()
    for arguments, message in (
        ((recipe, data, out, "--holdout"), "add --resume"),
        ((other_recipe, data, out, "--holdout", "--resume"), "was made with other recipes"),
        (([recipe, other_recipe], data, out, "--resume"), "must differ in model or tag"),
        (([recipe, write_recipe(tmp_path, LGC, "lgc")], data, out, "--resume"), "must agree on sizes"),
        ((recipe, other_data, out, "--holdout", "--resume"), "was made with other images; repeat its --data"),
        ((recipe, data, out, "--resume"), "was made with other images; repeat its --data and --holdout"),
    ):
        assert run(*arguments) == 2
        assert message in capsys.readouterr().err
        assert (out / train.CHECKPOINT).read_bytes() == before
    assert run(recipe, data, out, "--holdout", "--resume", "--time-budget", "0") == 0
    assert checkpoint_step(out) == 2
    (out / train.CHECKPOINT).write_bytes(before[:-1000])
    assert run(recipe, data, out, "--holdout", "--resume") == 2
    assert f"{train.CHECKPOINT} can't be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        (dict(init_from="mobilenetv2_cifar100.kd_e26_r32"), ("--holdout",), "kd_e26_r32, which init_from names, may"),
        (dict(), ("--device", "cpux"), r"--device cpux can't be used \(.*\); choose cpu or cuda"),
        (dict(model="mobilenetv9_cifar100"), (), "mobilenetv9_cifar100.test can't be created: Unknown model"),
    ],
)
def test_what_cannot_be_trained_is_one_line(tmp_path, data, capsys, changes, arguments, message):
    assert run(write_recipe(tmp_path, **changes), data, tmp_path / "out", *arguments) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_found_before_training_and_leaves_the_old_checkpoint(tmp_path, data, capsys, monkeypatch):
    recipe, out = write_recipe(tmp_path), tmp_path / "out"
    (tmp_path / "file").write_text("")
    assert run(recipe, data, tmp_path / "file") == 2
    assert f"{tmp_path / 'file'} can't be written (File exists)" in capsys.readouterr().err
    run(recipe, data, out, "--time-budget", "0")
    before = (out / train.CHECKPOINT).read_bytes()
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(full))
    monkeypatch.setattr(train.Trainer, "run", lambda *_: pytest.fail("trained"))
    assert run(recipe, data, out, "--resume") == 2
    assert "(No space left on device); make room or choose another --out" in capsys.readouterr().err
    assert (out / train.CHECKPOINT).read_bytes() == before


def test_a_loss_that_is_not_finite_stops_with_the_step(tmp_path, data, capsys):
    assert run(write_recipe(tmp_path, lr=1e30, warmup_epochs=0), data, tmp_path / "out") == 2
    assert "loss is not finite by step" in capsys.readouterr().err
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_the_log_tells_what_grows_and_what_is_dead(tmp_path, data):
    model = timm.create_model("mobilenetv1_w025_cifar100").eval()
    last, batches = model.blocks[-1][-1].pointwise.bn, torch.rand(8, 3, 32, 32).split(4)
    with torch.no_grad():
        last.weight.zero_(), last.bias.fill_(1)
        alive = student.health(model, batches)
        last.bias[:5] = -1
        last.running_var[7] = 1e6
        model.blocks[-1][-1].pointwise.conv.weight[3] = 1000 / 256**0.5 * model.stem.conv.weight.new_ones(256, 1, 1)
    channels = sum(module.num_features for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d))
    sick = student.health(model, batches)
    assert sick["dead_channels"] - alive["dead_channels"] == pytest.approx(500 / channels)
    assert sick["largest_norm"] == pytest.approx(1000)
    assert sick["largest_variance"] == 1e6
    assert not any(module._forward_hooks for module in model.modules())

    assert run(write_recipe(tmp_path), data, tmp_path / "out") == 0
    rows = log(tmp_path / "out")
    trained = torch.load(tmp_path / "out" / train.CHECKPOINT, weights_only=True)["students"][0]["average"]
    norm = max(weight.flatten(1).norm(dim=1).max().item() for weight in trained.values() if weight.ndim == 4)
    assert float(rows[-1]["largest_norm"]) == pytest.approx(norm, rel=1e-5)
    assert all(0 <= float(row["dead_channels"]) < 100 for row in rows)


@pytest.mark.parametrize("text", [BASE, LGC], ids=["dense", "lgc"])
def test_without_an_average_the_last_weights_are_kept(tmp_path, data, trainers, monkeypatch, text):
    """BatchNorm is re-estimated on plain layers: a GPU's training layers don't take update_bn's momentum of None."""
    recipe, file = write_recipe(tmp_path, text, ema_decay=0, bn_batches=2), tmp_path / "out" / "model.safetensors"
    original = train.Trainer.run

    def run_and_break(self, *args):
        finished = original(self, *args)
        for module in self.students[0].model.modules():
            module.forward = lambda *_: pytest.fail("the training layers ran")
        return finished

    monkeypatch.setattr(train.Trainer, "run", run_and_break)
    assert run(recipe, data, tmp_path / "out") == 0
    student = trainers[0].students[0]
    for ours, kept in zip(student.model.parameters(), student.average.module.parameters(), strict=True):
        assert torch.equal(ours, kept)
    statistics = zip(student.model.buffers(), student.average.module.buffers(), strict=True)
    estimated_anew = [not torch.equal(ours, kept) for ours, kept in statistics if ours.is_floating_point()]
    assert estimated_anew
    assert all(estimated_anew)
    first = file.read_bytes()
    assert run(recipe, data, tmp_path / "out", "--resume") == 0
    assert file.read_bytes() == first


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_trains_students_together_stops_and_goes_on_anywhere(tmp_path, data, labelled):
    """Two networks in one graph, a teacher outside it, two sizes; from the GPU to the CPU and back."""
    shutil.copytree(labelled[1], tmp_path / "teacher")
    shutil.copy(labelled[0], tmp_path / "teacher" / "recipe.toml")
    changes = dict(epochs=6, ema_decay=0, bn_batches=2, optimizer="nmuon", lr=0.02, precision="bf16")
    changes.update(teacher=str(tmp_path / "teacher"), kd_weight=0.9, ce_weight=0.1, sizes=[[0.5, 8], [0.5, 16]])
    recipes = [write_recipe(tmp_path, text, name, **changes) for text, name in ((BASE, "a"), (LGC, "b"))]
    out, part = tmp_path / "out", ("--holdout", "--resume", "--time-budget", "0")
    for device in ("cuda", "cpu", "cuda"):
        assert run(recipes, data, out, "--device", device, *part) == 0
    assert run(recipes, data, out, "--device", "cuda", "--holdout", "--resume") == 0
    for recipe in map(load_recipe, recipes):
        folder = out / recipe.name
        rows = log(folder)
        assert len(rows) == 6
        assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
        assert evaluate.measure(recipe, folder, data, "cuda")["evaluation"]["images"] == 40


def test_holdout_is_fixed_balanced_and_disjoint():
    labels = np.repeat(np.arange(10), 60)
    held = train.held_out(labels)
    assert np.bincount(labels[held]).tolist() == [6] * 10
    assert np.array_equal(held, train.held_out(labels))
    assert np.flatnonzero(held)[:6].tolist() == [4, 7, 17, 34, 42, 46]
    assert train.held_out(labels, parts=100).sum() == 10  # one of each class at least


# Learned group convolutions


def test_calibration_images_choose_groups_before_the_first_step(tmp_path, data, trainers, monkeypatch):
    dense = timm.create_model("mobilenetv2_cifar100", width_mult=0.25, expand_ratio=2, num_classes=10)
    seen = []

    def start_from(model, source, sha256, images, sharing):
        assert sharing == 0.5
        seen.append(images)
        transfer(dense, model, images, sharing)

    monkeypatch.setattr(student, "start_from", start_from)
    changes = dict(epochs=1, bn_batches=2, init_from="mobilenetv2_cifar100.some", calibration_images=40)
    changes["sharing"] = 0.5
    recipe = write_recipe(tmp_path, LGC, **changes)
    assert run(recipe, data, tmp_path / "out") == run(recipe, data, tmp_path / "again") == 0
    assert seen[0].shape == (40, 3, 32, 32)
    assert torch.equal(*seen)
    assert abs(seen[0].mean()) < 1  # normalised
    assert len({image.sum().item() for image in seen[0]}) == 40
    stages = json.loads((tmp_path / "out" / "masks.json").read_text())
    assert [stage["progress"] for stage in stages] == [0.0]
    for layer in trainers[0].students[0].learned.values():
        assert (layer.mask.sum(1) == layer.in_channels // layer.condense_factor).all()


def test_lgc_prunes_in_three_stages_and_cleans_momentum_and_average(tmp_path, data, trainers):
    assert run(write_recipe(tmp_path, LGC, epochs=6, bn_batches=2), data, tmp_path / "out") == 0
    stages = json.loads((tmp_path / "out" / "masks.json").read_text())
    assert [stage["progress"] for stage in stages] == pytest.approx([5 / 30, 10 / 30, 15 / 30])
    layer = "blocks.1.0.projection.conv"
    assert [stage["inputs_per_group"][layer] for stage in stages] == [12, 8, 4]
    assert all(0 <= value <= 1 for value in stages[0]["hoyer_before"][layer])

    student = trainers[0].students[0]
    # The log's masks: a stage keeps only what the stage before kept, the last is the network's.
    count = stages[0]["inputs"][layer]
    bits = [[np.frombuffer(bytes.fromhex(row), np.uint8) for row in stage["masks"][layer]] for stage in stages]
    masks = [np.unpackbits(np.array(rows), axis=1, count=count) for rows in bits]
    assert [mask.sum(1).tolist() for mask in masks] == [[12] * 4, [8] * 4, [4] * 4]
    assert all((after <= before).all() for before, after in itertools.pairwise(masks))
    assert np.array_equal(masks[-1], student.learned[layer].mask)
    for name, module in student.learned.items():
        keep = module.mask.repeat_interleave(module.out_channels // module.groups, 0)[:, :, None, None]
        average = student.average.module.get_submodule(name)
        assert torch.equal(average.mask, module.mask)
        momentum = student.optimizer.state[module.weight]["momentum_buffer"]
        for tensor in (module.weight, average.weight, momentum):
            assert (tensor[~keep] == 0).all()
            assert (tensor[keep] != 0).any()


# Soft labels


@pytest.fixture(scope="module")
def labelled(tmp_path_factory, data) -> tuple[Path, Path, Path]:
    """A finished teacher's recipe and run, and its soft labels."""
    folder = tmp_path_factory.mktemp("teacher")
    recipe = write_recipe(folder, epochs=12, sizes=[[1.0, 16]], lr=0.2, name="teacher")
    assert run(recipe, data, folder / "run") == 0
    out = folder / "labels.safetensors"
    arguments = [str(recipe), "--run", str(folder / "run"), "--data", str(data), "--out", str(out), "--device", "cpu"]
    assert soft_labels.main([*arguments, "--views", "3", "--kept", "4"]) == 0
    return recipe, folder / "run", out


def test_soft_labels_are_what_the_teacher_says_of_each_view(labelled, data):
    """The stored labels of a few images against a plain forward pass over the same crops."""
    recipe, folder, file = labelled
    labels = SoftLabels.load(file)
    images = mz.data.load_images(data, "train")
    assert labels.views.shape == (160, 3)
    assert all(len(set(row)) == 3 for row in labels.views.tolist())  # no view twice
    assert labels.info["data_sha256"] == images.sha256()
    assert labels.info["taught_by"] == "mobilenetv1_w025_cifar100.test"
    teacher = soft_labels.Teacher(load_recipe(recipe), folder, 10, torch.device("cpu"))
    for image, draw in ((0, 0), (77, 1), (159, 2)):
        places, mirrored = divmod(int(labels.views[image, draw]), 2)
        top, left = divmod(places, 9)
        crop = np.pad(images.images[image], ((4, 4), (4, 4), (0, 0)))[top : top + 32, left : left + 32]
        crop = np.ascontiguousarray(crop[:, ::-1] if mirrored else crop)
        expected = teacher(torch.from_numpy(crop)[None])[0]
        actual = labels.targets(torch.tensor([image]), torch.tensor([draw]), 1.0)[0]
        largest = expected.topk(4).indices
        torch.testing.assert_close(actual[largest], expected[largest], rtol=0.06, atol=2e-3)
        assert actual.sum() == pytest.approx(1.0, abs=1e-5)


def test_a_teacher_labels_what_the_students_see(labelled, data, tmp_path, trainers):
    """Mixed images, at its own resolution; a run with it stops and goes on as any other."""
    shutil.copytree(labelled[1], tmp_path / "teacher")
    shutil.copy(labelled[0], tmp_path / "teacher" / "recipe.toml")
    changes = dict(teacher=str(tmp_path / "teacher"), kd_weight=0.9, ce_weight=0.1, cutmix=1.0, temperature=2.0)
    recipe = write_recipe(tmp_path, **changes)
    assert run(recipe, data, tmp_path / "out") == 0
    assert evaluate.taught_by(load_recipe(recipe)) == "mobilenetv1_w025_cifar100.test"
    trainer, teacher = trainers[-1], trainers[-1].teacher
    images, hard, soft = trainer.batch(train.Plan(trainer, 0), 0, 32)
    assert (hard.max(1).values < 1).any()  # mixed
    cfg = teacher.model.pretrained_cfg
    pixels = images * torch.tensor(trainer.std)[:, None, None] + torch.tensor(trainer.mean)[:, None, None]
    seen = (255 * pixels).round().byte().permute(0, 2, 3, 1)
    with torch.no_grad():
        logits = teacher.model(resize(preprocess(seen, cfg["mean"], cfg["std"]), 16))
    torch.testing.assert_close(soft, (logits / 2).softmax(1), rtol=1e-4, atol=1e-5)
    assert run(recipe, data, tmp_path / "parts", "--time-budget", "0") == 0
    while not (tmp_path / "parts" / "model.safetensors").exists():
        assert run(recipe, data, tmp_path / "parts", "--resume") == 0
    for other, whole in zip(trainers[-1].students, trainer.students, strict=True):
        for tensor, expected in zip(other.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(tensor, expected)


@pytest.mark.cifar100
def test_the_shipped_soft_labels_are_the_shipped_teachers(cifar100):
    """A few images, on the CPU; the labels were computed on a GPU, in bfloat16 as here."""
    folder = RUNS / "efficientnet_lite2.cutmix_e8_r160"
    recipe = load_recipe(folder / "recipe.toml")
    teacher = soft_labels.Teacher(recipe, folder, 100, torch.device("cpu"))
    labels, data = SoftLabels.load(folder / "soft_labels.safetensors"), mz.data.load_images(cifar100, "train")
    assert labels.info["data_sha256"] == data.sha256()
    assert labels.views.shape == (50_000, 16)
    right = (labels.classes[:, :, 0].long() == torch.from_numpy(data.labels)[:, None]).float().mean(1)
    mask = torch.from_numpy(train.held_out(data.labels))
    trained, held = (100 * right[part].mean().item() for part in (~mask, mask))
    assert (round(trained), round(held)) == (96, 83)  # as docs/training.md says
    images, draws = torch.arange(0, 50_000, 4_000), torch.arange(13)
    crops = crop_and_mirror(torch.from_numpy(data.images)[images], labels.views[images, draws], recipe.crop_padding)
    expected, actual = teacher(crops), labels.targets(images, draws, 1.0)
    assert (expected - actual).abs().max() < 0.05
    assert F.cosine_similarity(expected, actual).min() > 0.995


def test_soft_labels_soften_like_the_whole_distribution():
    """With every class kept, a temperature does what softmax(logits / T) does, up to the rounding of a file."""
    logits = 2 * torch.randn(5, 3, 7)
    classes, log_probs, rest = pack(logits.softmax(-1), 7)
    labels = SoftLabels(torch.zeros(5, 3, dtype=torch.uint8), classes, log_probs, rest, {"num_classes": 7})
    images, draws = torch.tensor([0, 4, 2]), torch.tensor([2, 0, 1])
    expected = (logits[images, draws] / 2).softmax(-1)
    torch.testing.assert_close(labels.targets(images, draws, 2.0), expected, rtol=0.05, atol=1e-3)


def test_distillation_loss_against_its_definition(tmp_path):
    """KL of Hinton et al., weighted by T^2, and the cross-entropy with the labels, as a step adds them up."""
    recipe = load_recipe(write_recipe(tmp_path, soft_labels="x", kd_weight=0.7, ce_weight=0.2, temperature=3.0))
    student = Student(recipe, 10, 100, torch.device("cpu"), tmp_path)
    twin = copy.deepcopy(student.model).train()
    torch.manual_seed(0)
    images, hard = torch.randn(8, 3, 16, 16), F.one_hot(torch.arange(8), 10).float()
    soft = torch.randn(8, 10).softmax(1)
    student.prepare(50, 10)
    student.model.train()
    student.update(images, hard, soft)
    logits = twin(images)
    divergence = (soft * (soft.log() - (logits / 3).log_softmax(1))).sum(1).mean()
    expected = 0.2 * F.cross_entropy(logits, torch.arange(8)) + 0.7 * 9 * divergence
    assert student.sums[0].item() == pytest.approx(expected.item(), rel=1e-4)


def test_students_share_batches_and_soft_labels(tmp_path, data, labelled):
    """Trained together, each student ends as it does alone."""
    shared = dict(soft_labels=str(labelled[2]), kd_weight=0.9, ce_weight=0.1, cutmix=0.5, sizes=[[1.0, 8]])
    a = write_recipe(tmp_path, BASE, "a", **shared)
    b = write_recipe(tmp_path, LGC, "b", **shared)
    assert run([a, b], data, tmp_path / "both") == 0
    assert run(a, data, tmp_path / "alone") == 0
    assert same_outcome(tmp_path / "both" / "mobilenetv1_w025_cifar100.test", tmp_path / "alone")
    learned = tmp_path / "both" / "mobilenetv2_lgc_cifar100.test"
    assert (learned / "masks.json").exists()
    assert evaluate.measure(load_recipe(b), learned, data, "cpu")["training"]["together"] == 2


def test_a_state_goes_on_with_the_optimisers_settings_of_its_device(tmp_path):
    """On a GPU the learning rate is a tensor that a CUDA graph reads."""
    recipe = load_recipe(write_recipe(tmp_path, LGC, optimizer="nmuon"))
    learner = Student(recipe, 10, 100, torch.device("cpu"), tmp_path)
    learner.update(torch.randn(4, 3, 8, 8), F.one_hot(torch.arange(4), 10).float())
    state = copy.deepcopy(learner.state_dict())
    for group in state["optimizer"]["param_groups"]:
        group.update(lr=torch.tensor(0.5), capturable=True)
    other = Student(recipe, 10, 100, torch.device("cpu"), tmp_path, resumed=True)
    other.load_state_dict(state)
    assert {group["lr"] for group in other.optimizer.param_groups} == {recipe.lr}
    for each in (learner, other):
        each.update(torch.ones(4, 3, 8, 8), F.one_hot(torch.arange(4), 10).float())
    assert all(map(torch.equal, learner.model.parameters(), other.model.parameters()))


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_muon_orthogonalises_in_the_recipes_precision(tmp_path, monkeypatch, precision, dtype):
    def orthogonalize(*args, dtype, **kwargs):
        seen.add(dtype)
        return original(*args, dtype=dtype, **kwargs)

    seen, original = set(), student._ORTHOGONALIZE
    monkeypatch.setattr(timm.optim.muon, "zeropower_via_newtonschulz", original)  # put back afterwards
    monkeypatch.setattr(student, "_ORTHOGONALIZE", orthogonalize)
    recipe = load_recipe(write_recipe(tmp_path, optimizer="nmuon", precision=precision))
    learner = Student(recipe, 10, 100, torch.device("cpu"), tmp_path)
    learner.update(torch.randn(4, 3, 8, 8), F.one_hot(torch.arange(4), 10).float())
    assert seen == {dtype}


def test_soft_labels_of_other_images_or_crops_are_refused(tmp_path, data, labelled, capsys):
    labels = SoftLabels.load(labelled[2])
    labels.info["data_sha256"] = "0"
    labels.save(tmp_path / "other.safetensors")
    for file, padding, message in (
        (labelled[2], 2, "crop_padding 4, not 2"),
        (tmp_path / "other.safetensors", 4, "belongs to other images"),
        ("/no.safetensors", 4, "make it with soft_labels.py"),
    ):
        recipe = write_recipe(tmp_path, soft_labels=str(file), kd_weight=1.0, crop_padding=padding)
        assert run(recipe, data, tmp_path / "out") == 2
        assert message in capsys.readouterr().err


# Augmentation


@pytest.mark.parametrize("padding", [0, 1, 4])
def test_views_are_all_windows_of_the_padded_image_mirrored_or_not(padding):
    image = torch.randint(256, (1, 32, 32, 3), dtype=torch.uint8)
    views = torch.arange(count_views(padding))
    padded = F.pad(image[0], (0, 0, padding, padding, padding, padding))
    places = range(2 * padding + 1)
    windows = [padded[y : y + 32, x : x + 32] for y in places for x in places]
    expected = [view for window in windows for view in (window, window.flip(1))]
    actual = crop_and_mirror(image.expand(len(views), -1, -1, -1), views, padding)
    assert torch.equal(actual, torch.stack(expected))


def test_cutmix_rectangles_have_the_area_that_was_drawn():
    generator = np.random.default_rng(0)
    boxes = [cutmix_box(generator, 32) for _ in range(2000)]
    areas = [(rows.stop - rows.start) * (columns.stop - columns.start) / 1024 for rows, columns in boxes]
    assert all(0 <= s.start <= s.stop <= 32 for box in boxes for s in box)
    # 1 - lambda is uniform in [0, 1]; edges cut off a part, so the mean lies below a half.
    assert 0.25 < np.mean(areas) < 0.45


def test_cutmix_mixes_targets_by_area(tmp_path, data, labelled):
    recipe = load_recipe(write_recipe(tmp_path, soft_labels=str(labelled[2]), kd_weight=0.9, cutmix=1.0))
    images, labels = mz.data.load_images(data, "train"), SoftLabels.load(labelled[2])
    trainer = train.Trainer([recipe], images, labels, None, torch.device("cpu"), tmp_path)
    plan = train.Plan(trainer, 0)
    mixed = trainer.batch(plan, 0, 32)
    rows, columns = plan.boxes[0]
    share = (rows.stop - rows.start) * (columns.stop - columns.start) / 1024
    assert 0 < share < 1
    plan.boxes[0] = None
    plain = trainer.batch(plan, 0, 32)
    assert len(plain) == 3
    for before, after in zip(plain[1:], mixed[1:], strict=True):
        torch.testing.assert_close(after, (1 - share) * before + share * before.flip(0))
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[rows, columns] = True
    assert torch.equal(mixed[0][:, :, inside], plain[0].flip(0)[:, :, inside])
    assert torch.equal(mixed[0][:, :, ~inside], plain[0][:, :, ~inside])


# The layers that train on a GPU or a CPU


def agree(actual: torch.Tensor, expected: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> None:
    """Compares two outputs and their gradients."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    grad = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad(out, inputs, grad) for out in (actual, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stance", ["force_eager", pytest.param("default", marks=pytest.mark.slow)])
def test_compiled_layers_agree_with_pytorch(stance):
    """Several sizes and numbers of channels; the slow one compiles them, for a CPU."""
    torch.manual_seed(0)
    with torch.compiler.set_stance(stance):
        check_compiled_layers()


def check_compiled_layers() -> None:
    for channels, size, count in ((24, 7, 3), (144, 4, 2), (100, 5, 2)):
        x = (torch.randn(count, channels, size, size) * 2 + 0.5).to(memory_format=torch.channels_last).requires_grad_()
        weight, bias = (torch.rand(channels) + 0.5).requires_grad_(), torch.randn(channels).requires_grad_()
        for relu6 in (True, False):
            ours, theirs = ([torch.zeros(channels), torch.ones(channels)] for _ in range(2))
            expected = F.batch_norm(x, *theirs, weight, bias, True, 0.1, 1e-5)
            expected = F.relu6(expected) if relu6 else expected
            agree(batch_norm_act(x, weight, bias, *ours, 0.1, 1e-5, relu6), expected, (x, weight, bias))
            torch.testing.assert_close(ours, theirs)
        kernel = torch.randn(channels, 1, 3, 3, requires_grad=True)
        agree(depthwise_conv3x3(x, kernel), F.conv2d(x, kernel, padding=1, groups=channels), (x, kernel))


@pytest.mark.parametrize(("swap", "count"), [(compile_layers, 85), (spare_cpu, 2)])
def test_networks_with_other_layers_are_the_same_networks(swap, count):
    plain = timm.create_model("mobilenetv2_lgc_gc_cifar100", width_mult=0.25, num_classes=10).train()
    swapped = swap(copy.deepcopy(plain))
    assert list(swapped.state_dict()) == list(plain.state_dict())
    assert sum("forward" in vars(module) for module in swapped.modules()) == count
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    with torch.compiler.set_stance("force_eager"):
        for _ in ("training", "inference"):
            mz.check_equivalent(plain, swapped, x, tolerance=1e-4)
            plain.eval(), swapped.eval()


def test_a_cpu_is_spared_slow_kernels_and_learns_the_same():
    torch.manual_seed(0)
    plain = timm.create_model("mobilenetv1_w025_cifar100", num_classes=10).train().to(memory_format=torch.channels_last)
    spared = spare_cpu(copy.deepcopy(plain))
    assert not any(module.inplace for module in spared.modules() if isinstance(module, torch.nn.ReLU6))
    x = torch.randn(4, 3, 16, 16).to(memory_format=torch.channels_last)
    layouts, gradients = [], []
    for model in (plain, spared):
        features = model.forward_features(x)
        logits = model.forward_head(features)
        features.register_hook(lambda grad: layouts.append(grad.is_contiguous(memory_format=torch.channels_last)))
        (100 * logits.logsumexp(1).mean()).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)
    assert layouts == [False, True]

    conv = next(module for module in spared.modules() if module.__dict__.get("forward") and module.groups > 1)
    x = torch.randn(2, conv.in_channels, 8, 8).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(x)
    precise = F.conv2d(x.float(), conv.weight, stride=2, padding=1, groups=conv.groups)
    assert torch.equal(y, precise.bfloat16())
    inputs, grad = (x, conv.weight), torch.randn_like(y)
    expected = torch.autograd.grad(precise, inputs, grad.float())
    torch.testing.assert_close(torch.autograd.grad(y, inputs, grad), expected, rtol=1e-2, atol=1e-5)


def test_only_the_network_that_takes_steps_has_other_layers(tmp_path):
    student = Student(load_recipe(write_recipe(tmp_path)), 10, 100, torch.device("cpu"), tmp_path)
    swapped = [any("forward" in vars(m) for m in net.modules()) for net in (student.model, student.average.module)]
    assert swapped == [True, False]


# The measured result


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """Empty places for runs and weights."""
    for name in ("runs", "weights"):
        (tmp_path / name).mkdir()
    (tmp_path / "weights" / "manifest.json").write_text("{}")
    monkeypatch.setattr(evaluate, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(evaluate, "WEIGHTS_DIR", tmp_path / "weights")
    return tmp_path


def trained(project: Path, data: Path, text: str, **changes) -> tuple[Path, Path]:
    """Trains a recipe that lies where a kept result's must; returns recipe and run."""
    recipe = kept_recipe(project, text, **changes)
    out = project / f"{recipe.parent.name}.{changes.get('seed', 0)}"
    assert run(recipe, data, out) == 0
    return recipe, out


def kept_recipe(project: Path, text: str, **changes) -> Path:
    recipe = write_recipe(project, text, epochs=2, **changes)
    folder = project / "runs" / load_recipe(recipe).name
    folder.mkdir(exist_ok=True)
    return recipe.rename(folder / "recipe.toml")


def measured(recipe: Path, out: Path, data: Path, *arguments: str) -> int:
    return evaluate.main([str(recipe), "--run", str(out), "--data", str(data), "--device", "cpu", *arguments])


def test_a_result_is_recorded_beside_its_recipe(project, data, capsys):
    recipe, out = trained(project, data, LGC)
    assert measured(recipe, out, data, "--record") == 0
    folder = recipe.parent
    assert sorted(path.name for path in folder.iterdir()) == ["log.csv", "masks.json", "recipe.toml", "result.json"]
    result = json.loads((folder / "result.json").read_text())
    assert result["evaluation"]["images"] == 40
    assert len(result["evaluation"]["per_class"]) == 10
    assert result["recipe"] == json.loads(json.dumps(dataclasses.asdict(load_recipe(recipe))))
    assert json.loads((project / "weights" / "manifest.json").read_text()) == {}
    # A recipe from elsewhere can be measured, not kept.
    outside = write_recipe(project, LGC, epochs=2)
    assert measured(outside, out, data) == 0
    assert measured(outside, out, data, "--record") == 2
    assert f"lies at {recipe}" in capsys.readouterr().err
    # A run of another recipe is none of this one's.
    changed = write_recipe(project, LGC, epochs=2, lr=0.2)
    assert measured(changed, out, data) == 2
    assert f"{out} was trained with another recipe" in capsys.readouterr().err
    # The same tag can't come to mean another weight.
    _, other = trained(project, data, LGC, seed=1)
    assert measured(recipe, other, data, "--bundle") == 2
    assert "a new training needs a new tag" in capsys.readouterr().err
    assert json.loads((folder / "result.json").read_text()) == result
    (other / "model.safetensors").write_bytes(b"damaged")
    assert measured(recipe, other, data) == 2
    assert "can't be loaded into mobilenetv2_lgc_cifar100" in capsys.readouterr().err


def test_a_weight_is_bundled_and_makes_place_for_the_next(project, data, monkeypatch):
    (first, out), weights = trained(project, data, BASE), project / "weights"
    assert measured(first, out, data, "--bundle") == 0
    name = load_recipe(first).name
    row = json.loads((weights / "manifest.json").read_text())[name]
    assert row["bytes"] == (weights / row["file"]).stat().st_size
    assert (row["recipe"], row["result"]) == tuple(
        f"benchmarks/runs/{name}/{f}" for f in ("recipe.toml", "result.json")
    )
    assert row["taught_by"] is None
    assert row["file"] == f"{name}.safetensors"  # not the model's default tag
    # What a part of the images was held out from isn't bundled.
    part = project / "part"
    assert run(first, data, part, "--holdout") == 0
    assert measured(first, part, data, "--bundle") == 2
    assert json.loads((weights / "manifest.json").read_text())[name] == row
    # Published and measured again, it stays the file of that commit.
    mz.utils.write_json(weights / "manifest.json", {name: row | {"revision": "1234"}})
    assert measured(first, out, data, "--bundle") == 0
    assert json.loads((weights / "manifest.json").read_text()) == {name: row | {"revision": "1234"}}
    # A default weight's file is the model's; the one that it replaces stays where a recipe starts from it.
    second = kept_recipe(project, BASE, tag="second")
    third = kept_recipe(project, BASE, tag="third", init_from=load_recipe(second).name)
    fourth, other = trained(project, data, BASE, tag="fourth", seed=1)
    for recipe, run_folder in ((second, out), (third, other), (fourth, out)):
        made = json.loads((run_folder / "run.json").read_text())
        as_its = made | {"recipe": dataclasses.asdict(load_recipe(recipe))}
        mz.utils.write_json(run_folder / "run.json", as_its)
        default = SimpleNamespace(tag=load_recipe(recipe).tag)
        monkeypatch.setattr(timm, "get_pretrained_cfg", lambda _, cfg=default: cfg)
        assert measured(recipe, run_folder, data, "--bundle") == 0
        rows = json.loads((weights / "manifest.json").read_text())
        assert sorted(rows) == sorted([name, recipe.parent.name])
        assert rows[recipe.parent.name]["file"] == "mobilenetv1_w025_cifar100.safetensors"
    assert (second.parent / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert not (third.parent / "model.safetensors").exists()


def test_the_teacher_is_that_of_the_weight_a_chain_starts_from(project, labelled):
    taught = load_recipe(kept_recipe(project, BASE, soft_labels=str(labelled[2]), kd_weight=1.0))
    assert evaluate.taught_by(taught) == "mobilenetv1_w025_cifar100.test"
    (project / "runs" / taught.name / "result.json").write_text('{"taught_by": "somebody"}')
    teacher = "efficientnet_lite2.cutmix_e8_r160, pretrained on ImageNet-1k"
    for start, expected in ((taught.name, "somebody"), ("mobilenetv2_cifar100.kd_e26_r32", teacher), ("", None)):
        recipe = dataclasses.replace(taught, soft_labels="", kd_weight=0, init_from=start)
        assert evaluate.taught_by(recipe) == expected
