"""Loading a weight file that training wrote, whatever its number of classes."""

from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError, safe_open
from torch import nn

__all__ = ["create_from_file"]


def create_from_file(name: str, file: str | Path, num_classes: int | None = None, **kwargs: Any) -> nn.Module:
    """Creates a model with the weights of a safetensors file.

    Args:
        name: registered model name.
        file: weights of that architecture, or of a dense one for a learned group convolution.
        num_classes: classes of the model, the file's by default; a classifier with others starts anew.
        **kwargs: passed to timm.create_model.

    Raises:
        ValueError: the file can't be read or doesn't fit; the message names it.
    """
    try:
        cfg = timm.get_pretrained_cfg(name)
        classifier = cfg.classifier if cfg is not None else "classifier"
        with safe_open(file, "pt") as content:
            file_classes = content.get_slice(f"{classifier}.weight").get_shape()[0]
        return timm.create_model(
            name,
            pretrained=True,
            pretrained_cfg_overlay={"file": str(file), "num_classes": file_classes},
            num_classes=file_classes if num_classes is None else num_classes,
            **kwargs,
        )
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise ValueError(f"{file} can't be loaded into {name}: {error}") from error
