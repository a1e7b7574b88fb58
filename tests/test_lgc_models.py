"""Whole models: condensing, the schedule, conversion of checkpoints and of other people's networks."""

import copy

import pytest
import timm
import torch
import torchvision
from conftest import ALL_MODELS, LGC_MODELS, lively, with_lively_statistics
from timm.layers import StdConv2d
from torch import nn
from torch.nn import functional as F

import mobilenets_zoo as mz


@pytest.mark.parametrize("name", LGC_MODELS)
def test_condensed_model_is_equal(name):
    model = lively(name)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        model = model.to(dtype).eval()
        condensed = model.condense()  # by mz.condense
        assert not mz.learned_layers(condensed)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(4, 3, 32, 32, dtype=dtype).to(memory_format=memory_format)
            assert mz.check_equivalent(model, condensed, x) <= tolerance
        assert model(x).std() > 0.01  # the comparison says something
        assert mz.check_equivalent(model.train(), mz.condense(model), x) <= tolerance


@pytest.mark.parametrize("training", [True, False])
def test_condense_copies_and_keeps_flags(training):
    model = lively("mobilenetv2_lgc_cifar100").train(training)
    model.blocks[0].eval()
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    condensed = mz.condense(model)
    assert torch.equal(random_state, torch.get_rng_state())
    assert mz.check_equivalent(condensed, mz.condense(condensed), torch.randn(2, 3, 32, 32)) == 0
    assert [m.training for m in condensed.modules()] == [m.training for m in model.modules()]
    with torch.no_grad():
        for parameter in condensed.parameters():
            parameter.zero_()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert condensed.pretrained_cfg == model.pretrained_cfg


def test_condense_refuses_unfinished_masks_and_names_the_layer():
    model = timm.create_model("mobilenetv2_lgc_cifar100")
    mz.CondenseSchedule(model).step(1 / 6)
    with pytest.raises(ValueError, match=r"blocks\.0\.0\.expansion\.conv.*\[24, 24, 24, 24\] of 32"):
        mz.condense(model)
    with pytest.raises(ValueError, match=r"blocks\.0\.0\.expansion\.conv.*finish"):
        timm.create_model("mobilenetv2_lgc_cifar100", condensed=True).load_state_dict(model.state_dict())


@pytest.mark.parametrize("name", [name for name in ALL_MODELS if "lgc" not in name])
def test_models_without_learned_layers_say_so(name):
    model = timm.create_model(name, device="meta")
    for function in (mz.condense, mz.CondenseSchedule, mz.group_lasso):
        with pytest.raises(ValueError, match="no LearnedGroupConv2d"):
            function(model)
    with pytest.raises((ValueError, TypeError), match="condensed"):
        timm.create_model(name, condensed=True, device="meta")


@pytest.mark.parametrize("name", LGC_MODELS)
def test_checkpoints_convert_both_ways_without_loss(name):
    model = lively(name)
    condensed = mz.condense(model)
    fresh_condensed = timm.create_model(name, condensed=True)
    fresh_condensed.load_state_dict(condensed.state_dict())  # strict, as saved
    fresh_masked = timm.create_model(name)
    fresh_masked.load_state_dict(condensed.state_dict())
    again = timm.create_model(name, condensed=True)
    again.load_state_dict(fresh_masked.state_dict())
    expected = condensed.state_dict()
    for other in (fresh_condensed, again):
        assert all(torch.equal(expected[key], value) for key, value in other.state_dict().items())
    x = torch.randn(2, 3, 32, 32)
    assert mz.check_equivalent(model, fresh_masked.eval(), x) <= 1e-6


@pytest.mark.parametrize("condensed", [True, False])
def test_checkpoint_path_takes_both_forms(condensed, tmp_path):
    """timm's `checkpoint_path` passes files on without a filter."""
    model = lively("mobilenetv2_lgc_proj_cifar100")
    torch.save({"state_dict": (model if condensed else mz.condense(model)).state_dict()}, tmp_path / "last.pth.tar")
    options = dict(condensed=condensed, checkpoint_path=tmp_path / "last.pth.tar")
    loaded = timm.create_model("mobilenetv2_lgc_proj_cifar100", **options).eval()
    mz.check_equivalent(model, loaded, torch.randn(2, 3, 32, 32))
    torch.save(timm.create_model("mobilenetv2_lgc_proj_cifar100").state_dict(), tmp_path / "unfinished.pth")
    with pytest.raises(ValueError, match="finish the CondenseSchedule"):
        timm.create_model("mobilenetv2_lgc_proj_cifar100", condensed=True, checkpoint_path=tmp_path / "unfinished.pth")


def test_a_dense_checkpoint_starts_a_learned_network():
    dense = with_lively_statistics(timm.create_model("mobilenetv2_cifar100"))
    learned = timm.create_model("mobilenetv2_lgc_cifar100").eval()
    learned.load_state_dict(dense.state_dict())
    mz.check_equivalent(dense, learned, torch.randn(2, 3, 32, 32))
    empty = timm.create_model("mobilenetv2_lgc_cifar100", device="meta").eval()
    empty.load_state_dict(dense.state_dict(), assign=True)
    mz.check_equivalent(dense, empty, torch.randn(2, 3, 32, 32))


def test_parameters_alone_leave_masks_as_they_are():
    model = timm.create_model("mobilenetv2_lgc_cifar100")
    mz.CondenseSchedule(model).step(1.0)
    before = {name: layer.mask.clone() for name, layer in mz.learned_layers(model).items()}
    model.load_state_dict(dict(model.named_parameters()), strict=False)
    assert all(torch.equal(layer.mask, before[name]) for name, layer in mz.learned_layers(model).items())
    assert sum(mask.sum() for mask in before.values()) < sum(mask.numel() for mask in before.values())


def test_condense_works_on_foreign_models_and_keeps_shared_layers_shared():
    layer = mz.LearnedGroupConv2d(16, 16).prune_(4)
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer, nn.ReLU())})
    condensed = mz.condense(model)
    assert isinstance(condensed["a"], mz.CondensedConv2d)
    assert condensed["a"] is condensed["b"][0]
    assert isinstance(mz.condense(layer), mz.CondensedConv2d)


def test_check_equivalent_reports_the_largest_error():
    a, b = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()
    b.load_state_dict(a.state_dict())
    x = torch.randn(2, 3, dtype=torch.float64)
    assert mz.check_equivalent(a, b, x) == 0
    with torch.no_grad():
        b.bias[1] += 1.0
    with pytest.raises(ValueError, match=r"largest error is \d"):
        mz.check_equivalent(a, b, x)
    with torch.no_grad():
        b.bias[1] = float("nan")
    with pytest.raises(ValueError, match="nan"):
        mz.check_equivalent(a, b, x)
    with pytest.raises(ValueError, match="shapes"):
        mz.check_equivalent(a, nn.Linear(3, 4).double(), x)
    with pytest.raises(ValueError, match="no outputs to compare"):
        mz.check_equivalent(lambda x: None, lambda x: None, x)
    in_place = nn.Sequential(nn.ReLU(inplace=True), a)
    before = x.clone()
    assert mz.check_equivalent(in_place, lambda x: (in_place(x), None), x) == 0
    assert torch.equal(x, before)
    assert mz.check_equivalent(torch.argsort, torch.argsort, x) == 0
    beyond = torch.tensor([float("-inf"), 1.0])
    assert mz.check_equivalent(lambda x: [x, x[:0]], lambda x: [x, x[:0]], beyond) == 0  # an empty one, too
    with pytest.raises(ValueError, match="the largest error is inf"):
        mz.check_equivalent(lambda x: x, lambda x: x.abs(), beyond)
    seen = []
    with torch.autocast("cpu"):
        mz.check_equivalent(lambda x: seen.append(torch.is_autocast_enabled("cpu")) or x, lambda x: x, x)
        assert (seen, torch.is_autocast_enabled("cpu")) == ([False], True)
    with pytest.raises(ValueError, match="not equivalent"):
        mz.check_equivalent(torch.fft.fft, lambda x: torch.fft.fft(x) + 1j, x)
    with pytest.raises(ValueError, match="not equivalent"):
        mz.check_equivalent(torch.argsort, lambda x: x.argsort() + 1, x)
    norm = nn.BatchNorm1d(3).double()  # in training
    mz.check_equivalent(norm, norm, x)
    partly = nn.Sequential(norm).eval()
    norm.train()
    mz.check_equivalent(partly, partly, x)
    assert norm.num_batches_tracked == 0


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="older versions have another setting")
def test_check_equivalent_computes_without_tf32_and_keeps_the_setting():
    def precisions():
        return [setting.fp32_precision for setting in (torch.backends.cudnn.conv, torch.backends.cuda.matmul)]

    def model(x):
        seen.extend(precisions())
        return x

    seen, before, legacy = [], precisions(), torch.backends.cudnn.allow_tf32
    mz.check_equivalent(model, model, torch.ones(2))
    assert seen == ["ieee"] * 4
    assert (precisions(), torch.backends.cudnn.allow_tf32) == (before, legacy)


# The schedule


def counts(model: nn.Module) -> set[float]:
    """Shares of inputs that the layers' groups hold."""
    return {
        (m.mask.sum(1) / m.in_channels)[g].item()
        for m in model.modules()
        if isinstance(m, mz.LearnedGroupConv2d)
        for g in range(m.groups)
    }


@pytest.mark.parametrize(("progress", "share"), [(0, 1), (0.16, 1), (1 / 6, 0.75), (0.34, 0.5), (0.5, 0.25), (1, 0.25)])
def test_schedule_catches_up_after_a_jump(progress, share):
    model = timm.create_model("mobilenetv2_lgc_gc_cifar100")
    assert mz.CondenseSchedule(model).step(progress) is (share < 1)
    assert counts(model) == {share}


def test_schedule_prunes_at_sixths_and_only_there():
    layer = mz.LearnedGroupConv2d(16, 8)
    schedule = mz.CondenseSchedule(layer)
    assert [step for step in range(601) if schedule.step(step / 600)] == [100, 200, 300]
    assert counts(layer) == {0.25}


def test_schedule_follows_each_layers_own_factor():
    model = nn.Sequential(mz.LearnedGroupConv2d(16, 8, 4, 2), mz.LearnedGroupConv2d(16, 8, 2, 8))
    schedule = mz.CondenseSchedule(model)
    schedule.step(0.25)
    assert model[0].mask.sum(1).tolist() == [16] * 4
    assert model[1].mask.sum(1).tolist() == [16 - 2 * 3] * 2
    schedule.step(0.5)
    assert counts(model) == {0.5, 0.125}


def test_schedule_resumes_and_never_goes_back():
    model = timm.create_model("mobilenetv2_lgc_cifar100")
    first = mz.CondenseSchedule(model)
    first.step(0.4)
    second = mz.CondenseSchedule(model)
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == {"progress": 0.4}
    assert not second.step(0.4)
    assert not second.step(0.1)
    assert counts(model) == {0.5}
    assert second.step(0.5)


@pytest.mark.parametrize("progress", [-0.1, 1.1, float("nan")])
def test_schedule_rejects_progress_outside_its_range(progress):
    schedule = mz.CondenseSchedule(nn.Sequential(mz.LearnedGroupConv2d(16, 8)))
    with pytest.raises(ValueError, match="progress"):
        schedule.step(progress)


def test_group_lasso_sums_over_layers():
    model = nn.Sequential(mz.LearnedGroupConv2d(16, 8), nn.ReLU(), mz.LearnedGroupConv2d(8, 8))
    torch.testing.assert_close(mz.group_lasso(model), model[0].group_lasso() + model[2].group_lasso())


# Other people's networks


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
        self.strided = nn.Conv2d(8, 16, 1, stride=(2, 3), bias=True)
        self.shared = nn.Conv2d(16, 16, 1)
        self.same = self.shared
        self.wide = nn.Conv2d(16, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 16, 1, groups=4)
        self.padded = nn.Conv2d(16, 16, 1, padding=1)
        self.odd_in = nn.Conv2d(16, 6, 1)
        self.odd_out = nn.Conv2d(6, 8, 1)
        self.standardized = StdConv2d(8, 8, 1)
        self.tied, self.alike = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.alike.weight = self.tied.weight
        self.hooked = nn.Conv2d(8, 8, 1)
        self.hooked.register_forward_hook(lambda module, inputs, output: 2.0 * output)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1))

    def forward(self, x):
        x = self.grouped(self.wide(self.same(self.shared(self.strided(x)))))
        x = self.standardized(self.odd_out(self.odd_in(self.padded(x))))
        return self.normed(self.hooked(self.alike(self.tied(x))))


def test_bias_stride_and_odd_maps():
    model = Everything().double()
    nn.init.normal_(model.strided.bias)
    learned, report = mz.to_learned_group_conv(model, input_size=(8, 9, 7))
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    mz.check_equivalent(model, learned, x)
    assert report.converted == ("strided", "shared")
    assert learned.same is learned.shared
    for layer in (learned.strided, copy.deepcopy(learned.strided).prune_(2).condense()):
        for name in ("kernel_size", "stride", "padding", "dilation"):  # which transformers' MobileNets read
            assert getattr(layer, name) == getattr(model.strided, name)
    reasons = {
        "wide": "3x3",
        "grouped": "groups=4",
        "padded": "padding",
        "odd_in": "out_channels 6",
        "odd_out": "in_channels 6",
        "standardized": "StdConv2d",
        "tied": "shares its weight",
        "alike": "shares its weight",
        "hooked": "has hooks",
        "normed": "ParametrizedConv2d",
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


def test_a_conversion_leaves_modes_and_random_state_alone():
    class Merging(nn.Conv2d):
        merged = False

        def train(self, mode: bool = True):
            self.merged = not mode
            return super().train(mode)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 1), Merging(8, 8, 1), Merging(8, 8, 1))
    model[2].eval()
    state = torch.get_rng_state()
    learned, _ = mz.to_learned_group_conv(model, input_size=(8, 4, 4))
    assert torch.equal(torch.get_rng_state(), state)
    wrapped = nn.Sequential(mz.optimize_for_inference(timm.create_model("mobilenetv1_w025_cifar100")))
    assert mz.profile(wrapped).macs > 0  # such a network refuses to be put in training mode
    assert (wrapped.training, wrapped[0].training) == (True, False)
    for network in (model, learned):
        assert [m.training for m in network] == [True, True, False]
        assert (network[1].merged, network[2].merged) == (False, True)


class Fixed(nn.Module):
    """Asserts its input's size, as networks with windows do."""

    def forward(self, x):
        assert x.shape[2] == 8, f"Img height {x.shape[2]}, not 8"
        return x


def test_nothing_to_convert():
    with pytest.raises(ValueError, match=r"can't count MACs at input_size=\(3, 224, 224\); pass what"):
        mz.to_learned_group_conv(nn.Conv2d(8, 8, 1))
    with pytest.raises(ValueError, match=r"can't count MACs at input_size=\(8, 9, 9\).*Img height"):
        mz.to_learned_group_conv(nn.Sequential(nn.Conv2d(8, 8, 1), Fixed()), input_size=(8, 9, 9))
    with pytest.raises(ValueError, match=r"no nn\.Conv2d"):
        mz.to_learned_group_conv(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="not matched"):
        mz.to_learned_group_conv(nn.Conv2d(8, 8, 1), match=lambda name, module: False)
    with pytest.raises(ValueError, match="3x3"):
        mz.to_learned_group_conv(nn.Conv2d(8, 8, 3))
    with pytest.raises(ValueError, match="groups and condense_factor must be 1 or larger, not 0 and 4"):
        mz.to_learned_group_conv(nn.Conv2d(8, 8, 1), groups=0)
    with pytest.raises(ValueError, match="its block merges weights"):  # and knows no mask
        mz.to_learned_group_conv(timm.create_model("repvgg_a0", num_classes=10))
    hooked = nn.Conv2d(8, 8, 1)
    hooked.register_full_backward_hook(lambda module, above, below: None)
    with pytest.raises(ValueError, match="it has hooks"):
        mz.to_learned_group_conv(hooked, input_size=(8, 9, 9))
    merged = timm.utils.reparameterize_model(timm.create_model("mobileone_s0", num_classes=10))
    assert mz.to_learned_group_conv(merged)[1].converted


def test_timm_merges_nothing_that_was_converted():
    model = timm.create_model("efficientvit_m0", num_classes=10).eval()
    learned, report = mz.to_learned_group_conv(model)
    assert any("merges weights" in reason for reason in report.left.values())
    done = mz.to_learned_group_conv(timm.utils.reparameterize_model(model))[1]
    assert not any("merges weights" in reason for reason in done.left.values())
    for layer in mz.learned_layers(learned).values():
        layer.prune_(layer.in_channels // layer.condense_factor)
    merged = timm.utils.reparameterize_model(mz.condense(learned))
    mz.check_equivalent(learned, merged, torch.randn(1, 3, 224, 224), tolerance=1e-4)


def test_macs_are_counted_with_the_channels_that_a_network_takes():
    model = timm.create_model("mobilenetv1_w025_cifar100", in_chans=1)
    _, report = mz.to_learned_group_conv(model)
    assert report.before == mz.profile(model, (1, 32, 32))


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
