"""Convolutions of even scale before BatchNorm, so that one learning rate suits all layers.

BatchNorm divides by its channel's standard deviation: the convolution before it may have any scale, and training leaves
very uneven ones. A step changes a channel by the learning rate over the square of its weights' norm, so that a usual
rate hardly moves some layers and tears others.
"""

from typing import Any

import torch
from torch import nn

from mobilenets_zoo.lgc.layers import LearnedGroupConv2d

__all__ = ["normalise_"]


@torch.no_grad()
def normalise_(model: nn.Module) -> nn.Module:
    """Scales each output channel of a convolution that BatchNorm follows to weights of norm 1, in place.

    Outputs in eval mode stay equal up to rounding, for BatchNorm's mean and variance are scaled alike. Convolutions are
    found in modules that hold `conv` and `bn` and nothing else, as all of the zoo's do; plain, masked and condensed.
    Channels whose variance doesn't exceed BatchNorm's epsilon stay: they hold next to nothing, and in training mode
    another scale would wake them.

    Returns:
        `model`.
    """
    for module in model.modules():
        if [name for name, _ in module.named_children()] != ["conv", "bn"]:
            continue
        conv: Any = module.conv
        bn: Any = module.bn
        weight = conv.masked_weight() if isinstance(conv, LearnedGroupConv2d) else conv.weight
        norm = weight.double().flatten(1).norm(dim=1)
        variance = (bn.running_var.double() + bn.eps) / norm.square() - bn.eps  # what keeps (var + eps) / norm^2
        chosen = (bn.running_var > bn.eps) & (norm > 0) & (variance > 0)
        norm = torch.where(chosen, norm, 1.0)
        conv.weight.copy_(conv.weight.double() / norm[:, None, None, None])
        if conv.bias is not None:
            conv.bias.copy_(conv.bias.double() / norm)
        bn.running_mean.copy_(bn.running_mean.double() / norm)
        bn.running_var.copy_(torch.where(chosen, variance, bn.running_var.double()))
    return model
