"""Trains models from recipes.

    python benchmarks/train.py RECIPE.toml [RECIPE.toml ...] --data DIR --out DIR [--resume]

The folder given by --out receives, per model, DIR/NAME.TAG/ with `log.csv` (a row per epoch), `masks.json` (masks and
Hoyer index of learned group convolutions at each pruning stage) and, at the end, `model.safetensors` (the weights to
measure with benchmarks/evaluate.py), and for all of them `checkpoint.pt` and `run.json` (hardware and versions). With
one recipe everything lies in DIR itself. Several recipes see the same batches; on a GPU they fill one another's gaps.
Test images are never read.
"""

import argparse
import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring.environment import environment
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.nn import functional as F
from training.augment import count_views, crop_and_mirror, cutmix_box, resize
from training.checkpoint import CHECKPOINT, load_checkpoint, save_checkpoint
from training.cpu import keep_freed_memory
from training.holdout import held_out
from training.recipe import SHARED_FIELDS, Recipe, load_recipe
from training.soft_labels import SoftLabels
from training.student import LOG_FIELDS, Student

import mobilenets_zoo as mz
from mobilenets_zoo.evaluation import evaluate, preprocess

BENCHMARKS = Path(__file__).resolve().parent
CHECKPOINT_SECONDS = 180
READ_EVERY = 20  # steps between reads of loss and accuracy from the device, which stall a GPU
EAGER_STEPS = 3  # before a CUDA graph is captured: libraries choose their kernels, optimisers make their state
HOLDOUT_PARTS, HOLDOUT_SEED = 10, 100  # 5,000 of CIFAR-100's training images


class Plan:
    """All that is random in an epoch: order and views of the images, and CutMix's rectangles.

    It follows from the recipe's seed and the epoch's number alone, so a resumed run sees what the uninterrupted one
    would have seen.
    """

    def __init__(
        self, recipe: Recipe, epoch: int, data: mz.data.ImageSet, labels: SoftLabels | None, device: torch.device
    ):
        generator = np.random.default_rng((recipe.seed, epoch))
        images, pixels = len(data), data.images.shape[1]
        self.order = torch.from_numpy(generator.permutation(images)).to(device)
        views = count_views(recipe.crop_padding) if labels is None else labels.views.shape[1]
        self.views = torch.from_numpy(generator.integers(views, size=images)).to(device)
        steps = images // recipe.batch_size
        boxes = [cutmix_box(generator, pixels) for _ in range(steps)]
        mixed = generator.random(steps) < recipe.cutmix
        self.boxes = [box if mix else None for box, mix in zip(boxes, mixed, strict=True)]


class Trainer:
    """Students that see the same batches, with what is needed to stop at any step and go on bit by bit."""

    def __init__(
        self,
        recipes: list[Recipe],
        data: mz.data.ImageSet,
        soft_labels: SoftLabels | None,
        holdout: mz.data.ImageSet | None,
        device: torch.device,
        out: Path,
    ):
        self.recipe, self.data, self.holdout, self.device, self.out = recipes[0], data, holdout, device, out
        self.images = torch.from_numpy(data.images).to(device)
        self.labels = torch.from_numpy(data.labels).to(device)
        self.num_classes = len(data.classes)
        self.steps_per_epoch = len(data) // self.recipe.batch_size
        if not self.steps_per_epoch:
            raise ValueError(f"batch_size {self.recipe.batch_size} is larger than the {len(data)} training images")
        self.total_steps = self.recipe.epochs * self.steps_per_epoch
        self.soft_labels = soft_labels.to(device) if soft_labels is not None else None
        self.students = []
        for recipe in recipes:
            folder = out if len(recipes) == 1 else out / f"{recipe.model}.{recipe.tag}"
            self.students.append(Student(recipe, self.num_classes, self.total_steps, device, folder))
        cfg: dict[str, Any] = self.students[0].model.pretrained_cfg  # type: ignore[assignment]
        self.mean, self.std = cfg["mean"], cfg["std"]
        self.graph: Graph | None = None
        if all(student.capturable for student in self.students):
            self.graph = Graph(self.students)
        self.step = 0  # optimiser steps done
        self.epoch_seconds = 0.0
        self.stop_reason = ""

    def batch(self, plan: Plan, i: int, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Returns the plan's batch i: images (B, 3, size, size), hard and, where a teacher is, soft targets."""
        recipe, part = self.recipe, slice(i * self.recipe.batch_size, (i + 1) * self.recipe.batch_size)
        indices, views = plan.order[part], plan.views[part]
        soft = None
        if self.soft_labels is not None:
            soft = self.soft_labels.targets(indices, views, recipe.temperature)
            views = self.soft_labels.views[indices, views]
        pixels = preprocess(crop_and_mirror(self.images[indices], views, recipe.crop_padding), self.mean, self.std)
        hard = F.one_hot(self.labels[indices], self.num_classes).float()
        box = plan.boxes[i]
        if box is not None:  # each image gets a rectangle of the one at the mirrored place in the batch
            rows, columns = box
            pixels[:, :, rows, columns] = pixels[:, :, rows, columns].flip(0)
            share = (rows.stop - rows.start) * (columns.stop - columns.start) / pixels[0, 0].numel()
            hard = torch.lerp(hard, hard.flip(0), share)
            soft = torch.lerp(soft, soft.flip(0), share) if soft is not None else None
        return resize(pixels, size), hard, soft

    def train_step(self, plan: Plan, i: int, size: int) -> None:
        """Takes one optimiser step of every student."""
        images, hard, soft = self.batch(plan, i, size)
        for student in self.students:
            student.prepare(self.step, self.steps_per_epoch)
        if self.graph is not None:
            self.graph.step(images, hard, soft)
        else:
            for student in self.students:
                student.update(images, hard, soft)
        for student in self.students:
            if student.average is not None:
                student.average.update(self.step)
        self.step += 1

    def read_sums(self) -> list[list[float]]:
        """Returns every student's summed loss and accuracy of this epoch.

        Raises:
            FloatingPointError: a loss isn't a number.
        """
        values = torch.stack([student.sums for student in self.students]).tolist()
        for student, (loss, _) in zip(self.students, values, strict=True):
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"{student.recipe.model}: the loss is not finite by step {self.step}; the last checkpoint is from "
                    "before; lower lr or set precision = 'fp32' in the recipe"
                )
        return values

    def run(self, progress: Progress, time_budget: float = math.inf) -> bool:
        """Trains and returns whether the end was reached; saves every few minutes and where it stops."""
        deadline = time.monotonic() + time_budget
        task = progress.add_task("", total=self.total_steps, completed=self.step, info="")
        saved = mark = time.monotonic()
        for student in self.students:
            student.model.train()
        while self.step < self.total_steps:
            epoch, first = divmod(self.step, self.steps_per_epoch)
            plan = Plan(self.recipe, epoch, self.data, self.soft_labels, self.device)
            size = self.recipe.size_at(epoch)
            for i in range(first, self.steps_per_epoch):
                self.train_step(plan, i, size)
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
                    mark = time.monotonic()
                if time.monotonic() > deadline:
                    self.stop_reason = self.stop_reason or "time budget"
                stop = bool(self.stop_reason) and self.step < self.total_steps
                if stop or time.monotonic() - saved > CHECKPOINT_SECONDS:
                    self.save()
                    saved = mark = time.monotonic()
                if stop:
                    return False
        self.save()
        return True

    def end_epoch(self, epoch: int, size: int, values: list[list[float]], rate: float, progress: Progress) -> None:
        for student, (loss, top1) in zip(self.students, values, strict=True):
            row: dict[str, Any] = dict.fromkeys(LOG_FIELDS, "")
            row.update(epoch=epoch + 1, size=size, lr=float(student.optimizer.param_groups[0]["lr"]))
            row.update(train_loss=loss / self.steps_per_epoch, train_top1=100 * top1 / self.steps_per_epoch)
            row.update(images_per_second=rate, seconds=self.epoch_seconds)
            if self.device.type == "cpu":
                row.update(images_per_second_per_core=rate / torch.get_num_threads())
            if self.holdout is not None:
                network = Resized(student.final_model(), self.recipe.sizes[-1][1], self.images.shape[1])
                result = evaluate(network, self.holdout)
                student.model.train()
                row.update(holdout_loss=result.loss, holdout_top1=result.top1)
            student.log.append(row)
            student.sums.zero_()
            student.write_logs()
            shown = {k: v for k, v in row.items() if v != ""}
            text = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())
            progress.console.print(f"{student.recipe.model}  {text}")
        self.epoch_seconds = 0.0

    def save(self) -> None:
        state = {"students": [s.state_dict() for s in self.students], "epoch_seconds": self.epoch_seconds}
        save_checkpoint(self.out, {"step": self.step, **state})

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
        for student in self.students:  # last, so that no finished weight is lost to another's failure
            if student.schedule is not None:
                model = student.final_model().cpu().eval()  # a GPU's convolutions may round to TF32
                mz.check_equivalent(model, mz.condense(model).eval(), next(self.plain_batches(1)).cpu())

    def plain_batches(self, count: int) -> Iterator[torch.Tensor]:
        """Yields cropped and mirrored images without any other augmentation, at the final resolution."""
        plan = Plan(self.recipe, self.recipe.epochs, self.data, self.soft_labels, self.device)
        plan.boxes = [None] * len(plan.boxes)
        for i in range(min(count, self.steps_per_epoch)):
            yield self.batch(plan, i, self.recipe.sizes[-1][1])[0]


class Graph:
    """A step of all students as one CUDA graph per image size; each student's kernels run on a stream of its own.

    The first steps of a size run eagerly. What a step reads, images, targets, masks and learning rates, lies in the
    same memory at every step.
    """

    def __init__(self, students: list[Student]):
        self.students = students
        self.streams = [torch.cuda.Stream() for _ in students]
        self.inputs: list[torch.Tensor | None] = []
        self.graph: torch.cuda.CUDAGraph | None = None
        self.eager_steps = 0

    def step(self, *inputs: torch.Tensor | None) -> None:
        """Takes a step with images, hard and soft targets."""
        if [t if t is None else t.shape for t in inputs] != [t if t is None else t.shape for t in self.inputs]:
            self.inputs = [None if tensor is None else tensor.clone() for tensor in inputs]
            self.graph, self.eager_steps = None, 0
        for kept, tensor in zip(self.inputs, inputs, strict=True):
            if kept is not None and tensor is not None:
                kept.copy_(tensor)
        if self.graph is None and self.eager_steps < EAGER_STEPS:
            self._update()
            self.eager_steps += 1
            return
        if self.graph is None:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._update()
        self.graph.replay()

    def _update(self) -> None:
        main = torch.cuda.current_stream()
        for student, stream in zip(self.students, self.streams, strict=True):
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                student.update(*self.inputs)  # type: ignore[arg-type]
        for stream in self.streams:
            main.wait_stream(stream)


class Resized(nn.Module):
    """A network behind the resizing of its images, for measuring at another resolution than the data's."""

    def __init__(self, model: nn.Module, size: int, pixels: int):
        super().__init__()
        self.model, self.size = model, size
        self.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, pixels, pixels)}  # type: ignore[dict-item]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(resize(images, self.size))


def load_soft_labels(recipe: Recipe, data: mz.data.ImageSet) -> SoftLabels:
    """Returns the recipe's soft labels, of the images at hand.

    Raises:
        ValueError: no such file, or it belongs to other images or other crops.
    """
    path = BENCHMARKS / recipe.soft_labels
    labels = SoftLabels.load(path)
    if labels.info["padding"] != recipe.crop_padding:
        raise ValueError(f"{path} has views of crop_padding {labels.info['padding']}, not {recipe.crop_padding}")
    if labels.info["data_sha256"] == data.sha256():
        return labels
    raise ValueError(f"{path} belongs to other images: recompute it with soft_labels.py")


def check_writable(folder: Path, needed_bytes: int) -> None:
    """Finds a full disk or a folder that can't be written before training does.

    Raises:
        ValueError: with the reason.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with mz.files.atomic_write(folder / ".space") as file:
            file.write(bytes(needed_bytes))
        (folder / ".space").unlink()
    except OSError as error:
        needed = f"{needed_bytes / 2**20:.0f} MiB"
        raise ValueError(f"{folder} can't take {needed}: {error.strerror or error}; choose another --out") from error


def train(args: argparse.Namespace, console: Console) -> int:
    recipes = [load_recipe(path) for path in args.recipes]
    for field in SHARED_FIELDS:
        if len({str(getattr(recipe, field)) for recipe in recipes}) > 1:
            raise ValueError(f"recipes that train together must agree on {field}")
    if len({(recipe.model, recipe.tag) for recipe in recipes}) < len(recipes):
        raise ValueError("recipes that train together must differ in model or tag")
    checkpoint = args.out / CHECKPOINT
    if checkpoint.exists() and not args.resume:
        raise ValueError(f"{checkpoint} exists; add --resume to go on, or choose another --out")

    device = torch.device(args.device)
    if device.type == "cpu":
        keep_freed_memory()
    data, holdout = mz.data.load_images(args.data, "train"), None
    labels = load_soft_labels(recipes[0], data) if recipes[0].soft_labels else None
    if args.holdout:
        held = held_out(data.labels, HOLDOUT_PARTS, HOLDOUT_SEED)
        data, holdout = data.subset(~held), data.subset(held)
        labels = labels.subset(~held) if labels is not None else None
    trainer = Trainer(recipes, data, labels, holdout, device, args.out)
    # Weights, average and momentum of every student, old and new checkpoint at once.
    size = sum(p.numel() * p.element_size() for s in trainer.students for p in s.model.parameters())
    for folder in {args.out, *(student.out for student in trainer.students)}:
        check_writable(folder, 6 * size + 2**20)
    with mz.files.atomic_write(args.out / "run.json", "w") as file:
        file.write(json.dumps({**environment(str(device)), "together": len(recipes)}, indent=2) + "\n")
    if checkpoint.exists():
        trainer.load()

    def on_sigterm(*_: Any) -> None:
        trainer.stop_reason = "SIGTERM"

    signal.signal(signal.SIGTERM, on_sigterm)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[info]}"))
    with Progress(*columns, console=console) as progress:
        finished = trainer.run(progress, args.time_budget)
    if finished:
        trainer.finish()
    else:
        done = f"{trainer.step} of {trainer.total_steps} steps"
        console.print(f"stopped by {trainer.stop_reason} after {done}; the same command with --resume goes on")
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
    args = parser.parse_args(argv)
    try:
        return train(args, Console(stderr=True))
    except (ValueError, OSError, FloatingPointError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
