"""Parameters and multiply-adds of a model, counted as in the papers."""

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from mobilenets_zoo.learned_group_conv import CondensedConv2d, LearnedGroupConv2d

__all__ = ["Profile", "deployed_profiles", "profile"]


@dataclass(frozen=True)
class Profile:
    """Cost of one image.

    Attributes:
        params: trainable parameters; a condensed layer's index is not one.
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

    kinds = (nn.Linear, nn.modules.conv._ConvNd, LearnedGroupConv2d, CondensedConv2d)
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
    return Profile(sum(p.numel() for p in model.parameters() if p.requires_grad), macs)


@lru_cache(maxsize=1)
def deployed_profiles() -> dict[str, Profile]:
    """Returns the cost of every registered model in its deployed form, from the package's profiles.json.

    The file is written by benchmarks/tables.py and recomputed by the tests; reading it is faster than building all
    models.
    """
    rows = json.loads((Path(__file__).parent / "profiles.json").read_text(encoding="utf-8"))
    return {name: Profile(**row) for name, row in rows.items()}
