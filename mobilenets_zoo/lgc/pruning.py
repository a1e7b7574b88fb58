"""Learned groups without training: inputs chosen by the error that dropping them makes, kept weights refitted.

A group drops inputs one by one as in Optimal Brain Surgeon (Hassibi and Stork, 1993), which Optimal Brain Compression
(https://arxiv.org/abs/2208.11580) applies layer by layer. The target is the output of the unpruned network, so that a
layer makes up for what the layers before it have lost, as in Channel Pruning (https://arxiv.org/abs/1707.06168).

Notation: x is a layer's input at one position of a feature map in the network pruned so far, with a 1 behind it for
the bias: (I + 1,). y is the layer's output there in the unpruned network: (O,). G groups.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Optional, Union

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from mobilenets_zoo.lgc.condense import learned_layers
from mobilenets_zoo.lgc.layers import LearnedGroupConv2d

__all__ = ["LayerPruning", "PruningReport", "prune_groups"]

# Positions of a feature map that are looked at, per axis: neighbours say nearly the same.
GRID = 8
# Positions per input that are enough for a layer: one with few inputs looks at every nth batch only.
ENOUGH = 64
# Pixels in a batch, where the images come as one tensor.
BATCH_PIXELS = 2**15
# Added to an input's second moment, as a share of itself and of the layer's mean.
RIDGE = (1e-4, 1e-6)


@dataclass(frozen=True)
class LayerPruning:
    """What `prune_groups` did to a layer.

    Errors are squared errors of the layer's outputs on the calibration images against the unpruned network's, divided
    by the variance of the latter.

    Attributes:
        inputs: how many inputs each group keeps.
        error: of the inputs chosen, with refitted weights.
        magnitude_error: of this layer pruned by `LearnedGroupConv2d.prune_` instead.
    """

    inputs: tuple[int, ...]
    error: float
    magnitude_error: float


@dataclass(frozen=True)
class PruningReport:
    """What `prune_groups` did, by layer, in the order in which the layers run."""

    layers: dict[str, LayerPruning]

    def __str__(self) -> str:
        width = max(map(len, self.layers))
        lines = [f"{'layer':{width}}  inputs   error  by magnitude"]
        for name, row in self.layers.items():
            lines.append(f"{name:{width}}  {max(row.inputs):6}  {row.error:6.3f}  {row.magnitude_error:12.3f}")
        return "\n".join(lines)


@dataclass
class _Use:
    """How a forward pass uses a layer: positions that each call looks at, and the BatchNorms that follow directly."""

    positions: list[int] = field(default_factory=list)
    norms: list[nn.Module] = field(default_factory=list)


@torch.no_grad()
def prune_groups(
    model: nn.Module,
    images: Union[torch.Tensor, Iterable[Any]],
    inputs: Union[int, Callable[[LearnedGroupConv2d], int], None] = None,
    teacher: Optional[nn.Module] = None,
) -> PruningReport:
    """Prunes all learned group convolutions of a model at once, in place, with calibration images and no labels.

    Layer by layer, each group keeps the inputs without which the squared error of its outputs would grow most, and
    its weights are refitted to the teacher's outputs of that layer; so is the bias, or the running mean of a BatchNorm
    that follows. Dropped inputs never return. Training flags and random state stay as they are. Memory holds the
    second moments of one layer. With torch.distributed initialised, all processes call this alike, each with images of
    its own, and get the same masks and weights.

    Args:
        model: any model with `LearnedGroupConv2d` layers that maps a batch of images.
        images: (N, C, H, W), normalised as in training, or an iterable of such batches, or of tuples that start with
            one, such as a DataLoader. It is iterated many times; an iterator is collected first.
        inputs: how many inputs each group keeps, or a function of the layer that returns it; by default
            in_channels / condense_factor.
        teacher: a network with layers of the same names whose outputs are the target; by default the model as it is.

    Raises:
        ValueError: no learned layer, one that the model doesn't run or the teacher lacks, `inputs` out of range,
            images of another shape or fewer than the largest layer needs, activations that aren't finite.
    """
    model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    teacher = copy.deepcopy(model) if teacher is None else teacher
    layers = learned_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no LearnedGroupConv2d layer: there is nothing to prune")
    counts = {}
    for name, layer in layers.items():
        count = layer.in_channels // layer.condense_factor if inputs is None else inputs
        counts[name] = count if isinstance(count, int) else count(layer)
        if not 1 <= counts[name] <= layer.in_channels:
            raise ValueError(f"{name}: inputs must be in 1...{layer.in_channels}, not {counts[name]}")
        if name not in dict(teacher.named_modules()):
            raise ValueError(f"the teacher has no layer {name}")
    if isinstance(images, torch.Tensor):
        images = images.split(max(1, BATCH_PIXELS // max(1, images.shape[-2:].numel())))
    batches = list(images) if isinstance(images, Iterator) else images

    rows = {}
    flags = {module: module.training for network in (model, teacher) for module in network.modules()}
    try:
        with torch.random.fork_rng(devices=[]):  # a DataLoader draws a seed whenever it is iterated
            model.eval()
            teacher.eval()
            weight = next(iter(layers.values())).weight
            total = weight.new_tensor(sum(map(len, _load(batches, weight))), dtype=torch.float64)
            if not total:
                raise ValueError("there are no images to calibrate with")
            _sum_over_processes(total)
            for name, use in _survey(model, layers, next(_load(batches, weight)), int(total)).items():
                layer = layers[name]
                enough = int(total) * sum(use.positions) // (ENOUGH * layer.in_channels)
                chosen = islice(batches, 0, None, max(1, enough))
                second, cross, power = _moments(name, model, teacher, len(use.positions), chosen)
                by_magnitude = _weight(copy.deepcopy(layer).prune_(counts[name]))
                weight = _choose_and_refit(layer, counts[name], second, cross, bool(use.norms))
                errors = [_relative_error(w, second, cross, power) for w in (weight, by_magnitude)]
                rows[name] = LayerPruning(tuple(layer.mask.sum(1).tolist()), *errors)
                layer.weight.copy_(weight[:, :-1, None, None])
                if layer.bias is not None:
                    layer.bias.copy_(weight[:, -1])
                for norm in use.norms:
                    norm.running_mean -= weight[:, -1]
    finally:
        for module, flag in flags.items():
            module.training = flag
    return PruningReport(rows)


def _load(batches: Iterable[Any], weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yields the images of each batch, with the device and dtype of a weight."""
    for batch in batches:
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        if not isinstance(images, torch.Tensor) or images.ndim != 4 or not images.is_floating_point():
            raise ValueError("images must be floating-point (N, C, H, W), normalised as in training")
        yield images.to(weight)


def _survey(
    model: nn.Module, layers: dict[str, LearnedGroupConv2d], images: torch.Tensor, total: int
) -> dict[str, _Use]:
    """Returns how a forward pass uses each layer, in the order of the first calls.

    Raises:
        ValueError: a layer isn't used, or `total` images have fewer positions than it has inputs.
    """
    uses: dict[str, _Use] = {}
    names = {layer: name for name, layer in layers.items()}
    normalised = []
    last: list[Any] = [None, None]  # the layer that ran last, and its output

    def after_layer(layer: LearnedGroupConv2d, args: Any, output: torch.Tensor) -> None:
        uses.setdefault(names[layer], _Use()).positions.append(len(_positions(output[:1])))
        last[:] = layer, output

    def before_norm(norm: nn.Module, args: Any) -> None:
        normalised.append(norm)
        if args[0] is last[1]:
            uses[names[last[0]]].norms.append(norm)

    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    handles = [layer.register_forward_hook(after_layer) for layer in layers.values()]
    handles += [norm.register_forward_pre_hook(before_norm) for norm in norms]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    for name, layer in layers.items():
        if name not in uses:
            raise ValueError(f"{name} doesn't run in eval mode, so images can't tell which inputs it needs")
        use, positions = uses[name], sum(uses[name].positions)
        if total * positions < layer.in_channels:
            raise ValueError(
                f"{total} images are too few for {name}, which has {layer.in_channels} inputs and {positions} "
                f"positions in an image: give at least {-(-layer.in_channels // positions)}, better ten times as many"
            )
        alone = all(normalised.count(norm) == 1 for norm in use.norms) and len(use.norms) == len(use.positions)
        use.norms = use.norms if alone and layer.bias is None else []
    return uses


def _moments(
    name: str, model: nn.Module, teacher: nn.Module, calls: int, batches: Iterable[Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the means of x x^T, (I + 1, I + 1), of y x^T, (O, I + 1), and of y^T y, in float64.

    Raises:
        ValueError: activations that are not finite, or a teacher's layer that has other outputs.
    """
    layer = model.get_submodule(name)
    size, outputs, stride = layer.in_channels + 1, layer.out_channels, layer.stride
    moments = layer.weight.new_zeros(size * (size + outputs) + 1, dtype=torch.float64)
    second, cross, power = moments.split([size * size, outputs * size, 1])
    for images in _load(batches, layer.weight):
        x = _record(model, name, images, calls, lambda x, y: x[:, :, ::stride, ::stride])
        y = _record(teacher, name, images, calls, lambda x, y: y)
        if y.shape != (len(x), outputs):
            raise ValueError(f"{name}: the teacher's layer has outputs of another shape")
        x = F.pad(x, (0, 1), value=1.0)
        second += (x.T @ x).flatten()
        cross += (y.T @ x).flatten()
        power += y.square().sum()
    _sum_over_processes(moments)
    if not moments.isfinite().all():
        raise ValueError(f"{name}: its activations on the calibration images are not finite")
    moments /= second[-1].clone()  # the number of positions
    return second.reshape(size, size), cross.reshape(outputs, size), power


class _LastCall(Exception):
    """Ends a forward pass behind the layer that is looked at."""


def _record(network: nn.Module, name: str, images: torch.Tensor, calls: int, take: Callable) -> torch.Tensor:
    """Runs a network up to a layer's last call; returns what `take` gets from its inputs and outputs, by position."""
    taken = []

    def hook(layer: nn.Module, args: Any, output: torch.Tensor) -> None:
        taken.append(_positions(take(args[0], output)))
        if len(taken) == calls:
            raise _LastCall

    handle = network.get_submodule(name).register_forward_hook(hook)
    try:
        network(images)
    except _LastCall:
        pass
    finally:
        handle.remove()
    return torch.cat(taken)


def _positions(maps: torch.Tensor) -> torch.Tensor:
    """Maps (N, C, H, W) to float32 or float64 values at an even grid of positions, (N * positions, C)."""
    rows, columns = (-(-size // GRID) for size in maps.shape[2:])
    maps = maps[:, :, rows // 2 :: rows, columns // 2 :: columns].movedim(1, 3).flatten(0, 2)
    return maps if maps.dtype == torch.float64 else maps.float()


def _sum_over_processes(values: torch.Tensor) -> None:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)


def _weight(layer: LearnedGroupConv2d) -> torch.Tensor:
    """Returns a layer's weight with the bias behind it, (O, I + 1)."""
    weight = layer.masked_weight().flatten(1).double()
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.double()
    return torch.cat([weight, bias.unsqueeze(1)], 1)


def _relative_error(weight: torch.Tensor, second: torch.Tensor, cross: torch.Tensor, power: torch.Tensor) -> float:
    """Returns the mean squared error of the outputs that a weight gives, divided by the variance of y."""
    error = ((weight @ second - 2 * cross) * weight).sum() + power
    return (error / (power - cross[:, -1].square().sum())).item()


def _choose_and_refit(
    layer: LearnedGroupConv2d, count: int, second: torch.Tensor, cross: torch.Tensor, shift: bool
) -> torch.Tensor:
    """Drops inputs until each group keeps `count`; returns the refitted weight with the bias behind it, (O, I + 1).

    The weight stays as it is. Without a bias, or `shift`, a bias that something else adds, the last column is zero.
    """
    cross = cross.unflatten(0, (layer.groups, -1))
    keep = F.pad(layer.mask, (0, 1), value=shift or layer.bias is not None)
    weight, inverse = _least_squares(second, cross, keep)
    # The inverse loses a rank with each input dropped. Only its diagonal is kept up to date; a row is computed when it
    # is needed: the inverse is by then what it was at first less factors^T factors.
    diagonal = inverse.diagonal(dim1=1, dim2=2).clone()
    factors = inverse.new_zeros(layer.groups, layer.in_channels - count, layer.in_channels + 1)
    each = torch.arange(layer.groups, device=keep.device)
    for step in range(int(layer.mask.sum(1).max()) - count):
        # By how much the group's squared error grows when its other weights may follow.
        growth = (weight.square().sum(1) / diagonal)[:, :-1]
        least = growth.masked_fill(~layer.mask, torch.inf).argmin(1)
        due = layer.mask.sum(1) > count  # a group may have begun with fewer inputs than others
        past = factors[:, :step]
        row = inverse[each, least] - torch.einsum("gs,gsi->gi", past[each, :, least], past)
        pivot = row[each, least].sqrt().unsqueeze(1)
        factors[:, step] = factor = row / pivot * due.unsqueeze(1)
        weight -= (weight[each, :, least] / pivot).unsqueeze(2) * factor.unsqueeze(1)
        diagonal -= factor.square()
        layer.mask[each, least] &= ~due
    return _least_squares(second, cross, F.pad(layer.mask, (0, 1), value=bool(keep[0, -1])))[0].flatten(0, 1)


def _least_squares(second: torch.Tensor, cross: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns each group's best weight on what it keeps, (G, O / G, I + 1), and the inverse of its second moments.

    Args:
        second: mean of x x^T, (I + 1, I + 1).
        cross: mean of y x^T by group, (G, O / G, I + 1).
        keep: (G, I + 1), bool.
    """
    diagonal = second.diagonal()
    ridge = RIDGE[0] * diagonal + RIDGE[1] * diagonal.mean()
    # What is dropped becomes a row and a column of the identity matrix.
    kept = keep.unsqueeze(1) & keep.unsqueeze(2)
    inverse = torch.linalg.inv(second * kept + torch.diag_embed(torch.where(keep, ridge, 1.0)))
    return (cross * keep.unsqueeze(1)) @ inverse, inverse
