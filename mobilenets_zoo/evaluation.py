"""Measuring a classifier on a labelled image set."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Optional

import torch
from torch import nn
from torch.nn import functional as F

from mobilenets_zoo.data import ImageSet

__all__ = ["Evaluation", "evaluate", "preprocess"]

ECE_BINS = 15


@dataclass(frozen=True)
class Evaluation:
    """What a model scores on a set of images.

    Attributes:
        images: number of images.
        top1: percentage whose class is the most likely one.
        top5: percentage whose class is among the five most likely.
        loss: mean cross-entropy, in nats.
        ece: expected calibration error in percent, 15 equal bins of confidence (arXiv 1706.04599, equation 3).
        per_class: top-1 percentage of each class.
    """

    images: int
    top1: float
    top5: float
    loss: float
    ece: float
    per_class: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def preprocess(images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """Maps uint8 (N, H, W, C) to normalised float32 (N, C, H, W) in channels_last memory format."""
    scale = torch.tensor(std, device=images.device) * 255.0
    shift = torch.tensor(mean, device=images.device) / torch.tensor(std, device=images.device)
    return (images.float() / scale - shift).permute(0, 3, 1, 2)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    data: ImageSet,
    batch_size: int = 50,
    on_progress: Optional[Callable[[int], None]] = None,
) -> Evaluation:
    """Measures a model, in eval mode and where its parameters are.

    Args:
        model: a zoo or timm model; its `pretrained_cfg` gives mean and standard deviation.
        data: images at the model's input size.
        batch_size: images per forward pass.
        on_progress: called with the number of images done so far.

    Raises:
        ValueError: the model's classes or input size don't fit the data.
    """
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    if tuple(cfg["input_size"][1:]) != data.images.shape[1:3]:
        raise ValueError(f"the model takes {cfg['input_size'][1:]} pixels, the images have {data.images.shape[1:3]}")
    model.eval()
    device = next(model.parameters()).device
    all_logits = []
    for start in range(0, len(data), batch_size):
        images = torch.from_numpy(data.images[start : start + batch_size]).to(device)
        all_logits.append(model(preprocess(images, cfg["mean"], cfg["std"])).float().cpu())
        if on_progress:
            on_progress(min(start + batch_size, len(data)))
    logits, labels = torch.cat(all_logits), torch.from_numpy(data.labels)
    if logits.shape[1] != len(data.classes):
        raise ValueError(f"the model has {logits.shape[1]} classes, the data has {len(data.classes)}")

    correct = logits.argmax(1) == labels
    top5 = (logits.topk(min(5, logits.shape[1])).indices == labels[:, None]).any(1)
    confidence = logits.softmax(1).max(1).values
    bins = (confidence * ECE_BINS).long().clamp_max(ECE_BINS - 1)
    gaps = torch.zeros(ECE_BINS).index_add_(0, bins, confidence - correct.float())
    per_class = [100.0 * correct[labels == c].float().mean().item() for c in range(len(data.classes))]
    return Evaluation(
        images=len(data),
        top1=100.0 * correct.double().mean().item(),
        top5=100.0 * top5.double().mean().item(),
        loss=F.cross_entropy(logits, labels).item(),
        ece=100.0 * gaps.abs().sum().item() / len(data),
        per_class=tuple(round(value, 4) for value in per_class),
    )
