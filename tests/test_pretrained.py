"""Where weights come from and what happens to files that aren't what the manifest says."""

import dataclasses
import hashlib
import json
import pickle
import shutil
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from conftest import ALL_MODELS, LGC_MODELS, ROOT, with_lively_statistics, with_random_masks

import mobilenets_zoo as mz
from mobilenets_zoo import pretrained

ENTRIES = list(pretrained.manifest().values())
DEFAULTS = [entry for entry in ENTRIES if timm.get_pretrained_cfg(entry.model).tag == entry.tag]
each_entry = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
SAMPLE = torch.linspace(-2, 2, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    expected, actual = a.state_dict(), b.state_dict()
    return expected.keys() == actual.keys() and all(torch.equal(expected[key], actual[key]) for key in expected)


# What is bundled


def test_every_model_has_weights():
    assert sorted(entry.model for entry in DEFAULTS) == ALL_MODELS


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
    model = timm.create_model(entry.name, pretrained=True, **condensed_argument(entry))
    assert mz.profile(model) == mz.Profile(entry.params, entry.macs)
    result = json.loads((ROOT / entry.result).read_text())
    assert result["sha256"] == entry.sha256
    assert (round(result["evaluation"]["top1"], 2), round(result["evaluation"]["top5"], 2)) == (entry.top1, entry.top5)
    assert result["evaluation"]["images"] == 10_000
    assert (ROOT / entry.recipe).is_file()
    assert result["taught_by"] == entry.taught_by
    assert (ROOT / "benchmarks" / "logs" / f"{Path(entry.result).stem}.csv").is_file()


def condensed_argument(entry: pretrained.WeightEntry) -> dict[str, bool]:
    return {"condensed": True} if entry.model in LGC_MODELS else {}


@each_entry
def test_manifest_and_registry_agree(entry):
    cfg = timm.get_pretrained_cfg(entry.name)
    assert cfg.tag == entry.tag
    assert cfg.hf_hub_id == entry.hub_id
    assert entry.name in timm.list_models(pretrained=True)


def test_models_without_weights_are_not_listed_as_pretrained():
    assert {entry.name for entry in ENTRIES} == set(timm.list_models("*_cifar100", pretrained=True))


@each_entry
def test_stored_precision_is_half_for_convolutions_and_single_for_batchnorm(entry):
    for key, value in safetensors.torch.load_file(pretrained.WEIGHTS_DIR / entry.file).items():
        if ".bn." in key:
            assert value.dtype == (torch.int64 if key.endswith("num_batches_tracked") else torch.float32)
        elif key.endswith("index"):
            assert value.dtype == torch.int64
        else:
            assert value.dtype == torch.float16
        assert not key.endswith("mask")  # learned layers are stored condensed


@each_entry
def test_stored_logits(entry):
    """A change of code must not change what a weight computes."""
    stored = json.loads((ROOT / entry.result).read_text())["sample_logits"]
    model = timm.create_model(entry.name, pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(SAMPLE), torch.tensor(stored), rtol=1e-3, atol=1e-3)


@each_entry
def test_pretrained_weights_adapt_to_other_heads_and_channels(entry):
    model = timm.create_model(entry.name, pretrained=True, num_classes=10, in_chans=1).eval()
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 10)
    full = timm.create_model(entry.name, pretrained=True)
    assert torch.equal(model.blocks[0][0].depthwise.conv.weight, full.blocks[0][0].depthwise.conv.weight)
    maps = timm.create_model(entry.name, pretrained=True, features_only=True)(torch.randn(1, 3, 32, 32))
    assert [tuple(m.shape[2:]) for m in maps] == [(32, 32), (16, 16), (8, 8)]


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


@pytest.mark.slow
@pytest.mark.cifar100
@each_entry
def test_accuracy_on_all_test_images(entry, test_images):
    from mobilenets_zoo.evaluation import evaluate

    model = timm.create_model(entry.name, pretrained=True).to(memory_format=torch.channels_last)
    assert evaluate(model, test_images).top1 == pytest.approx(entry.top1, abs=0.05)


@pytest.mark.cifar100
@each_entry
def test_accuracy_on_a_part_of_the_test_images(entry, test_images):
    from mobilenets_zoo.evaluation import evaluate

    part = test_images.subset(np.arange(300))
    assert part.classes == mz.CIFAR100_CLASSES
    model = timm.create_model(entry.name, pretrained=True)
    assert evaluate(model, part).top1 == pytest.approx(entry.top1, abs=8)  # three standard deviations


# Files that aren't what they should be


@pytest.fixture
def weights_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package's weights that a test may damage."""
    folder = tmp_path / "weights"
    shutil.copytree(pretrained.WEIGHTS_DIR, folder)
    monkeypatch.setattr(pretrained, "WEIGHTS_DIR", folder)
    return folder


def damage_empty(data: bytes) -> bytes:
    return b""


def damage_truncate(share: float):
    def damage(data: bytes) -> bytes:
        return data[: int(share * len(data))]

    damage.__name__ = f"truncate_{share}"
    return damage


def damage_byte(share: float):
    def damage(data: bytes) -> bytes:
        place = int(share * (len(data) - 1))
        return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]

    damage.__name__ = f"flip_{share}"
    return damage


def damage_longer(data: bytes) -> bytes:
    return data + b"\0"


def damage_pickle(data: bytes) -> bytes:
    return pickle.dumps({"stem.conv.weight": [0.0]})


def damage_wrong_shapes(data: bytes) -> bytes:
    state = safetensors.torch.load(data)
    return safetensors.torch.save({key: value.flatten()[:1].clone() for key, value in state.items()})


def damage_huge_header(data: bytes) -> bytes:
    return struct.pack("<Q", 2**60) + data[8:]


DAMAGES = [
    damage_empty,
    *(damage_truncate(share) for share in (0.0001, 0.01, 0.5, 0.999)),
    *(damage_byte(share) for share in (0.0, 0.001, 0.5, 1.0)),
    damage_longer,
    damage_pickle,
    damage_wrong_shapes,
    damage_huge_header,
]
each_damage = pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)


@each_damage
def test_damaged_bundled_files_are_refused_before_parsing(weights_dir, damage, monkeypatch):
    entry = ENTRIES[0]
    path = weights_dir / entry.file
    path.write_bytes(damage(path.read_bytes()))
    monkeypatch.setattr(safetensors.torch, "load", lambda *_: pytest.fail("the file was parsed"))
    with pytest.raises(mz.WeightsError, match="reinstall mobilenets-zoo") as error:
        timm.create_model(entry.model, pretrained=True)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_the_bytes_that_were_checked_are_the_bytes_that_load(weights_dir, monkeypatch):
    """A file that is swapped as soon as it has been read: what loads is what was checked."""
    entry = pretrained.default_entry("mobilenetv1_w025_cifar100")
    expected = timm.create_model(entry.model, pretrained=True)
    original = pretrained.verified_bytes

    def read_and_swap(path, *arguments):
        data = original(path, *arguments)
        path.write_bytes(safetensors.torch.save({"stem.conv.weight": torch.zeros(1)}))
        return data

    monkeypatch.setattr(pretrained, "verified_bytes", read_and_swap)
    model = timm.create_model(entry.model, pretrained=True)
    assert same(model, expected)
    assert "state_dict" not in model.pretrained_cfg


def test_a_file_that_is_far_too_long_is_not_read_into_memory(weights_dir):
    entry = ENTRIES[0]
    with open(weights_dir / entry.file, "r+b") as file:
        file.truncate(3 * 2**40)  # sparse
    with pytest.raises(mz.WeightsError, match="more than"):
        timm.create_model(entry.name, pretrained=True)


def test_a_missing_file_is_named(weights_dir):
    (weights_dir / ENTRIES[0].file).unlink()
    with pytest.raises(mz.WeightsError, match=r"is missing; reinstall"):
        timm.create_model(ENTRIES[0].model, pretrained=True)


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


@each_damage
def test_damaged_files_of_the_users_own_do_not_load(tmp_path, damage):
    """`file` in an overlay is the user's own business, but half a file must not become half a model."""
    if damage.__name__.startswith("flip_") and damage.__name__ != "flip_0.0":
        pytest.skip("without a digest a flipped bit in the values is a valid file")
    path = tmp_path / "own.safetensors"
    path.write_bytes(damage((pretrained.WEIGHTS_DIR / ENTRIES[0].file).read_bytes()))
    with pytest.raises(Exception, match=r".") as error:
        timm.create_model(ENTRIES[0].model, pretrained=True, pretrained_cfg_overlay={"file": str(path)})
    assert not isinstance(error.value, mz.WeightsError)


# Sources


def test_the_users_own_file_wins_untouched(tmp_path):
    model = with_lively_statistics(timm.create_model(ENTRIES[0].model))
    path = tmp_path / "own.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    overlay = {"file": str(path)}
    assert same(timm.create_model(ENTRIES[0].model, pretrained=True, pretrained_cfg_overlay=overlay), model)


def test_the_users_own_state_dict_wins_untouched():
    model = with_lively_statistics(timm.create_model("mobilenetv2_gc_cifar100"))
    overlay = {"state_dict": model.state_dict()}
    assert same(timm.create_model("mobilenetv2_gc_cifar100", pretrained=True, pretrained_cfg_overlay=overlay), model)


def test_the_users_own_configuration_wins_untouched(tmp_path):
    model = with_lively_statistics(timm.create_model(ENTRIES[0].model))
    path = tmp_path / "own.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    cfg = dict(timm.get_pretrained_cfg(ENTRIES[0].model).to_dict(), file=str(path))
    assert same(timm.create_model(ENTRIES[0].model, pretrained=True, pretrained_cfg=cfg), model)


def test_our_own_configuration_as_an_argument_is_still_verified(weights_dir):
    """timm's scripts resolve the configuration first and pass it on as a dict."""
    path = weights_dir / ENTRIES[0].file
    path.write_bytes(path.read_bytes()[:-1])
    cfg = timm.get_pretrained_cfg(ENTRIES[0].model).to_dict()
    with pytest.raises(mz.WeightsError, match="bytes"):
        timm.create_model(ENTRIES[0].model, pretrained=True, pretrained_cfg=cfg)


def test_an_overlay_without_a_source_keeps_the_bundled_weights():
    overlay = {"mean": (0.5, 0.5, 0.5)}
    model = timm.create_model(ENTRIES[0].model, pretrained=True, pretrained_cfg_overlay=overlay)
    assert model.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    assert same(model, timm.create_model(ENTRIES[0].model, pretrained=True))


@pytest.mark.parametrize("name", ["mobilenetv1_w025_cifar100", "mobilenetv2_lgc_cifar100"])
def test_local_dir_loads_masked_and_condensed(tmp_path, name):
    model = with_random_masks(timm.create_model(name))
    with_lively_statistics(model)
    mz.save_weights(model, tmp_path / "model.safetensors")
    cfg = model.pretrained_cfg
    config = {"architecture": name, "num_classes": 100, "pretrained_cfg": {**cfg, "label_names": None}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    mz.check_equivalent(loaded, with_half_weights(model), SAMPLE)
    if name in LGC_MODELS:
        condensed = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, condensed=True).eval()
        assert any(isinstance(m, mz.CondensedConv2d) for m in condensed.modules())
        mz.check_equivalent(loaded, condensed, SAMPLE)


def with_half_weights(model: torch.nn.Module) -> torch.nn.Module:
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear | mz.LearnedGroupConv2d):
            for parameter in module.parameters():
                parameter.data = parameter.data.half().float()
    return model


def test_save_weights_refuses_what_half_precision_cannot_hold(tmp_path):
    model = timm.create_model("mobilenetv1_w025_cifar100")
    with torch.no_grad():
        model.classifier.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"classifier\.weight"):
        mz.save_weights(model, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_save_weights_refuses_unfinished_masks(tmp_path):
    with pytest.raises(ValueError, match="can't condense"):
        mz.save_weights(timm.create_model("mobilenetv2_lgc_cifar100"), tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("source", ["hub", "auto"])
def test_a_hub_that_never_answers_costs_a_limited_time(source, monkeypatch):
    entry = dataclasses.replace(ENTRIES[0], revision="0" * 40)
    monkeypatch.setenv(pretrained.SOURCE_VARIABLE, source)
    monkeypatch.setattr(pretrained, "HUB_SECONDS", {"hub": 0.2, "auto": 0.2})
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *_, **__: time.sleep(20))
    start = time.monotonic()
    if source == "auto":
        assert pretrained.verified_weights(entry)[0] == pretrained.WEIGHTS_DIR / entry.file
    else:
        with pytest.raises(mz.WeightsError, match=r"took more than 0\.2 seconds"):
            pretrained.verified_weights(entry)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("source", ["bundled", ""])
def test_bundled_source(source, monkeypatch):
    monkeypatch.setenv(pretrained.SOURCE_VARIABLE, source)
    monkeypatch.setattr(pretrained, "_download", lambda *_: pytest.fail("asked the Hub"))
    timm.create_model(ENTRIES[0].model, pretrained=True)


def test_an_unknown_source_is_refused(monkeypatch):
    monkeypatch.setenv(pretrained.SOURCE_VARIABLE, "hugging")
    with pytest.raises(mz.WeightsError, match="bundled, hub, auto"):
        timm.create_model(ENTRIES[0].model, pretrained=True)


def test_the_hub_before_publication(monkeypatch):
    monkeypatch.setenv(pretrained.SOURCE_VARIABLE, "hub")
    if ENTRIES[0].revision is None:
        with pytest.raises(mz.WeightsError, match="isn't published"):
            timm.create_model(ENTRIES[0].model, pretrained=True)
        monkeypatch.setenv(pretrained.SOURCE_VARIABLE, "auto")
        timm.create_model(ENTRIES[0].model, pretrained=True)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Stands in for hf_hub_download: serves one file or raises, and marks the weight as published."""
    import dataclasses

    import huggingface_hub

    entry = dataclasses.replace(ENTRIES[0], revision="0" * 40)
    monkeypatch.setattr(pretrained, "manifest", lambda: {entry.name: entry})
    path = tmp_path / "downloaded.safetensors"
    path.write_bytes((pretrained.WEIGHTS_DIR / entry.file).read_bytes())

    def download(repo_id, filename, revision, cache_dir):
        assert (repo_id, filename, revision) == (entry.hub_id, "model.safetensors", entry.revision)
        if not path.exists():
            raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nsecond line")
        return str(path)

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda **_: str(path))  # so it asks nobody
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return path


@pytest.mark.parametrize("source", ["hub", "auto"])
def test_the_hub_is_verified_and_altered_bytes_never_fall_back(hub, source, monkeypatch):
    monkeypatch.setenv(pretrained.SOURCE_VARIABLE, source)
    model = timm.create_model(ENTRIES[0].model, pretrained=True)
    assert model.pretrained_cfg["file"] == str(hub)
    hub.write_bytes(damage_byte(0.7)(hub.read_bytes()))
    with pytest.raises(mz.WeightsError, match="sha256") as error:
        timm.create_model(ENTRIES[0].model, pretrained=True)
    assert str(hub) in str(error.value)


@pytest.mark.parametrize("inside", [True, False])
def test_the_remedy_names_what_to_delete(inside, tmp_path, monkeypatch):
    """In the client's cache a file is a link to a blob; one that leads out of the cache is itself what is wrong."""
    entry = dataclasses.replace(ENTRIES[0], revision="0" * 40)
    target = tmp_path / "cache" / "models--x" / "blobs" / "0123" if inside else tmp_path / "elsewhere"
    link = tmp_path / "cache" / "models--x" / "snapshots" / entry.revision / "model.safetensors"
    for path in (target, link):
        path.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(b"0" * entry.bytes)
    link.symlink_to(target)
    monkeypatch.setenv(pretrained.SOURCE_VARIABLE, "hub")
    monkeypatch.setattr(pretrained, "_download", lambda *_: link)
    with pytest.raises(mz.WeightsError, match="delete it to download it again") as error:
        pretrained.verified_weights(entry)
    assert str(error.value).startswith(f"{target if inside else link} is altered")


def test_only_auto_falls_back_where_the_hub_is_out_of_reach(hub, monkeypatch):
    hub.unlink()
    monkeypatch.setenv(pretrained.SOURCE_VARIABLE, "hub")
    with pytest.raises(mz.WeightsError, match=r"no connection; set MOBILENETS_ZOO_SOURCE=bundled"):
        timm.create_model(ENTRIES[0].model, pretrained=True)
    monkeypatch.setenv(pretrained.SOURCE_VARIABLE, "auto")
    timm.create_model(ENTRIES[0].model, pretrained=True)
