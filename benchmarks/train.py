"""Trains one model from a recipe.

    python benchmarks/train.py benchmarks/recipes/NAME.toml --data DIR --out DIR [--resume]

The folder given by --out receives `checkpoint.pt` (everything a resumed run needs), `log.csv` (a row per epoch),
`run.json` (hardware and versions) and, at the end, `model.safetensors` (the weights to measure with
benchmarks/evaluate.py). Test images are never read.
"""

import argparse
import csv
import dataclasses
import json
import sys
import time
from pathlib import Path

import timm
import torch
from augment import crop_and_flip, resize
from environment import environment
from recipe import Recipe, load_recipe
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch.nn import functional as F

import mobilenets_zoo as mz
from mobilenets_zoo.evaluation import preprocess

CHECKPOINT_SECONDS = 180
LOG_FIELDS = ("epoch", "size", "lr", "train_loss", "train_top1", "images_per_second", "seconds")


class Trainer:
    """Model, optimiser and average of one run, with what is needed to stop and go on bit by bit.

    Every step seeds its own generator from the recipe's seed and the step's number, so a resumed run draws what the
    uninterrupted one would have drawn.
    """

    def __init__(self, recipe: Recipe, data: mz.data.ImageSet, device: torch.device, out: Path):
        self.recipe, self.device, self.out = recipe, device, out
        self.images = torch.from_numpy(data.images).to(device)
        self.labels = torch.from_numpy(data.labels).to(device)
        self.steps_per_epoch = len(data) // recipe.batch_size

        torch.manual_seed(recipe.seed)
        model = timm.create_model(recipe.model, num_classes=len(data.classes), **recipe.model_args)
        self.model = model.to(device, memory_format=torch.channels_last)
        self.ema = ModelEmaV3(self.model, decay=recipe.ema_decay, use_warmup=True) if recipe.ema_decay else None
        self.optimizer = create_optimizer_v2(
            self.model, "nesterov", lr=recipe.lr, weight_decay=recipe.weight_decay, momentum=recipe.momentum
        )
        self.scheduler = CosineLRScheduler(
            self.optimizer,
            t_initial=recipe.epochs * self.steps_per_epoch,
            warmup_t=int(recipe.warmup_epochs * self.steps_per_epoch),
            warmup_lr_init=recipe.lr / 100,
            warmup_prefix=False,
            t_in_epochs=False,
        )
        self.generator = torch.Generator(device=device)
        self.step = 0  # optimiser steps done
        self.epoch_sums = {"loss": 0.0, "correct": 0.0, "seconds": 0.0}
        self.log: list[dict[str, float]] = []

    @property
    def total_steps(self) -> int:
        return self.recipe.epochs * self.steps_per_epoch

    def order(self, epoch: int) -> torch.Tensor:
        """Returns the order in which an epoch visits the images."""
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.labels), generator=generator)

    def batch(self, indices: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        cfg = self.model.pretrained_cfg
        images = crop_and_flip(self.images[indices], self.recipe.crop_padding, self.generator)
        return resize(preprocess(images, cfg["mean"], cfg["std"]), size), self.labels[indices]

    def train_step(self, indices: torch.Tensor, size: int) -> tuple[float, float]:
        """Takes one optimiser step and returns the batch's mean loss and number of correct predictions."""
        seed = self.recipe.seed * 1_000_003 + self.step
        self.generator.manual_seed(seed)
        torch.manual_seed(seed)
        images, labels = self.batch(indices, size)
        self.scheduler.step_update(self.step)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            logits = self.model(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.recipe.label_smoothing)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.model, step=self.step)
        value = loss.item()
        if value != value:
            raise FloatingPointError(
                f"the loss is not a number at step {self.step}; lower lr or set precision = 'fp32' in the recipe"
            )
        return value, (logits.argmax(1) == labels).sum().item()

    def run(self, progress: Progress) -> None:
        """Trains to the end, saving every few minutes."""
        self.model.train()
        task = progress.add_task(self.recipe.model, total=self.total_steps, completed=self.step, info="")
        saved = time.monotonic()
        while self.step < self.total_steps:
            epoch, first = divmod(self.step, self.steps_per_epoch)
            order, size = self.order(epoch).to(self.device), self.recipe.size_at(epoch)
            for i in range(first, self.steps_per_epoch):
                start = time.monotonic()
                batch = order[i * self.recipe.batch_size : (i + 1) * self.recipe.batch_size]
                loss, correct = self.train_step(batch, size)
                self.epoch_sums["loss"] += loss
                self.epoch_sums["correct"] += correct
                self.epoch_sums["seconds"] += time.monotonic() - start
                seen = (i + 1) * self.recipe.batch_size
                rate = seen / self.epoch_sums["seconds"]
                info = f"epoch {epoch + 1}/{self.recipe.epochs}  loss {self.epoch_sums['loss'] / (i + 1):.3f}"
                info += f"  top-1 {100 * self.epoch_sums['correct'] / seen:.1f} %  {rate:.0f} images/s"
                progress.update(task, completed=self.step, info=info)
                if i + 1 < self.steps_per_epoch and time.monotonic() - saved > CHECKPOINT_SECONDS:
                    self.save()
                    saved = time.monotonic()
            self.end_epoch(epoch, size)
            self.save()
            saved = time.monotonic()
            progress.console.print(
                "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.log[-1].items())
            )

    def end_epoch(self, epoch: int, size: int) -> None:
        seen = self.steps_per_epoch * self.recipe.batch_size
        row = (
            epoch + 1,
            size,
            self.optimizer.param_groups[0]["lr"],
            self.epoch_sums["loss"] / self.steps_per_epoch,
            100 * self.epoch_sums["correct"] / seen,
            seen / self.epoch_sums["seconds"],
            self.epoch_sums["seconds"],
        )
        self.log.append(dict(zip(LOG_FIELDS, row, strict=True)))
        self.epoch_sums = {"loss": 0.0, "correct": 0.0, "seconds": 0.0}
        with mz.files.atomic_write(self.out / "log.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, LOG_FIELDS)
            writer.writeheader()
            for entry in self.log:
                writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in entry.items()})

    def save(self) -> None:
        state = {
            "recipe": dataclasses.asdict(self.recipe),
            "step": self.step,
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "epoch_sums": self.epoch_sums,
            "log": self.log,
        }
        with mz.files.atomic_write(self.out / "checkpoint.pt", "wb") as file:
            torch.save(state, file)

    def load(self) -> None:
        state = torch.load(self.out / "checkpoint.pt", map_location=self.device, weights_only=True)
        if state["recipe"] != dataclasses.asdict(self.recipe):
            raise ValueError(f"{self.out / 'checkpoint.pt'}: made with another recipe; choose another --out")
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch_sums, self.log = state["epoch_sums"], state["log"]

    def final_model(self) -> torch.nn.Module:
        """Returns the average of the last epoch, or the last weights where the recipe keeps no average."""
        return self.ema.module if self.ema is not None else self.model


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--data", required=True, help="CIFAR-100 folder (Parquet or torchvision) or Hub id")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint, log and weights")
    parser.add_argument("--resume", action="store_true", help="go on from --out's checkpoint if there is one")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    console = Console(stderr=True)
    try:
        recipe = load_recipe(args.recipe)
        args.out.mkdir(parents=True, exist_ok=True)
        checkpoint = args.out / "checkpoint.pt"
        if checkpoint.exists() and not args.resume:
            raise ValueError(f"{checkpoint} exists; add --resume to go on, or choose another --out")
        trainer = Trainer(recipe, mz.data.load_images(args.data, "train"), torch.device(args.device), args.out)
        if checkpoint.exists():
            trainer.load()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with mz.files.atomic_write(args.out / "run.json", "w") as file:
            file.write(json.dumps(environment(args.device), indent=2) + "\n")
        with Progress(*columns, TextColumn("{task.fields[info]}"), console=console) as progress:
            trainer.run(progress)
        mz.pretrained.save_weights(trainer.final_model(), args.out / "model.safetensors")
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
