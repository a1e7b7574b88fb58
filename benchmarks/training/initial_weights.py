"""The weights that a training starts from: another network's, in the form that the new one needs.

A recipe's `init_from` is one of
- "MODEL.TAG", a weight of the package or, where another has taken its place there, of benchmarks/runs/MODEL.TAG/;
- "package:MODULE/FILE", a PyTorch file inside an installed package, checked by its sha256, whose tensors have the order
  and the shapes of the network's own.

A zoo model may start from one of the same architecture, a MobileNetV2 also from a dense one that is as wide or wider:
the channels that matter most are kept, hidden ones and those between bottlenecks; a learned group convolution takes the
dense weight with a mask of ones, a group convolution its groups' own blocks, after the hidden channels are ordered so
that as much weight as possible lies in the blocks.
"""

import hashlib
import importlib.util
import io
from pathlib import Path

import numpy as np
import timm
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

import mobilenets_zoo as mz
from mobilenets_zoo.models.mobilenetv2 import Bottleneck
from mobilenets_zoo.normalisation import normalise_
from training.recipe import RUNS

__all__ = ["start_from", "transfer"]


def start_from(model: nn.Module, source: str, sha256: str = "") -> None:
    """Loads a recipe's `init_from` into a new network, in place; a classifier of another size stays as it is.

    Raises:
        ValueError: the source doesn't exist, is altered, or fits the network in no way.
    """
    if source.startswith("package:"):
        _load_package_file(model, source, sha256)
        return
    try:
        if source in mz.manifest():
            origin = timm.create_model(source, pretrained=True)
        else:
            overlay = {"file": str(RUNS / source / "model.safetensors")}
            origin = timm.create_model(source.partition(".")[0], pretrained=True, pretrained_cfg_overlay=overlay)
        transfer(origin, model)
        normalise_(model)  # a group's rows are a part of the dense network's
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"init_from {source!r} can't be loaded: {error}") from error


def _load_package_file(model: nn.Module, source: str, sha256: str) -> None:
    module, _, name = source.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(f"init_from {source!r}: pip install {module.replace('_', '-')}")
    try:
        content = (Path(spec.origin).parent / name).read_bytes()
    except OSError as error:
        raise ValueError(f"init_from {source!r} can't be read: {error}") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != sha256:
        raise ValueError(f"init_from {source!r} is altered: its sha256 is {digest}, expected {sha256}")
    theirs = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    ours, classifier = model.state_dict(), str(model.pretrained_cfg["classifier"])  # type: ignore[index]
    if len(theirs) != len(ours):
        raise ValueError(f"init_from {source!r} holds {len(theirs)} tensors, the network {len(ours)}")
    for (name, tensor), value in zip(ours.items(), theirs.values(), strict=True):
        if tensor.shape == value.shape:
            tensor.copy_(value)
        elif not name.startswith(classifier):
            raise ValueError(f"init_from {source!r}: {name} has shape {tuple(tensor.shape)}, not {tuple(value.shape)}")


@torch.no_grad()
def transfer(source: nn.Module, target: nn.Module) -> None:
    """Loads one zoo network's weights into another, in place.

    Raises:
        ValueError: there is no rule for this pair.
        RuntimeError: head or classifier have another size.
    """
    refusal = f"no rule starts {type(target).__name__} from this {type(source).__name__}"
    if _shapes(source) == _shapes(target):
        target.load_state_dict(source.state_dict())
    elif not isinstance(source, mz.MobileNetV2) or not isinstance(target, mz.MobileNetV2):
        raise ValueError(refusal)
    elif not all(_is_dense(block.expansion.conv) and _is_dense(block.projection.conv) for block in _blocks(source)):
        raise ValueError(f"{refusal}: its 1x1 convolutions must be dense")
    else:
        _narrow(source, target, refusal)


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _blocks(model: nn.Module) -> list[Bottleneck]:
    return [module for module in model.modules() if isinstance(module, Bottleneck)]


def _hidden(block: Bottleneck) -> int:
    return block.depthwise.conv.in_channels  # type: ignore[return-value]


def _is_dense(conv: nn.Module) -> bool:
    return isinstance(conv, nn.Conv2d) and conv.groups == 1


def _groups(conv: nn.Module) -> int:
    """Groups of a plain group convolution; 1 for a dense or a learned one, which read all inputs."""
    return conv.groups if isinstance(conv, nn.Conv2d) else 1


def _narrow(source: nn.Module, target: nn.Module, refusal: str) -> None:
    pairs = list(zip(_blocks(source), _blocks(target), strict=True))
    widths = [(_hidden(old), _hidden(new)) for old, new in pairs]
    widths += [(len(old), len(new)) for old, new in zip(_written(source), _written(target), strict=True)]
    if any(old < new for old, new in widths):
        raise ValueError(f"{refusal}: it has fewer channels")
    kept = iter(_kept_between(source, target))
    inputs = next(kept)
    _load_rows(source.get_submodule("stem"), target.get_submodule("stem"), inputs)
    for old, new in pairs:
        outputs = next(kept)
        _transfer_bottleneck(old, new, inputs, outputs)
        inputs = outputs
    target.get_parameter("head_conv.conv.weight").copy_(source.get_parameter("head_conv.conv.weight")[:, inputs])
    for name in ("head_conv.bn", "classifier"):
        target.get_submodule(name).load_state_dict(source.get_submodule(name).state_dict())


def _written(model: nn.Module) -> list[torch.Tensor]:
    """Returns BatchNorm's weights of all that writes channels between bottlenecks: the stem and the projections."""
    layers = [model.get_submodule("stem"), *(block.projection for block in _blocks(model))]
    return [layer.get_parameter("bn.weight") for layer in layers]


def _kept_between(source: nn.Module, target: nn.Module) -> list[torch.Tensor]:
    """Returns, for the stem and each bottleneck, which of the source's output channels the target has.

    Kept are those of the largest variance, BatchNorm's squared weights; what identity shortcuts add up is one choice.
    """
    stem, *written = _written(source)
    energies, run_of = [stem.square()], [0]  # run_of: by layer, its run of bottlenecks with identity shortcuts
    for block, weight in zip(_blocks(source), written, strict=True):
        if block.has_shortcut and isinstance(block.shortcut, nn.Identity):
            energies[-1] = energies[-1] + weight.square()
        else:
            energies.append(weight.square())
        run_of.append(len(energies) - 1)
    counts = [len(weight) for weight in _written(target)]
    return [energies[run].topk(count).indices.sort().values for run, count in zip(run_of, counts, strict=True)]


def _transfer_bottleneck(source: Bottleneck, target: Bottleneck, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
    expand = source.expansion.conv.get_parameter("weight").flatten(1)[:, inputs]  # (hidden, in)
    project = source.projection.conv.get_parameter("weight").flatten(1)  # (out, hidden)
    # What leaves a layer in place p was made in place before[p], where a shuffle lies between.
    hidden_before = _before(target.shuffle_hidden, _hidden(target))
    out_before = _before(target.shuffle_out, len(outputs))
    out_made = outputs[torch.empty_like(out_before).scatter_(0, out_before, torch.arange(len(outputs)))]
    hidden = _order_hidden(source, target, expand, project[out_made], hidden_before)
    hidden_made = hidden.new_empty(len(hidden)).scatter_(0, hidden_before, hidden)

    _load_pointwise(target.expansion.conv, expand[hidden_made])
    _load_rows(source.expansion.bn, target.expansion.bn, hidden_made)
    _load_rows(source.depthwise, target.depthwise, hidden)
    _load_pointwise(target.projection.conv, project[out_made][:, hidden])
    _load_rows(source.projection.bn, target.projection.bn, out_made)
    # Where rounding made a narrower network's widths equal, its shortcut is the identity.
    if isinstance(source.shortcut, nn.Conv2d) and isinstance(target.shortcut, nn.Conv2d):
        target.shortcut.get_parameter("weight").copy_(source.shortcut.weight[outputs][:, inputs])


def _before(shuffle: nn.Module, channels: int) -> torch.Tensor:
    """Returns, for each channel behind a shuffle, its place in front of it."""
    places = torch.arange(channels, dtype=torch.float32).reshape(1, channels, 1, 1)
    return shuffle(places).flatten().long()


def _order_hidden(
    source: Bottleneck, target: Bottleneck, expand: torch.Tensor, project: torch.Tensor, before: torch.Tensor
) -> torch.Tensor:
    """Returns the source's hidden channel that each of the target's takes, in front of the projection.

    Channels are chosen by the energy that they send on, and placed so that the sum of the energy inside the blocks
    of the target's group convolutions is largest.
    """
    count = _hidden(target)
    importance = project.square().sum(0).sqrt() * source.depthwise.bn.weight.abs()
    chosen = importance.topk(count).indices.sort().values
    places = torch.arange(count)
    value = torch.zeros(count, count)  # (chosen channel, place)
    for conv, energy, block in (
        (target.expansion.conv, expand[chosen].square(), before),
        (target.projection.conv, project[:, chosen].t().square(), places),
    ):
        groups = _groups(conv)
        if groups > 1:
            shares = energy.unflatten(1, (groups, -1)).sum(2) / energy.sum(1, keepdim=True).clamp_min(1e-12)
            value += importance[chosen, None] * shares[:, block * groups // count]
    if not value.any():
        return chosen
    rows, columns = linear_sum_assignment(value.numpy(), maximize=True)
    order = np.empty(count, dtype=np.int64)
    order[columns] = rows
    return chosen[torch.from_numpy(order)]


def _load_pointwise(conv: nn.Module, weight: torch.Tensor) -> None:
    """Loads a dense weight (out, in) into a dense, learned or plain group convolution, which keeps its blocks."""
    groups = _groups(conv)
    rows = [
        part.chunk(groups, 1)[group]  # each group's rows and its own inputs
        for group, part in enumerate(weight.chunk(groups, 0))
    ]
    conv.get_parameter("weight").copy_(torch.cat(rows)[:, :, None, None])
    if isinstance(conv, mz.LearnedGroupConv2d):
        conv.mask.fill_(True)


def _load_rows(source: nn.Module, target: nn.Module, rows: torch.Tensor) -> None:
    """Loads a per-channel layer's tensors, each taking the given channels."""
    for name, value in source.state_dict().items():
        target.state_dict()[name].copy_(value[rows] if value.ndim else value)
