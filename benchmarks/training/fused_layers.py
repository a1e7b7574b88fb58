"""Training layers for NVIDIA GPUs: BatchNorm with ReLU6 in it, and 3x3 depthwise convolution, both channels-last.

A MobileNet's training step moves much memory for each multiplication, and PyTorch's own kernels normalise and clip in
passes of their own. `fuse_layers` swaps the forward of a network's BatchNorm and depthwise layers; parameters, buffers
and state dict stay what they are. Sums are accumulated in float32 and in a fixed order: the same input gives the same
output on every run.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn import functional as F

__all__ = ["batch_norm_act", "depthwise_conv3x3", "fuse_layers"]

TILE = 4096  # elements that a program of an elementwise kernel takes
SUM_TILE = 2048  # likewise, of a kernel that keeps two sums in registers, or of a convolution
PROGRAMS = 512  # that share a sum over rows: about four on each multiprocessor


def fuse_layers(model: nn.Module) -> nn.Module:
    """Swaps the forward of layers, in place.

    BatchNorm with ReLU6 or nothing behind it and 3x3 depthwise convolutions of stride 1 get the kernels below. 1x1
    group convolutions become dense ones with zeros between the blocks, which run on tensor cores.
    """
    for module in model.modules():
        if isinstance(module, BatchNormAct2d) and isinstance(module.act, (nn.ReLU6, nn.Identity)):
            module.forward = functools.partial(_batch_norm_forward, module)
        elif isinstance(module, nn.Conv2d) and module.groups > 1:
            depthwise = module.groups == module.in_channels == module.out_channels
            shape = (module.kernel_size, module.stride, module.padding)
            if depthwise and shape == ((3, 3), (1, 1), (1, 1)):
                module.forward = functools.partial(_depthwise_forward, module)  # type: ignore[method-assign]
            elif module.kernel_size == (1, 1):
                module.forward = functools.partial(_block_diagonal_forward, module)  # type: ignore[method-assign]
    return model


def _batch_norm_forward(module: BatchNormAct2d, x: torch.Tensor) -> torch.Tensor:
    statistics = (module.running_mean, module.running_var)
    relu6 = isinstance(module.act, nn.ReLU6)
    if module.training:
        return batch_norm_act(x, module.weight, module.bias, *statistics, module.momentum, module.eps, relu6)
    scale = module.weight * torch.rsqrt(module.running_var + module.eps)
    return _normalize(x, torch.stack([scale, module.bias - module.running_mean * scale]), relu6)


def _depthwise_forward(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    return depthwise_conv3x3(x, conv.weight)


def _block_diagonal_forward(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    blocks = conv.weight.flatten(1).chunk(conv.groups)
    return F.conv2d(x, torch.block_diag(*blocks)[:, :, None, None], conv.bias)


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
        x: (N, C, H, W), channels-last.
        weight, bias, running_mean, running_var: (C,), float32; the running statistics are updated in place.
        momentum, eps: of `nn.BatchNorm2d`.
        relu6: whether ReLU6 follows.

    Returns:
        (N, C, H, W) in x's dtype, channels-last.
    """
    return _BatchNormAct.apply(x, weight, bias, running_mean, running_var, momentum, eps, relu6)


def depthwise_conv3x3(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """3x3 depthwise convolution, stride 1, padding 1.

    Args:
        x: (N, C, H, W), channels-last.
        weight: (C, 1, 3, 3), float32.

    Returns:
        (N, C, H, W) in x's dtype, channels-last.
    """
    return _DepthwiseConv3x3.apply(x, weight)


def _block_channels(channels: int, largest: int = 128) -> int:
    """Returns the channels of a tile: as many as possible, with at most a quarter of the tile left empty."""
    block = largest
    while block > 16 and channels / (triton.cdiv(channels, block) * block) < 0.75:
        block //= 2
    return block


def _parts(rows: int, columns: int, block_m: int) -> tuple[int, int]:
    """Returns how many programs share the rows of a reduction, and how many rows each takes."""
    parts = max(1, min(PROGRAMS // columns, triton.cdiv(rows, block_m)))
    part_rows = triton.cdiv(triton.cdiv(rows, parts), block_m) * block_m
    return triton.cdiv(rows, part_rows), part_rows


class _BatchNormAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, running_mean, running_var, momentum, eps, relu6):
        x = _checked(x)
        channels, rows = x.shape[1], x.numel() // x.shape[1]
        block_c = _block_channels(channels)
        columns = triton.cdiv(channels, block_c)
        parts, part_rows = _parts(rows, columns, SUM_TILE // block_c)
        partial = torch.empty((2, parts, channels), device=x.device)
        # The scale and shift that normalise, mean and 1 / standard deviation.
        stats = torch.empty((4, channels), device=x.device)
        _stats_kernel[(columns, parts)](x, partial, rows, channels, parts, part_rows, SUM_TILE // block_c, block_c)
        _finish_stats_kernel[(triton.cdiv(channels, 16),)](
            partial, stats, weight, bias, running_mean, running_var, rows, channels, parts, momentum, eps, 128, 16
        )
        ctx.save_for_backward(x, stats)
        ctx.relu6 = relu6
        return _normalize(x, stats, relu6)

    @staticmethod
    def backward(ctx: Any, grad):
        x, stats = ctx.saved_tensors
        grad = _checked(grad)
        channels, rows = x.shape[1], x.numel() // x.shape[1]
        block_c = _block_channels(channels)
        columns, block_m = triton.cdiv(channels, block_c), TILE // block_c
        parts, part_rows = _parts(rows, columns, SUM_TILE // block_c)
        partial = torch.empty((2, parts, channels), device=x.device)
        # Gradients of weight and bias, and dx = a * grad + b * x + c.
        sums = torch.empty((5, channels), device=x.device)
        grad_x = torch.empty_like(x)
        _grad_sums_kernel[(columns, parts)](
            grad, x, stats, partial, rows, channels, parts, part_rows, ctx.relu6, SUM_TILE // block_c, block_c
        )
        _finish_grad_kernel[(triton.cdiv(channels, 16),)](partial, stats, sums, rows, channels, parts, 128, 16)
        _grad_input_kernel[(triton.cdiv(rows, block_m), columns)](
            grad, x, stats, sums, grad_x, rows, channels, ctx.relu6, block_m, block_c
        )
        return grad_x, sums[0], sums[1], None, None, None, None, None


def _normalize(x: torch.Tensor, stats: torch.Tensor, relu6: bool) -> torch.Tensor:
    """Scales and shifts each channel by the first two rows of `stats`."""
    x = _checked(x)
    channels, rows = x.shape[1], x.numel() // x.shape[1]
    block_c = _block_channels(channels)
    block_m = TILE // block_c
    y = torch.empty_like(x)
    grid = (triton.cdiv(rows, block_m), triton.cdiv(channels, block_c))
    _normalize_kernel[grid](x, stats, y, rows, channels, relu6, block_m, block_c)
    return y


def _checked(x: torch.Tensor) -> torch.Tensor:
    if x.numel() >= 2**31:
        raise ValueError(f"activations of {x.numel()} values are too large for 32-bit offsets; lower batch_size")
    return x.contiguous(memory_format=torch.channels_last)


@triton.jit
def _stats_kernel(x, partial, rows, channels, parts, part_rows, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.program_id(1)
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(0, part_rows, BLOCK_M):
        m = part * part_rows + start + tl.arange(0, BLOCK_M)
        inside = (m < rows)[:, None] & (c < channels)[None, :]
        value = tl.load(x + m[:, None] * channels + c[None, :], inside, 0.0).to(tl.float32)
        total += value
        squares += value * value
    tl.store(partial + part * channels + c, tl.sum(total, 0), c < channels)
    tl.store(partial + (parts + part) * channels + c, tl.sum(squares, 0), c < channels)


@triton.jit
def _sum_parts(partial, c, channels, parts, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    first = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    second = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, parts, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = (p < parts)[:, None] & (c < channels)[None, :]
        i = p[:, None] * channels + c[None, :]
        first += tl.load(partial + i, inside, 0.0)
        second += tl.load(partial + parts * channels + i, inside, 0.0)
    return tl.sum(first, 0), tl.sum(second, 0)


@triton.jit
def _finish_stats_kernel(
    partial, stats, weight, bias, running_mean, running_var, rows, channels, parts, momentum, eps,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total, squares = _sum_parts(partial, c, channels, parts, BLOCK_P, BLOCK_C)
    mean = total / rows
    variance = tl.maximum(squares / rows - mean * mean, 0.0)
    inverse = 1.0 / tl.sqrt(variance + eps)
    scale = tl.load(weight + c, c < channels, 0.0) * inverse
    shift = tl.load(bias + c, c < channels, 0.0) - mean * scale
    tl.store(stats + c, scale, c < channels)
    tl.store(stats + channels + c, shift, c < channels)
    tl.store(stats + 2 * channels + c, mean, c < channels)
    tl.store(stats + 3 * channels + c, inverse, c < channels)
    old_mean = tl.load(running_mean + c, c < channels, 0.0)
    old_variance = tl.load(running_var + c, c < channels, 0.0)
    unbiased = variance * rows / (rows - 1)
    tl.store(running_mean + c, old_mean + momentum * (mean - old_mean), c < channels)
    tl.store(running_var + c, old_variance + momentum * (unbiased - old_variance), c < channels)


@triton.jit
def _normalize_kernel(x, stats, y, rows, channels, RELU6: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (m < rows)[:, None] & (c < channels)[None, :]
    i = m[:, None] * channels + c[None, :]
    scale = tl.load(stats + c, c < channels, 0.0)
    shift = tl.load(stats + channels + c, c < channels, 0.0)
    value = tl.load(x + i, inside, 0.0).to(tl.float32) * scale[None, :] + shift[None, :]
    if RELU6:
        value = tl.minimum(tl.maximum(value, 0.0), 6.0)
    tl.store(y + i, value.to(y.dtype.element_ty), inside)


@triton.jit
def _grad_sums_kernel(
    grad, x, stats, partial, rows, channels, parts, part_rows,
    RELU6: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.program_id(1)
    mean = tl.load(stats + 2 * channels + c, c < channels, 0.0)
    inverse = tl.load(stats + 3 * channels + c, c < channels, 0.0)
    scale = tl.load(stats + c, c < channels, 0.0)
    shift = tl.load(stats + channels + c, c < channels, 0.0)
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    products = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(0, part_rows, BLOCK_M):
        m = part * part_rows + start + tl.arange(0, BLOCK_M)
        inside = (m < rows)[:, None] & (c < channels)[None, :]
        i = m[:, None] * channels + c[None, :]
        value = tl.load(x + i, inside, 0.0).to(tl.float32)
        g = tl.load(grad + i, inside, 0.0).to(tl.float32)
        if RELU6:
            output = value * scale[None, :] + shift[None, :]
            g = tl.where((output > 0.0) & (output < 6.0), g, 0.0)
        total += g
        products += g * (value - mean[None, :]) * inverse[None, :]
    tl.store(partial + part * channels + c, tl.sum(total, 0), c < channels)
    tl.store(partial + (parts + part) * channels + c, tl.sum(products, 0), c < channels)


@triton.jit
def _finish_grad_kernel(partial, stats, sums, rows, channels, parts, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total, products = _sum_parts(partial, c, channels, parts, BLOCK_P, BLOCK_C)
    mean = tl.load(stats + 2 * channels + c, c < channels, 0.0)
    inverse = tl.load(stats + 3 * channels + c, c < channels, 0.0)
    scale = tl.load(stats + c, c < channels, 0.0)
    # dx = scale * (g - total / rows - normalised x * products / rows)
    by_x = -scale * inverse * products / rows
    tl.store(sums + c, products, c < channels)
    tl.store(sums + channels + c, total, c < channels)
    tl.store(sums + 2 * channels + c, scale, c < channels)
    tl.store(sums + 3 * channels + c, by_x, c < channels)
    tl.store(sums + 4 * channels + c, -scale * total / rows - by_x * mean, c < channels)


@triton.jit
def _grad_input_kernel(
    grad, x, stats, sums, grad_x, rows, channels, RELU6: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (m < rows)[:, None] & (c < channels)[None, :]
    i = m[:, None] * channels + c[None, :]
    value = tl.load(x + i, inside, 0.0).to(tl.float32)
    g = tl.load(grad + i, inside, 0.0).to(tl.float32)
    if RELU6:
        scale = tl.load(stats + c, c < channels, 0.0)
        shift = tl.load(stats + channels + c, c < channels, 0.0)
        output = value * scale[None, :] + shift[None, :]
        g = tl.where((output > 0.0) & (output < 6.0), g, 0.0)
    by_grad = tl.load(sums + 2 * channels + c, c < channels, 0.0)
    by_x = tl.load(sums + 3 * channels + c, c < channels, 0.0)
    constant = tl.load(sums + 4 * channels + c, c < channels, 0.0)
    result = g * by_grad[None, :] + value * by_x[None, :] + constant[None, :]
    tl.store(grad_x + i, result.to(grad_x.dtype.element_ty), inside)


class _DepthwiseConv3x3(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight):
        x = _checked(x)
        ctx.save_for_backward(x, weight)
        return _depthwise(x, weight, False)

    @staticmethod
    def backward(ctx: Any, grad):
        x, weight = ctx.saved_tensors
        grad = _checked(grad)
        n, channels, height, width = x.shape
        rows, block_c = n * height * width, _block_channels(channels, 64)
        columns, block_m = triton.cdiv(channels, block_c), 512 // block_c
        parts, part_rows = _parts(rows, columns, 32 * block_m)
        partial = torch.empty((parts, 9, channels), device=x.device)
        _depthwise_weight_kernel[(columns, parts)](
            x, grad, partial, rows, channels, height, width, part_rows, block_m, block_c
        )
        return _depthwise(grad, weight, True), partial.sum(0).t().reshape(channels, 1, 3, 3)


def _depthwise(x: torch.Tensor, weight: torch.Tensor, flip: bool) -> torch.Tensor:
    n, channels, height, width = x.shape
    y = torch.empty_like(x)
    block_c = _block_channels(channels, 32)
    block_m = SUM_TILE // block_c
    grid = (triton.cdiv(n * height * width, block_m), triton.cdiv(channels, block_c))
    _depthwise_kernel[grid](x, weight, y, n * height * width, channels, height, width, flip, block_m, block_c)
    return y


@triton.jit
def _depthwise_kernel(
    x, weight, y, rows, channels, height, width, FLIP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    column, row = m % width, (m // width) % height
    base = m[:, None] * channels + c[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for i in tl.static_range(3):
        for j in tl.static_range(3):
            ok = (m < rows) & (row + i >= 1) & (row + i <= height) & (column + j >= 1) & (column + j <= width)
            offset = ((i - 1) * width + (j - 1)) * channels
            value = tl.load(x + base + offset, ok[:, None] & (c < channels)[None, :], 0.0).to(tl.float32)
            tap = 8 - 3 * i - j if FLIP else 3 * i + j
            total += value * tl.load(weight + c * 9 + tap, c < channels, 0.0)[None, :]
    tl.store(y + base, total.to(y.dtype.element_ty), (m < rows)[:, None] & (c < channels)[None, :])


@triton.jit
def _depthwise_weight_kernel(
    x, grad, partial, rows, channels, height, width, part_rows, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.program_id(1)
    t00 = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    t01 = t00
    t02 = t00
    t10 = t00
    t11 = t00
    t12 = t00
    t20 = t00
    t21 = t00
    t22 = t00
    for start in range(0, part_rows, BLOCK_M):
        m = part * part_rows + start + tl.arange(0, BLOCK_M)
        column, row = m % width, (m // width) % height
        base = m[:, None] * channels + c[None, :]
        inside = (m < rows)[:, None] & (c < channels)[None, :]
        g = tl.load(grad + base, inside, 0.0).to(tl.float32)
        up, down = inside & (row > 0)[:, None], inside & (row < height - 1)[:, None]
        left, right = (column > 0)[:, None], (column < width - 1)[:, None]
        above, below = x + base - width * channels, x + base + width * channels
        t00 += g * tl.load(above - channels, up & left, 0.0).to(tl.float32)
        t01 += g * tl.load(above, up, 0.0).to(tl.float32)
        t02 += g * tl.load(above + channels, up & right, 0.0).to(tl.float32)
        t10 += g * tl.load(x + base - channels, inside & left, 0.0).to(tl.float32)
        t11 += g * tl.load(x + base, inside, 0.0).to(tl.float32)
        t12 += g * tl.load(x + base + channels, inside & right, 0.0).to(tl.float32)
        t20 += g * tl.load(below - channels, down & left, 0.0).to(tl.float32)
        t21 += g * tl.load(below, down, 0.0).to(tl.float32)
        t22 += g * tl.load(below + channels, down & right, 0.0).to(tl.float32)
    target = partial + part * 9 * channels + c
    tl.store(target, tl.sum(t00, 0), c < channels)
    tl.store(target + channels, tl.sum(t01, 0), c < channels)
    tl.store(target + 2 * channels, tl.sum(t02, 0), c < channels)
    tl.store(target + 3 * channels, tl.sum(t10, 0), c < channels)
    tl.store(target + 4 * channels, tl.sum(t11, 0), c < channels)
    tl.store(target + 5 * channels, tl.sum(t12, 0), c < channels)
    tl.store(target + 6 * channels, tl.sum(t20, 0), c < channels)
    tl.store(target + 7 * channels, tl.sum(t21, 0), c < channels)
    tl.store(target + 8 * channels, tl.sum(t22, 0), c < channels)
