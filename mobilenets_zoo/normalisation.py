"""Convolutions of even scale before BatchNorm, so that one learning rate suits all layers.

BatchNorm divides by its channel's standard deviation: the convolution before it may have any scale, and training leaves
very uneven ones. A step changes a channel by the learning rate over the square of its weights' norm, so that a usual
rate hardly moves some layers and tears others.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mobilenets_zoo.lgc.convert import PLAIN_CONVOLUTIONS
from mobilenets_zoo.lgc.layers import CondensedConv2d, LearnedGroupConv2d

__all__ = ["normalise_"]


@torch.no_grad()
def normalise_(model: nn.Module) -> nn.Module:
    """Scales each output channel of a convolution that BatchNorm follows to weights of a norm near 1, in place.

    Scales are powers of two, so that no weight is rounded, and norms lie between 0.7 and 1.42. BatchNorm's mean and
    variance are scaled alike: outputs in eval mode stay equal up to rounding of the variance. It is done for the zoo's
    `ConvBn` alone, since in others' modules something may lie between the two; plain, masked and condensed, not where
    weights are computed. Channels whose variance doesn't exceed BatchNorm's epsilon stay: they hold next to nothing,
    and in training mode another scale would wake them.

    Returns:
        `model`.
    """
    from mobilenets_zoo.models._base import ConvBn  # which needs this module

    for module in model.modules():
        if not isinstance(module, ConvBn):
            continue
        conv: Any = module.conv
        bn: Any = module.bn
        plain = type(conv) in (*PLAIN_CONVOLUTIONS, LearnedGroupConv2d, CondensedConv2d)
        if not plain or not isinstance(module.bn, _BatchNorm) or bn.running_var is None:
            continue
        weight = conv.masked_weight() if isinstance(conv, LearnedGroupConv2d) else conv.weight
        scale = weight.double().flatten(1).norm(dim=1).log2().round().exp2()
        variance = (bn.running_var.double() + bn.eps) / scale.square() - bn.eps  # what keeps (var + eps) / scale^2
        chosen = (bn.running_var > bn.eps) & (scale > 0) & (variance > 0)
        scale = torch.where(chosen, scale, 1.0)
        conv.weight.copy_(conv.weight.double() / scale[:, None, None, None])
        if conv.bias is not None:
            conv.bias.copy_(conv.bias.double() / scale)
        bn.running_mean.copy_(bn.running_mean.double() / scale)
        bn.running_var.copy_(torch.where(chosen, variance, bn.running_var.double()))
    return model
