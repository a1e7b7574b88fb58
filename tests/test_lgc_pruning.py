"""Pruning learned groups with calibration images: what is kept, what is refitted, and what stays as it was."""

import copy
import os
import subprocess
import sys

import pytest
import timm
import torch
import torchvision
from conftest import LGC_MODELS, ROOT, with_lively_statistics
from torch import nn

import mobilenets_zoo as mz
from mobilenets_zoo.evaluation import preprocess
from mobilenets_zoo.lgc import pruning


def correlated(count: int, channels: int, size: int = 6) -> torch.Tensor:
    """Maps whose channels depend on one another, differ in scale and aren't centred, as behind a ReLU."""
    x = torch.randn(count, channels, size, size + 2)
    x = torch.einsum("oi,nihw->nohw", torch.randn(channels, channels) / channels**0.5, x)
    return x * torch.logspace(-1, 1, channels)[:, None, None] + torch.randn(channels, 1, 1)


def relative_error(model: nn.Module, reference: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        actual, expected = model(x), reference(x)
    return ((actual - expected).square().sum() / (expected - expected.mean(0)).square().sum()).item()


def by_magnitude(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for layer in mz.learned_layers(model).values():
        layer.prune_(layer.in_channels // layer.condense_factor)
    return model


def is_finished(model: nn.Module) -> bool:
    return all((m.mask.sum(1) == m.in_channels // m.condense_factor).all() for m in mz.learned_layers(model).values())


@pytest.mark.parametrize("name", LGC_MODELS)
def test_zoo_networks(name):
    torch.manual_seed(0)
    model = with_lively_statistics(timm.create_model(name, width_mult=0.25, expand_ratio=2))
    images = torch.randn(24, 3, 16, 16)
    model.head_conv.train()
    random_state, flags = torch.get_rng_state(), [m.training for m in model.modules()]
    report = mz.prune_groups(model, images)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [m.training for m in model.modules()] == flags
    assert is_finished(model)
    assert list(report.layers) == list(mz.learned_layers(model))
    for row in report.layers.values():
        assert row.error < row.magnitude_error
    model.double()  # refitted weights are large here, and float32 would round what is being compared
    mz.check_equivalent(model.eval(), mz.condense(model), images[:2].double())
    assert len(str(report).splitlines()) == 1 + len(report.layers)


def pointwise(name: str, module: nn.Conv2d) -> bool:
    """Leaves out what sees one position of an image or needs more images than a quick test has."""
    return module.in_channels <= 128 and not any(part in name for part in (".se.", "head"))


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "convnext_atto", "resnet26", "densenet121", "mobilenet_v2"])
def test_converted_networks(name):
    torch.manual_seed(0)
    source = torchvision.models.mobilenet_v2(num_classes=10) if name == "mobilenet_v2" else timm.create_model(name)
    model, report = mz.to_learned_group_conv(source.eval(), match=pointwise, input_size=(3, 64, 64))
    images = torch.randn(32, 3, 64, 64)
    pruned = mz.prune_groups(model, images)
    assert set(pruned.layers) == set(report.converted)
    assert is_finished(model)
    assert all(row.error <= row.magnitude_error for row in pruned.layers.values())
    images = images[:2].double()
    model.double()  # refitted weights are large where inputs depend on one another
    mz.check_equivalent(model, mz.condense(model), images)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "efficientnet_b0", "regnetx_002"])
def test_means_go_into_the_batchnorm_behind(name):
    """In a network with other convolutions, whose maps are freed while it runs, so that their ids are used again."""
    model, _ = mz.to_learned_group_conv(timm.create_model(name).eval(), match=pointwise, input_size=(3, 64, 64))
    modules = list(model.modules())
    images = torch.randn(32, 3, 64, 64)
    for layer_name, (_, _, norms) in pruning._survey(model, mz.learned_layers(model), [images]).items():
        layer = model.get_submodule(layer_name)
        behind = modules[modules.index(layer) + 1 :]
        expected = next(module for module in behind if isinstance(module, nn.BatchNorm2d))
        assert norms == ([expected] if layer.bias is None else [])


class Everything(nn.Module):
    """Strides, biases, BatchNorm, a layer that runs twice, and layers that run in another order than they are in."""

    def __init__(self):
        super().__init__()
        self.last = mz.LearnedGroupConv2d(32, 16, bias=True)
        self.shared = mz.LearnedGroupConv2d(32, 32)
        self.norms = nn.ModuleList([nn.BatchNorm2d(32), nn.BatchNorm2d(32)])
        self.again = mz.LearnedGroupConv2d(32, 32)
        self.strided = mz.LearnedGroupConv2d(16, 32, 2, 4, stride=2, bias=True)

    def forward(self, x):
        x = self.strided(x).relu()
        for norm in self.norms:
            x = x + norm(self.shared(x)).relu()
            x = x + self.again(x).relu_()
        return self.last(x)


def test_stride_bias_and_shared_layers():
    torch.manual_seed(0)
    model = Everything().double().eval()
    nn.init.normal_(model.strided.bias)
    dense, magnitude = copy.deepcopy(model), by_magnitude(model)
    images = correlated(40, 16, size=9).double()
    report = mz.prune_groups(model, images)
    assert list(report.layers) == ["strided", "shared", "again", "last"]
    assert relative_error(model, dense, images) < 0.5 * relative_error(magnitude, dense, images)
    assert not torch.equal(model.norms[0].running_mean, dense.norms[0].running_mean)
    assert torch.equal(model.norms[0].running_var, dense.norms[0].running_var)


def test_the_mean_output_stays():
    """Least squares with a bias leaves no mean error; without one, the BatchNorm behind the layer makes up for it."""
    torch.manual_seed(0)
    images = correlated(32, 16).double()
    learned = [mz.LearnedGroupConv2d(16, 8, bias=True), mz.LearnedGroupConv2d(16, 8)]
    for model in (nn.Sequential(learned[0]), nn.Sequential(learned[1], nn.BatchNorm2d(8))):
        model.double().eval()
        mean = model(images).mean((0, 2, 3))
        mz.prune_groups(model, images)
        torch.testing.assert_close(model(images).mean((0, 2, 3)), mean, rtol=0, atol=1e-2)


def reference_mask(x: torch.Tensor, y: torch.Tensor, groups: int, count: int) -> torch.Tensor:
    """Drops, one by one, the input without which the refitted group's squared error is least: by trying all."""
    mask = torch.ones(groups, x.shape[1], dtype=torch.bool)
    for kept, target in zip(mask, y.chunk(groups, 1), strict=True):
        while kept.sum() > count:
            errors = torch.full((len(kept),), torch.inf, dtype=x.dtype)
            for i in kept.nonzero()[:, 0]:
                trial = kept.clone()
                trial[i] = False
                solution = torch.linalg.lstsq(x[:, trial], target).solution
                errors[i] = (x[:, trial] @ solution - target).square().sum()
            kept[errors.argmin()] = False
    return mask


def test_each_step_drops_the_input_that_costs_least():
    torch.manual_seed(1)
    layer = mz.LearnedGroupConv2d(12, 8, 2, 3).double()
    images = correlated(50, 12, size=4).double()
    x = images.permute(0, 2, 3, 1).reshape(-1, 12)
    y = x @ layer.weight.detach().flatten(1).T
    row = mz.prune_groups(nn.Sequential(layer), images).layers["0"]
    assert torch.equal(layer.mask, reference_mask(x, y, 2, 4))
    kept = [torch.linalg.lstsq(x[:, m], t).solution.T for m, t in zip(layer.mask, y.chunk(2, 1), strict=True)]
    weight = torch.cat([rows[:, mask[mask]] for rows, mask in zip(kept, layer.mask, strict=True)])
    torch.testing.assert_close(mz.LearnedGroupConv2d.condense(layer).weight.flatten(1), weight, rtol=1e-2, atol=1e-3)
    error = (x @ layer.masked_weight().detach().flatten(1).T - y).square().mean(0).sum() / y.var(0).sum()
    assert row.error == pytest.approx(error.item(), rel=1e-3)


@pytest.mark.parametrize("size", [8, 16])
@pytest.mark.parametrize("shuffle", [False, True])
def test_enlarged_maps_are_seen_as_a_whole(size, shuffle):
    """What enlarges maps puts out other statistics at odd positions than at even ones."""
    torch.manual_seed(0)
    up = nn.Sequential(nn.Conv2d(8, 128, 1), nn.PixelShuffle(2)) if shuffle else nn.ConvTranspose2d(8, 32, 2, 2)
    model = nn.Sequential(up, nn.ReLU(), mz.LearnedGroupConv2d(32, 16, bias=True)).eval()
    dense, images = copy.deepcopy(model), torch.randn(40, 8, size, size)
    report = mz.prune_groups(model, images)
    assert relative_error(model, dense, images) == pytest.approx(report.layers["2"].error, rel=0.15)


def test_a_hook_on_the_layer_changes_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(mz.LearnedGroupConv2d(16, 8, bias=True))
    handle = model[0].register_forward_hook(lambda module, inputs, output: 2.0 * output)
    dense, images = copy.deepcopy(model), correlated(40, 16, size=4)
    report = mz.prune_groups(model, images)
    assert relative_error(model, dense, images) == pytest.approx(report.layers["0"].error, rel=0.05)
    with pytest.raises(ValueError, match="0: can't condense a layer with hooks"):
        mz.condense(model)
    handle.remove()
    mz.check_equivalent(model, mz.condense(model), images)


def test_a_parametrised_weight_is_refused():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(mz.LearnedGroupConv2d(16, 8)))
    with pytest.raises(ValueError, match="0: its weight is parametrised"):
        mz.prune_groups(model, torch.randn(8, 16, 4, 4))
    model = nn.Sequential(nn.utils.spectral_norm(mz.LearnedGroupConv2d(16, 8)))
    model(torch.randn(8, 16, 4, 4))
    with pytest.raises(ValueError, match="0: its weight is parametrised"):
        mz.prune_groups(model, torch.randn(8, 16, 4, 4))


def test_an_input_that_the_network_changes_stays():
    torch.manual_seed(0)

    class Normalising(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = mz.LearnedGroupConv2d(16, 8, bias=True)

        def forward(self, x):
            return self.layer(x.sub_(0.5).div_(0.25))

    model = Normalising()
    dense, images = copy.deepcopy(model), correlated(40, 16, size=4)
    before = images.clone()
    error = mz.prune_groups(model, images).layers["layer"].error
    assert torch.equal(images, before)
    mz.prune_groups(copy.deepcopy(dense), [images])
    assert torch.equal(images, before)
    normalised = (images - 0.5) / 0.25
    assert relative_error(model.layer, dense.layer, normalised) == pytest.approx(error, rel=0.05)


def test_finished_groups_are_refused_and_left_alone_by_a_schedule():
    model = mz.LearnedGroupConv2d(16, 8).prune_(4)
    weight, images = model.weight.clone(), correlated(8, 16)
    with pytest.raises(ValueError, match="no group reads more inputs than it is to keep"):
        mz.prune_groups(model, images)
    assert not mz.CondenseSchedule(model, images).step(1.0)
    assert torch.equal(model.weight, weight)


def test_dropped_inputs_stay_dropped():
    torch.manual_seed(0)
    layer = mz.LearnedGroupConv2d(16, 8)
    layer.mask[0, :14] = False  # fewer than it may keep
    layer.mask[1, 3:8] = False
    before = layer.mask.clone()
    report = mz.prune_groups(nn.Sequential(layer), correlated(8, 16), inputs=4)
    assert report.layers["0"].inputs == (2, 4, 4, 4)
    assert not (layer.mask & ~before).any()
    assert layer.masked_weight().equal(layer.weight)


def test_the_number_of_threads_changes_nothing():
    torch.manual_seed(0)
    before, images, weights = torch.get_num_threads(), torch.randn(8, 288, 8, 8), []
    layer = mz.LearnedGroupConv2d(288, 64)
    try:
        for threads in (before, 2):
            torch.set_num_threads(threads)
            pruned = copy.deepcopy(layer)
            mz.prune_groups(pruned, images)
            weights.append(pruned.masked_weight())
    finally:
        torch.set_num_threads(before)
    assert torch.allclose(*weights, atol=1e-6)
    with torch.no_grad():
        assert (layer(images) - pruned(images)).square().mean() < layer(images).square().mean()


def test_sharing_makes_groups_agree():
    torch.manual_seed(0)
    models = [nn.Sequential(mz.LearnedGroupConv2d(64, 64))]
    models += [copy.deepcopy(models[0]) for _ in range(2)]
    images = torch.randn(32, 64, 6, 8)
    strengths = (0.0, 2.0, 1000.0)
    errors = [mz.prune_groups(m, images, sharing=s).layers["0"].error for m, s in zip(models, strengths, strict=True)]
    assert errors[0] < errors[1]
    read = [model[0].mask.any(0).sum().item() for model in models]
    assert 16 <= read[2] <= read[1] < read[0]
    assert all(map(is_finished, models))


def test_batches_teacher_and_half_precision():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(16, 32, 1), nn.ReLU(), nn.Conv2d(32, 8, 1))
    images = correlated(20, 16)
    learned, _ = mz.to_learned_group_conv(dense, input_size=(16, 6, 8))
    models = [copy.deepcopy(learned) for _ in range(3)]
    mz.prune_groups(models[0], images)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, torch.zeros(20)), batch_size=7)
    state = torch.get_rng_state()
    mz.prune_groups(models[1], loader, teacher=dense)
    assert torch.equal(torch.get_rng_state(), state)  # from which a DataLoader draws
    assert dense.training
    mz.prune_groups(models[2].bfloat16(), images)
    for index in (0, 2):
        assert torch.equal(models[0][index].mask, models[1][index].mask)
        torch.testing.assert_close(models[0][index].weight, models[1][index].weight, rtol=1e-3, atol=1e-4)
    assert models[2][0].weight.dtype == torch.bfloat16
    assert relative_error(models[2].float(), dense, images) < 1.2 * relative_error(models[0], dense, images)


@pytest.mark.parametrize("sizes", [[1064], [1, 1063], [8, 1056]])
def test_how_images_are_batched_does_not_matter(sizes):
    """A layer with few inputs looks at a part of the images, which is counted in images and not in batches."""
    torch.manual_seed(0)
    model = nn.Sequential(mz.LearnedGroupConv2d(64, 64))
    dense, images = copy.deepcopy(model), correlated(1064, 64, size=4)
    report = mz.prune_groups(model, images.split(sizes))
    assert relative_error(model, dense, images) == pytest.approx(report.layers["0"].error, rel=0.02)


class ConditionalNorm(nn.BatchNorm2d):
    def forward(self, x, shift):
        return super().forward(x) + shift


@pytest.mark.parametrize("change", ["activation", "sum", "residual", "view", "condition"])
def test_a_map_that_more_than_the_norm_reads_keeps_the_running_mean(change):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = mz.LearnedGroupConv2d(16, 16)
            self.norm = (ConditionalNorm if change == "condition" else nn.BatchNorm2d)(16)

        def forward(self, x):
            y = self.layer(x=x)
            if change == "condition":
                return self.norm(y, 1.0)
            if change == "residual":
                return y + self.norm(y)
            if change == "view":
                return y.flatten(2).mean(2, keepdim=True).unsqueeze(3) * self.norm(y)
            return self.norm(y.relu_() if change == "activation" else y.add_(x))

    torch.manual_seed(0)
    model = Net().eval()
    mz.prune_groups(model, correlated(32, 16))
    assert not model.norm.running_mean.any()


@pytest.mark.parametrize(("scale", "autocast"), [(1.0, True), (2.0**-14, False), (2.0**14, False)])
def test_neither_autocast_nor_scale_matter(scale, autocast):
    torch.manual_seed(0)
    images = correlated(32, 64)
    models = [nn.Sequential(mz.LearnedGroupConv2d(64, 32, bias=True))]
    models.append(copy.deepcopy(models[0]))
    errors = [mz.prune_groups(models[0], images).layers["0"].error]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        errors.append(mz.prune_groups(models[1], images * scale).layers["0"].error)
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


def test_an_error_changes_nothing():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(16)
    norm.running_var.fill_(-1.0)  # the second layer's inputs aren't finite
    model = nn.Sequential(mz.LearnedGroupConv2d(16, 16), norm, mz.LearnedGroupConv2d(16, 16))
    before, schedule = copy.deepcopy(model.state_dict()), mz.CondenseSchedule(model, correlated(32, 16))
    with pytest.raises(ValueError, match="not finite"):
        schedule.step(1.0)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    norm.running_var.fill_(1.0)
    assert schedule.step(1.0)
    assert is_finished(model)
    model = nn.Sequential(mz.LearnedGroupConv2d(16, 16), mz.LearnedGroupConv2d(16, 16))
    nn.init.constant_(model[1].weight, torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        mz.CondenseSchedule(model).step(1.0)
    assert model[0].mask.all()
    with pytest.raises(ValueError, match="only once"):
        mz.CondenseSchedule(model, (image for image in [torch.randn(8, 16, 4, 4)]))


def test_the_model_itself_as_its_teacher():
    torch.manual_seed(0)
    models = [Everything().eval()]
    models.append(copy.deepcopy(models[0]))
    images = correlated(40, 16, size=9)
    mz.prune_groups(models[0], images)
    mz.prune_groups(models[1], images, teacher=models[1])
    for one, other in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_schedule_prunes_with_images():
    torch.manual_seed(0)
    model = Everything().eval()
    dense, magnitude, images = copy.deepcopy(model), by_magnitude(model), correlated(40, 16, size=9)
    schedule = mz.CondenseSchedule(model, images)
    assert [schedule.step(progress) for progress in (0.1, 1 / 6, 0.3, 0.5, 1.0)] == [False, True, False, True, False]
    assert is_finished(model)
    assert relative_error(model, dense, images) < 0.5 * relative_error(magnitude, dense, images)


class Once:
    def __init__(self, *batches: torch.Tensor):
        self.batches = iter(batches)

    def __iter__(self):
        return self.batches


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(model=nn.Conv2d(16, 8, 1)), "no LearnedGroupConv2d"),
        (
            dict(images=torch.randn(1, 16, 1, 3)),
            "1 images are too few for the 16 inputs of 0: give at least 6,",
        ),
        (dict(images=torch.full((8, 16, 4, 4), torch.nan)), "not finite"),
        (dict(images=torch.zeros(8, 16, 4, 4, dtype=torch.uint8)), "floating-point"),
        (dict(images=torch.randn(16, 4, 4)), "floating-point"),
        (dict(images=[]), "no images"),
        (dict(images=torch.randn(0, 16, 4, 4)), "no images"),
        (dict(images=iter([torch.randn(8, 16, 4, 4)])), "only once"),
        (dict(images=42), "a list of batches or a DataLoader, not int"),
        (dict(images=Once(torch.randn(8, 16, 4, 4))), "only once"),
        (dict(inputs=17), "0: inputs must be in 1...16, not 17"),
        (dict(inputs=lambda layer: 0), "not 0"),
        (dict(inputs=lambda layer: layer.in_channels / 3), "not 5.33"),
        (dict(images=[{"pixel_values": torch.randn(8, 16, 4, 4)}]), "or tuples"),
        (dict(teacher=nn.ReLU()), "teacher has no layer 0"),
        (dict(teacher=nn.Sequential(nn.Conv2d(16, 4, 1))), "another shape"),
        (dict(sharing=-1.0), "sharing must be 0 or larger"),
    ],
)
def test_bad_arguments(arguments, message):
    model = nn.Sequential(mz.LearnedGroupConv2d(16, 8))
    arguments = dict(model=model, images=torch.randn(8, 16, 4, 4)) | arguments
    with pytest.raises(ValueError, match=message) as error:
        mz.prune_groups(**arguments)
    assert "\n" not in str(error.value)
    assert model[0].mask.all()


def test_two_processes_agree():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, "distributed_pruning.py"],
        cwd=ROOT / "tests",
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("pruned alike") == 2


def test_a_weight_of_two_layers_is_refused():
    model = nn.Sequential(mz.LearnedGroupConv2d(16, 16), mz.LearnedGroupConv2d(16, 16))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="share a weight"):
        mz.prune_groups(model, torch.randn(32, 16, 4, 4))


@pytest.mark.slow
@pytest.mark.cifar100
def test_most_of_the_accuracy_stays(cifar100):
    dense = timm.create_model("mobilenetv2_cifar100", pretrained=True)
    model = timm.create_model("mobilenetv2_lgc_proj_cifar100")
    model.load_state_dict(mz.pretrained.checkpoint_filter_fn(dense.state_dict(), model))
    train, test = (mz.data.load_images(cifar100, split) for split in ("train", "test"))
    mean, std = dense.pretrained_cfg["mean"], dense.pretrained_cfg["std"]
    mz.prune_groups(model, preprocess(torch.from_numpy(train.images[:128]), mean, std))
    unseen = test.subset(slice(1000))
    assert mz.evaluation.evaluate(model, unseen).top1 > 0.65 * mz.evaluation.evaluate(dense, unseen).top1
