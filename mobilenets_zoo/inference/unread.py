"""Channels that no group reads, removed from any network that torch.fx can trace."""

import copy
import inspect
import math
from collections import Counter
from typing import Any, Optional

import torch
from timm.layers import activations
from timm.models import get_notrace_functions, get_notrace_modules
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from mobilenets_zoo.inference.rewrites import SIMD_CHANNELS, living_channels
from mobilenets_zoo.lgc.layers import CondensedConv2d, has_hooks

__all__ = ["remove_unread_channels_"]

# What maps each channel by itself and knows no channel's number; and the tensors of layers that may lose channels.
ELEMENTWISE = (
    *(nn.Identity, nn.Dropout, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Mish),
    *(nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, activations.GELU, activations.GELUTanh, activations.QuickGELU),
)
FUNCTIONS = (F.relu, F.relu6, F.silu, F.gelu, F.hardswish, torch.relu)
BY_CHANNEL = ("weight", "bias", "running_mean", "running_var")
KNOWN = {*BY_CHANNEL, "num_batches_tracked", "index"}
LIBRARIES = ("torch.", "torchvision.", "timm.layers.", "mobilenets_zoo.")  # a user's subclass may do anything


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaves = (nn.Conv2d, CondensedConv2d, _BatchNorm, *ELEMENTWISE, *get_notrace_modules())
        return isinstance(m, leaves) or super().is_leaf_module(m, module_qualified_name)


def remove_unread_channels_(model: nn.Module) -> None:
    """Removes, in place, what computes channels that no group of a `CondensedConv2d` reads.

    That is the rows of a convolution, grouped or not, and what lies between it and the condensed layer, as long as
    nothing else reads it and it works on each channel by itself: BatchNorm, depthwise convolutions, usual activations.

    Raises:
        ValueError: torch.fx can't trace the model.
    """
    arguments = inspect.signature(model.forward).parameters.values()
    defaults = {each.name: each.default for each in arguments if each.default is not each.empty}
    try:  # in a copy, which keeps what `forward` assigns
        nodes = _Tracer(autowrap_functions=tuple(get_notrace_functions())).trace(copy.deepcopy(model), defaults).nodes
    except Exception as error:  # whatever a model's code raises when it meets a proxy
        raise ValueError(f"torch.fx can't trace {type(model).__name__}: {error}; use mz.condense") from error
    modules = dict(model.named_modules())
    calls = Counter(node.target for node in nodes if node.op == "call_module")

    def called(node: Any) -> Optional[nn.Module]:
        """Returns the module behind a value, if it runs once and takes one argument."""
        if not isinstance(node, fx.Node) or node.op != "call_module" or calls[node.target] > 1:
            return None
        return modules[str(node.target)] if len(node.args) == 1 and not node.kwargs else None

    for node in nodes:
        reader, between = called(node), list[nn.Module]()
        if not isinstance(reader, CondensedConv2d):
            continue
        source = node.args[0]
        while len(source.users) == 1:
            if source.op == "call_function" and source.target in FUNCTIONS:
                source = source.all_input_nodes[0]  # which may be a keyword argument
                continue
            module = called(source)
            if module is None or not _is_known(module):
                break
            if not _is_channelwise(module):
                if isinstance(module, (nn.Conv2d, CondensedConv2d)):
                    _remove(module, between, reader)
                break
            between.append(module)
            source = source.args[0]


def _is_known(module: nn.Module) -> bool:
    if not type(module).__module__.startswith(LIBRARIES) or has_hooks(module):
        return False
    return {name for name, _ in [*module.named_parameters(), *module.named_buffers()]} <= KNOWN


def _is_channelwise(module: nn.Module) -> bool:
    if isinstance(module, _BatchNorm):  # timm's have an activation inside
        return all(isinstance(child, ELEMENTWISE) for child in module.children())
    if isinstance(module, nn.Conv2d):
        return module.groups == module.in_channels == module.out_channels
    return isinstance(module, ELEMENTWISE)


def _remove(writer: nn.Conv2d | CondensedConv2d, between: list[nn.Module], reader: CondensedConv2d) -> None:
    """Leaves out the channels that `reader` doesn't read; groups of `writer` stay equally large."""
    alive = torch.zeros(reader.in_channels, dtype=torch.bool, device=reader.index.device)
    alive[reader.index] = True
    order = living_channels(alive, writer.groups, SIMD_CHANNELS // math.gcd(SIMD_CHANNELS, writer.groups))
    reader.index = torch.searchsorted(order, reader.index)
    reader.in_channels = writer.out_channels = len(order)
    for module in (writer, *between):
        for name in BY_CHANNEL:
            tensor = getattr(module, name, None)
            if tensor is not None:
                kept = tensor.detach()[order]
                setattr(module, name, nn.Parameter(kept) if isinstance(tensor, nn.Parameter) else kept)
        if isinstance(module, _BatchNorm):
            module.num_features = len(order)
        elif isinstance(module, nn.Conv2d) and module is not writer:
            module.in_channels = module.out_channels = module.groups = len(order)
