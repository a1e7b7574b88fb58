"""Times every model with the weights that it ships, in every form, and a few peers, in one run.

    python benchmarks/latency.py --out benchmarks/timings/latency.json

Needs `pip install '.[onnx]'`. Within a cell (runtime, precision, threads, batch) all forms run in turns and in changing
order, so that drift of the machine hits all alike; what counts are ratios within a cell. Cells are timed in several
passes, with sessions made anew and in random order: a machine whose speed changes for minutes is met more than once.
Each pass keeps its own median, because times at two speeds of the machine, pooled, have a median that falls on either.
Forms:

- plain: the network as it trains, BatchNorm unfused in eager PyTorch; masked layers compute like dense ones;
- textbook: a gather, a grouped convolution and a channel shuffle per learned layer, as CondenseNet deploys it;
- condensed: what mz.condense makes, without the shuffle;
- optimized: what mz.optimize_for_inference makes (int8: with dense=True).

"gc without shuffles" is mobilenetv2_gc_cifar100 as it would be if groups needed no mixing at all: what grouped
convolutions alone can give, the limit for every learned form that is as small. "mobilenetv2_cifar100, width_mult=0.55"
is the dense network narrowed to the multiply-adds of those whose 1x1 layers are all grouped. It and the peers have
random weights; they and the limit have no "weight" in the file.
"""

import argparse
import copy
import json
import multiprocessing
import pickle
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Optional

import numpy as np
import onnxruntime
import timm
import torch
from measuring import environment, interleaved
from rich.console import Console
from rich.progress import track
from torch import nn

import mobilenets_zoo as mz

PASSES = 3
# Runs of each form that a pass makes even where they take longer than their share of time.
PASS_ROUNDS = 2
CALIBRATION_IMAGES = 64
LIMIT, NARROW_WIDTH = "gc without shuffles", 0.55


@dataclass(frozen=True)
class Cell:
    """Where forms are compared."""

    runtime: str
    threads: int
    batch: int
    precision: str = "fp32"


EAGER_CELLS = (Cell("eager", 1, 1),)
ORT_CELLS = (
    *(Cell("onnxruntime", 1, batch) for batch in (1, 64)),
    Cell("onnxruntime", 1, 1, "int8"),
)


@dataclass
class Form:
    """What is timed: a network in one form and precision.

    Attributes:
        model: registered name, or a label for a network that isn't shipped.
        form: one of those that the module's docstring lists.
        weight: "MODEL.TAG" of the weights; None for networks that aren't shipped.
        network: in evaluation mode and single precision; where `precision` is "int8", what its ONNX file quantises.
        path: its ONNX file, once it has one.
        cost: parameters and multiply-adds of this very network.
    """

    model: str
    form: str
    weight: Optional[str]
    network: nn.Module
    precision: str = "fp32"
    path: Optional[Path] = None

    def __post_init__(self) -> None:
        self.cost = mz.profile(self.network)

    def fits(self, cell: Cell) -> bool:
        return self.precision == cell.precision and (cell.runtime == "eager" or self.path is not None)

    @property
    def file(self) -> str:
        return f"{self.model}.{self.form}.{self.precision}.onnx"

    def row(self) -> dict[str, Any]:
        own = {key: getattr(self, key) for key in ("model", "form", "weight", "precision")}
        return own | asdict(self.cost) | ({"bytes": self.path.stat().st_size} if self.path else {})


class Textbook(nn.Module):
    """A condensed layer as in CondenseNet: output groups are interleaved and shuffled into place."""

    def __init__(self, layer: mz.CondensedConv2d):
        super().__init__()
        inputs = layer.weight.shape[1] * layer.groups
        self.conv = nn.Conv2d(inputs, layer.out_channels, 1, groups=layer.groups, bias=False)
        self.conv.weight = nn.Parameter(layer.weight.detach().clone())
        self.register_buffer("index", layer.index.clone())
        self.index: torch.Tensor
        self.shuffle = nn.ChannelShuffle(layer.groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shuffle(self.conv(x.index_select(1, self.index)))


def replaced(model: nn.Module, kind: type[nn.Module], make: Callable[[Any], nn.Module]) -> nn.Module:
    """Returns a copy in which `make` has replaced every module of a kind."""
    memo: dict[int, Any] = {id(module): make(module) for module in model.modules() if isinstance(module, kind)}
    return copy.deepcopy(model, memo).eval()  # which takes what the memo holds for an object instead of copying it


def with_random_biases(model: nn.Module) -> nn.Module:
    """Without them a file has no biases, and ONNX Runtime fuses additions only into convolutions that have one."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def cifar_mobilenet_v2() -> nn.Module:
    """timm's MobileNetV2 with stride 1 in the stem and the first two sections, as usual for CIFAR."""
    model = timm.create_model("mobilenetv2_100", num_classes=100)
    strided = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)]
    for conv in strided[:2]:
        conv.stride = (1, 1)
    return model


PEERS: dict[str, Callable[[], nn.Module]] = {
    "timm mobilenetv2_100": partial(timm.create_model, "mobilenetv2_100", num_classes=100),
    "timm mobilenetv3_small_100": partial(timm.create_model, "mobilenetv3_small_100", num_classes=100),
    "CIFAR MobileNetV2, stem stride 1": cifar_mobilenet_v2,
}


def model_forms(name: str) -> Iterable[Form]:
    """Yields the forms of a model with its default weights, and what is compared with it; of a peer, itself."""
    if name in PEERS:
        yield Form(name, "plain", None, with_random_biases(PEERS[name]()))
        return
    model = timm.create_model(name, pretrained=True).eval()
    weight = f"{name}.{timm.get_pretrained_cfg(name).tag}"
    optimized = mz.optimize_for_inference(model)
    yield Form(name, "plain", weight, model)
    if mz.learned_layers(model):
        condensed = mz.condense(model).eval()
        yield Form(name, "textbook", weight, replaced(condensed, mz.CondensedConv2d, Textbook))
        yield Form(name, "condensed", weight, condensed)
    yield Form(name, "optimized", weight, optimized)
    yield Form(name, "plain", weight, model, "int8")
    yield Form(name, "optimized", weight, mz.optimize_for_inference(model, dense=True), "int8")
    if name == "mobilenetv2_gc_cifar100":
        without = replaced(model, nn.ChannelShuffle, nn.Identity)
        yield Form(LIMIT, "optimized", None, mz.optimize_for_inference(without))
    if name == "mobilenetv2_cifar100":
        narrow = with_random_biases(timm.create_model(name, width_mult=NARROW_WIDTH))
        yield Form(f"{name}, width_mult={NARROW_WIDTH}", "optimized", None, mz.optimize_for_inference(narrow))


def export(name: str, folder: Path) -> None:
    """Writes the ONNX files of a model's forms."""
    torch.set_num_threads(1)
    # Random calibration images: the values of activations don't change an int8 network's speed.
    images = np.random.default_rng(0).integers(0, 256, (CALIBRATION_IMAGES, 32, 32, 3), dtype=np.uint8)
    for form in model_forms(name):
        calibration = images if form.precision == "int8" else None
        mz.export_onnx(form.network, folder / form.file, input_size=(3, 32, 32), calibration_images=calibration)


def export_all(names: list[str], folder: Path) -> None:
    """Exports in two processes of their own: it is slow, and a process that has exported runs networks slower."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        done = pool.map(export, names, [folder] * len(names))
        list(track(done, "export", total=len(names), console=Console(stderr=True)))


def export_apart(networks: list[nn.Module], files: list[Any], size: int = 32) -> None:
    """Exports in a process of its own: one that has exported runs networks slower."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        # As bytes: torch would share each tensor through an open file.
        list(pool.map(partial(export_pickled, size=size), map(pickle.dumps, networks), files))


def export_pickled(network: bytes, file: Path, size: int) -> None:
    mz.export_onnx(pickle.loads(network), file, input_size=(3, size, size))


def session_runner(path: str, batch: int, threads: int) -> Callable[[], object]:
    """Returns what runs an ONNX file on a batch."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # An idle session's threads would otherwise spin on a core that the next form in turn needs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    source = session.get_inputs()[0]
    return partial(session.run, None, {source.name: torch.randn(batch, *source.shape[1:]).numpy()})


def runner(form: Form, cell: Cell) -> Callable[[], object]:
    if cell.runtime == "eager":
        layout = torch.channels_last
        x = torch.randn(cell.batch, 3, 32, 32).to(memory_format=layout)
        return partial(form.network.to(memory_format=layout), x)
    return session_runner(str(form.path), cell.batch, cell.threads)


@torch.inference_mode()
def time_cells(forms: list[Form], cells: Iterable[Cell], seconds: float) -> list[dict[str, Any]]:
    """Returns a row per cell and form: milliseconds per image, median of each pass and of these."""
    compared = {cell: [form for form in forms if form.fits(cell)] for cell in cells}
    passes: dict[tuple[Cell, int], list[float]] = {}
    threads = torch.get_num_threads()
    for cell in track(list(compared) * PASSES, "timing", console=Console(stderr=True)):
        torch.set_num_threads(cell.threads)
        # In random order, so that no form gains or loses each time by when its session is made.
        order = random.sample(compared[cell], len(compared[cell]))
        timed = interleaved([runner(form, cell) for form in order], seconds / PASSES, PASS_ROUNDS)
        for form, times in zip(order, timed, strict=True):
            median = round(1000.0 * statistics.median(times) / cell.batch, 5)
            passes.setdefault((cell, id(form)), []).append(median)
    torch.set_num_threads(threads)
    return [
        form.row() | asdict(cell) | dict(ms=statistics.median(passes[cell, id(form)]), passes=passes[cell, id(form)])
        for cell, chosen in compared.items()
        for form in chosen
    ]


def main(argv: list[str] | None = None) -> int:
    shipped = sorted({entry.model for entry in mz.manifest().values()})
    names = [*shipped, *PEERS]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="result file; the times are printed in any case")
    parser.add_argument("--models", nargs="+", default=names, choices=names, metavar="NAME", help="by default all")
    parser.add_argument("--seconds", type=float, default=0.4, help="time per form and cell")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    random.seed(0)
    torch.set_num_threads(1)
    env = environment() | {"onnxruntime": onnxruntime.__version__}
    forms = [form for name in args.models for form in model_forms(name)]
    with tempfile.TemporaryDirectory() as folder:
        rows = time_cells(forms, EAGER_CELLS, args.seconds)
        export_all(args.models, Path(folder))
        for form in forms:
            form.path = Path(folder, form.file)
        rows += time_cells(forms, ORT_CELLS, args.seconds)
    if args.out:
        lines = ",\n".join(map(json.dumps, rows))  # a row per line keeps differences between runs readable
        head = f'"unit": "milliseconds per image",\n"environment": {json.dumps(env)}'
        with mz.utils.atomic_write(args.out, "w") as output:
            output.write(f'{{\n{head},\n"rows": [\n{lines}\n]\n}}\n')
    for row in rows:
        where = " ".join(str(row[key]) for key in ("runtime", "precision", "threads", "batch"))
        print(f"{row['ms']:8.3f} ms  {row['model']} {row['form']}  {where}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
