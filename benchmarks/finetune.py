"""Fine-tunes a model of the zoo on other images, at their own size, channels and classes.

    python benchmarks/finetune.py MODEL --data digits|faces|FOLDER --out DIR

FOLDER holds one folder of images per class, or `train` and `test` folders of that kind; of a folder without them a
fifth of each class is kept for the test. "digits" are scikit-learn's handwritten digits (1,797 grey images of 8x8
pixels, enlarged to 16x16), "faces" scikit-image's excerpt of Labeled Faces in the Wild (100 faces and 100 other
patches, 25x25 grey pixels, reduced to 24x24). DIR receives `model.safetensors`, `model.onnx` (condensed, optimised,
preprocessing inside) and `result.json`. The last epoch counts; the test images are read once, at the end.
"""

import argparse
import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from measuring.environment import environment
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.nn import functional as F
from training.augment import count_views, crop_and_mirror
from training.holdout import held_out

import mobilenets_zoo as mz
from mobilenets_zoo.evaluation import evaluate, preprocess
from mobilenets_zoo.hub.publish import write_config

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class DataSet:
    """Images to learn from and images to measure with.

    Attributes:
        train, test: uint8 images (N, H, W, C) with labels and class names.
        flip: whether a mirrored image shows the same class.
    """

    train: mz.data.ImageSet
    test: mz.data.ImageSet
    flip: bool


def split(images: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], flip: bool) -> DataSet:
    """Keeps a fifth of each class for the test, always the same one."""
    held = held_out(labels, parts=5, seed=0)
    parts = [mz.data.ImageSet(images[m], labels[m], classes) for m in (~held, held)]
    return DataSet(parts[0], parts[1], flip)


def resized(image: Image.Image, size: int, grey: bool) -> np.ndarray:
    pixels = np.asarray(image.convert("L" if grey else "RGB").resize((size, size), Image.Resampling.BICUBIC))
    return pixels[:, :, None] if grey else pixels


def digits(size: int | None) -> DataSet:
    from sklearn.datasets import load_digits

    data = load_digits()
    images = [resized(Image.fromarray((15.9375 * image).astype(np.uint8)), size or 16, True) for image in data.images]
    return split(np.stack(images), data.target.astype(np.int64), tuple(map(str, range(10))), flip=False)


def faces(size: int | None) -> DataSet:
    from skimage.data import lfw_subset

    images = [resized(Image.fromarray((255 * image).astype(np.uint8)), size or 24, True) for image in lfw_subset()]
    labels = np.repeat([0, 1], 100)  # the first hundred are faces
    return split(np.stack(images), labels, ("face", "other"), flip=True)


def folder(path: Path, size: int | None, grey: bool) -> DataSet:
    """Reads folders of images.

    Raises:
        ValueError: no such folder, no classes, or an image that can't be read.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; give one with a folder of images per class, 'digits' or 'faces'")
    parts = [path / "train", path / "test"] if (path / "train").is_dir() else [path]
    classes = tuple(sorted(child.name for child in parts[0].iterdir() if child.is_dir()))
    if len(classes) < 2:
        raise ValueError(f"{parts[0]}: holds {len(classes)} folders of images; two classes or more are needed")
    sets = []
    for part in parts:
        images, labels = [], []
        for label, name in enumerate(classes):
            files = sorted(f for f in (part / name).rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES)
            if len(files) < 2:
                raise ValueError(f"{part / name}: holds {len(files)} images; at least two a class are needed")
            for file in files:
                try:
                    with Image.open(file) as image:
                        images.append(resized(image, size or 32, grey))
                except OSError as error:
                    raise ValueError(f"{file}: not a readable image; remove or replace it") from error
                labels.append(label)
        sets.append((np.stack(images), np.array(labels, dtype=np.int64)))
    if len(sets) == 1:
        return split(*sets[0], classes, flip=True)
    train, test = (mz.data.ImageSet(*values, classes) for values in sets)
    return DataSet(train, test, flip=True)


def create(name: str, data: DataSet, pretrained: bool, learn_masks: bool) -> nn.Module:
    """Returns a model with the data's channels and classes; its pretrained_cfg says how to feed it."""
    _, height, width, channels = data.train.images.shape
    model = timm.create_model(
        name, pretrained=pretrained, num_classes=len(data.train.classes), in_chans=channels, drop_rate=0.1
    )
    pixels = data.train.images.reshape(-1, channels) / 255.0
    model.pretrained_cfg = dict(
        model.pretrained_cfg,
        input_size=(channels, height, width),
        mean=tuple(pixels.mean(0).tolist()),
        std=tuple(pixels.std(0).clip(1e-3).tolist()),
        num_classes=len(data.train.classes),
        label_names=data.train.classes,
        tag="finetuned",
    )
    if learn_masks:
        for layer in mz.learned_layers(model).values():
            layer.mask.fill_(True)
    return model


def finetune(model: nn.Module, data: DataSet, args: argparse.Namespace, progress: Progress) -> list[float]:
    """Trains the model and returns the mean loss of each epoch."""
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    trunk_frozen = args.freeze
    if trunk_frozen:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("classifier"))
    # Layers near the input learn more slowly: they fit most images already.
    decay = args.layer_decay if not args.scratch else None
    optimizer = create_optimizer_v2(
        model, "nesterov", lr=args.lr, momentum=0.9, weight_decay=1e-4, layer_decay=None if trunk_frozen else decay
    )
    images, labels = torch.from_numpy(data.train.images), torch.from_numpy(data.train.labels)
    steps = -(-len(images) // args.batch_size)
    total = args.epochs * steps
    scheduler = CosineLRScheduler(
        optimizer, t_initial=total, warmup_t=min(steps, total // 5), warmup_lr_init=args.lr / 100, t_in_epochs=False
    )
    unfinished = any(layer.mask.all() for layer in mz.learned_layers(model).values())
    schedule = mz.CondenseSchedule(model) if unfinished else None  # finished masks stay as they are
    generator = torch.Generator().manual_seed(args.seed)
    padding = max(1, images.shape[1] // 8)
    losses = []
    task = progress.add_task("fine-tune", total=total)
    for epoch in range(args.epochs):
        model.train()
        if trunk_frozen:
            model.eval()  # BatchNorm keeps its statistics
        order, summed = torch.randperm(len(images), generator=generator), 0.0
        for i in range(steps):
            step = epoch * steps + i
            if schedule is not None:
                schedule.step(step / total)
            scheduler.step_update(step)
            chosen = order[i * args.batch_size : (i + 1) * args.batch_size]
            views = torch.randint(count_views(padding), (len(chosen),), generator=generator)
            if not data.flip:
                views -= views % 2  # odd views are mirrored
            pixels = preprocess(crop_and_mirror(images[chosen], views, padding), cfg["mean"], cfg["std"])
            loss = F.cross_entropy(model(pixels), labels[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            summed += loss.item() * len(chosen)
            progress.update(task, advance=1)
        losses.append(summed / len(images))
        if not np.isfinite(losses[-1]):
            raise ValueError(f"the loss is not finite in epoch {epoch + 1}; lower --lr")
    if schedule is not None:
        schedule.step(1.0)
    return losses


def run(args: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    if args.model not in timm.list_models("*_cifar100"):
        raise ValueError(f"there is no model {args.model!r}; mobilenets-zoo list shows them")
    if args.data in ("digits", "faces"):
        data = (digits if args.data == "digits" else faces)(args.size)
    else:
        data = folder(Path(args.data), args.size, args.grey)
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    model = create(args.model, data, not args.scratch, args.learn_masks)
    start = time.perf_counter()
    losses = finetune(model, data, args, progress)
    seconds = time.perf_counter() - start
    scores = evaluate(model, data.test).to_dict()
    result = {
        "model": args.model,
        "data": args.data if args.data in ("digits", "faces") else Path(args.data).name,
        "start": "scratch" if args.scratch else mz.pretrained.default_entry(args.model).tag,
        "train_images": len(data.train),
        "input_size": list(model.pretrained_cfg["input_size"]),  # type: ignore[index]
        "classes": len(data.train.classes),
        **{key: getattr(args, key) for key in ("epochs", "lr", "batch_size", "layer_decay", "freeze", "learn_masks")},
        "seed": args.seed,
        "seconds": round(seconds, 1),
        "training_losses": [round(loss, 4) for loss in losses],
        "evaluation": scores,
        "environment": environment(),
    }
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        mz.save_weights(model, args.out / "model.safetensors")
        write_config(model, args.out / "config.json")
        mz.export_onnx(mz.optimize_for_inference(model), args.out / "model.onnx", preprocessing=True)
        with mz.files.atomic_write(args.out / "result.json", "w") as file:
            file.write(json.dumps(result, indent=2) + "\n")
    return result


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="a name that mobilenets-zoo list shows")
    parser.add_argument("--data", required=True, help="digits, faces, or a folder with a folder of images per class")
    parser.add_argument("--out", type=Path, help="folder for weights, ONNX file and result")
    parser.add_argument("--size", type=int, help="pixels along a side; digits 16, faces 24, folders 32 by default")
    parser.add_argument("--grey", action="store_true", help="read a folder's images as grey ones, one channel")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--lr", type=float, default=0.05, help="peak learning rate of the classifier")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--layer-decay", type=float, default=0.85, help="factor on the learning rate, layer by layer")
    parser.add_argument("--freeze", action="store_true", help="train the classifier alone")
    parser.add_argument("--learn-masks", action="store_true", help="let learned groups choose their inputs anew")
    parser.add_argument("--scratch", action="store_true", help="start from random weights, to compare")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        with Progress(console=Console(stderr=True)) as progress:
            result = run(args, progress)
    except (ValueError, OSError, mz.WeightsError, ImportError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    scores = result["evaluation"]
    print(
        f"{result['model']} on {result['data']}, from {result['start']}: top-1 {scores['top1']:.1f} % of "
        f"{scores['images']} test images, loss {scores['loss']:.3f}, {result['seconds']:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
