"""Exact rewrites of a trained network for inference.

Each rewrite is a function on one bottleneck, described by a `HiddenLayers`. `forms` combines them, `estimated_time`
says what each combination costs, and `optimize_for_inference` takes the cheapest for every bottleneck of a network and
checks the outputs before it returns.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Optional

import torch
from torch import nn

from mobilenets_zoo.condensing import check_equivalent, condense, learned_layers
from mobilenets_zoo.folded_conv import Convolution, FoldedConv2d, merge_groups, spread_over_inputs
from mobilenets_zoo.learned_group_conv import CondensedConv2d
from mobilenets_zoo.models._base import ConvBn, MobileNetBase
from mobilenets_zoo.models.mobilenetv1 import DepthwiseSeparableBlock
from mobilenets_zoo.models.mobilenetv2 import Bottleneck, ChannelShuffle

__all__ = ["OptimizedNetwork", "optimize_for_inference"]

# Widths that fill a 512-bit register of float32 values: kernels for blocked layouts take multiples of it only.
SIMD_CHANNELS = 16

# Nanoseconds that ONNX Runtime takes per unit of `work`, fitted by benchmarks/rewrite_choice.py to the timings of every
# form of the zoo's bottlenecks with one image on two threads (AVX-512). Only their ratios matter,
# and single ones say little: what a convolution reads and writes goes hand in hand with what is moved around it.
COSTS = {
    "blocked multiply-adds": 0.00977,
    "blocked outputs": 0.0,
    "plain multiply-adds": 0.00964,
    "plain inputs": 0.0149,
    "plain outputs": 0.129,
    "depthwise outputs": 0.29,
    "values to plain": 0.165,
    "values to blocked": 0.0366,
    "gathered values": 0.162,
    "gathers": 1050.0,
}

# Verification: the largest error relative to the outputs' scale.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}


@dataclass(frozen=True)
class HiddenLayers:
    """The three convolutions of a bottleneck; the expansion's outputs are the hidden channels."""

    expansion: Convolution
    depthwise: Convolution
    projection: Convolution


def fold_batchnorm(layer: ConvBn) -> Convolution:
    """Returns the layer's convolution with the scale and shift of its BatchNorm in weight and bias."""
    conv, bn = layer.conv, layer.bn
    assert isinstance(conv, nn.Conv2d | CondensedConv2d)
    scale = bn.weight / torch.sqrt(bn.running_var + bn.eps)
    return Convolution(
        weight=(conv.weight * scale[:, None, None, None]).detach(),
        bias=(bn.bias - bn.running_mean * scale).detach(),
        groups=conv.groups,
        stride=conv.stride[0] if isinstance(conv, nn.Conv2d) else 1,
        index=conv.index if isinstance(conv, CondensedConv2d) else None,
    )


def select_hidden(layers: HiddenLayers, order: torch.Tensor, read: Optional[torch.Tensor]) -> HiddenLayers:
    """Returns layers that compute the hidden channels `order`, which may repeat or leave out some.

    Args:
        layers: a bottleneck's.
        order: hidden channels to compute, equally many from each of the expansion's groups and group by group.
        read: positions in `order` that the projection gathers, None where it reads them as they come.
    """
    expansion, depthwise = layers.expansion, layers.depthwise
    return HiddenLayers(
        expansion=replace(expansion, weight=expansion.weight[order], bias=expansion.bias[order]),
        depthwise=replace(depthwise, weight=depthwise.weight[order], bias=depthwise.bias[order], groups=len(order)),
        projection=replace(layers.projection, index=read),
    )


def widenings(convolution: Convolution, in_channels: int) -> Iterator[Convolution]:
    """Yields the convolution as it is, with merged groups, and spread over all inputs without a gather."""
    for merge in range(1, convolution.groups):
        if convolution.groups % merge == 0:
            yield merge_groups(convolution, merge)
    yield spread_over_inputs(convolution, in_channels)


def compute_in_reading_order(layers: HiddenLayers) -> HiddenLayers:
    """Lets a dense expansion put out hidden channels as the projection reads them: its gather disappears.

    Dead channels, which no group reads, are left out; a channel that several groups read is computed for each. With as
    many groups as the condense factor the number of hidden channels stays the same.
    """
    index = layers.projection.index
    if index is None or layers.expansion.groups > 1:
        return layers
    return select_hidden(layers, index, None)


def remove_dead_hidden(layers: HiddenLayers) -> HiddenLayers:
    """Leaves out hidden channels that no group of the projection reads.

    The expansion's groups stay equally large, and all together, or each where the expansion is blocked, a multiple of
    `SIMD_CHANNELS`: a group with more dead channels than the others keeps some of them.
    """
    index = layers.projection.index
    if index is None:
        return layers
    groups, hidden = layers.expansion.groups, len(layers.expansion.weight)
    size = hidden // groups
    alive = torch.zeros(hidden, dtype=torch.bool, device=index.device).index_fill_(0, index, True).reshape(groups, size)
    most = int(alive.sum(1).max())
    multiple = SIMD_CHANNELS // (1 if is_blocked(layers.expansion) else math.gcd(SIMD_CHANNELS, groups))
    keep = min(size, -(-most // multiple) * multiple)
    if keep == size:
        return layers
    # Living channels first, in their order; the sort is stable.
    chosen = alive.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :keep].sort(1).values
    order = (chosen + size * torch.arange(groups, device=index.device)[:, None]).flatten()
    position = torch.full((hidden,), -1, device=index.device).index_put_((order,), torch.arange(len(order)).to(index))
    return select_hidden(layers, order, position[index])


def is_blocked(convolution: Convolution) -> bool:
    """Whether kernels for blocked layouts take a 1x1 convolution; a dense one they take with any width."""
    outputs, inputs = len(convolution.weight) // convolution.groups, convolution.weight.shape[1]
    return convolution.groups == 1 or (outputs % SIMD_CHANNELS == 0 and inputs % SIMD_CHANNELS == 0)


def work(layers: HiddenLayers, in_channels: int, size: int) -> dict[str, int]:
    """Returns how often a bottleneck does what `COSTS` names, for one image.

    A blocked kernel computes on a layout in blocks of `SIMD_CHANNELS`, a plain one on NCHW. What stands around the
    bottleneck and its depthwise convolution are blocked.

    Args:
        layers: the bottleneck's.
        in_channels: the bottleneck's.
        size: height and width of its input.
    """
    result = dict.fromkeys(COSTS, 0)

    def blocks(channels: int) -> int:
        return -(-channels // SIMD_CHANNELS) * SIMD_CHANNELS

    def add(convolution: Convolution, channels: int, pixels: int) -> None:
        groups, inputs = convolution.groups, convolution.weight.shape[1]
        outputs, blocked = len(convolution.weight) // groups, is_blocked(convolution)
        if convolution.index is not None or not blocked:
            result["values to plain"] += pixels * channels
        if convolution.index is not None:
            result["gathers"] += 1
            result["gathered values"] += pixels * len(convolution.index)
            result["values to blocked"] += pixels * len(convolution.index) if blocked else 0
        if blocked:
            result["blocked multiply-adds"] += pixels * groups * blocks(outputs) * blocks(inputs)
            result["blocked outputs"] += pixels * groups * blocks(outputs)
        else:
            result["plain multiply-adds"] += pixels * groups * outputs * inputs
            result["plain inputs"] += pixels * groups * inputs
            result["plain outputs"] += pixels * groups * outputs
            result["values to blocked"] += pixels * groups * outputs

    hidden = len(layers.expansion.weight)
    pixels = math.ceil(size / layers.depthwise.stride) ** 2
    add(layers.expansion, in_channels, size**2)
    result["depthwise outputs"] += pixels * hidden
    add(layers.projection, hidden, pixels)
    return result


def estimated_time(layers: HiddenLayers, in_channels: int, size: int) -> float:
    """Returns nanoseconds for one image, to compare forms of one bottleneck; arguments as of `work`."""
    return sum(COSTS[key] * amount for key, amount in work(layers, in_channels, size).items())


def forms(layers: HiddenLayers, in_channels: int) -> Iterator[HiddenLayers]:
    """Yields every form of a bottleneck: groups merged or not, gathers kept, spread or moved into a dense expansion."""
    for expansion in widenings(layers.expansion, in_channels):
        # Which hidden channels can go depends on the expansion's groups, what the gather costs on how many are left.
        alive = remove_dead_hidden(replace(layers, expansion=expansion))
        ordered = compute_in_reading_order(alive)
        for form in (alive,) if ordered is alive else (alive, ordered):
            for projection in widenings(form.projection, len(form.expansion.weight)):
                yield replace(form, projection=projection)


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


class OptimizedBlock(nn.Module):
    """A sequence of folded convolutions with an optional shortcut around it."""

    def __init__(self, layers: list[nn.Module], shortcut: Optional[nn.Module]):
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
        self.pretrained_cfg = dict(model.pretrained_cfg)  # type: ignore[arg-type]
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

    BatchNorm is folded, learned group convolutions are condensed, and hidden channels that nothing reads are removed.
    Then each bottleneck takes the form that costs least: its groups as they are or merged, its gathers kept, spread
    into a dense convolution, or moved into a dense expansion that puts its channels out in reading order. `model`
    stays as it was.

    Args:
        model: a network of the zoo, masked or condensed.
        dense: spread every group over all inputs, so that neither gathers nor grouped 1x1 convolutions are left and
            only the removal of hidden channels saves work: what int8 kernels run fastest.

    Raises:
        TypeError: not a network of the zoo.
        ValueError: a mask isn't finished, or the outputs differ by more than 1e-4 (float32) or 1e-10 (float64) of
            their scale.
    """
    if not isinstance(model, MobileNetBase):
        raise TypeError(f"{type(model).__name__} is not a network of the zoo; mz.condense works on any model")
    source = condense(model) if learned_layers(model) else copy.deepcopy(model)
    source.eval()
    assert isinstance(source, MobileNetBase)
    assert isinstance(source.stem, ConvBn)
    stem = _folded(source.stem)
    size = math.ceil(dict(source.pretrained_cfg)["input_size"][-1] / stem.stride)  # type: ignore[arg-type]
    blocks = nn.Sequential()
    for block in (block for row in source.blocks for block in row):  # type: ignore[attr-defined]
        blocks.append(_optimize_block(block, size, dense))
        size = math.ceil(size / block.depthwise.conv.stride[0])
    head_conv = _folded(source.head_conv) if isinstance(source.head_conv, ConvBn) else nn.Identity()
    network = OptimizedNetwork(stem, blocks, head_conv, source)

    weight = network.stem.get_parameter("weight")
    if weight.dtype in TOLERANCES and not weight.is_meta:
        generator = torch.Generator().manual_seed(0)  # the caller's random state stays as it was
        images = torch.randn(2, source.in_chans, 32, 32, generator=generator).to(weight)
        check_equivalent(source, network, images, tolerance=TOLERANCES[weight.dtype])
    return network


def _folded(layer: ConvBn) -> FoldedConv2d:
    return FoldedConv2d(fold_batchnorm(layer), isinstance(layer.bn.act, nn.ReLU6))


def hidden_layers(block: Bottleneck) -> HiddenLayers:
    """Returns a condensed bottleneck's convolutions with BatchNorm folded in and no shuffle between them."""
    layers = HiddenLayers(*(fold_batchnorm(part) for part in (block.expansion, block.depthwise, block.projection)))
    if isinstance(block.shuffle_hidden, ChannelShuffle):
        layers = absorb_shuffle(layers, block.shuffle_hidden.groups)
    return layers


def optimized_layers(layers: HiddenLayers) -> list[nn.Module]:
    """Returns the modules that compute a bottleneck."""
    return [
        FoldedConv2d(layers.expansion, act=True),
        FoldedConv2d(layers.depthwise, act=True),
        FoldedConv2d(layers.projection, act=False),
    ]


def _optimize_block(block: nn.Module, size: int, dense: bool) -> OptimizedBlock:
    """Rewrites a block whose input is `size` pixels wide."""
    if isinstance(block, DepthwiseSeparableBlock):
        return OptimizedBlock([_folded(block.depthwise), _folded(block.pointwise)], None)
    assert isinstance(block, Bottleneck)
    layers = hidden_layers(block)
    conv = block.expansion.conv
    assert isinstance(conv, nn.Conv2d | CondensedConv2d)
    if dense:
        expansion = spread_over_inputs(layers.expansion, conv.in_channels)
        layers = remove_dead_hidden(replace(layers, expansion=expansion))
        projection = spread_over_inputs(layers.projection, len(layers.expansion.weight))
        layers = replace(layers, projection=projection)
    else:
        layers = min(forms(layers, conv.in_channels), key=lambda form: estimated_time(form, conv.in_channels, size))
    parts = optimized_layers(layers)
    if isinstance(block.shuffle_out, ChannelShuffle):
        parts.append(copy.deepcopy(block.shuffle_out))
    shortcut: Optional[nn.Module] = nn.Identity() if block.has_shortcut else None
    if isinstance(block.shortcut, nn.Conv2d | CondensedConv2d):  # condensed where to_learned_group_conv made it
        weight = block.shortcut.weight.detach()
        index = block.shortcut.index if isinstance(block.shortcut, CondensedConv2d) else None
        convolution = Convolution(weight, weight.new_zeros(len(weight)), groups=block.shortcut.groups, index=index)
        shortcut = FoldedConv2d(convolution, act=False)
    return OptimizedBlock(parts, shortcut)
