"""Training layers for CPUs in C, which the machine's own compiler translates at the first use.

PyTorch normalises, copies and clips in passes of their own, and oneDNN's bfloat16 gradients of depthwise convolutions
are slow; where 1x1 convolutions have matrix instructions, these layers are most of the rest. `batch_norm_act` reads
its input twice and writes once in each direction, and keeps the input alone for the backward pass; `depthwise_conv3x3`
has both gradients in one pass.
"""

import ctypes
import functools
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

__all__ = ["LANES", "batch_norm_act", "depthwise_conv3x3", "kernels"]

SOURCE = Path(__file__).with_suffix(".c")
BITS = {torch.bfloat16: 16, torch.float32: 32}
FLAGS = ["-O3", "-march=native", "-ffast-math", "-fno-finite-math-only", "-shared", "-fPIC"]
if platform.machine() in ("x86_64", "AMD64"):
    FLAGS.append("-mprefer-vector-width=512")
BLOCK = 128  # rows summed in float32, before their sums are added in float64
LANES = 16  # channels that the depthwise gradients take at once


@functools.cache
def kernels() -> dict[torch.dtype, ctypes.CDLL]:
    """Compiles the C file and returns its functions by dtype; none, with a line that says so, where that fails.

    The compiler is the environment's CC or `cc`.
    """
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for dtype, bits in BITS.items():
            library = Path(folder) / f"layers_{bits}.so"
            command = [
                os.environ.get("CC", "cc"),
                *FLAGS,
                f"-DVALUE_BITS={bits}",
                f"-DLANES={LANES}",
                str(SOURCE),
                "-o",
                str(library),
            ]
            try:
                subprocess.run(command, check=True, capture_output=True, text=True)
                found[dtype] = ctypes.CDLL(str(library))
            except (OSError, subprocess.CalledProcessError) as error:
                reason = " ".join((getattr(error, "stderr", None) or str(error)).split())
                print(f"warning: slower layers, for want of a C compiler: {reason[:300]}", file=sys.stderr)
                return {}
    return found


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
        x: (N, C, H, W), bfloat16 or float32, on the CPU.
        weight, bias: (C,), float32.
        running_mean, running_var: (C,), float32, updated in place.
        momentum: of the running statistics.
        eps: added to the variance.
        relu6: whether the output is clipped to [0, 6].

    Returns:
        (N, C, H, W) in x's dtype, channels-last.
    """
    return _BatchNormAct.apply(x, weight, bias, running_mean, running_var, momentum, eps, relu6)


def depthwise_conv3x3(x: torch.Tensor, weight: torch.Tensor, stride: int) -> torch.Tensor:
    """A depthwise 3x3 convolution with padding 1.

    Args:
        x: (N, C, H, W), bfloat16, on the CPU; C is a multiple of `LANES`.
        weight: (C, 1, 3, 3), float32.
        stride: along both axes.

    Returns:
        (N, C, H / stride, W / stride), rounded up, in bfloat16.
    """
    return _DepthwiseConv3x3.apply(x, weight, stride)


class _BatchNormAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, running_mean, running_var, momentum, eps, relu6):
        x = x.contiguous(memory_format=torch.channels_last)
        channels, rows = x.shape[1], x.numel() // x.shape[1]
        library = kernels()[x.dtype]
        total, squares = _sum(library.sums, rows, channels, (), (x,))
        shifted = total / rows
        variance = (squares / rows - shifted * shifted).clamp_(min=0.0)
        mean = shifted + x[0, :, 0, 0]
        running_mean.lerp_(mean.float(), momentum)
        running_var.lerp_((variance * (rows / (rows - 1))).float(), momentum)
        inverse = torch.rsqrt(variance + eps)
        scale = weight * inverse
        statistics = torch.stack([scale, bias - mean * scale, mean, inverse]).float()
        y = torch.empty_like(x)
        _split(library.normalize, rows, 1, (channels, int(relu6)), (x, *statistics[:2], y))
        ctx.save_for_backward(x, statistics)
        ctx.relu6 = int(relu6)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient):
        x, statistics = ctx.saved_tensors
        scale, shift, mean, inverse = statistics
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        channels, rows = x.shape[1], x.numel() // x.shape[1]
        library = kernels()[x.dtype]
        sources = (gradient, x, scale, shift)
        total, products = _sum(library.gradient_sums, rows, channels, (ctx.relu6,), (*sources, mean))
        products *= inverse
        # dx = scale * (gradient - total / rows - normalised x * products / rows)
        by_x = -scale * inverse * products / rows
        constant = -scale * total / rows - by_x * mean
        dx = torch.empty_like(x)
        by = torch.stack([by_x, constant]).float()
        _split(library.gradient_of_x, rows, 1, (channels, ctx.relu6), (*sources, *by, dx))
        return dx, products.float(), total.float(), None, None, None, None, None


class _DepthwiseConv3x3(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, stride):
        x = x.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return F.conv2d(x, weight.to(x.dtype), None, stride, 1, groups=len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient):
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        images, channels, height, width = x.shape
        taps = weight.reshape(channels, 9).t().contiguous()
        dx, dw = torch.empty_like(x), torch.empty(images, 9, channels)
        space = 2 * (height + 2) * (width + 2) * LANES
        numbers, tensors = (height, width, channels, ctx.stride), (gradient, x, taps, dx, dw)
        _split(kernels()[x.dtype].depthwise_gradients, images, 1, numbers, tensors, space)
        return dx, dw.sum(0).t().reshape(weight.shape), None


def _sum(function: Callable, rows: int, channels: int, numbers: tuple[int, ...], tensors: tuple) -> torch.Tensor:
    """Returns the two sums, (2, channels) in float64, that a C function makes of blocks of rows."""
    blocks = torch.empty(2, -(-rows // BLOCK), channels)
    _split(function, rows, BLOCK, (channels, BLOCK, *numbers), (*tensors, *blocks))
    return blocks.sum(1, dtype=torch.float64)


def _split(
    function: Callable, count: int, block: int, numbers: tuple[int, ...], tensors: tuple, space: int = 0
) -> None:
    """Calls a C function for all rows or images, in as many threads as PyTorch has.

    The result doesn't depend on the number of threads.

    Args:
        function: takes begin, end, the numbers, the tensors' addresses, and memory of its own if `space` isn't 0.
        count: of rows or images.
        block: what every begin is a multiple of.
        space: floats that each call needs for itself.
    """
    threads = torch.get_num_threads()
    part = -(-count // (threads * block)) * block

    def call(begin: int) -> None:
        own = (torch.empty(space),) if space else ()
        sizes = map(ctypes.c_int64, (begin, min(begin + part, count), *numbers))
        function(*sizes, *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (*tensors, *own)))

    if threads == 1:
        call(0)
    else:
        list(_pool(threads).map(call, range(0, count, part)))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)
