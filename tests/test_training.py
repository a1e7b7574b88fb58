"""The trainer on a made-up data set of ten classes: what it learns, and that nothing is lost."""

import contextlib
import copy
import csv
import dataclasses
import errno
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import timm
import timm.optim.muon as muon
import torch
import train
from conftest import ROOT
from PIL import Image
from report import figures
from timm.optim import create_optimizer_v2
from torch.nn import functional as F
from training.checkpoint import CHECKPOINT, load_checkpoint, save_checkpoint
from training.cpu import adapt_layers, orthogonalize_in_float32
from training.holdout import held_out
from training.recipe import Recipe, load_recipe
from training.soft_labels import SoftLabels
from training.student import Student

import mobilenets_zoo as mz

BASE = """
model = "mobilenetv1_w025_cifar100"
tag = "test"
epochs = 3
batch_size = 32
lr = 0.1
ema_decay = 0.9
sizes = [[0.4, 8], [0.6, 16]]
precision = "fp32"
"""
LGC = """
model = "mobilenetv2_lgc_cifar100"
model_args = { width_mult = 0.25, expand_ratio = 2 }
tag = "test"
epochs = 3
batch_size = 32
lr = 0.1
ema_decay = 0.9
sizes = [[1.0, 8]]
precision = "fp32"
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Ten classes told apart by colour, 16 + 4 images each, in the Hub's layout."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for split, per_class in (("train", 16), ("test", 4)):
        images, labels = [], []
        for label in np.repeat(np.arange(10), per_class):
            colour = np.array([label * 25, 255 - label * 25, (label * 77) % 256])
            pixels = (colour + generator.normal(0, 20, (32, 32, 3))).clip(0, 255).astype(np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            images.append({"bytes": buffer.getvalue(), "path": ""})
            labels.append(int(label))
        pq.write_table(pa.table({"img": images, "label": labels}), folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(autouse=True)
def read_every_step(monkeypatch):
    monkeypatch.setattr(train, "READ_EVERY", 1)


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
    with open(out / "log.csv", newline="") as file:
        return [
            {
                key: value
                for key, value in row.items()
                if key not in ("seconds", "images_per_second", "images_per_second_per_core")
            }
            for row in csv.DictReader(file)
        ]


def same_outcome(a: Path, b: Path) -> bool:
    return log(a) == log(b) and (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


def subprocess_program(**settings: float) -> list[str]:
    lines = ["import sys, torch, train", "torch.set_num_threads(1)"]
    lines += [f"train.{name} = {value}" for name, value in settings.items()]
    return [sys.executable, "-c", "\n".join([*lines, "sys.exit(train.main())"])]


def start(recipe: Path, data: Path, out: Path, **settings: float) -> subprocess.Popen:
    arguments = [str(recipe), "--data", str(data), "--out", str(out), "--device", "cpu"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT)])}
    return subprocess.Popen([*subprocess_program(**settings), *arguments], env=env, stderr=subprocess.PIPE, text=True)


def checkpoint_step(out: Path) -> int:
    return load_checkpoint(out, torch.device("cpu"))["step"]


def wait_for_step(out: Path, step: int, process: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if (out / CHECKPOINT).exists() and checkpoint_step(out) >= step:
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    pytest.fail("no checkpoint in time")


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Recipes


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "recipes").rglob("*.toml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path):
    recipe = load_recipe(path)
    assert recipe.model in timm.list_models("*_cifar100") or path.stem.startswith("teacher")
    assert not recipe.soft_labels or (ROOT / "benchmarks" / recipe.soft_labels).exists()
    folder = path.parent.relative_to(ROOT)
    shown = [f"{folder}/{name} --data DIR --out DIR" for name in (path.name, "*.toml")]
    assert any(f"# python benchmarks/train.py {line}" in path.read_text() for line in shown)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(learning_rate=1), "unknown keys learning_rate; known are model"),
        (dict(epochs=0), "at least 1"),
        (dict(precision="fp8"), "'bf16' or 'fp32'"),
        (dict(sizes=[[0.5, 32]]), "add up to 1"),
        (dict(cutmix=1.5), r"cutmix must be in \[0, 1\]"),
        (dict(soft_labels="labels.safetensors"), "go together"),
        (dict(init_from="package:a/b.pth"), "go together"),
        (dict(init_sha256="0"), "go together"),
    ],
)
def test_bad_recipes_name_the_file_and_the_reason(tmp_path, changes, message):
    with pytest.raises(ValueError, match=rf"recipe\.toml: .*{message}"):
        load_recipe(write_recipe(tmp_path, **changes))


@pytest.mark.parametrize("text", ["model = ", 'model = "x"', "\0"])
def test_broken_recipes_name_the_file(tmp_path, text):
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(ValueError, match=r"recipe\.toml: (can't be read|missing keys tag, epochs)"):
        load_recipe(tmp_path / "recipe.toml")


def test_sizes_follow_their_shares():
    recipe = Recipe("m", "t", 36, sizes=((0.3333333, 16), (0.2777778, 24), (0.3888889, 32)))
    sizes = [recipe.size_at(epoch) for epoch in range(36)]
    assert sizes == [16] * 12 + [24] * 10 + [32] * 14


# Training


def test_it_learns_and_writes_what_it_promises(tmp_path, data):
    recipe = write_recipe(tmp_path, epochs=12, bn_batches=4)
    assert run(recipe, data, tmp_path / "out") == 0
    rows = log(tmp_path / "out")
    assert [row["epoch"] for row in rows] == [str(i + 1) for i in range(12)]
    assert {row["size"] for row in rows} == {"8", "16"}
    assert float(rows[-1]["train_loss"]) < 0.5 * float(rows[0]["train_loss"])
    assert float(rows[-1]["lr"]) < 0.01
    assert "torch" in json.loads((tmp_path / "out" / "run.json").read_text())
    overlay = {"file": str(tmp_path / "out" / "model.safetensors"), "num_classes": 10}
    model = timm.create_model("mobilenetv1_w025_cifar100", pretrained=True, pretrained_cfg_overlay=overlay)
    from mobilenets_zoo.evaluation import evaluate

    assert evaluate(model, mz.data.load_images(data, "test")).top1 > 60  # chance is 10


def test_the_same_seed_gives_the_same_weights_and_another_does_not(tmp_path, data, one_thread):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(write_recipe(tmp_path, seed=seed, cutmix=0.5), data, tmp_path / name)
    assert same_outcome(tmp_path / "a", tmp_path / "b")
    assert not same_outcome(tmp_path / "a", tmp_path / "c")


@pytest.mark.parametrize("text", [BASE, LGC], ids=["dense", "lgc"])
def test_a_killed_run_resumes_bit_by_bit(tmp_path, data, one_thread, text):
    """kill -9 in the middle of an epoch, with everything that draws random numbers."""
    recipe = write_recipe(tmp_path, text, cutmix=0.5, epochs=6)
    assert run(recipe, data, tmp_path / "whole") == 0
    process = start(recipe, data, tmp_path / "killed", CHECKPOINT_SECONDS=0, READ_EVERY=1)
    wait_for_step(tmp_path / "killed", 8, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    assert run(recipe, data, tmp_path / "killed", "--resume") == 0
    assert same_outcome(tmp_path / "whole", tmp_path / "killed")
    assert [path.name for path in (tmp_path / "killed").glob("*checkpoint*") if path.suffix != ".tmp"] == [CHECKPOINT]


def test_sigterm_saves_and_stops(tmp_path, data, one_thread):
    recipe = write_recipe(tmp_path, epochs=200)
    process = start(recipe, data, tmp_path / "out", CHECKPOINT_SECONDS=0, READ_EVERY=1)
    wait_for_step(tmp_path / "out", 5, process)
    process.terminate()
    assert process.wait(60) == 143
    assert "--resume goes on" in " ".join(process.stderr.read().split())
    assert 5 <= checkpoint_step(tmp_path / "out") < 1000


def test_time_budget_stops_and_resumes(tmp_path, data, one_thread):
    recipe = write_recipe(tmp_path)
    assert run(recipe, data, tmp_path / "whole") == 0
    for step in (1, 2):
        assert run(recipe, data, tmp_path / "parts", "--time-budget", "0", "--resume") == 0
        assert checkpoint_step(tmp_path / "parts") == step
    assert run(recipe, data, tmp_path / "parts", "--resume") == 0
    assert same_outcome(tmp_path / "whole", tmp_path / "parts")


def test_resuming_needs_to_be_asked_for_and_the_same_recipe(tmp_path, data, capsys):
    recipe = write_recipe(tmp_path)
    run(recipe, data, tmp_path / "out", "--time-budget", "0")
    assert run(recipe, data, tmp_path / "out") == 2
    assert "add --resume" in capsys.readouterr().err
    assert run(write_recipe(tmp_path, lr=0.2), data, tmp_path / "out", "--resume") == 2
    assert "another recipe" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named(tmp_path, data, capsys):
    recipe = write_recipe(tmp_path)
    run(recipe, data, tmp_path / "out", "--time-budget", "0")
    file = tmp_path / "out" / CHECKPOINT
    file.write_bytes(file.read_bytes()[:-1000])
    assert run(recipe, data, tmp_path / "out", "--resume") == 2
    assert f"{CHECKPOINT} can't be read" in " ".join(capsys.readouterr().err.split())


def test_a_checkpoint_that_can_not_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, {"x": torch.arange(5)})

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, {"x": torch.arange(6)})
    assert torch.equal(load_checkpoint(tmp_path, torch.device("cpu"))["x"], torch.arange(5))


def test_a_full_disk_or_a_bad_folder_is_found_before_training(tmp_path, data, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    assert run(write_recipe(tmp_path), data, tmp_path / "file") == 2
    assert "choose another --out" in capsys.readouterr().err

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(train.Trainer, "run", lambda *_: pytest.fail("trained"))
    assert run(write_recipe(tmp_path), data, tmp_path / "out") == 2
    assert "No space left on device" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_with_the_step(tmp_path, data, capsys):
    assert run(write_recipe(tmp_path, lr=1e30, warmup_epochs=0), data, tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert "loss is not finite by step" in err
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_holdout_is_fixed_balanced_and_disjoint(data):
    images = np.arange(10 * 60, dtype=np.uint16).view(np.uint8).reshape(600, 2)
    labels = np.repeat(np.arange(10), 60)
    everything = mz.data.ImageSet(images, labels, tuple("abcdefghij"))
    mask = held_out(labels, parts=10, seed=100)
    kept, held = everything.subset(~mask), everything.subset(mask)
    again = everything.subset(held_out(labels, parts=10, seed=100))
    assert np.bincount(held.labels).tolist() == [6] * 10
    assert held_out(labels, parts=100, seed=0).sum() == 10  # one of each class at least
    assert np.array_equal(held.images, again.images)
    ids = [set(map(tuple, part.images.tolist())) for part in (kept, held)]
    assert not ids[0] & ids[1]
    assert len(ids[0] | ids[1]) == 600


# Learned group convolutions


def test_lgc_prunes_in_three_stages_and_cleans_momentum_and_average(tmp_path, data, monkeypatch):
    trainers = []
    original = train.Trainer.finish
    monkeypatch.setattr(train.Trainer, "finish", lambda self: (trainers.append(self), original(self)))
    recipe = write_recipe(tmp_path, LGC, epochs=6, bn_batches=2)
    assert run(recipe, data, tmp_path / "out") == 0
    stages = json.loads((tmp_path / "out" / "masks.json").read_text())
    assert [stage["progress"] for stage in stages] == pytest.approx([5 / 30, 10 / 30, 15 / 30])
    layer = "blocks.1.0.projection.conv"
    assert [stage["inputs_per_group"][layer] for stage in stages] == [12, 8, 4]
    assert all(0 <= value <= 1 for value in stages[0]["hoyer_before"][layer])

    student = trainers[0].students[0]
    # The log's picture of a mask being learned: a stage keeps only what the stage before kept, the last is the mask.
    pictures = list(figures.mask_stages(stages, layer).values())
    assert [sum(rows[0]) for rows in pictures] == [12, 8, 4]
    assert all((np.array(after) <= np.array(before)).all() for before, after in itertools.pairwise(pictures))
    assert np.array_equal(pictures[-1], student.learned[layer].mask)
    for name, module in student.learned.items():
        keep = module.mask.repeat_interleave(module.out_channels // module.groups, 0)[:, :, None, None]
        average = student.average.model.get_submodule(name)
        assert torch.equal(average.mask, module.mask)
        momentum = student.optimizer.state[module.weight]["momentum_buffer"]
        for tensor in (module.weight, average.weight, momentum):
            assert (tensor[~keep] == 0).all()
            assert (tensor[keep] != 0).any()

    file = tmp_path / "out" / "model.safetensors"
    assert not any(key.endswith("mask") for key in safetensors.torch.load_file(file))
    arguments = dict(width_mult=0.25, expand_ratio=2, pretrained=True, num_classes=10)
    arguments["pretrained_cfg_overlay"] = {"file": str(file), "num_classes": 10}
    masked = timm.create_model("mobilenetv2_lgc_cifar100", **arguments).eval()
    condensed = timm.create_model("mobilenetv2_lgc_cifar100", condensed=True, **arguments).eval()
    mz.check_equivalent(masked, condensed, torch.randn(4, 3, 32, 32))


def test_pruning_work_is_done_only_when_a_stage_is_due(tmp_path, monkeypatch):
    recipe = load_recipe(write_recipe(tmp_path, LGC))
    student = Student(recipe, 10, 600, torch.device("cpu"), tmp_path)
    calls = []
    original = mz.LearnedGroupConv2d.input_importance
    monkeypatch.setattr(mz.LearnedGroupConv2d, "input_importance", lambda self: calls.append(1) or original(self))
    counts = []
    for step in (0, 50, 99, 100, 101, 199, 200, 300, 301, 599):
        calls.clear()
        student.prepare(step, 100)
        counts.append(len(calls) > 0)
    assert counts == [False, False, False, True, False, False, True, True, False, False]


# Soft labels


@pytest.fixture(scope="module")
def labelled(tmp_path_factory, data) -> tuple[Path, Path, Path]:
    """A finished teacher's recipe and run, and its soft labels."""
    import soft_labels

    folder = tmp_path_factory.mktemp("teacher")
    recipe = write_recipe(folder, epochs=12, sizes=[[1.0, 16]], lr=0.2, name="teacher")
    assert run(recipe, data, folder / "run") == 0
    out = folder / "labels.safetensors"
    arguments = [str(recipe), "--run", str(folder / "run"), "--data", str(data), "--out", str(out), "--device", "cpu"]
    assert soft_labels.main([*arguments, "--views", "3", "--kept", "4"]) == 0
    return recipe, folder / "run", out


def test_soft_labels_are_what_the_teacher_says_of_each_view(labelled, data):
    """The stored labels of a few images against a plain forward pass over the same crops."""
    from soft_labels import Teacher

    recipe, folder, file = labelled
    labels = SoftLabels.load(file)
    images = mz.data.load_images(data, "train")
    assert labels.views.shape == (160, 3)
    assert all(len(set(row)) == 3 for row in labels.views.tolist())  # no view twice
    assert labels.info["data_sha256"] == images.sha256()
    assert labels.info["taught_by"] == "mobilenetv1_w025_cifar100.test"
    teacher = Teacher(load_recipe(recipe), folder, 10, torch.device("cpu"))
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
        softer = labels.targets(torch.tensor([image]), torch.tensor([draw]), 4.0)[0]
        assert softer.max() < actual.max()


@pytest.mark.cifar100
def test_the_shipped_soft_labels_are_the_shipped_teachers(cifar100):
    """A few images, on the CPU; the labels were computed on a GPU, in bfloat16 as here."""
    from soft_labels import Teacher
    from training.augment import crop_and_mirror

    recipe = load_recipe(ROOT / "benchmarks" / "recipes" / "teacher_efficientnet_lite2.toml")
    folder = ROOT / "benchmarks" / "teacher"
    teacher = Teacher(recipe, folder, 100, torch.device("cpu"))
    labels, data = SoftLabels.load(folder / "soft_labels.safetensors"), mz.data.load_images(cifar100, "train")
    assert labels.info["data_sha256"] == data.sha256()
    assert labels.views.shape == (50_000, 16)
    right = (labels.classes[:, :, 0].long() == torch.from_numpy(data.labels)[:, None]).float().mean(1)
    mask = torch.from_numpy(held_out(data.labels, train.HOLDOUT_PARTS, train.HOLDOUT_SEED))
    trained, held = (100 * right[part].mean().item() for part in (~mask, mask))
    assert (round(trained), round(held)) == (96, 83)  # as docs/training.md says
    images, draws = torch.arange(0, 50_000, 4_000), torch.arange(13)
    crops = crop_and_mirror(torch.from_numpy(data.images)[images], labels.views[images, draws], recipe.crop_padding)
    expected, actual = teacher(crops), labels.targets(images, draws, 1.0)
    assert (expected - actual).abs().max() < 0.05
    assert torch.nn.functional.cosine_similarity(expected, actual).min() > 0.995


def test_soft_labels_soften_like_the_whole_distribution():
    """With every class kept, a temperature does what softmax(logits / T) does, up to the rounding of a file."""
    from training.soft_labels import pack

    logits = 2 * torch.randn(5, 3, 7)
    classes, log_probs, rest = pack(logits.softmax(-1), 7)
    info = {"num_classes": 7}
    labels = SoftLabels(torch.zeros(5, 3, dtype=torch.uint8), classes, log_probs, rest, info)
    images, draws = torch.tensor([0, 4, 2]), torch.tensor([2, 0, 1])
    expected = (logits[images, draws] / 2).softmax(-1)
    torch.testing.assert_close(labels.targets(images, draws, 2.0), expected, rtol=0.05, atol=1e-3)


def test_distillation_loss_against_its_definition(tmp_path, data):
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


def test_students_share_batches_and_soft_labels(tmp_path, data, one_thread, labelled):
    """Trained together, each student ends as it does alone."""
    shared = dict(soft_labels=str(labelled[2]), kd_weight=0.9, ce_weight=0.1, cutmix=0.5, sizes=[[1.0, 8]])
    a = write_recipe(tmp_path, BASE, "a", **shared)
    b = write_recipe(tmp_path, LGC, "b", **shared)
    assert run([a, b], data, tmp_path / "both") == 0
    assert run(a, data, tmp_path / "alone") == 0
    assert same_outcome(tmp_path / "both" / "mobilenetv1_w025_cifar100.test", tmp_path / "alone")
    assert (tmp_path / "both" / "mobilenetv2_lgc_cifar100.test" / "masks.json").exists()


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


def test_cutmix_mixes_targets_by_area(tmp_path, data, labelled):
    recipe = load_recipe(write_recipe(tmp_path, soft_labels=str(labelled[2]), kd_weight=0.9, cutmix=1.0))
    images, labels = mz.data.load_images(data, "train"), SoftLabels.load(labelled[2])
    trainer = train.Trainer([recipe], images, labels, None, torch.device("cpu"), tmp_path)
    plan = train.Plan(recipe, 0, images, labels, trainer.device)
    mixed = trainer.batch(plan, 0, 32)
    rows, columns = plan.boxes[0]
    share = (rows.stop - rows.start) * (columns.stop - columns.start) / 1024
    assert 0 < share < 1
    plan.boxes[0] = None
    plain = trainer.batch(plan, 0, 32)
    for before, after in zip(plain[1:], mixed[1:], strict=True):
        torch.testing.assert_close(after, (1 - share) * before + share * before.flip(0))
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[rows, columns] = True
    assert torch.equal(mixed[0][:, :, inside], plain[0].flip(0)[:, :, inside])
    assert torch.equal(mixed[0][:, :, ~inside], plain[0][:, :, ~inside])


def test_strided_depthwise_convolutions_stay_out_of_autocast():
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(8, 8, 3, 2, 1, groups=8, bias=False)
    model = torch.nn.Sequential(conv, torch.nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False))
    keys = list(model.state_dict())
    adapt_layers(model)
    assert list(model.state_dict()) == keys
    twin = copy.deepcopy(model)  # as for the average of the weights
    x = torch.randn(2, 8, 9, 9, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out = model[0](x)
    exact = F.conv2d(x.float(), conv.weight, None, 2, 1, groups=8)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, exact.bfloat16())
    with torch.no_grad():
        twin[0].weight.zero_()
    assert not twin[0](x).any()
    assert model[0](x).any()


def test_grouped_convolutions_learn_the_same_as_dense_ones():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 12, 1, groups=4))
    reference, x = copy.deepcopy(model), torch.randn(2, 8, 5, 5)
    adapt_layers(model)
    assert "forward" in vars(model[0])
    for network in (reference, model):
        network(x).square().sum().backward()
    torch.testing.assert_close(model(x), reference(x))
    torch.testing.assert_close(model[0].weight.grad, reference[0].weight.grad)
    torch.testing.assert_close(model[0].bias.grad, reference[0].bias.grad)


def test_recipes_that_disagree_do_not_train_together(tmp_path, data, capsys):
    a, b = write_recipe(tmp_path, BASE, "a"), write_recipe(tmp_path, LGC, "b")
    assert run([a, b], data, tmp_path / "out") == 2
    assert "must agree on sizes" in capsys.readouterr().err
    assert run([a, a], data, tmp_path / "out") == 2
    assert "differ in model or tag" in capsys.readouterr().err


# The measured result


def test_evaluate_script_measures_and_bundles(tmp_path, data, monkeypatch):
    import evaluate

    root = tmp_path / "project"
    (root / "weights").mkdir(parents=True)
    (root / "weights" / "manifest.json").write_text("{}")
    monkeypatch.setattr(evaluate, "ROOT", root)
    monkeypatch.setattr(evaluate, "WEIGHTS_DIR", root / "weights")
    recipe = write_recipe(root, epochs=2)
    assert run(recipe, data, tmp_path / "out") == 0
    code = evaluate.main(
        [str(recipe), "--run", str(tmp_path / "out"), "--data", str(data), "--bundle", "--device", "cpu"]
    )
    assert code == 0
    rows = json.loads((root / "weights" / "manifest.json").read_text())
    row = rows["mobilenetv1_w025_cifar100.test"]
    assert row["bytes"] == (root / "weights" / row["file"]).stat().st_size
    result = json.loads((root / row["result"]).read_text())
    assert result["evaluation"]["images"] == 40
    assert len(result["evaluation"]["per_class"]) == 10
    assert row["taught_by"] is None
    # Not the model's default tag: its files carry the tag.
    assert row["file"] == "mobilenetv1_w025_cifar100.test.safetensors"
    assert (root / "benchmarks" / "logs" / "mobilenetv1_w025_cifar100.test.csv").exists()
    # The same tag can't come to mean another weight.
    changed = write_recipe(root, epochs=3)
    assert run(changed, data, tmp_path / "other") == 0
    arguments = ["--run", str(tmp_path / "other"), "--data", str(data), "--bundle", "--device", "cpu"]
    assert evaluate.main([str(changed), *arguments]) == 2
    assert json.loads((root / "weights" / "manifest.json").read_text()) == rows
    # A recipe from outside can be measured, not bundled.
    outside = write_recipe(tmp_path, epochs=2, name="outside")
    arguments = [str(outside), "--run", str(tmp_path / "out"), "--data", str(data), "--device", "cpu"]
    assert evaluate.main([*arguments, "--bundle"]) == 2
    assert evaluate.main(arguments) == 0
    # What isn't bundled can leave its result and log.
    arguments = ["--run", str(tmp_path / "out"), "--data", str(data), "--record", "--device", "cpu"]
    assert evaluate.main([str(outside), *arguments]) == 2
    other = write_recipe(root, name="other", tag="other", epochs=2)
    assert evaluate.main([str(other), *arguments]) == 0
    kept = json.loads((root / "benchmarks" / "results" / "mobilenetv1_w025_cifar100.other.json").read_text())
    assert (kept["tag"], kept["evaluation"]["top1"]) == ("other", result["evaluation"]["top1"])
    assert json.loads((root / "weights" / "manifest.json").read_text()) == rows
    assert len(list((root / "weights").glob("*.safetensors"))) == 1
    # A default weight that another started from and replaces is kept, so that the recipe can be run again.
    monkeypatch.setattr(evaluate, "file_stem", lambda recipe: recipe.model)
    assert evaluate.main([str(other), *arguments]) == 2  # a default is bundled
    first, run_folder = load_recipe(recipe), tmp_path / "out"
    second = dataclasses.replace(first, tag="second", init_from=f"{first.model}.{first.tag}")
    evaluate.bundle(first, run_folder, result)
    weight = (root / "weights" / f"{first.model}.safetensors").read_bytes()
    evaluate.bundle(second, tmp_path / "other", {**result, "training_loss": 0.5})
    assert list(json.loads((root / "weights" / "manifest.json").read_text())) == [f"{first.model}.second"]
    earlier = root / "benchmarks" / "earlier" / second.init_from
    assert (earlier / "model.safetensors").read_bytes() == weight
    assert (earlier / "log.csv").read_bytes() == (run_folder / "log.csv").read_bytes()
    assert json.loads((earlier / "result.json").read_text()) == result
    assert (root / "weights" / f"{first.model}.safetensors").read_bytes() != weight


def test_muon_in_float32(monkeypatch):
    """Recipes for CPUs without bfloat16 take Muon's products in float32, and leave timm as it was."""
    seen = []
    original = muon.zeropower_via_newtonschulz

    def spy(*args, **arguments):
        result = original(*args, **arguments)
        seen.append(result.dtype)
        return result

    monkeypatch.setattr(muon, "zeropower_via_newtonschulz", spy)
    layer = torch.nn.Linear(8, 4, bias=False)
    optimizer = create_optimizer_v2(layer, "nmuon", lr=0.1)
    for context in (contextlib.nullcontext(), orthogonalize_in_float32()):
        layer(torch.ones(2, 8)).sum().backward()
        with context:
            optimizer.step()
    assert muon.zeropower_via_newtonschulz is spy
    assert seen == [torch.bfloat16, torch.float32]
