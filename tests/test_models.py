"""The timm contract and the architecture's numbers, for every registered model.

timm's own test suite runs on the same models in .ci/run; what stands here is what it leaves out.
"""

import subprocess
import sys

import pytest
import timm
import torch
from conftest import ALL_MODELS, LGC_MODELS, with_lively_statistics
from timm.layers import DropPath
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import nn

import mobilenets_zoo as mz

# Deployed parameters and MACs, docs/design.md.
COSTS = {
    "mobilenetv1_cifar100": (3_309_476, 611_651_584),
    "mobilenetv1_w050_cifar100": (869_892, 156_403_712),
    "mobilenetv1_w025_cifar100": (238_772, 40_846_336),
    "mobilenetv2_cifar100": (2_360_868, 300_913_664),
    "mobilenetv2_t4_cifar100": (1_758_564, 211_399_680),
    "mobilenetv2_t1_cifar100": (855_108, 77_128_704),
    "mobilenetv2_lgc_cifar100": (1_073_796, 110_105_600),
    "mobilenetv2_lgc_proj_cifar100": (1_638_468, 204_379_136),
    "mobilenetv2_gc_lgc_cifar100": (1_073_796, 110_105_600),
    "mobilenetv2_lgc_exp_cifar100": (1_796_196, 206_640_128),
    "mobilenetv2_lgc_gc_cifar100": (1_073_796, 110_105_600),
    "mobilenetv2_gc_cifar100": (1_073_796, 110_105_600),
    "mobilenetv2_gc_exp_cifar100": (1_796_196, 206_640_128),
    "mobilenetv2_gc_proj_cifar100": (1_638_468, 204_379_136),
}

each_model = pytest.mark.parametrize("name", ALL_MODELS)
# One model of each kind of layer; the others are made of the same ones.
each_kind = pytest.mark.parametrize(
    "name", ["mobilenetv1_w025_cifar100", "mobilenetv2_gc_cifar100", "mobilenetv2_lgc_cifar100"]
)


def deployed(name: str, **kwargs) -> nn.Module:
    return timm.create_model(name, **({"condensed": True} if name in LGC_MODELS else {}), **kwargs)


def test_fourteen_models_are_registered_with_the_data_they_take():
    assert set(ALL_MODELS) == set(COSTS)
    assert list(mz.CIFAR100_CLASSES) == sorted(set(mz.CIFAR100_CLASSES))
    for name in ALL_MODELS:
        cfg = timm.get_pretrained_cfg(name)
        assert (cfg.input_size, cfg.num_classes, cfg.label_names) == ((3, 32, 32), 100, mz.CIFAR100_CLASSES)


@each_model
def test_parameters_and_macs(name):
    profile = mz.profile(deployed(name))
    assert (profile.params, profile.macs) == COSTS[name]
    row = mz.catalogue.summary(name)
    assert (row["params"], row["macs"]) == COSTS[name]
    frozen = deployed(name)
    frozen.stem.requires_grad_(False)
    assert mz.profile(frozen) == profile
    if name in LGC_MODELS:  # the masked form counts as what it computes
        model = timm.create_model(name)
        assert mz.profile(model).macs > profile.macs
        mz.CondenseSchedule(model).step(1.0)
        assert mz.profile(mz.condense(model)) == profile


@each_model
def test_other_input_sizes(name):
    model = timm.create_model(name, device="meta")
    classifier = model.num_features * 100
    assert mz.profile(model, (3, 64, 64)).macs - classifier == 4 * (mz.profile(model).macs - classifier)
    for size in (64, 224):
        x = torch.empty(1, 3, size, size, device="meta")
        assert model.forward_features(x).shape == (1, model.num_features, size // 4, size // 4)
        assert model(x).shape == (1, 100)


@each_kind
def test_head_options(name):
    model = timm.create_model(name, num_classes=10, in_chans=1, drop_rate=0.5, global_pool="avgmax").eval()
    x = torch.randn(2, 1, 32, 32)
    assert model(x).shape == (2, 10)
    assert model.head_drop.p == 0.5
    assert model.global_pool.pool_type == "avgmax"
    model.reset_classifier(7)
    assert model.global_pool.pool_type == "avgmax"
    assert model(x).shape == (2, 7)


def test_drop_path_acts_in_training_only():
    assert not any(isinstance(m, DropPath) for m in timm.create_model("mobilenetv1_cifar100").modules())
    model = timm.create_model("mobilenetv2_lgc_cifar100", drop_path_rate=0.5)
    drops = [m for m in model.modules() if isinstance(m, DropPath)]
    rates = [drop.drop_prob for drop in drops]
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(0.5)
    with_lively_statistics(model)
    x = torch.randn(4, 3, 32, 32)
    assert torch.equal(model(x), model(x))
    for drop in drops:
        drop.train()
    assert not torch.equal(model(x), model(x))


@each_model
def test_layerwise_decay_groups_follow_depth(name):
    model = timm.create_model(name, device="meta")
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scale_of = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    parameters = dict(model.named_parameters())
    scales = [scale_of[id(parameters[key])] for key in parameters]
    assert len(scale_of) == len(parameters)
    assert scales == sorted(scales)  # parameters are named from the stem to the classifier
    assert len(set(scales)) > 10
    assert scales[-1] == 1.0
    create_optimizer_v2(model, "sgd", lr=0.1, layer_decay=0.7)


@each_kind
def test_device_dtype_and_bfloat16(name):
    model = timm.create_model(name, device="meta", dtype=torch.float64)
    for tensor in [*model.parameters(), *model.buffers()]:
        assert tensor.is_meta
        assert tensor.dtype in (torch.float64, torch.bool, torch.int64)
    low = timm.create_model(name).to(torch.bfloat16).eval()
    assert low(torch.randn(2, 3, 32, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16
    low.reset_classifier(3)
    assert low.get_classifier().weight.dtype == torch.bfloat16


def forms(name: str) -> list[nn.Module]:
    models = [timm.create_model(name)]
    if name in LGC_MODELS:
        models.append(deployed(name))
    return [with_lively_statistics(model) for model in models]


@each_kind
def test_tracing_and_export_with_dynamic_batch_are_equal(name):
    for model in forms(name):
        traced = torch.fx.symbolic_trace(model)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(2, 3, 32, 32).to(memory_format=memory_format)
            assert torch.equal(traced(x), model(x))
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(model, (torch.randn(2, 3, 32, 32),), dynamic_shapes=({0: batch},))
        x = torch.randn(5, 3, 32, 32)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-4)


@each_kind
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@torch.no_grad()
def test_compile_fullgraph_is_equal(name, backend):
    for model in [*forms(name), mz.optimize_for_inference(forms(name)[-1])]:
        x = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-3)
        torch._dynamo.reset()


SCRIPTED = """
import sys, timm, torch, mobilenets_zoo as mz

for name in sys.argv[1:]:
    model = timm.create_model(name, pretrained=True).eval()
    condensed = name in ("mobilenetv2_lgc_cifar100", "mobilenetv2_gc_lgc_cifar100")
    for network in [mz.optimize_for_inference(model), *([mz.condense(model)] if condensed else [])]:
        scripted = torch.jit.script(network)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(2, 3, 32, 32).to(memory_format=memory_format)
            with torch.no_grad():
                assert torch.equal(scripted(x), network(x)), (name, memory_format)
    print(name)
"""


def test_deployed_models_compile_in_torchscript():
    """The optimized form of those that hold every kind of layer, the condensed one of two."""
    # In a process of its own: TorchScript knows its built-ins by id(), and some of those that Inductor's import
    # registers die at once, so that a layer's attribute that lands at such an address passes for a built-in.
    names = [f"mobilenet{name}_cifar100" for name in ("v1_w025", "v2_gc", "v2_lgc", "v2_gc_lgc")]
    result = subprocess.run([sys.executable, "-c", SCRIPTED, *names], capture_output=True, text=True, timeout=280)
    assert result.stdout.split() == names, result.stderr


def test_width_and_expansion_are_constructor_arguments():
    half = timm.create_model("mobilenetv2_cifar100", width_mult=0.5)
    assert half.blocks[-1][-1].projection.bn.num_features == 160
    assert half.num_features == 1280
    assert mz.profile(half).params < 0.5 * COSTS["mobilenetv2_cifar100"][0]
    assert mz.profile(timm.create_model("mobilenetv2_cifar100", expand_ratio=4)) == mz.Profile(
        *COSTS["mobilenetv2_t4_cifar100"]
    )
    wide = timm.create_model("mobilenetv2_lgc_cifar100", width_mult=1.5, groups=2, condense_factor=2)
    mz.CondenseSchedule(wide).step(1.0)
    assert mz.condense(wide)(torch.randn(1, 3, 32, 32)).shape == (1, 100)


@pytest.mark.parametrize("arguments", [dict(expansion="dens"), dict(projection="LGC"), dict(expansion="gc", groups=7)])
def test_impossible_arguments_raise(arguments):
    with pytest.raises(ValueError, match=r"expansion and projection|divisible"):
        timm.create_model("mobilenetv2_cifar100", **arguments)


def test_shortcuts_are_where_the_architecture_has_them():
    model = timm.create_model("mobilenetv2_cifar100", device="meta")
    blocks = {(row, i): block for row, section in enumerate(model.blocks) for i, block in enumerate(section)}
    convs = [place for place, block in blocks.items() if isinstance(block.shortcut, nn.Conv2d)]
    assert convs == [(0, 0), (1, 0), (2, 0), (4, 0)]
    assert [place for place, block in blocks.items() if not block.has_shortcut] == [(3, 0), (5, 0), (6, 0)]


def test_channels_are_shuffled_between_plain_grouped_convolutions_only():
    shuffles = {
        name: sum(isinstance(m, nn.ChannelShuffle) for m in timm.create_model(name, device="meta").modules())
        for name in ALL_MODELS
    }
    assert shuffles.pop("mobilenetv2_gc_cifar100") == 17 + 16
    assert not any(shuffles.values())
