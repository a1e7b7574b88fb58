"""The weights that a training starts from: another network's, in the form that the new one needs.

A recipe's `init_from` is one of
- "MODEL.TAG", a weight of the package or, where another has taken its place there, of benchmarks/runs/MODEL.TAG/;
- "package:MODULE/FILE", a PyTorch file inside an installed package, checked by its sha256, whose tensors have the order
  and the shapes of the network's own.

A zoo model may start from one of the same architecture, a MobileNetV2 also from a dense one. With calibration images,
`mz.prune_groups` chooses what learned groups and a narrower network's projections read and refits what is kept, fixed
groups too, to the dense network's outputs. Without, a learned group convolution takes the dense weight with a mask of
ones and a group convolution its groups' own blocks.
"""

import copy
import hashlib
import importlib.util
import io
from pathlib import Path
from typing import Any, Optional

import timm
import torch
from torch import nn

import mobilenets_zoo as mz
from mobilenets_zoo.models.mobilenetv2 import Bottleneck
from mobilenets_zoo.normalisation import normalise_
from training.recipe import RUNS

__all__ = ["start_from", "transfer"]


def start_from(
    model: nn.Module, source: str, sha256: str = "", images: Optional[torch.Tensor] = None, sharing: float = 0.0
) -> None:
    """Loads a recipe's `init_from` into a new network, in place; a classifier of another size stays as it is.

    Args:
        model: the new network.
        source: where the weights come from.
        sha256: digest that a package's file must have.
        images: calibration images (N, 3, H, W), normalised.
        sharing: how much `mz.prune_groups` prefers inputs that other groups read.

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
        transfer(origin, model, images, sharing)
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
def transfer(source: nn.Module, target: nn.Module, images: Optional[torch.Tensor] = None, sharing: float = 0.0) -> None:
    """Loads one zoo network's weights into another, in place.

    Raises:
        ValueError: there is no rule for this pair, or what `mz.prune_groups` raises.
        RuntimeError: head or classifier have another size.
    """
    refusal = f"no rule starts {type(target).__name__} from this {type(source).__name__}"
    if _shapes(source) == _shapes(target):
        target.load_state_dict(source.state_dict())
        if images is not None:
            mz.prune_groups(target, images, sharing=sharing)
    elif not isinstance(source, mz.MobileNetV2) or not isinstance(target, mz.MobileNetV2):
        raise ValueError(refusal)
    elif not _is_dense(source):
        raise ValueError(f"{refusal}: its 1x1 convolutions must be dense")
    elif _widths(source) == _widths(target):
        _group(source, target, images, sharing)
    elif not _is_dense(target) or any(old < new for old, new in zip(_widths(source), _widths(target), strict=True)):
        raise ValueError(f"{refusal}: a dense one can be narrowed, nothing else")
    else:
        _narrow(source, target, images)


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _blocks(model: nn.Module) -> list[Bottleneck]:
    return [module for module in model.modules() if isinstance(module, Bottleneck)]


def _layers(model: nn.Module) -> list[nn.Module]:
    """Returns the expansion and the projection of each bottleneck, each a convolution `conv` and a BatchNorm `bn`."""
    return [layer for block in _blocks(model) for layer in (block.expansion, block.projection)]


def _is_dense(model: nn.Module) -> bool:
    return all(isinstance(layer.conv, nn.Conv2d) and layer.conv.groups == 1 for layer in _layers(model))


def _channels(layer: nn.Module) -> int:
    return len(layer.get_parameter("bn.weight"))


def _widths(model: nn.Module) -> list[int]:
    return [_channels(layer) for layer in (model.get_submodule("stem"), *_layers(model))]


def _group(source: nn.Module, target: nn.Module, images: Optional[torch.Tensor], sharing: float) -> None:
    """Starts a network with groups from a dense one of its width."""
    # The dense network with the target's shuffles: its fixed groups are learned layers for now.
    dense = copy.deepcopy(target).eval()
    for layer in _layers(dense):
        conv = layer.conv
        if isinstance(conv, nn.Conv2d) and conv.groups > 1:
            layer.conv = mz.LearnedGroupConv2d(conv.in_channels, conv.out_channels, conv.groups, conv.groups)
    for name in ("stem", "head_conv", "classifier"):
        dense.get_submodule(name).load_state_dict(source.get_submodule(name).state_dict())
    for old, new in zip(_blocks(source), _blocks(dense), strict=True):
        _load(old.expansion, new.expansion, _before(new.shuffle_hidden, new.expansion))
        _load(old.depthwise, new.depthwise)
        _load(old.projection, new.projection, _before(new.shuffle_out, new.projection))
        _load(old.shortcut, new.shortcut)
    learned = mz.learned_layers(dense)
    for layer in learned.values():
        layer.mask.fill_(True)

    teacher = copy.deepcopy(dense)
    fixed = {name: layer for name, layer in learned.items() if isinstance(target.get_submodule(name), nn.Conv2d)}
    for layer in fixed.values():  # each group reads its own block of the inputs
        layer.mask.copy_(torch.eye(layer.groups).repeat_interleave(layer.in_channels // layer.groups, 1))
    if images is not None:
        mz.prune_groups(dense.to(images.device), images, teacher=teacher.to(images.device), sharing=sharing)
    state = dense.state_dict()
    for name, layer in fixed.items():
        state[f"{name}.weight"] = layer.condense().weight
        del state[f"{name}.mask"]
    target.load_state_dict(state)


def _before(shuffle: nn.Module, layer: nn.Module) -> torch.Tensor:
    """Returns, for each channel in front of a shuffle, its place behind it."""
    places = torch.arange(_channels(layer), dtype=torch.float32).reshape(1, -1, 1, 1)
    return shuffle(places).flatten().argsort()


def _narrow(source: nn.Module, target: nn.Module, images: Optional[torch.Tensor]) -> None:
    """Starts a dense network from a wider one.

    A projection's hidden channels are its inputs, chosen as one learned group; those between bottlenecks are the ones
    of the largest variance, BatchNorm's squared weights. What identity shortcuts add up is one choice.
    """
    kept = _kept_between(source, target)
    # Where rounding made a narrower network's widths equal, its shortcut is the identity.
    lost = [n for n, conv in source.named_modules() if n.endswith("shortcut") and _is_identity(conv, target, n)]
    wide, _ = mz.to_learned_group_conv(source, 1, 1, lambda name, _: name not in lost)
    narrow = copy.deepcopy(wide)
    counts: dict[Any, int] = {}
    for block, small, inputs, outputs in zip(_blocks(narrow), _blocks(target), kept, kept[1:], strict=False):
        _read(block.expansion.conv, inputs)
        counts[block.projection.conv] = _channels(small.expansion)
        if isinstance(block.shortcut, mz.LearnedGroupConv2d):
            _read(block.shortcut, inputs)
        elif isinstance(block.shortcut, nn.Conv2d):
            identity = torch.zeros(block.shortcut.out_channels, block.shortcut.in_channels, 1, 1)
            identity[outputs, inputs] = 1.0
            block.shortcut.weight.copy_(identity)
    _read(narrow.get_submodule("head_conv.conv"), kept[-1])
    if images is not None:
        narrow, wide = narrow.to(images.device), wide.to(images.device)
        mz.prune_groups(narrow, images, lambda layer: counts.get(layer, int(layer.mask.sum())), teacher=wide)
    for layer, count in counts.items():
        layer.prune_(count)  # by magnitude, where no images have done it

    _load(narrow.get_submodule("stem"), target.get_submodule("stem"), kept[0])
    for block, small, inputs, outputs in zip(_blocks(narrow), _blocks(target), kept, kept[1:], strict=False):
        hidden = block.projection.conv.get_buffer("mask")[0].nonzero().flatten()
        _load(block.expansion, small.expansion, hidden, inputs)
        _load(block.depthwise, small.depthwise, hidden)
        _load(block.projection, small.projection, outputs, hidden)
        _load(block.shortcut, small.shortcut, outputs, inputs)
    _load(narrow.get_submodule("head_conv"), target.get_submodule("head_conv"), inputs=kept[-1])
    target.get_submodule("classifier").load_state_dict(narrow.get_submodule("classifier").state_dict())


def _is_identity(conv: nn.Module, target: nn.Module, name: str) -> bool:
    return isinstance(conv, nn.Conv2d) and not isinstance(target.get_submodule(name), nn.Conv2d)


def _read(layer: nn.Module, inputs: torch.Tensor) -> None:
    layer.get_buffer("mask").zero_()[:, inputs] = True


def _kept_between(source: nn.Module, target: nn.Module) -> list[torch.Tensor]:
    """Returns, for the stem and each bottleneck, which of the source's output channels the target has."""
    energies = [source.get_parameter("stem.bn.weight").square()]
    run_of = [0]  # by layer, its run of bottlenecks with identity shortcuts
    for block in _blocks(source):
        energy = block.projection.get_parameter("bn.weight").square()
        if block.has_shortcut and isinstance(block.shortcut, nn.Identity):
            energies[-1] = energies[-1] + energy
        else:
            energies.append(energy)
        run_of.append(len(energies) - 1)
    counts = [_channels(layer) for layer in (target.get_submodule("stem"), *_layers(target)[1::2])]
    return [energies[run].topk(count).indices.sort().values for run, count in zip(run_of, counts, strict=True)]


def _load(source: nn.Module, target: nn.Module, rows: Any = slice(None), inputs: Any = slice(None)) -> None:
    """Loads a layer's tensors: the given rows of each, and of a convolution's weight the given inputs."""
    theirs = source.state_dict()
    for name, value in target.state_dict().items():
        if name in theirs:
            value.copy_(
                theirs[name][rows][:, inputs] if value.ndim > 1 else theirs[name][rows] if value.ndim else theirs[name]
            )
