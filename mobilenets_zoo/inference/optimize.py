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
from mobilenets_zoo.lgc.condense import REWRITTEN, TOLERANCES, check_equivalent, condense, learned_layers
from mobilenets_zoo.lgc.layers import CondensedConv2d
from mobilenets_zoo.models._base import ConvBn, MobileNetBase
from mobilenets_zoo.models.mobilenetv1 import MobileNetV1
from mobilenets_zoo.models.mobilenetv2 import Bottleneck

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
def optimize_for_inference(model: nn.Module, *, dense: bool = False) -> OptimizedNetwork:
    """Returns a new, eval-only network with equal outputs that runs faster.

    Learned group convolutions are condensed, BatchNorm is folded, groups too narrow for fast kernels are merged or
    spread over all inputs, and hidden channels are removed that nothing reads or that are zero for every input
    (`rewrites.py`). `model` stays as it was. `torch.compile` of the result fuses what eager PyTorch computes one by
    one.

    Args:
        model: a network of the zoo, masked or condensed.
        dense: spread every group over all inputs, so that neither gathers nor grouped 1x1 convolutions are left and
            only the removal of hidden channels saves work: what int8 kernels run fastest.

    Raises:
        TypeError: not a network of the zoo.
        ValueError: what `condense` raises, or the outputs differ by more than 1e-4 (float32, and a network in half
            precision, which is rewritten in float32) or 1e-11 (float64) of their scale.
    """
    if not isinstance(model, MobileNetBase):
        raise TypeError(f"{type(model).__name__} is not a network of the zoo; mz.condense works on any model")
    source = condense(model) if learned_layers(model) else copy.deepcopy(model)
    dtype = source.get_parameter("stem.conv.weight").dtype
    source = (source if dtype == torch.float64 else source.float()).eval()  # half precision would round twice
    assert isinstance(source, MobileNetBase)
    assert isinstance(source.stem, ConvBn)
    parts = [block for row in source.blocks for block in row]  # type: ignore[attr-defined]
    fit = spread_over_inputs if dense else fill_registers
    if isinstance(source, MobileNetV1):
        stem, blocks = _optimize_separable([source.stem, *(layer for block in parts for layer in block)], fit)
    else:
        stem = FoldedConv2d(fold_batchnorm(source.stem), act=True)
        blocks = [_optimize_bottleneck(block, fit) for block in parts]
    head_conv: nn.Module = nn.Identity()
    if isinstance(source.head_conv, ConvBn):
        conv = source.head_conv.conv
        assert isinstance(conv, nn.Conv2d | CondensedConv2d)
        head_conv = FoldedConv2d(fit(fold_batchnorm(source.head_conv), conv.in_channels), act=True)
    network = OptimizedNetwork(stem, nn.Sequential(*blocks), head_conv, source)

    weight = stem.weight
    if not weight.is_meta:
        generator = torch.Generator().manual_seed(0)  # the caller's random state stays as it was
        images = torch.randn(2, source.in_chans, 32, 32, generator=generator).to(weight)
        check_equivalent(source, network, images, tolerance=REWRITTEN * TOLERANCES[weight.dtype])
    return network.to(dtype)


def _optimize_separable(layers: list[ConvBn], fit: Fit) -> tuple[FoldedConv2d, list[OptimizedBlock]]:
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
    conv = block.expansion.conv
    assert isinstance(conv, nn.Conv2d | CondensedConv2d)
    layers = hidden_layers(block)
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
