"""Measures what groups are worth from the moment they are chosen: without training, and after one epoch.

    python benchmarks/groups.py --data DIR --out DIR [--rows NAME ...]
    python benchmarks/groups.py --data DIR --out DIR --time
    python benchmarks/groups.py --data DIR --out DIR --starts --rows NAME

Every network starts from the dense parent's weights and trains on 45,000 of the training images, with the same settings
but for the learning rate of starts from weights alone. Each is measured on the test images, which neither the parent
nor the calibration has seen, before the first step and after the last. Rows that benchmarks/groups.json holds are
skipped, and a training that was stopped goes on. --time times what was trained as a share of the dense parent. --starts
adds how long a row's start takes, with what memory.
"""

import argparse
import copy
import json
import resource
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import timm
import torch
from evaluate import create
from latency import Cell, Form, export_apart, time_cells
from measuring import environment
from torch import nn
from torch.optim.swa_utils import update_bn
from train import CHECKPOINT, Trainer, held_out, load_soft_labels
from training.recipe import Recipe

import mobilenets_zoo as mz
from mobilenets_zoo.evaluation import evaluate, preprocess
from mobilenets_zoo.utils import keep_freed_memory, progress_bar

RESULTS = Path(__file__).with_name("groups.json")
PARENT = "mobilenetv2_cifar100.kd_e26_r32"
NARROW = {"model": "mobilenetv2_cifar100", "model_args": {"width_mult": 0.55}}
NARROW_PROJ = {"model": "mobilenetv2_cifar100", "model_args": {"width_mult": 0.625}}  # lgc_proj's optimized cost
IMAGES = 2048

# By row: model and calibration images; with 0, learned groups are pruned by magnitude in stages while training, at a
# learning rate for starts that have less to lose. The dense parent shows what the epoch itself does.
ROWS: dict[str, dict[str, Any]] = {
    **{kind: {"model": f"mobilenetv2_{kind}_cifar100", "calibration_images": IMAGES}
       for kind in ("lgc", "lgc_proj", "lgc_exp", "gc", "gc_proj", "gc_exp", "gc_lgc", "lgc_gc")},
    "lgc_proj_shared": {"model": "mobilenetv2_lgc_proj_cifar100", "calibration_images": IMAGES, "sharing": 0.5},
    "narrow": {**NARROW, "calibration_images": IMAGES},
    "narrow_proj": {**NARROW_PROJ, "calibration_images": IMAGES},
    **{f"{kind}_plain": {"model": f"mobilenetv2_{kind}_cifar100", "calibration_images": 0, "lr": 0.003}
       for kind in ("lgc", "gc")},
    "narrow_plain": {**NARROW, "calibration_images": 0, "lr": 0.003},
    "dense": {"model": "mobilenetv2_cifar100", "calibration_images": 0},
}  # fmt: skip


def recipe_of(row: str) -> Recipe:
    """One epoch, at the size of the images that the networks are measured with.

    Size and the learning rate of starts with images were chosen in 100 steps with a whole cosine, by how often a
    network answers like the parent on CIFAR-10's test images, which none has seen: "trials" in groups.json.
    """
    settings: dict[str, Any] = dict(epochs=1, batch_size=128, lr=0.001, warmup_epochs=0.1, weight_decay=0.005, cutmix=0)
    settings.update(ema_decay=0.99, bn_batches=25, precision="fp32", sizes=((1.0, 32),))
    return Recipe(tag=row, init_from=PARENT, **settings | ROWS[row])


def top1(model: nn.Module, images: mz.data.ImageSet) -> float:
    return round(evaluate(model, images).top1, 2)


def started(model: nn.Module, recipe: Recipe, images: mz.data.ImageSet) -> nn.Module:
    """Returns a copy; where no images chose what to keep, by magnitude and with BatchNorm's statistics of as many."""
    model = copy.deepcopy(model)
    if not recipe.calibration_images and recipe.tag != "dense":
        for layer in mz.learned_layers(model).values():
            layer.prune_(layer.in_channels // layer.condense_factor)
        chosen = np.random.default_rng(recipe.seed).choice(len(images), IMAGES, replace=False)
        cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
        pixels = preprocess(torch.from_numpy(images.images[chosen]), cfg["mean"], cfg["std"])
        update_bn(pixels.split(128), model.cpu())
    return model


def measure(row: str, data: str, out: Path, device: str) -> dict[str, Any]:
    """Starts, trains and measures a network; returns its row of the results."""
    recipe = recipe_of(row)
    images, test = mz.data.load_images(data, "train"), mz.data.load_images(data, "test")
    kept = ~held_out(images.labels)
    labels = load_soft_labels(recipe, images).subset(kept)
    trainer = Trainer([recipe], images.subset(kept), labels, None, torch.device(device), out)
    out.mkdir(parents=True, exist_ok=True)
    start_top1 = top1(started(trainer.students[0].average.module, recipe, images.subset(kept)), test)
    if not (out / "model.safetensors").exists():
        if (out / CHECKPOINT).exists():
            trainer.load()
        with progress_bar() as progress:
            trainer.run(progress)
        trainer.finish()
    condensed = {"condensed": True} if "lgc" in recipe.model else {}
    model = create(recipe, out, len(test.classes), device, **condensed)
    optimized = mz.optimize_for_inference(model)
    macs = {"macs": mz.profile(model).macs, "optimized_macs": mz.profile(optimized).macs}
    scores = {"start_top1": start_top1, "top1": top1(model, test)}
    return {**asdict(recipe), **macs, **scores, "trained_on": environment(device)}


def deployed(row: str, out: Path) -> Form:
    """Returns what inference gets of a row's weights; of "", of the parent's."""
    model = create(recipe_of(row), out / row, 100, "cpu") if row else timm.create_model(PARENT, pretrained=True).eval()
    return Form(row, "optimized", None, mz.optimize_for_inference(model), path=out / row / "optimized.onnx")


def time_rows(out: Path) -> None:
    """Adds to each row whose weights are there the time of one image on one thread of ONNX Runtime.

    It is a share of the parent's, which takes turns with them, so rows may be timed on several days.
    """
    names = [row["row"] for row in load_results()["rows"] if (out / row["row"] / "model.safetensors").exists()]
    if not names:
        raise ValueError(f"{out} holds no weights of a row that is measured")
    forms = [deployed(name, out) for name in ["", *names]]
    export_apart([form.network for form in forms], [form.path for form in forms])
    parent, *timed = time_cells(forms, [Cell("onnxruntime", 1, 1)], seconds=3.0)
    for name, own in zip(names, timed, strict=True):
        share, runtime = round(own["ms"] / parent["ms"], 3), {"onnxruntime": onnxruntime.__version__}
        add(name, time={"share": share, "ms": round(own["ms"], 3), **environment(), **runtime})


def time_start(row: str, data: str, out: Path) -> None:
    """Adds the seconds of a start, and the largest memory that this process has had, with the images and all else."""
    images = mz.data.load_images(data, "train")
    start = time.perf_counter()
    Trainer([recipe_of(row)], images, None, None, torch.device("cpu"), out)
    seconds = round(time.perf_counter() - start)
    megabytes = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    add(row, start={"seconds": seconds, "megabytes": megabytes, **environment()})


def load_results() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": []}


def add(name: str, **values: Any) -> None:
    """Adds values to a row, or a row, of the results as they are now: another process may have added to them."""
    results = load_results()
    rows = {row["row"]: row for row in results["rows"]}
    rows[name] = rows.get(name, {"row": name}) | values
    results["rows"] = sorted(rows.values(), key=lambda row: list(ROWS).index(row["row"]))
    mz.utils.write_json(RESULTS, results)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="CIFAR-100: Parquet folder, torchvision root, Hub id")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and weights, one for each row")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS, metavar="NAME", help="by default all")
    parser.add_argument("--time", action="store_true", help="time what was trained")
    parser.add_argument("--starts", action="store_true", help="time the start of the row that --rows names")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    try:
        if args.time:
            time_rows(args.out)
            return 0
        if args.starts:
            if args.rows not in [[row["row"]] for row in load_results()["rows"]]:
                raise ValueError("--starts needs --rows with one row that is measured")
            time_start(args.rows[0], args.data, args.out)
            return 0
        keep_freed_memory()  # not where time and memory are measured: users may not
        for name in args.rows:
            if any(row["row"] == name for row in load_results()["rows"]):
                continue
            add(name, **measure(name, args.data, args.out / name, args.device))
    except (OSError, ValueError, FloatingPointError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
