"""Whole models: from masked to condensed, and the check of equality."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from mobilenets_zoo.lgc.layers import CondensedConv2d, LearnedGroupConv2d

__all__ = ["check_equivalent", "condense", "learned_layers"]

# Largest error, relative to the largest output, that a different order of summation may cause.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# How many times as much a whole network's error may be where its weights, too, are computed anew: with BatchNorm
# folded in, or by ONNX Runtime.
REWRITTEN = 10.0


def learned_layers(model: nn.Module) -> dict[str, LearnedGroupConv2d]:
    """Returns the model's learned group convolutions by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LearnedGroupConv2d)}


def condense(model: nn.Module) -> nn.Module:
    """Returns a copy of any model in which every `LearnedGroupConv2d` is a `CondensedConv2d` with equal outputs.

    `model` stays as it was. Training flags, devices and dtypes carry over. A model that is condensed already comes
    back as a plain copy.

    Raises:
        ValueError: a layer's mask isn't finished (the message names the layer and the counts) or it has hooks,
            or the model has no learned group convolution.
    """
    layers = learned_layers(model)
    if not layers and not any(isinstance(module, CondensedConv2d) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} has no LearnedGroupConv2d layer: there is nothing to condense")
    condensed: dict[int, CondensedConv2d] = {}  # by identity, so that a shared layer stays shared
    for name, layer in layers.items():
        try:
            condensed[id(layer)] = layer.condense()
        except ValueError as error:
            raise ValueError(f"{name or type(layer).__name__}: {error}") from error
    # deepcopy takes what the memo holds for an object instead of copying it: the swap needs no walk over parents.
    return copy.deepcopy(model, memo=dict(condensed))


def check_equivalent(
    a: Callable[..., Any],
    b: Callable[..., Any],
    inputs: torch.Tensor | tuple[torch.Tensor, ...],
    tolerance: float | None = None,
) -> float:
    """Compares two models' outputs, a tensor or a list or dict of them; what else is in it doesn't count.

    Both run without gradients, on CPUs and CUDA without autocast, and in the mode they are in; running statistics stay
    untouched. On a GPU nothing rounds to TF32 meanwhile, before torch 2.9 no convolution. Infinite outputs must be
    equal, and NaN is equal to nothing.

    Args:
        a: the reference, a model or another function.
        b: what to compare.
        inputs: a tensor, or a tuple of positional arguments.
        tolerance: largest error relative to the outputs' scale; by default 1e-12 (float64), 1e-5 (float32), 1e-2
            (float16), 5e-2 (bfloat16) or 0 (integers).

    Returns:
        The largest error divided by the largest absolute output of `a`; of several outputs, the largest such.

    Raises:
        ValueError: no tensors, shapes that differ, or an error above the tolerance, which the message holds.
    """
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    models = ((model, isinstance(model, nn.Module) and any(m.training for m in model.modules())) for model in (a, b))
    a, b = (copy.deepcopy(model) if training else model for model, training in models)
    with torch.no_grad(), _in_whole_precision():
        # Copies, since a model may change its input in place.
        outputs = (tree_leaves(model(*tree_map_only(torch.Tensor, torch.clone, arguments))) for model in (a, b))
        # Some devices know no double precision.
        expected, actual = ([_real(x).cpu() for x in leaves if isinstance(x, torch.Tensor)] for leaves in outputs)
    if not expected:
        raise ValueError("there are no outputs to compare: neither a tensor nor a list or dict of tensors")
    shapes = [", ".join(str(tuple(output.shape)) for output in outputs) for outputs in (expected, actual)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"not equivalent: output shapes {shapes[0]} and {shapes[1]}")
    largest = 0.0
    for x, y in zip(expected, actual, strict=True):
        if not x.numel():
            continue
        allowed = TOLERANCES.get(x.dtype, 0.0) if tolerance is None else tolerance
        x, y = x.double(), y.double()
        scale = x.where(x.isfinite(), 0.0).abs().max().clamp_min(torch.finfo(torch.float64).tiny)
        error = ((x - y).where(x != y, 0.0).abs().max() / scale).item()
        if not error <= allowed:  # also catches NaN
            raise ValueError(
                f"not equivalent: the largest error is {error:.3g} of the outputs' scale, more than {allowed:g}"
            )
        largest = max(largest, error)
    return largest


def _real(x: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


@contextlib.contextmanager
def _in_whole_precision() -> Iterator[None]:
    """Ends autocast; lets convolutions on a GPU compute in whole float32, from torch 2.9 on matrix products, too."""
    cudnn: Any = torch.backends.cudnn
    # Where a user has set newer versions' settings, reading the old one raises.
    new = hasattr(cudnn, "conv")
    name, exact = ("fp32_precision", "ieee") if new else ("allow_tf32", False)
    settings: tuple[Any, ...] = (cudnn.conv, torch.backends.cuda.matmul) if new else (cudnn,)
    before = [getattr(each, name) for each in settings]
    try:
        for each in settings:
            setattr(each, name, exact)
        with contextlib.ExitStack() as stack:
            for kind in filter(torch.is_autocast_enabled, ("cpu", "cuda")):
                stack.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        for each, value in zip(settings, before, strict=True):
            setattr(each, name, value)
