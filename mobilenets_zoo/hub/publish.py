"""Publishing weights on the Hugging Face Hub: the folder that is uploaded, and the upload itself."""

import csv
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Optional

import timm
import torch
from filelock import FileLock
from huggingface_hub import HfApi

from mobilenets_zoo import pretrained
from mobilenets_zoo.files import atomic_write
from mobilenets_zoo.hub.model_card import model_card
from mobilenets_zoo.lgc.condense import check_equivalent, learned_layers
from mobilenets_zoo.pretrained import HUB_FILENAME, WeightEntry, is_default, write_config

__all__ = ["PublishError", "build_folder", "in_publishing_order", "publish"]

DEFAULT_NAMESPACE = "mobilenets-zoo"


class PublishError(RuntimeError):
    """A weight can't be published; the message is one line that says why and what to do."""


def build_folder(entry: WeightEntry, folder: Path, namespace: str = DEFAULT_NAMESPACE) -> Path:
    """Builds exactly what is uploaded, reloads it through timm and compares it with the bundled weight.

    Args:
        entry: the weight.
        folder: receives model.safetensors, config.json and README.md; it must be empty or hold these alone.
        namespace: user or organisation on the Hub.

    Returns:
        `folder`.

    Raises:
        PublishError: the folder holds other files, a result file is missing, or the reloaded model differs.
        WeightsError: the bundled weight is missing or altered.
    """
    bundled = pretrained.WEIGHTS_DIR / entry.file
    data = pretrained.verified_bytes(bundled, entry, "reinstall mobilenets-zoo")
    result, epochs = _training_record(entry)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PublishError(f"{folder} can't be written: {error.strerror}; choose another folder") from error
    others = sorted({path.name for path in folder.iterdir()} - {HUB_FILENAME, "config.json", "README.md"})
    if others:
        raise PublishError(f"{folder} holds {others[0]} already; choose an empty folder")

    reference = timm.create_model(
        entry.model, pretrained=True, pretrained_cfg_overlay={"file": str(bundled), "tag": entry.tag}
    ).eval()
    with tempfile.TemporaryDirectory() as scratch:
        build = Path(scratch)
        (build / HUB_FILENAME).write_bytes(data)
        write_config(reference, build / "config.json")
        card = model_card(entry, f"{namespace}/{entry.model}", result, epochs)
        (build / "README.md").write_text(str(card), encoding="utf-8")
        _check_folder(build, reference)
        for path in build.iterdir():
            with atomic_write(folder / path.name) as file, open(path, "rb") as content:
                shutil.copyfileobj(content, file)
    return folder


def publish(entry: WeightEntry, namespace: str = DEFAULT_NAMESPACE, api: Optional[HfApi] = None) -> tuple[str, bool]:
    """Uploads a weight in one commit and tags it; does nothing where all of it is there already.

    Args:
        entry: the weight.
        namespace: user or organisation on the Hub.
        api: the client; by default huggingface_hub's own, with its login.

    Returns:
        The commit's id and whether anything changed.

    Raises:
        PublishError: the tag stands for another weight there, or the Hub refuses.
    """
    api = api or HfApi()
    repo = f"{namespace}/{entry.model}"
    with tempfile.TemporaryDirectory() as scratch:
        folder = build_folder(entry, Path(scratch) / "repository", namespace)
        try:
            api.create_repo(repo, exist_ok=True)
            refs = api.list_repo_refs(repo)
            tags = {tag.name: tag.target_commit for tag in refs.tags}
            if entry.tag in tags and _remote_sha256(api, repo, entry.tag) != entry.sha256:
                raise PublishError(
                    f"{repo} has another weight under the tag {entry.tag}; a new training needs a new tag"
                )
            before = {branch.name: branch.target_commit for branch in refs.branches}.get("main")
            message = f"Weights {entry.name}"
            commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
            if entry.tag not in tags:
                api.create_tag(repo, tag=entry.tag, revision=commit.oid)
        except PublishError:
            raise
        # The client's errors have changed their base classes from release to release.
        except Exception as error:
            raise PublishError(_explain(error, repo)) from error
    return tags.get(entry.tag, commit.oid), entry.tag not in tags or commit.oid != before


def in_publishing_order(entries: Iterable[WeightEntry]) -> list[WeightEntry]:
    """Returns weights so that a model's default comes last: it is what its repository's main branch then holds."""
    return sorted(entries, key=lambda entry: (entry.model, is_default(entry)))


def record_revision(entry: WeightEntry, revision: str) -> None:
    """Writes the Hub's commit into the manifest, so that downloads are pinned to it."""
    path = pretrained.WEIGHTS_DIR / "manifest.json"
    with FileLock(path.with_name(f".{path.name}.lock")):  # another process may record another weight's
        rows = json.loads(path.read_text(encoding="utf-8"))
        rows[entry.name]["revision"] = revision
        with atomic_write(path, "w", encoding="utf-8") as file:
            file.write(json.dumps(rows, indent=2) + "\n")
    pretrained.manifest.cache_clear()


def _check_folder(folder: Path, reference: torch.nn.Module) -> None:
    """Loads the folder as a user would, in every form that the model has, and compares logits."""
    forms: list[dict[str, bool]] = [{}]
    if learned_layers(reference):
        forms += [{"condensed": True}, {"condensed": False}]
    images = torch.linspace(-2, 2, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
    for arguments in forms:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True, **arguments).eval()
        try:
            check_equivalent(reference, model, images)
        except ValueError as error:
            raise PublishError(f"the built folder loads as another model: {error}; nothing was uploaded") from error


def _remote_sha256(api: HfApi, repo: str, revision: str) -> str:
    info = api.get_paths_info(repo, [HUB_FILENAME], revision=revision)
    if info and getattr(info[0], "lfs", None):
        return info[0].lfs.sha256  # type: ignore[union-attr]
    path = api.hf_hub_download(repo, HUB_FILENAME, revision=revision)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _explain(error: Exception, repo: str) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"the Hub refuses to write {repo} (HTTP {status}); log in with `hf auth login` as a member of it"
    lines = str(error).strip().splitlines()
    return (
        f"{repo} can't be published: {lines[0] if lines else type(error).__name__}; the Hub is unchanged or try again"
    )


def _training_record(entry: WeightEntry) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Returns the result file and the log's rows; they are in the project, not in the installed package."""
    for root in (Path(__file__).parents[2], Path.cwd()):
        result, log = root / entry.result, root / "benchmarks" / "logs" / f"{Path(entry.result).stem}.csv"
        if result.is_file() and log.is_file():
            with open(log, newline="", encoding="utf-8") as file:
                return json.loads(result.read_text(encoding="utf-8")), list(csv.DictReader(file))
    raise PublishError(f"{entry.result} isn't here; run the command in a clone of the project")
