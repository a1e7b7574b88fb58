"""BatchNorm with ReLU6 for training on a CPU, in C that the machine's own compiler translates at the first use.

PyTorch normalises, copies and clips in passes of their own, and these are most of what a step does besides the 1x1
convolutions, which are fast where the processor has matrix instructions. `batch_norm_act` reads its input twice and
writes once in each direction, and keeps the input alone for the backward pass.
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

__all__ = ["batch_norm_act", "kernels"]

SOURCE = Path(__file__).with_suffix(".c")
BITS = {torch.bfloat16: 16, torch.float32: 32}
FLAGS = ["-O3", "-march=native", "-ffast-math", "-fno-finite-math-only", "-shared", "-fPIC"]
if platform.machine() in ("x86_64", "AMD64"):
    FLAGS.append("-mprefer-vector-width=512")
BLOCK = 128  # rows summed in float32, before their sums are added in float64


@functools.cache
def kernels() -> dict[torch.dtype, ctypes.CDLL]:
    """Compiles the C file and returns its functions by dtype; none, with a line that says so, where that fails.

    The compiler is the environment's CC or `cc`.
    """
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for dtype, bits in BITS.items():
            library = Path(folder) / f"batch_norm_{bits}.so"
            command = [os.environ.get("CC", "cc"), *FLAGS, f"-DVALUE_BITS={bits}", str(SOURCE), "-o", str(library)]
            try:
                subprocess.run(command, check=True, capture_output=True, text=True)
                found[dtype] = ctypes.CDLL(str(library))
            except (OSError, subprocess.CalledProcessError) as error:
                reason = " ".join((getattr(error, "stderr", None) or str(error)).split())
                print(f"warning: slower BatchNorm, for want of a C compiler: {reason[:300]}", file=sys.stderr)
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


def _sum(function: Callable, rows: int, channels: int, numbers: tuple[int, ...], tensors: tuple) -> torch.Tensor:
    """Returns the two sums, (2, channels) in float64, that a C function makes of blocks of rows."""
    blocks = torch.empty(2, -(-rows // BLOCK), channels)
    _split(function, rows, BLOCK, (channels, BLOCK, *numbers), (*tensors, *blocks))
    return blocks.sum(1, dtype=torch.float64)


def _split(function: Callable, rows: int, block: int, numbers: tuple[int, ...], tensors: tuple) -> None:
    """Calls a C function for all rows, in as many threads as PyTorch has; the result doesn't depend on their number."""
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    arguments = (*map(ctypes.c_int64, numbers), *pointers)
    threads = torch.get_num_threads()
    part = -(-rows // (threads * block)) * block
    parts = [(ctypes.c_int64(i), ctypes.c_int64(min(i + part, rows))) for i in range(0, rows, part)]
    if threads == 1:
        function(*parts[0], *arguments)
    else:
        list(_pool(threads).map(lambda ends: function(*ends, *arguments), parts))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)
