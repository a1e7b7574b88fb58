"""Starting from another network's weights: what is equal must be equal, and what fits nowhere is refused."""

import hashlib

import pytest
import timm
import torch
from conftest import with_lively_statistics
from safetensors.torch import save_file
from torch import nn
from training import initial_weights
from training.initial_weights import start_from, transfer

import mobilenets_zoo as mz
from mobilenets_zoo.models._base import ConvBn
from mobilenets_zoo.models.mobilenetv2 import Bottleneck

SMALL = dict(width_mult=0.25, expand_ratio=4, num_classes=10)
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
CALIBRATION = torch.randn(48, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def lively(name: str, **kwargs) -> nn.Module:
    return with_lively_statistics(timm.create_model(name, **kwargs))


def test_an_equal_network_starts_equal():
    source, target = lively("mobilenetv1_w025_cifar100"), timm.create_model("mobilenetv1_w025_cifar100").eval()
    transfer(source, target)
    mz.check_equivalent(source, target, IMAGES)


@pytest.mark.parametrize("name", ["mobilenetv2_lgc_cifar100", "mobilenetv2_lgc_exp_cifar100"])
def test_learned_groups_start_dense(name):
    dense, learned = lively("mobilenetv2_cifar100", **SMALL), timm.create_model(name, **SMALL).eval()
    for module in learned.modules():
        if isinstance(module, mz.LearnedGroupConv2d):
            module.prune_(1)
    transfer(dense, learned)
    mz.check_equivalent(dense, learned, IMAGES)


def block_diagonal(conv: nn.Module) -> torch.Tensor:
    if isinstance(conv, mz.LearnedGroupConv2d):
        return conv.masked_weight()
    return torch.block_diag(*conv.weight.flatten(1).chunk(conv.groups))[:, :, None, None]


def as_dense(grouped: mz.MobileNetV2) -> mz.MobileNetV2:
    """Returns a dense network with the outputs of a grouped one, its shuffles undone."""
    dense = timm.create_model("mobilenetv2_cifar100", **SMALL).eval()
    blocks = [[m for m in net.modules() if isinstance(m, Bottleneck)] for net in (grouped, dense)]
    for name in ("stem", "head_conv", "classifier"):
        dense.get_submodule(name).load_state_dict(grouped.get_submodule(name).state_dict())
    with torch.no_grad():
        for old, new in zip(*blocks, strict=True):
            made = [
                shuffle(torch.arange(len(layer.bn.weight)).float().reshape(1, -1, 1, 1)).flatten().long()
                for shuffle, layer in ((old.shuffle_hidden, old.expansion), (old.shuffle_out, old.projection))
            ]
            new.depthwise.load_state_dict(old.depthwise.state_dict())
            new.shortcut.load_state_dict(old.shortcut.state_dict())
            for part, rows in zip(("expansion", "projection"), made, strict=True):
                theirs, ours = old.get_submodule(part), new.get_submodule(part)
                ours.conv.weight.copy_(block_diagonal(theirs.conv)[rows])
                for key, value in theirs.bn.state_dict().items():
                    ours.bn.state_dict()[key].copy_(value[rows] if value.ndim else value)
    return dense


@torch.no_grad()
def distance(model: nn.Module, reference: nn.Module) -> float:
    expected = reference(CALIBRATION)
    return ((model(CALIBRATION) - expected).square().mean() / expected.var(0).mean()).item()


@pytest.mark.parametrize("calibration", [None, CALIBRATION])
@pytest.mark.parametrize("kind", ["gc_exp", "gc_proj", "gc", "gc_lgc", "lgc_gc", "lgc"])
def test_a_grouped_network_in_disguise_is_found(kind, calibration):
    """A dense network that is a grouped one: a group's own inputs are enough, and learned groups find theirs."""
    name = f"mobilenetv2_{kind}_cifar100"
    grouped = lively(name, **SMALL)
    if calibration is not None:
        for layer in mz.learned_layers(grouped).values():
            layer.prune_(layer.in_channels // layer.condense_factor)
    dense = as_dense(grouped)
    mz.check_equivalent(grouped, dense, IMAGES)
    again = timm.create_model(name, **SMALL).eval()
    transfer(dense, again, calibration)
    if calibration is None:
        mz.check_equivalent(dense, again, IMAGES)
        return
    assert all((layer.mask.sum(1) == layer.in_channels // 4).all() for layer in mz.learned_layers(again).values())
    assert distance(again, dense) < 0.05


@pytest.mark.parametrize(
    ("name", "arguments"), [("mobilenetv2_gc_cifar100", {}), ("mobilenetv2_cifar100", {"width_mult": 0.25})]
)
def test_refitting_brings_a_start_closer(name, arguments):
    torch.manual_seed(0)
    dense = lively("mobilenetv2_cifar100", **{**SMALL, "width_mult": 0.5})
    errors = []
    for calibration in (None, CALIBRATION):
        start = timm.create_model(name, **{**SMALL, "width_mult": 0.5, **arguments}).eval()
        transfer(dense, start, calibration)
        errors.append(distance(start, dense))
    assert errors[1] < 0.5 * errors[0]


def test_with_sharing_fewer_channels_are_read():
    torch.manual_seed(0)
    dense = lively("mobilenetv2_cifar100", **SMALL)
    read = []
    for sharing in (0.0, 1.0):
        start = timm.create_model("mobilenetv2_lgc_proj_cifar100", **SMALL).eval()
        transfer(dense, start, CALIBRATION, sharing)
        read.append(sum(int(layer.mask.any(0).sum()) for layer in mz.learned_layers(start).values()))
    assert read[1] < 0.9 * read[0]


def test_a_narrower_network_has_the_channels_that_matter():
    """Channels between bottlenecks that are always zero, and hidden ones that nothing reads, go: nothing changes."""
    wide = lively("mobilenetv2_cifar100", **{**SMALL, "width_mult": 0.5})
    narrow = timm.create_model("mobilenetv2_cifar100", **{**SMALL, "expand_ratio": 2}).eval()
    generator = torch.Generator().manual_seed(5)

    def some(count: int, of: int) -> torch.Tensor:
        return torch.randperm(of, generator=generator)[:count].sort().values

    def silence(layer: nn.Module, kept: torch.Tensor) -> None:
        silent = torch.ones(len(layer.bn.weight), dtype=torch.bool)
        silent[kept] = False
        layer.bn.weight[silent] = layer.bn.bias[silent] = 0

    blocks = [[m for m in net.modules() if isinstance(m, Bottleneck)] for net in (wide, narrow)]
    became_identity = 0
    with torch.no_grad():
        outputs = some(len(narrow.stem.bn.weight), len(wide.stem.bn.weight))
        silence(wide.stem, outputs)
        for old, new in zip(*blocks, strict=True):
            inputs, convolves = outputs, isinstance(old.shortcut, nn.Conv2d)
            if convolves or not old.has_shortcut:
                outputs = some(new.projection.conv.out_channels, old.projection.conv.out_channels)
            silence(old.projection, outputs)
            hidden = some(new.depthwise.conv.in_channels, old.depthwise.conv.in_channels)
            weight = old.projection.conv.weight
            old.projection.conv.weight.copy_(torch.zeros_like(weight).index_copy(1, hidden, weight[:, hidden]))
            if convolves:
                weight = old.shortcut.weight.clone()
                old.shortcut.weight.zero_()
                if isinstance(new.shortcut, nn.Identity):
                    became_identity += 1
                    old.shortcut.weight[outputs, inputs] = 1
                else:
                    old.shortcut.weight[outputs] = weight[outputs]
    assert became_identity
    transfer(wide, narrow)
    mz.check_equivalent(wide, narrow, IMAGES)


@pytest.mark.parametrize(
    ("source", "target"),
    [("v1_w050", "v1_w025"), ("v2_t1", "v2"), ("v2_gc", "v2_lgc"), ("v1", "v2"), ("v2_t4", "v2_lgc")],
)
def test_pairs_without_a_rule_are_refused(source, target):
    with pytest.raises(ValueError, match="start"):
        transfer(*(timm.create_model(f"mobilenet{name}_cifar100") for name in (source, target)))


def test_a_package_file_is_checked_and_keeps_the_new_classifier(tmp_path, monkeypatch):
    model = timm.create_model("mobilenetv1_w025_cifar100", num_classes=7)
    other = lively("mobilenetv1_w025_cifar100", num_classes=5)
    package = tmp_path / "some_model_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    torch.save({f"x{i}": t for i, t in enumerate(other.state_dict().values())}, package / "w.pth")
    monkeypatch.syspath_prepend(tmp_path)
    digest = hashlib.sha256((package / "w.pth").read_bytes()).hexdigest()
    classifier = model.classifier.weight.clone()
    start_from(model, "package:some_model_package/w.pth", digest)
    assert torch.equal(model.stem.conv.weight, other.stem.conv.weight)
    assert torch.equal(model.classifier.weight, classifier)
    with pytest.raises(ValueError, match="altered"):
        start_from(model, "package:some_model_package/w.pth", "0" * 64)
    with pytest.raises(ValueError, match="pip install no-such-package"):
        start_from(model, "package:no_such_package/w.pth", digest)
    with pytest.raises(ValueError, match="tensors"):
        start_from(timm.create_model("mobilenetv2_t1_cifar100"), "package:some_model_package/w.pth", digest)


def test_a_weight_that_left_the_package_can_still_be_started_from(tmp_path, monkeypatch):
    source, model = lively("mobilenetv1_w025_cifar100"), timm.create_model("mobilenetv1_w025_cifar100").eval()
    (tmp_path / "mobilenetv1_w025_cifar100.old").mkdir()
    mz.save_weights(source, tmp_path / "mobilenetv1_w025_cifar100.old" / "model.safetensors")
    monkeypatch.setattr(initial_weights, "RUNS", tmp_path)
    start_from(model, "mobilenetv1_w025_cifar100.old")
    mz.check_equivalent(source, model, IMAGES, tolerance=5e-2)  # stored in half precision
    for layer in source.modules():
        if isinstance(layer, ConvBn):  # a hundred times as large, and the same outputs
            layer.conv.weight.data *= 100.0
            layer.bn.running_mean *= 100.0
            layer.bn.running_var.add_(layer.bn.eps).mul_(1e4).sub_(layer.bn.eps)
    save_file(source.state_dict(), tmp_path / "mobilenetv1_w025_cifar100.old" / "model.safetensors")
    start_from(model, "mobilenetv1_w025_cifar100.old")
    mz.check_equivalent(source, model, IMAGES, tolerance=1e-4)
    for layer in model.modules():
        if isinstance(layer, ConvBn):  # normalised
            norms = layer.conv.weight.flatten(1).norm(dim=1)
            assert ((norms > 0.7) & (norms < 1.42)).all()
    for missing in ("mobilenetv1_w025_cifar100.older", "nonsense"):
        with pytest.raises(ValueError, match=rf"init_from '{missing}' can't be loaded"):
            start_from(model, missing)
