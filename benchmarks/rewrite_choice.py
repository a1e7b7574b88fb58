"""Times every exact form of every bottleneck in ONNX Runtime, against the form that optimize_for_inference chooses.

    python benchmarks/rewrite_choice.py --out benchmarks/results/rewrite_choice.json

Needs `pip install '.[onnx]'`. The forms of one bottleneck run in turns, on one thread with one image; each stands
between two dense 1x1 convolutions, which give and take the layout that neighbours in a network do. Bottlenecks whose
forms have the same shapes are timed once. Prints, per model, the sum over its bottlenecks in the chosen form, in the
fastest, as condensed, and in the slowest.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from environment import environment
from latency import ort_runner, zoo_model
from rich.console import Console
from rich.progress import Progress
from timing import interleaved
from torch import nn

import mobilenets_zoo as mz
from mobilenets_zoo.folded_conv import Convolution, FoldedConv2d
from mobilenets_zoo.models.mobilenetv2 import Bottleneck, MobileNetV2
from mobilenets_zoo.optimizing import HiddenLayers, estimated_time, forms, hidden_layers, optimized_layers

MODELS = [f"mobilenetv2_{name}_cifar100" for name in ("lgc", "lgc_gc", "gc_lgc", "lgc_proj", "lgc_exp", "gc")]


def input_channels(block: Bottleneck) -> int:
    conv = block.expansion.conv
    assert isinstance(conv, nn.Conv2d | mz.CondensedConv2d)
    return conv.in_channels


def describe(layers: HiddenLayers) -> str:
    def convolution(convolution: Convolution) -> str:
        gather = "" if convolution.index is None else f" gather {len(convolution.index)}"
        return f"{len(convolution.weight)} in {convolution.groups}{gather}"

    return f"{convolution(layers.expansion)}, {convolution(layers.projection)}"


def between_neighbours(layers: HiddenLayers, in_channels: int) -> nn.Module:
    """Returns the bottleneck between dense convolutions."""
    outputs = len(layers.projection.weight)

    def neighbour(inputs: int, outputs: int) -> FoldedConv2d:
        return FoldedConv2d(Convolution(torch.randn(outputs, inputs, 1, 1), torch.zeros(outputs)), act=False)

    return nn.Sequential(neighbour(8, in_channels), *optimized_layers(layers), neighbour(outputs, 8)).eval()


def measure(block: Bottleneck, size: int, seconds: float, folder: Path) -> list[dict[str, Any]]:
    """Returns one row per form of a bottleneck whose input is `size` pixels wide."""
    layers, in_channels = hidden_layers(block), input_channels(block)
    candidates = list(forms(layers, in_channels))
    x = np.random.default_rng(0).standard_normal((1, 8, size, size)).astype(np.float32)
    runs = []
    for i, form in enumerate(candidates):
        path = folder / f"{i}.onnx"
        mz.export_onnx(between_neighbours(form, in_channels), path, input_size=(8, size, size))
        runs.append(partial(ort_runner(path, threads=1), x))
    rows = []
    for form, times in zip(candidates, interleaved(runs, seconds), strict=True):
        estimate = estimated_time(form, in_channels) * size**2 / 1000
        row = {"form": describe(form), "estimated_us": round(estimate, 3)}
        rows.append(row | {"measured_us": round(1e6 * statistics.median(times), 1)})
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="result file; by default only a summary is printed")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--seconds", type=float, default=0.1, help="time per form")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    random.seed(0)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    known: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder, Progress(console=Console(stderr=True)) as progress:
        for name in args.models:
            model, weights = zoo_model(name)
            network = mz.condense(model).eval() if any(map(is_learned, model.modules())) else model
            assert isinstance(network, MobileNetV2)
            size = 32
            blocks = [module for module in network.modules() if isinstance(module, Bottleneck)]
            for i, block in enumerate(progress.track(blocks, description=name)):
                in_channels = input_channels(block)
                shapes = str([describe(form) for form in forms(hidden_layers(block), in_channels)])
                stride = hidden_layers(block).depthwise.stride
                key = f"{in_channels} {size} {stride} {shapes}"
                if key not in known:
                    known[key] = measure(block, size, args.seconds, Path(folder))
                rows += [{"model": name, "weights": weights, "block": i, **row} for row in known[key]]
                size //= stride
    for name in args.models:
        print(f"{name}: " + ", ".join(f"{key} {value:.0f} us" for key, value in totals(rows, name).items()))
    if args.out:
        env = environment() | {"onnxruntime": onnxruntime.__version__}
        with mz.files.atomic_write(args.out, "w") as file:
            text = ",\n".join(json.dumps(row) for row in rows)
            file.write(f'{{\n"environment": {json.dumps(env)},\n"rows": [\n{text}\n]\n}}\n')
    return 0


def is_learned(module: nn.Module) -> bool:
    return isinstance(module, mz.LearnedGroupConv2d)


def totals(rows: list[dict[str, Any]], model: str) -> dict[str, float]:
    """Returns microseconds summed over a model's bottlenecks: each in the chosen form, the fastest, and so on.

    "as condensed" keeps all groups and gathers and only leaves out dead channels.
    """
    result = dict.fromkeys(("chosen", "fastest", "as condensed", "slowest"), 0.0)
    for block in sorted({row["block"] for row in rows if row["model"] == model}):
        candidates = [row for row in rows if row["model"] == model and row["block"] == block]
        measured = [row["measured_us"] for row in candidates]
        result["chosen"] += min(candidates, key=lambda row: row["estimated_us"])["measured_us"]
        result["fastest"] += min(measured)
        result["slowest"] += max(measured)
        result["as condensed"] += measured[0]
    return result


if __name__ == "__main__":
    sys.exit(main())
