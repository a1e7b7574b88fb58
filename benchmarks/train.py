"""Trains models from recipes.

    python benchmarks/train.py RECIPE.toml [RECIPE.toml ...] --data DIR --out DIR [--resume]
    torchrun --nproc_per_node=N benchmarks/train.py ...

The folder given by --out receives, per model, DIR/NAME/ with `log.csv` (a row per epoch), `masks.json` (masks and Hoyer
index of learned group convolutions at each pruning stage) and, at the end, `model.safetensors` (the weights to measure
with benchmarks/evaluate.py), and for all of them `checkpoint.json` with its parts and `run.json` (hardware and
versions). With one recipe everything lies in DIR itself. Test images are never read.
"""

import argparse
import csv
import ctypes
import dataclasses
import functools
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.distributed as dist
from augment import crop_and_flip, erase, resize, trivial_augment
from checkpoint import INDEX, load_checkpoint, save_checkpoint
from distill import Teachers, distillation_loss
from environment import environment
from recipe import SHARED_FIELDS, Recipe, load_recipe
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from weight_files import create_from_file

import mobilenets_zoo as mz
from mobilenets_zoo.evaluation import evaluate, preprocess

CHECKPOINT_SECONDS = 180
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h
READ_EVERY = 20  # steps between reads of loss and accuracy from the device, which stall a GPU
HOLDOUT_PER_CLASS = 50
HOLDOUT_SEED = 100
LOG_FIELDS = (
    *("epoch", "size", "lr", "train_loss", "train_top1", "holdout_loss", "holdout_top1"),
    *("images_per_second", "seconds"),
)


class Student:
    """One model that learns: weights, their average, optimiser, pruning schedule and log."""

    def __init__(self, recipe: Recipe, num_classes: int, steps_per_epoch: int, device: torch.device, out: Path):
        self.recipe, self.out = recipe, out
        torch.manual_seed(recipe.seed)
        arguments = dict(recipe.model_args, num_classes=num_classes)
        if recipe.init_from:
            model = create_from_file(recipe.model, initial_weights(recipe.init_from), **arguments)
        else:
            model = timm.create_model(recipe.model, **arguments)
        self.model: nn.Module = model.to(device).to(memory_format=torch.channels_last)
        if device.type == "cpu":
            keep_strided_depthwise_in_float32(self.model)
        self.ema = ModelEmaV3(self.model, decay=recipe.ema_decay, use_warmup=True) if recipe.ema_decay else None
        self.network: Any = self.model  # what runs: wrapped or compiled by the trainer
        self.optimizer = create_optimizer_v2(
            self.model, recipe.optimizer, lr=recipe.lr, weight_decay=recipe.weight_decay, momentum=recipe.momentum
        )
        self.scheduler = CosineLRScheduler(
            self.optimizer,
            t_initial=recipe.epochs * steps_per_epoch,
            warmup_t=int(recipe.warmup_epochs * steps_per_epoch),
            warmup_lr_init=recipe.lr / 100,
            t_in_epochs=False,
        )
        learned = {n: m for n, m in self.model.named_modules() if isinstance(m, mz.LearnedGroupConv2d)}
        self.schedule = mz.CondenseSchedule(self.model) if learned else None
        self.learned = learned
        # Summed on the device and read now and then.
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)
        self.log: list[dict[str, float]] = []
        self.masks: list[dict[str, Any]] = []

    def prune(self, progress: float) -> None:
        """Takes the pruning stages that are due and clears what momentum and average hold at dropped places."""
        if self.schedule is None:
            return
        before = {name: layer.hoyer_index().tolist() for name, layer in self.learned.items()}
        if not self.schedule.step(progress):
            return
        kept = {name: int(layer.mask.sum(1)[0]) for name, layer in self.learned.items()}
        # A row of hexadecimal digits per group, a bit per input.
        masks = {n: [r.tobytes().hex() for r in np.packbits(m.mask.cpu().numpy(), 1)] for n, m in self.learned.items()}
        inputs = {name: layer.in_channels for name, layer in self.learned.items()}
        entry = {"progress": progress, "hoyer_before": before, "inputs": inputs, "inputs_per_group": kept}
        self.masks.append({**entry, "masks": masks})
        for name, layer in self.learned.items():
            keep = layer.mask.repeat_interleave(layer.out_channels // layer.groups, 0)[:, :, None, None]
            states = [value for value in self.optimizer.state[layer.weight].values() if torch.is_tensor(value)]
            tensors = [layer.weight.data, *(value for value in states if value.shape == keep.shape)]
            if self.ema is not None:
                average = self.ema.module.get_submodule(name)
                assert isinstance(average, mz.LearnedGroupConv2d)
                average.mask.copy_(layer.mask)
                tensors.append(average.weight.data)
            for tensor in tensors:
                tensor.mul_(keep)

    def loss(self, logits: torch.Tensor, target: torch.Tensor, teacher_logits: torch.Tensor | None) -> torch.Tensor:
        recipe = self.recipe
        smoothing = 0.0 if target.ndim == 2 else recipe.label_smoothing  # timm's Mixup has smoothed its targets
        loss = recipe.ce_weight * F.cross_entropy(logits, target, label_smoothing=smoothing)
        if teacher_logits is not None:
            kd = distillation_loss(logits, teacher_logits, recipe.kd_temperature, recipe.kd_standardize)
            loss = loss + recipe.kd_weight * kd
        if recipe.group_lasso and self.schedule is not None:
            loss = loss + recipe.group_lasso * mz.group_lasso(self.model)
        return loss

    def final_model(self) -> nn.Module:
        """Returns the average of the last epoch, or the last weights where the recipe keeps no average."""
        return self.ema.module if self.ema is not None else self.model

    def write_logs(self) -> None:
        with mz.files.atomic_write(self.out / "log.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, LOG_FIELDS)
            writer.writeheader()
            for entry in self.log:
                writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in entry.items()})
        if self.masks:
            with mz.files.atomic_write(self.out / "masks.json", "w") as file:
                file.write(json.dumps(self.masks) + "\n")

    def state_dict(self) -> dict[str, Any]:
        return {
            "recipe": dataclasses.asdict(self.recipe),
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict() if self.schedule is not None else None,
            "sums": self.sums,
            "log": self.log,
            "masks": self.masks,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["recipe"] != dataclasses.asdict(self.recipe):
            raise ValueError(
                f"the checkpoint was made with another recipe for {self.recipe.model}; choose another --out"
            )
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.sums.copy_(state["sums"])
        self.log, self.masks = state["log"], state["masks"]


class Trainer:
    """Students that see the same batches, with what is needed to stop at any step and go on bit by bit.

    Every step seeds its own generators from the recipe's seed and the step's number, so a resumed run draws what the
    uninterrupted one would have drawn. With several processes each prepares the whole batch and trains on its part,
    so their number changes nothing about the images.
    """

    def __init__(
        self,
        recipes: list[Recipe],
        data: mz.data.ImageSet,
        holdout: mz.data.ImageSet | None,
        device: torch.device,
        out: Path,
        compile_models: bool = False,
    ):
        self.recipe, self.device, self.out, self.holdout = recipes[0], device, out, holdout
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if self.recipe.batch_size % self.world:
            raise ValueError(f"batch_size {self.recipe.batch_size} isn't a multiple of {self.world} processes")
        self.images = torch.from_numpy(data.images).to(device)
        self.labels = torch.from_numpy(data.labels).to(device)
        self.num_classes = len(data.classes)
        self.steps_per_epoch = len(data) // self.recipe.batch_size
        if not self.steps_per_epoch:
            raise ValueError(f"batch_size {self.recipe.batch_size} is larger than the {len(data)} training images")
        self.total_steps = self.recipe.epochs * self.steps_per_epoch

        self.students = []
        for recipe in recipes:
            folder = out if len(recipes) == 1 else out / recipe.model
            self.students.append(Student(recipe, self.num_classes, self.steps_per_epoch, device, folder))
        self.teachers = None
        if self.recipe.teachers:
            self.teachers = Teachers(self.recipe.teachers, self.num_classes)
            self.teachers.to(device).to(memory_format=torch.channels_last)
        self.mixup = None
        if self.recipe.mixup or self.recipe.cutmix:
            self.mixup = Mixup(
                self.recipe.mixup,
                self.recipe.cutmix,
                prob=self.recipe.mix_share,
                label_smoothing=self.recipe.label_smoothing,
                num_classes=self.num_classes,
            )
        for student in self.students:
            if self.world > 1:
                ids = [device.index] if device.type == "cuda" else None
                student.network = DistributedDataParallel(student.model, device_ids=ids)
            if compile_models:
                student.network = torch.compile(student.network)
        cfg: dict[str, Any] = self.students[0].model.pretrained_cfg  # type: ignore[assignment]
        self.mean, self.std = cfg["mean"], cfg["std"]
        self.generator = torch.Generator(device=device)
        self.step = 0  # optimiser steps done
        self.epoch_seconds = 0.0
        self.stop_reason = ""

    def order(self, epoch: int) -> torch.Tensor:
        """Returns the order in which an epoch visits the images."""
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.labels), generator=generator).to(self.device)

    def seed(self, step: int) -> None:
        seed = self.recipe.seed * 1_000_003 + step
        self.generator.manual_seed(seed)
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 - timm's Mixup draws from the global generator

    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns this process's share of the augmented batch, and labels or mixed one-hot targets."""
        recipe = self.recipe
        images = crop_and_flip(self.images[indices], recipe.crop_padding, self.generator)
        if recipe.trivial_augment:
            images = trivial_augment(images, recipe.trivial_augment, self.generator)
        pixels = preprocess(images, self.mean, self.std)
        if recipe.erase:
            pixels = erase(pixels, recipe.erase, self.generator)
        target = self.labels[indices]
        if self.mixup is not None:
            pixels, target = self.mixup(pixels, target)
        part = slice(self.rank * len(pixels) // self.world, (self.rank + 1) * len(pixels) // self.world)
        return pixels[part], target[part]

    def train_step(self, indices: torch.Tensor, size: int) -> None:
        """Takes one optimiser step of every student."""
        self.seed(self.step)
        images, target = self.batch(indices)
        labels = target if target.ndim == 1 else target.argmax(1)
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16")
        with autocast:
            teacher_logits = self.teachers(images) if self.teachers is not None else None
        images = resize(images, size)  # finished teachers know the full resolution alone
        for student in self.students:
            student.prune(self.step / self.total_steps)
            student.scheduler.step_update(self.step)
            with autocast:
                logits = student.network(images)
            loss = student.loss(logits.float(), target, teacher_logits)
            student.optimizer.zero_grad()
            loss.backward()
            student.optimizer.step()
            if student.ema is not None:
                student.ema.update(student.model, step=self.step + 1)
            with torch.no_grad():
                student.sums += torch.stack([loss.detach().double(), (logits.argmax(1) == labels).double().mean()])
        self.step += 1

    def read_sums(self) -> list[list[float]]:
        """Returns every student's summed loss and accuracy of this epoch, over all processes.

        Raises:
            FloatingPointError: a loss isn't a number.
        """
        sums = torch.stack([student.sums for student in self.students])
        if self.world > 1:
            dist.all_reduce(sums)
            sums /= self.world
        values = sums.tolist()
        for student, (loss, _) in zip(self.students, values, strict=True):
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"{student.recipe.model}: the loss is not finite by step {self.step}; the last checkpoint is from "
                    "before; lower lr or set precision = 'fp32' in the recipe"
                )
        return values

    def should_stop(self, deadline: float) -> bool:
        """Whether a signal or the time budget ends the run here; all processes answer alike."""
        if time.monotonic() > deadline:
            self.stop_reason = self.stop_reason or "time budget"
        if self.world > 1:
            flag = torch.tensor([float(bool(self.stop_reason))], device=self.device)
            dist.all_reduce(flag)
            if flag.item():
                self.stop_reason = self.stop_reason or "another process"
        return bool(self.stop_reason)

    def run(self, progress: Progress, time_budget: float = math.inf) -> bool:
        """Trains and returns whether the end was reached; saves every few minutes and where it stops."""
        deadline = time.monotonic() + time_budget
        task = progress.add_task("", total=self.total_steps, completed=self.step, info="")
        saved = mark = time.monotonic()
        for student in self.students:
            student.model.train()
        while self.step < self.total_steps:
            epoch, first = divmod(self.step, self.steps_per_epoch)
            order, size = self.order(epoch), self.recipe.size_at(epoch)
            for i in range(first, self.steps_per_epoch):
                self.train_step(order[i * self.recipe.batch_size : (i + 1) * self.recipe.batch_size], size)
                last = i + 1 == self.steps_per_epoch
                if not last and (i + 1) % READ_EVERY:
                    continue
                values = self.read_sums()
                now = time.monotonic()
                self.epoch_seconds += now - mark
                mark = now
                rate = (i + 1) * self.recipe.batch_size / self.epoch_seconds
                loss, top1 = (value / (i + 1) for value in values[0])
                info = f"epoch {epoch + 1}/{self.recipe.epochs}  loss {loss:.3f}  top-1 {100 * top1:.1f} %"
                progress.update(task, completed=self.step, info=f"{info}  {rate:.0f} images/s")
                if last:
                    self.end_epoch(epoch, size, values, rate, progress)
                stop = self.step < self.total_steps and self.should_stop(deadline)
                if stop or last or now - saved > CHECKPOINT_SECONDS:
                    self.save()
                    saved = mark = time.monotonic()
                if stop:
                    return False
        return True

    def end_epoch(self, epoch: int, size: int, values: list[list[float]], rate: float, progress: Progress) -> None:
        for student, (loss, top1) in zip(self.students, values, strict=True):
            row: dict[str, Any] = dict.fromkeys(LOG_FIELDS, "")
            row.update(epoch=epoch + 1, size=size, lr=student.optimizer.param_groups[0]["lr"])
            row.update(train_loss=loss / self.steps_per_epoch, train_top1=100 * top1 / self.steps_per_epoch)
            row.update(images_per_second=rate, seconds=self.epoch_seconds)
            if self.holdout is not None:
                result = evaluate(student.final_model(), self.holdout)
                student.model.train()
                row.update(holdout_loss=result.loss, holdout_top1=result.top1)
            student.log.append(row)
            student.sums.zero_()
            if self.rank == 0:
                student.write_logs()
                shown = {k: v for k, v in row.items() if v != ""}
                text = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())
                progress.console.print(f"{student.recipe.model}  {text}")
        self.epoch_seconds = 0.0

    def save(self) -> None:
        if self.rank == 0:
            state = {"students": [s.state_dict() for s in self.students], "epoch_seconds": self.epoch_seconds}
            save_checkpoint(self.out, self.step, {"step": self.step, **state})
        if self.world > 1:
            dist.barrier()

    def load(self) -> None:
        """Continues from the checkpoint in the output folder.

        Raises:
            ValueError: it is damaged or belongs to other recipes.
        """
        state = load_checkpoint(self.out, self.device)
        if len(state["students"]) != len(self.students):
            raise ValueError("the checkpoint was made with other recipes; choose another --out")
        for student, student_state in zip(self.students, state["students"], strict=True):
            student.load_state_dict(student_state)
        self.step, self.epoch_seconds = state["step"], state["epoch_seconds"]

    def finish(self) -> None:
        """Writes the finished weights: averages, with BatchNorm re-estimated if the recipe says so."""
        for student in self.students:
            model = student.final_model()
            if student.recipe.bn_batches:
                torch.optim.swa_utils.update_bn(self.plain_batches(student.recipe.bn_batches), model)
            mz.save_weights(model, student.out / "model.safetensors")
            if student.schedule is not None:
                sample = next(self.plain_batches(1))
                mz.check_equivalent(model.eval(), mz.condense(model).eval(), sample)

    def plain_batches(self, count: int) -> Iterator[torch.Tensor]:
        """Yields cropped and mirrored images without any other augmentation."""
        order = self.order(self.recipe.epochs)
        for i in range(min(count, self.steps_per_epoch)):
            self.seed(self.total_steps + i)
            indices = order[i * self.recipe.batch_size : (i + 1) * self.recipe.batch_size]
            images = crop_and_flip(self.images[indices], self.recipe.crop_padding, self.generator)
            yield preprocess(images, self.mean, self.std)


def keep_strided_depthwise_in_float32(model: nn.Module) -> None:
    """Takes depthwise convolutions with a stride out of autocast, in place.

    Their gradient by the input takes oneDNN many times longer in bfloat16 than in float32.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.groups == module.in_channels and module.stride[0] > 1:
            module.forward = functools.partial(_float32_forward, module)  # type: ignore[method-assign]


def _float32_forward(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return nn.Conv2d.forward(conv, x.float()).to(x.dtype)


def keep_freed_memory() -> None:
    """Lets glibc keep freed memory for the next step.

    By default every large tensor is mapped anew, and a step on the CPU spends much of its time on page faults.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return  # not glibc
    for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**28)):
        mallopt(parameter, value)


def initial_weights(source: str) -> Path:
    """Returns the file behind `init_from`.

    Raises:
        ValueError: neither a file nor a zoo model with weights.
    """
    if Path(source).is_file():
        return Path(source)
    try:
        return mz.pretrained.verified_file(mz.pretrained.default_entry(source))
    except RuntimeError as error:
        raise ValueError(f"init_from {source!r} is neither a file nor a model with weights: {error}") from error


def split_holdout(data: mz.data.ImageSet) -> tuple[mz.data.ImageSet, mz.data.ImageSet]:
    """Splits training images into those to train on and 50 per class to tune on, always the same ones."""
    generator = np.random.default_rng(HOLDOUT_SEED)
    held = np.zeros(len(data), dtype=bool)
    for label in range(len(data.classes)):
        held[generator.choice(np.flatnonzero(data.labels == label), HOLDOUT_PER_CLASS, replace=False)] = True
    return tuple(mz.data.ImageSet(data.images[m], data.labels[m], data.classes) for m in (~held, held))  # type: ignore


def check_writable(folder: Path, needed_bytes: int) -> None:
    """Finds a full disk or a folder that can't be written before training does.

    Raises:
        ValueError: with the reason.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with mz.files.atomic_write(folder / ".space") as file:
            os.posix_fallocate(file.fileno(), 0, needed_bytes)
        (folder / ".space").unlink()
    except OSError as error:
        needed = f"{needed_bytes / 2**20:.0f} MiB"
        raise ValueError(f"{folder} can't take {needed}: {error.strerror or error}; choose another --out") from error


def train(args: argparse.Namespace, console: Console) -> int:
    recipes = [load_recipe(path) for path in args.recipes]
    for field in SHARED_FIELDS:
        if len({str(getattr(recipe, field)) for recipe in recipes}) > 1:
            raise ValueError(f"recipes that train together must agree on {field}")
    if len({recipe.model for recipe in recipes}) < len(recipes):
        raise ValueError("recipes that train together must have different models")
    checkpoint = args.out / INDEX
    if checkpoint.exists() and not args.resume:
        raise ValueError(f"{checkpoint} exists; add --resume to go on, or choose another --out")

    device = torch.device(args.device)
    if device.type == "cpu":
        keep_freed_memory()
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
    data, holdout = mz.data.load_images(args.data, "train"), None
    if args.holdout:
        data, holdout = split_holdout(data)
    trainer = Trainer(recipes, data, holdout, device, args.out, args.compile)
    if trainer.rank == 0:
        # Weights, average and momentum of every student, old and new checkpoint at once.
        size = sum(p.numel() * p.element_size() for s in trainer.students for p in s.model.parameters())
        for folder in {args.out, *(student.out for student in trainer.students)}:
            check_writable(folder, 6 * size + 2**20)
        with mz.files.atomic_write(args.out / "run.json", "w") as file:
            file.write(json.dumps(environment(str(device)), indent=2) + "\n")
    if checkpoint.exists():
        trainer.load()

    def on_sigterm(*_: Any) -> None:
        trainer.stop_reason = "SIGTERM"

    signal.signal(signal.SIGTERM, on_sigterm)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[info]}"))
    with Progress(*columns, console=console, disable=trainer.rank > 0) as progress:
        finished = trainer.run(progress, args.time_budget)
    if finished and trainer.rank == 0:
        trainer.finish()
    if not finished and trainer.rank == 0:
        done = f"{trainer.step} of {trainer.total_steps} steps"
        console.print(f"stopped by {trainer.stop_reason} after {done}; the same command with --resume goes on")
    if dist.is_initialized():
        dist.destroy_process_group()
    return 143 if trainer.stop_reason == "SIGTERM" else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipes", type=Path, nargs="+", metavar="RECIPE.toml")
    parser.add_argument("--data", required=True, help="CIFAR-100 or CIFAR-10: Parquet folder, torchvision root, Hub id")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint, logs and weights")
    parser.add_argument("--resume", action="store_true", help="go on from --out's checkpoint if there is one")
    parser.add_argument("--time-budget", type=float, default=math.inf, metavar="SECONDS", help="stop, resumable, then")
    parser.add_argument("--holdout", action="store_true", help="train on 45,000 images, report on the other 5,000")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="compile the networks with torch.compile")
    args = parser.parse_args(argv)
    try:
        return train(args, Console(stderr=True))
    except (ValueError, OSError, FloatingPointError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
