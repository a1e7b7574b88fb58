"""The CPU training layers against PyTorch's."""

import copy
import functools

import pytest
import timm
import torch
from torch.nn import functional as F
from training import cpu_layers
from training.cpu import adapt_layers
from training.cpu_layers import batch_norm_act, depthwise_conv3x3, kernels

needs_compiler = pytest.mark.skipif(not kernels(), reason="no C compiler")


def reference(x, weight, bias, mean, var, momentum, eps, relu6):
    y = F.batch_norm(x, mean, var, weight, bias, True, momentum, eps)
    return F.relu6(y) if relu6 else y


@needs_compiler
@pytest.mark.parametrize("relu6", [True, False])
@pytest.mark.parametrize(("count", "channels", "size"), [(4, 16, 8), (3, 24, 7), (2, 144, 4), (5, 101, 9), (2, 1, 1)])
def test_batch_norm_act_agrees_with_pytorch(count, channels, size, relu6):
    torch.manual_seed(0)
    # Values around 50 show what a variance loses to cancellation.
    x = (torch.randn(count, channels, size, size) * 2 + 50).requires_grad_()
    weight, bias = (torch.rand(channels) + 0.5).requires_grad_(), (torch.randn(channels) + 1).requires_grad_()
    grad = torch.randn_like(x)
    results = []
    for function, dtype in ((batch_norm_act, torch.float32), (reference, torch.float64)):
        statistics = [torch.zeros(channels, dtype=dtype), torch.ones(channels, dtype=dtype)]
        inputs = [t.to(dtype) for t in (x, weight, bias)]
        y = function(*inputs, *statistics, 0.1, 1e-5, relu6)
        gradients = torch.autograd.grad(y, (x, weight, bias), grad.to(dtype))
        results.append([t.to(torch.float32) for t in (y, *statistics, *gradients)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-4)


@needs_compiler
def test_bfloat16_is_as_close_to_float32_as_pytorch_is():
    torch.manual_seed(0)
    x = (torch.randn(8, 40, 6, 6) * 2 + 1).bfloat16().requires_grad_()
    weight, bias = (torch.rand(40) + 0.5).requires_grad_(), torch.randn(40).requires_grad_()
    grad = torch.randn(8, 40, 6, 6).bfloat16()

    def run(function, dtype):
        y = function(x.to(dtype), weight, bias, torch.zeros(40), torch.ones(40), 0.1, 1e-5, False)
        assert y.dtype == dtype
        return [y, *torch.autograd.grad(y, (x, weight, bias), grad.to(dtype))]

    exact = run(reference, torch.float32)
    for ours, theirs, true in zip(run(batch_norm_act, x.dtype), run(reference, x.dtype), exact, strict=True):
        error, allowed = (ours.float() - true).abs().max(), (theirs.float() - true).abs().max()
        assert error <= 1.1 * allowed + 1e-3


@needs_compiler
def test_threads_and_layouts_change_nothing():
    torch.manual_seed(0)
    weight, bias = torch.rand(24), torch.randn(24)
    x, grad = torch.randn(2, 3, 24, 19, 19)
    results = []
    threads = torch.get_num_threads()
    try:
        for count, layout in ((1, torch.contiguous_format), (3, torch.contiguous_format), (2, torch.channels_last)):
            torch.set_num_threads(count)
            leaf = x.contiguous(memory_format=layout).requires_grad_()
            y = batch_norm_act(leaf, weight, bias, torch.zeros(24), torch.ones(24), 0.1, 1e-5, True)
            assert y.is_contiguous(memory_format=torch.channels_last)
            results.append((y, *torch.autograd.grad(y, leaf, grad.contiguous(memory_format=layout))))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@needs_compiler
def test_not_a_number_stays_visible():
    x = torch.randn(2, 4, 3, 3)
    x[0, 1, 0, 0] = float("nan")
    y = batch_norm_act(x, torch.ones(4), torch.zeros(4), torch.zeros(4), torch.ones(4), 0.1, 1e-5, True)
    assert y[:, 1].isnan().all()
    assert not y[:, [0, 2, 3]].isnan().any()


@needs_compiler
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("shape", "stride"),
    [((4, 16, 8, 8), 1), ((3, 32, 7, 9), 1), ((3, 48, 7, 9), 2), ((2, 16, 8, 6), 2), ((2, 16, 10, 8), 3)],
)
def test_depthwise_conv3x3_agrees_with_pytorch(shape, stride, threads):
    torch.manual_seed(0)
    x, weight = torch.randn(shape).bfloat16().requires_grad_(), torch.randn(shape[1], 1, 3, 3, requires_grad=True)
    exact = F.conv2d(x.double(), weight.double(), None, stride, 1, groups=shape[1])
    grad = torch.randn(exact.shape).bfloat16()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = depthwise_conv3x3(x, weight, stride)
        gradients = torch.autograd.grad(y, (x, weight), grad)
    finally:
        torch.set_num_threads(before)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact, rtol=2e-2, atol=5e-2)
    for ours, theirs, tolerance in zip(
        gradients, torch.autograd.grad(exact, (x, weight), grad.double()), (5e-3, 1e-5), strict=True
    ):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=tolerance, atol=tolerance)


def test_a_network_in_bfloat16_takes_the_layers(monkeypatch):
    """And learns nearly the same: the gradients of both point the same way."""
    torch.manual_seed(0)
    plain = timm.create_model("mobilenetv1_w050_cifar100", num_classes=10).to(memory_format=torch.channels_last).train()
    adapted = copy.deepcopy(plain)
    calls = []
    if kernels():
        monkeypatch.setattr("training.cpu.depthwise_conv3x3", lambda *a: (calls.append(a), depthwise_conv3x3(*a))[1])
    adapt_layers(adapted)
    x, gradients = torch.randn(16, 3, 32, 32), []
    for model in (plain, adapted):
        with torch.autocast("cpu", torch.bfloat16):
            model(x).square().sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert len(calls) == (13 if kernels() else 0)
    assert F.cosine_similarity(*gradients, dim=0) > 0.9


@pytest.mark.parametrize("name", ["mobilenetv1_w025_cifar100", "mobilenetv2_gc_cifar100", "mobilenetv2_lgc_cifar100"])
@pytest.mark.parametrize("compiler", ["cc", "no-such-compiler"])
def test_adapted_networks_learn_the_same(name, compiler, monkeypatch, capsys):
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setattr("training.cpu.kernels", functools.cache(cpu_layers.kernels.__wrapped__))
    torch.manual_seed(0)
    plain = timm.create_model(name, width_mult=0.5, num_classes=10).to(memory_format=torch.channels_last).train()
    adapted, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    adapt_layers(adapted)
    assert ("slower layers" in capsys.readouterr().err) == (compiler != "cc" or not kernels())
    assert list(adapted.state_dict()) == list(plain.state_dict())
    x, gradients = torch.randn(8, 3, 32, 32), []
    for model in (plain, adapted, exact):
        model(x.to(model.get_classifier().weight.dtype)).square().sum().backward()
        gradients.append(torch.cat([parameter.grad.double().flatten() for parameter in model.parameters()]))
    # Rounding opens or closes a ReLU6 here and there, so that neither is close to what doubles give.
    allowed, error = ((gradient - gradients[2]).norm() / gradients[2].norm() for gradient in gradients[:2])
    assert error <= 2 * allowed + 1e-3
    assert error < 0.1
    torch.testing.assert_close(adapted.eval()(x), plain.eval()(x), rtol=1e-3, atol=1e-3)
