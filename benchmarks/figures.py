"""Draws the pictures in docs/figures/ from files in the repository. Run by benchmarks/tables.py.

A picture's SVG names the digest of what it shows and of this file; tables.py --check compares digests, so it needs no
matplotlib and doesn't depend on its version.
"""

import csv
import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm

import mobilenets_zoo as mz

__all__ = ["Figure", "all_figures"]

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "benchmarks" / "logs"
LATENCY = ROOT / "benchmarks" / "results" / "latency.json"

LEARNED = "mobilenetv2_lgc_cifar100"  # whose masks are shown
OURS, ORIGINAL, PEERS = "#1f6fb4", "#7f7f7f", "#d9742b"

# Published CIFAR-100 top-1 without extra data: name, millions of MACs, top-1. A dagger marks a checkpoint that was
# chosen on the test set.
PUBLISHED = (
    ("ShuffleNetV2 x0.5†", 11, 67.82),
    ("MobileNetV2 x0.5†", 28, 70.88),
    ("CondenseNetV2-110", 41, 76.06),
    ("CondenseNet-86", 66, 76.36),
    ("MobileNetV2 x1.0 (CIFAR)", 88, 73.76),
    ("ResNet-56", 127, 75.12),
    ("MobileNetV2 x1.4†", 170, 75.98),
    ("PreResNet-164", 255, 79.82),
)


@dataclass(frozen=True)
class Figure:
    """A picture.

    Attributes:
        name: file name in docs/figures, without suffix.
        data: what it shows, as it goes into the digest.
        draw: draws `data` into a matplotlib figure.
    """

    name: str
    data: Any
    draw: Callable[[Any, Any], None]

    @property
    def path(self) -> Path:
        return ROOT / "docs" / "figures" / f"{self.name}.svg"

    def digest(self) -> str:
        content = json.dumps(self.data, sort_keys=True).encode() + Path(__file__).read_bytes()
        return hashlib.sha256(content).hexdigest()

    def is_current(self) -> bool:
        return self.path.exists() and f"digest {self.digest()}" in self.path.read_text(encoding="utf-8")

    def svg(self) -> str:
        import matplotlib

        matplotlib.use("svg")
        from matplotlib import pyplot

        settings = {"svg.hashsalt": self.name, "svg.fonttype": "path", "font.size": 10, "axes.grid": True}
        settings |= {"grid.color": "#e5e5e5", "axes.axisbelow": True, "axes.spines.top": False}
        with matplotlib.rc_context({**settings, "axes.spines.right": False}):
            figure = pyplot.figure(figsize=(7.0, 4.4), layout="constrained", facecolor="white")
            self.draw(figure, self.data)
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None})
            pyplot.close(figure)
        # Behind the XML declaration, where a comment may stand.
        head, _, body = buffer.getvalue().partition("\n")
        return f"{head}\n<!-- digest {self.digest()} -->\n{body}"


def draw_accuracy_against_macs(figure: Any, data: Any) -> None:
    axes = figure.add_subplot()
    for _, macs, top1 in data["published"]:
        axes.plot(macs, top1, "s", color=PEERS, markersize=5)
    for what, color, marker, points in (
        ("original, same parameters and MACs", ORIGINAL, "o", data["original"]),
        ("this zoo", OURS, "D", data["zoo"]),
    ):
        axes.plot([p[1] for p in points], [p[2] for p in points], marker, color=color, label=what, markersize=6)
    axes.plot([], [], "s", color=PEERS, label="published by others († best epoch on the test set)")
    axes.set(xscale="log", xlabel="MACs (millions, log scale)", ylabel="CIFAR-100 top-1 (%)")
    axes.margins(x=0.08, y=0.08)
    axes.set_xticks([10, 20, 50, 100, 200, 500], ["10", "20", "50", "100", "200", "500"])
    label(axes, [*((point, OURS, 8) for point in data["zoo"]), *((point, PEERS, 7) for point in data["published"])])
    figure.legend(loc="outside lower center", fontsize=8, ncols=3)


def label(axes: Any, points: list[tuple[list[Any], str, int]]) -> None:
    """Names points (name, x, y) in a colour and a font size, moved apart so that no name covers another."""
    from adjustText import adjust_text

    texts = [axes.text(x, y, name, color=color, fontsize=size) for (name, x, y), color, size in points]
    marks = axes.get_lines()
    xs, ys = (np.concatenate([line.get_data()[axis] for line in marks]) for axis in (0, 1))
    arrows = dict(arrowstyle="-", color="#aaaaaa", linewidth=0.6)
    adjust_text(texts, xs, ys, ax=axes, expand=(1.1, 1.3), arrowprops=arrows)


def draw_accuracy_against_latency(figure: Any, data: Any) -> None:
    axes = figure.add_subplot()
    for what, color, marker, points in (
        ("original's top-1, its layers as they are", ORIGINAL, "o", data["original"]),
        ("this zoo, optimized", OURS, "D", data["zoo"]),
        ("MobileNetV2 as usual for CIFAR, published top-1", PEERS, "s", data["peers"]),
    ):
        axes.plot([p[1] for p in points], [p[2] for p in points], marker, color=color, label=what)
    frontier: list[tuple[float, float]] = []
    for _, milliseconds, top1 in sorted((p for points in data.values() for p in points), key=lambda point: point[1]):
        if not frontier or top1 > frontier[-1][1]:
            frontier.append((milliseconds, top1))
    axes.step(*zip(*frontier, strict=True), where="post", color="#444444", linewidth=1, label="frontier")
    axes.set(xlabel="milliseconds per image, batch 1, 1 thread", ylabel="CIFAR-100 top-1 (%)", xlim=(0, None))
    axes.margins(x=0.08, y=0.08)
    label(axes, [*((point, OURS, 8) for point in data["zoo"]), *((point, PEERS, 8) for point in data["peers"])])
    figure.legend(loc="outside lower center", fontsize=8, ncols=3)


def draw_training_curves(figure: Any, data: Any) -> None:
    figure.set_size_inches(7.0, 6.4)
    for (loss, top1), (start, curves) in zip(figure.subplots(len(data), 2, squeeze=False), data.items(), strict=True):
        for i, (name, rows) in enumerate(curves.items()):
            epochs = [row["epoch"] for row in rows]
            style = dict(label=name, color=f"C{i}", linewidth=1.2)
            loss.plot(epochs, [row["train_loss"] for row in rows], **style)
            top1.plot(epochs, [row["train_top1"] for row in rows], **style)
        loss.set(xlabel="epoch", ylabel="training loss", title=start)
        top1.set(xlabel="epoch", ylabel="training top-1 (%)")
        top1.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))


def draw_hoyer(figure: Any, data: Any) -> None:
    figure.set_size_inches(7.0, 6.4)
    panels = figure.subplots(1, len(data["stages"]), sharey=True)
    panels = list(panels) if len(data["stages"]) > 1 else [panels]
    for axes, stage in zip(panels, data["stages"], strict=True):
        image = axes.imshow(stage["hoyer"], aspect="auto", vmin=0, vmax=data["max"], cmap="viridis")
        axes.grid(False)
        axes.set_title(f"before stage {stage['number']}\n{100 * stage['progress']:.0f} % of training", fontsize=9)
        axes.set_xticks(range(len(stage["hoyer"][0])))
        axes.set_xlabel("group")
    panels[0].set_yticks(range(len(data["layers"])), data["layers"], fontsize=6)
    figure.colorbar(image, ax=panels, label="Hoyer index of the inputs' importance", shrink=0.6)


def draw_mask(figure: Any, data: Any) -> None:
    figure.set_size_inches(7.0, 1.1 + 1.1 * len(data))
    for axes, (title, mask) in zip(figure.subplots(len(data), 1), data.items(), strict=True):
        axes.imshow(mask, aspect="auto", cmap="Blues", vmin=0, vmax=1.2, interpolation="nearest")
        axes.grid(False)
        axes.set_yticks(range(len(mask)))
        axes.set_ylabel("group", fontsize=8)
        axes.set_title(f"{title}: each group reads {sum(mask[0])} of {len(mask[0])} inputs", fontsize=8)
    axes.set_xlabel("input channel")


def latency_of(document: Any, model: str, form: str) -> float:
    """Returns milliseconds per image in ONNX Runtime, fp32, one thread, batch 1."""
    wanted = dict(model=model, form=form, runtime="onnxruntime", precision="fp32", threads=1, batch=1)
    (row,) = (row for row in document["rows"] if all(row.get(key) == value for key, value in wanted.items()))
    return row["ms"]


def short(name: str) -> str:
    return name.removesuffix("_cifar100").removeprefix("mobilenet")


def all_figures(original_top1: dict[str, float]) -> list[Figure]:
    """Returns every picture that the files in the repository allow."""
    defaults = {name: timm.get_pretrained_cfg(name).tag for name in timm.list_models("*_cifar100")}
    weights = {entry.model: entry for entry in mz.manifest().values() if defaults[entry.model] == entry.tag}
    costs = mz.profiling.deployed_profiles()
    macs = {
        "published": PUBLISHED,
        "original": [[name, costs[name].macs / 1e6, top1] for name, top1 in original_top1.items()],
        "zoo": [[short(name), costs[name].macs / 1e6, entry.top1] for name, entry in weights.items()],
    }
    figures = [Figure("accuracy_macs", macs, draw_accuracy_against_macs)]
    if LATENCY.exists():
        document = json.loads(LATENCY.read_text())
        peer = latency_of(document, "CIFAR MobileNetV2, stem stride 1", "plain")
        peer_top1 = next(top1 for name, _, top1 in PUBLISHED if name == "MobileNetV2 x1.0 (CIFAR)")
        measured = {(row["model"], row["form"]) for row in document["rows"]}
        forms = {name: "textbook" if (name, "textbook") in measured else "plain" for name in original_top1}
        against = {
            "original": [[n, latency_of(document, n, forms[n]), top1] for n, top1 in original_top1.items()],
            "zoo": [
                [short(n), latency_of(document, n, "optimized"), entry.top1]
                for n, entry in weights.items()
                if (n, "optimized") in measured
            ],
            "peers": [["MobileNetV2", peer, peer_top1]],
        }
        figures.append(Figure("accuracy_latency", against, draw_accuracy_against_latency))

    curves: dict[str, dict[str, list[dict[str, float]]]] = {}
    for name, entry in weights.items():
        parent = json.loads((ROOT / entry.result).read_text())["recipe"].get("init_from", "").partition(".")[0]
        with open(LOGS / f"{Path(entry.result).stem}.csv", newline="") as file:
            columns = ("epoch", "train_loss", "train_top1")
            rows = [{key: float(row[key]) for key in columns} for row in csv.DictReader(file)]
        curves.setdefault(f"from {short(parent)}" if parent else "from random weights", {})[short(name)] = rows
    figures.append(Figure("training_curves", curves, draw_training_curves))

    stages = json.loads((LOGS / f"{LEARNED}.masks.json").read_text())
    figures.append(Figure("hoyer_mobilenetv2_lgc", hoyer(stages), draw_hoyer))
    figures.append(Figure("mask_mobilenetv2_lgc", mask_stages(stages), draw_mask))
    return figures


def hoyer(stages: list[dict[str, Any]]) -> dict[str, Any]:
    layers = list(stages[0]["hoyer_before"])
    tables = [[[round(value, 4) for value in stage["hoyer_before"][layer]] for layer in layers] for stage in stages]
    return {
        "layers": [layer.removeprefix("blocks.").removesuffix(".conv") for layer in layers],
        "max": max(value for table in tables for row in table for value in row),
        "stages": [
            {"number": number, "progress": round(stage["progress"], 3), "hoyer": table}
            for number, (stage, table) in enumerate(zip(stages, tables, strict=True), 1)
        ],
    }


def mask_stages(stages: list[dict[str, Any]], layer: str = "blocks.3.1.projection.conv") -> dict[str, Any]:
    """Returns which inputs each group of a layer reads after each pruning stage, from a training log."""
    result = {}
    for number, stage in enumerate(stages, 1):
        rows = [np.unpackbits(np.frombuffer(bytes.fromhex(row), np.uint8)) for row in stage["masks"][layer]]
        title = f"{layer.removesuffix('.conv')}, stage {number} at {100 * stage['progress']:.0f} % of training"
        result[title] = [row[: stage["inputs"][layer]].tolist() for row in rows]
    return result
