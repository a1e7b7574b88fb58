"""Where weights come from and what happens to files that aren't what the manifest says."""

import copy
import dataclasses
import hashlib
import json
import pickle
import shutil
import struct
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from conftest import ALL_MODELS, LGC_MODELS, ROOT, with_lively_statistics, with_random_masks

import mobilenets_zoo as mz
from mobilenets_zoo import pretrained
from mobilenets_zoo.models._base import ConvBn
from mobilenets_zoo.normalisation import normalise_

ENTRIES = list(pretrained.manifest().values())
SMALL = pretrained.default_entry("mobilenetv1_w025_cifar100")
DEFAULTS = [entry for entry in ENTRIES if timm.get_pretrained_cfg(entry.model).tag == entry.tag]
each_entry = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
SAMPLE = torch.linspace(-2, 2, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    expected, actual = a.state_dict(), b.state_dict()
    return expected.keys() == actual.keys() and all(torch.equal(expected[key], actual[key]) for key in expected)


# What is bundled


def test_every_model_has_weights_and_timm_lists_them():
    assert sorted(entry.model for entry in DEFAULTS) == ALL_MODELS
    assert {entry.name for entry in ENTRIES} == set(timm.list_models("*_cifar100", pretrained=True))
    for entry in ENTRIES:
        cfg = timm.get_pretrained_cfg(entry.name)
        assert (cfg.tag, cfg.hf_hub_id) == (entry.tag, entry.hub_id)


def test_weights_that_saw_nothing_but_cifar100_load_by_name():
    """Two second tags; all other weights name their teacher and what it was pretrained on."""
    alone = [entry for entry in ENTRIES if entry.taught_by is None]
    assert {"mobilenetv1_w025_cifar100.sgd_e36_r32", "mobilenetv2_t1_cifar100.sgd_e24_r32"} == {e.name for e in alone}
    assert all("ImageNet-1k" in entry.taught_by for entry in ENTRIES if entry not in alone)
    for entry in alone:
        model = timm.create_model(entry.name, pretrained=True)
        assert model.pretrained_cfg["tag"] == entry.tag
        stored = safetensors.torch.load_file(pretrained.WEIGHTS_DIR / entry.file)
        assert torch.equal(model.classifier.bias, stored["classifier.bias"].float())


@each_entry
def test_manifest_row_describes_its_file(entry):
    data = (pretrained.WEIGHTS_DIR / entry.file).read_bytes()
    assert entry.bytes == len(data)
    assert entry.sha256 == hashlib.sha256(data).hexdigest()
    options = {"condensed": True} if entry.model in LGC_MODELS else {}
    model = timm.create_model(entry.name, pretrained=True, **options)
    assert mz.profile(model) == mz.Profile(entry.params, entry.macs)
    result = json.loads((ROOT / entry.result).read_text())
    assert result["sha256"] == entry.sha256
    assert (round(result["evaluation"]["top1"], 2), round(result["evaluation"]["top5"], 2)) == (entry.top1, entry.top5)
    assert result["evaluation"]["images"] == 10_000
    assert (ROOT / entry.recipe).is_file()
    assert result["taught_by"] == entry.taught_by
    assert (ROOT / entry.result).with_name("log.csv").is_file()
    for key, value in safetensors.torch.load(data).items():
        integer = key.endswith(("num_batches_tracked", "index"))
        assert value.dtype == (torch.int64 if integer else torch.float32 if ".bn." in key else torch.float16)
        assert not key.endswith("mask")  # learned layers are stored condensed


def norms(module: torch.nn.Module) -> torch.Tensor:
    """Returns the norms of a ConvBn's output channels, but for those whose variance is next to nothing."""
    conv = module.conv
    weight = conv.masked_weight() if isinstance(conv, mz.LearnedGroupConv2d) else conv.weight
    return weight.detach().flatten(1).norm(dim=1)[module.bn.running_var > 1e-3]


@each_entry
def test_stored_weights_are_normalised_and_compute_what_they_did(entry):
    """A change of code must not change the outputs; half precision loses little."""
    stored = json.loads((ROOT / entry.result).read_text())["sample_logits"]
    model = timm.create_model(entry.name, pretrained=True).eval()
    for module in model.modules():
        if hasattr(module, "bn"):
            assert ((norms(module) > 0.7) & (norms(module) < 1.42)).all()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(SAMPLE), torch.tensor(stored), rtol=1e-3, atol=1e-3)
        assert (model(images) - model.half()(images.half()).float()).abs().max() < 0.05


@pytest.mark.parametrize("options", [{}, {"condensed": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalising_changes_no_output(options, dtype):
    model = with_lively_statistics(with_random_masks(timm.create_model("mobilenetv2_lgc_cifar100", **options))).to(
        dtype
    )
    with torch.no_grad():
        model.stem.conv.weight *= 50
        model.stem.bn.running_mean *= 50
        model.stem.bn.running_var *= 2500
        model.blocks[1][0].projection.bn.running_var[0] = 0.0  # a channel that stays as it is
    normalised = normalise_(copy.deepcopy(model))
    mz.check_equivalent(model, normalised, SAMPLE.to(dtype))
    assert 0.7 < norms(normalised.stem).min() <= norms(normalised.stem).max() < 1.42
    old, new = (network.blocks[1][0].projection for network in (model, normalised))
    assert torch.equal(old.conv.weight[0], new.conv.weight[0])
    assert new.bn.running_var[0] == 0


@pytest.mark.parametrize(
    ("conv", "norm"),
    [
        (torch.nn.Conv2d(3, 4, 3), torch.nn.GroupNorm(2, 4)),
        (torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4, track_running_stats=False)),
        (timm.layers.ScaledStdConv2d(3, 4, 3), torch.nn.BatchNorm2d(4)),
    ],
)
def test_what_cannot_be_normalised_stays(conv, norm):
    module = ConvBn(conv, 4)
    module.bn = norm
    before = copy.deepcopy(module.state_dict())
    assert all(torch.equal(before[key], value) for key, value in normalise_(module).state_dict().items())


def test_modules_of_others_are_not_normalised():
    class Before(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = torch.nn.Conv2d(4, 4, 1), torch.nn.BatchNorm2d(4)

        def forward(self, x):
            return self.conv(self.bn(x))

    module = Before().eval()
    module.bn.running_mean.uniform_()
    mz.check_equivalent(module, normalise_(copy.deepcopy(module)), torch.randn(2, 4, 3, 3))


@pytest.mark.parametrize("name", [SMALL.name, "mobilenetv1_w025_cifar100.sgd_e36_r32", "mobilenetv2_lgc_cifar100"])
def test_pretrained_weights_adapt_to_other_heads_and_channels(name):
    model = timm.create_model(name, pretrained=True, num_classes=10, in_chans=1).eval()
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 10)
    full = timm.create_model(name, pretrained=True)
    assert torch.equal(model.blocks[0][0].depthwise.conv.weight, full.blocks[0][0].depthwise.conv.weight)
    maps = timm.create_model(name, pretrained=True, features_only=True)(torch.randn(1, 3, 32, 32))
    assert [tuple(m.shape[2:]) for m in maps] == [(32, 32), (16, 16), (8, 8)]
    getter = timm.create_model(name, pretrained=True, features_only=True, feature_cls="getter")
    assert "state_dict" not in getter.model.pretrained_cfg


def test_a_model_without_weights_names_those_that_have_them(monkeypatch):
    name = "mobilenetv2_t4_cifar100"
    others = {key: entry for key, entry in pretrained.manifest().items() if entry.model != name}
    monkeypatch.setattr(pretrained, "manifest", lambda: others)
    with pytest.raises(mz.WeightsError, match="no pretrained weights") as error:
        timm.create_model(name, pretrained=True)
    assert name in str(error.value)
    assert all(entry in str(error.value) for entry in others)


def test_an_unknown_tag_is_refused():
    with pytest.raises(RuntimeError, match="no_such_tag"):
        timm.create_model(f"{ENTRIES[0].model}.no_such_tag", pretrained=True)


@pytest.mark.cifar100
@pytest.mark.slow
@each_entry
def test_accuracy_on_the_test_images(entry, test_images):
    """Stored logits are the quick test of it, and test_cli.py measures one weight on a part of the images."""
    assert test_images.classes == mz.CIFAR100_CLASSES
    model = timm.create_model(entry.name, pretrained=True).to(memory_format=torch.channels_last)
    assert mz.evaluation.evaluate(model, test_images).top1 == pytest.approx(entry.top1, abs=0.05)


# Files that aren't what they should be


@pytest.fixture
def weights_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the manifest and of one weight that a test may damage."""
    folder = tmp_path / "weights"
    folder.mkdir()
    for name in ("manifest.json", SMALL.file):
        shutil.copy(pretrained.WEIGHTS_DIR / name, folder)
    monkeypatch.setattr(pretrained, "WEIGHTS_DIR", folder)
    return folder


def flipped(data: bytes, share: float) -> bytes:
    place = int(share * (len(data) - 1))
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def other_shapes(data: bytes) -> bytes:
    state = safetensors.torch.load(data)
    return safetensors.torch.save({key: value.flatten()[:1].clone() for key, value in state.items()})


DAMAGES = {
    "empty": lambda data: b"",
    **{f"truncated at {share}": lambda data, share=share: data[: int(share * len(data))] for share in (0.01, 0.999)},
    "header cut": lambda data: data[:5],
    **{f"flipped at {share}": lambda data, share=share: flipped(data, share) for share in (0.0, 0.001, 0.5, 1.0)},
    "longer": lambda data: data + b"\0",
    "pickle": lambda data: pickle.dumps({"stem.conv.weight": [0.0]}),
    "other shapes": other_shapes,
    "huge header": lambda data: struct.pack("<Q", 2**60) + data[8:],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_bundled_files_are_refused_before_parsing(weights_dir, damage, monkeypatch):
    """Neither parsed nor replaced by the Hub's."""
    path = weights_dir / SMALL.file
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    monkeypatch.setattr(safetensors.torch, "load", lambda *_: pytest.fail("the file was parsed"))
    monkeypatch.setattr(pretrained, "_download", lambda *_: pytest.fail("asked the Hub"))
    with pytest.raises(mz.WeightsError, match="reinstall mobilenets-zoo") as error:
        timm.create_model(SMALL.model, pretrained=True)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_the_bytes_that_were_checked_are_the_bytes_that_load(weights_dir, monkeypatch):
    """A file that is swapped as soon as it has been read: what loads is what was checked."""
    expected = timm.create_model(SMALL.model, pretrained=True)
    original = pretrained.verified_bytes

    def read_and_swap(path, *arguments):
        data = original(path, *arguments)
        path.write_bytes(safetensors.torch.save({"stem.conv.weight": torch.zeros(1)}))
        return data

    monkeypatch.setattr(pretrained, "verified_bytes", read_and_swap)
    model = timm.create_model(SMALL.model, pretrained=True)
    assert same(model, expected)
    assert "state_dict" not in model.pretrained_cfg


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the file takes up what it is long")
def test_a_file_that_is_far_too_long_is_not_read_into_memory(weights_dir):
    with open(weights_dir / SMALL.file, "r+b") as file:
        file.truncate(3 * 2**40)  # sparse
    with pytest.raises(mz.WeightsError, match="more than"):
        timm.create_model(SMALL.name, pretrained=True)


def with_value(key: str, value: object) -> str:
    rows = json.loads((pretrained.WEIGHTS_DIR / "manifest.json").read_text())
    next(iter(rows.values()))[key] = value
    return json.dumps(rows)


BROKEN = ["", "{", "[]", '{"a.b": {}}', '{"a.b": 3}', "[" * 100_000]
BROKEN += [with_value("bytes", value) for value in (None, "5", [5], True, 5.5)]
BROKEN += [with_value("file", value) for value in (None, 3, ["a"], "a" * 3000, "../x.safetensors", "")]


@pytest.mark.parametrize("content", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_manifest_is_named(weights_dir, content):
    (weights_dir / "manifest.json").write_text(content)
    pretrained.manifest.cache_clear()
    try:
        with pytest.raises(mz.WeightsError, match=r"manifest\.json can't be read"):
            pretrained.manifest()
    finally:
        pretrained.manifest.cache_clear()


# Sources


@pytest.mark.parametrize("kind", ["file", "state_dict", "configuration"])
def test_the_users_own_weights_win_untouched(tmp_path, kind):
    model = with_lively_statistics(timm.create_model(SMALL.model))
    path = tmp_path / "own.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    arguments = {
        "file": {"pretrained_cfg_overlay": {"file": str(path)}},
        "state_dict": {"pretrained_cfg_overlay": {"state_dict": model.state_dict()}},
        "configuration": {"pretrained_cfg": dict(timm.get_pretrained_cfg(SMALL.model).to_dict(), file=str(path))},
    }
    assert same(timm.create_model(SMALL.model, pretrained=True, **arguments[kind]), model)


def test_our_own_configuration_as_an_argument_is_still_verified(weights_dir):
    """timm's scripts resolve the configuration first and pass it on as a dict."""
    path = weights_dir / SMALL.file
    path.write_bytes(path.read_bytes()[:-1])
    cfg = timm.get_pretrained_cfg(SMALL.model).to_dict()
    with pytest.raises(mz.WeightsError, match="bytes"):
        timm.create_model(SMALL.model, pretrained=True, pretrained_cfg=cfg)


def test_an_overlay_without_a_source_keeps_the_bundled_weights():
    overlay = {"mean": (0.5, 0.5, 0.5)}
    model = timm.create_model(SMALL.model, pretrained=True, pretrained_cfg_overlay=overlay)
    assert model.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    assert same(model, timm.create_model(SMALL.model, pretrained=True))


@pytest.mark.parametrize("condensed", [None, True, False])
def test_local_dir_loads_in_every_form(tmp_path, condensed):
    """A learned network is condensed unless asked otherwise: the form of the file."""
    model = with_lively_statistics(with_random_masks(timm.create_model("mobilenetv2_lgc_cifar100")))
    mz.save_weights(model, tmp_path / "model.safetensors")
    pretrained.write_config(model, tmp_path / "config.json")
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, condensed=condensed).eval()
    assert any(isinstance(m, mz.CondensedConv2d) for m in loaded.modules()) == (condensed is not False)
    mz.check_equivalent(loaded, with_half_weights(model), SAMPLE)


def with_half_weights(model: torch.nn.Module) -> torch.nn.Module:
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear | mz.LearnedGroupConv2d | mz.CondensedConv2d):
            for parameter in module.parameters():
                parameter.data = parameter.data.half().float()
    return model


def test_save_weights_refuses_what_half_precision_cannot_hold_and_unfinished_masks(tmp_path):
    model = timm.create_model("mobilenetv1_w025_cifar100")
    with torch.no_grad():
        model.classifier.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"classifier\.weight"):
        mz.save_weights(model, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="can't condense"):
        mz.save_weights(timm.create_model("mobilenetv2_lgc_cifar100"), tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_grey_network_of_other_classes_is_written_and_loaded(tmp_path):
    model = timm.create_model(SMALL.model, num_classes=3, in_chans=1)
    cfg = dict(model.pretrained_cfg, num_classes=3, label_names=("a", "b", "c"), input_size=(1, 32, 32), mean=(0.25,))
    model.pretrained_cfg = dict(cfg, std=(0.5,))
    mz.save_weights(model, tmp_path / "model.safetensors")
    pretrained.write_config(model, tmp_path / "config.json")
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert same(loaded, with_half_weights(normalise_(model)))
    assert list(loaded.pretrained_cfg["label_names"]) == ["a", "b", "c"]
    assert tuple(timm.data.resolve_model_data_config(loaded)["mean"]) == (0.25,)


@pytest.mark.parametrize("arguments", [{"expand_ratio": 3}, {"width_mult": 0.55}, {"condensed": True}])
def test_what_was_built_with_arguments_is_written_and_loaded_twice(tmp_path, arguments):
    name = "mobilenetv2_lgc_cifar100" if "condensed" in arguments else "mobilenetv2_cifar100"
    model = timm.create_model(name, num_classes=3, **arguments)
    model.pretrained_cfg = dict(model.pretrained_cfg, num_classes=3, label_names=("a", "b", "c"))
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        mz.save_weights(model, folder / "model.safetensors")
        pretrained.write_config(model, folder / "config.json")
        loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
        assert same(loaded, with_half_weights(normalise_(model)))
        assert json.loads((folder / "config.json").read_text())["model_args"].items() >= arguments.items()
        model = loaded


@pytest.mark.parametrize("source", ["bundled", "", None])
def test_the_bundled_file_is_the_default(source, monkeypatch):
    if source is not None:
        monkeypatch.setenv(pretrained.SOURCE_VARIABLE, source)
    monkeypatch.setattr(pretrained, "_download", lambda *_: pytest.fail("asked the Hub"))
    timm.create_model(SMALL.model, pretrained=True)


@pytest.mark.parametrize("source", ["hugging", "auto"])
def test_an_unknown_source_is_refused(source, monkeypatch):
    monkeypatch.setenv(pretrained.SOURCE_VARIABLE, source)
    with pytest.raises(mz.WeightsError, match=f"is '{source}'; set it to bundled or hub"):
        timm.create_model(SMALL.model, pretrained=True)


def test_a_weight_that_is_not_published_names_what_helps(weights_dir, monkeypatch):
    entry = dataclasses.replace(SMALL, revision=None)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *_, **__: pytest.fail("asked the Hub"))
    monkeypatch.setenv(pretrained.SOURCE_VARIABLE, "hub")
    with pytest.raises(mz.WeightsError, match=r"isn't published .* set MOBILENETS_ZOO_SOURCE=bundled"):
        pretrained.verified_weights(entry)
    monkeypatch.delenv(pretrained.SOURCE_VARIABLE)
    (weights_dir / entry.file).unlink()
    with pytest.raises(mz.WeightsError, match=r"isn't published .* reinstall .* is missing"):
        pretrained.verified_weights(entry)
    monkeypatch.setenv(pretrained.SOURCE_VARIABLE, "bundled")
    with pytest.raises(mz.WeightsError, match="is missing; reinstall"):
        pretrained.verified_weights(entry)


def test_a_hub_that_never_answers_costs_a_limited_time(monkeypatch):
    monkeypatch.setenv(pretrained.SOURCE_VARIABLE, "hub")
    monkeypatch.setattr(pretrained, "HUB_SECONDS", 0.2)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *_, **__: time.sleep(20))
    start = time.monotonic()
    with pytest.raises(mz.WeightsError, match=r"took more than 0\.2 seconds"):
        pretrained.verified_weights(dataclasses.replace(SMALL, revision="0" * 40))
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("kind", ["file in the cache", "cache that is a link", "link that leads out of the cache"])
def test_the_remedy_names_what_to_delete(kind, tmp_path, monkeypatch):
    """In the client's cache a file is a link to a blob; one that leads out of the cache is itself what is wrong."""
    entry = dataclasses.replace(SMALL, revision="0" * 40)
    (tmp_path / "disk").mkdir()
    cache = tmp_path / "cache"
    if kind == "cache that is a link":
        cache.symlink_to(tmp_path / "disk")
    link = cache / "models--x" / "snapshots" / entry.revision / "model.safetensors"
    target = tmp_path / "elsewhere" if "out" in kind else cache / "models--x" / "blobs" / "0123"
    for path in (target, link):
        path.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(b"0" * entry.bytes)
    link.symlink_to(target)
    monkeypatch.setenv(pretrained.SOURCE_VARIABLE, "hub")
    monkeypatch.setattr(pretrained, "_download", lambda *_: link)
    with pytest.raises(mz.WeightsError, match="delete it to download it again") as error:
        pretrained.verified_weights(entry)
    assert str(error.value).startswith(f"{link if 'out' in kind else target.resolve()} is altered")
