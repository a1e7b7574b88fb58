"""A teacher's soft labels for fixed views of every training image, in a compact file.

Fast Knowledge Distillation (arXiv 2112.01528): the teacher runs once, and student and teacher see the same view. A
view costs 2 * kept + 2 bytes: its number (`augment.crop_and_mirror`), the classes with the largest probabilities, the
negative logarithms of these probabilities and of what all other classes share, in steps of 1/20 nat (2.5 % of a
probability at most, up to 12.75 nats).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from mobilenets_zoo.files import atomic_write

__all__ = ["SoftLabels", "pack"]

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
