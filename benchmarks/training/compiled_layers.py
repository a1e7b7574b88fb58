"""Layers for training on a GPU: BatchNorm with ReLU6 in it, and 3x3 depthwise convolution, through torch.compile.

A MobileNet's step moves much memory for each multiplication, and PyTorch's own kernels normalise and clip in passes of
their own. Two small functions compile sooner than whole networks, once for each number of channels; `torch.compile`
keeps what it made in `TORCHINDUCTOR_CACHE_DIR`.
"""

import functools

import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn import functional as F

__all__ = ["batch_norm_act", "compile_layers", "depthwise_conv3x3"]

RECOMPILE_LIMIT = 64  # one for each number of channels, dtype, and pattern of sizes that happen to be equal


def compile_layers(model: nn.Module) -> nn.Module:
    """Swaps the forward of layers, in place; parameters, buffers and state dict stay what they are.

    BatchNorm with ReLU6 or nothing behind it and 3x3 depthwise convolutions of stride 1 get the functions below. 1x1
    group convolutions become dense ones with zeros between the blocks, which run on tensor cores.
    """
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, RECOMPILE_LIMIT)
    for module in model.modules():
        if isinstance(module, BatchNormAct2d) and isinstance(module.act, (nn.ReLU6, nn.Identity)):
            module.forward = functools.partial(_batch_norm_forward, module)
        elif isinstance(module, nn.Conv2d) and module.groups > 1:
            shape = (module.kernel_size, module.stride, module.padding)
            if module.kernel_size == (1, 1):
                module.forward = functools.partial(_block_diagonal_forward, module)  # type: ignore[method-assign]
            elif module.groups == module.in_channels == module.out_channels and shape == ((3, 3), (1, 1), (1, 1)):
                module.forward = functools.partial(_depthwise_forward, module)  # type: ignore[method-assign]
    return model


def _batch_norm_forward(module: BatchNormAct2d, x: torch.Tensor) -> torch.Tensor:
    if not module.training:
        return type(module).forward(module, x)
    statistics = (module.running_mean, module.running_var)
    relu6 = isinstance(module.act, nn.ReLU6)
    return batch_norm_act(x, module.weight, module.bias, *statistics, module.momentum, module.eps, relu6)


def _depthwise_forward(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    return depthwise_conv3x3(x, conv.weight)


def _block_diagonal_forward(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    blocks = torch.block_diag(*conv.weight.flatten(1).chunk(conv.groups))
    return F.conv2d(x, blocks[:, :, None, None], conv.bias, conv.stride)


@torch.compile(dynamic=True)
def batch_norm_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    momentum: float,
    eps: float,
    relu6: bool,
) -> torch.Tensor:
    """BatchNorm over the batch, then ReLU6 if asked for.

    Args:
        x: (N, C, H, W).
        weight, bias, running_mean, running_var: (C,), float32; the running statistics are updated in place.
        momentum, eps: of `nn.BatchNorm2d`.
        relu6: whether ReLU6 follows.
    """
    y = F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps)
    return F.relu6(y) if relu6 else y


@torch.compile(dynamic=True)
def depthwise_conv3x3(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """3x3 depthwise convolution of stride 1 with padding 1, as nine products of shifted images, which one kernel adds.

    Args:
        x: (N, C, H, W).
        weight: (C, 1, 3, 3), float32.

    Returns:
        (N, C, H, W) in x's dtype.
    """
    height, width = x.shape[2:]
    padded, taps = F.pad(x, (1, 1, 1, 1)), weight.to(x.dtype)
    y = torch.zeros_like(x)
    for i in range(3):
        for j in range(3):
            y = y + padded[:, :, i : i + height, j : j + width] * taps[:, :, i, j, None]
    return y
