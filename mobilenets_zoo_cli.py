"""The command line: `mobilenets-zoo list | info | predict | evaluate | export | finetune`.

A module beside the package, because importing the package imports torch, which --help and --version needn't wait for.
"""

import contextlib
import difflib
import importlib.util
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

__all__ = ["main"]


class _OnUse:
    """A module that is imported when something in it is used."""

    def __init__(self, name: str):
        self._module_name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self._module_name), name)


timm: Any = _OnUse("timm")
torch: Any = _OnUse("torch")
mz: Any = _OnUse("mobilenets_zoo")
huggingface_hub: Any = _OnUse("huggingface_hub")
catalogue: Any = _OnUse("mobilenets_zoo.catalogue")

MAX_IMAGE_BYTES = 64 * 2**20

# What `info` says where a value is None.
MISSING = {
    "ms": "not measured",
    "processor": "not measured",
    "optimized_macs": "not measured",
    "taught_by": "the labels alone",
    "revision": "not published yet",
}

# What timm.create_model reads from a folder or the Hub, beside the names of models.
SOURCES = ("local-dir:", "hf-hub:")


class InputError(click.ClickException):
    """Bad input; the message is one line that says what is wrong and what to do."""


def main() -> None:
    """Runs the command line; bad input ends with one line on standard error and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names may hold what a pipe's encoding lacks, on Windows above all
            stream.reconfigure(errors="backslashreplace")
    try:
        sys.exit(cli.main(standalone_mode=False))
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        message = error.format_message()
    except OSError as error:
        if error.filename:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python would try to write the rest again as it ends
        message = f"standard output can't be written: {error.strerror or error}"
    except RuntimeError as error:
        if not isinstance(error, mz.WeightsError):
            raise
        message = str(error)
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


@click.group(no_args_is_help=False, context_settings=dict(help_option_names=["-h", "--help"]))
@click.version_option(package_name="mobilenets-zoo", prog_name="mobilenets-zoo")
def cli() -> None:
    """Small, fast CIFAR-100 networks: list them, classify images, measure them.

    NAME is a model, MODEL.TAG for certain weights, local-dir:DIR or hf-hub:ID.
    """


def _device(context: click.Context, parameter: click.Parameter, device: str) -> str:
    """Returns the device if tensors can be there."""
    try:
        torch.ones(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise InputError(f"the device {device} can't be used ({reason}); choose cpu or cuda") from error
    return device


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of a table.")
device_option = click.option("--device", default="cpu", show_default=True, callback=_device)
data_option: dict[str, Any] = dict(help="Folder of images per class, Parquet, torchvision root, or uoft-cs/cifar100.")


@cli.command("list")
@json_option
def list_models(as_json: bool) -> None:
    """List the models with their size, cost and accuracy.

    ms is the time of one image, and timed MACs are those of the network that took it.
    """
    rows = [catalogue.summary(name) for name in catalogue.model_names()]
    rows.sort(key=lambda row: (row["name"].split("_")[0], -row["macs"]))
    if as_json:
        _print_json(rows)
        return
    columns = {
        "model": [row["name"] for row in rows],
        "top-1\n(%)": [f"{row['weights']['top1']:.2f}" if row["weights"] else "-" for row in rows],
        "ms": [f"{row['ms']:.2f}" if row["ms"] else "-" for row in rows],
        "params\n(M)": [f"{row['params'] / 1e6:.3f}" for row in rows],
        "MACs\n(M)": [f"{row['macs'] / 1e6:.1f}" for row in rows],
        "timed\n(M)": [f"{row['optimized_macs'] / 1e6:.1f}" if row["optimized_macs"] else "-" for row in rows],
    }
    processors = ", ".join(sorted({row["processor"] for row in rows if row["processor"]}))
    console = _console()
    while True:  # a narrow terminal shows fewer columns, and whole names
        table = Table(show_edge=False, pad_edge=False, caption=f"ms: one image on one thread of {processors}")
        for header in columns:
            table.add_column(header, justify="left" if header == "model" else "right", overflow="fold")
        for cells in zip(*columns.values(), strict=True):
            table.add_row(*cells)
        if len(columns) == 1 or Console(width=1000).measure(table).maximum <= console.width:
            break
        columns.popitem()
    console.print(table)


@cli.command()
@click.argument("name")
@json_option
def info(name: str, as_json: bool) -> None:
    """Show what a model is, what it costs and which weights it has."""
    _check_name(name)
    if name.startswith(SOURCES):
        model = _pretrained(name)
        cfg = model.pretrained_cfg
        with contextlib.suppress(ValueError):  # nothing to condense, or masks that aren't finished
            model = mz.condense(model)
        cost = mz.profile(model, cfg["input_size"])
        document = {"name": name, "architecture": cfg["architecture"], "classes": cfg["num_classes"]}
        document |= {"params": cost.params, "macs": cost.macs, "weights": None}
    else:
        cfg = timm.get_pretrained_cfg(name).to_dict()
        document = catalogue.summary(name) | {"tags": _tags(name.partition(".")[0])}
        document["description"] = (timm.model_entrypoint(cfg["architecture"]).__doc__ or "").strip()
    document["input_size"] = list(cfg["input_size"])
    document["mean"], document["std"] = list(cfg["mean"]), list(cfg["std"])
    if as_json:
        _print_json(document)
        return
    weights = document.pop("weights") or {}
    for key, value in (document | weights).items():
        if value is None:
            value = MISSING[key]
        elif isinstance(value, list):
            value = ", ".join(map(str, value)) or "-"
        click.echo(f"{key:15} {f'{value:,}' if isinstance(value, int) else _printable(str(value))}")


@cli.command()
@click.argument("images", nargs=-1, metavar="IMAGE...")
@click.option("--model", "name", help="NAME to use; by default the most accurate of those that are fast.")
@click.option("--top", default=5, show_default=True, type=click.IntRange(1), help="Classes to show.")
@click.option("--demo", is_flag=True, help="Classify a sample photo of scikit-image.")
@json_option
def predict(images: tuple[str, ...], name: Optional[str], top: int, demo: bool, as_json: bool) -> None:
    """Classify image files (PNG, JPEG, WebP, ...); "-" reads one from standard input."""
    if demo:
        images = (*images, _sample_photo())
    if not images:
        raise InputError("Missing argument IMAGE...; give an image file, or --demo for a sample photo")
    name = name or catalogue.best_model()
    model = _pretrained(name)
    if (channels := model.pretrained_cfg["input_size"][0]) != 3:
        raise InputError(f"{name} takes images of {channels} channel(s); choose a network for colour images")
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    classes = _class_names(model)
    results: list[dict[str, Any]] = []
    for image in images:
        try:
            pixels = transform(_read_image(image)).unsqueeze(0)
        except InputError as error:
            results.append({"image": image, "error": str(error)})
            continue
        with torch.inference_mode():
            model(pixels)  # the first pass prepares kernels and would be all that is timed
            start = time.perf_counter()
            probabilities = model(pixels).softmax(1)[0]
        milliseconds = round(1000.0 * (time.perf_counter() - start), 2)
        if not probabilities.isfinite().all():
            results.append({"image": image, "error": f"{_printable(image)}: the network's outputs aren't finite"})
            continue
        best = probabilities.topk(min(top, len(classes)))
        predictions = [
            {"class": classes[label], "label": label, "probability": probability}
            for probability, label in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        results.append({"image": image, "ms": milliseconds, "predictions": predictions})

    if as_json:
        _print_json({"model": _full_name(name, model), "images": results})
    console = _console()
    for result in results:
        if "error" in result:
            console.file.flush()
            print("error: " + " ".join(result["error"].split()), file=sys.stderr, flush=True)
        elif not as_json:
            for line in (result["image"], f"{_full_name(name, model)} in {result['ms']:.1f} ms"):
                console.print(_printable(line), highlight=False, markup=False, soft_wrap=True)
            table = Table(Column("class", overflow="fold"), Column("probability", justify="right"))
            for row in result["predictions"]:
                table.add_row(escape(_printable(row["class"])), f"{100 * row['probability']:.1f} %")
            console.print(table)
    if any("error" in result for result in results):
        sys.exit(2)


@cli.command()
@click.argument("name")
@click.option("--data", required=True, **data_option)
@click.option("--condensed", is_flag=True, help="Measure the deployed form of the learned group convolutions.")
@click.option("--batch-size", default=50, show_default=True, type=click.IntRange(1))
@device_option
@json_option
def evaluate(name: str, data: str, condensed: bool, batch_size: int, device: str, as_json: bool) -> None:
    """Measure a model's pretrained weights on the test images.

    Where the data has none, those are about a fifth of each class, the ones that finetune holds out.
    """
    mz.utils.keep_freed_memory()
    model = _pretrained(name)
    if condensed:
        model = _condensed(model)
    try:
        model = model.to(torch.device(device), memory_format=torch.channels_last)
        images = mz.data.read_split(data, "test", model)
        with mz.utils.progress_bar() as progress:
            result = mz.evaluation.evaluate(model, images, batch_size, _counter(progress, name, len(images)))
    except (ValueError, RuntimeError) as error:
        raise InputError(str(error)) from error
    full_name = _full_name(name, model)
    if as_json:
        _print_json({"model": full_name, "condensed": condensed, **result.to_dict()})
        return
    table = Table(title=escape(_printable(full_name)))
    for header in ("images", "top-1 (%)", "top-5 (%)", "loss", "ECE (%)"):
        table.add_column(header, overflow="fold")
    table.add_row(
        f"{result.images:,}", f"{result.top1:.2f}", f"{result.top5:.2f}", f"{result.loss:.4f}", f"{result.ece:.2f}"
    )
    _console().print(table)


@cli.command()
@click.argument("name")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.onnx")
@click.option("--condensed", is_flag=True, help="Learned group convolutions as a gather and a grouped convolution.")
@click.option("--optimized", is_flag=True, help="Condensed and rewritten for inference, mostly the fastest form.")
@click.option("--with-preprocessing", is_flag=True, help="uint8 images (N, H, W, C) in, probabilities out.")
@click.option("--int8", is_flag=True, help="Quantise statically; needs --data, shows the accuracy beside fp32.")
@click.option("--data", **data_option)
def export(
    name: str, file: Path, condensed: bool, optimized: bool, with_preprocessing: bool, int8: bool, data: Optional[str]
) -> None:
    """Write a model with its pretrained weights as one ONNX file, checked against PyTorch."""
    if condensed and optimized:
        raise InputError("--condensed and --optimized are two forms; choose one of them")
    if int8 != (data is not None):
        raise InputError("--int8 and --data go together: calibration needs training images")
    if file.suffix != ".onnx":
        raise InputError(f"{file}: the name must end in .onnx")
    if not file.parent.is_dir():
        raise InputError(f"{file.parent}: no such folder; create it or choose another file")
    model = network = _pretrained(name)
    full_name, calibration, test = _full_name(name, model), None, None
    try:
        if condensed:
            network = _condensed(model)
        elif optimized:
            if not isinstance(model, mz.MobileNetV1 | mz.MobileNetV2):
                raise ValueError(f"{type(model).__name__} is not a network of the zoo; leave --optimized out")
            network = mz.optimize_for_inference(model, dense=int8)
        if data is not None:
            train, test = (mz.data.read_split(data, split, model) for split in ("train", "test"))
            if len(test.classes) != model.num_classes:
                raise ValueError(f"the data has {len(test.classes)} classes and the model {model.num_classes}")
            calibration = mz.onnx.calibration_images(train)
        with mz.utils.progress_bar() as progress:
            exported = _counter(progress, f"export {full_name}", 1)
            mz.export_onnx(network, file, preprocessing=with_preprocessing, calibration_images=calibration)
            exported(1)
            lines = [f"{file}: {full_name}, {file.stat().st_size:,} bytes"]
            if test is not None:
                fp32 = mz.evaluation.evaluate(model, test, on_progress=_counter(progress, "fp32", len(test)))
                top1 = mz.onnx.onnx_top1(mz.OnnxClassifier(file), test, _counter(progress, "int8", len(test)))
                lines.append(f"top-1 on the {len(test):,} test images: int8 {top1:.2f} %, fp32 {fp32.top1:.2f} %")
    except OSError as error:
        raise InputError(f"{file}: {error.strerror or error}; choose another file") from error
    except (ImportError, ValueError, RuntimeError) as error:
        raise InputError(str(error)) from error
    click.echo("\n".join(lines))


@cli.command()
@click.argument("name")
@click.option(
    "--data", required=True, help="Folder of images per class (below train and test or not), or Parquet folder."
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="New folder for weights and results.")
@click.option("--epochs", type=click.IntRange(1), help="By default 10 for 1,000 images, at least 5, at most 40.")
@click.option("--batch-size", default=32, show_default=True, type=click.IntRange(2))
@click.option("--lr", type=click.FloatRange(0, min_open=True), help="By default 0.003, less below 1,000 images.")
@click.option("--layer-decay", default=0.9, show_default=True, type=click.FloatRange(0, 1, min_open=True))
@click.option("--size", type=click.IntRange(8, 512), help="Side of the input in pixels, by default the model's.")
@click.option("--flip/--no-flip", default=True, help="Show mirrored images, too; not for digits and text.")
@click.option("--freeze", is_flag=True, help="Fit the classifier alone.")
@click.option("--scratch", is_flag=True, help="Start from random weights, to compare.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**32 - 1))
@device_option
@click.option("--force", is_flag=True, help="Replace what an earlier run wrote to --out.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run.")
def finetune(name: str, data: str, out: Path, device: str, force: bool, resume: bool, **settings: Any) -> None:
    """Fine-tune a model on images of your own.

    NAME is one of `list`, NAME.TAG, local-dir:DIR or hf-hub:ID. Ctrl-C keeps what was learned, and --resume goes on.
    """
    from mobilenets_zoo import finetuning

    _check_name(name)
    mz.utils.keep_freed_memory()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C, with what was learned saved
    checkpoint, before = out / "checkpoint.pt", None
    try:
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else None
        with mz.utils.progress_bar() as progress:
            chosen = finetuning.Settings(**settings)
            result = finetuning.finetune(name, data, out, chosen, progress, device, force, resume)
    except (ValueError, OSError, RuntimeError) as error:
        raise InputError(str(error)) from error
    except KeyboardInterrupt:
        # That of a run that --force replaces doesn't count.
        learned = checkpoint.exists() and (resume or checkpoint.stat().st_mtime_ns != before)
        click.echo(
            f"{out}: stopped" + ("; go on with --resume" if learned else " before anything was learned"), err=True
        )
        sys.exit(130)
    if not result["finished"]:
        click.echo(f"{out}: stopped after {len(result['history'])} of {result['epochs']} epochs; go on with --resume")
        sys.exit(130)
    scores = result["evaluation"]
    click.echo(
        f"{out}: top-1 {scores['top1']:.1f} % of {scores['images']:,} held-out images, {result['seconds']:.0f} s"
    )


def _read_image(source: str) -> Any:
    """Reads an image file, or standard input for "-".

    Raises:
        InputError: no such file, too large, or not a readable image.
    """
    label = "standard input" if source == "-" else _printable(source)
    try:
        with click.open_file(source, "rb") as file:
            content = file.read(MAX_IMAGE_BYTES + 1)
    except FileNotFoundError:
        raise InputError(f"{label}: no such file; check the path") from None
    except (OSError, ValueError, RuntimeError) as error:  # click's RuntimeError: standard input is closed
        reason = getattr(error, "strerror", None) or ("is closed" if source == "-" else error)
        raise InputError(f"{label}: {reason}; give an image file that can be read") from None
    if len(content) > MAX_IMAGE_BYTES:
        raise InputError(f"{label}: has more than {MAX_IMAGE_BYTES / 2**20:.0f} MiB; make the image smaller first")
    try:
        return mz.data.read_image(content, label)
    except ValueError as error:
        raise InputError(str(error)) from None


def _sample_photo() -> str:
    """Returns the path of a photo that scikit-image brings along."""
    spec = importlib.util.find_spec("skimage")
    photo = Path(spec.origin).parent / "data" / "rocket.jpg" if spec and spec.origin else None
    if photo is None or not photo.is_file():
        raise InputError("the sample photo is one of scikit-image; run pip install scikit-image")
    return str(photo)


def _printable(name: str) -> str:
    """Returns a file name with control and undecodable characters escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def _counter(progress: Any, description: str, total: int) -> Callable[[int], None]:
    """Adds a bar and returns what sets how much of it is done."""
    task = progress.add_task(description, total=total)
    return lambda completed: progress.update(task, completed=completed)


def _console() -> Console:
    console = Console()
    # Where nobody sees the terminal's width (a pipe), lines must not be cut at 80 characters.
    return console if console.is_terminal else Console(width=200)


def _print_json(document: Any) -> None:
    click.echo(json.dumps(document, indent=2, allow_nan=False))


def _tags(model: str) -> list[str]:
    return [entry.tag for entry in mz.manifest().values() if entry.model == model]


def _check_name(name: str) -> None:
    names, (model, _, tag) = catalogue.model_names(), name.partition(".")
    if name.startswith(SOURCES) or name in mz.manifest() or name in names:
        return
    if model in names:
        raise InputError(f"{model} has no weight {tag!r}; its tags are {', '.join(_tags(model))}")
    matches = difflib.get_close_matches(model, names, 2) or [other for other in names if model and model in other]
    folder = [f"local-dir:{name}"] if name and os.path.isdir(name) else []
    close = " or ".join([*matches[:2], *folder])
    hint = f"did you mean {close}?" if close else "see mobilenets-zoo list"
    raise InputError(f"there is no model {name!r}; {hint}")


def _pretrained(name: str) -> Any:
    _check_name(name)
    huggingface_hub.logging.set_verbosity_error()  # an error says what its retries would
    try:
        return timm.create_model(name, pretrained=True).eval()
    except Exception as error:
        if not name.startswith(SOURCES):
            raise
        # What somebody else's folder holds can fail anywhere in timm.
        raise InputError(f"{name} can't be loaded: {type(error).__name__}: {error}") from error


def _condensed(model: Any) -> Any:
    try:
        return mz.condense(model)
    except ValueError as error:
        raise InputError(f"{error}; leave --condensed out") from error


def _class_names(model: Any) -> list[str]:
    """Returns the names that the model's configuration gives its classes, numbers where it gives none."""
    names = model.pretrained_cfg.get("label_names") or ()
    return list(map(str, names if len(names) == model.num_classes else range(model.num_classes)))


def _full_name(name: str, model: Any) -> str:
    cfg = model.pretrained_cfg
    return name if name.startswith(SOURCES) else f"{cfg['architecture']}.{cfg['tag']}"
