"""Pretrained weights: which exist, where they come from, and the check before any byte of them is parsed.

`build_model` is what the model files call. It reads a local file, checks its digest, and hands what those very bytes
hold to timm as `pretrained_cfg_overlay["state_dict"]`, timm's own hook; sources that the user names stay untouched.
"""

import copy
import hashlib
import json
import os
import re
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Optional, TypeVar, Union

import safetensors.torch
import torch
from timm.models import PretrainedCfg, build_model_with_cfg
from timm.models._builder import resolve_pretrained_cfg
from timm.models._hub import save_config_for_hf
from torch import nn

from mobilenets_zoo.lgc.condense import condense, learned_layers
from mobilenets_zoo.lgc.layers import CondensedConv2d, LearnedGroupConv2d, condense_weight, expand_weight
from mobilenets_zoo.normalisation import normalise_
from mobilenets_zoo.utils import atomic_write, write_json

WEIGHTS_DIR = Path(__file__).parent / "weights"
SOURCE_VARIABLE = "MOBILENETS_ZOO_SOURCE"
HUB_FILENAME = "model.safetensors"
# How long a download may take in all.
HUB_SECONDS = 100.0

ModelT = TypeVar("ModelT", bound=nn.Module)


class WeightsError(RuntimeError):
    """Pretrained weights are missing, altered or out of reach; the message names the file and the remedy."""


@dataclass(frozen=True)
class WeightEntry:
    """One row of the manifest, `mobilenets_zoo/weights/manifest.json`.

    Attributes:
        name: "model.tag"; the tag names the recipe and never changes its meaning.
        file: file name in the package's weights folder.
        sha256: digest of the file.
        bytes: size of the file.
        params: parameters of the deployed model.
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

    def __post_init__(self) -> None:
        """Raises ValueError where a value has another type than the field, or `file` isn't a file name."""
        types: Any = {int: (int,), float: (int, float), str: (str,)}
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) not in types.get(field.type, (str, type(None))):
                raise ValueError(f"{self.name}: {field.name} is {str(value)[:40]!r}")
        if not self.file or Path(self.file).name != self.file or len(self.file) > 200:
            raise ValueError(f"{self.name}: file {self.file[:40]!r} isn't a file name")

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
        return {name: WeightEntry(name=name, **row) for name, row in rows.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{path} can't be read ({error}); reinstall mobilenets-zoo") from error


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

    The bundled file where there is one, else the Hub's; the environment variable MOBILENETS_ZOO_SOURCE (`bundled` or
    `hub`) forces one of them.

    Args:
        entry: the weight.
        cache_dir: download folder, huggingface_hub's own by default.

    Raises:
        WeightsError: file missing, truncated or altered, Hub out of reach, or an unknown source.
    """
    bundled = WEIGHTS_DIR / entry.file
    source = os.environ.get(SOURCE_VARIABLE) or ("bundled" if os.path.lexists(bundled) else "hub")
    if source not in ("bundled", "hub"):
        raise WeightsError(f"{SOURCE_VARIABLE} is {source!r}; set it to bundled or hub")
    if source == "bundled":
        return bundled, verified_bytes(bundled, entry, "reinstall mobilenets-zoo")
    remedy = f"set {SOURCE_VARIABLE}=bundled to use the copy in the package"
    if not bundled.is_file():
        remedy = f"reinstall mobilenets-zoo, where {bundled} is missing"
    path = _download(entry, cache_dir, remedy)
    # In the cache this is a link, and its target is what must be deleted; a link that leads out of the cache is itself
    # what is wrong.
    target = path.resolve()
    shown = target if target.is_relative_to(path.parents[3].resolve()) else path
    return path, verified_bytes(shown, entry, f"delete it to download it again, or {remedy}")


def _download(entry: WeightEntry, cache_dir: Optional[str], remedy: str) -> Path:
    """Returns the weight's file in the client's cache, downloaded if need be."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    if entry.revision is None:
        raise WeightsError(f"{entry.name} isn't published as {entry.hub_id} on the Hub yet; {remedy}")
    where: dict[str, Any] = dict(repo_id=entry.hub_id, filename=HUB_FILENAME, revision=entry.revision)
    results: list[Union[str, Exception]] = []

    def download() -> None:
        try:
            if not isinstance(try_to_load_from_cache(**where, cache_dir=cache_dir), str):
                # One request first: it fails at once where the client would try again for minutes, and the client
                # names files after what the server answers.
                answer = get_hf_file_metadata(hf_hub_url(**where))
                for name in (answer.etag, answer.commit_hash):
                    if not name:
                        raise ValueError("the answer isn't from a Hub (no ETag or commit), perhaps from a login page")
                    if not re.fullmatch(r"\w[\w.-]*", name):
                        raise ValueError(f"the server's ETag or commit is {name[:40]!r}")
            results.append(hf_hub_download(**where, cache_dir=cache_dir))
        # Between OSError, ValueError and the HTTP client's own errors the base classes change from release to release.
        except Exception as error:
            results.append(error)

    # The client's time limits are for one read: a server that sends a byte a second would hold it for days. So it runs
    # in a thread that is left behind when the time is up.
    thread = threading.Thread(target=download, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    result = results[0] if results else TimeoutError(f"the Hub took more than {HUB_SECONDS:g} seconds")
    if isinstance(result, Exception):
        failure = f"{entry.hub_id}/{HUB_FILENAME} at {entry.revision} can't be downloaded"
        raise WeightsError(f"{failure}: {_reason(result)}; {remedy}") from result
    return Path(result)


def _reason(error: BaseException) -> str:
    """Returns one line that says why a download failed, with the HTTP status where there was one."""
    line = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    cause: Optional[BaseException] = error
    while cause is not None and not hasattr(cause, "response"):
        cause = cause.__cause__ or cause.__context__
    status = getattr(getattr(cause, "response", None), "status_code", None)
    return line if status is None or str(status) in line else f"HTTP {status}, {line}"


def verified_bytes(path: Path, entry: WeightEntry, remedy: str) -> bytes:
    """Returns a file's content if it is what the manifest says, else raises WeightsError, whose end is `remedy`."""
    if not os.path.isfile(path):
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
        raise WeightsError(f"{path} is altered: its sha256 is {digest}, not {entry.name}'s {entry.sha256}; {remedy}")
    return data


def build_model(model_cls: type[ModelT], variant: str, pretrained: bool, **kwargs: Any) -> ModelT:
    """Builds a registered model through timm's `build_model_with_cfg`, with verified weights if `pretrained`.

    Arguments are timm's.

    Raises:
        WeightsError: `pretrained` and the weights don't exist, are altered or can't be reached.
    """
    if pretrained:
        overlay = kwargs.get("pretrained_cfg_overlay") or {}
        cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), overlay)
        if not _names_own_source(variant, cfg, overlay):
            file, content = verified_weights(_entry(cfg), kwargs.get("cache_dir"))
            # The file is named for whoever looks at the configuration; timm prefers the state dict.
            weights = dict(file=str(file), state_dict=safetensors.torch.load(content))
            kwargs["pretrained_cfg_overlay"] = {**overlay, **weights}
    model = build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        feature_cfg=dict(out_indices=(0, 1, 2), flatten_sequential=True),
        **kwargs,
    )
    for part in (model, getattr(model, "model", None)):  # with feature_cls="getter" the network is within
        cfg = getattr(part, "pretrained_cfg", None)
        if isinstance(cfg, dict):
            cfg.pop("state_dict", None)  # or every copy of the model would carry the weights twice
    return model


def _names_own_source(variant: str, cfg: PretrainedCfg, overlay: dict[str, Any]) -> bool:
    """Whether the user says where the weights come from: an overlay, a configuration of their own, `hf-hub:`."""
    keys = {"source", "url", "file", "state_dict", "hf_hub_id", "hf_hub_filename"}
    own_hub = cfg.hf_hub_id not in (None, f"mobilenets-zoo/{variant}")
    return bool(keys.intersection(overlay) or cfg.source or cfg.url or cfg.file or cfg.state_dict or own_hub)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Converts learned group convolutions in a state dict to the form, masked or condensed, that `model` has.

    A dense weight for a masked layer leaves the mask as it is: in a new network it keeps everything, so a dense one's
    checkpoint can start the training of a learned one.

    Raises:
        ValueError: an unfinished mask for a condensed layer, or an index that doesn't fit.
    """
    state_dict = dict(state_dict.get("state_dict", state_dict))
    for name, layer in model.named_modules():
        if not isinstance(layer, (LearnedGroupConv2d, CondensedConv2d)) or f"{name}.weight" not in state_dict:
            continue
        weight = state_dict[f"{name}.weight"]
        try:
            if isinstance(layer, CondensedConv2d):
                if f"{name}.mask" in state_dict:
                    condensed = condense_weight(weight, state_dict.pop(f"{name}.mask"), layer.condense_factor)
                    state_dict[f"{name}.weight"], state_dict[f"{name}.index"] = condensed
            elif f"{name}.index" in state_dict:
                expanded = expand_weight(weight, state_dict.pop(f"{name}.index"), layer.groups, layer.in_channels)
                state_dict[f"{name}.weight"], state_dict[f"{name}.mask"] = expanded
            elif weight.shape == layer.weight.shape:
                mask = torch.ones_like(layer.mask, device=weight.device) if layer.mask.is_meta else layer.mask
                state_dict.setdefault(f"{name}.mask", mask.to(weight.device))
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{name}: the checkpoint's weight doesn't fit its mask or index: {error}") from error
    return state_dict


def save_weights(model: nn.Module, path: Union[str, Path]) -> None:
    """Writes a model as it is published: condensed, normalised, with convolutions and classifier in half precision.

    BatchNorm stays in single precision. Normalised is what `normalisation.normalise_` does. The file appears whole or
    not at all.

    Raises:
        ValueError: a mask isn't finished, or a weight doesn't fit half precision.
        OSError: the file can't be written.
    """
    with atomic_write(path) as file:
        file.write(weights_as_stored(model))


def weights_as_stored(model: nn.Module) -> bytes:
    """Returns the content of the file that `save_weights` writes; raises its ValueError."""
    model = normalise_((condense(model) if learned_layers(model) else copy.deepcopy(model)).cpu())
    state = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, CondensedConv2d)):
            for key in state.keys() & {f"{name}.weight", f"{name}.bias"}:
                state[key] = state[key].half()
                if not torch.isfinite(state[key]).all():
                    raise ValueError(f"{key} holds values that half precision can't represent")
    return safetensors.torch.save(state, metadata={"format": "pt"})


def write_config(model: nn.Module, path: Union[str, Path]) -> None:
    """Writes the config.json that makes a folder with model.safetensors loadable: `timm.create_model("local-dir:DIR")`.

    Args:
        model: a network of the zoo; its `pretrained_cfg` holds the class names and the preprocessing.
        path: the file.
    """
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "config.json"
        save_config_for_hf(model, file, model_config={"label_names": list(cfg["label_names"])})
        config = json.loads(file.read_text(encoding="utf-8"))
    # timm (since 1.0.31) records every argument; transformers' wrapper passes the number of classes a second time. The
    # file is condensed, and a loader without timm's checkpoint filter needs a model of that form.
    recorded = config.get("model_args", {}).items()
    config["model_args"] = {key: value for key, value in recorded if key not in ("num_classes", "drop_rate")}
    if any(isinstance(module, (LearnedGroupConv2d, CondensedConv2d)) for module in model.modules()):
        config["model_args"]["condensed"] = True
    if cfg["input_size"][0] != 3:
        config["model_args"]["in_chans"] = cfg["input_size"][0]
    write_json(path, config)
