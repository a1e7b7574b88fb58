"""Learned group convolution for a network of your choice."""

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Optional

import torch
from timm.layers import Conv2dSame
from torch import nn

from mobilenets_zoo.lgc.condense import learned_layers
from mobilenets_zoo.lgc.layers import CondensedConv2d, LearnedGroupConv2d, has_hooks
from mobilenets_zoo.profiling import Profile, input_size_of, profile

__all__ = ["ConversionReport", "to_learned_group_conv"]

# Convolutions that compute what their weight says; other subclasses do something to the weight or the input first.
PLAIN_CONVOLUTIONS = (nn.Conv2d, Conv2dSame)


@dataclass(frozen=True)
class ConversionReport:
    """What `to_learned_group_conv` did.

    Attributes:
        converted: names of the layers that learn their groups now.
        left: names of the other convolutions, with the reason.
        before: parameters and MACs of the model as it is.
        after: parameters and MACs once it is pruned and condensed.
    """

    converted: tuple[str, ...]
    left: dict[str, str]
    before: Profile
    after: Profile

    def __str__(self) -> str:
        params = f"{self.before.params:,} -> {self.after.params:,} parameters"
        macs = f"{self.before.macs:,} -> {self.after.macs:,} MACs"
        return f"{len(self.converted)} layers converted, {len(self.left)} left; once condensed: {params}, {macs}"


def to_learned_group_conv(
    model: nn.Module,
    groups: int = 4,
    condense_factor: int = 4,
    match: Optional[Callable[[str, nn.Conv2d], bool]] = None,
    input_size: Optional[tuple[int, int, int]] = None,
) -> tuple[nn.Module, ConversionReport]:
    """Replaces a model's 1x1 convolutions by learned group convolutions that start from the same weights.

    Outputs stay equal until `prune_groups` or a `CondenseSchedule` prunes; then `condense` the result. `model` stays as
    it was.

    Args:
        model: any network of `nn.Conv2d` layers that maps a batch of images, from timm, torchvision or your own.
        groups: groups of output channels (G).
        condense_factor: a finished group reads in_channels / condense_factor inputs (C).
        match: called with the name and the module of each layer that can be converted, True to convert; by default
            all are.
        input_size: (channels, height, width) to count MACs at; by default the one in `model.pretrained_cfg`, or
            (3, 224, 224).

    Returns:
        The new model, in the mode and on the device of the old one, and a report.

    Raises:
        ValueError: no layer can be converted or `match` chose none, `groups` or `condense_factor` below 1, or the model
            can't run at the input size; the message says why.
    """
    if min(groups, condense_factor) < 1:
        raise ValueError(f"groups and condense_factor must be 1 or larger, not {groups} and {condense_factor}")
    convolutions = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    merges = ("fuse", "reparameterize", "switch_to_deploy")  # what timm.utils.reparameterize_model calls
    blocks = [block for block in model.modules() if block is not model and _has_method(block, merges)]
    done = ("reparam_conv", "is_fused", "fused", "infer_mode")  # how timm's blocks remember that they have merged
    blocks = [block for block in blocks if not any(getattr(block, name, None) for name in done)]
    # Others don't: what has no BatchNorm left, frozen or not, has merged.
    blocks = [block for block in blocks if any(hasattr(module, "running_var") for module in block.modules())]
    merging = {module for block in blocks for module in block.modules()}
    users = Counter(id(weight) for module in model.modules() for weight in module.parameters(recurse=False))
    left: dict[str, str] = {}
    learned: dict[int, LearnedGroupConv2d] = {}  # by identity, so that a shared layer stays shared
    converted = []
    for name, module in convolutions.items():
        reason = _obstacle(module, groups, condense_factor)
        if reason is None and module in merging:
            reason = "its block merges weights: call timm.utils.reparameterize_model first"
        if reason is None and users[id(module.weight)] > 1:
            reason = "it shares its weight with another layer"
        if reason is None and match is not None and not match(name, module):
            reason = "not matched"
        if reason is not None:
            left[name] = reason
            continue
        learned[id(module)] = _learned(module, groups, condense_factor)
        converted.append(name)
    if not converted:
        reasons = ", ".join(sorted(set(left.values()))[:5]) or "it has no nn.Conv2d"
        raise ValueError(f"no layer of {type(model).__name__} was converted: {reasons}")
    # deepcopy takes what the memo holds for an object instead of copying it.
    result = copy.deepcopy(model, memo=dict(learned))

    size = input_size or input_size_of(model) or (3, 224, 224)
    condensed = {id(layer): _condensed_alike(layer) for layer in learned_layers(result).values()}
    try:
        before, after = profile(model, size), profile(copy.deepcopy(result, memo=dict(condensed)), size)
    except Exception as error:  # an AssertionError of networks with a fixed size
        raise ValueError(f"can't count MACs at input_size={size}; pass what the model takes: {error}") from error
    return result, ConversionReport(tuple(converted), left, before, after)


def _has_method(module: nn.Module, names: tuple[str, ...]) -> bool:
    return any(callable(getattr(type(module), name, None)) for name in names)  # not a submodule of that name


def _obstacle(module: nn.Conv2d, groups: int, condense_factor: int) -> Optional[str]:
    """Returns why a convolution can't be converted, None where it can."""
    obstacles = {
        f"a {type(module).__name__} does more than convolve": type(module) not in PLAIN_CONVOLUTIONS,
        "not 1x1: " + "x".join(map(str, module.kernel_size)): module.kernel_size != (1, 1),
        "it has hooks": has_hooks(module),
        f"grouped already: groups={module.groups}": module.groups > 1,
        f"padding {module.padding}": module.padding not in (0, (0, 0), "valid", "same"),
        f"in_channels {module.in_channels} isn't a multiple of {condense_factor}": module.in_channels % condense_factor,
        f"out_channels {module.out_channels} isn't a multiple of {groups}": module.out_channels % groups,
    }
    return next((reason for reason, holds in obstacles.items() if holds), None)


def _learned(module: nn.Conv2d, groups: int, condense_factor: int) -> LearnedGroupConv2d:
    weight, bias = module.weight, module.bias
    sizes = (module.in_channels, module.out_channels, groups, condense_factor)
    # All tensors are replaced, so that none need be drawn.
    layer = LearnedGroupConv2d(*sizes, device="meta", stride=module.stride, bias=bias is not None)
    layer.mask = torch.ones_like(layer.mask, device=weight.device)
    layer.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format), weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return layer.train(module.training)


def _condensed_alike(layer: LearnedGroupConv2d) -> CondensedConv2d:
    """Returns a layer of the form that `condense` would give, to be counted: its weights are none."""
    sizes = (layer.in_channels, layer.out_channels, layer.groups, layer.condense_factor)
    with torch.random.fork_rng(devices=[]):
        condensed = CondensedConv2d(*sizes, stride=layer.stride, bias=layer.bias is not None)
    return condensed.to(layer.weight)
