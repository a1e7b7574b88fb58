"""Whole models: from masked to condensed, the pruning schedule, the group lasso, and the check of equality."""

import copy
from typing import Any

import torch
from torch import nn

from mobilenets_zoo.learned_group_conv import CondensedConv2d, LearnedGroupConv2d

__all__ = ["CondenseSchedule", "check_equivalent", "condense", "group_lasso"]

# Largest error, relative to the largest output, that a different order of summation may cause.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def learned_layers(model: nn.Module) -> dict[str, LearnedGroupConv2d]:
    """Returns the model's learned group convolutions by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LearnedGroupConv2d)}


def condense(model: nn.Module) -> nn.Module:
    """Returns a copy of any model in which every `LearnedGroupConv2d` is a `CondensedConv2d` with equal outputs.

    `model` stays as it was. Training flags, devices and dtypes carry over. A model that is condensed already comes
    back as a plain copy.

    Raises:
        ValueError: a layer's mask isn't finished (the message names the layer and the counts), or the model has
            no learned group convolution.
    """
    if not any(isinstance(module, (LearnedGroupConv2d, CondensedConv2d)) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} has no LearnedGroupConv2d layer: there is nothing to condense")
    layers = learned_layers(model)
    condensed: dict[int, CondensedConv2d] = {}  # by identity, so that a shared layer stays shared
    for name, layer in layers.items():
        try:
            condensed[id(layer)] = layer.condense()
        except ValueError as error:
            raise ValueError(f"{name or type(layer).__name__}: {error}") from error
    # deepcopy takes what the memo holds for an object instead of copying it: the swap needs no walk over parents.
    return copy.deepcopy(model, memo=dict(condensed))


def check_equivalent(
    a: nn.Module,
    b: nn.Module,
    inputs: torch.Tensor | tuple[torch.Tensor, ...],
    tolerance: float | None = None,
) -> float:
    """Compares two models' outputs.

    Both run without gradients and in the mode they are in; running statistics stay untouched.

    Args:
        a: the reference.
        b: the model to compare.
        inputs: a tensor, or a tuple of positional arguments.
        tolerance: largest error relative to the outputs' scale; by default 1e-12 (float64), 1e-5 (float32), 1e-2
            (float16) or 5e-2 (bfloat16).

    Returns:
        The largest error divided by the largest absolute output of `a`.

    Raises:
        ValueError: shapes differ or the error is above the tolerance; the message holds the largest error.
    """
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    a, b = (copy.deepcopy(model) if model.training else model for model in (a, b))
    with torch.no_grad():
        expected, actual = a(*arguments), b(*arguments)
    if expected.shape != actual.shape:
        raise ValueError(f"not equivalent: output shapes {tuple(expected.shape)} and {tuple(actual.shape)}")
    scale = expected.abs().max().double().clamp_min(torch.finfo(torch.float64).tiny)
    error = ((expected.double() - actual.double()).abs().max() / scale).item()
    tolerance = TOLERANCES[expected.dtype] if tolerance is None else tolerance
    if not error <= tolerance:  # also catches NaN
        raise ValueError(
            f"not equivalent: the largest error is {error:.3g} of the outputs' scale, more than {tolerance:g}"
        )
    return error


def group_lasso(model: nn.Module) -> torch.Tensor:
    """Returns the sum of `LearnedGroupConv2d.group_lasso()` over all layers, a scalar with gradient.

    Raises:
        ValueError: the model has no learned group convolution.
    """
    layers = learned_layers(model).values()
    if not layers:
        raise ValueError(f"{type(model).__name__} has no LearnedGroupConv2d layer: there is no group lasso")
    return torch.stack([layer.group_lasso() for layer in layers]).sum()


class CondenseSchedule:
    """Prunes a model's learned group convolutions in stages while it trains (CondenseNet, section 3.2).

    A layer with condense factor C has C - 1 stages, spaced evenly over the first half of training: at progress
    s / (2 * (C - 1)) each group keeps in_channels * (C - s) / C inputs. The second half trains the final structure.
    Call `step` on all processes alike: equal weights give equal masks.

    Args:
        model: any model with `LearnedGroupConv2d` layers.

    Raises:
        ValueError: the model has none.
    """

    def __init__(self, model: nn.Module):
        self.layers = learned_layers(model)
        if not self.layers:
            raise ValueError(f"{type(model).__name__} has no LearnedGroupConv2d layer: there is nothing to schedule")
        self.progress = 0.0

    def step(self, progress: float) -> bool:
        """Prunes all that is due.

        Args:
            progress: share of the training that is done, in [0, 1]. After a resume or a jump, several stages may be
                due at once. Going back changes nothing.

        Returns:
            True if a mask changed.

        Raises:
            ValueError: `progress` outside [0, 1], or weights that aren't finite.
        """
        if not self.due(progress):
            return False
        self.progress = float(progress)
        before = [layer.mask.clone() for layer in self.layers.values()]
        for layer in self.layers.values():
            layer.prune_(self._inputs(layer, self.progress))
        return any(not torch.equal(old, layer.mask) for old, layer in zip(before, self.layers.values(), strict=True))

    def due(self, progress: float) -> bool:
        """Whether `step` has a stage to take.

        Raises:
            ValueError: `progress` outside [0, 1].
        """
        if not 0.0 <= progress <= 1.0:
            raise ValueError(f"progress must be in [0, 1], not {progress}")
        return any(self._inputs(layer, progress) < self._inputs(layer, self.progress) for layer in self.layers.values())

    @staticmethod
    def _inputs(layer: LearnedGroupConv2d, progress: float) -> int:
        """Returns how many inputs each of the layer's groups keeps by then."""
        stages = layer.condense_factor - 1
        # The margin forgives a progress that is a rounding error short of a stage.
        done = min(stages, int(2 * stages * progress + 1e-6))
        return layer.in_channels // layer.condense_factor * (layer.condense_factor - done)

    def state_dict(self) -> dict[str, Any]:
        """Returns the progress; the masks are in the model's own state."""
        return {"progress": self.progress}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.progress = float(state["progress"])
