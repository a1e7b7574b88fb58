"""MobileNetV2 for 32x32 images, with dense, grouped or learned grouped 1x1 convolutions.

Papers: MobileNetV2: Inverted Residuals and Linear Bottlenecks (https://arxiv.org/abs/1801.04381); learned group
convolution from CondenseNet (https://arxiv.org/abs/1711.09224). Strides are those of `BLOCKS`, and 1 in the stem: the
network works at 32, 16 and 8 pixels. Unlike the ImageNet network, the first bottleneck has an expansion too, and a
bottleneck of stride 1 that changes the width has a residual connection through a plain 1x1 convolution.
"""

from typing import Any

import torch
from timm.layers import DropPath, calculate_drop_path_rates, make_divisible
from timm.models import generate_default_cfgs, register_model
from torch import nn

from mobilenets_zoo.lgc.layers import CondensedConv2d, LearnedGroupConv2d
from mobilenets_zoo.models._base import ConvBn, MobileNetBase, cifar100_cfg
from mobilenets_zoo.pretrained import build_model

__all__ = ["MobileNetV2"]

# One row per network section: output channels, number of bottlenecks, stride of the first (paper, table 2).
BLOCKS = ((16, 1, 1), (24, 2, 1), (32, 3, 1), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1))

# Kinds of 1x1 convolution: dense, group convolution, learned group convolution.
CONV_KINDS = ("dense", "gc", "lgc")


class Bottleneck(nn.Module):
    """Inverted residual: 1x1 expansion, 3x3 depthwise, linear 1x1 projection.

    Args:
        in_channels, out_channels: channels of the input and the output.
        stride: of the depthwise convolution.
        expansion, projection: the 1x1 convolutions, made by the network.
        hidden_channels: outputs of the expansion.
        shuffle_groups: groups of the channel shuffles behind expansion and projection, 1 for none.
        shortcut: whether a block of stride 1 has a residual connection.
        drop_path: stochastic depth rate of the residual branch.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        expansion: nn.Module,
        projection: nn.Module,
        hidden_channels: int,
        shuffle_groups: tuple[int, int],
        shortcut: bool,
        drop_path: float,
        **dd: Any,
    ):
        super().__init__()
        self.expansion = ConvBn(expansion, hidden_channels, **dd)
        self.shuffle_hidden = nn.ChannelShuffle(shuffle_groups[0]) if shuffle_groups[0] > 1 else nn.Identity()
        self.depthwise = ConvBn.dense(hidden_channels, hidden_channels, 3, stride, groups=hidden_channels, **dd)
        self.projection = ConvBn(projection, out_channels, act=False, **dd)
        self.shuffle_out = nn.ChannelShuffle(shuffle_groups[1]) if shuffle_groups[1] > 1 else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.has_shortcut = shortcut and stride == 1
        widens = self.has_shortcut and in_channels != out_channels
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, bias=False, **dd) if widens else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.shuffle_hidden(self.expansion(x))
        y = self.shuffle_out(self.projection(self.depthwise(y)))
        if self.has_shortcut:
            y = self.shortcut(x) + self.drop_path(y)
        return y


class MobileNetV2(MobileNetBase):
    """MobileNetV2 with strides for 32x32 images.

    Args:
        expand_ratio: hidden channels per input channel in all bottlenecks but the first (t).
        width_mult: width multiplier; channels are rounded to multiples of 8, the head never falls below 1280.
        expansion, projection: "dense", "gc" (group convolution) or "lgc" (learned group convolution) for the
            1x1 convolutions of the bottlenecks.
        groups: groups of a group convolution, dense or learned (G).
        condense_factor: a learned group reads in_channels / condense_factor inputs in the end (C).
        condensed: build learned group convolutions in their deployed form.
        num_classes: classes of the classifier, 0 for none.
        in_chans: channels of the images.
        global_pool: timm's pooling type, "" for none.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth, rising linearly to this rate at the last bottleneck.

    Raises:
        ValueError: an unknown kind of convolution, channels that the groups don't divide, or `condensed` without
            a learned group convolution.
    """

    def __init__(
        self,
        expand_ratio: int = 6,
        width_mult: float = 1.0,
        expansion: str = "dense",
        projection: str = "dense",
        groups: int = 4,
        condense_factor: int = 4,
        condensed: bool = False,
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        if unknown := {expansion, projection}.difference(CONV_KINDS):
            raise ValueError(f"expansion and projection must be one of {CONV_KINDS}, not {sorted(unknown)}")
        if condensed and "lgc" not in (expansion, projection):
            raise ValueError("condensed=True needs a learned group convolution; this model has none")

        def pointwise(kind: str, in_channels: int, out_channels: int) -> nn.Module:
            if kind == "dense":
                return nn.Conv2d(in_channels, out_channels, 1, bias=False, **dd)
            if kind == "gc":
                return nn.Conv2d(in_channels, out_channels, 1, groups=groups, bias=False, **dd)
            layer = CondensedConv2d if condensed else LearnedGroupConv2d
            return layer(in_channels, out_channels, groups, condense_factor, **dd)

        channels = make_divisible(32 * width_mult, 8)
        self.stem = ConvBn.dense(in_chans, channels, 3, **dd)

        # Only a group convolution that feeds a group convolution needs mixing: a learned one reads from everywhere.
        shuffle = groups if expansion == projection == "gc" else 1
        drop_path_rates = iter(calculate_drop_path_rates(drop_path_rate, [repeats for _, repeats, _ in BLOCKS]))
        self.feature_info = []
        self.blocks = nn.Sequential()
        reduction = 1
        for row_index, (width, repeats, first_stride) in enumerate(BLOCKS):
            is_last = row_index == len(BLOCKS) - 1
            row = nn.Sequential()
            for i in range(repeats):
                stride = first_stride if i == 0 else 1
                out_channels = make_divisible(width * width_mult, 8)
                hidden = channels * (expand_ratio if row_index > 0 else 1)
                block = Bottleneck(
                    channels,
                    out_channels,
                    stride,
                    expansion=pointwise(expansion, channels, hidden),
                    projection=pointwise(projection, hidden, out_channels),
                    hidden_channels=hidden,
                    shuffle_groups=(shuffle, 1 if is_last else shuffle),
                    shortcut=not is_last,
                    drop_path=next(drop_path_rates),
                    **dd,
                )
                row.append(block)
                channels = out_channels
            reduction *= first_stride
            if is_last or BLOCKS[row_index + 1][2] > 1:
                self.feature_info.append(dict(num_chs=channels, reduction=reduction, module=f"blocks.{row_index}"))
            self.blocks.append(row)

        num_features = make_divisible(1280 * max(1.0, width_mult), 8)
        self.head_conv = ConvBn.dense(channels, num_features, 1, **dd)
        self._init_head(in_chans, num_classes, num_features, global_pool, drop_rate, **dd)
        self._init_weights()


# The first tag of a model is its default.
WEIGHTS = (
    "mobilenetv2_cifar100.kd_e26_r32",
    "mobilenetv2_t4_cifar100.kd_e5_r32",
    "mobilenetv2_t1_cifar100.kd_cutmix_e90_r32",
    "mobilenetv2_t1_cifar100.sgd_e24_r32",
    "mobilenetv2_lgc_cifar100.kd_cutmix_e30_r32",
    "mobilenetv2_lgc_exp_cifar100.kd_cutmix_e34_r32",
    "mobilenetv2_lgc_proj_cifar100.kd_cutmix_e34_r32",
    "mobilenetv2_lgc_gc_cifar100.kd_cutmix_e34_r32",
    "mobilenetv2_gc_lgc_cifar100.kd_cutmix_e30_r32",
    "mobilenetv2_gc_cifar100.kd_cutmix_e30_r32",
    "mobilenetv2_gc_exp_cifar100.kd_e5_r32",
    "mobilenetv2_gc_proj_cifar100.kd_e5_r32",
)


def _paper_ids(name: str) -> tuple[str, ...]:
    return ("arXiv:1801.04381", "arXiv:1711.09224") if "lgc" in name else ("arXiv:1801.04381",)


default_cfgs = generate_default_cfgs({name: cifar100_cfg(name, paper_ids=_paper_ids(name)) for name in WEIGHTS})


def _create(variant: str, pretrained: bool = False, **kwargs: Any) -> MobileNetV2:
    return build_model(MobileNetV2, variant, pretrained, **kwargs)


@register_model
def mobilenetv2_cifar100(pretrained: bool = False, **kwargs: Any) -> MobileNetV2:
    """MobileNetV2 t=6: 2.36M parameters, 301M MACs."""
    return _create("mobilenetv2_cifar100", pretrained, **kwargs)


@register_model
def mobilenetv2_t4_cifar100(pretrained: bool = False, **kwargs: Any) -> MobileNetV2:
    """MobileNetV2 t=4: 1.76M parameters, 211M MACs."""
    return _create("mobilenetv2_t4_cifar100", pretrained, **{"expand_ratio": 4, **kwargs})


@register_model
def mobilenetv2_t1_cifar100(pretrained: bool = False, **kwargs: Any) -> MobileNetV2:
    """MobileNetV2 t=1: 0.86M parameters, 77M MACs."""
    return _create("mobilenetv2_t1_cifar100", pretrained, **{"expand_ratio": 1, **kwargs})


@register_model
def mobilenetv2_lgc_cifar100(pretrained: bool = False, **kwargs: Any) -> MobileNetV2:
    """MobileNetV2 t=6, LGC expansion and projection: 1.07M parameters, 110M MACs once condensed."""
    return _create("mobilenetv2_lgc_cifar100", pretrained, **{"expansion": "lgc", "projection": "lgc", **kwargs})


@register_model
def mobilenetv2_lgc_exp_cifar100(pretrained: bool = False, **kwargs: Any) -> MobileNetV2:
    """MobileNetV2 t=6, LGC expansion, dense projection: 1.80M parameters, 207M MACs once condensed."""
    return _create("mobilenetv2_lgc_exp_cifar100", pretrained, **{"expansion": "lgc", **kwargs})


@register_model
def mobilenetv2_lgc_proj_cifar100(pretrained: bool = False, **kwargs: Any) -> MobileNetV2:
    """MobileNetV2 t=6, dense expansion, LGC projection: 1.64M parameters, 204M MACs once condensed."""
    return _create("mobilenetv2_lgc_proj_cifar100", pretrained, **{"projection": "lgc", **kwargs})


@register_model
def mobilenetv2_lgc_gc_cifar100(pretrained: bool = False, **kwargs: Any) -> MobileNetV2:
    """MobileNetV2 t=6, LGC expansion, GC projection: 1.07M parameters, 110M MACs once condensed."""
    return _create("mobilenetv2_lgc_gc_cifar100", pretrained, **{"expansion": "lgc", "projection": "gc", **kwargs})


@register_model
def mobilenetv2_gc_lgc_cifar100(pretrained: bool = False, **kwargs: Any) -> MobileNetV2:
    """MobileNetV2 t=6, GC expansion, LGC projection: 1.07M parameters, 110M MACs once condensed."""
    return _create("mobilenetv2_gc_lgc_cifar100", pretrained, **{"expansion": "gc", "projection": "lgc", **kwargs})


@register_model
def mobilenetv2_gc_cifar100(pretrained: bool = False, **kwargs: Any) -> MobileNetV2:
    """MobileNetV2 t=6, GC expansion and projection: 1.07M parameters, 110M MACs."""
    return _create("mobilenetv2_gc_cifar100", pretrained, **{"expansion": "gc", "projection": "gc", **kwargs})


@register_model
def mobilenetv2_gc_exp_cifar100(pretrained: bool = False, **kwargs: Any) -> MobileNetV2:
    """MobileNetV2 t=6, GC expansion, dense projection: 1.80M parameters, 207M MACs."""
    return _create("mobilenetv2_gc_exp_cifar100", pretrained, **{"expansion": "gc", **kwargs})


@register_model
def mobilenetv2_gc_proj_cifar100(pretrained: bool = False, **kwargs: Any) -> MobileNetV2:
    """MobileNetV2 t=6, dense expansion, GC projection: 1.64M parameters, 204M MACs."""
    return _create("mobilenetv2_gc_proj_cifar100", pretrained, **{"projection": "gc", **kwargs})
