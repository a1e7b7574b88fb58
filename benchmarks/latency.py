"""Times every model in every form, and its peers, in one run.

    python benchmarks/latency.py --out benchmarks/results/latency.json

Needs `pip install '.[onnx]'`; OpenVINO is timed where it is installed. Within a cell
(runtime, threads, batch) all forms run in turns and in changing order, so that drift of the machine hits all alike;
what counts are ratios within a cell. Files are timed in several passes over all cells, with sessions made anew and in
random order: a machine whose speed changes for minutes is met more than once. Each pass keeps its own medians, because
times at two speeds of the machine, pooled, have a median that falls on either. Forms:

- plain: the network as it trains, BatchNorm unfused in eager PyTorch; masked layers compute like dense ones;
- textbook: a gather, a grouped convolution and a channel shuffle per learned layer, as CondenseNet deploys it;
- condensed: what mz.condense makes, without the shuffle;
- optimized: what mz.optimize_for_inference makes (int8: with dense=True).

"gc without shuffles" is mobilenetv2_gc_cifar100 as it would be if groups needed no mixing at all: what grouped
convolutions alone can give, the limit for every learned form that is as small.

"mobilenetv2_cifar100, width_mult=0.55" is the dense network narrowed to the multiply-adds of those whose 1x1 layers are
all grouped.

Models without weights get random weights and random finished masks, "weights" says which. Peers have random weights.
"""

import argparse
import copy
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import timm
import torch
import torchvision
from measuring.environment import environment
from measuring.timing import interleaved
from rich.console import Console
from rich.progress import Progress
from torch import nn

import mobilenets_zoo as mz
from mobilenets_zoo.lgc.layers import CondensedConv2d

ROOT = Path(__file__).resolve().parent.parent
THREADS = (1, 2)
BATCHES = {"onnxruntime": (1, 4, 8, 64), "openvino": (1, 64), "eager": (1, 8)}
PASSES = 3
# Runs of each form that a pass makes even where they take longer than their share of time.
PASS_ROUNDS = 2
CALIBRATION_IMAGES = 64
NARROW = 0.55  # width_mult at which the dense network has as many multiply-adds as those with groups everywhere

# Prints the MiB by which a session and a run on one image raise a bare process's peak memory. Linux only; getrusage
# would count the parent's memory, which a child inherits until it executes another program.
PEAK_MEMORY = """
import sys
import numpy, onnxruntime
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
before = peak()
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.log_severity_level = 1, 3
session = onnxruntime.InferenceSession(sys.argv[1], options)
session.run(None, {session.get_inputs()[0].name: numpy.zeros((1, 3, 32, 32), numpy.float32)})
print(peak() - before)
"""


class Textbook(nn.Module):
    """A condensed layer as in CondenseNet: output groups are interleaved and shuffled into place."""

    def __init__(self, layer: CondensedConv2d):
        super().__init__()
        self.conv = nn.Conv2d(
            layer.weight.shape[1] * layer.groups, layer.out_channels, 1, groups=layer.groups, bias=False
        )
        self.conv.weight = nn.Parameter(layer.weight.detach().clone())
        self.register_buffer("index", layer.index.clone())
        self.index: torch.Tensor
        self.shuffle = nn.ChannelShuffle(layer.groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shuffle(self.conv(x.index_select(1, self.index)))


def textbook(model: nn.Module) -> nn.Module:
    """Returns a condensed copy with `Textbook` layers: the same work, the channels in another order."""
    condensed = mz.condense(model)
    for module in list(condensed.modules()):
        for name, child in module.named_children():
            if isinstance(child, CondensedConv2d):
                setattr(module, name, Textbook(child))
    return condensed.eval()


def without_shuffles(model: nn.Module) -> nn.Module:
    result = copy.deepcopy(model)
    for module in list(result.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ChannelShuffle):
                setattr(module, name, nn.Identity())
    return result


def with_random_batchnorm(model: nn.Module) -> nn.Module:
    """Gives BatchNorm shifts and statistics other than zero, as training does.

    With zeros, files come out without the convolutions' biases, and ONNX Runtime fuses additions into convolutions
    that have one only.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for shift in (module.bias, module.running_mean):
                assert shift is not None
                nn.init.normal_(shift, std=0.1)
    return model


def zoo_model(name: str) -> tuple[nn.Module, str]:
    """Returns a model and the tag of its weights, or "random"."""
    try:
        entry = mz.pretrained.default_entry(name)
    except mz.WeightsError:
        torch.manual_seed(0)
        model = timm.create_model(name)
        for layer in mz.learned_layers(model).values():
            layer.prune_(layer.in_channels // layer.condense_factor)
        return with_random_batchnorm(model).eval(), "random"
    return timm.create_model(name, pretrained=True).eval(), entry.tag


def cifar_mobilenet_v2() -> nn.Module:
    """torchvision's MobileNetV2 with stride 1 in the stem and the first two sections, as usual for CIFAR."""
    model = torchvision.models.mobilenet_v2(num_classes=100)
    strided = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)]
    for conv in strided[:2]:
        conv.stride = (1, 1)
    return model


PEERS: dict[str, Callable[[], nn.Module]] = {
    "timm mobilenetv2_100": partial(timm.create_model, "mobilenetv2_100", num_classes=100),
    "timm mobilenetv3_small_100": partial(timm.create_model, "mobilenetv3_small_100", num_classes=100),
    "timm mobilenetv4_conv_small": partial(timm.create_model, "mobilenetv4_conv_small", num_classes=100),
    "torchvision shufflenet_v2_x1_0": partial(torchvision.models.shufflenet_v2_x1_0, num_classes=100),
    "CIFAR MobileNetV2, stem stride 1": cifar_mobilenet_v2,
}


def build_forms(names: list[str], peers: bool) -> list[dict[str, Any]]:
    """Returns one entry per model and form: model, form, weights, params, macs, network, int8_network."""
    entries = []

    def add(model: str, form: str, weights: str, network: nn.Module, int8: nn.Module | None) -> None:
        cost = mz.profile(network) if form != "optimized" else None
        entry = dict(model=model, form=form, weights=weights, network=network, int8_network=int8)
        entries.append(entry | dict(params=cost and cost.params, macs=cost and cost.macs))

    for name in names:
        model, weights = zoo_model(name)
        add(name, "plain", weights, model, model)
        if mz.learned_layers(model):
            add(name, "textbook", weights, textbook(model), None)
            add(name, "condensed", weights, mz.condense(model).eval(), None)
        add(name, "optimized", weights, mz.optimize_for_inference(model), mz.optimize_for_inference(model, dense=True))
        if name == "mobilenetv2_gc_cifar100":
            ceiling = without_shuffles(model)
            add("gc without shuffles", "plain", weights, ceiling, ceiling)
            add("gc without shuffles", "optimized", weights, mz.optimize_for_inference(ceiling), None)
        if name == "mobilenetv2_cifar100":
            torch.manual_seed(0)
            narrow = with_random_batchnorm(timm.create_model(name, width_mult=NARROW)).eval()
            for form, network in (("plain", narrow), ("optimized", mz.optimize_for_inference(narrow))):
                add(f"{name}, width_mult={NARROW}", form, "random", network, None)
    for name, create in PEERS.items() if peers else ():
        torch.manual_seed(0)
        peer = with_random_batchnorm(create()).eval()
        if not hasattr(peer, "pretrained_cfg"):  # calibration normalises its images
            cfg = timm.get_pretrained_cfg("mobilenetv2_cifar100")
            peer.pretrained_cfg = {"mean": cfg.mean, "std": cfg.std}  # type: ignore[assignment]
        add(name, "plain", "random", peer, peer)
    return entries


def export_all(
    entries: list[dict[str, Any]], precisions: list[str], folder: Path, progress: Progress
) -> list[dict[str, Any]]:
    """Writes an ONNX file per form and precision; returns rows with path, bytes and peak memory."""
    images = np.random.default_rng(0).integers(0, 256, (CALIBRATION_IMAGES, 32, 32, 3), dtype=np.uint8)
    files: list[dict[str, Any]] = []
    for entry in progress.track(entries, description="export"):
        for precision in precisions:
            network = entry["network" if precision == "fp32" else "int8_network"]
            if network is None:
                continue
            path = folder / f"{len(files)}.onnx"
            # Random calibration images: the values of activations don't change an int8 network's speed.
            calibration = images if precision == "int8" else None
            mz.export_onnx(network, path, input_size=(3, 32, 32), calibration_images=calibration)
            command = [sys.executable, "-c", PEAK_MEMORY, str(path)]
            peak = subprocess.run(command, capture_output=True, text=True, check=True)
            row = {key: entry[key] for key in ("model", "form", "weights", "params", "macs")}
            row |= dict(precision=precision, bytes=path.stat().st_size, peak_mib=float(peak.stdout))
            files.append(dict(row, path=path))
    return files


def ort_session(path: Path, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # An idle session's threads would otherwise spin on a core that the next form in turn needs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def ort_runner(path: Path, threads: int) -> Callable[[np.ndarray], Any]:
    session = ort_session(path, threads)
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})


def openvino_runner(path: Path, threads: int) -> Callable[[np.ndarray], Any]:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(str(path), "CPU", settings).create_infer_request()
    return lambda x: request.infer([x])


def summary(passes: list[list[float]], batch: int) -> dict[str, Any]:
    """Returns milliseconds per image: median of each pass and of these, 10th and 90th percentile of all times."""
    per_image = [[1000.0 * t / batch for t in times] for times in passes]
    medians = [round(statistics.median(times), 5) for times in per_image]
    low, *_, high = statistics.quantiles([t for times in per_image for t in times], n=10)
    return {"ms": statistics.median(medians), "passes": medians, "p10": round(low, 5), "p90": round(high, 5)}


def identity(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("model", "form", "precision")}


def time_files(files: list[dict[str, Any]], runtime: str, seconds: float, progress: Progress) -> list[dict[str, Any]]:
    runner = ort_runner if runtime == "onnxruntime" else openvino_runner
    cells = [(threads, batch) for threads in THREADS for batch in BATCHES[runtime]]
    passes: dict[tuple[int, int], list[list[list[float]]]] = {cell: [[] for _ in files] for cell in cells}
    for threads, batch in progress.track(cells * PASSES, description=runtime):
        x = np.random.default_rng(0).standard_normal((batch, 3, 32, 32)).astype(np.float32)
        # In random order, so that no file gains or loses each time by when its session is made.
        order = random.sample(range(len(files)), len(files))
        runs = [partial(runner(files[i]["path"], threads), x) for i in order]
        timed = interleaved(runs, seconds / PASSES, min_rounds=PASS_ROUNDS)
        for i, times in zip(order, timed, strict=True):
            passes[threads, batch][i].append(times)
    return [
        identity(file) | dict(runtime=runtime, threads=threads, batch=batch) | summary(values, batch)
        for threads, batch in cells
        for file, values in zip(files, passes[threads, batch], strict=True)
    ]


@torch.inference_mode()
def time_eager(entries: list[dict[str, Any]], seconds: float, progress: Progress) -> list[dict[str, Any]]:
    layouts = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
    cells = [(threads, batch, layout) for threads in THREADS for batch in BATCHES["eager"] for layout in layouts]
    rows = []
    for threads, batch, layout in progress.track(cells, description="eager PyTorch"):
        torch.set_num_threads(threads)
        x = torch.randn(batch, 3, 32, 32).to(memory_format=layouts[layout])
        networks = [entry["network"].to(memory_format=layouts[layout]) for entry in entries]
        timed = interleaved([partial(network, x) for network in networks], seconds)
        for entry, times in zip(entries, timed, strict=True):
            cell = dict(precision="fp32", runtime="eager", layout=layout, threads=threads, batch=batch)
            rows.append({"model": entry["model"], "form": entry["form"]} | cell | summary([times], batch))
    torch.set_num_threads(THREADS[0])
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="result file; by default only a summary is printed")
    parser.add_argument("--models", nargs="+", default=timm.list_models("*_cifar100"), help="zoo models; default all")
    parser.add_argument("--runtimes", nargs="+", default=list(BATCHES), choices=list(BATCHES))
    parser.add_argument("--precisions", nargs="+", default=["fp32", "int8"], choices=("fp32", "int8"))
    parser.add_argument("--seconds", type=float, default=0.4, help="time per form and cell")
    parser.add_argument("--no-peers", action="store_true")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    random.seed(0)
    torch.set_num_threads(THREADS[0])
    versions = {"onnxruntime": onnxruntime.__version__}
    runtimes = list(args.runtimes)
    try:
        import openvino

        versions["openvino"] = openvino.__version__.partition("-")[0]
    except ImportError:
        runtimes = [runtime for runtime in runtimes if runtime != "openvino"]

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, Progress(console=Console(stderr=True)) as progress:
        entries = build_forms(args.models, not args.no_peers)
        # Eager first: in a process that has exported files and run other runtimes, every network takes longer in it.
        if "eager" in runtimes:
            rows += time_eager(entries, args.seconds, progress)
        files = export_all(entries, args.precisions, Path(folder), progress)
        if "onnxruntime" in runtimes:
            rows += time_files(files, "onnxruntime", args.seconds, progress)
        if "openvino" in runtimes:
            chosen = [file for file in files if file["precision"] == "fp32"]
            rows += time_files(chosen, "openvino", args.seconds, progress)
    for file in files:
        del file["path"]
    document = {
        "unit": "milliseconds per image",
        "environment": environment() | versions,
        "files": files,
        "rows": rows,
    }
    if args.out:
        with mz.files.atomic_write(args.out, "w") as output:
            # One row per line keeps differences between runs readable.
            lines = {key: json.dumps(document[key]) for key in ("unit", "environment")}
            for key in ("files", "rows"):
                lines[key] = "[\n" + ",\n".join(json.dumps(row) for row in document[key]) + "\n]"
            output.write("{\n" + ",\n".join(f'"{key}": {text}' for key, text in lines.items()) + "\n}\n")
    for row in rows:
        if row["threads"] == 1 and row["batch"] == 1:
            where = " ".join(str(row.get(key, "")) for key in ("runtime", "layout", "precision"))
            print(f"{row['ms']:8.3f} ms  {row['model']} {row['form']}  {where}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
