"""Networks rewritten for inference: equal outputs, less time."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Optional

import torch
from torch import nn
from torch.nn import functional as F

from mobilenets_zoo.inference.rewrites import (
    Convolution,
    HiddenLayers,
    as_convolution,
    fill_registers,
    fold_batchnorm,
    hidden_layers,
    remove_dead_hidden,
    spread_over_inputs,
)
from mobilenets_zoo.inference.unread import remove_unread_channels_
from mobilenets_zoo.lgc.condense import REWRITTEN, TOLERANCES, check_equivalent, condense, learned_layers
from mobilenets_zoo.lgc.layers import CondensedConv2d
from mobilenets_zoo.models._base import ConvBn, MobileNetBase
from mobilenets_zoo.models.mobilenetv1 import MobileNetV1
from mobilenets_zoo.models.mobilenetv2 import Bottleneck
from mobilenets_zoo.profiling import input_size_of

__all__ = ["FoldedConv2d", "OptimizedNetwork", "optimize_for_inference"]

# Gives a 1x1 convolution with so many inputs the form that is fastest.
Fit = Callable[[Convolution, int], Convolution]


class FoldedConv2d(nn.Conv2d):
    """A convolution with bias and ReLU6, after a gather of its input channels where `index` is given."""

    index: Optional[torch.Tensor]

    def __init__(self, convolution: Convolution, act: bool):
        weight, groups = convolution.weight, convolution.groups
        channels, kernel = weight.shape[1] * groups, weight.shape[-1]
        super().__init__(
            channels, len(weight), kernel, convolution.stride, kernel // 2, groups=groups, device="meta"
        )  # the values that it would draw are replaced
        self.weight = nn.Parameter(weight.clone(), requires_grad=False)
        self.bias = nn.Parameter(convolution.bias.clone(), requires_grad=False)
        self.register_buffer("index", convolution.index)
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride), rounded up."""
        index = self.index  # TorchScript narrows the type of a local name alone
        x = self._conv_forward(x if index is None else x.index_select(1, index), self.weight, self.bias)
        return F.relu6(x) if self.act else x


class OptimizedBlock(nn.Module):
    """A sequence of folded convolutions with an optional shortcut around it."""

    def __init__(self, layers: Sequence[nn.Module], shortcut: Optional[nn.Module]):
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.shortcut = shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layers(x)
        return y if self.shortcut is None else y + self.shortcut(x)


class OptimizedNetwork(nn.Module):
    """A zoo network rewritten for inference; made by `optimize_for_inference`. It can't be trained."""

    def __init__(self, stem: nn.Module, blocks: nn.Sequential, head_conv: nn.Module, model: MobileNetBase):
        super().__init__()
        self.stem, self.blocks, self.head_conv = stem, blocks, head_conv
        self.global_pool, self.classifier = copy.deepcopy(model.global_pool), copy.deepcopy(model.classifier)
        self.num_classes, self.in_chans = model.num_classes, model.in_chans
        self.pretrained_cfg = dict(getattr(model, "pretrained_cfg", None) or {})
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "OptimizedNetwork":
        """Stays in eval mode.

        Raises:
            RuntimeError: `mode` is True.
        """
        if mode:
            raise RuntimeError("an optimized network is for inference; train the model that it was made from")
        return super().train(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps images (N, in_chans, H, W) to logits (N, num_classes)."""
        x = self.head_conv(self.blocks(self.stem(x)))
        return self.classifier(self.global_pool(x))


@torch.no_grad()
def optimize_for_inference(
    model: nn.Module, *, dense: bool = False, input_size: Optional[tuple[int, int, int]] = None
) -> nn.Module:
    """Returns a new network for inference with equal outputs that runs faster.

    Learned group convolutions are condensed, groups too narrow for fast kernels are merged or spread over all inputs,
    and hidden channels are removed that nothing reads. Of the zoo's networks, BatchNorm is folded as well, channels go
    that are zero for every input (`rewrites.py`), and the result stays in eval mode. Another network keeps its class,
    but feature maps inside may have fewer channels than it says. `model` stays as it was. `torch.compile` of the result
    fuses what eager PyTorch computes one by one.

    Args:
        model: a network of the zoo, masked or condensed, or another one with learned or condensed layers.
        dense: spread every group over all inputs, so that neither gathers nor grouped 1x1 convolutions are left and
            only the removal of hidden channels saves work: what int8 kernels run fastest.
        input_size: (channels, height, width) of the images that outputs are compared on; by default 32 x 32 pixels for
            a network of the zoo, and what another one's `pretrained_cfg` names.

    Raises:
        ValueError: what `condense` raises, another network that torch.fx can't trace or that names no input size, one
            of the zoo with something else in place of a convolution or a BatchNorm, convolutions to rewrite that have
            hooks, or outputs that differ by more than 1e-4 (float32, and the zoo's in half precision, which are
            rewritten in float32), 1e-11 (float64), or another network's 0.1 (float16) or 0.5 (bfloat16) of their scale.
    """
    zoo = isinstance(model, MobileNetBase)
    size = input_size or ((model.in_chans, 32, 32) if zoo else input_size_of(model))
    if size is None:
        raise ValueError(f"{type(model).__name__} names no input size; pass input_size=(channels, height, width)")
    source = (condense(model) if learned_layers(model) or not zoo else copy.deepcopy(model)).eval()
    dtype = next(source.parameters()).dtype
    if zoo and dtype != torch.float64:
        source = source.float()  # to fold BatchNorm in half precision would round twice
    fit = spread_over_inputs if dense else fill_registers
    network = _optimize_zoo(source, fit) if isinstance(source, MobileNetBase) else _optimize_other(source, fit)

    weight = next(network.parameters())
    if not weight.is_meta:
        generator = torch.Generator().manual_seed(0)  # the caller's random state stays as it was
        images = torch.randn(2, *size, generator=generator).to(weight)
        check_equivalent(source, network, images, tolerance=REWRITTEN * TOLERANCES[weight.dtype])
    return network.to(dtype) if zoo else network


def _optimize_other(source: nn.Module, fit: Fit) -> nn.Module:
    """Rewrites the condensed layers of any network, and what feeds them."""
    network = copy.deepcopy(source)
    layers = [layer for layer in network.modules() if isinstance(layer, CondensedConv2d)]
    if not layers[0].weight.is_meta:
        remove_unread_channels_(network)
    memo = {id(layer): FoldedConv2d(fit(as_convolution(layer), layer.in_channels), act=False) for layer in layers}
    return copy.deepcopy(network, memo=dict(memo)).eval().requires_grad_(False)


def _optimize_zoo(source: MobileNetBase, fit: Fit) -> OptimizedNetwork:
    parts = [block for row in source.blocks for block in row]  # type: ignore[attr-defined]
    if isinstance(source, MobileNetV1):
        stem, blocks = _optimize_separable([source.stem, *(layer for block in parts for layer in block)], fit)
    else:
        stem = FoldedConv2d(fold_batchnorm(source.stem), act=True)
        blocks = [_optimize_bottleneck(block, fit) for block in parts]
    head_conv: nn.Module = nn.Identity()
    if isinstance(source.head_conv, ConvBn):
        folded, conv = fold_batchnorm(source.head_conv), source.head_conv.conv
        assert isinstance(conv, nn.Conv2d | CondensedConv2d)
        head_conv = FoldedConv2d(fit(folded, conv.in_channels), act=True)
    return OptimizedNetwork(stem, nn.Sequential(*blocks), head_conv, source)


def _optimize_separable(layers: list[nn.Module], fit: Fit) -> tuple[FoldedConv2d, list[OptimizedBlock]]:
    """Rewrites MobileNetV1's layers, which are dense but where `to_learned_group_conv` made others of them."""
    folded = [fold_batchnorm(layer) for layer in layers]
    for i in range(1, len(folded), 2):
        hidden = remove_dead_hidden(HiddenLayers(*folded[i - 1 : i + 2]))
        folded[i - 1 : i + 2] = hidden.expansion, hidden.depthwise, hidden.projection
    for i in range(2, len(folded), 2):
        folded[i] = fit(folded[i], len(folded[i - 1].weight))
    stem, *rest = (FoldedConv2d(layer, act=True) for layer in folded)
    return stem, [OptimizedBlock(rest[i : i + 2], None) for i in range(0, len(rest), 2)]


def _optimize_bottleneck(block: Bottleneck, fit: Fit) -> OptimizedBlock:
    layers, conv = hidden_layers(block), block.expansion.conv
    assert isinstance(conv, nn.Conv2d | CondensedConv2d)
    layers = remove_dead_hidden(replace(layers, expansion=fit(layers.expansion, conv.in_channels)))
    parts: list[nn.Module] = [
        FoldedConv2d(layers.expansion, act=True),
        FoldedConv2d(layers.depthwise, act=True),
        FoldedConv2d(fit(layers.projection, len(layers.expansion.weight)), act=False),
    ]
    if isinstance(block.shuffle_out, nn.ChannelShuffle):
        parts.append(copy.deepcopy(block.shuffle_out))
    shortcut: Optional[nn.Module] = nn.Identity() if block.has_shortcut else None
    if isinstance(block.shortcut, nn.Conv2d | CondensedConv2d):  # condensed where to_learned_group_conv made it
        shortcut = FoldedConv2d(fit(as_convolution(block.shortcut), conv.in_channels), act=False)
    return OptimizedBlock(parts, shortcut)
