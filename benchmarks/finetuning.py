"""Measures what fine-tuning is worth: rows of benchmarks/finetuning.csv, which docs/finetuning.md shows.

    python benchmarks/finetuning.py DATASET --data DIR [--models ...] [--per-class ...] [--seeds N]

Runs what `mobilenets-zoo finetune` runs, with its defaults, on so many training images of each class, and measures on
all test images. A row is written as soon as it is known, and rows that are there already are skipped: an interrupted
measurement goes on where it was, cheap cells first. The seed chooses the images, too.

Photos are cut-outs from the Debian package tuxpaint-stamps-default (GPL-2), 236 in eight classes:

    apt download tuxpaint-stamps-default && dpkg-deb -x tuxpaint-stamps-default_*.deb stamps
    python benchmarks/finetuning.py photos --data stamps/usr/share/tuxpaint/stamps
"""

import argparse
import csv
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import environment
from PIL import Image
from rich.progress import Progress
from timm.data import create_transform, resolve_model_data_config

import mobilenets_zoo as mz
from mobilenets_zoo.data import ImageSet
from mobilenets_zoo.evaluation import evaluate
from mobilenets_zoo.finetuning import Run, Settings, create
from mobilenets_zoo.utils import keep_freed_memory

RESULTS = Path(__file__).parent / "finetuning.csv"
COLUMNS = ["data", "model", "method", "per_class", "seed", "epochs", "top1", "seconds", "threads", "device", "torch"]
METHODS: dict[str, dict[str, Any]] = {"fine-tuned": {}, "classifier": {"freeze": True}, "scratch": {"scratch": True}}
NAMES = ("mobilenetv1_w025", "mobilenetv2_t1", "mobilenetv1_w050", "mobilenetv2_lgc_proj")
MODELS = [f"{name}_cifar100" for name in NAMES]
OUTSIDER = "mobilenetv3_small_050"  # timm's, from random weights alone: at 32 pixels its stride leaves a single one
OUTSIDER_SIZE = 128
PER_CLASS = {"cifar10": [10, 100, 1000], "cifar100-coarse": [10, 50, 500], "digits": [10, 100], "photos": [10]}
PHOTOS = {  # folders by class
    "bird": "animals/birds",
    "coin": "symbols/money/*/coins",
    "flower": "plants/flowers",
    "fruit": "food/fruit",
    "household": "household",
    "mammal": "animals/mammals",
    "vegetable": "food/vegetables",
    "vehicle": "vehicles",
}


def load(data: str, source: str | None) -> tuple[ImageSet, ImageSet | None]:
    """Returns training and test images of a data set; without test images, what isn't trained with is for testing.

    `cifar100-coarse` are CIFAR-100's twenty superclasses, as the Parquet files name them; `digits` are scikit-learn's,
    the last fifth of which is for testing.
    """
    if data == "photos":
        return photos(Path(source or "")), None
    if data == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
        images = ImageSet(np.repeat(grey[..., None], 3, 3), digits.target, tuple(map(str, range(10))))
        test = np.arange(len(images)) >= 0.8 * len(images)
        return images.subset(~test), images.subset(test)
    sets = [mz.data.load_images(source or "", split) for split in ("train", "test")]
    if data == "cifar100-coarse":
        sets = [coarse(images, source or "", split) for images, split in zip(sets, ("train", "test"), strict=True)]
    return sets[0], sets[1]


def coarse(images: ImageSet, source: str, split: str) -> ImageSet:
    import pyarrow.parquet as pq

    files = sorted(Path(source).rglob(f"{split}-*.parquet"))
    labels = np.concatenate([pq.read_table(file, columns=["coarse_label"])[0].to_numpy() for file in files])
    return ImageSet(images.images, labels.astype(np.int64), tuple(map(str, range(20))))


def photos(root: Path) -> ImageSet:
    """Returns the photos among the stamps at the networks' size, without drawings, toys and mirrored ones."""
    geometry = create_transform(input_size=(3, 32, 32), crop_pct=1.0, interpolation="bicubic", normalize=False)
    pixels, labels = [], []
    for label, pattern in enumerate(PHOTOS.values()):
        files = {file for folder in root.glob(pattern) for file in folder.rglob("*.png")}
        for file in sorted(file for file in files if not {"cartoon", "toys"} & set(file.parts)):
            if file.stem.endswith("_mirror"):
                continue
            image = geometry(mz.data.read_image(file.read_bytes(), file.name))
            pixels.append(image.permute(1, 2, 0).numpy())
            labels.append(label)
    if len(set(labels)) < len(PHOTOS):
        raise ValueError(f"{root} doesn't hold the photos of tuxpaint-stamps-default")
    return ImageSet(np.stack(pixels), np.asarray(labels), tuple(PHOTOS))


def fitted(images: ImageSet, model: Any) -> ImageSet:
    """Returns the images at the size that a model takes, enlarged whole."""
    if images.images.shape[1:3] == tuple(model.pretrained_cfg["input_size"][1:]):
        return images
    transform = create_transform(**resolve_model_data_config(model) | {"crop_pct": 1.0}, normalize=False)
    pixels = [transform(Image.fromarray(image)).permute(1, 2, 0).numpy() for image in images.images]
    return ImageSet(np.stack(pixels), images.labels, images.classes)


class Measurement:
    """Trains networks on parts of one data set and measures each on the test images."""

    def __init__(self, train: ImageSet, test: ImageSet | None, flip: bool):
        self.train, self.test, self.flip = train, test, flip
        self.features: dict[str, torch.Tensor] = {}  # of the test images, by networks whose trunk stays as it is

    def __call__(self, name: str, method: str, per_class: int, seed: int) -> dict[str, Any]:
        """Returns what a row says of one training."""
        random, labels = np.random.default_rng(seed), self.train.labels
        members = (random.permutation(np.flatnonzero(labels == label)) for label in range(len(self.train.classes)))
        chosen = np.sort(np.concatenate([positions[:per_class] for positions in members]))
        rest = np.setdiff1d(np.arange(len(labels)), chosen)
        test = self.train.subset(rest) if self.test is None else self.test
        size = OUTSIDER_SIZE if name == OUTSIDER else None
        settings = Settings(seed=seed, flip=self.flip, size=size, **METHODS[method])
        model = create(name, settings)
        start = time.perf_counter()
        run = Run(model, fitted(self.train.subset(chosen), model), settings)
        with Progress(disable=True) as progress:
            for _ in run.train(progress):
                pass
        seconds = time.perf_counter() - start
        if method == "classifier" and self.test is not None:
            if name not in self.features:
                pixels = torch.from_numpy(fitted(test, model).images).permute(0, 3, 1, 2)
                self.features[name] = run.features(pixels)
            predicted = run.model.get_classifier()(self.features[name]).argmax(1).numpy()
            top1 = 100.0 * float((predicted == test.labels).mean())
        else:
            top1 = evaluate(run.average.module, fitted(test, model)).top1
        return {"epochs": run.epochs, "top1": round(top1, 2), "seconds": round(seconds, 1)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("dataset", choices=list(PER_CLASS))
    parser.add_argument("--data", help="where the data set is; not for digits")
    parser.add_argument("--models", nargs="+", default=[*MODELS, OUTSIDER])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--per-class", nargs="+", type=int, help="by default what docs/finetuning.md shows")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    keep_freed_memory()
    if (args.data is None) != (args.dataset == "digits"):
        parser.error("--data is needed, but for digits")
    measure = Measurement(*load(args.dataset, args.data), flip=args.dataset != "digits")
    known: set[tuple[str, ...]] = set()
    if args.out.exists():
        with open(args.out, newline="", encoding="utf-8") as file:
            known = {tuple(row[column] for column in COLUMNS[:5]) for row in csv.DictReader(file)}
    cells = [
        (model, method, per_class, seed)
        for per_class in sorted(args.per_class or PER_CLASS[args.dataset])
        for seed in range(args.seeds)
        for model in args.models
        for method in args.methods
        if model != OUTSIDER or method == "scratch"
    ]
    for model, method, per_class, seed in cells:
        if (args.dataset, model, method, str(per_class), str(seed)) in known:
            continue
        row = measure(model, method, per_class, seed)
        where = environment()
        row |= {"data": args.dataset, "model": model, "method": method, "per_class": per_class, "seed": seed}
        row |= {key: where[key] for key in ("threads", "device", "torch")}
        with open(args.out, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)
        print(", ".join(f"{column} {row[column]}" for column in COLUMNS[:8]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
