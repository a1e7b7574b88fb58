"""Normalised convolutions: equal outputs, weights of norm 1, variances that half precision holds."""

import copy

import pytest
import timm
import torch
from conftest import ALL_MODELS, LGC_MODELS

import mobilenets_zoo as mz
from mobilenets_zoo.normalisation import normalise_

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 4 - 2


@pytest.mark.parametrize(("name", "options"), [(n, {}) for n in ALL_MODELS] + [(LGC_MODELS[0], {"condensed": True})])
def test_logits_stay_and_norms_are_one(name, options):
    model = timm.create_model(name, pretrained=True, **options).eval()
    normalised = normalise_(copy.deepcopy(model))
    mz.check_equivalent(model, normalised, IMAGES)
    exact = normalise_(copy.deepcopy(model).double())
    mz.check_equivalent(model.double(), exact, IMAGES.double())
    for module in normalised.modules():
        if hasattr(module, "bn"):
            conv = module.conv
            weight = conv.masked_weight() if isinstance(conv, mz.LearnedGroupConv2d) else conv.weight
            alive = module.bn.running_var > 1e-3
            assert torch.allclose(weight.detach().flatten(1).norm(dim=1)[alive], torch.ones(1), atol=1e-4)
            assert module.bn.running_var.max() < 65504


def test_channels_without_variance_stay():
    model = timm.create_model("mobilenetv1_w025_cifar100").eval()
    model.stem.bn.running_var[0] = 0.0
    before = copy.deepcopy(model.stem)
    normalise_(model)
    assert torch.equal(model.stem.conv.weight[0], before.conv.weight[0])
    assert model.stem.bn.running_var[0] == 0
    assert not torch.equal(model.stem.conv.weight[1], before.conv.weight[1])
