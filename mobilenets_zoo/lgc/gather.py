"""How a condensed layer computes, and when a gather of its inputs pays."""

import torch
from torch.nn import functional as F

__all__ = ["ONNX_MIN_SAVED", "condensed_conv2d", "gather_pays"]

# ONNX Runtime gathers whole planes, where eager PyTorch moves single values in channels_last.
ONNX_MIN_SAVED = 48


def gather_pays(out_channels: int, in_channels: int, groups: int, inputs_per_group: int, min_saved: int = 72) -> bool:
    """Whether a gather and a grouped 1x1 convolution take less time than a dense one with zeros in its weight.

    Groups must be wide enough for fast kernels, and each gathered value must save enough multiply-adds; how many was
    measured with single layers (docs/design.md).

    Args:
        out_channels, groups, inputs_per_group: of the grouped convolution.
        in_channels: what a dense one would read.
        min_saved: multiply-adds per gathered value; by default those of eager PyTorch in channels_last on a processor,
            `ONNX_MIN_SAVED` for ONNX Runtime.
    """
    saved = out_channels * (in_channels - inputs_per_group)
    return inputs_per_group >= 16 and saved >= min_saved * groups * inputs_per_group


def condensed_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    index: torch.Tensor,
    groups: int,
) -> torch.Tensor:
    """Gathers channels and applies a grouped 1x1 convolution, in the form that is fastest for x's memory layout.

    Args:
        x: (N, in_channels, H, W) or (in_channels, H, W).
        weight: (out_channels, K, 1, 1).
        index: (groups * K,), int64; a group may name an input more than once.
        groups: G.

    Compilers and exporters see the textbook form, a gather and a grouped convolution, and optimise that themselves.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript drops a branch only where this stands alone
        if torch.compiler.is_compiling():
            return F.conv2d(x.index_select(-3, index), weight, groups=groups)
    inputs_per_group, height, width = weight.shape[1], x.shape[-2], x.shape[-1]

    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        gathered = x.index_select(-3, index).reshape(-1, groups, inputs_per_group, height * width)
        out = torch.matmul(weight.reshape(groups, -1, inputs_per_group), gathered)
        return out.unflatten(-1, (height, width)).reshape(x.shape[:-3] + weight.shape[:1] + x.shape[-2:])

    if x.is_cpu and gather_pays(weight.shape[0], x.shape[-3], groups, inputs_per_group):
        pixels = x.permute(0, 2, 3, 1).flatten(0, 2)
        # torch.gather uses all threads here, index_select only one.
        gathered = pixels.gather(1, index.expand(pixels.shape[0], -1)).reshape(x.shape[0], height, width, -1)
        return F.conv2d(gathered.permute(0, 3, 1, 2), weight, groups=groups)
    columns = index.reshape(groups, 1, inputs_per_group).expand(-1, weight.shape[0] // groups, -1)
    grouped = weight.reshape(groups, -1, inputs_per_group)
    # Added up, because a group may name an input twice after rewrites for inference.
    dense = grouped.new_zeros(groups, grouped.shape[1], x.shape[1]).scatter_add_(2, columns, grouped)
    return F.conv2d(x, dense.reshape(-1, x.shape[1], 1, 1))


# The layout decides which form runs, and a traced tensor has none: keep the function whole in torch.fx graphs, which
# takes a call as `gather.condensed_conv2d`, because torch.fx looks for the name in this module.
torch.fx.wrap("condensed_conv2d")
