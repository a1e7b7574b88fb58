"""Fixtures and helpers that several test files share."""

import io
import os
import sys
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores; threads that wait for one another would slow all of them. Read when torch is imported.
    os.environ["OMP_NUM_THREADS"] = "1"

import timm
import torch
from torch import nn

import mobilenets_zoo as mz
import mobilenets_zoo_cli as cli

ALL_MODELS = timm.list_models("*_cifar100")
LGC_MODELS = [name for name in ALL_MODELS if "lgc" in name]
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def cifar100() -> Path:
    """The data set's folder; a test that needs it fails, not skips, where the variable is set wrongly."""
    folder = os.environ.get("MOBILENETS_ZOO_CIFAR100")
    if not folder:
        pytest.skip("set MOBILENETS_ZOO_CIFAR100 to the data set's folder")
    return Path(folder)


@pytest.fixture(scope="session")
def test_images(cifar100) -> mz.data.ImageSet:
    """The 10,000 test images, decoded once."""
    return mz.data.load_images(cifar100, "test")


@pytest.fixture(autouse=True)
def bundled_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests start from the default source, whatever the caller's environment says."""
    monkeypatch.delenv(mz.pretrained.SOURCE_VARIABLE, raising=False)


@pytest.fixture
def run(monkeypatch, capfd):
    """Runs a command in this process and returns (exit code, standard output, standard error)."""

    def run(*arguments, stdin: bytes = b""):
        monkeypatch.setattr(sys, "argv", ["mobilenets-zoo", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        out, err = capfd.readouterr()
        return exit_.value.code or 0, out, err

    return run


def with_lively_statistics(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draws BatchNorm's parameters and statistics from a narrow range, so that every layer matters to the output.

    At initialisation activations die or saturate over dozens of layers, and errors with them.
    """
    generator = torch.Generator().manual_seed(seed)
    model.train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 4:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0  # the running statistics become those of the batch below
        model(torch.randn(4, 3, 32, 32, generator=generator))
    return model.eval()


def lively(name: str, seed: int = 0, **kwargs) -> nn.Module:
    """Returns a model with finished masks and lively statistics."""
    torch.manual_seed(seed)
    return with_lively_statistics(with_random_masks(timm.create_model(name, **kwargs), seed), seed)


def with_random_masks(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives each learned group convolution a random finished mask."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, mz.LearnedGroupConv2d):
            keep = module.in_channels // module.condense_factor
            order = torch.rand(module.mask.shape, generator=generator).argsort(1)
            module.mask.zero_().scatter_(1, order[:, :keep], True)
    return model
