"""What both families share: timm's model contract around `stem`, `blocks`, `head_conv` and `classifier`."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Optional, Union

import torch
from timm.layers import BatchNormAct2d, SelectAdaptivePool2d, create_classifier
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import nn

from mobilenets_zoo.data import CIFAR100_CLASSES
from mobilenets_zoo.lgc.condense import condense
from mobilenets_zoo.pretrained import checkpoint_filter_fn

__all__ = ["MobileNetBase", "ConvBn", "cifar100_cfg"]

# Mean and standard deviation of the training images' pixels in [0, 1].
CIFAR100_MEAN = (0.50708, 0.48655, 0.44092)
CIFAR100_STD = (0.26733, 0.25644, 0.27615)


def cifar100_cfg(weight: str, **kwargs: Any) -> dict[str, Any]:
    """Returns timm's pretrained configuration for 32x32 CIFAR-100 input.

    Args:
        weight: "model.tag"; the tag "untrained" stands for a model without weights.
        **kwargs: further keys.
    """
    model, _, tag = weight.partition(".")
    hub = {"hf_hub_id": f"mobilenets-zoo/{model}", "hf_hub_filename": "model.safetensors"}
    return {
        **(hub if tag != "untrained" else {}),
        "num_classes": 100,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": CIFAR100_MEAN,
        "std": CIFAR100_STD,
        "first_conv": "stem.conv",
        "classifier": "classifier",
        "label_names": CIFAR100_CLASSES,
        "license": "mit",
        **kwargs,
    }


class ConvBn(nn.Module):
    """A convolution followed by BatchNorm and, unless `act` is False, ReLU6.

    Args:
        conv: any module that maps (N, C, H, W) to (N, out_channels, H', W').
        out_channels: channels that `conv` puts out.
        act: whether ReLU6 follows the normalisation.
    """

    def __init__(self, conv: nn.Module, out_channels: int, act: bool = True, device=None, dtype=None):
        super().__init__()
        self.conv = conv
        self.bn = BatchNormAct2d(out_channels, apply_act=act, act_layer=nn.ReLU6, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x))

    @classmethod
    def dense(
        cls, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1, **dd: Any
    ) -> "ConvBn":
        """Returns a standard convolution with "same" padding, BatchNorm and ReLU6."""
        conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False, **dd
        )
        return cls(conv, out_channels, **dd)


class MobileNetBase(nn.Module):
    """The timm contract (features, intermediates, heads, pruning) over four parts that a family fills in.

    A family's constructor sets `stem`, `blocks` (an `nn.Sequential` of `nn.Sequential`), `head_conv` and
    `feature_info`, then calls `_init_head` and `_init_weights`. Each entry of `feature_info` names the
    last of the `blocks` at its resolution.
    """

    if TYPE_CHECKING:  # TorchScript would read these annotations and knows no nn.Module
        stem: nn.Module
        blocks: nn.Sequential
        head_conv: nn.Module
        feature_info: list[dict[str, Any]]

    def _init_head(
        self, in_chans: int, num_classes: int, num_features: int, global_pool: str, drop_rate: float, **dd: Any
    ) -> None:
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = num_features
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        # Index into `blocks` of the last block of each entry of feature_info ("blocks.4" -> 4).
        self._feature_ends = [int(info["module"].split(".")[1]) for info in self.feature_info]
        self.global_pool, self.classifier = create_classifier(num_features, num_classes, pool_type=global_pool, **dd)
        self.head_drop = nn.Dropout(drop_rate)

    def _init_weights(self) -> None:
        """He initialisation by fan-out; learned group convolutions have initialised themselves."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.weight.shape[2] * module.weight.shape[3] * module.out_channels // module.groups
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0.0, 0.01)
                nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def condense(self) -> nn.Module:
        """Returns a copy whose learned group convolutions are standard grouped ones; see `mobilenets_zoo.condense`."""
        return condense(self)

    @torch.jit.ignore
    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As PyTorch's; learned layers come in the form, masked or condensed, that this model has."""
        return super().load_state_dict(checkpoint_filter_fn(state_dict, self), *args, **kwargs)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return dict(
            stem=r"^stem",
            blocks=[
                (r"^blocks\.(\d+)" if coarse else r"^blocks\.(\d+)\.(\d+)", None),
                (r"^head_conv", (99999,)),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.classifier

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replaces the classifier; `num_classes` 0 removes it, `global_pool` None keeps the pooling."""
        if global_pool is None:
            assert isinstance(self.global_pool, SelectAdaptivePool2d)
            global_pool = self.global_pool.pool_type
        self.num_classes = num_classes
        weight = next(self.parameters())
        self.global_pool, self.classifier = create_classifier(
            self.num_features, num_classes, pool_type=global_pool, device=weight.device, dtype=weight.dtype
        )
        self.global_pool.train(self.training)
        self.classifier.train(self.training)

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: Optional[Union[int, list[int]]] = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Runs the trunk and returns the feature maps of `feature_info`.

        Args:
            x: images, (N, in_chans, H, W).
            indices: the last n entries of feature_info if int, all if None, else the entries to take.
            norm: accepted for timm's sake: every block ends in its own BatchNorm.
            stop_early: leave out the blocks behind the last map that is asked for.
            output_fmt: "NCHW" only.
            intermediates_only: return the list of maps alone.

        Returns:
            (features, maps) or, with `intermediates_only`, maps.
        """
        assert output_fmt == "NCHW", "Output shape must be NCHW."
        take_indices, max_index = feature_take_indices(len(self._feature_ends), indices)
        take_blocks = [self._feature_ends[i] for i in take_indices]
        blocks = self.blocks[: self._feature_ends[max_index] + 1] if stop_early else self.blocks

        x = self.stem(x)
        intermediates = []
        for i, block in enumerate(blocks):
            x = checkpoint_seq(block, x) if self.grad_checkpointing else block(x)
            if i in take_blocks:
                intermediates.append(x)
        if intermediates_only:
            return intermediates
        if len(blocks) == len(self.blocks):
            x = self.head_conv(x)
        return x, intermediates

    def prune_intermediate_layers(
        self, indices: Union[int, list[int]] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the blocks that the maps of `forward_intermediates(indices=...)` don't need.

        `prune_norm` takes the 1x1 head convolution away too, `prune_head` the classifier.
        """
        take_indices, max_index = feature_take_indices(len(self._feature_ends), indices)
        prune_blocks = max_index < len(self._feature_ends) - 1
        if prune_norm or prune_blocks:
            self.head_conv = nn.Identity()
            self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
        self.blocks = self.blocks[: self._feature_ends[max_index] + 1]
        self._feature_ends = self._feature_ends[: max_index + 1]
        if prune_head or prune_norm or prune_blocks:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Maps images (N, in_chans, H, W) to features (N, num_features, H / 4, W / 4)."""
        x = self.stem(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x, flatten=True)
        else:
            x = self.blocks(x)
        return self.head_conv(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Maps features to logits (N, num_classes), or to pooled features with `pre_logits`."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.classifier(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))
