"""Exact rewrites of a bottleneck for inference: functions on its three convolutions.

`optimize.py` puts them in order: BatchNorm is folded, a channel shuffle becomes the order in which the projection
reads, groups fill registers, and hidden channels go that nothing reads or that are always zero. In MobileNetV1 the
channels between two pointwise convolutions are the hidden ones.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Optional

import torch
from timm.layers import FrozenBatchNormAct2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from mobilenets_zoo.lgc.gather import ONNX_MIN_SAVED, gather_pays
from mobilenets_zoo.lgc.layers import CondensedConv2d, LearnedGroupConv2d, has_hooks
from mobilenets_zoo.models.mobilenetv2 import Bottleneck

# float32 values in a 512-bit register: kernels for blocked layouts work on so many channels at once.
SIMD_CHANNELS = 16


@dataclass(frozen=True)
class Convolution:
    """A convolution with its BatchNorm folded in.

    Attributes:
        weight: (out_channels, inputs per group, kernel, kernel).
        bias: (out_channels,).
        groups: number of groups.
        stride: (vertical, horizontal).
        index: input channels to gather first, int64, or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    groups: int = 1
    stride: tuple[int, int] = (1, 1)
    index: Optional[torch.Tensor] = None


def merge_groups(convolution: Convolution, merge: int) -> Convolution:
    """Makes one group of every `merge` neighbouring ones; zeros fill what a group didn't read.

    More multiply-adds, but groups that are too narrow for the registers cost more than the zeros do.
    """
    weight, groups = convolution.weight, convolution.groups
    blocks = weight.reshape(groups // merge, merge, len(weight) // groups, 1, *weight.shape[1:])
    merged = blocks * torch.eye(merge).to(weight).reshape(merge, 1, merge, 1, 1, 1)
    shape = (len(weight), merge * weight.shape[1], *weight.shape[2:])
    return replace(convolution, weight=merged.reshape(shape), groups=groups // merge)


def spread_over_inputs(convolution: Convolution, in_channels: int) -> Convolution:
    """Returns a dense convolution without a gather; zeros stand where a group doesn't read an input."""
    weight, index, groups = convolution.weight, convolution.index, convolution.groups
    assert weight.shape[2:] == (1, 1)
    if index is None:
        return merge_groups(convolution, groups)
    columns = index.reshape(groups, 1, -1).expand(-1, len(weight) // groups, -1).flatten(0, 1)
    # Added, not written: a channel shuffle may have made a group read an input more than once.
    dense = weight.new_zeros(len(weight), in_channels).scatter_add_(1, columns, weight.flatten(1))
    return replace(convolution, weight=dense[:, :, None, None], groups=1, index=None)


@dataclass(frozen=True)
class HiddenLayers:
    """Three convolutions, a ReLU6 behind the first and the second; the first one's outputs are the hidden channels."""

    expansion: Convolution
    depthwise: Convolution
    projection: Convolution


def as_convolution(conv: nn.Conv2d | CondensedConv2d | LearnedGroupConv2d) -> Convolution:
    """Returns what a layer computes, with zeros for a bias that it doesn't have; a masked layer is a dense one.

    Raises:
        ValueError: the layer has hooks.
    """
    if has_hooks(conv):
        raise ValueError("can't rewrite a layer with hooks, which would be lost: remove them first")
    weight = (conv.masked_weight() if isinstance(conv, LearnedGroupConv2d) else conv.weight).detach()
    return Convolution(
        weight=weight,
        bias=weight.new_zeros(len(weight)) if conv.bias is None else conv.bias.detach(),
        groups=1 if isinstance(conv, LearnedGroupConv2d) else conv.groups,
        stride=(conv.stride[0], conv.stride[1]),
        index=conv.index if isinstance(conv, CondensedConv2d) else None,
    )


def fold_batchnorm(layer: nn.Module) -> Convolution:
    """Returns the layer's convolution with the scale and shift of its BatchNorm in weight and bias.

    Raises:
        ValueError: no such layer, BatchNorm without running statistics, or a convolution with hooks.
    """
    conv: Any = getattr(layer, "conv", None)
    bn: Any = getattr(layer, "bn", None)
    known = isinstance(conv, nn.Conv2d | CondensedConv2d | LearnedGroupConv2d)
    known &= isinstance(bn, _BatchNorm | FrozenBatchNormAct2d)  # the latter where timm.utils.freeze was called
    if not known or bn.running_var is None:
        raise ValueError(f"can't rewrite a {type(layer).__name__} that isn't a convolution with BatchNorm behind it")
    convolution = as_convolution(conv)
    weight, bias = fuse_conv_bn_weights(
        convolution.weight, convolution.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
    )
    return replace(convolution, weight=weight.detach(), bias=bias.detach())


def absorb_shuffle(layers: HiddenLayers, shuffle_groups: int) -> HiddenLayers:
    """Turns a channel shuffle of the hidden channels into the order in which the projection reads them."""
    hidden = len(layers.expansion.weight)
    read = torch.arange(hidden, device=layers.expansion.weight.device).reshape(shuffle_groups, -1).t().flatten()
    # The depthwise layer ran behind the shuffle and now runs in front of it.
    weight, bias = (
        torch.empty_like(t).index_copy_(0, read, t) for t in (layers.depthwise.weight, layers.depthwise.bias)
    )
    return HiddenLayers(
        layers.expansion,
        replace(layers.depthwise, weight=weight, bias=bias),
        replace(layers.projection, index=read),
    )


def hidden_layers(block: Bottleneck) -> HiddenLayers:
    """Returns a condensed bottleneck's convolutions with BatchNorm folded in and no shuffle between them."""
    layers = HiddenLayers(*(fold_batchnorm(part) for part in (block.expansion, block.depthwise, block.projection)))
    if isinstance(block.shuffle_hidden, nn.ChannelShuffle):
        layers = absorb_shuffle(layers, block.shuffle_hidden.groups)
    return layers


def fill_registers(convolution: Convolution, in_channels: int) -> Convolution:
    """Returns the form of a 1x1 convolution whose groups are wide enough for fast kernels.

    Neighbouring groups are merged until each has at least `SIMD_CHANNELS` inputs and outputs. Where that leaves one
    group, or a gather that doesn't pay, the convolution is spread over all inputs.
    """
    outputs, inputs, groups = len(convolution.weight), convolution.weight.shape[1], convolution.groups
    for merge in (merge for merge in range(1, groups) if groups % merge == 0):
        if merge * min(inputs, outputs // groups) < SIMD_CHANNELS:
            continue
        size = (groups // merge, merge * inputs)
        if convolution.index is None or gather_pays(outputs, in_channels, *size, ONNX_MIN_SAVED):
            return merge_groups(convolution, merge)
    return spread_over_inputs(convolution, in_channels)


def always_zero(depthwise: Convolution) -> torch.Tensor:
    """Returns which channels of a depthwise layer between two ReLU6 are zero for every input, bool (channels,).

    Inputs lie between 0 and 6, as padding does: nothing gives more than 6 wherever the weight is positive.
    """
    return depthwise.bias + 6.0 * depthwise.weight.clamp_min(0.0).flatten(1).sum(1) <= 0.0


def living_channels(alive: torch.Tensor, groups: int, multiple: int) -> torch.Tensor:
    """Returns the numbers of the channels to keep, ascending, so that groups stay equally large.

    That is a multiple of `multiple` in each, if there are so many: one with more dead channels keeps some of them.
    """
    alive = alive.reshape(groups, -1)
    keep = min(alive.shape[1], max(1, -(-int(alive.sum(1).max()) // multiple)) * multiple)
    # Living channels first, in their order; the sort is stable.
    chosen = alive.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :keep].sort(1).values
    return (chosen + alive.shape[1] * torch.arange(groups, device=alive.device)[:, None]).flatten()


def remove_dead_hidden(layers: HiddenLayers) -> HiddenLayers:
    """Leaves out hidden channels that no group of the projection reads, or that are always zero.

    Groups stay equally large, and all together, or each where the expansion is blocked, a multiple of `SIMD_CHANNELS`.
    """
    expansion, depthwise, projection = layers.expansion, layers.depthwise, layers.projection
    index, device, hidden = projection.index, expansion.weight.device, len(expansion.weight)
    if expansion.weight.is_meta:
        return layers
    alive, groups = ~always_zero(depthwise), expansion.groups
    if index is not None:
        alive &= torch.zeros_like(alive).index_fill_(0, index, True)
    else:  # the projection's groups divide the channels, too
        groups = math.lcm(groups, projection.groups)
    order = living_channels(
        alive, groups, SIMD_CHANNELS // (1 if _is_blocked(expansion) else math.gcd(SIMD_CHANNELS, groups))
    )
    if len(order) == hidden:
        return layers
    if index is None:
        rows = projection.weight.flatten(1).unflatten(0, (projection.groups, -1))
        columns = order.reshape(projection.groups, -1) % rows.shape[2]
        weight = rows.gather(2, columns[:, None].expand(-1, rows.shape[1], -1)).flatten(0, 1)[:, :, None, None]
    else:  # what reads a channel that is always zero reads another one, times zero
        position = torch.full((hidden,), -1, device=device).index_put_((order,), torch.arange(len(order)).to(index))
        index = position[index]
        rows = projection.weight.unflatten(0, (projection.groups, -1))
        weight = (rows * (index >= 0).reshape(projection.groups, 1, -1, 1, 1)).flatten(0, 1)
        index = index.clamp_min(0)
    return HiddenLayers(
        expansion=replace(expansion, weight=expansion.weight[order], bias=expansion.bias[order]),
        depthwise=replace(depthwise, weight=depthwise.weight[order], bias=depthwise.bias[order], groups=len(order)),
        projection=replace(projection, weight=weight, index=index),
    )


def _is_blocked(convolution: Convolution) -> bool:
    """Whether kernels for blocked layouts take a 1x1 convolution; a dense one they take with any width."""
    outputs, inputs = len(convolution.weight) // convolution.groups, convolution.weight.shape[1]
    return convolution.groups == 1 or (outputs % SIMD_CHANNELS == 0 and inputs % SIMD_CHANNELS == 0)
