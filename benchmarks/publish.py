"""Uploads weights, configuration and card to the Hugging Face Hub: for maintainers, in a clone of the project.

    python benchmarks/publish.py NAME [--dry-run DIR] [--namespace NAMESPACE]
    python benchmarks/publish.py --all [--dry-run DIR]
    python benchmarks/publish.py --space DIR

NAME is a model, or MODEL.TAG for a weight that isn't its model's default. A weight is one commit in the repository
NAMESPACE/MODEL, tagged TAG; the main branch ends with the default weight. The commit is written into the manifest,
which pins downloads to it. Log in first: `hf auth login`. --dry-run writes what would be uploaded and uploads nothing:
DIR itself, or with --all a folder in DIR for each weight. The card's text is benchmarks/model_card.md. --space writes
the demo page as a static Space, to upload with `hf upload NAMESPACE/demo DIR --repo-type space`.
"""

import argparse
import csv
import dataclasses
import json
import os
import re
import shutil
import string
import sys
import tempfile
from pathlib import Path
from typing import Any

import build_demo
import timm
import torch
from huggingface_hub import HfApi

import mobilenets_zoo as mz
from mobilenets_zoo import pretrained
from mobilenets_zoo.pretrained import HUB_FILENAME, WeightEntry, default_entry

ROOT = Path(__file__).resolve().parents[1]
CARD = ROOT / "benchmarks" / "model_card.md"

# Threads need a page that is isolated from other origins.
SPACE = """\
---
title: mobilenets_zoo
sdk: static
app_file: index.html
license: mit
custom_headers:
  cross-origin-embedder-policy: require-corp
  cross-origin-opener-policy: same-origin
  cross-origin-resource-policy: cross-origin
---

Small CIFAR-100 networks that run in the browser. Written by `benchmarks/publish.py --space` of mobilenets_zoo.
"""


def is_default(entry: WeightEntry) -> bool:
    return default_entry(entry.model).name == entry.name


def build_folder(entry: WeightEntry, folder: Path, namespace: str) -> None:
    """Writes what is uploaded, loads it through timm as users do, and compares it with the package's weight.

    timm's `save_for_hf` would write single precision and the masked form; the file is the package's, byte for byte.

    Raises:
        ValueError: the folder loads as another model.
    """
    model = timm.create_model(entry.name, pretrained=True).eval()
    (folder / HUB_FILENAME).write_bytes(pretrained.verified_weights(entry)[1])
    pretrained.write_config(model, folder / "config.json")
    (folder / "README.md").write_text(model_card(entry, namespace), encoding="utf-8")

    images = torch.linspace(-2, 2, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
    for condensed in (None, True, False) if mz.learned_layers(model) else (None,):
        loaded = timm.create_model(f"local-dir:{folder}", pretrained=True, condensed=condensed).eval()
        try:
            mz.check_equivalent(model, loaded, images)
        except ValueError as error:
            raise ValueError(f"the folder built for {entry.name} loads as another network: {error}") from error


def model_card(entry: WeightEntry, namespace: str) -> str:
    """Fills in the card's template: $NAME is one of the names below or of the manifest row's fields.

    Parts between `<!-- only KIND -->` and `<!-- end -->` that are for other kinds of weights are left out.
    """
    path = ROOT / entry.result
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    with open(path.with_name("log.csv"), newline="", encoding="utf-8") as file:
        epochs = list(csv.DictReader(file))
    step = max(1, len(epochs) // 10)
    curve = [
        f"| {epoch['epoch']} | {epoch['size']} | {float(epoch['train_loss']):.3f} | {float(epoch['train_top1']):.1f} |"
        for epoch in epochs[(len(epochs) - 1) % step :: step]
    ]
    repo = f"{namespace}/{entry.model}"
    start, together = result["recipe"]["init_from"], result["training"].get("together", 1)
    kinds = {"learned" if "lgc" in entry.model else "plain", "taught" if entry.taught_by else "untaught"}
    part = re.compile(r"<!-- only (\w+) -->\n(.*?)<!-- end -->\n", re.DOTALL)
    template = part.sub(lambda match: match[2] if match[1] in kinds else "", CARD.read_text(encoding="utf-8"))
    formats = {int: "{:,}", float: "{:.2f}"}
    row = {key: formats.get(type(value), "{}").format(value) for key, value in dataclasses.asdict(entry).items()}
    return string.Template(template).substitute(
        row,
        description=(timm.model_entrypoint(entry.model).__doc__ or "").strip().rstrip("."),
        repo=repo,
        # The main branch holds the default weight; another is found by its tag.
        source=repo if is_default(entry) else f"{repo}@{entry.tag}",
        create=entry.model if is_default(entry) else entry.name,
        loss=f"{result['evaluation']['loss']:.3f}",
        ece=f"{result['evaluation']['ece']:.1f}",
        teacher=(entry.taught_by or "").partition(",")[0],
        epochs=result["recipe"]["epochs"],
        start=f" from the weights `{start}`" if start else "",
        together=f" for {together} networks at once" if together > 1 else "",
        minutes=f"{result['training_seconds'] / 60:.0f}",
        device=result["training"]["device"],
        seed=result["seed"],
        curve="\n".join(curve),
    )


def build_space(folder: Path, namespace: str) -> None:
    """Writes the demo page as a static Space of the Hub.

    Raises:
        ValueError, ImportError: as `build_demo.build`.
    """
    build_demo.build(folder, home=f"https://huggingface.co/{namespace}")
    (folder / "README.md").write_text(SPACE, encoding="utf-8")


def publish(entry: WeightEntry, folder: Path, repo: str) -> tuple[str, bool]:
    """Uploads a folder in one commit and tags it; returns the tag's commit and whether anything changed.

    Raises:
        WeightsError: the tag stands for another weight there, or the Hub refuses.
    """
    api = HfApi()
    try:
        api.create_repo(repo, exist_ok=True)
        refs = api.list_repo_refs(repo)
        tags = {tag.name: tag.target_commit for tag in refs.tags}
        if entry.tag in tags:
            info: Any = api.get_paths_info(repo, [HUB_FILENAME], revision=entry.tag)
            if not info or not info[0].lfs or info[0].lfs.sha256 != entry.sha256:
                raise mz.WeightsError(f"{repo} has another weight tagged {entry.tag}; a new training needs a new tag")
            if not is_default(entry):  # by now the main branch holds the default weight
                return tags[entry.tag], False
        before = {branch.name: branch.target_commit for branch in refs.branches}.get("main")
        commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Weights {entry.name}")
        if entry.tag not in tags:
            api.create_tag(repo, tag=entry.tag, revision=commit.oid)
        return tags.get(entry.tag, commit.oid), entry.tag not in tags or commit.oid != before
    except mz.WeightsError:
        raise
    # Between OSError, ValueError and the HTTP client's own errors the base classes change from release to release.
    except Exception as error:
        refused = getattr(getattr(error, "response", None), "status_code", None) in (401, 403)
        remedy = "log in with `hf auth login` as one who may write there" if refused else "try again"
        raise mz.WeightsError(f"{repo} can't be published: {error}; {remedy}") from error


def record_revision(entry: WeightEntry, revision: str) -> None:
    """Writes the Hub's commit into the manifest, so that downloads are pinned to it."""
    path = pretrained.WEIGHTS_DIR / "manifest.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    rows[entry.name]["revision"] = revision
    mz.utils.write_json(path, rows)
    pretrained.manifest.cache_clear()


def chosen(name: str | None) -> list[WeightEntry]:
    """Returns the weight, or all; a model's default comes last, behind a single other one too, for the main branch."""
    if name is None:
        return sorted(mz.manifest().values(), key=lambda entry: (entry.model, is_default(entry)))
    defaults = {entry.model: entry for entry in mz.manifest().values() if is_default(entry)}
    entry = mz.manifest().get(name, defaults.get(name))
    if entry is None:
        raise ValueError(f"there is no weight {name!r}; choose one of {', '.join([*defaults, *mz.manifest()])}")
    return [entry] if is_default(entry) else [entry, defaults[entry.model]]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", help="a model or MODEL.TAG")
    parser.add_argument("--all", action="store_true", help="every weight of the package")
    parser.add_argument("--dry-run", type=Path, metavar="DIR", help="write folders, upload nothing")
    parser.add_argument("--space", type=Path, metavar="DIR", help="write the demo page as a Space, upload nothing")
    parser.add_argument("--namespace", default="mobilenets-zoo", help="user or organisation on the Hub")
    args = parser.parse_args(argv)
    try:
        if [bool(args.name), args.all, bool(args.space)].count(True) != 1:
            raise ValueError("give either the NAME of a model or --all or --space")
        if args.space and args.dry_run:
            raise ValueError("--space uploads nothing; leave --dry-run out")
        if args.space:
            build_space(args.space, args.namespace)
            return 0
        entries = chosen(args.name)
        for entry in entries[:1] if args.name and args.dry_run else entries:
            with tempfile.TemporaryDirectory() as scratch:
                build_folder(entry, Path(scratch), args.namespace)
                repo = f"{args.namespace}/{entry.model}"
                if args.dry_run:
                    name = entry.model if is_default(entry) else entry.name
                    target = args.dry_run / name if args.all else args.dry_run
                    if target.exists() and set(os.listdir(target)) - set(os.listdir(scratch)):
                        raise ValueError(f"{target} holds other files already; choose an empty folder")
                    shutil.copytree(scratch, target, dirs_exist_ok=True)
                    print(f"{entry.name}: wrote {target}", flush=True)
                    continue
                revision, changed = publish(entry, Path(scratch), repo)
            print(f"{entry.name}: {'published' if changed else 'unchanged'}, {repo} at {revision}", flush=True)
            if entry.hub_id == repo and entry.revision != revision:
                record_revision(entry, revision)
    except (ValueError, OSError, ImportError, mz.WeightsError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
