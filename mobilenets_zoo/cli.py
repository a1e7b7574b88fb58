"""The command line: `mobilenets-zoo list | info | predict | evaluate | export | publish | finetune`."""

import json
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Optional

import click
import timm
import torch
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

import mobilenets_zoo as mz
from mobilenets_zoo.progress import progress_bar

__all__ = ["main"]

MODEL_PATTERN = "*_cifar100"


class InputError(Exception):
    """Bad input; the message is one line that says what is wrong and what to do."""


def main() -> None:
    """Runs the command line; bad input ends with one line on standard error and exit code 2."""
    try:
        sys.exit(cli.main(standalone_mode=False))
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        message = error.format_message()
    except (InputError, mz.WeightsError) as error:
        message = str(error)
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


@click.group(no_args_is_help=False, context_settings=dict(help_option_names=["-h", "--help"]))
@click.version_option(mz.__version__, package_name="mobilenets-zoo", prog_name="mobilenets-zoo")
def cli() -> None:
    """Small, fast CIFAR-100 networks: list them, classify images, measure them."""


# The slowest network that `predict` takes by itself, milliseconds an image.
FAST_MS = 10
MAX_IMAGE_BYTES = 64 * 2**20

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of a table.")


@cli.command("list")
@json_option
def list_models(as_json: bool) -> None:
    """List the models with their size, cost and accuracy."""
    rows = [_summary(name) for name in timm.list_models(MODEL_PATTERN)]
    rows.sort(key=lambda row: (row["name"].split("_")[0], -row["macs"]))
    if as_json:
        _print_json(rows)
        return
    table = Table("model", "params (M)", "MACs (M)", "ms", "top-1 (%)", "weights")
    for column in table.columns[1:4]:
        column.justify = "right"
    for row in rows:
        weights = row["weights"]
        top1 = f"{weights['top1']:.2f}" if weights else "-"
        tag = weights["tag"] if weights else "not trained yet"
        milliseconds = f"{row['ms']:.2f}" if row["ms"] else "-"
        table.add_row(row["name"], f"{row['params'] / 1e6:.3f}", f"{row['macs'] / 1e6:.1f}", milliseconds, top1, tag)
    _console().print(table)


@cli.command()
@click.argument("name")
@json_option
def info(name: str, as_json: bool) -> None:
    """Show what a model is, what it costs and which weights it has."""
    _check_name(name)
    summary = _summary(name)
    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None  # every registered model has one
    summary["input_size"] = list(cfg.input_size)
    summary["mean"], summary["std"] = list(cfg.mean), list(cfg.std)
    summary["description"] = (timm.model_entrypoint(name).__doc__ or "").strip()
    if as_json:
        _print_json(summary)
        return
    table = Table(show_header=False)
    table.add_row("model", name)
    table.add_row("description", summary["description"])
    table.add_row("parameters", f"{summary['params']:,}")
    table.add_row("MACs", f"{summary['macs']:,}")
    table.add_row("input", " x ".join(map(str, cfg.input_size)))
    table.add_row("mean, std", f"{cfg.mean}, {cfg.std}")
    weights = summary["weights"]
    if weights:
        table.add_row("weights", f"{weights['tag']}: top-1 {weights['top1']:.2f} %, top-5 {weights['top5']:.2f} %")
        table.add_row("taught by", weights["taught_by"] or "the labels alone")
        table.add_row("recipe", weights["recipe"])
        table.add_row("file", f"{weights['file']}, {weights['bytes']:,} bytes, sha256 {weights['sha256']}")
        hub = f"{weights['hub_id']} at {weights['revision']}" if weights["revision"] else "not published yet"
        table.add_row("Hub", hub)
    else:
        table.add_row("weights", "not trained yet")
    _console().print(table)


@cli.command()
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option(
    "--model", "name", help=f"Model to use; by default the most accurate one that takes less than {FAST_MS} ms."
)
@click.option("--top", default=5, show_default=True, type=click.IntRange(1, 100), help="Classes to show.")
@json_option
def predict(images: tuple[str, ...], name: Optional[str], top: int, as_json: bool) -> None:
    """Classify image files (PNG, JPEG, WebP, ...); "-" reads one from standard input."""
    model = _pretrained(name or _best_model())
    transform = _transform(model)
    results: list[dict[str, Any]] = []
    for image in images:
        try:
            pixels = transform(_read_image(image))
        except InputError as error:
            results.append({"image": image, "error": str(error)})
            continue
        with torch.inference_mode():
            probabilities = model(pixels.unsqueeze(0)).softmax(1)[0]
        best = probabilities.topk(top)
        predictions = [
            {"class": mz.CIFAR100_CLASSES[label], "label": label, "probability": probability}
            for probability, label in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        results.append({"image": image, "predictions": predictions})

    if as_json:
        _print_json({"model": _full_name(model), "images": results})
    console = _console()
    for result in results:
        if "error" in result:
            console.file.flush()
            print("error: " + " ".join(result["error"].split()), file=sys.stderr, flush=True)
        elif not as_json:
            console.print(_printable(result["image"]), highlight=False, markup=False, soft_wrap=True)
            table = Table("class", "probability")
            table.columns[1].justify = "right"
            for row in result["predictions"]:
                table.add_row(row["class"], f"{100 * row['probability']:.1f} %")
            console.print(table)
    if any("error" in result for result in results):
        sys.exit(2)


@cli.command()
@click.argument("name")
@click.option("--data", required=True, help="Parquet folder, torchvision root, or uoft-cs/cifar100.")
@click.option("--condensed", is_flag=True, help="Measure the deployed form of the learned group convolutions.")
@click.option("--batch-size", default=50, show_default=True, type=click.IntRange(1))
@click.option("--device", default="cpu", show_default=True)
@json_option
def evaluate(name: str, data: str, condensed: bool, batch_size: int, device: str, as_json: bool) -> None:
    """Measure a model's pretrained weights on the test images."""
    from mobilenets_zoo.evaluation import evaluate as measure

    model = _pretrained(name, **({"condensed": True} if condensed else {}))
    try:
        if torch.device(device).type == "meta":
            raise ValueError("the device meta holds no values; choose cpu or cuda")
        model = model.to(torch.device(device), memory_format=torch.channels_last)
        images = mz.data.load_images(data, "test")
    except (ValueError, RuntimeError, AssertionError) as error:
        raise InputError(str(error)) from error
    with progress_bar() as progress:
        task = progress.add_task(name, total=len(images))
        try:
            result = measure(model, images, batch_size, partial(_advance, progress, task))
        except ValueError as error:
            raise InputError(str(error)) from error
    if as_json:
        _print_json({"model": _full_name(model), "condensed": condensed, **result.to_dict()})
        return
    table = Table("images", "top-1 (%)", "top-5 (%)", "loss", "ECE (%)", title=_full_name(model))
    table.add_row(
        f"{result.images:,}", f"{result.top1:.2f}", f"{result.top5:.2f}", f"{result.loss:.4f}", f"{result.ece:.2f}"
    )
    _console().print(table)


@cli.command()
@click.argument("name")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.onnx")
@click.option("--condensed", is_flag=True, help="Export the fastest form: condensed and rewritten for inference.")
@click.option("--with-preprocessing", is_flag=True, help="uint8 images (N, H, W, C) in, probabilities out.")
@click.option("--int8", is_flag=True, help="Quantise statically; needs --data, shows the accuracy beside fp32.")
@click.option("--data", help="For --int8: Parquet folder, torchvision root, or uoft-cs/cifar100.")
def export(name: str, file: Path, condensed: bool, with_preprocessing: bool, int8: bool, data: Optional[str]) -> None:
    """Write a model with its pretrained weights as one ONNX file, checked against PyTorch."""
    from mobilenets_zoo.evaluation import evaluate as measure

    if int8 != (data is not None):
        raise InputError("--int8 and --data go together: calibration needs training images")
    if file.suffix != ".onnx":
        raise InputError(f"{file}: the name must end in .onnx")
    if not file.parent.is_dir():
        raise InputError(f"{file.parent}: no such folder; create it or choose another file")
    model = _pretrained(name)
    network = mz.optimize_for_inference(model, dense=int8) if condensed else model
    calibration = test = None
    try:
        if data is not None:
            train, test = (mz.data.load_images(data, split) for split in ("train", "test"))
            _check_classes(model, test)
            calibration = mz.onnx.calibration_images(train)
        with progress_bar() as progress:
            task = progress.add_task(f"export {_full_name(model)}", total=None)
            mz.export_onnx(network, file, preprocessing=with_preprocessing, calibration_images=calibration)
            progress.update(task, total=1, completed=1)
            lines = [f"{file}: {_full_name(model)}, {file.stat().st_size:,} bytes"]
            if test is not None:
                task = progress.add_task("accuracy", total=2 * len(test))
                fp32 = measure(model, test, on_progress=partial(_advance, progress, task))
                top1 = mz.onnx.onnx_top1(
                    mz.OnnxClassifier(file), test, partial(_advance, progress, task, offset=len(test))
                )
                lines.append(f"top-1 on the {len(test):,} test images: int8 {top1:.2f} %, fp32 {fp32.top1:.2f} %")
    except ImportError as error:
        raise InputError(str(error)) from error
    except OSError as error:
        raise InputError(f"{file}: {error.strerror or error}; choose another file") from error
    except ValueError as error:
        raise InputError(str(error)) from error
    click.echo("\n".join(lines))


@cli.command()
@click.argument("name", required=False)
@click.option("--all", "publish_all", is_flag=True, help="Publish every model that has weights.")
@click.option("--namespace", default="mobilenets-zoo", show_default=True, help="User or organisation on the Hub.")
@click.option("--dry-run", type=click.Path(path_type=Path), metavar="DIR", help="Write the folder, upload nothing.")
def publish(name: Optional[str], publish_all: bool, namespace: str, dry_run: Optional[Path]) -> None:
    """Upload a model's weights, configuration and card to the Hugging Face Hub."""
    from mobilenets_zoo.hub import publish as hub

    if bool(name) == publish_all:
        raise InputError("give either the NAME of a model or --all")
    if name:
        _check_name(name)
        entries = [mz.pretrained.default_entry(name)]
    else:
        entries = hub.in_publishing_order(mz.manifest().values())
    lines = []
    try:
        with progress_bar() as progress:
            for entry in progress.track(entries, description="publish"):
                if dry_run is not None:
                    folder = dry_run / entry.name if publish_all else dry_run
                    lines.append(f"{entry.name}: wrote {hub.build_folder(entry, folder, namespace)}")
                    continue
                revision, changed = hub.publish(entry, namespace)
                lines.append(f"{entry.name}: {'published' if changed else 'unchanged'}, {namespace} at {revision}")
                if entry.hub_id == f"{namespace}/{entry.model}" and entry.revision != revision:
                    hub.record_revision(entry, revision)
    except hub.PublishError as error:
        raise InputError(str(error)) from error
    finally:
        for line in lines:
            click.echo(line)


def _read_image(source: str) -> Any:
    """Reads an image file, or standard input for "-".

    Raises:
        InputError: no such file, too large, or not a readable image.
    """
    label = "standard input" if source == "-" else _printable(source)
    try:
        if source == "-":
            content = sys.stdin.buffer.read(MAX_IMAGE_BYTES + 1)
        else:
            with open(source, "rb") as file:
                content = file.read(MAX_IMAGE_BYTES + 1)
    except FileNotFoundError:
        raise InputError(f"{label}: no such file; check the path") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{label}: {reason}; give an image file that can be read") from None
    if len(content) > MAX_IMAGE_BYTES:
        raise InputError(f"{label}: has more than {MAX_IMAGE_BYTES / 2**20:.0f} MiB; make the image smaller first")
    try:
        return mz.data.read_image(content, label)
    except ValueError as error:
        raise InputError(str(error)) from None


def _printable(name: str) -> str:
    """Returns a file name with control and undecodable characters escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def _advance(progress: Progress, task: TaskID, completed: int, offset: int = 0) -> None:
    progress.update(task, completed=offset + completed)


def _check_classes(model: Any, images: mz.data.ImageSet) -> None:
    if len(images.classes) != model.num_classes:
        raise InputError(f"the data has {len(images.classes)} classes and the model {model.num_classes}")


def _console() -> Console:
    console = Console()
    # Where nobody sees the terminal's width (a pipe), lines must not be cut at 80 characters.
    return console if console.is_terminal else Console(width=200)


def _print_json(document: Any) -> None:
    click.echo(json.dumps(document, indent=2))


def _check_name(name: str) -> None:
    if name not in timm.list_models(MODEL_PATTERN):
        names = ", ".join(timm.list_models(MODEL_PATTERN))
        raise InputError(f"there is no model {name!r}; choose one of {names}")


def _summary(name: str) -> dict[str, Any]:
    """Returns size, cost and weights of a model, deployed, without building it."""
    try:
        weights: Optional[mz.pretrained.WeightEntry] = mz.pretrained.default_entry(name)
    except mz.WeightsError:
        weights = None
    cost = mz.profiling.deployed_profiles()[name]
    milliseconds = mz.profiling.deployed_milliseconds()[name]
    row = {"name": name, "params": cost.params, "macs": cost.macs, "ms": milliseconds, "weights": None}
    if weights:
        fields = ("tag", "top1", "top5", "taught_by", "file", "bytes", "sha256", "recipe", "hub_id", "revision")
        row["weights"] = {field: getattr(weights, field) for field in fields}
    return row


def _best_model() -> str:
    rows = [row for row in map(_summary, timm.list_models(MODEL_PATTERN)) if row["weights"]]
    fast = [row for row in rows if row["ms"] is None or row["ms"] < FAST_MS]
    return max(fast or rows, key=lambda row: row["weights"]["top1"])["name"]


def _pretrained(name: str, **kwargs: Any) -> Any:
    _check_name(name.partition(".")[0])
    try:
        return timm.create_model(name, pretrained=True, **kwargs).eval()
    except TypeError as error:
        if "condensed" in kwargs:
            raise InputError(f"{name} has no learned group convolution; leave --condensed out") from error
        raise
    except (ValueError, RuntimeError) as error:
        raise InputError(str(error)) from error


def _transform(model: Any) -> Callable[[Any], torch.Tensor]:
    from timm.data import create_transform, resolve_model_data_config

    return create_transform(**resolve_model_data_config(model))


def _full_name(model: Any) -> str:
    cfg = model.pretrained_cfg
    return f"{cfg['architecture']}.{cfg['tag']}"


@cli.command()
@click.argument("name", metavar="MODEL")
@click.option(
    "--data", required=True, help="Folder of images per class (below train and test or not), or Parquet folder."
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="New folder for weights and results.")
@click.option("--epochs", default=10, show_default=True, type=click.IntRange(1))
@click.option("--batch-size", default=32, show_default=True, type=click.IntRange(2))
@click.option("--lr", default=3e-3, show_default=True, type=click.FloatRange(0, min_open=True))
@click.option("--layer-decay", default=0.9, show_default=True, type=click.FloatRange(0, 1, min_open=True))
@click.option("--size", type=click.IntRange(8, 1024), help="Side of the input in pixels, by default the model's.")
@click.option("--flip/--no-flip", default=True, help="Show mirrored images, too; not for digits and text.")
@click.option("--freeze", is_flag=True, help="Fit the classifier alone.")
@click.option("--scratch", is_flag=True, help="Start from random weights, to compare.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option("--device", default="cpu", show_default=True)
@click.option("--force", is_flag=True, help="Replace what an earlier run wrote to --out.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run.")
def finetune(name: str, data: str, out: Path, device: str, force: bool, resume: bool, **settings: Any) -> None:
    """Fine-tune a model on images of your own: a name, NAME.TAG, local-dir:DIR or hf-hub:ID."""
    from mobilenets_zoo import finetuning

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C, with what was learned saved
    try:
        with progress_bar() as progress:
            chosen = finetuning.Settings(**settings)
            result = finetuning.finetune(name, data, out, chosen, progress, device, force, resume)
    except (ValueError, OSError, RuntimeError, AssertionError) as error:
        raise InputError(str(error)) from error
    if not result["finished"]:
        click.echo(f"{out}: stopped after {len(result['history'])} of {chosen.epochs} epochs; go on with --resume")
        sys.exit(130)
    scores = result["evaluation"]
    click.echo(
        f"{out}: top-1 {scores['top1']:.1f} % of {scores['images']:,} held-out images, {result['seconds']:.0f} s"
    )
