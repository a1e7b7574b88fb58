"""Times every exact form of every bottleneck in ONNX Runtime, against the form that optimize_for_inference chooses.

    python benchmarks/rewrite_choice.py --out benchmarks/results/rewrite_choice.json

Needs `pip install '.[onnx]' scipy`. The forms of one bottleneck run in turns, with one image, on one thread and on
two; each stands between two dense 1x1 convolutions, which give and take the layout that neighbours in a network do.
Bottlenecks whose forms do the same work are timed once. Prints, per model and number of threads, the sum over its
bottlenecks in the chosen form, in the fastest, as condensed, and in the slowest; then the costs that fit the timings
best, from which optimizing.COSTS is taken.
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
from latency import THREADS, ort_runner, zoo_model
from rich.console import Console
from rich.progress import Progress
from scipy.optimize import nnls
from timing import interleaved
from torch import nn

import mobilenets_zoo as mz
from mobilenets_zoo.folded_conv import Convolution, FoldedConv2d
from mobilenets_zoo.models.mobilenetv2 import Bottleneck, MobileNetV2
from mobilenets_zoo.optimizing import COSTS, HiddenLayers, forms, hidden_layers, optimized_layers, work

# optimize_for_inference aims at this number of threads.
FITTED_THREADS = 2

MODELS = [
    f"mobilenetv2_{name}_cifar100" for name in ("lgc", "lgc_gc", "gc_lgc", "lgc_proj", "lgc_exp", "gc", "gc_proj")
]


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
    paths = [folder / f"{i}.onnx" for i in range(len(candidates))]
    for form, path in zip(candidates, paths, strict=True):
        mz.export_onnx(between_neighbours(form, in_channels), path, input_size=(8, size, size))
    rows: list[dict[str, Any]] = [
        {"form": describe(form), "work": work(form, in_channels, size)} for form in candidates
    ]
    for threads in THREADS:
        runs = [partial(ort_runner(path, threads), x) for path in paths]
        for row, times in zip(rows, interleaved(runs, seconds), strict=True):
            row[f"us_{threads}"] = round(1e6 * statistics.median(times), 1)
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
                layers, in_channels = hidden_layers(block), input_channels(block)
                key = str([(describe(form), work(form, in_channels, size)) for form in forms(layers, in_channels)])
                if key not in known:
                    known[key] = measure(block, size, args.seconds, Path(folder))
                rows += [{"model": name, "weights": weights, "block": i, **row} for row in known[key]]
                size //= layers.depthwise.stride
    for name in args.models:
        for threads in THREADS:
            sums = totals(rows, name, threads)
            print(f"{name} {threads}: " + ", ".join(f"{key} {value:.0f} us" for key, value in sums.items()))
    print(json.dumps(fitted_costs(rows), indent=2))
    if args.out:
        env = environment() | {"onnxruntime": onnxruntime.__version__}
        with mz.files.atomic_write(args.out, "w") as file:
            text = ",\n".join(json.dumps(row) for row in rows)
            file.write(f'{{\n"environment": {json.dumps(env)},\n"rows": [\n{text}\n]\n}}\n')
    return 0


def is_learned(module: nn.Module) -> bool:
    return isinstance(module, mz.LearnedGroupConv2d)


def bottlenecks(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Returns the rows of each bottleneck of each model."""
    result: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        result.setdefault((row["model"], row["block"]), []).append(row)
    return list(result.values())


def totals(rows: list[dict[str, Any]], model: str, threads: int) -> dict[str, float]:
    """Returns microseconds summed over a model's bottlenecks: each in the chosen form, the fastest, and so on.

    "as condensed" keeps all groups and gathers and only leaves out dead channels.
    """
    result = dict.fromkeys(("chosen", "fastest", "as condensed", "slowest"), 0.0)
    for candidates in bottlenecks([row for row in rows if row["model"] == model]):
        times = [row[f"us_{threads}"] for row in candidates]
        estimates = [sum(COSTS[key] * amount for key, amount in row["work"].items()) for row in candidates]
        result["chosen"] += times[estimates.index(min(estimates))]
        result["fastest"] += min(times)
        result["slowest"] += max(times)
        result["as condensed"] += times[0]
    return result


def fitted_costs(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the costs in nanoseconds, none negative, that explain best by how much forms of a bottleneck differ.

    Least squares on differences from a bottleneck's mean, relative to its fastest form.
    """
    work_differences, time_differences = [], []
    for candidates in bottlenecks(rows):
        times = np.array([1000.0 * row[f"us_{FITTED_THREADS}"] for row in candidates])
        amounts = np.array([[row["work"][key] for key in COSTS] for row in candidates], dtype=float)
        work_differences.append((amounts - amounts.mean(0)) / times.min())
        time_differences.append((times - times.mean()) / times.min())
    matrix = np.concatenate(work_differences)
    scale = np.linalg.norm(matrix, axis=0)  # multiply-adds are counted in millions, gathers in ones
    scale[scale == 0.0] = 1.0
    solution, _ = nnls(matrix / scale, np.concatenate(time_differences))
    return {key: float(f"{cost:.3g}") for key, cost in zip(COSTS, solution / scale, strict=True)}


if __name__ == "__main__":
    sys.exit(main())
