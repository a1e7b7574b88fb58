"""Training learned group convolutions: the pruning schedule and the group lasso (CondenseNet, section 3.2)."""

from collections.abc import Iterable
from typing import Any, Optional, Union

import torch
from torch import nn

from mobilenets_zoo.lgc.condense import learned_layers
from mobilenets_zoo.lgc.layers import LearnedGroupConv2d
from mobilenets_zoo.lgc.pruning import batches_of, prune_groups

__all__ = ["CondenseSchedule", "group_lasso"]


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
        images: as for `prune_groups`, which then takes each stage and refits the kept weights to what the layers put
            out before it; by default inputs go by the sum of absolute weights, and weights stay as they are.

    Raises:
        ValueError: the model has none, or `images` can't be iterated many times.
    """

    def __init__(self, model: nn.Module, images: Optional[Union[torch.Tensor, Iterable[Any]]] = None):
        self.model, self.images = model, images
        self.layers = learned_layers(model)
        if not self.layers:
            raise ValueError(f"{type(model).__name__} has no LearnedGroupConv2d layer: there is nothing to schedule")
        if images is not None:
            batches_of(images)  # what can't be iterated again shows before the training
        self.progress = 0.0

    def step(self, progress: float) -> bool:
        """Prunes all that is due.

        Args:
            progress: share of the training that is done, in [0, 1]. After a resume or a jump, several stages may be
                due at once. Going back changes nothing.

        Returns:
            True if a mask changed.

        Raises:
            ValueError: `progress` outside [0, 1], weights that aren't finite, or what `prune_groups` raises; the model
                is as it was.
        """
        if not self.due(progress):
            return False
        layers = self.layers.values()
        before = [layer.mask.clone() for layer in layers]
        if self.images is not None:
            # After a resume the masks may be there already.
            if any(layer.mask.sum(1).max() > self._inputs(layer, progress) for layer in layers):
                prune_groups(self.model, self.images, lambda layer: self._inputs(layer, progress))
        else:
            try:
                for layer in layers:
                    layer.prune_(self._inputs(layer, progress))
            except ValueError:
                for old, layer in zip(before, layers, strict=True):
                    layer.mask.copy_(old)
                raise
        self.progress = float(progress)
        return any(not torch.equal(old, layer.mask) for old, layer in zip(before, layers, strict=True))

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
