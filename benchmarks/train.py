"""Trains models from recipes.

    python benchmarks/train.py RECIPE.toml [RECIPE.toml ...] --data DIR --out DIR [--resume]

The folder given by --out receives, per model, DIR/NAME.TAG/ with `run.json` (recipe, hardware and versions), `log.csv`
(a row per epoch: losses, accuracies, the largest weights and variances, the share of dead channels), `masks.json`
(masks and Hoyer index of learned group convolutions at each pruning stage) and, at the end, `model.safetensors` (the
weights to measure with benchmarks/evaluate.py), and for all of them `checkpoint.pt`. With one recipe everything lies in
DIR. Several recipes see the same batches; on a GPU they fill one another's gaps. Test images are never read.
"""

import argparse
import csv
import dataclasses
import math
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import environment
from rich.progress import Progress
from soft_labels import SoftLabels, Teacher
from torch import nn
from torch.nn import functional as F
from training.augment import count_views, crop_and_mirror, cutmix_box, resize
from training.recipe import RUNS, SHARED_FIELDS, Recipe, load_recipe
from training.student import Student, health

import mobilenets_zoo as mz
from mobilenets_zoo.evaluation import preprocess
from mobilenets_zoo.utils import keep_freed_memory, progress_bar

CHECKPOINT = "checkpoint.pt"
CHECKPOINT_SECONDS = 180
HEALTH_IMAGES = 1500  # training images that tell which channels are dead
READ_EVERY = 20  # steps between reads of loss and accuracy from a GPU, which stall it
EAGER_STEPS = 3  # before a CUDA graph is captured: libraries choose their kernels, optimisers make their state


class Plan:
    """All that is random in an epoch: order and views of the images, and CutMix's rectangles.

    It follows from the recipe's seed and the epoch's number alone, so a resumed run sees what the uninterrupted one
    would have seen.
    """

    def __init__(self, trainer: "Trainer", epoch: int):
        recipe, labels, steps = trainer.recipe, trainer.soft_labels, trainer.steps_per_epoch
        generator = np.random.default_rng((recipe.seed, epoch))
        images, pixels = trainer.images.shape[:2]
        self.order = torch.from_numpy(generator.permutation(images)).to(trainer.device)
        views = count_views(recipe.crop_padding) if labels is None else labels.views.shape[1]
        self.views = torch.from_numpy(generator.integers(views, size=images)).to(trainer.device)
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
        resumed: bool = False,
    ):
        """`resumed` leaves out what `load` replaces anyway: the start from other weights."""
        self.recipe, self.holdout, self.device, self.out = recipes[0], holdout, device, out
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # streams and graphs are those of the current one
        self.images = torch.from_numpy(data.images).to(device)
        self.labels = torch.from_numpy(data.labels).to(device)
        self.num_classes = len(data.classes)
        # What a checkpoint must share with the run that goes on from it.
        self.identity = {"recipes": [dataclasses.asdict(recipe) for recipe in recipes], "images": data.sha256()}
        self.steps_per_epoch = len(data) // self.recipe.batch_size
        if not self.steps_per_epoch:
            raise ValueError(f"batch_size {self.recipe.batch_size} is larger than the {len(data)} training images")
        self.total_steps = self.recipe.epochs * self.steps_per_epoch
        self.soft_labels = soft_labels.to(device) if soft_labels is not None else None
        self.teacher = load_teacher(self.recipe, self.num_classes, device) if self.recipe.teacher else None
        self.students = []
        for recipe in recipes:
            folder = out if len(recipes) == 1 else out / recipe.name
            args = recipe, self.num_classes, self.total_steps, device, folder, self.images, resumed
            self.students.append(Student(*args))
        cfgs: list[Any] = [student.model.pretrained_cfg for student in self.students]
        self.mean, self.std = cfgs[0]["mean"], cfgs[0]["std"]
        if any((cfg["mean"], cfg["std"]) != (self.mean, self.std) for cfg in cfgs):
            raise ValueError("models that train together must take images of the same mean and standard deviation")
        self.graph = Graph(self.students) if all(student.capturable for student in self.students) else None
        self.step = 0  # optimiser steps done
        self.epoch_seconds = 0.0
        self.stop_reason = ""

    def batch(self, plan: Plan, i: int, size: int, taught: bool = True) -> list[torch.Tensor]:
        """Returns the plan's batch i: images (B, 3, size, size), hard and, where a teacher is, soft targets."""
        recipe, part = self.recipe, slice(i * self.recipe.batch_size, (i + 1) * self.recipe.batch_size)
        indices, views = plan.order[part], plan.views[part]
        targets = [F.one_hot(self.labels[indices], self.num_classes).float()]
        if self.soft_labels is not None:
            targets.append(self.soft_labels.targets(indices, views, recipe.temperature))
            views = self.soft_labels.views[indices, views]
        seen = crop_and_mirror(self.images[indices], views, recipe.crop_padding)
        box = plan.boxes[i]
        if box is not None:  # each image gets a rectangle of the one at the mirrored place in the batch
            rows, columns = box
            seen[:, rows, columns] = seen[:, rows, columns].flip(0)
            share = (rows.stop - rows.start) * (columns.stop - columns.start) / seen[0, :, :, 0].numel()
            targets = [torch.lerp(target, target.flip(0), share) for target in targets]
        if taught and self.teacher is not None:
            targets.append(self.teacher(seen, recipe.temperature))
        return [resize(preprocess(seen, self.mean, self.std), size), *targets]

    def train_step(self, plan: Plan, i: int, size: int) -> None:
        """Takes one optimiser step of every student."""
        inputs = self.batch(plan, i, size)
        for student in self.students:
            student.prepare(self.step, self.steps_per_epoch)
        if self.graph is not None:
            self.graph.step(inputs)
        else:
            for student in self.students:
                student.update(*inputs)
        for student in self.students:
            student.average.update(student.model, step=self.step + 1)  # timm counts steps from 1
        self.step += 1

    def read_sums(self) -> list[list[float]]:
        """Returns every student's summed loss and accuracy of this epoch; raises where a loss isn't a number."""
        values = torch.stack([student.sums for student in self.students]).tolist()
        for student, (loss, _) in zip(self.students, values, strict=True):
            if not math.isfinite(loss):
                reason = f"the loss is not finite by step {self.step}"
                raise FloatingPointError(f"{student.recipe.name}: {reason}; lower lr or set precision = 'fp32'")
        return values

    def run(self, progress: Progress, time_budget: float = math.inf) -> bool:
        """Trains and returns whether the end was reached; saves every few minutes and where it stops."""
        deadline = time.monotonic() + time_budget
        task = progress.add_task("", total=self.total_steps, completed=self.step)
        saved = mark = time.monotonic()
        for student in self.students:
            student.model.train()
        while self.step < self.total_steps:
            epoch, first = divmod(self.step, self.steps_per_epoch)
            plan = Plan(self, epoch)
            size = self.recipe.size_at(epoch)
            for i in range(first, self.steps_per_epoch):
                self.train_step(plan, i, size)
                last = i + 1 == self.steps_per_epoch
                if self.device.type == "cuda" and not last and (i + 1) % READ_EVERY:
                    continue
                values = self.read_sums()
                now = time.monotonic()
                self.epoch_seconds += now - mark
                mark = now
                rate = (i + 1) * self.recipe.batch_size / self.epoch_seconds
                loss, top1 = (value / (i + 1) for value in values[0])
                info = f"epoch {epoch + 1}/{self.recipe.epochs}  loss {loss:.3f}  top-1 {100 * top1:.1f} %"
                progress.update(task, completed=self.step, description=f"{info}  {rate:.0f} images/s")
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
            row: dict[str, float] = dict(epoch=epoch + 1, size=size)
            row.update(lr=float(student.optimizer.param_groups[0]["lr"]))
            row.update(train_loss=loss / self.steps_per_epoch, train_top1=100 * top1 / self.steps_per_epoch)
            batches = (self.pixels(images) for images in self.images[:HEALTH_IMAGES].split(250))
            row.update(health(student.average.module, batches))
            row.update(images_per_second=rate, seconds=self.epoch_seconds)
            if self.holdout is not None:
                holdout_loss, holdout_top1 = self.measure(student.average.module, self.holdout)
                row.update(holdout_loss=holdout_loss, holdout_top1=holdout_top1)
            student.log.append(row)
            student.sums.zero_()
            student.write_logs()
            text = "  ".join(f"{name} {value:.4g}" for name, value in row.items())
            progress.console.print(f"{student.recipe.model}  {text}")
        self.epoch_seconds = 0.0

    @torch.inference_mode()
    def measure(self, model: nn.Module, data: mz.data.ImageSet) -> tuple[float, float]:
        """Returns loss and top-1 percentage at the final resolution."""
        logits = []
        for images in torch.from_numpy(data.images).split(250):
            logits.append(model(self.pixels(images.to(self.device))).cpu())
        scores, labels = torch.cat(logits), torch.from_numpy(data.labels)
        return F.cross_entropy(scores, labels).item(), 100 * (scores.argmax(1) == labels).double().mean().item()

    def pixels(self, images: torch.Tensor) -> torch.Tensor:
        """Returns uint8 images (N, H, W, 3) as the networks are measured with, (N, 3, size, size)."""
        return resize(preprocess(images, self.mean, self.std), self.recipe.sizes[-1][1])

    def save(self) -> None:
        """Writes the checkpoint, whole or not at all."""
        state = {**self.identity, "step": self.step, "epoch_seconds": self.epoch_seconds}
        with mz.utils.atomic_write(self.out / CHECKPOINT) as file:
            torch.save({**state, "students": [student.state_dict() for student in self.students]}, file)

    def load(self) -> None:
        """Continues from the checkpoint; ValueError where it is damaged or was made with other recipes or images."""
        path = self.out / CHECKPOINT
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
        except Exception as error:  # zip, pickle and OS errors, by what is damaged
            raise ValueError(f"{path} can't be read ({error}): start in another --out") from error
        if different := [key for key, value in self.identity.items() if state[key] != value]:
            remedy = "repeat its --data and --holdout, and its recipes, or choose another --out"
            raise ValueError(f"{path} was made with other {' and '.join(different)}; {remedy}")
        for student, student_state in zip(self.students, state["students"], strict=True):
            student.load_state_dict(student_state)
        self.step, self.epoch_seconds = state["step"], state["epoch_seconds"]

    def finish(self) -> None:
        """Writes the finished weights, with BatchNorm's statistics re-estimated where the recipe says so."""
        plan = Plan(self, self.recipe.epochs)
        plan.boxes = [None] * self.steps_per_epoch  # cropped and mirrored, no other augmentation
        for student in self.students:
            model, steps = student.average.module, min(student.recipe.bn_batches, self.steps_per_epoch)
            if steps:
                batches = (self.batch(plan, i, self.recipe.sizes[-1][1], taught=False)[0] for i in range(steps))
                torch.optim.swa_utils.update_bn(batches, model)
            mz.save_weights(model, student.out / "model.safetensors")


class Graph:
    """A step of all students as one CUDA graph per image size; each student's kernels run on a stream of its own.

    The first steps of a size run eagerly. What a step reads, images, targets, masks and learning rates, lies in the
    same memory at every step.
    """

    def __init__(self, students: list[Student]):
        self.students = students
        self.streams = [torch.cuda.Stream() for _ in students]
        self.inputs: list[torch.Tensor] = []
        self.graph: torch.cuda.CUDAGraph | None = None
        self.eager_steps = 0

    def step(self, inputs: list[torch.Tensor]) -> None:
        """Takes a step with the tensors of `Trainer.batch`."""
        if [tensor.shape for tensor in inputs] != [tensor.shape for tensor in self.inputs]:
            self.inputs = [tensor.clone() for tensor in inputs]
            self.graph, self.eager_steps = None, 0
        for kept, tensor in zip(self.inputs, inputs, strict=True):
            kept.copy_(tensor)
        if self.graph is None and self.eager_steps < EAGER_STEPS:
            self._update()
            self.eager_steps += 1
            return
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._update()
        self.graph.replay()

    def _update(self) -> None:
        main = torch.cuda.current_stream()
        for student, stream in zip(self.students, self.streams, strict=True):
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                student.update(*self.inputs)
        for stream in self.streams:
            main.wait_stream(stream)


def load_teacher(recipe: Recipe, num_classes: int, device: torch.device) -> Teacher:
    """Returns the network that labels the recipe's batches; ValueError where its run isn't there."""
    run = RUNS.parent / recipe.teacher
    return Teacher(load_recipe(run / "recipe.toml"), run, num_classes, device)


def load_soft_labels(recipe: Recipe, data: mz.data.ImageSet) -> SoftLabels:
    """Returns the recipe's soft labels; ValueError where there are none for these images and crops."""
    path = RUNS.parent / recipe.soft_labels
    labels = SoftLabels.load(path)
    if labels.info["padding"] != recipe.crop_padding:
        raise ValueError(f"{path} has views of crop_padding {labels.info['padding']}, not {recipe.crop_padding}")
    if labels.info["data_sha256"] != data.sha256():
        raise ValueError(f"{path} belongs to other images: recompute it with soft_labels.py")
    return labels


def held_out(labels: np.ndarray, parts: int = 10, seed: int = 100) -> np.ndarray:
    """Returns a mask (N,) of one image in `parts` of each class, at least one, always the same ones."""
    generator = np.random.default_rng(seed)
    held = np.zeros(len(labels), dtype=bool)
    for label in range(int(labels.max()) + 1):
        members = np.flatnonzero(labels == label)
        held[generator.choice(members, max(1, len(members) // parts), replace=False)] = True
    return held


def knows_held_out(recipe: Recipe) -> bool:
    """Returns whether the weights that the recipe starts from may have been trained on the images of `held_out`."""
    if not recipe.init_from or recipe.pretraining:
        return False
    run = RUNS / recipe.init_from
    if recipe.init_from in mz.manifest() or not (run / "log.csv").exists():
        return run.exists()
    with open(run / "log.csv", newline="") as file:
        return not all(epoch.get("holdout_top1") for epoch in csv.DictReader(file))


def train(args: argparse.Namespace) -> int:
    begun = time.monotonic()
    recipes = [load_recipe(path) for path in args.recipes]
    for field in SHARED_FIELDS:
        if len({getattr(recipe, field) for recipe in recipes}) > 1:
            raise ValueError(f"recipes that train together must agree on {field}")
    if len({recipe.name for recipe in recipes}) < len(recipes):
        raise ValueError("recipes that train together must differ in model or tag")
    checkpoint = args.out / CHECKPOINT
    if checkpoint.exists() and not args.resume:
        raise ValueError(f"{checkpoint} exists; add --resume to go on, or choose another --out")

    try:
        device = torch.ones(1, device=args.device, dtype=torch.float64).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"--device {args.device} can't be used ({error}); choose cpu or cuda") from error
    data, holdout = mz.data.load_images(args.data, "train"), None
    labels = load_soft_labels(recipes[0], data) if recipes[0].soft_labels else None
    if args.holdout:
        if seen := sorted({recipe.init_from for recipe in recipes if knows_held_out(recipe)}):
            remedy = "train its recipe with --holdout under a tag of its own, and start from that"
            raise ValueError(f"--holdout: {seen[0]}, which init_from names, may know those images; {remedy}")
        held = held_out(data.labels)
        data, holdout = data.subset(~held), data.subset(held)
        labels = labels.subset(~held) if labels is not None else None
    trainer = Trainer(recipes, data, labels, holdout, device, args.out, resumed=checkpoint.exists())
    if checkpoint.exists():
        trainer.load()
    for student in trainer.students:
        student.out.mkdir(parents=True, exist_ok=True)
        if trainer.step < trainer.total_steps:  # else nothing is left to train on this machine
            run = {**environment(str(device)), "together": len(recipes), "recipe": dataclasses.asdict(student.recipe)}
            mz.utils.write_json(student.out / "run.json", run)
    trainer.save()  # what can't be written shows before the training

    def on_sigterm(*_: Any) -> None:
        trainer.stop_reason = "SIGTERM"

    signal.signal(signal.SIGTERM, on_sigterm)
    with progress_bar() as progress:
        finished = trainer.run(progress, args.time_budget - (time.monotonic() - begun))
    if finished:
        trainer.finish()
    else:
        done = f"{trainer.step} of {trainer.total_steps} steps"
        progress.console.print(f"stopped by {trainer.stop_reason} after {done}; the same command with --resume goes on")
    return 143 if trainer.stop_reason == "SIGTERM" else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipes", type=Path, nargs="+", metavar="RECIPE.toml")
    parser.add_argument("--data", required=True, help="CIFAR-100 or CIFAR-10: Parquet folder, torchvision root, Hub id")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint, logs and weights")
    parser.add_argument("--resume", action="store_true", help="go on from --out's checkpoint if there is one")
    help_budget = "stop, resumable, so long after the command was given, but for what it imports"
    parser.add_argument("--time-budget", type=float, default=math.inf, metavar="SECONDS", help=help_budget)
    parser.add_argument("--holdout", action="store_true", help="train on 45,000 images, report on the other 5,000")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    keep_freed_memory()
    try:
        return train(args)
    except OSError as error:
        message = f"{args.out} can't be written ({error.strerror or error}); make room or choose another --out"
    except (ValueError, FloatingPointError) as error:
        message = " ".join(str(error).split())
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
