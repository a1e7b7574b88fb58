"""Measures a finished weight on the test images; --record keeps the result, --bundle also the weight.

    python benchmarks/evaluate.py benchmarks/runs/NAME.TAG/recipe.toml --run DIR --data DIR [--record | --bundle]

DIR under --run is what benchmarks/train.py wrote for this very recipe. The weight is loaded as users load it, masked
and condensed; both forms must agree. --record writes result, log and masks beside the recipe; --bundle also the
package's weight and its row in the manifest, if it wasn't trained with --holdout. That file is NAME.safetensors for the
model's default tag, NAME.TAG.safetensors for another; a weight whose place it takes goes to its own run's folder where
a recipe starts from it.
"""

import argparse
import csv
import dataclasses
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from measuring import environment
from safetensors import SafetensorError
from soft_labels import SoftLabels
from torch import nn
from training.recipe import RUNS, Recipe, load_recipe

import mobilenets_zoo as mz
from mobilenets_zoo.evaluation import evaluate
from mobilenets_zoo.pretrained import WEIGHTS_DIR
from mobilenets_zoo.utils import keep_freed_memory, progress_bar


def measure(recipe: Recipe, run: Path, data: str, device: str) -> dict[str, Any]:
    """Returns the content of the result file; ValueError where the run is of another recipe."""
    training = json.loads((run / "run.json").read_text())
    if training.pop("recipe", None) != json.loads(json.dumps(dataclasses.asdict(recipe))):
        raise ValueError(f"{run} was trained with another recipe than {recipe.name}")
    images = mz.data.load_images(data, "test")
    deployed = model = create(recipe, run, len(images.classes), device)
    if mz.learned_layers(model):
        deployed = create(recipe, run, len(images.classes), device, condensed=True)
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
    epochs = read_log(run)
    return {
        "model": recipe.model,
        "tag": recipe.tag,
        "recipe": dataclasses.asdict(recipe),
        "seed": recipe.seed,
        "taught_by": taught_by(recipe),
        "params": profile.params,
        "macs": profile.macs,
        "sha256": hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest(),
        "training": training,
        "training_seconds": round(sum(float(epoch["seconds"]) for epoch in epochs)),
        "training_loss": float(epochs[-1]["train_loss"]),
        "sample_logits": sample_logits,
        "evaluation": {**result.to_dict(), "data_sha256": images.sha256(), "environment": environment(device)},
    }


def read_log(run: Path) -> list[dict[str, str]]:
    with open(run / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def create(recipe: Recipe, run: Path, classes: int, device: str, **kwargs: Any) -> nn.Module:
    """Returns the recipe's network with the run's weights, in eval mode.

    Raises:
        ValueError: the file can't be read or doesn't fit; the message names it.
    """
    file = run / "model.safetensors"
    arguments = dict(recipe.model_args, num_classes=classes, **kwargs)
    overlay = {"file": str(file), "num_classes": classes}
    try:
        model = timm.create_model(recipe.model, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise ValueError(f"{file} can't be loaded into {recipe.model} of {classes} classes: {error}") from error
    return model.eval().to(device, memory_format=torch.channels_last)


def taught_by(recipe: Recipe) -> str | None:
    """Returns the teacher, be it of the weight that the recipe starts from, and what it was pretrained on, or None."""
    if recipe.teacher:
        return load_recipe(RUNS.parent / recipe.teacher / "recipe.toml").as_teacher
    if recipe.soft_labels:
        return SoftLabels.load(RUNS.parent / recipe.soft_labels).info["taught_by"]
    if not recipe.init_from or recipe.pretraining:
        return None
    start = mz.manifest().get(recipe.init_from)
    return start.taught_by if start else json.loads((RUNS / recipe.init_from / "result.json").read_text())["taught_by"]


def copy(source: Path, target: Path) -> None:
    with mz.utils.atomic_write(target) as file, open(source, "rb") as content:
        shutil.copyfileobj(content, file)


def record(recipe: Recipe, run: Path, result: dict[str, Any]) -> None:
    """Puts result, log and masks beside the recipe."""
    folder = RUNS / recipe.name
    for file in (run / "log.csv", run / "masks.json"):
        if file.exists():
            copy(file, folder / file.name)
    mz.utils.write_json(folder / "result.json", result)


def bundle(recipe: Recipe, run: Path, result: dict[str, Any]) -> None:
    """Puts weight and manifest row where the package reads them."""
    manifest = json.loads((WEIGHTS_DIR / "manifest.json").read_text(encoding="utf-8"))
    is_default = timm.get_pretrained_cfg(recipe.model).tag == recipe.tag
    weights = WEIGHTS_DIR / f"{recipe.model if is_default else recipe.name}.safetensors"
    started_from = {load_recipe(path).init_from for path in RUNS.glob("*/recipe.toml")}
    for other in [name for name, row in manifest.items() if row["file"] == weights.name and name != recipe.name]:
        if other in started_from:
            copy(weights, RUNS / other / "model.safetensors")
        del manifest[other]
    copy(run / "model.safetensors", weights)
    manifest[recipe.name] = {
        "file": weights.name,
        "sha256": result["sha256"],
        "bytes": weights.stat().st_size,
        "params": result["params"],
        "macs": result["macs"],
        "top1": round(result["evaluation"]["top1"], 2),
        "top5": round(result["evaluation"]["top5"], 2),
        "recipe": f"benchmarks/runs/{recipe.name}/recipe.toml",
        "result": f"benchmarks/runs/{recipe.name}/result.json",
        "hub_id": f"mobilenets-zoo/{recipe.model}",
        "revision": manifest.get(recipe.name, {}).get("revision"),  # measured again it is the same file
        "taught_by": result["taught_by"],
    }
    mz.utils.write_json(WEIGHTS_DIR / "manifest.json", dict(sorted(manifest.items())))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--run", type=Path, required=True, help="folder that benchmarks/train.py wrote")
    parser.add_argument("--data", required=True, help="Parquet folder, torchvision root or Hub id")
    keep = parser.add_mutually_exclusive_group()
    keep.add_argument("--record", action="store_true", help="keep result and log, not the weight")
    keep.add_argument("--bundle", action="store_true", help="make it the package's weight")
    parser.add_argument("--device", default="cpu", help="by default the one that all kept results are of")
    args = parser.parse_args(argv)
    keep_freed_memory()
    try:
        recipe = load_recipe(args.recipe)
        place, earlier = RUNS / recipe.name / "recipe.toml", RUNS / recipe.name / "result.json"
        if (args.record or args.bundle) and args.recipe.resolve() != place:
            raise ValueError(f"the recipe of a kept result lies at {place}; move {args.recipe} there")
        if args.bundle and any(epoch["holdout_top1"] for epoch in read_log(args.run)):
            raise ValueError(f"{args.run} was trained with --holdout, so on a part of the images: train it without")
        result = measure(recipe, args.run, args.data, args.device)
        scores = result["evaluation"]
        print(f"{recipe.name}: top-1 {scores['top1']:.2f} %, top-5 {scores['top5']:.2f} %")
        if args.record or args.bundle:
            if earlier.exists() and json.loads(earlier.read_text())["sha256"] != result["sha256"]:
                raise ValueError(f"{earlier} is of another weight; a new training needs a new tag")
            record(recipe, args.run, result)
        if args.bundle:
            bundle(recipe, args.run, result)
    except (ValueError, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
