"""A teacher's soft labels for fixed views of every training image: the file, and the command that computes it.

    RUN=benchmarks/runs/efficientnet_lite2.cutmix_e8_r160
    python benchmarks/soft_labels.py $RUN/recipe.toml --run $RUN --data DIR --out $RUN/soft_labels.safetensors

Fast Knowledge Distillation (arXiv 2112.01528): the teacher runs once, and student and teacher see the same view. The
folder under --run holds the teacher's model.safetensors. Each image gets --views different crops, mirrored or not; the
teacher sees them at the resolution it was trained at. A view costs 2 * kept + 2 bytes: its number
(`augment.crop_and_mirror`), the classes with the largest probabilities, the negative logarithms of these probabilities
and of what all other classes share, in steps of 1/20 nat (2.5 % of a probability at most, up to 12.75 nats).
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import timm
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from training.augment import count_views, crop_and_mirror, resize
from training.recipe import Recipe, load_recipe

import mobilenets_zoo as mz
from mobilenets_zoo.evaluation import preprocess
from mobilenets_zoo.utils import atomic_write, keep_freed_memory, progress_bar

STEPS_PER_NAT = 20.0
TENSORS = ("views", "classes", "log_probs", "rest")


@dataclass
class SoftLabels:
    """Soft labels of N images, V views each.

    Attributes:
        views: uint8, (N, V), for `augment.crop_and_mirror`.
        classes: uint8, (N, V, K), the K most likely classes.
        log_probs: uint8, (N, V, K), negative logarithms of their probabilities, in nats times STEPS_PER_NAT.
        rest: uint8, (N, V), likewise of the other classes' probability in all.
        info: number of classes, padding of the crops, the data's sha256, and the teacher.
    """

    views: torch.Tensor
    classes: torch.Tensor
    log_probs: torch.Tensor
    rest: torch.Tensor
    info: dict[str, Any]

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: function(getattr(self, name)) for name in TENSORS}

    def to(self, device: torch.device) -> "SoftLabels":
        """Returns the labels on a device; on the CPU they stay mapped from the file."""
        return SoftLabels(**self._map(lambda tensor: tensor.to(device)), info=self.info)

    def subset(self, mask: np.ndarray) -> "SoftLabels":
        """Returns the labels of the images that a mask (N,) names."""
        kept = torch.from_numpy(mask)
        return SoftLabels(**self._map(lambda tensor: tensor[kept]), info=self.info)

    def targets(self, images: torch.Tensor, draws: torch.Tensor, temperature: float) -> torch.Tensor:
        """Returns the teacher's distributions, softened by a temperature.

        Args:
            images: positions in the training set, (B,).
            draws: which of the V views, (B,).
            temperature: T; probabilities are proportional to p^(1/T).

        Returns:
            float32, (B, classes).
        """
        count = self.info["num_classes"]
        classes = self.classes[images, draws].long()
        kept = torch.exp(self.log_probs[images, draws].float() / (-STEPS_PER_NAT * temperature))
        others = count - classes.shape[1]
        rest = torch.exp(self.rest[images, draws].float() / (-STEPS_PER_NAT * temperature))
        share = rest * max(others, 1) ** (-1.0 / temperature)  # the rest, spread evenly, of each other class
        target = share[:, None].expand(-1, count).scatter(1, classes, kept)
        return target / target.sum(1, keepdim=True)

    def save(self, path: Path) -> None:
        tensors = self._map(lambda tensor: tensor.cpu().contiguous())
        with atomic_write(path) as file:
            file.write(safetensors.torch.save(tensors, metadata={"info": json.dumps(self.info, sort_keys=True)}))

    @classmethod
    def load(cls, path: Path) -> "SoftLabels":
        """Maps a file.

        Raises:
            ValueError: missing, or not a file of soft labels.
        """
        try:
            with safe_open(path, "pt") as content:
                info = json.loads(content.metadata()["info"])
            return cls(**safetensors.torch.load_file(path), info=info)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} can't be read as soft labels: {error}; make it with soft_labels.py") from error


def pack(probabilities: torch.Tensor, kept: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keeps the largest probabilities.

    Args:
        probabilities: float, (..., classes), at most 256 classes.
        kept: K.

    Returns:
        classes (..., K), log_probs (..., K) and rest (...), as in `SoftLabels`.
    """
    values, classes = probabilities.topk(kept, dim=-1)
    rest = (1.0 - values.sum(-1)).clamp_min(0.0)

    def steps(p: torch.Tensor) -> torch.Tensor:
        return (-STEPS_PER_NAT * p.log()).round().clamp(0, 255).to(torch.uint8)

    return classes.to(torch.uint8), steps(values), steps(rest)


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

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """Maps uint8 (N, H, W, C) to distributions (N, classes), softened by a temperature."""
        cfg: dict[str, Any] = self.model.pretrained_cfg  # type: ignore[assignment]
        pixels = resize(preprocess(images, cfg["mean"], cfg["std"]), self.recipe.sizes[-1][1])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            return (self.model(pixels).float() / temperature).softmax(1)


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
        "taught_by": recipe.as_teacher,
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
    keep_freed_memory()
    try:
        data, device = mz.data.load_images(args.data, "train"), torch.device(args.device)
        if not 1 <= args.kept <= len(data.classes) <= 256:
            raise ValueError(f"--kept {args.kept}: there are {len(data.classes)} classes, and at most 256 fit")
        teacher = Teacher(load_recipe(args.recipe), args.run, len(data.classes), device)
        compute(teacher, data, args.views, args.kept, args.seed, args.batch_size).save(args.out)
    except (ValueError, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
