"""Parameters and multiply-adds of a model, counted as in the papers."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import nn

from mobilenets_zoo.lgc.layers import CondensedConv2d, LearnedGroupConv2d

__all__ = ["Profile", "eval_mode", "input_size_of", "profile"]


@dataclass(frozen=True)
class Profile:
    """Cost of one image.

    Attributes:
        params: parameters; a condensed layer's index is not one.
        macs: multiply-adds of convolutions and linear layers, batch 1.
    """

    params: int
    macs: int


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts a model in eval mode and gives each of its modules its training flag back afterwards."""
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, flag in training.items():
            if module.training != flag and type(module).train is not nn.Module.train:
                module.train(flag)  # does more than set the flag, for itself and for what is in it
        for module, flag in training.items():
            module.training = flag


def input_size_of(model: nn.Module) -> Optional[tuple[int, int, int]]:
    """Returns (channels, height, width) of what a model takes, by its `pretrained_cfg`; None where it has none."""
    size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
    return size and (getattr(model, "in_chans", size[0]), *size[1:])  # timm's configuration keeps the weights' channels


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
        weight: Any = module.weight  # no nn.Parameter where it is parametrised
        macs += values.numel() * math.prod(weight.shape[1:])

    kinds = (nn.Linear, nn.modules.conv._ConvNd, LearnedGroupConv2d, CondensedConv2d)
    parameter = next(model.parameters())
    with contextlib.ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        for module in model.modules():
            if isinstance(module, kinds):
                stack.enter_context(module.register_forward_hook(count))
        model(torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype))
    return Profile(sum(p.numel() for p in model.parameters()), macs)
