"""The GPU training layers against PyTorch's, run by Triton's interpreter on the CPU."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

pytest.importorskip("triton")

PROGRAM = """
import copy, mobilenets_zoo, timm, torch
from torch.nn import functional as F
from training.fused_layers import batch_norm_act, depthwise_conv3x3, fuse_layers

torch.manual_seed(0)
for channels, size, count in ((24, 7, 3), (144, 4, 2), (100, 5, 2)):
    x = (torch.randn(count, channels, size, size) * 2 + 0.5).to(memory_format=torch.channels_last).requires_grad_()
    grad = torch.randn(count, channels, size, size)
    weight, bias = (torch.rand(channels) + 0.5).requires_grad_(), torch.randn(channels).requires_grad_()
    for relu6 in (True, False):
        ours, theirs = ([torch.zeros(channels), torch.ones(channels)] for _ in range(2))
        y = batch_norm_act(x, weight, bias, *ours, 0.1, 1e-5, relu6)
        z = F.batch_norm(x, *theirs, weight, bias, True, 0.1, 1e-5)
        z = F.relu6(z) if relu6 else z
        torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours, theirs)
        for a, b in zip(*(torch.autograd.grad(out, (x, weight, bias), grad) for out in (y, z))):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    kernel = torch.randn(channels, 1, 3, 3, requires_grad=True)
    y, z = depthwise_conv3x3(x, kernel), F.conv2d(x, kernel, padding=1, groups=channels)
    torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-4)
    for a, b in zip(*(torch.autograd.grad(out, (x, kernel), grad) for out in (y, z))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

plain = timm.create_model("mobilenetv2_lgc_gc_cifar100", width_mult=0.25, num_classes=10).train()
fused = fuse_layers(copy.deepcopy(plain))
assert list(fused.state_dict()) == list(plain.state_dict())
x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
for _ in ("training", "inference"):
    a, b = plain(x), fused(x)
    assert (a - b).abs().max() <= 1e-4 * a.abs().max()
    plain.eval(), fused.eval()
"""


def test_fused_layers_agree_with_pytorch():
    """In a process of its own: Triton decides at import whether it interprets."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT)])
    result = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-3000:]
