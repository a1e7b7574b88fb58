"""Draws the pictures in docs/figures/ from files in the repository. Run by benchmarks/tables.py.

A picture's SVG names the digest of what it shows and of this file; tables.py --check compares digests, so it needs no
matplotlib and doesn't depend on its version.
"""

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import mobilenets_zoo as mz
from report.files import ROOT, load_latency, load_result, read_log
from report.model_tables import DEPLOYED, ORIGINAL_TOP1, default_weights, milliseconds

__all__ = ["Figure", "all_figures"]

LOGS = ROOT / "benchmarks" / "logs"

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
    figure.set_size_inches(7.0, 5.4)
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

    centred = dict(ha="center", va="center")  # on its point, from where it may move to any side
    texts = [axes.text(x, y, name, color=color, fontsize=size, **centred) for (name, x, y), color, size in points]
    marks = axes.get_lines()
    xs, ys = (np.concatenate([line.get_data()[axis] for line in marks]) for axis in (0, 1))
    arrows = dict(arrowstyle="-", color="#aaaaaa", linewidth=0.6)
    force = (0.3, 0.5)
    adjust_text(
        texts,
        xs,
        ys,
        ax=axes,
        expand=(1.2, 1.5),
        iter_lim=1000,
        force_static=force,
        force_text=force,
        arrowprops=arrows,
    )


def draw_accuracy_against_latency(figure: Any, data: Any) -> None:
    axes = figure.add_subplot()
    for what, color, marker, points in (
        ("original's top-1, its layers as they are", ORIGINAL, "o", data["original"]),
        ("this zoo, optimized", OURS, "D", data["zoo"]),
        ("MobileNetV2 as usual for CIFAR, published top-1", PEERS, "s", data["peers"]),
    ):
        axes.plot([p[1] for p in points], [p[2] for p in points], marker, color=color, label=what)
    frontier: list[tuple[float, float]] = []
    for _, time, top1 in sorted((p for points in data.values() for p in points), key=lambda point: point[1]):
        if not frontier or top1 > frontier[-1][1]:
            frontier.append((time, top1))
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


def short(name: str) -> str:
    return name.removesuffix("_cifar100").removeprefix("mobilenet")


def all_figures() -> list[Figure]:
    """Returns every picture that the files in the repository allow."""
    weights, latency, costs = default_weights(), load_latency(), mz.profiling.deployed_profiles()
    macs = {
        "published": PUBLISHED,
        "original": [[name, costs[name].macs / 1e6, top1] for name, top1 in ORIGINAL_TOP1.items()],
        "zoo": [[short(name), costs[name].macs / 1e6, entry.top1] for name, entry in weights.items()],
    }

    def time_of(model: str, form: str) -> float | None:
        return milliseconds(latency, model=model, **{**DEPLOYED, "form": form})

    peer_top1 = next(top1 for name, _, top1 in PUBLISHED if name == "MobileNetV2 x1.0 (CIFAR)")
    against = {
        "original": [[n, time_of(n, "textbook") or time_of(n, "plain"), top1] for n, top1 in ORIGINAL_TOP1.items()],
        "zoo": [[short(n), time_of(n, "optimized"), entry.top1] for n, entry in weights.items()],
        "peers": [["MobileNetV2", time_of("CIFAR MobileNetV2, stem stride 1", "plain"), peer_top1]],
    }
    against = {what: [point for point in points if point[1] is not None] for what, points in against.items()}

    curves: dict[str, dict[str, list[dict[str, float]]]] = {}
    for name, entry in weights.items():
        parent = load_result(entry.result)["recipe"].get("init_from", "").partition(".")[0]
        start = f"from {short(parent)}" if parent else "from random weights"
        if parent == name:
            start = "from an earlier weight"
        columns = ("epoch", "train_loss", "train_top1")
        log = read_log(LOGS / f"{Path(entry.result).stem}.csv")
        curves.setdefault(start, {})[short(name)] = [{key: float(row[key]) for key in columns} for row in log]

    stages = json.loads((LOGS / f"{LEARNED}.masks.json").read_text())
    return [
        Figure("accuracy_macs", macs, draw_accuracy_against_macs),
        Figure("accuracy_latency", against, draw_accuracy_against_latency),
        Figure("training_curves", curves, draw_training_curves),
        Figure("hoyer_mobilenetv2_lgc", hoyer(stages), draw_hoyer),
        Figure("mask_mobilenetv2_lgc", mask_stages(stages), draw_mask),
    ]


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
