"""What makes training on a processor fast: memory, the optimiser's precision, and layers that oneDNN is slow at."""

import contextlib
import ctypes
import functools
from collections.abc import Iterator

import timm.optim.muon
import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn import functional as F

from training.cpu_layers import LANES, batch_norm_act, depthwise_conv3x3, kernels

__all__ = ["adapt_layers", "keep_freed_memory", "orthogonalize_in_float32"]

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Lets glibc keep freed memory for the next step.

    By default every large tensor is mapped anew, and a step on the CPU spends much of its time on page faults.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return  # not glibc
    for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 2**28)):
        mallopt(parameter, value)


@contextlib.contextmanager
def orthogonalize_in_float32() -> Iterator[None]:
    """Lets timm's Muon multiply matrices in float32.

    timm always takes bfloat16, which a CPU without bfloat16 instructions emulates, 20 to 40 times slower.
    """
    original = timm.optim.muon.zeropower_via_newtonschulz
    timm.optim.muon.zeropower_via_newtonschulz = functools.partial(original, dtype=torch.float32)
    try:
        yield
    finally:
        timm.optim.muon.zeropower_via_newtonschulz = original


def adapt_layers(model: nn.Module) -> None:
    """Changes how some convolutions compute, in place; parameters and outputs stay.

    BatchNorm and the ReLU6 behind it, and depthwise 3x3 convolutions in bfloat16, are those of `cpu_layers.py`. Other
    strided depthwise convolutions leave autocast: their gradient by the input takes oneDNN many times longer in
    bfloat16 than in float32. Grouped 1x1 convolutions multiply as dense ones with zeros between the groups: narrow
    groups take longer than the zeros do.
    """
    for module in model.modules():
        if isinstance(module, BatchNormAct2d) and isinstance(module.act, (nn.ReLU6, nn.Identity)) and kernels():
            module.forward = functools.partial(_batch_norm_forward, module)
        if type(module) is not nn.Conv2d or module.groups == 1:
            continue
        if module.groups < module.in_channels and module.kernel_size == (1, 1):
            module.forward = functools.partial(_dense_forward, module)  # type: ignore[method-assign]
        elif module.groups == module.in_channels and _is_plain_3x3(module) and kernels():
            module.forward = functools.partial(_depthwise_forward, module)  # type: ignore[method-assign]
        elif module.groups == module.in_channels and module.stride[0] > 1:
            module.forward = functools.partial(_float32_forward, module)  # type: ignore[method-assign]


def _batch_norm_forward(module: BatchNormAct2d, x: torch.Tensor) -> torch.Tensor:
    if not module.training or x.dtype not in kernels():
        return type(module).forward(module, x)
    statistics = (module.running_mean, module.running_var)
    relu6 = isinstance(module.act, nn.ReLU6)
    return batch_norm_act(x, module.weight, module.bias, *statistics, module.momentum, module.eps, relu6)


def _dense_forward(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    blocks = torch.block_diag(*conv.weight.flatten(1).chunk(conv.groups))
    return F.conv2d(x, blocks[:, :, None, None], conv.bias, conv.stride)


def _is_plain_3x3(conv: nn.Conv2d) -> bool:
    """Whether `depthwise_conv3x3` can compute a depthwise convolution."""
    shape = (conv.kernel_size, conv.padding, conv.dilation)
    return (
        shape == ((3, 3), (1, 1), (1, 1))
        and conv.stride[0] == conv.stride[1]
        and conv.out_channels == conv.in_channels
        and conv.in_channels % LANES == 0
        and conv.bias is None
    )


def _depthwise_forward(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    if x.dtype is not torch.bfloat16:
        return nn.Conv2d.forward(conv, x)
    return depthwise_conv3x3(x, conv.weight, conv.stride[0])


def _float32_forward(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return nn.Conv2d.forward(conv, x.float()).to(x.dtype)
