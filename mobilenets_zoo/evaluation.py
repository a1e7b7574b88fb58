"""Measuring a classifier on a labelled image set."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Optional

import torch
from torch import nn
from torch.nn import functional as F

from mobilenets_zoo.data import ImageSet
from mobilenets_zoo.profiling import eval_mode, input_size_of

__all__ = ["Evaluation", "evaluate", "per_channel", "preprocess", "some"]

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
        per_class: top-1 percentage of each class, None where it has no images.
    """

    images: int
    top1: float
    top5: float
    loss: float
    ece: float
    per_class: tuple[Optional[float], ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def per_channel(values: Any, channels: int) -> tuple[float, ...]:
    """Returns one value per channel; a grey model's is the mean over the colours."""
    values = (values,) if isinstance(values, float) else tuple(values)
    return values if len(values) == channels else (sum(values) / len(values),) * channels


def preprocess(images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """Maps uint8 (N, H, W, C) to normalised float32 (N, C, H, W) in channels_last memory format."""
    # Made where the images are: a GPU would be waited for to copy them.
    means, stds = (torch.stack([images.new_full((), v, dtype=torch.float32) for v in part]) for part in (mean, std))
    return (images.float() / (stds * 255.0) - means / stds).permute(0, 3, 1, 2)


def some(names: Sequence[str]) -> str:
    """Returns the first names of many, for a message."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    data: ImageSet,
    batch_size: int = 50,
    on_progress: Optional[Callable[[int], None]] = None,
) -> Evaluation:
    """Measures a model in eval mode, where its parameters are and in their precision.

    Args:
        model: a zoo or timm model; its `pretrained_cfg` gives mean and standard deviation.
        data: images at the model's input size.
        batch_size: images per forward pass.
        on_progress: called with the number of images done so far.

    Raises:
        ValueError: classes or input size don't fit the data, there are no images, or an output isn't finite.
    """
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    if not len(data):
        raise ValueError("there are no images to measure the model on")
    _, height, width, channels = data.images.shape
    size = input_size_of(model)
    if size != (channels, height, width):
        raise ValueError(f"the model takes images of {size}, the data has {(channels, height, width)}")
    names = tuple(map(str, cfg.get("label_names") or data.classes))
    # Labels without names fit any names but the same numbers in another order, such as that of folders, 0, 1, 10, 2.
    numbers = [int(name) for name in data.classes if name.isdecimal()]
    named = numbers != list(range(len(data.classes))) or set(names) == set(data.classes)
    if len(names) == len(data.classes) and names != data.classes and named:
        raise ValueError(f"the model's classes are {some(names)}, the data's {some(data.classes)}")
    mean, std = (per_channel(cfg[key], channels) for key in ("mean", "std"))
    weight = next(model.parameters())
    all_logits = []
    with eval_mode(model):
        for start in range(0, len(data), batch_size):
            images = torch.from_numpy(data.images[start : start + batch_size]).to(weight.device)
            logits = model(preprocess(images, mean, std).to(weight.dtype))
            if logits.shape[1] != len(data.classes):
                raise ValueError(f"the model has {logits.shape[1]} classes, the data has {len(data.classes)}")
            all_logits.append(logits.float().cpu())
            if on_progress:
                on_progress(min(start + batch_size, len(data)))
    logits, labels = torch.cat(all_logits), torch.from_numpy(data.labels)
    if not logits.isfinite().all():
        raise ValueError("the model's outputs are not finite")

    correct = logits.argmax(1) == labels
    top5 = (logits.topk(min(5, logits.shape[1])).indices == labels[:, None]).any(1)
    confidence = logits.softmax(1).max(1).values
    bins = (confidence * ECE_BINS).long().clamp_max(ECE_BINS - 1)
    gaps = torch.zeros(ECE_BINS).index_add_(0, bins, confidence - correct.float())
    hits = [correct[labels == c].float() for c in range(len(data.classes))]
    return Evaluation(
        images=len(data),
        top1=100.0 * correct.double().mean().item(),
        top5=100.0 * top5.double().mean().item(),
        loss=F.cross_entropy(logits, labels).item(),
        ece=100.0 * gaps.abs().sum().item() / len(data),
        per_class=tuple(round(100.0 * hit.mean().item(), 4) if len(hit) else None for hit in hits),
    )
