"""Measures a finished weight once on the test images; --record keeps the result, --bundle also the weight.

    python benchmarks/evaluate.py benchmarks/recipes/NAME.toml --run DIR --data DIR [--record | --bundle]

DIR under --run is what benchmarks/train.py wrote. The weight is loaded as users load it, masked and condensed; both
forms must agree. --record writes benchmarks/results/NAME.json and benchmarks/logs/NAME.csv; --bundle also
mobilenets_zoo/weights/NAME.safetensors and its row in the manifest, and moves a weight that this one started from and
replaces to benchmarks/earlier/. NAME is the model's, and model.tag where the tag isn't the model's default.
"""

import argparse
import csv
import dataclasses
import hashlib
import json
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
from measuring.environment import environment
from safetensors import SafetensorError, safe_open
from torch import nn
from training.recipe import Recipe, load_recipe
from training.soft_labels import SoftLabels

import mobilenets_zoo as mz
from mobilenets_zoo.cli import progress_bar
from mobilenets_zoo.evaluation import evaluate
from mobilenets_zoo.pretrained import WEIGHTS_DIR

BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parent


def measure(recipe: Recipe, recipe_path: Path, run: Path, data: str, device: str) -> dict[str, Any]:
    """Returns the content of the result file."""
    weights = run / "model.safetensors"
    images = mz.data.load_images(data, "test")
    deployed = model = create(recipe, weights, device)
    if mz.learned_layers(model):
        deployed = create(recipe, weights, device, condensed=True)
        sample = torch.from_numpy(images.images[:100]).to(device).permute(0, 3, 1, 2) / 255.0
        mz.check_equivalent(model, deployed, sample)
    with progress_bar() as progress:
        task = progress.add_task(recipe.model, total=len(images))
        result = evaluate(deployed, images, on_progress=lambda n: progress.update(task, completed=n))
    profile = mz.profile(deployed)
    # A made-up input; the tests compare the logits, so that a change of code can't change what the weight computes.
    sample = torch.linspace(-2, 2, 2 * 3 * 32 * 32, device=device).reshape(2, 3, 32, 32)
    with torch.no_grad():
        sample_logits = [[round(v, 5) for v in row] for row in deployed(sample).tolist()]
    with open(run / "log.csv", newline="") as file:
        epochs = list(csv.DictReader(file))
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    latency = {"device": environment()["device"], "milliseconds": eager_milliseconds(deployed)}
    return {
        "model": recipe.model,
        "tag": recipe.tag,
        "recipe_file": str(recipe_path),
        "recipe": dataclasses.asdict(recipe),
        "seed": recipe.seed,
        "taught_by": taught_by(recipe),
        "params": profile.params,
        "macs": profile.macs,
        "sha256": digest,
        "training": json.loads((run / "run.json").read_text()),
        "training_seconds": round(sum(float(epoch["seconds"]) for epoch in epochs)),
        "training_loss": float(epochs[-1]["train_loss"]),
        "latency": latency,
        "sample_logits": sample_logits,
        "evaluation": {**result.to_dict(), "data_sha256": images.sha256(), "environment": environment(device)},
    }


def create(recipe: Recipe, weights: Path, device: str, **kwargs: Any) -> nn.Module:
    """Returns the recipe's network with the weights of a file, in eval mode.

    Raises:
        ValueError: the file can't be read or doesn't fit; the message names it.
    """
    try:
        cfg = timm.get_pretrained_cfg(recipe.model)
        classifier = cfg.classifier if cfg is not None else "classifier"
        with safe_open(weights, "pt") as content:
            classes = content.get_slice(f"{classifier}.weight").get_shape()[0]
        arguments = dict(recipe.model_args, num_classes=classes, **kwargs)
        overlay = {"file": str(weights), "num_classes": classes}
        model = timm.create_model(recipe.model, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise ValueError(f"{weights} can't be loaded into {recipe.model}: {error}") from error
    return model.eval().to(device, memory_format=torch.channels_last)


def taught_by(recipe: Recipe) -> str | None:
    """Returns the teacher, be it of the weight that the recipe starts from, and what it was pretrained on, or None."""
    if recipe.soft_labels:
        return SoftLabels.load(BENCHMARKS / recipe.soft_labels).info["taught_by"]
    start = mz.manifest().get(recipe.init_from)
    if start is not None:
        return start.taught_by
    result = BENCHMARKS / "earlier" / recipe.init_from / "result.json"
    return json.loads(result.read_text())["taught_by"] if recipe.init_from and result.is_file() else None


def file_stem(recipe: Recipe) -> str:
    """Returns the name of a weight's files: the model's, or model.tag where the tag isn't the default."""
    cfg = timm.get_pretrained_cfg(recipe.model)
    return recipe.model if cfg is not None and cfg.tag == recipe.tag else f"{recipe.model}.{recipe.tag}"


def eager_milliseconds(model: torch.nn.Module) -> float:
    """Returns the median time of one image on one thread of the processor, in eager fp32 and channels_last."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    image = torch.randn(1, 3, 32, 32).to(memory_format=torch.channels_last)
    times = []
    with torch.inference_mode():
        model = model.cpu()
        for _ in range(60):
            start = time.perf_counter()
            model(image)
            times.append(1000 * (time.perf_counter() - start))
    torch.set_num_threads(threads)
    return round(statistics.median(times[10:]), 2)


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with mz.files.atomic_write(target) as file, open(source, "rb") as content:
        shutil.copyfileobj(content, file)


def record(recipe: Recipe, run: Path, result: dict[str, Any]) -> Path:
    """Puts result and log where the tables read them; returns the result's file."""
    stem = file_stem(recipe)
    copy(run / "log.csv", ROOT / "benchmarks" / "logs" / f"{stem}.csv")
    if (run / "masks.json").exists():
        copy(run / "masks.json", ROOT / "benchmarks" / "logs" / f"{stem}.masks.json")
    result_file = ROOT / "benchmarks" / "results" / f"{stem}.json"
    result_file.parent.mkdir(parents=True, exist_ok=True)
    with mz.files.atomic_write(result_file, "w", encoding="utf-8") as file:
        file.write(json.dumps(result, indent=2) + "\n")
    return result_file


def bundle(recipe: Recipe, run: Path, result: dict[str, Any]) -> None:
    """Records the result and puts weight and manifest row where the package reads them."""
    name, key = recipe.model, f"{recipe.model}.{recipe.tag}"
    manifest_file = WEIGHTS_DIR / "manifest.json"
    manifest = json.loads(manifest_file.read_text(encoding="utf-8"))
    if key in manifest and manifest[key]["sha256"] != result["sha256"]:
        raise ValueError(f"{key} is in the manifest with another weight; a new training needs a new tag")

    stem = file_stem(recipe)
    weights = WEIGHTS_DIR / f"{stem}.safetensors"
    replaced = manifest.get(recipe.init_from, {})
    if key != recipe.init_from and replaced.get("file") == weights.name:  # or the recipe couldn't be run again
        earlier = ROOT / "benchmarks" / "earlier" / recipe.init_from
        copy(weights, earlier / "model.safetensors")
        copy(ROOT / "benchmarks" / "logs" / f"{stem}.csv", earlier / "log.csv")
        copy(ROOT / "benchmarks" / "results" / f"{stem}.json", earlier / "result.json")
    result_file = record(recipe, run, result)
    copy(run / "model.safetensors", weights)

    # A file holds one weight: an older tag's row goes with its file.
    manifest = {other: row for other, row in manifest.items() if row["file"] != weights.name}
    manifest[key] = {
        "file": weights.name,
        "sha256": result["sha256"],
        "bytes": weights.stat().st_size,
        "params": result["params"],
        "macs": result["macs"],
        "top1": round(result["evaluation"]["top1"], 2),
        "top5": round(result["evaluation"]["top5"], 2),
        "recipe": result["recipe_file"],
        "result": str(result_file.relative_to(ROOT)),
        "hub_id": f"mobilenets-zoo/{name}",
        "revision": None,
        "taught_by": result["taught_by"],
    }
    with mz.files.atomic_write(manifest_file, "w", encoding="utf-8") as file:
        file.write(json.dumps(dict(sorted(manifest.items())), indent=2) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--run", type=Path, required=True, help="folder that benchmarks/train.py wrote")
    parser.add_argument("--data", required=True, help="Parquet folder, torchvision root or Hub id")
    keep = parser.add_mutually_exclusive_group()
    keep.add_argument("--record", action="store_true", help="keep result and log, not the weight")
    keep.add_argument("--bundle", action="store_true", help="make it the package's weight")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    try:
        recipe = load_recipe(args.recipe)
        path = args.recipe.resolve()
        if path.is_relative_to(ROOT):
            path = path.relative_to(ROOT)
        elif args.bundle or args.record:
            raise ValueError(f"{args.recipe} lies outside {ROOT}: a kept result's recipe is part of the project")
        if args.record and file_stem(recipe) == recipe.model:
            raise ValueError(f"{recipe.tag} is {recipe.model}'s default tag: --bundle it, or choose another tag")
        result = measure(recipe, path, args.run, args.data, args.device)
        scores = result["evaluation"]
        print(f"{recipe.model}.{recipe.tag}: top-1 {scores['top1']:.2f} %, top-5 {scores['top5']:.2f} %")
        if args.bundle:
            bundle(recipe, args.run, result)
        elif args.record:
            record(recipe, args.run, result)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
