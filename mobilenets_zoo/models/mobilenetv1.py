"""MobileNetV1 for 32x32 images.

Paper: MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications
(https://arxiv.org/abs/1704.04861). The stem and the first four strides are reduced for 32x32 input: the network
works at 32, 16 and 8 pixels.
"""

from typing import Any

from timm.layers import make_divisible
from timm.models import generate_default_cfgs, register_model
from torch import nn

from mobilenets_zoo.models._base import ConvBn, MobileNetBase, cifar100_cfg
from mobilenets_zoo.pretrained import build_model

__all__ = ["MobileNetV1"]

# One row per resolution: output channels of its depthwise-separable blocks, stride of the first.
BLOCKS = (
    ((64, 128, 128, 256, 256), 1),
    ((512, 512, 512, 512, 512, 512), 2),
    ((1024, 1024), 2),
)


class DepthwiseSeparableBlock(nn.Sequential):
    """3x3 depthwise and 1x1 pointwise convolution, each with BatchNorm and ReLU6 (paper, figure 3)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, **dd: Any):
        super().__init__()
        self.depthwise = ConvBn.dense(in_channels, in_channels, 3, stride, groups=in_channels, **dd)
        self.pointwise = ConvBn.dense(in_channels, out_channels, 1, **dd)


class MobileNetV1(MobileNetBase):
    """MobileNetV1 with strides for 32x32 images.

    Args:
        width_mult: width multiplier (paper, section 3.3); channels are rounded to multiples of 8.
        num_classes: classes of the classifier, 0 for none.
        in_chans: channels of the images.
        global_pool: timm's pooling type, "" for none.
        drop_rate: dropout before the classifier.
        drop_path_rate: accepted as in all of timm; without residual connections there is no path to drop.
    """

    def __init__(
        self,
        width_mult: float = 1.0,
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
        channels = make_divisible(32 * width_mult, 8)
        self.stem = ConvBn.dense(in_chans, channels, 3, **dd)

        self.feature_info = []
        self.blocks = nn.Sequential()
        reduction = 1
        for widths, stride in BLOCKS:
            row = nn.Sequential()
            for i, width in enumerate(widths):
                out_channels = make_divisible(width * width_mult, 8)
                row.append(DepthwiseSeparableBlock(channels, out_channels, stride if i == 0 else 1, **dd))
                channels = out_channels
            reduction *= stride
            self.feature_info.append(dict(num_chs=channels, reduction=reduction, module=f"blocks.{len(self.blocks)}"))
            self.blocks.append(row)

        self.head_conv = nn.Identity()
        self._init_head(in_chans, num_classes, channels, global_pool, drop_rate, **dd)
        self._init_weights()


# The first tag of a model is its default.
WEIGHTS = (
    "mobilenetv1_cifar100.kd_cutmix_e34_r32",
    "mobilenetv1_w050_cifar100.kd_cutmix_e90_r32",
    "mobilenetv1_w025_cifar100.kd_cutmix_e54_r32",
    "mobilenetv1_w025_cifar100.sgd_e36_r32",
)

default_cfgs = generate_default_cfgs({name: cifar100_cfg(name, paper_ids="arXiv:1704.04861") for name in WEIGHTS})


def _create(variant: str, pretrained: bool = False, **kwargs: Any) -> MobileNetV1:
    return build_model(MobileNetV1, variant, pretrained, **kwargs)


@register_model
def mobilenetv1_cifar100(pretrained: bool = False, **kwargs: Any) -> MobileNetV1:
    """MobileNetV1 1.0: 3.31M parameters, 612M MACs."""
    return _create("mobilenetv1_cifar100", pretrained, **kwargs)


@register_model
def mobilenetv1_w050_cifar100(pretrained: bool = False, **kwargs: Any) -> MobileNetV1:
    """MobileNetV1 0.5: 0.87M parameters, 156M MACs."""
    return _create("mobilenetv1_w050_cifar100", pretrained, **{"width_mult": 0.5, **kwargs})


@register_model
def mobilenetv1_w025_cifar100(pretrained: bool = False, **kwargs: Any) -> MobileNetV1:
    """MobileNetV1 0.25: 0.24M parameters, 41M MACs."""
    return _create("mobilenetv1_w025_cifar100", pretrained, **{"width_mult": 0.25, **kwargs})
