"""The convolution of a network rewritten for inference, and its fast path on processors, in oneDNN."""

import functools
import operator
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import nn
from torch.nn import functional as F

from mobilenets_zoo.inference.rewrites import Convolution, spread_over_inputs
from mobilenets_zoo.lgc.gather import gather_channels_last, gather_pays

__all__ = ["FoldedConv2d"]


@dataclass(frozen=True)
class ReorderedWeight:
    """What `FoldedConv2d` keeps for its fast path.

    Attributes:
        made_from: weight and index of the module. Held, because a new tensor could take a dead one's address.
        versions: how often they had been written in place.
        size: (height, width) of the input that the order is for; some layers take far longer with another.
        weight, groups, index: of the convolution to compute.
    """

    made_from: tuple[torch.Tensor, Optional[torch.Tensor]]
    versions: tuple[Optional[int], ...]
    size: torch.Size
    weight: torch.Tensor
    groups: int
    index: Optional[torch.Tensor]


class FoldedConv2d(nn.Module):
    """A convolution with bias and ReLU6, after a gather of its input channels where `index` is given.

    On processors, in float32 and without gradients, oneDNN computes convolution and activation at once in
    channels_last, from a weight in an order of its own and without a gather that doesn't pay: the first forward pass
    keeps that weight; inputs of another height or width renew it, and so does loading, moving or writing parameters in
    place. Writes through `weight.data` go unnoticed: rewrite the network again.
    """

    index: Optional[torch.Tensor]

    def __init__(self, convolution: Convolution, act: bool):
        super().__init__()
        self.weight = nn.Parameter(convolution.weight.clone(), requires_grad=False)
        self.bias = nn.Parameter(convolution.bias.clone(), requires_grad=False)
        self.register_buffer("index", convolution.index)
        self.groups, self.stride = convolution.groups, convolution.stride
        self.padding = self.weight.shape[-1] // 2
        self.act = act
        self._reordered: Optional[ReorderedWeight] = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride), rounded up."""
        if self._takes_fused(x):
            return self._fused(x)
        if self.index is not None:
            x = x.index_select(1, self.index)
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, groups=self.groups)
        return F.relu6(x) if self.act else x

    def _takes_fused(self, x: torch.Tensor) -> bool:
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) is not torch.Tensor:
            return False  # compilers and exporters fuse on their own
        if not (x.is_cpu and x.dtype == self.weight.dtype == torch.float32 and x.ndim == 4 and x.numel()):
            return False
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad or self.bias.requires_grad):
            return False
        if torch.is_autocast_enabled("cpu") or not torch.backends.mkldnn.enabled:
            return False
        return fused_convolution_works()

    def _fused(self, x: torch.Tensor) -> torch.Tensor:
        kept, made_from = self._reordered, (self.weight, self.index)
        versions = tuple(None if t is None or t.is_inference() else t._version for t in made_from)
        fresh = kept is not None and kept.versions == versions and kept.size == x.shape[2:]
        if kept is None or not fresh or any(map(operator.is_not, kept.made_from, made_from)):
            kept = self._reordered = ReorderedWeight(made_from, versions, x.shape[2:], *self._reorder(x))
        x = x.contiguous(memory_format=torch.channels_last)
        if kept.index is not None:
            x = gather_channels_last(x, kept.index)
        geometry = ([self.padding] * 2, [self.stride] * 2, [1, 1], kept.groups)
        activation = ("hardtanh", [0.0, 6.0], "") if self.act else ("none", [], "")
        return torch.ops.mkldnn._convolution_pointwise(x, kept.weight, self.bias, *geometry, *activation)

    def _reorder(self, x: torch.Tensor) -> tuple[torch.Tensor, int, Optional[torch.Tensor]]:
        """Returns weight, groups and index for `_fused`, in the order that suits inputs as large as x best."""
        convolution = Convolution(self.weight.detach(), self.bias, self.groups, self.stride, self.index)
        size = list(x.shape)
        if self.index is not None:
            if gather_pays(len(self.weight), x.shape[1], self.groups, self.weight.shape[1]):
                size[1] = len(self.index)
            else:
                convolution = spread_over_inputs(convolution, x.shape[1])
        geometry = ([self.padding] * 2, [self.stride] * 2, [1, 1], convolution.groups)
        weight = torch.ops.mkldnn._reorder_convolution_weight(convolution.weight, *geometry, size)
        return weight, convolution.groups, convolution.index

    def _apply(self, *args: Any, **kwargs: Any) -> "FoldedConv2d":
        self._reordered = None
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reordered": None}  # copies and files hold the weight once


@functools.cache
def fused_convolution_works() -> bool:
    """Whether oneDNN's convolution with activation works here: torch.compile uses it, but it isn't documented."""
    line = functools.partial(torch.linspace, -3.0, 3.0, device="cpu", dtype=torch.float32)
    weight, bias = line(32 * 8 * 9).reshape(32, 8, 3, 3), line(32)
    x = line(16 * 6 * 6).reshape(1, 16, 6, 6).contiguous(memory_format=torch.channels_last)
    expected = F.relu6(F.conv2d(x, weight, bias, 2, 1, groups=2))
    arguments = ([1, 1], [2, 2], [1, 1], 2)
    try:
        reordered = torch.ops.mkldnn._reorder_convolution_weight(weight, *arguments, list(x.shape))
        out = torch.ops.mkldnn._convolution_pointwise(x, reordered, bias, *arguments, "hardtanh", [0.0, 6.0], "")
    except (AttributeError, RuntimeError, TypeError):
        return False
    return out.shape == expected.shape and torch.allclose(out, expected, atol=1e-3)
