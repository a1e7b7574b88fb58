"""Parameters and multiply-adds of a model, counted as in the papers."""

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Optional

import torch
from torch import nn

from mobilenets_zoo.inference.folded_conv import FoldedConv2d
from mobilenets_zoo.lgc.layers import CondensedConv2d, LearnedGroupConv2d

__all__ = ["Profile", "deployed_milliseconds", "deployed_profiles", "profile"]


@dataclass(frozen=True)
class Profile:
    """Cost of one image.

    Attributes:
        params: trainable parameters, or all of them where none is trainable, as in a network that
            `optimize_for_inference` returns; a condensed layer's index is not one.
        macs: multiply-adds of convolutions and linear layers, batch 1.
    """

    params: int
    macs: int


@torch.no_grad()
def profile(model: nn.Module, input_size: tuple[int, int, int] = (3, 32, 32)) -> Profile:
    """Counts what the model holds and computes in the form it is in.

    A `LearnedGroupConv2d` counts as the dense layer that it computes; profile `condense(model)` for the deployed
    cost. Operations outside `nn` convolution and linear modules count nothing.

    Args:
        model: any model that maps a batch of images; it runs once, in eval mode, where its parameters are.
        input_size: (channels, height, width) of one image.
    """
    macs = 0

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal macs
        # A weight's first axis holds the outputs (of a transposed convolution: the inputs); each of their values
        # costs one multiply-add per weight along the other axes.
        values = inputs[0] if isinstance(module, nn.modules.conv._ConvTransposeNd) else output
        macs += values.numel() * math.prod(module.get_parameter("weight").shape[1:])

    kinds = (nn.Linear, nn.modules.conv._ConvNd, LearnedGroupConv2d, CondensedConv2d, FoldedConv2d)
    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, kinds)]
    training = {module: module.training for module in model.modules()}
    parameter = next(model.parameters())
    try:
        model.eval()
        model(torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype))
    finally:
        for hook in hooks:
            hook.remove()
        for module, flag in training.items():
            module.training = flag
    trainable = [p.numel() for p in model.parameters() if p.requires_grad]
    return Profile(sum(trainable or [p.numel() for p in model.parameters()]), macs)


def deployed_profiles() -> dict[str, Profile]:
    """Returns the cost of every registered model in its deployed form, from the package's profiles.json.

    The file is written by benchmarks/tables.py and recomputed by the tests; reading it is faster than building all
    models.
    """
    return {name: Profile(row["params"], row["macs"]) for name, row in _rows().items()}


def deployed_milliseconds() -> dict[str, Optional[float]]:
    """Returns the measured time of one image by model, from the package's profiles.json.

    ONNX Runtime, fp32, one thread, as `optimize_for_inference` leaves the network, on the machine that
    docs/condensing.md names; None where it wasn't measured.
    """
    return {name: row["ms"] for name, row in _rows().items()}


@lru_cache(maxsize=1)
def _rows() -> dict[str, dict[str, Any]]:
    return json.loads((Path(__file__).parent / "profiles.json").read_text(encoding="utf-8"))
