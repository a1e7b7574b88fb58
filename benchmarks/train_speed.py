"""Compares the trainer's images per second with timm's loader and a plain eager step, in turns on one machine.

    python benchmarks/train_speed.py --data DIR [--device cuda] [--out benchmarks/results/train_speed.json]

Both sides train the same model with the same batch size, crops, flips, precision and optimiser. timm's side decodes and
augments each image on the processor with its own loader and steps in eager mode; ours keeps the data set on the
device and augments whole batches there.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import timm
import torch
import train
from environment import environment
from PIL import Image
from recipe import Recipe
from timm.data import create_loader
from timm.optim import create_optimizer_v2
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision import transforms

import mobilenets_zoo as mz


class Images(Dataset):
    """The image set as Pillow images, as timm's loader expects them."""

    def __init__(self, data: mz.data.ImageSet):
        self.data = data
        self.transform: Callable | None = None  # set by timm's create_loader

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[object, int]:
        image = Image.fromarray(self.data.images[i])
        return (self.transform(image) if self.transform else image), int(self.data.labels[i])


def timm_side(recipe: Recipe, data: mz.data.ImageSet, device: torch.device, workers: int) -> Iterator[None]:
    """Yields after every step."""
    model = timm.create_model(recipe.model, num_classes=len(data.classes)).to(device)
    model = model.to(memory_format=torch.channels_last).train()
    optimizer = create_optimizer_v2(model, recipe.optimizer, lr=recipe.lr, weight_decay=recipe.weight_decay)
    cfg = model.pretrained_cfg
    loader = create_loader(
        Images(data),
        input_size=cfg["input_size"],
        batch_size=recipe.batch_size,
        is_training=True,
        no_aug=True,
        mean=cfg["mean"],
        std=cfg["std"],
        num_workers=workers,
        use_prefetcher=device.type == "cuda",
        device=device,
        persistent_workers=workers > 0,
    )
    head = [transforms.RandomCrop(32, padding=recipe.crop_padding), transforms.RandomHorizontalFlip()]
    loader.dataset.transform = transforms.Compose([*head, *loader.dataset.transform.transforms[-2:]])
    while True:
        for images, labels in loader:
            images = images.to(device, memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
                logits = model(images)
            loss = F.cross_entropy(logits.float(), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield


def our_side(recipe: Recipe, data: mz.data.ImageSet, device: torch.device, compiled: bool) -> Iterator[None]:
    """Yields after every step."""
    trainer = train.Trainer([recipe], data, None, device, Path("."), compiled)
    trainer.students[0].model.train()
    while True:
        order = trainer.order(0)
        for i in range(trainer.steps_per_epoch):
            trainer.step = 0  # the schedule doesn't matter here
            trainer.train_step(order[i * recipe.batch_size : (i + 1) * recipe.batch_size], 32)
            yield


def seconds(side: Iterator[None], steps: int, device: torch.device) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        next(side)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="mobilenetv1_w025_cifar100")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8, help="steps in a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="processes of timm's loader")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="compile our side's network")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    data = mz.data.load_images(args.data, "train")
    recipe = Recipe(args.model, "speed", epochs=1, batch_size=args.batch_size)
    sides = {
        "timm": timm_side(recipe, data, device, args.workers),
        "ours": our_side(recipe, data, device, args.compile),
    }
    for side in sides.values():
        seconds(side, 3, device)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.turns):
        for name, side in sides.items():
            times[name].append(seconds(side, args.steps, device))
    images = args.steps * args.batch_size
    rates = {name: images / statistics.median(values) for name, values in times.items()}
    ratios = sorted(theirs / ours for theirs, ours in zip(times["timm"], times["ours"], strict=True))
    result = {
        "model": args.model,
        "batch_size": args.batch_size,
        "compiled": args.compile,
        "images_per_second": rates,
        "ratio": {"min": ratios[0], "median": statistics.median(ratios), "max": ratios[-1]},
        "environment": environment(args.device),
    }
    print(json.dumps(result, indent=2))
    if args.out:
        with mz.files.atomic_write(args.out, "w") as file:
            file.write(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
