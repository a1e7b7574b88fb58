"""Layers for training on a CPU: detours around three kernels of PyTorch that are slow there.

They were found with torch 2.14 on an Intel Xeon. What is computed stays the same, but for its rounding; it takes more
memory.
"""

import functools

import torch
from timm.layers import SelectAdaptivePool2d
from torch import nn

__all__ = ["spare_cpu"]


def spare_cpu(model: nn.Module) -> nn.Module:
    """Changes layers in place; parameters, buffers and state dict stay what they are."""
    for module in model.modules():
        if isinstance(module, nn.ReLU6):
            module.inplace = False  # overwriting takes longer than writing elsewhere
        elif isinstance(module, SelectAdaptivePool2d):
            module.register_forward_pre_hook(_channels_last_gradient)
        elif isinstance(module, nn.Conv2d) and module.groups == module.in_channels and module.stride != (1, 1):
            module.forward = functools.partial(_float32_forward, module)  # type: ignore[method-assign]
    return model


def _channels_last_gradient(_: nn.Module, inputs: tuple[torch.Tensor]) -> None:
    """A pooling's gradient has channels first, with which the backward of the BatchNorm before it is slow."""
    if inputs[0].requires_grad:
        inputs[0].register_hook(lambda gradient: gradient.contiguous(memory_format=torch.channels_last))


def _float32_forward(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """oneDNN's bfloat16 gradient of a strided depthwise convolution takes several times as long as the float32 one."""
    with torch.autocast("cpu", enabled=False):
        return type(conv).forward(conv, x.float()).to(x.dtype)
