"""The fast path of folded convolutions: the same outputs, never a stale weight, and out of the way elsewhere."""

import copy

import pytest
import timm
import torch
from conftest import with_lively_statistics, with_random_masks
from torch.nn import functional as F

import mobilenets_zoo as mz
from mobilenets_zoo.inference import folded_conv
from mobilenets_zoo.inference.folded_conv import FoldedConv2d
from mobilenets_zoo.inference.rewrites import Convolution

pytestmark = pytest.mark.skipif(
    not folded_conv.fused_convolution_works(), reason="this PyTorch has no fused oneDNN convolution"
)


def layer(
    inputs: int, outputs: int, groups: int = 1, kernel: int = 1, stride: int = 1, gather: bool = False
) -> FoldedConv2d:
    torch.manual_seed(inputs)
    per_group = inputs // groups
    index = torch.cat([torch.randperm(inputs)[:per_group] for _ in range(groups)]) if gather else None
    weight = torch.randn(outputs, per_group, kernel, kernel)
    return FoldedConv2d(Convolution(weight, torch.randn(outputs), groups, stride, index), act=True)


def expected(conv: FoldedConv2d, x: torch.Tensor) -> torch.Tensor:
    if conv.index is not None:
        x = x[:, conv.index]
    return F.relu6(F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, groups=conv.groups))


LAYERS = {
    "dense": dict(inputs=24, outputs=40),
    "strided": dict(inputs=3, outputs=32, kernel=3, stride=2),
    "depthwise": dict(inputs=48, outputs=48, groups=48, kernel=3),
    "grouped": dict(inputs=32, outputs=48, groups=4),
    "gather that pays": dict(inputs=64, outputs=1024, groups=4, gather=True),
    "gather that doesn't": dict(inputs=64, outputs=32, groups=4, gather=True),
}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_every_shape_gets_the_same_result(kind, memory_format):
    conv = layer(**LAYERS[kind])
    for batch, size in ((1, 8), (5, 8), (2, 13), (1, 1)):
        x = torch.randn(batch, LAYERS[kind]["inputs"], size, size).to(memory_format=memory_format)
        assert conv._takes_fused(x)
        torch.testing.assert_close(conv(x), expected(conv, x), atol=1e-4, rtol=1e-4)
    assert (conv._reordered.index is not None) == (kind == "gather that pays")


@torch.no_grad()
def test_weights_are_reordered_for_each_size_but_not_for_each_batch():
    conv = layer(64, 96)

    def reordered_for(*shape: int) -> folded_conv.ReorderedWeight:
        conv(torch.randn(shape))
        return conv._reordered

    first = reordered_for(1, 64, 8, 8)
    assert reordered_for(3, 64, 8, 8) is first
    second = reordered_for(1, 64, 4, 8)
    assert (first.size, second.size) == ((8, 8), (4, 8))


@torch.no_grad()
def test_new_values_are_seen():
    conv = layer(64, 96, groups=4, gather=True)
    x = torch.randn(2, 64, 6, 6)

    def check(message: str) -> None:
        torch.testing.assert_close(conv(x), expected(conv, x), atol=1e-4, rtol=1e-4, msg=message)

    check("at first")
    conv.weight.mul_(-2.0)
    check("written in place")
    conv.load_state_dict(layer(64, 96, groups=4, gather=True).state_dict())
    check("loaded")
    conv.weight = torch.nn.Parameter(torch.randn_like(conv.weight), requires_grad=False)
    check("replaced")
    conv.index.copy_(conv.index.flip(0))
    check("index written in place")
    conv.double().float()
    check("moved")
    twin = copy.deepcopy(conv)
    twin.weight.zero_()
    torch.testing.assert_close(twin(x), expected(twin, x))
    check("copied")


def test_what_it_cannot_do_takes_the_plain_path(monkeypatch):
    conv = layer(64, 96, groups=4, gather=True)
    x = torch.randn(2, 64, 6, 6, requires_grad=True)
    conv(x).sum().backward()
    assert x.grad is not None
    x = x.detach()
    assert conv._takes_fused(x)
    assert not conv._takes_fused(x.double())
    assert not conv._takes_fused(x[:0])
    assert conv(x[:0]).shape == (0, 96, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert not conv._takes_fused(x)
        assert torch.isfinite(conv(x)).all()
    with torch.backends.mkldnn.flags(enabled=False):
        assert not conv._takes_fused(x)
        torch.testing.assert_close(conv(x), expected(conv, x), atol=1e-4, rtol=1e-4)

    def missing(*_):
        raise AttributeError

    folded_conv.fused_convolution_works.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch.ops.mkldnn, "_convolution_pointwise", missing)
        assert not conv._takes_fused(x)
        torch.testing.assert_close(conv(x), expected(conv, x), atol=1e-4, rtol=1e-4)
        folded_conv.fused_convolution_works.cache_clear()
    assert conv._takes_fused(x)


@torch.no_grad()
def test_compilers_and_exporters_see_standard_operators():
    torch.manual_seed(0)
    model = with_lively_statistics(with_random_masks(timm.create_model("mobilenetv2_lgc_cifar100"), 0), 0)
    network = mz.optimize_for_inference(model)
    x = torch.randn(2, 3, 32, 32)
    logits = network(x)
    graphs = {
        "trace": str(torch.jit.trace(network, x).inlined_graph),
        "export": str(torch.export.export(network, (x,)).graph),
    }
    for graph in graphs.values():
        assert "conv" in graph
        assert "_convolution_pointwise" not in graph
    traced = torch.jit.trace(network, x)(x)
    torch.testing.assert_close(traced, logits, atol=1e-3, rtol=1e-3)


def test_networks_made_in_inference_mode_run_there():
    conv = layer(8, 16)
    x = torch.randn(1, 8, 4, 4)
    with torch.inference_mode():
        inner = layer(8, 16)
        torch.testing.assert_close(inner(x), conv(x))
