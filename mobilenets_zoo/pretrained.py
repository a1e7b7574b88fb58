"""Pretrained weights: which exist, where they come from, and the check before any byte of them is parsed.

`build_model` is what the model files call. It reads a local file, checks its digest, and hands what those very bytes
hold to timm as `pretrained_cfg_overlay["state_dict"]`, timm's own hook; sources that the user names stay untouched.
"""

import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Optional, TypeVar, Union

import safetensors.torch
import timm
import torch
from timm.models import PretrainedCfg, build_model_with_cfg
from timm.models._builder import resolve_pretrained_cfg
from timm.models._hub import save_config_for_hf
from torch import nn

from mobilenets_zoo.files import atomic_write
from mobilenets_zoo.lgc.condense import condense, learned_layers
from mobilenets_zoo.lgc.layers import CondensedConv2d, condense_weight, expand_weight

__all__ = [
    "SOURCE_VARIABLE",
    "AlteredWeightsError",
    "WeightEntry",
    "WeightsError",
    "checkpoint_filter_fn",
    "default_entry",
    "is_default",
    "manifest",
    "save_weights",
    "verified_weights",
    "write_config",
]

WEIGHTS_DIR = Path(__file__).parent / "weights"
SOURCE_VARIABLE = "MOBILENETS_ZOO_SOURCE"
SOURCES = ("bundled", "hub", "auto")
HUB_FILENAME = "model.safetensors"
# How long a download may take in all, by source.
HUB_SECONDS = {"hub": 120.0, "auto": 10.0}

ModelT = TypeVar("ModelT", bound=nn.Module)


class WeightsError(RuntimeError):
    """Pretrained weights are missing, altered or out of reach; the message names the file and the remedy."""


class AlteredWeightsError(WeightsError):
    """A file of the right length has other content than the manifest says; no other source takes its place."""


@dataclass(frozen=True)
class WeightEntry:
    """One row of the manifest, `mobilenets_zoo/weights/manifest.json`.

    Attributes:
        name: "model.tag"; the tag names the recipe and never changes its meaning.
        file: file name in the package's weights folder.
        sha256: digest of the file.
        bytes: size of the file.
        params: trainable parameters of the deployed model.
        macs: multiply-adds of the deployed model at 32x32.
        top1: accuracy on the 10,000 test images, in percent.
        top5: likewise, the class among the five most likely.
        recipe: the recipe's file, from the project's root.
        result: the result's file, from the project's root.
        hub_id: repository on the Hugging Face Hub.
        revision: commit there, None while the weight isn't published.
        taught_by: the teacher and what it was pretrained on, None for a weight that learned from the labels alone.
    """

    name: str
    file: str
    sha256: str
    bytes: int
    params: int
    macs: int
    top1: float
    top5: float
    recipe: str
    result: str
    hub_id: str
    revision: Optional[str]
    taught_by: Optional[str]

    @property
    def model(self) -> str:
        return self.name.partition(".")[0]

    @property
    def tag(self) -> str:
        return self.name.partition(".")[2]


@lru_cache(maxsize=1)
def manifest() -> dict[str, WeightEntry]:
    """Returns the bundled weights by "model.tag".

    Raises:
        WeightsError: the manifest is missing or can't be read.
    """
    path = WEIGHTS_DIR / "manifest.json"
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        entries = {name: WeightEntry(name=name, **row) for name, row in rows.items()}
        for entry in entries.values():
            _check_row(entry)
        return entries
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{path} can't be read ({error}); reinstall mobilenets-zoo") from error


def _check_row(entry: WeightEntry) -> None:
    """Raises ValueError where a value has another type than the field, or a file name is none."""
    for field in fields(entry):
        value = getattr(entry, field.name)
        types: Any = {int: int, float: (int, float), str: str}.get(field.type, (str, type(None)))  # type: ignore[arg-type]
        if not isinstance(value, types) or isinstance(value, bool):
            raise ValueError(f"{entry.name}: {field.name} is {str(value)[:40]!r}")
    if not entry.file or Path(entry.file).name != entry.file or len(entry.file) > 200:
        raise ValueError(f"{entry.name}: file {entry.file[:40]!r} isn't a file name")


def is_default(entry: WeightEntry) -> bool:
    """Whether `timm.create_model(entry.model, pretrained=True)` loads this weight."""
    cfg = timm.get_pretrained_cfg(entry.model)
    return cfg is not None and cfg.tag == entry.tag


def default_entry(variant: str) -> WeightEntry:
    """Returns the weight that `timm.create_model(variant, pretrained=True)` loads.

    Raises:
        WeightsError: the model has none yet; the message names the models that do.
    """
    return _entry(resolve_pretrained_cfg(variant))


def _entry(cfg: PretrainedCfg) -> WeightEntry:
    name = f"{cfg.architecture}.{cfg.tag}" if cfg.tag else cfg.architecture or ""
    if name in manifest():
        return manifest()[name]
    available = ", ".join(manifest()) or "none"
    raise WeightsError(
        f"there are no pretrained weights for {name} yet; use pretrained=False or one of these: {available}"
    )


def verified_weights(entry: WeightEntry, cache_dir: Optional[str] = None) -> tuple[Path, bytes]:
    """Returns a local file with the entry's weights, and its content, whose sha256 has been checked.

    The environment variable MOBILENETS_ZOO_SOURCE chooses: `bundled` (default), `hub`, or `auto`, the Hub and,
    where it can't be reached within HUB_SECONDS, the bundled file.

    Args:
        entry: the weight.
        cache_dir: download folder, huggingface_hub's own by default.

    Raises:
        WeightsError: file missing, truncated or altered, Hub out of reach, or an unknown source.
    """
    source = os.environ.get(SOURCE_VARIABLE) or "bundled"
    if source not in SOURCES:
        raise WeightsError(f"{SOURCE_VARIABLE} is {source!r}; set it to one of {', '.join(SOURCES)}")
    if source != "bundled":
        try:
            path = _download(entry, cache_dir, HUB_SECONDS[source])
            # In the cache this is a link; deleting it and its target is what makes the client download again.
            remedy = f"delete it to download it again, or set {SOURCE_VARIABLE}=bundled"
            shown = path.resolve()
            if not shown.is_relative_to(path.parent.parent.parent):
                shown = path  # a link that leads out of the cache is itself what is wrong
            return path, verified_bytes(shown, entry, remedy)
        except AlteredWeightsError:
            raise
        except WeightsError:
            if source == "hub":
                raise
    path = WEIGHTS_DIR / entry.file
    return path, verified_bytes(path, entry, "reinstall mobilenets-zoo")


def _download(entry: WeightEntry, cache_dir: Optional[str], seconds: float) -> Path:
    """Returns the weight's file in the client's cache, downloaded if need be.

    The client has no limit of its own for all it does, so it runs in a thread that is left behind when the time is up.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    remedy = f"set {SOURCE_VARIABLE}=bundled to use the copy in the package"
    if entry.revision is None:
        raise WeightsError(f"{entry.name} isn't published as {entry.hub_id} on the Hub yet; {remedy}")
    results: list[Union[str, Exception]] = []
    where: dict[str, Any] = dict(repo_id=entry.hub_id, filename=HUB_FILENAME, revision=entry.revision)

    def download() -> None:
        try:
            if not isinstance(try_to_load_from_cache(**where, cache_dir=cache_dir), str):
                # One request, where the client would try again for minutes; what it names files after must be plain.
                answer = get_hf_file_metadata(hf_hub_url(**where))
                for name in (answer.etag, answer.commit_hash):
                    if not re.fullmatch(r"\w[\w.-]*", name or ""):
                        raise ValueError(f"the server's ETag or commit is {str(name)[:40]!r}")
            results.append(hf_hub_download(**where, cache_dir=cache_dir))
        # Between OSError, ValueError and the HTTP client's own errors the base classes change from release to release.
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=download, daemon=True)
    thread.start()
    thread.join(seconds)
    failure = f"{entry.hub_id}/{HUB_FILENAME} at {entry.revision} can't be downloaded"
    if not results:
        raise WeightsError(f"{failure}: the Hub took more than {seconds:g} seconds; {remedy}")
    if isinstance(results[0], Exception):
        raise WeightsError(f"{failure}: {_reason(results[0])}; {remedy}") from results[0]
    return Path(results[0])


def _reason(error: Exception) -> str:
    """Returns one line that says why a download failed, with the HTTP status where there was one."""
    line = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    cause: Optional[BaseException] = error
    while cause is not None:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status is not None:
            return line if str(status) in line else f"HTTP {status}, {line}"
        cause = cause.__cause__ or cause.__context__
    return line


def verified_bytes(path: Path, entry: WeightEntry, remedy: str) -> bytes:
    """Returns a file's content if it is what the manifest says.

    Args:
        path: the file.
        entry: what it should hold.
        remedy: the end of the error messages, what to do.

    Raises:
        AlteredWeightsError: as long as it should be, with other content.
        WeightsError: missing, unreadable, truncated or too long.
    """
    if not path.is_file():
        raise WeightsError(f"{path} is missing; {remedy}")
    try:
        with open(path, "rb") as file:
            data = file.read(entry.bytes + 1)  # a file that is much longer need not fit into memory
    except OSError as error:
        raise WeightsError(f"{path} can't be read: {error.strerror}; {remedy}") from error
    if len(data) < entry.bytes:
        raise WeightsError(f"{path} has {len(data)} of {entry.name}'s {entry.bytes} bytes: it is truncated; {remedy}")
    if len(data) > entry.bytes:
        raise WeightsError(f"{path} is another file: it has more than {entry.name}'s {entry.bytes} bytes; {remedy}")
    digest = hashlib.sha256(data).hexdigest()
    if digest != entry.sha256:
        raise AlteredWeightsError(
            f"{path} is altered: its sha256 is {digest}, that of {entry.name} is {entry.sha256}; {remedy}"
        )
    return data


def build_model(
    model_cls: type[ModelT],
    variant: str,
    pretrained: bool,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Optional[dict[str, Any]] = None,
    cache_dir: Optional[str] = None,
    **kwargs: Any,
) -> ModelT:
    """Builds a registered model through timm's `build_model_with_cfg`, with verified weights if `pretrained`.

    Arguments are timm's.

    Raises:
        WeightsError: `pretrained` and the weights don't exist, are altered or can't be reached.
    """
    if pretrained:
        cfg = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)
        if not _names_own_source(variant, cfg, pretrained_cfg_overlay):
            file, content = verified_weights(_entry(cfg), cache_dir)
            # The file is named for whoever looks at the configuration; timm prefers the state dict.
            weights = dict(file=str(file), state_dict=safetensors.torch.load(content))
            pretrained_cfg_overlay = dict(pretrained_cfg_overlay or {}, **weights)
    model = build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        cache_dir=cache_dir,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2), flatten_sequential=True),
        **kwargs,
    )
    if isinstance(getattr(model, "pretrained_cfg", None), dict):
        model.pretrained_cfg.pop("state_dict", None)  # or every copy of the model would carry the weights twice
    return model


def _names_own_source(variant: str, cfg: PretrainedCfg, overlay: Optional[dict[str, Any]]) -> bool:
    """Whether the user says where the weights come from: an overlay, a configuration of their own, `hf-hub:`."""
    sources = ("source", "url", "file", "state_dict", "hf_hub_id", "hf_hub_filename")
    if any(key in (overlay or {}) for key in sources):
        return True
    if cfg.source or cfg.url or cfg.file or cfg.state_dict:
        return True
    return cfg.hf_hub_id is not None and cfg.hf_hub_id != f"mobilenets-zoo/{variant}"


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Converts learned group convolutions in a state dict to the form, masked or condensed, that `model` has.

    A dense weight for a masked layer gets a mask that keeps everything, so a dense network's checkpoint can start
    the training of a learned one.

    Raises:
        ValueError: an unfinished mask for a condensed layer, or an index that doesn't fit.
    """
    state_dict = dict(state_dict.get("state_dict", state_dict))
    for name, layer in learned_layers(model).items():
        weight, index = state_dict.get(f"{name}.weight"), state_dict.pop(f"{name}.index", None)
        try:
            if weight is not None and index is not None:
                weight, mask = expand_weight(weight, index, layer.groups, layer.in_channels)
                state_dict[f"{name}.weight"], state_dict[f"{name}.mask"] = weight, mask
            elif weight is not None and weight.shape == layer.weight.shape:
                state_dict.setdefault(f"{name}.mask", torch.ones_like(layer.mask, device=weight.device))
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{name}: the checkpoint's weight and index don't fit: {error}") from error
    for name, module in model.named_modules():
        if isinstance(module, CondensedConv2d) and f"{name}.mask" in state_dict:
            mask = state_dict.pop(f"{name}.mask")
            try:
                weight, index = condense_weight(state_dict[f"{name}.weight"], mask, module.condense_factor)
            except (ValueError, RuntimeError, KeyError) as error:
                raise ValueError(f"{name}: {error}") from error
            state_dict[f"{name}.weight"], state_dict[f"{name}.index"] = weight, index
    return state_dict


def save_weights(model: nn.Module, path: Union[str, Path]) -> None:
    """Writes a model as it is published: condensed, with convolutions and classifier in half precision.

    BatchNorm stays in single precision. The file appears whole or not at all.

    Raises:
        ValueError: a mask isn't finished, or a weight doesn't fit half precision.
        OSError: the file can't be written.
    """
    if learned_layers(model):
        model = condense(model)
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, CondensedConv2d)):
            for key in (f"{name}.weight", f"{name}.bias"):
                if key in state:
                    state[key] = state[key].half()
                    if not torch.isfinite(state[key]).all():
                        raise ValueError(f"{key} holds values that half precision can't represent")
    with atomic_write(path) as file:
        file.write(safetensors.torch.save(state, metadata={"format": "pt"}))


def write_config(model: nn.Module, path: Union[str, Path]) -> None:
    """Writes the config.json that makes a folder with model.safetensors loadable: `timm.create_model("local-dir:DIR")`.

    Args:
        model: a network of the zoo; its `pretrained_cfg` holds the class names and the preprocessing.
        path: the file.
    """
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    save_config_for_hf(model, path, model_config={"label_names": list(cfg["label_names"])})
    config = json.loads(Path(path).read_text(encoding="utf-8"))
    # timm records every argument, which transformers' wrapper passes on a second time. What a loader must know is the
    # form: the file is condensed, and a loader without timm's checkpoint filter needs a model of that form.
    config["model_args"] = {"condensed": True} if learned_layers(model) else {}
    if cfg["input_size"][0] != 3:
        config["model_args"]["in_chans"] = cfg["input_size"][0]
    with atomic_write(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(config, indent=2) + "\n")
