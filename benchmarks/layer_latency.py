"""Times condensed 1x1 layers against dense ones in eager PyTorch, per memory layout.

    python benchmarks/layer_latency.py [--out benchmarks/results/layer_latency.json]

Each shape is a layer of mobilenetv2_lgc_cifar100 with a random finished mask. The forms of one shape run in turns, in
changing order, so that drift of the machine's speed and the caches' content hit all of them alike; the medians' ratios
to the dense layer are what counts. Whole networks are timed likewise. docs/design.md shows the result.
"""

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import timm
import torch
from measuring.environment import environment
from measuring.timing import interleaved
from torch import nn
from torch.nn import functional as F

import mobilenets_zoo as mz

# Input channels, output channels, pixels along a side.
SHAPES = (
    (32, 32, 32),
    (24, 144, 32),
    (144, 24, 32),
    (32, 192, 32),
    (192, 32, 32),
    (64, 384, 16),
    (384, 64, 16),
    (96, 576, 16),
    (576, 96, 16),
    (160, 960, 8),
    (960, 160, 8),
    (960, 320, 8),
)
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
SECONDS_PER_FORM = 0.25


def textbook(layer: mz.CondensedConv2d, x: torch.Tensor) -> torch.Tensor:
    return F.conv2d(x.index_select(1, layer.index), layer.weight, groups=layer.groups)


def finish_masks(model: nn.Module) -> nn.Module:
    for layer in mz.learned_layers(model).values():
        layer.prune_(layer.in_channels // layer.condense_factor)
    return model.eval()


def interleaved_medians(forms: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Returns the median time of each form in microseconds, runs taken in turns."""
    times = interleaved(list(forms.values()), SECONDS_PER_FORM)
    return {name: 1e6 * statistics.median(values) for name, values in zip(forms, times, strict=True)}


@torch.inference_mode()
def measure(threads: int, batch: int, layout: str) -> list[dict[str, object]]:
    torch.set_num_threads(threads)
    memory_format = LAYOUTS[layout]
    rows: list[dict[str, object]] = []
    cell = dict(threads=threads, batch=batch, layout=layout)
    for in_channels, out_channels, size in SHAPES:
        layer = mz.LearnedGroupConv2d(in_channels, out_channels)
        finish_masks(layer)
        condensed = layer.condense()
        dense = nn.Conv2d(in_channels, out_channels, 1, bias=False).to(memory_format=memory_format)
        x = torch.randn(batch, in_channels, size, size).to(memory_format=memory_format)
        mz.check_equivalent(layer, condensed, x)
        forms: dict[str, Callable[[], object]] = {
            "dense": partial(dense, x),
            "textbook": partial(textbook, condensed, x),
            "condensed": partial(condensed, x),
        }
        rows.append(dict(cell, what=f"{in_channels}-{out_channels} at {size}", **interleaved_medians(forms)))

    masked = finish_masks(timm.create_model("mobilenetv2_lgc_cifar100"))
    networks = {
        "dense": timm.create_model("mobilenetv2_cifar100").eval(),
        "condensed": mz.condense(masked),
        "optimized": mz.optimize_for_inference(masked),
    }
    x = torch.randn(batch, 3, 32, 32).to(memory_format=memory_format)
    forms = {name: partial(net.to(memory_format=memory_format), x) for name, net in networks.items()}
    times = interleaved_medians(forms)
    for what in ("condensed", "optimized"):
        rows.append(dict(cell, what=f"whole network, {what}", dense=times["dense"], condensed=times[what]))
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="result file; by default only the table is printed")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    random.seed(0)
    rows = []
    for threads in args.threads:
        for batch in args.batch:
            for layout in LAYOUTS:
                for row in measure(threads, batch, layout):
                    print(" ".join(f"{v:.1f}" if isinstance(v, float) else str(v) for v in row.values()), flush=True)
                    rows.append(row)
    if args.out:
        document = {"unit": "microseconds, median", "environment": environment(), "rows": rows}
        with mz.files.atomic_write(args.out, "w") as file:
            file.write(json.dumps(document, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
