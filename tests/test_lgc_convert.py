"""Learned group convolution for other people's networks."""

import copy

import pytest
import timm
import torch
import torchvision
from timm.layers import StdConv2d
from torch import nn
from torch.nn import functional as F

import mobilenets_zoo as mz

# Small members of each family.
NETWORKS = (
    "mobilenetv3_small_050",
    "efficientnet_b0",
    "mobilenetv4_conv_small_050",
    "convnext_atto",
    "ghostnet_050",
    "densenet121",
    "regnetx_002",
    "tf_efficientnetv2_b0",  # Conv2dSame
    "torchvision mobilenet_v2",
)


def create(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name.startswith("torchvision "):
        return torchvision.models.mobilenet_v2(num_classes=10)
    return timm.create_model(name, num_classes=10)


@pytest.mark.parametrize("name", NETWORKS)
def test_convert_train_prune_condense(name):
    size = 64
    model = create(name).eval()
    x = torch.randn(2, 3, size, size + 16)
    learned, report = mz.to_learned_group_conv(model, input_size=(3, size, size))
    assert report.converted
    assert set(report.converted).isdisjoint(report.left)
    assert mz.check_equivalent(model, learned, x, tolerance=1e-6) <= 1e-6
    assert not any(isinstance(module, mz.LearnedGroupConv2d) for module in model.modules())

    schedule = mz.CondenseSchedule(learned.train())
    optimizer = torch.optim.SGD(learned.parameters(), lr=0.01)
    for step in range(3):
        loss = F.cross_entropy(learned(torch.randn(2, 3, size, size)), torch.tensor([1, 2]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step((step + 1) / 3)
    small = mz.condense(learned.eval())
    assert mz.check_equivalent(learned, small, x) <= 1e-5
    assert mz.profile(small, (3, size, size)) == report.after
    assert mz.profile(model, (3, size, size)) == report.before
    assert report.after.params < report.before.params
    assert report.after.macs < report.before.macs


class Everything(nn.Module):
    """Every kind of layer that must be converted or left, and one that is used twice."""

    def __init__(self):
        super().__init__()
        self.strided = nn.Conv2d(8, 16, 1, stride=2, bias=True)
        self.shared = nn.Conv2d(16, 16, 1)
        self.same = self.shared
        self.wide = nn.Conv2d(16, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 16, 1, groups=4)
        self.padded = nn.Conv2d(16, 16, 1, padding=1)
        self.odd_in = nn.Conv2d(16, 6, 1)
        self.odd_out = nn.Conv2d(6, 8, 1)
        self.standardized = StdConv2d(8, 8, 1)

    def forward(self, x):
        x = self.grouped(self.wide(self.same(self.shared(self.strided(x)))))
        return self.standardized(self.odd_out(self.odd_in(self.padded(x))))


def test_bias_stride_and_odd_maps():
    model = Everything().double()
    nn.init.normal_(model.strided.bias)
    learned, report = mz.to_learned_group_conv(model, input_size=(8, 9, 7))
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    mz.check_equivalent(model, learned, x)
    assert report.converted == ("strided", "shared")
    assert learned.same is learned.shared
    reasons = {
        "wide": "3x3",
        "grouped": "groups=4",
        "padded": "padding",
        "odd_in": "out_channels 6",
        "odd_out": "in_channels 6",
        "standardized": "StdConv2d",
    }
    assert set(report.left) == set(reasons)
    assert all(text in report.left[name] for name, text in reasons.items())
    mz.CondenseSchedule(learned).step(1.0)
    small = mz.condense(learned)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        mz.check_equivalent(learned, small, x.to(memory_format=memory_format))
    fresh = copy.deepcopy(small)
    nn.init.zeros_(fresh.strided.bias)
    fresh.load_state_dict(small.state_dict())
    assert torch.equal(fresh.strided.bias, model.strided.bias)
    assert "2 layers converted" in str(report)


def test_match_groups_and_flags_carry_over():
    model = create("mobilenetv2_050")
    for parameter in model.blocks[1].parameters():
        parameter.requires_grad_(False)
    seen = []

    def match(name: str, module: nn.Conv2d) -> bool:
        seen.append(name)
        return name.startswith("blocks.1.")

    learned, report = mz.to_learned_group_conv(model.train(), groups=2, condense_factor=8, match=match)
    assert report.converted
    assert all(name.startswith("blocks.1.") for name in report.converted)
    assert report.left["conv_head"] == "not matched"
    assert "conv_stem" not in seen
    layer = learned.get_submodule(report.converted[0])
    assert (layer.groups, layer.condense_factor, layer.training) == (2, 8, True)
    assert not layer.weight.requires_grad


def test_nothing_to_convert():
    with pytest.raises(ValueError, match=r"no nn\.Conv2d"):
        mz.to_learned_group_conv(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="not matched"):
        mz.to_learned_group_conv(nn.Conv2d(8, 8, 1), match=lambda name, module: False)
    with pytest.raises(ValueError, match="3x3"):
        mz.to_learned_group_conv(nn.Conv2d(8, 8, 3))


@pytest.mark.parametrize("condensed", [False, True])
def test_an_export_keeps_the_form_and_the_model(condensed, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model, _ = mz.to_learned_group_conv(Everything(), input_size=(8, 9, 7))
    mz.CondenseSchedule(model).step(1.0)
    model = (mz.condense(model) if condensed else model).train()
    before = copy.deepcopy(model.state_dict())
    mz.export_onnx(model, tmp_path / "model.onnx", input_size=(8, 9, 7))  # compares the outputs
    operators = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert operators.count("Gather") == (3 if condensed else 0)  # one of the two layers is used twice
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
