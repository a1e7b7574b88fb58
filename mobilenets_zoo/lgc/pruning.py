"""Learned groups without training: inputs chosen by the error that dropping them makes, kept weights refitted.

A group drops inputs one by one as in Optimal Brain Surgeon (Hassibi and Stork, 1993), which Optimal Brain Compression
(https://arxiv.org/abs/2208.11580) applies layer by layer. The target is the output of the unpruned network, so that a
layer makes up for what the layers before it have lost, as in Channel Pruning (https://arxiv.org/abs/1707.06168).

Notation: x is a layer's input at one position of a feature map in the network pruned so far, with a 1 behind it for
the bias: (I + 1,). y is the layer's output there in the unpruned network: (O,). G groups.
"""

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Optional, Union

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mobilenets_zoo.lgc.condense import learned_layers
from mobilenets_zoo.lgc.layers import LearnedGroupConv2d
from mobilenets_zoo.profiling import eval_mode

__all__ = ["LayerPruning", "PruningReport", "prune_groups"]

# Positions of a feature map that are looked at: neighbours say nearly the same.
POSITIONS = 64
# Images and positions per input that are enough for a layer: one with few inputs looks at every nth batch only.
ENOUGH_IMAGES, ENOUGH_POSITIONS = 256, 64
# Pixels in a batch, where the images come as one tensor: on a CPU, maps that malloc takes from the heap are faster.
BATCH_PIXELS = {"cpu": 2**14, "cuda": 2**20}
ONCE = "the images can be iterated only once and are needed many times: make them a list"
# Added to an input's second moment, as a share of itself and of the layer's mean.
RIDGE = (1e-4, 1e-6)

Moments = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class LayerPruning:
    """What `prune_groups` did to a layer: the inputs that each group keeps, and the squared error of the outputs.

    Errors are of the calibration images, to which the weights were fitted, so that others have larger ones, and divided
    by the variance of the outputs. `magnitude_error` is what `LearnedGroupConv2d.prune_` would have had in this layer.
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


@torch.no_grad()
def prune_groups(
    model: nn.Module,
    images: Union[torch.Tensor, Iterable[Any]],
    inputs: Union[int, Callable[[LearnedGroupConv2d], int], None] = None,
    teacher: Optional[nn.Module] = None,
    sharing: float = 0.0,
) -> PruningReport:
    """Prunes all learned group convolutions of a model at once, in place, with calibration images and no labels.

    Layer by layer, each group keeps the inputs without which the squared error of its outputs would grow most, and
    its weights are refitted to the teacher's outputs of that layer; so is the bias, or the running mean of a BatchNorm
    that alone reads them. Dropped inputs never return, so start from a trained dense network's weights, not from a
    pruned one's. Training flags and torch's random state stay as they are. Memory holds a copy of the model and a few
    times G (I + 1)^2 double numbers, whatever the number of images. With torch.distributed initialised, all processes
    call this alike, each with images of its own, and get the same masks and weights; where one of them fails, the
    others wait for the process group's timeout. After an error the model is as it was.

    Args:
        model: any model with `LearnedGroupConv2d` layers that maps a batch of images.
        images: (N, C, H, W), normalised as in training, or a finite iterable of such batches, or of tuples that start
            with one, such as a DataLoader. It is iterated many times.
        inputs: how many inputs each group keeps, or a function of the layer that returns it; by default
            in_channels / condense_factor, which is what `condense` needs in the end.
        teacher: a network with layers of the same names whose outputs are the target, and with the model's BatchNorms
            behind them; by default the model as it is.
        sharing: above 0, inputs that other groups still read are dropped later than others, by how much the error grows
            times the number of groups to this power. More channels are read by nobody then, and go when the network is
            optimized: less time for more error.

    Raises:
        ValueError: no learned layer, nothing to drop and no teacher, a layer that doesn't run, that the teacher lacks
            or whose weight is parametrised, two that share a weight, `inputs` or `sharing` out of range, images of
            another form or fewer than a layer needs, activations that aren't finite, or a device without double
            precision (MPS).
    """
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    model = model.module if isinstance(model, wrappers) else model
    teacher = teacher.module if isinstance(teacher, wrappers) else teacher
    layers = learned_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no LearnedGroupConv2d layer: there is nothing to prune")
    for name, layer in layers.items():
        if is_parametrized(layer) or "weight" not in layer._parameters:
            raise ValueError(f"{name}: its weight is parametrised; remove that with torch.nn.utils first")
    before = copy.deepcopy(model)
    teacher = before if teacher is None or teacher is model else teacher
    if next(model.parameters()).device.type == "mps":
        raise ValueError("pruning needs double precision, which this device lacks: move the model to the CPU")
    images = batches_of(images, next(model.parameters()).is_cuda)
    if not 0.0 <= sharing < math.inf:
        raise ValueError(f"sharing must be 0 or larger, not {sharing}")
    if len({layer.weight for layer in layers.values()}) < len(layers):
        raise ValueError("two learned layers share a weight, which can't be fitted to both: give each its own")
    counts, known = {}, dict(teacher.named_modules())
    for name, layer in layers.items():
        count = layer.in_channels // layer.condense_factor if inputs is None else inputs
        count = count(layer) if callable(count) else count
        if not (1 <= count <= layer.in_channels and count == int(count)):
            raise ValueError(f"{name}: inputs must be in 1...{layer.in_channels}, not {count}")
        counts[name] = int(count)
        if name not in known:
            raise ValueError(f"the teacher has no layer {name}")
    if teacher is before and all(layer.mask.sum(1).max() <= counts[name] for name, layer in layers.items()):
        raise ValueError("no group reads more inputs than it is to keep: start from an unpruned network")

    rows = {}
    try:
        # A DataLoader draws a seed whenever it is iterated.
        with torch.random.fork_rng(devices=[]), eval_mode(model), eval_mode(teacher):
            for name, (calls, every, norms) in _survey(model, layers, images).items():
                moments = _moments(name, model, teacher, calls, _load(images, every))
                rows[name] = _prune(layers[name], counts[name], norms, sharing, moments)
                del moments  # two layers' would be the peak
    except BaseException:
        model.load_state_dict(before.state_dict())
        raise
    return PruningReport(rows)


def batches_of(images: Union[torch.Tensor, Iterable[Any]], is_cuda: bool = False) -> Iterable[Any]:
    """Returns what gives the calibration images in batches, again and again; refuses what can't."""
    if isinstance(images, torch.Tensor):
        pixels = BATCH_PIXELS["cuda" if is_cuda else "cpu"]
        return images.split(max(1, pixels // max(1, images.shape[-2:].numel()))) if images.ndim else [images]
    if isinstance(images, Iterator):
        raise ValueError(ONCE)
    if not isinstance(images, Iterable):
        raise ValueError(f"images must be a tensor, a list of batches or a DataLoader, not {type(images).__name__}")
    return images


def _load(batches: Iterable[Any], every: int = 1) -> Iterator[torch.Tensor]:
    """Yields the images of batches that hold one in `every` of all."""
    seen = used = 0
    for batch in batches:
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        if not isinstance(images, torch.Tensor) or images.ndim != 4 or not images.is_floating_point():
            raise ValueError(
                "images must be floating-point (N, C, H, W), normalised as in training, or tuples that start with them"
            )
        seen += len(images)
        if used * every < seen:
            used += len(images)
            yield images


class _Readers(TorchDispatchMode):
    """Counts the operations that have taken each tensor, by its id."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts.update({id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)})
        return func(*args, **(kwargs or {}))


class _LastCall(Exception):
    """Ends a forward pass behind the last call that is looked at."""


def _trace(network: nn.Module, modules: Iterable[Any], images: torch.Tensor, take: Callable, calls: int = 0) -> list:
    """Runs a network and returns what `take` makes of each call (module, input, output) of some modules.

    With `calls`, the network runs no further than that many calls.
    """
    trace: list[Any] = []

    def hook(module: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> None:
        trace.append(take(module, *args, *kwargs.values(), output))
        if len(trace) == calls:
            raise _LastCall

    # First: a hook of the user's may change what the module puts out.
    handles = [module.register_forward_hook(hook, with_kwargs=True, prepend=True) for module in modules]
    try:
        # A copy: the network may change its input in place.
        network(images.to(next(network.parameters(), images), copy=True))
    except _LastCall:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return trace


def _positions(maps: torch.Tensor) -> torch.Tensor:
    """Copies the values at always the same positions: (N, C, H, W) to (N * positions, C), in float64.

    They lie at random: a grid would see one phase of what a stride further up has enlarged, and little of the borders.
    """
    maps = maps.permute(0, 2, 3, 1).flatten(1, 2)
    chosen = torch.randperm(maps.shape[1], generator=torch.Generator().manual_seed(0), device="cpu")[:POSITIONS]
    # A copy, since an activation in place may follow; autocast leaves float64 alone.
    return maps[:, chosen.to(maps.device)].flatten(0, 1).double()


def _sum_over_processes(values: torch.Tensor) -> torch.Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
    return values


def _survey(model: nn.Module, layers: dict[str, Any], batches: Iterable[Any]) -> dict[str, tuple[int, int, list[Any]]]:
    """Counts the images and runs one; returns for each layer, in the order in which they run, how it is used.

    That is its calls, n where every nth batch is enough, and, where it has no bias, the BatchNorm behind each call.
    """
    count, first = sum(map(len, _load(batches))), next(_load(batches), None)
    counts = torch.tensor([count, count == 0, first is None], device=next(model.parameters()).device)
    images, without, once = _sum_over_processes(counts).tolist()
    if without or once or first is None:
        raise ValueError("there are no images to calibrate with" if without else ONCE)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    with _Readers() as readers:  # of maps; an id may have been another map's before, and is this one's to the end
        trace = _trace(
            model,
            [*layers.values(), *norms],
            first[:1],
            # A BatchNorm that takes more than its input computes something else.
            lambda module, x, *rest: (module, None if rest[1:] else x, rest[-1], readers.counts[id(rest[-1])]),
        )
    runs = [module for module, *_ in trace]
    if silent := [name for name, layer in layers.items() if layer not in runs]:
        raise ValueError(f"{silent[0]} doesn't run in eval mode: leave it out with to_learned_group_conv's `match`")

    uses, needed = {}, {}
    for name, layer in sorted(layers.items(), key=lambda item: runs.index(item[1])):
        calls = [(y, readers.counts[id(y)] - before) for module, _, y, before in trace if module is layer]
        behind = [[module for module, x, *_ in trace if x is y] for y, _ in calls]
        own = layer.bias is None and all(
            count == len(norm) == 1 and runs.count(norm[0]) == 1 and getattr(norm[0], "running_mean", None) is not None
            for (_, count), norm in zip(calls, behind, strict=True)
        )
        positions = sum(len(_positions(y)) for y, _ in calls)
        every = images // max(ENOUGH_IMAGES, ENOUGH_POSITIONS * layer.in_channels // positions)
        uses[name] = len(calls), max(1, every), [norm[0] for norm in behind] if own else []
        needed[name] = -(-(layer.in_channels + 1) // positions)  # one more for the bias
    if images < max(needed.values()):
        name = max(needed, key=needed.__getitem__)
        raise ValueError(
            f"{images} images are too few for the {layers[name].in_channels} inputs of {name}: give at least "
            f"{needed[name]}, better ten times as many"
        )
    return uses


def _moments(name: str, model: nn.Module, teacher: nn.Module, calls: int, batches: Iterable[Any]) -> Moments:
    """Returns the means of x x^T, (I + 1, I + 1), of y x^T, (O, I + 1), and of y^T y, (), in float64."""
    layer = model.get_submodule(name)
    assert isinstance(layer, LearnedGroupConv2d)
    target = teacher.get_submodule(name)
    size, outputs, (down, right) = layer.in_channels + 1, layer.out_channels, layer.stride
    moments = layer.weight.new_zeros((size + outputs) * size + 1, dtype=torch.float64)
    for images in batches:
        x = torch.cat(_trace(model, [layer], images, lambda _, x, y: _positions(x[:, :, ::down, ::right]), calls))
        y = torch.cat(_trace(teacher, [target], images, lambda _, x, y: _positions(y), calls) or [x[:0]])
        if y.shape != (len(x), outputs):
            raise ValueError(f"{name}: the teacher's layer doesn't run, or has outputs of another shape")
        x = F.pad(x, (0, 1), value=1.0)
        moments[:-1] += (torch.cat([x, y], 1).T @ x).flatten()
        moments[-1] += y.square().sum()
    if not _sum_over_processes(moments).isfinite().all():
        raise ValueError(f"{name}: its inputs or outputs are not finite on the calibration images")
    second, cross = moments[:-1].reshape(-1, size).split([size, outputs])
    positions = second[-1, -1]
    return second / positions, cross / positions, moments[-1] / positions


def _prune(layer: LearnedGroupConv2d, count: int, norms: list[Any], sharing: float, moments: Moments) -> LayerPruning:
    """Drops inputs until each group keeps `count`; refits the weight, and the bias or the running means of `norms`."""
    second, cross, power = moments

    def error(weight: torch.Tensor) -> float:
        squares = ((weight @ second - 2.0 * cross) * weight).sum() + power
        # What rounding leaves of outputs that are all alike isn't a variance.
        variance = (power - cross[:, -1].square().sum()).clamp_min(1e-12 * power + 1e-300)
        return (squares.clamp_min(0.0) / variance).item()

    magnitude = copy.deepcopy(layer).prune_(count).masked_weight().flatten(1).double()
    bias = magnitude.new_zeros(layer.out_channels) if layer.bias is None else layer.bias.double()
    magnitude_error = error(torch.cat([magnitude, bias[:, None]], 1))

    keep = F.pad(layer.mask, (0, 1), value=layer.bias is not None or bool(norms))
    weight = _choose_and_fit(keep, count, sharing, second, cross.unflatten(0, (layer.groups, -1))).flatten(0, 1)
    layer.mask.copy_(keep[:, :-1])
    layer.weight.copy_(weight[:, :-1, None, None])
    if layer.bias is not None:
        layer.bias.copy_(weight[:, -1])
    for norm in norms:
        norm.running_mean -= weight[:, -1]
    return LayerPruning(tuple(layer.mask.sum(1).tolist()), error(weight), magnitude_error)


def _choose_and_fit(
    keep: torch.Tensor, count: int, sharing: float, second: torch.Tensor, cross: torch.Tensor
) -> torch.Tensor:
    """Drops inputs in `keep`, (G, I + 1), until each group has `count`; returns the best weight, (G, O / G, I + 1).

    `second` and `cross` are the means of x x^T, (I + 1, I + 1), and of y x^T by group, (G, O / G, I + 1).
    """
    powers = second.diagonal()[:-1]
    ridge = F.pad(RIDGE[0] * powers + RIDGE[1] * powers.mean().clamp_min(1e-300), (0, 1))  # none on the bias
    # What is dropped already becomes a row and a column of the identity matrix.
    kept = keep.unsqueeze(1) & keep.unsqueeze(2)
    # Not by torch.linalg.inv: of batches it is wrong on a CPU once torch.set_num_threads was called (torch 2.14, MKL).
    definite = second * kept + torch.diag_embed(torch.where(keep, ridge, 1.0))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(definite))
    weight = (cross * keep.unsqueeze(1)) @ inverse
    # The inverse loses a rank with each input. Only its diagonal is kept up to date; a row is computed when it is
    # needed: the inverse is by then what it was at first less factors^T factors.
    diagonal = inverse.diagonal(dim1=1, dim2=2).clone()
    mask, each = keep[:, :-1], torch.arange(len(keep), device=keep.device)
    steps = max(0, int(mask.sum(1).max()) - count)
    factors = inverse.new_zeros(len(keep), steps, len(second))
    for step in range(steps):
        # By how much the group's squared error grows when its other weights may follow; the logarithm of it.
        growth = (weight.square().sum(1) / diagonal)[:, :-1].log()
        growth += sharing * mask.sum(0).double().log()
        least = growth.masked_fill(~mask, torch.inf).argmin(1)
        due = mask.sum(1) > count  # a group may have begun with fewer inputs than others
        past = factors[:, :step]
        row = inverse[each, least] - torch.einsum("gs,gsi->gi", past[each, :, least], past)
        pivot = row[each, least].sqrt().unsqueeze(1)
        factors[:, step] = factor = row / pivot * due.unsqueeze(1)
        weight -= (weight[each, :, least] / pivot).unsqueeze(2) * factor.unsqueeze(1)
        diagonal -= factor.square()
        mask[each, least] &= ~due
    return weight * keep.unsqueeze(1)
