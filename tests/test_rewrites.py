"""Exact rewrites for inference: each on its own, then on every model."""

import copy
from dataclasses import replace
from functools import partial
from typing import Any, Optional

import pytest
import timm
import torch
import torchvision
from conftest import ALL_MODELS, LGC_MODELS, lively, with_lively_statistics, with_random_masks
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

import mobilenets_zoo as mz
from mobilenets_zoo.evaluation import preprocess
from mobilenets_zoo.inference import optimize, rewrites
from mobilenets_zoo.inference.optimize import FoldedConv2d
from mobilenets_zoo.inference.rewrites import Convolution, HiddenLayers
from mobilenets_zoo.models._base import ConvBn


def hidden_layers(groups: int, inputs: int = 8, hidden: int = 96, outputs: int = 8, seed: int = 0) -> HiddenLayers:
    """A made-up bottleneck whose projection reads half of the hidden channels, some of them several times."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    per_group = hidden // 4
    index = torch.cat([torch.randperm(hidden // 2, generator=generator)[:per_group] * 2 for _ in range(4)])
    return HiddenLayers(
        Convolution(draw(hidden, inputs // groups, 1, 1), draw(hidden), groups),
        Convolution(draw(hidden, 1, 3, 3), draw(hidden), hidden),
        Convolution(draw(outputs, per_group, 1, 1), draw(outputs), 4, 1, index),
    )


def run(layers: HiddenLayers, x: torch.Tensor) -> torch.Tensor:
    for convolution in (layers.expansion, layers.depthwise):
        x = FoldedConv2d(convolution, act=True)(x)
    return FoldedConv2d(layers.projection, act=False)(x)


def layer_with_bias(conv: nn.Module) -> ConvBn:
    layer = ConvBn(conv, 8)
    nn.init.normal_(conv.bias)
    return with_lively_statistics(nn.Sequential(nn.Conv2d(3, 8, 1), layer))[1].double()


@pytest.mark.parametrize(
    "layer",
    [
        lambda: lively("mobilenetv1_w025_cifar100").double().blocks[1][0].depthwise,
        lambda: layer_with_bias(nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2)),
        lambda: layer_with_bias(mz.CondensedConv2d(8, 8, 2, 2, stride=2, bias=True)),
        lambda: layer_with_bias(mz.LearnedGroupConv2d(8, 8, 2, 2, stride=2, bias=True).prune_(4)),
    ],
    ids=["depthwise", "bias", "condensed", "masked"],
)
@torch.no_grad()
def test_fold_batchnorm_is_exact(layer):
    layer = layer()
    x = torch.randn(2, layer.conv.in_channels, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(FoldedConv2d(rewrites.fold_batchnorm(layer), act=True)(x), layer(x))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("simd", [1, 8])
def test_dead_channels_go_and_groups_stay_equal(groups, simd, monkeypatch):
    monkeypatch.setattr(rewrites, "SIMD_CHANNELS", simd)
    layers = hidden_layers(groups)
    rewritten = rewrites.remove_dead_hidden(layers)
    left = len(rewritten.expansion.weight)
    alive = torch.bincount(layers.projection.index.unique() // (96 // groups), minlength=groups)
    # The groups' four inputs are too few for a blocked kernel: together they must be a multiple, not each.
    multiple = simd if groups == 1 else max(1, simd // groups)
    assert left == groups * -(-int(alive.max()) // multiple) * multiple < 96
    assert rewritten.depthwise.groups == left
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(run(rewritten, x), run(layers, x))
    layers.projection.index.copy_(torch.arange(96))
    assert rewrites.remove_dead_hidden(layers) is layers


def test_groups_of_blocked_expansions_stay_blocked():
    layers = hidden_layers(groups=2, inputs=32, hidden=192)
    rewritten = rewrites.remove_dead_hidden(layers)
    assert rewrites._is_blocked(rewritten.expansion)
    assert len(rewritten.expansion.weight) % (2 * rewrites.SIMD_CHANNELS) == 0
    x = torch.randn(2, 32, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(run(rewritten, x), run(layers, x))


@pytest.mark.parametrize(("expansion_groups", "projection_groups"), [(1, 1), (1, 4), (2, 4), (4, 1)])
@pytest.mark.parametrize("gather", [True, False])
def test_channels_that_are_always_zero_go(expansion_groups, projection_groups, gather):
    layers = hidden_layers(expansion_groups, inputs=64, hidden=256)
    if not gather:
        weight = torch.randn(8, 256 // projection_groups, 1, 1, dtype=torch.float64)
        layers = replace(layers, projection=Convolution(weight, torch.randn(8).double(), projection_groups))
    zero = torch.arange(256) % 4 < 2
    zero[:6] = True  # more in one group than in the others
    largest = 6.0 * layers.depthwise.weight.clamp_min(0.0).sum((1, 2, 3))
    layers.depthwise.bias[zero] = -1e-9 - largest[zero]
    layers.depthwise.bias[~zero] = 0.01 - largest[~zero]  # not zero for one input
    assert torch.equal(rewrites.always_zero(layers.depthwise), zero)
    rewritten = rewrites.remove_dead_hidden(layers)
    assert 16 <= len(rewritten.expansion.weight) < 256
    assert gather or len(rewritten.expansion.weight) == 128
    x = 20.0 * torch.randn(2, 64, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(run(rewritten, x), run(layers, x))


def test_groups_of_the_two_sides_may_have_no_common_divisor():
    layers = hidden_layers(3, inputs=48, hidden=384)
    projection = Convolution(torch.randn(8, 96, 1, 1).double(), torch.randn(8).double(), 4)
    layers = replace(layers, projection=projection)
    dead = 7 * torch.arange(384) % 32 >= 10
    layers.depthwise.bias[dead] = -1e-9 - 6.0 * layers.depthwise.weight[dead].clamp_min(0.0).sum((1, 2, 3))
    rewritten = rewrites.remove_dead_hidden(layers)
    assert len(rewritten.expansion.weight) == 192
    x = torch.randn(2, 48, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(run(rewritten, x), run(layers, x))


@pytest.mark.parametrize("name", ALL_MODELS)
def test_every_network_loses_channels_that_are_always_zero(name):
    model = lively(name)
    before = mz.profile(mz.optimize_for_inference(model)).macs
    for layer in model.modules():
        if isinstance(layer, ConvBn) and layer.conv.groups == layer.conv.in_channels:
            nn.init.constant_(layer.bn.bias[::2], -1e4)
    assert mz.profile(mz.optimize_for_inference(model)).macs < 0.9 * before  # which compares the outputs


@pytest.mark.parametrize(
    ("inputs", "hidden", "outputs", "expansion_groups", "projection_groups"),
    [
        (160, 960, 160, 4, 4),  # wide groups stay, with the gather in front of the projection
        (96, 576, 64, 4, 4),
        (32, 192, 32, 2, 1),  # groups of 8 inputs don't fill a register; 32 outputs are too few to share a gather
        (16, 96, 24, 1, 1),
    ],
)
def test_groups_are_merged_or_spread_until_they_fill_registers(
    inputs, hidden, outputs, expansion_groups, projection_groups
):
    layers = hidden_layers(4, inputs, hidden, outputs)
    expansion = rewrites.fill_registers(layers.expansion, inputs)
    projection = rewrites.fill_registers(layers.projection, hidden)
    assert (expansion.groups, projection.groups) == (expansion_groups, projection_groups)
    assert (projection.index is None) == (projection_groups == 1)
    x = torch.randn(2, inputs, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(run(replace(layers, expansion=expansion, projection=projection), x), run(layers, x))


def test_groups_without_a_gather_are_merged_however_few_their_outputs():
    layers = hidden_layers(4, hidden=192, outputs=32)
    projection = rewrites.fill_registers(replace(layers.projection, index=None), 192)
    assert (projection.groups, projection.weight.shape[1]) == (2, 96)


@pytest.mark.parametrize("name", ALL_MODELS)
@torch.no_grad()
def test_optimized_network_is_equal(name):
    model = lively(name)
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-11)):
        network = mz.optimize_for_inference(model.to(dtype))
        for memory_format in (torch.contiguous_format, torch.channels_last):
            inputs = x.to(dtype, memory_format=memory_format)
            assert mz.check_equivalent(model, network.to(memory_format=memory_format), inputs, tolerance) <= tolerance
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert all(torch.equal(before[key], value.to(before[key])) for key, value in model.state_dict().items())
    if name in LGC_MODELS:
        mz.check_equivalent(network, mz.optimize_for_inference(mz.condense(model)), x)
        assert mz.profile(network).macs < mz.profile(model).macs
    elif "_gc" not in name:  # a biased convolution for a plain one and BatchNorm
        assert mz.profile(network).macs <= mz.profile(model).macs


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_checked(dtype, monkeypatch):
    model = timm.create_model("mobilenetv2_lgc_cifar100", pretrained=True).eval().to(dtype)
    network = mz.optimize_for_inference(model)
    assert {parameter.dtype for parameter in network.parameters()} == {dtype}
    mz.check_equivalent(model, network, torch.randn(2, 3, 32, 32, dtype=dtype))
    wrong = rewrites.fold_batchnorm
    monkeypatch.setattr(optimize, "fold_batchnorm", lambda layer: replace(wrong(layer), bias=1 + wrong(layer).bias))
    with pytest.raises(ValueError, match="not equivalent"):
        mz.optimize_for_inference(model)


@pytest.mark.cifar100
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", timm.list_models("*_cifar100"))
@torch.inference_mode()
def test_predictions_on_the_test_set_stay(name, test_images):
    model = timm.create_model(name, pretrained=True).eval().to(memory_format=torch.channels_last)
    images, cfg = test_images.images, model.pretrained_cfg
    forms = [mz.optimize_for_inference(model, dense=dense) for dense in (False, True)]
    for start in range(0, len(images), 250):
        x = preprocess(torch.from_numpy(images[start : start + 250]), cfg["mean"], cfg["std"])
        expected = model(x).argmax(1)
        assert all(torch.equal(form(x).argmax(1), expected) for form in forms)


@pytest.mark.parametrize("name", ["mobilenetv1_w025_cifar100", "mobilenetv2_lgc_cifar100"])
def test_heads_and_channels_carry_over(name):
    model = lively(name)
    other = timm.create_model(name, num_classes=7, in_chans=1, global_pool="max")
    network = mz.optimize_for_inference(with_random_masks(other))
    assert network(torch.randn(2, 1, 48, 48)).shape == (2, 7)
    model.reset_classifier(0)
    assert mz.optimize_for_inference(model)(torch.randn(2, 3, 32, 32)).shape == (2, model.num_features)


def test_an_optimized_network_does_not_train():
    network = mz.optimize_for_inference(mz.MobileNetV1(width_mult=0.25).eval())  # without timm's configuration
    assert not any(parameter.requires_grad for parameter in network.parameters())
    with pytest.raises(RuntimeError, match="for inference"):
        network.train()
    assert network.eval() is network


def test_unfinished_masks_and_networks_without_groups_are_refused():
    with pytest.raises(ValueError, match="can't condense"):
        mz.optimize_for_inference(timm.create_model("mobilenetv2_lgc_cifar100"))
    with pytest.raises(ValueError, match="there is nothing to condense"):
        mz.optimize_for_inference(nn.Linear(3, 3), input_size=(3, 8, 8))
    edited = timm.create_model("mobilenetv1_w025_cifar100")
    mz.optimize_for_inference(timm.layers.convert_sync_batchnorm(edited))  # as timm's scripts leave a network
    frozen = lively("mobilenetv2_t1_cifar100")
    timm.utils.freeze(frozen, "blocks", include_bn_running_stats=True)
    mz.optimize_for_inference(frozen)
    edited.stem = nn.Conv2d(3, 16, 3, padding=1)
    with pytest.raises(ValueError, match="can't rewrite a Conv2d that isn't a convolution with BatchNorm"):
        mz.optimize_for_inference(edited)


@pytest.mark.parametrize("name", ["mobilenetv1_w025_cifar100", "mobilenetv2_t1_cifar100"])
def test_a_network_that_was_given_learned_groups_is_rewritten(name):
    """Pointwise layers of MobileNetV1, and shortcuts of MobileNetV2: plain 1x1 convolutions in the zoo's networks."""
    learned, _ = mz.to_learned_group_conv(lively(name), input_size=(3, 32, 32))
    learned = with_random_masks(learned).eval()
    layers = "blocks.0.0.pointwise.conv", "blocks.1.0.shortcut"
    assert sum(isinstance(dict(learned.named_modules()).get(layer), mz.LearnedGroupConv2d) for layer in layers) == 1
    network, dense = mz.optimize_for_inference(learned), mz.optimize_for_inference(learned, dense=True)
    for form in (network, dense):
        mz.check_equivalent(learned, form, torch.randn(2, 3, 32, 32), tolerance=1e-4)
    pointwise = [m for m in dense.modules() if isinstance(m, FoldedConv2d) and m.kernel_size == (1, 1)]
    assert pointwise
    assert all(layer.groups == 1 and layer.index is None for layer in pointwise)


# Other networks

SIZE = (3, 64, 64)


def kernel_weights(model: nn.Module) -> int:
    """Counts the weights of convolutions larger than 1x1, which are never learned."""
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size > (1, 1))


@pytest.mark.parametrize(
    "name",
    [
        *("efficientnet_lite0", "mobilenetv3_small_050", "mobilenetv4_conv_small", "regnetx_002", "convnext_atto"),
        *("ghostnet_050", "densenet121", "torchvision"),
    ],
)
def test_other_networks_lose_channels_that_nothing_reads(name):
    network = torchvision.models.mobilenet_v2() if name == "torchvision" else timm.create_model(name)
    learned, _ = mz.to_learned_group_conv(with_lively_statistics(network), input_size=SIZE)
    learned = with_random_masks(learned).eval()
    before = copy.deepcopy(learned.state_dict())
    image, full = torch.randn(1, *SIZE), kernel_weights(learned)
    for dense in (False, True):
        optimized = mz.optimize_for_inference(learned, dense=dense, input_size=SIZE)
        mz.check_equivalent(learned, optimized, image, tolerance=1e-4)
        if name in ("efficientnet_lite0", "mobilenetv4_conv_small", "torchvision"):
            assert kernel_weights(optimized) < 0.9 * full
        if name == "convnext_atto":
            assert len(optimized.stages[0].blocks[0].mlp.fc1.weight) < 160
        folded = [m for m in optimized.modules() if isinstance(m, FoldedConv2d)]
        assert len(folded) == len(mz.learned_layers(learned))
        assert not dense or all(layer.groups == 1 and layer.index is None for layer in folded)
    assert all(torch.equal(before[key], value) for key, value in learned.state_dict().items())


def reader(inputs: int, groups: int = 2) -> mz.CondensedConv2d:
    """Reads every fourth channel alone, with each group."""
    layer = mz.CondensedConv2d(inputs, 8, groups, 4)
    layer.index = torch.arange(0, inputs, 4).repeat(groups)
    return layer


class Mirrored(nn.ReLU):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).flip(1)


class Twice(nn.Sequential):
    """Its first layer's outputs are read a second time."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self[0](x)
        return self[2](self[1](x)) + x.mean()


@pytest.mark.parametrize(
    ("layers", "left"),
    [
        (lambda: [nn.Conv2d(3, 128, 3), nn.BatchNorm2d(128), nn.ReLU(inplace=True)], 32),
        (lambda: [nn.Conv2d(3, 128, 3), BatchNormAct2d(128), nn.Conv2d(128, 128, 3, groups=128), nn.SiLU()], 32),
        (lambda: [nn.Conv2d(3, 16, 1), nn.Conv2d(16, 128, 3, groups=4), nn.Hardswish()], 32),
        (lambda: [mz.CondensedConv2d(3, 24, 1, 1), mz.CondensedConv2d(24, 128, 8, 4), nn.Dropout()], 32),
        (
            lambda: [nn.Conv2d(3, 80, 1), timm.layers.get_act_layer("gelu")()],
            32,
        ),  # 20 are read, and whole registers stay
        (lambda: [nn.Conv2d(3, 128, 3), nn.PReLU(128)], 128),
        (lambda: [nn.Conv2d(3, 128, 3), nn.Softmax(1)], 128),
        (lambda: [nn.Conv2d(3, 128, 3), Mirrored()], 128),
        (lambda: [nn.Conv2d(3, 128, 3), nn.GroupNorm(4, 128)], 128),
        (lambda: [nn.Conv2d(3, 64, 3), nn.Conv2d(64, 128, 3, groups=64)], 64),  # one of each group's two
        (lambda: [weight_norm(nn.Conv2d(3, 128, 3))], 128),
        (lambda: [nn.Conv2d(3, 128, 3), *2 * [nn.Conv2d(128, 128, 1, groups=128)]], 128),  # one layer runs twice
    ],
)
def test_channels_go_only_where_each_is_by_itself(layers, left):
    torch.manual_seed(0)
    parts = layers()
    inputs = next(len(part.weight) for part in reversed(parts) if isinstance(part, (nn.Conv2d, mz.CondensedConv2d)))
    network = with_lively_statistics(nn.Sequential(*parts, reader(inputs)))
    optimized = mz.optimize_for_inference(network, input_size=(3, 12, 12))
    mz.check_equivalent(network, optimized, torch.randn(2, 3, 12, 12))
    with_weights = [part for part in optimized[:-1] if isinstance(part, (nn.Conv2d, mz.CondensedConv2d))]
    assert with_weights[-1].out_channels == left


def test_what_is_read_elsewhere_stays():
    network = Twice(nn.Conv2d(3, 128, 3), nn.ReLU(), reader(128)).eval()
    optimized = mz.optimize_for_inference(network, input_size=(3, 12, 12))
    assert optimized[0].out_channels == 128
    mz.check_equivalent(network, optimized, torch.randn(2, 3, 12, 12))


class Handwritten(nn.Module):
    """Activations are functions, `forward` takes options and gives two outputs."""

    def __init__(self):
        super().__init__()
        self.conv, self.layer = nn.Conv2d(3, 128, 3), reader(128)

    def forward(self, x: torch.Tensor, scale: Optional[torch.Tensor] = None, both: bool = True) -> Any:
        y = self.layer(F.relu(input=self.conv(x if scale is None else scale * x)))
        return {"x": x, "y": y} if both else y


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_handwritten_networks_are_followed(dtype):
    network = Handwritten().to(dtype)
    optimized = mz.optimize_for_inference(network, input_size=(3, 12, 12))
    assert optimized.conv.out_channels == 32
    assert {parameter.dtype for parameter in optimized.parameters()} == {dtype}
    assert network.training
    assert not any(module.training for module in optimized.modules())
    images = torch.randn(2, 3, 12, 12, dtype=dtype)
    mz.check_equivalent(network.eval(), optimized, images)
    mz.check_equivalent(partial(network, both=False), partial(optimized, both=False), images)
    optimized.layer.weight[0] += 1
    with pytest.raises(ValueError, match="not equivalent"):
        mz.check_equivalent(network, optimized, images)


def test_a_layer_with_hooks_is_refused_and_one_in_front_of_it_stays():
    network = Handwritten()
    network.conv.register_forward_hook(lambda module, args, output: output + 1)
    assert mz.optimize_for_inference(network, input_size=(3, 12, 12)).conv.out_channels == 128
    network.layer.register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(ValueError, match="hooks, which would be lost"):
        mz.optimize_for_inference(network, input_size=(3, 12, 12))
    network = timm.create_model("mobilenetv1_w025_cifar100")
    network.stem.conv.register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(ValueError, match="hooks, which would be lost"):
        mz.optimize_for_inference(network)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = reader(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) if x.sum() > 0 else x


def test_networks_that_cannot_be_traced_or_have_no_size_are_refused():
    with pytest.raises(ValueError, match=r"torch.fx can't trace Branching: .*; use mz.condense"):
        mz.optimize_for_inference(Branching(), input_size=(16, 8, 8))
    with pytest.raises(ValueError, match="Sequential names no input size; pass input_size="):
        mz.optimize_for_inference(nn.Sequential(reader(16)))
