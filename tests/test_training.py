"""The trainer on a made-up data set of ten classes: what it learns, and that nothing is lost."""

import copy
import csv
import errno
import io
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import checkpoint
import figures
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import timm
import torch
import train
from conftest import ROOT
from distill import distillation_loss
from PIL import Image
from recipe import Recipe, load_recipe
from torch.nn import functional as F

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
            {key: value for key, value in row.items() if key not in ("seconds", "images_per_second")}
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


def wait_for_step(out: Path, step: int, process: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if (out / checkpoint.INDEX).exists() and json.loads((out / checkpoint.INDEX).read_text())["step"] >= step:
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


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path):
    recipe = load_recipe(path)
    assert recipe.model in timm.list_models("*_cifar100")
    first = path.read_text().splitlines()[0]
    assert first == f"# python benchmarks/train.py benchmarks/recipes/{path.name} --data DIR --out DIR"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(learning_rate=1), "unknown keys learning_rate; known are model"),
        (dict(epochs=0), "at least 1"),
        (dict(precision="fp8"), "'bf16' or 'fp32'"),
        (dict(sizes=[[0.5, 32]]), "add up to 1"),
        (dict(erase=1.5), r"erase must be in \[0, 1\]"),
        (dict(teachers=["mobilenetv1_w025_cifar100"]), "go together"),
        (dict(mixup=0.2, batch_size=3), "even"),
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
        run(write_recipe(tmp_path, seed=seed, trivial_augment=0.5, erase=0.3), data, tmp_path / name)
    assert same_outcome(tmp_path / "a", tmp_path / "b")
    assert not same_outcome(tmp_path / "a", tmp_path / "c")


@pytest.mark.parametrize("text", [BASE, LGC], ids=["dense", "lgc"])
def test_a_killed_run_resumes_bit_by_bit(tmp_path, data, one_thread, text):
    """kill -9 in the middle of an epoch, with every augmentation that draws random numbers."""
    changes = dict(trivial_augment=0.5, mixup=0.2, cutmix=1.0, mix_share=0.5, erase=0.2, epochs=6)
    recipe = write_recipe(tmp_path, text, **changes)
    assert run(recipe, data, tmp_path / "whole") == 0
    process = start(recipe, data, tmp_path / "killed", CHECKPOINT_SECONDS=0, READ_EVERY=1)
    wait_for_step(tmp_path / "killed", 8, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    assert run(recipe, data, tmp_path / "killed", "--resume") == 0
    assert same_outcome(tmp_path / "whole", tmp_path / "killed")
    leftovers = {path.name for path in (tmp_path / "killed").glob("checkpoint-*")}
    index = json.loads((tmp_path / "killed" / checkpoint.INDEX).read_text())
    assert leftovers == {part["file"] for part in index["parts"]}


def test_sigterm_saves_and_stops(tmp_path, data, one_thread):
    recipe = write_recipe(tmp_path, epochs=200)
    process = start(recipe, data, tmp_path / "out", READ_EVERY=1)
    wait_for_step(tmp_path / "out", 5, process)
    process.terminate()
    assert process.wait(60) == 143
    assert "--resume goes on" in " ".join(process.stderr.read().split())
    step = json.loads((tmp_path / "out" / checkpoint.INDEX).read_text())["step"]
    assert 5 <= step < 1000


def test_time_budget_stops_and_resumes(tmp_path, data, one_thread):
    recipe = write_recipe(tmp_path)
    assert run(recipe, data, tmp_path / "whole") == 0
    for step in (1, 2):
        assert run(recipe, data, tmp_path / "parts", "--time-budget", "0", "--resume") == 0
        assert json.loads((tmp_path / "parts" / checkpoint.INDEX).read_text())["step"] == step
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
    part = next((tmp_path / "out").glob("*.part"))
    part.write_bytes(part.read_bytes()[:-1])
    assert run(recipe, data, tmp_path / "out", "--resume") == 2
    assert f"{part.name} is missing or altered" in capsys.readouterr().err


def test_checkpoints_come_in_parts_and_replace_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "PART_BYTES", 1000)
    state = {"x": torch.arange(2000)}
    checkpoint.save_checkpoint(tmp_path, 1, state)
    first = set(tmp_path.glob("*.part"))
    assert len(first) > 10
    assert max(path.stat().st_size for path in first) <= 1000
    checkpoint.save_checkpoint(tmp_path, 2, {"x": state["x"] + 1})
    assert not first & set(tmp_path.glob("*.part"))
    loaded = checkpoint.load_checkpoint(tmp_path, torch.device("cpu"))
    assert torch.equal(loaded["x"], state["x"] + 1)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save_checkpoint(tmp_path, 3, state)
    assert torch.equal(checkpoint.load_checkpoint(tmp_path, torch.device("cpu"))["x"], state["x"] + 1)


def test_a_full_disk_or_a_bad_folder_is_found_before_training(tmp_path, data, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    assert run(write_recipe(tmp_path), data, tmp_path / "file") == 2
    assert "choose another --out" in capsys.readouterr().err

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
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
    kept, held = train.split_holdout(everything)
    again = train.split_holdout(everything)[1]
    assert np.bincount(held.labels).tolist() == [50] * 10
    assert np.array_equal(held.images, again.images)
    ids = [set(map(tuple, part.images.tolist())) for part in (kept, held)]
    assert not ids[0] & ids[1]
    assert len(ids[0] | ids[1]) == 600


# Learned group convolutions


def test_lgc_prunes_in_three_stages_and_cleans_momentum_and_average(tmp_path, data, monkeypatch):
    trainers = []
    original = train.Trainer.finish
    monkeypatch.setattr(train.Trainer, "finish", lambda self: (trainers.append(self), original(self)))
    recipe = write_recipe(tmp_path, LGC, epochs=6, group_lasso=1e-4, bn_batches=2)
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
        average = student.ema.module.get_submodule(name)
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


def test_lgc_starts_from_a_dense_checkpoint(tmp_path, data):
    dense = write_recipe(tmp_path, LGC, "dense", model="mobilenetv2_cifar100", epochs=1)
    assert run(dense, data, tmp_path / "dense") == 0
    weights = tmp_path / "dense" / "model.safetensors"
    recipe = load_recipe(write_recipe(tmp_path, LGC, init_from=str(weights)))
    student = train.Student(recipe, 100, 5, torch.device("cpu"), tmp_path)
    # A head for other classes is new; everything else comes from the dense network.
    state = safetensors.torch.load_file(weights)
    key = "blocks.1.0.projection.conv.weight"
    assert torch.equal(student.model.state_dict()[key], state[key].float())
    assert all(module.mask.all() for module in student.learned.values())


# Distillation


def test_distillation_loss_against_its_definition():
    torch.manual_seed(0)
    student, teachers = torch.randn(4, 7), torch.randn(2, 4, 7)
    p = (teachers / 3).softmax(-1).mean(0)
    expected = 9 * (p * (p.log() - (student / 3).log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(distillation_loss(student, teachers, 3.0, standardize=False), expected)
    scaled = distillation_loss(5 * student + 2, teachers, 3.0, standardize=True)
    torch.testing.assert_close(
        scaled, distillation_loss(student, teachers, 3.0, standardize=True), rtol=1e-4, atol=1e-5
    )
    assert distillation_loss(teachers[0], teachers[:1], 2.0, standardize=True) < 1e-6


def test_students_share_batches_and_teachers(tmp_path, data, one_thread):
    """Trained together, each student ends as it does alone."""
    teacher = write_recipe(tmp_path, epochs=4)
    assert run(teacher, data, tmp_path / "teacher") == 0
    shared = dict(
        teachers=[f"mobilenetv1_w025_cifar100={tmp_path / 'teacher' / 'model.safetensors'}"],
        kd_weight=2.0,
        ce_weight=0.1,
        cutmix=1.0,
        sizes=[[1.0, 8]],
    )
    a = write_recipe(tmp_path, BASE, "a", **shared)
    b = write_recipe(tmp_path, LGC, "b", **shared)
    assert run([a, b], data, tmp_path / "both") == 0
    assert run(a, data, tmp_path / "alone") == 0
    assert same_outcome(tmp_path / "both" / "mobilenetv1_w025_cifar100", tmp_path / "alone")
    assert (tmp_path / "both" / "mobilenetv2_lgc_cifar100" / "masks.json").exists()


def test_teachers_see_the_full_resolution(tmp_path, data, monkeypatch):
    teacher = timm.create_model("mobilenetv1_w025_cifar100", num_classes=10)
    mz.save_weights(teacher, tmp_path / "teacher.safetensors")
    sizes: dict[str, set[int]] = {"teacher": set(), "student": set()}

    def recorder(kind, forward):
        def recording(module, images, *arguments):
            sizes[kind].add(images.shape[-1])
            return forward(module, images, *arguments)

        return recording

    monkeypatch.setattr(train.Teachers, "forward", recorder("teacher", train.Teachers.forward))
    student = type(timm.create_model("mobilenetv2_lgc_cifar100"))
    monkeypatch.setattr(student, "forward", recorder("student", student.forward))
    changes = dict(sizes=[[0.5, 8], [0.5, 16]], epochs=2, kd_weight=1.0)
    teachers = [f"mobilenetv1_w025_cifar100={tmp_path / 'teacher.safetensors'}"]
    assert run(write_recipe(tmp_path, LGC, teachers=teachers, **changes), data, tmp_path / "out") == 0
    assert sizes["teacher"] == {32}
    assert sizes["student"] >= {8, 16}


def test_strided_depthwise_convolutions_stay_out_of_autocast():
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(8, 8, 3, 2, 1, groups=8, bias=False)
    model = torch.nn.Sequential(conv, torch.nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False))
    keys = list(model.state_dict())
    train.keep_strided_depthwise_in_float32(model)
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


def test_recipes_that_disagree_do_not_train_together(tmp_path, data, capsys):
    a, b = write_recipe(tmp_path, BASE, "a"), write_recipe(tmp_path, LGC, "b")
    assert run([a, b], data, tmp_path / "out") == 2
    assert "must agree on sizes" in capsys.readouterr().err
    assert run([a, a], data, tmp_path / "out") == 2
    assert "different models" in capsys.readouterr().err


def test_a_missing_teacher_is_named(tmp_path, data, capsys):
    for teacher, message in (("mobilenetv1_w025_cifar100=/no.safetensors", "No such file"), ("nonsense", "nonsense")):
        recipe = write_recipe(tmp_path, teachers=[teacher], kd_weight=1.0)
        assert run(recipe, data, tmp_path / "out") == 2
        assert message in capsys.readouterr().err


# Several processes


def test_two_processes_train_like_one(tmp_path, data):
    """The same global batches: the loss agrees but for BatchNorm's statistics over half batches."""
    recipe = write_recipe(tmp_path, epochs=4, sizes=[[1.0, 16]], batch_size=80)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "benchmarks" / "train.py"), str(recipe), "--data", str(data), "--device", "cpu"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, "--out", str(tmp_path / "two")], env=env, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert run(recipe, data, tmp_path / "one") == 0
    one = [float(row["train_loss"]) for row in log(tmp_path / "one")]
    two = [float(row["train_loss"]) for row in log(tmp_path / "two")]
    assert math.isclose(one[0], two[0], rel_tol=0.05)
    assert two[-1] < two[0]
    assert math.isclose(one[-1], two[-1], rel_tol=0.25)


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
    assert (root / "benchmarks" / "logs" / "mobilenetv1_w025_cifar100.csv").exists()
    # The same tag can't come to mean another weight.
    changed = write_recipe(root, epochs=3)
    assert run(changed, data, tmp_path / "other") == 0
    arguments = ["--run", str(tmp_path / "other"), "--data", str(data), "--bundle", "--device", "cpu"]
    assert evaluate.main([str(changed), *arguments]) == 2
    assert json.loads((root / "weights" / "manifest.json").read_text()) == rows
