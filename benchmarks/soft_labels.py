"""Computes a teacher's soft labels for fixed views of every training image.

    RUN=benchmarks/runs/efficientnet_lite2.cutmix_e8_r160
    python benchmarks/soft_labels.py $RUN/recipe.toml --run $RUN --data DIR --out $RUN/soft_labels.safetensors

The folder under --run holds the teacher's model.safetensors. Each image gets --views different crops, mirrored or not;
the teacher sees them at the resolution it was trained at. A view costs 2 * kept + 2 bytes.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from torch import nn
from training.augment import count_views, crop_and_mirror, resize
from training.recipe import Recipe, load_recipe
from training.soft_labels import SoftLabels, pack

import mobilenets_zoo as mz
from mobilenets_zoo.catalogue import progress_bar
from mobilenets_zoo.evaluation import preprocess


class Teacher:
    """A finished network that sees images at the resolution of its recipe."""

    def __init__(self, recipe: Recipe, run: Path, num_classes: int, device: torch.device):
        self.recipe, self.device = recipe, device
        model = timm.create_model(recipe.model, **{**recipe.model_args, "num_classes": num_classes})
        file = run / "model.safetensors"
        try:
            model.load_state_dict(safetensors.torch.load_file(file))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{file} can't be loaded into {recipe.model}: {error}") from error
        self.model: nn.Module = model.eval().to(device).to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Maps uint8 (N, H, W, C) to probabilities (N, classes)."""
        cfg: dict[str, Any] = self.model.pretrained_cfg  # type: ignore[assignment]
        pixels = resize(preprocess(images, cfg["mean"], cfg["std"]), self.recipe.sizes[-1][1])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            return self.model(pixels).float().softmax(1)


def draw_views(images: int, views: int, padding: int, seed: int) -> torch.Tensor:
    """Returns different views for each image, uint8 (images, views)."""
    places = count_views(padding)
    if not 1 <= views <= places <= 256:
        raise ValueError(f"there are {places} views with a padding of {padding}; choose from 1 to {min(places, 256)}")
    order = np.random.default_rng(seed).random((images, places)).argpartition(views - 1, axis=1)
    return torch.from_numpy(np.sort(order[:, :views], axis=1).astype(np.uint8))


def compute(teacher: Teacher, data: mz.data.ImageSet, views: int, kept: int, seed: int, batch: int) -> SoftLabels:
    """Runs the teacher over all views."""
    recipe, device, padding = teacher.recipe, teacher.device, teacher.recipe.crop_padding
    images = torch.from_numpy(data.images).to(device)
    drawn = draw_views(len(data), views, padding, seed)
    classes = torch.empty((len(data), views, kept), dtype=torch.uint8, device=device)
    log_probs, rest = torch.empty_like(classes), torch.empty_like(classes[..., 0])
    with progress_bar() as progress:
        task = progress.add_task("soft labels", total=len(data) * views)
        for v in range(views):
            for start in range(0, len(data), batch):
                part = slice(start, start + batch)
                seen = crop_and_mirror(images[part], drawn[part, v].to(device), padding)
                classes[part, v], log_probs[part, v], rest[part, v] = pack(teacher(seen), kept)
                progress.advance(task, len(seen))
    info = {
        "num_classes": len(data.classes),
        "padding": padding,
        "seed": seed,
        "data_sha256": data.sha256(),
        "taught_by": recipe.name + (f", pretrained on {recipe.pretraining}" if recipe.pretraining else ""),
    }
    return SoftLabels(drawn, classes, log_probs, rest, info=info)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--run", type=Path, required=True, help="folder of the teacher's model.safetensors")
    parser.add_argument("--data", required=True, help="Parquet folder, torchvision root or Hub id")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    parser.add_argument("--views", type=int, default=16, help="views per image")
    parser.add_argument("--kept", type=int, default=20, help="classes per view whose probability is kept")
    parser.add_argument("--seed", type=int, default=0, help="of the views")
    parser.add_argument("--batch-size", type=int, default=500)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    try:
        data, device = mz.data.load_images(args.data, "train"), torch.device(args.device)
        teacher = Teacher(load_recipe(args.recipe), args.run, len(data.classes), device)
        compute(teacher, data, args.views, args.kept, args.seed, args.batch_size).save(args.out)
    except (ValueError, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
