"""Rescaling convolutions that BatchNorm follows: equal outputs, evenly sized weights.

BatchNorm divides by its channel's standard deviation, so the convolution before it may have any scale. Training leaves
very uneven ones, and the step that a learning rate takes, relative to the weight, goes with 1 / norm^2: fine-tuning
tears some layers and hardly moves others.
"""

import torch
from torch import nn

from mobilenets_zoo.lgc.layers import LearnedGroupConv2d

__all__ = ["normalise_"]


@torch.no_grad()
def normalise_(model: nn.Module, form: str = "norm") -> nn.Module:
    for module in model.modules():
        conv, bn = getattr(module, "conv", None), getattr(module, "bn", None)
        if isinstance(conv, nn.Module) and isinstance(bn, nn.BatchNorm2d) and bn.running_var is not None:
            _normalise_pair(conv, bn, form)
    return model


def _normalise_pair(conv, bn, form) -> None:
    weight = conv.masked_weight() if isinstance(conv, LearnedGroupConv2d) else conv.weight
    variance = bn.running_var.double() + bn.eps
    if form == "norm":
        scale = weight.double().flatten(1).norm(dim=1)
    else:
        scale = variance.sqrt()
    rescaled = variance / scale.square() - bn.eps
    unsafe = (bn.running_var <= 0) | (scale <= 0) | ~(rescaled > 0)
    scale[unsafe] = 1.0
    rescaled[unsafe] = bn.running_var[unsafe].double()
    conv.weight.copy_(conv.weight.double() / scale[:, None, None, None])
    if conv.bias is not None:
        conv.bias.copy_(conv.bias.double() / scale)
    bn.running_mean.copy_(bn.running_mean.double() / scale)
    bn.running_var.copy_(rescaled)
