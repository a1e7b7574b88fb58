"""The learned layer and its condensed form, on weights and masks that hypothesis draws."""

import copy
import math

import pytest
import torch
from conftest import with_random_masks
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.utils import reparameterize_model
from torch import nn
from torch.nn import functional as F

import mobilenets_zoo as mz
from mobilenets_zoo.lgc.layers import condense_weight, expand_weight

settings.register_profile("zoo", deadline=None, max_examples=25)
settings.load_profile("zoo")


@st.composite
def layers(draw: st.DrawFn) -> mz.LearnedGroupConv2d:
    """Layers in float64 of any shape with random weights and a random finished mask."""
    groups = draw(st.sampled_from([1, 2, 3, 4, 8]))
    condense_factor = draw(st.sampled_from([1, 2, 3, 4, 8]))
    in_channels = condense_factor * draw(st.integers(1, 24))
    out_channels = groups * draw(st.integers(1, 40))
    seed = draw(st.integers(0, 2**31))
    torch.manual_seed(seed)
    layer = mz.LearnedGroupConv2d(in_channels, out_channels, groups, condense_factor, dtype=torch.float64)
    return with_random_masks(layer, seed)


def pruned(in_channels: int = 16, out_channels: int = 8, groups: int = 4, condense_factor: int = 4):
    torch.manual_seed(0)
    layer = mz.LearnedGroupConv2d(in_channels, out_channels, groups, condense_factor)
    return layer.prune_(in_channels // condense_factor)


@given(layer=layers(), batch=st.integers(0, 3), size=st.tuples(st.integers(1, 9), st.integers(1, 9)))
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_condensed_equals_masked(layer, batch, size, memory_format):
    x = torch.randn(batch, layer.in_channels, *size, dtype=torch.float64).to(memory_format=memory_format)
    condensed = layer.condense()
    if batch:
        assert mz.check_equivalent(layer, condensed, x) <= 1e-12
    assert condensed(x).shape == layer(x).shape
    standard = F.conv2d(x[:, condensed.index], condensed.weight, groups=layer.groups)
    torch.testing.assert_close(condensed(x), standard, rtol=1e-12, atol=1e-12)
    if batch:
        assert mz.check_equivalent(layer.float(), condensed.float(), x.float()) <= 1e-5


@given(layer=layers())
def test_condense_and_expand_are_inverse(layer):
    weight, index = condense_weight(layer.weight.detach(), layer.mask, layer.condense_factor)
    dense, mask = expand_weight(weight, index, layer.groups, layer.in_channels)
    assert torch.equal(mask, layer.mask)
    assert torch.equal(dense, layer.masked_weight())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("channels", "outputs"), [((64, 64), 384), ((576, 160), 160), ((192, 32), 32)])
def test_output_keeps_its_layout_and_gradients(channels, outputs, memory_format):
    """Covers the wide form that gathers and the narrow one that spreads the weight."""
    layer = with_random_masks(mz.LearnedGroupConv2d(channels[0], outputs, dtype=torch.float64))
    condensed = layer.condense()
    x = torch.randn(2, channels[0], 8, 8, dtype=torch.float64).to(memory_format=memory_format)
    x_condensed = x.clone().requires_grad_()
    x_masked = x.clone().requires_grad_()
    out = condensed(x_condensed)
    assert out.is_contiguous(memory_format=memory_format)
    out.square().sum().backward()
    layer(x_masked).square().sum().backward()
    torch.testing.assert_close(x_condensed.grad, x_masked.grad)
    kept, _ = condense_weight(layer.weight.grad, layer.mask, 4)
    torch.testing.assert_close(condensed.weight.grad, kept)


def test_training_leaves_state_alone_and_dropped_weights_without_gradient():
    layer = pruned()
    before = copy.deepcopy(layer.state_dict())
    layer(torch.randn(2, 16, 4, 4)).square().sum().backward()
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())
    gradient = layer.weight.grad.reshape(4, 2, 16)
    assert (gradient[~layer.mask[:, None].expand_as(gradient)] == 0).all()
    assert (gradient[layer.mask[:, None].expand_as(gradient)] != 0).all()


def test_prune_drops_the_least_important_inputs_of_each_group():
    """By absolute value; ties keep the lower index; a dropped input never returns, a kept zero may stay."""
    rows = [[4.0, -3, 2, 1], [1, 2, -3, 4], [1, 1, 1, 1], [0, 9, 9, 9]]
    layer = mz.LearnedGroupConv2d(4, 4, groups=4, condense_factor=4)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(rows).reshape(4, 4, 1, 1))
    layer.mask[3] = torch.tensor([True, False, False, True])
    layer.prune_(2)
    assert layer.mask.int().tolist() == [[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 0, 0], [1, 0, 0, 1]]


@given(layer=layers(), first=st.integers(1, 200), second=st.integers(1, 200))
def test_prune_keeps_the_count_and_never_revives(layer, first, second):
    layer.mask.fill_(True)
    first, second = (1 + count % layer.in_channels for count in (first, second))
    layer.prune_(first)
    before = layer.mask.clone()
    assert (before.sum(1) == first).all()
    layer.prune_(second)
    assert (layer.mask.sum(1) == min(first, second)).all()
    assert (before | ~layer.mask).all()


def test_prune_rejects_impossible_counts_and_weights_that_are_not_finite():
    layer = mz.LearnedGroupConv2d(16, 8)
    for count in (0, -1, 17):
        with pytest.raises(ValueError, match=r"1\.\.\.16"):
            layer.prune_(count)
    nn.init.constant_(layer.weight[0, 0], math.nan)
    with pytest.raises(ValueError, match="not finite"):
        layer.prune_(4)
    assert layer.mask.all()


@pytest.mark.parametrize("cls", [mz.LearnedGroupConv2d, mz.CondensedConv2d])
@pytest.mark.parametrize(("arguments", "message"), [((10, 8, 4, 4), "10.*4"), ((16, 10, 4, 4), "10.*4"), ((0, 8), "1")])
def test_channels_must_divide(cls, arguments, message):
    with pytest.raises(ValueError, match=message):
        cls(*arguments)


@pytest.mark.parametrize("keep", [16, 8, 3])
def test_condense_rejects_unfinished_masks_and_names_the_counts(keep):
    layer = mz.LearnedGroupConv2d(16, 8).prune_(keep)
    with pytest.raises(ValueError, match=rf"\[{keep}, {keep}, {keep}, {keep}\] of 16.*16/4"):
        layer.condense()
    layer = pruned()
    layer.mask[2, layer.mask[2].nonzero()[0]] = False
    with pytest.raises(ValueError, match=r"\[4, 4, 3, 4\]"):
        layer.condense()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_condense_keeps_dtype_training_flag_and_requires_grad(dtype, training):
    layer = pruned().to(dtype).train(training)
    layer.weight.requires_grad_(False)
    condensed = layer.condense()
    assert condensed.weight.dtype == dtype
    assert condensed.training is training
    assert not condensed.weight.requires_grad
    assert condensed.weight.shape == (8, 4, 1, 1)
    assert condensed.index.dtype == torch.int64
    assert condensed.index.shape == (16,)


def test_fuse_makes_timm_condense():
    model = nn.Sequential(pruned(), nn.ReLU()).eval()
    fused = reparameterize_model(model)
    assert isinstance(fused[0], mz.CondensedConv2d)
    assert isinstance(model[0], mz.LearnedGroupConv2d)


def test_group_lasso_is_the_sum_of_block_norms():
    layer = pruned()
    expected = sum(layer.weight[2 * g : 2 * g + 2, j].norm() for g in range(4) for j in range(16) if layer.mask[g, j])
    torch.testing.assert_close(layer.group_lasso(), expected)
    nn.init.zeros_(layer.weight)
    layer.group_lasso().backward()
    assert torch.isfinite(layer.weight.grad).all()


def test_hoyer_index_at_its_ends_and_between():
    layer = mz.LearnedGroupConv2d(4, 4, groups=4)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[5.0, 0, 0, 0], [2, 2, 2, 2], [0, 0, 0, 0], [3, 4, 0, 0]]).reshape(4, 4, 1, 1))
    expected = torch.tensor([1.0, 0.0, 0.0, (2 - 7 / 5) / (2 - 1)])
    torch.testing.assert_close(layer.hoyer_index(), expected)


@given(layer=layers())
def test_hoyer_index_ignores_scale_and_stays_in_range(layer):
    index = layer.hoyer_index()
    assert index.shape == (layer.groups,)
    assert ((index >= 0) & (index <= 1)).all()
    with torch.no_grad():
        layer.weight.mul_(7.0)
    torch.testing.assert_close(layer.hoyer_index(), index)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.full((16,), 16), r"outside 0\.\.\.15"),
        (torch.full((16,), -1), r"outside 0\.\.\.15"),
        (torch.zeros(16, dtype=torch.int64), "twice"),
        (torch.zeros(16), "integers"),
        (torch.arange(8), "shape|size"),
    ],
)
def test_a_bad_index_is_refused_on_loading(index, message):
    layer = mz.CondensedConv2d(16, 8)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict({**layer.state_dict(), "index": index})
    assert torch.equal(layer.index, before["index"])


def test_unbatched_and_strided_inputs_work():
    layer = pruned()
    condensed = layer.condense()
    unbatched = torch.randn(16, 5, 7)
    torch.testing.assert_close(condensed(unbatched), layer(unbatched))
    strided = torch.randn(2, 16, 10, 14)[:, :, ::2, ::2]
    torch.testing.assert_close(condensed(strided), layer(strided))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_traced_layer_takes_any_batch(memory_format):
    layer = mz.CondensedConv2d(64, 384).eval()
    images = torch.randn(3, 64, 5, 5).to(memory_format=memory_format)
    traced = torch.jit.trace(layer, images[:2])
    mz.check_equivalent(layer, traced, images)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_condensed_layer_under_autocast(memory_format):
    layer = mz.LearnedGroupConv2d(64, 256, 4, 4, bias=True).prune_(16)
    x = torch.randn(2, 64, 8, 8).to(memory_format=memory_format)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == layer.condense()(x).dtype == torch.bfloat16
        assert mz.check_equivalent(layer, layer.condense(), x) <= 5e-2
