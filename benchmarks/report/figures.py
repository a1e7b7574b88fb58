"""Draws the pictures in docs/figures/ from files in the repository. Run by benchmarks/tables.py.

A picture's SVG names the digest of what it shows and of this file; tables.py --check compares digests, so it needs no
matplotlib and doesn't depend on its version.
"""

import hashlib
import io
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import mobilenets_zoo as mz
from report import ROOT, RUNS, load_json, read_csv
from report.finetuning_tables import DATA, METHODS, results
from report.latency_tables import DEPLOYED, latency, timed
from report.model_tables import ORIGINAL_TOP1, default_weights

__all__ = ["Figure", "all_figures"]

LEARNED = "mobilenetv2_lgc_cifar100"  # whose masks are shown
LAYER = "blocks.3.1.projection.conv"
WITH_IMAGES = f"{LEARNED}.refit_e5_r32"  # the run whose groups were chosen with images
# Pictures are transparent: every colour is readable on a white page and on a black one.
ORIGINAL = INK = "#7a7a7a"
FAINT = "#7a7a7a40"
BLUE = "#2f7fd0"
# Of the original's networks, ours, those of others, and ours again in another way.
MARKS = ((ORIGINAL, "o"), (BLUE, "D"), ("#d9742b", "s"), ("#3d9970", "D"))
STYLE = {
    **{"axes.grid": True, "grid.color": FAINT, "axes.axisbelow": True, "legend.frameon": False},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.facecolor": "none", "savefig.facecolor": "none"},
    **dict.fromkeys(["text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"], INK),
}

# Where a name may stand: to the right of its mark (1, 0), above it (0, 1) and so on.
SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))

# Published CIFAR-100 top-1 of networks that saw CIFAR-100 alone: name, millions of MACs, top-1. A dagger marks a
# checkpoint that was chosen on the test set. MicroNet: entries to the challenge of 2019, as their repositories say.
PUBLISHED = (
    ("ShuffleNetV2 x0.5†", 11, 67.82),
    ("MobileNetV2 x0.5†", 28, 70.88),
    ("KAIST (MicroNet)", 37, 80.07),
    ("CondenseNetV2-110", 41, 76.06),
    ("OSI-AI (MicroNet)", 60.5, 80.47),
    ("CondenseNetV2-146", 62, 77.48),
    ("CondenseNet-86", 66, 76.36),
    ("Woody (MicroNet)", 77.8, 81.92),
    ("MobileNetV2 x1.0 (CIFAR)", 88, 73.76),
    ("ResNet-56", 127, 75.12),
    ("MobileNetV2 x1.4†", 170, 75.98),
    ("PreResNet-164", 255, 79.82),
    ("CondenseNet-182", 513, 81.53),
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

        with matplotlib.rc_context({"svg.hashsalt": self.name, "svg.fonttype": "path", **STYLE}):
            figure = pyplot.figure(layout="constrained")
            self.draw(figure, self.data)
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None})
            pyplot.close(figure)
        # Behind the XML declaration, where a comment may stand.
        head, _, body = buffer.getvalue().partition("\n")
        return f"{head}\n<!-- digest {self.digest()} -->\n{body}"


def draw_accuracy(figure: Any, data: Any) -> None:
    """Draws top-1 over cost; `data` has the axis' label and, per kind of points, [name, cost, top-1]."""
    figure.set_size_inches(7.0, 5.4)
    axes = figure.add_subplot()
    marks = MARKS[: len(data["points"])]
    for (what, points), (color, marker) in zip(data["points"].items(), marks, strict=True):
        axes.plot([p[1] for p in points], [p[2] for p in points], marker, color=color, label=what, markersize=6)
    axes.set(xlabel=data["xlabel"], ylabel="CIFAR-100 top-1 (%)")
    axes.margins(x=0.08, y=0.08)
    if data["log"]:
        axes.set_xscale("log")
        axes.set_xticks([10, 20, 50, 100, 200, 500], ["10", "20", "50", "100", "200", "500"])
    else:
        axes.set_xlim(0, None)
    figure.legend(loc="outside lower center", fontsize=8, ncols=2)
    figure.draw_without_rendering()  # from here on the axes stay where they are
    named = zip(data["points"].values(), marks, strict=True)
    label(axes, [(point, color) for points, (color, _) in named if color != ORIGINAL for point in points])


def label(axes: Any, points: list[tuple[list[Any], str]]) -> None:
    """Names points (name, x, y) in a colour, each as near as it finds room between marks and other names."""
    from matplotlib.transforms import Bbox

    marks = (axes.transData.transform(point) for line in axes.get_lines() for point in line.get_xydata())
    taken = [Bbox.from_extents(x - 6, y - 6, x + 6, y + 6) for x, y in marks]
    for (name, x, y), color in points:
        for distance, (right, up) in itertools.product((7, 12, 18, 26, 36, 50, 70), SIDES):
            place = dict(xytext=(distance * right, distance * up), textcoords="offset points", color=color)
            align = dict(ha=("right", "center", "left")[right + 1], va=("top", "center", "bottom")[up + 1])
            text = axes.annotate(name, (x, y), fontsize=7.5, **place, **align)
            box = text.get_window_extent()
            if all(axes.bbox.contains(*corner) for corner in box.corners()) and not box.count_overlaps(taken):
                break
            text.remove()
        taken.append(box)
        if distance > 7:
            line = dict(arrowstyle="-", color=INK, shrinkA=0, linewidth=0.6)
            axes.annotate("", (x, y), arrowprops=line, **place)


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


def draw_mask(figure: Any, data: Any) -> None:
    from matplotlib.colors import ListedColormap

    figure.set_size_inches(7.0, 1.1 + 1.1 * len(data))
    for axes, (title, mask) in zip(figure.subplots(len(data), 1), data.items(), strict=True):
        axes.imshow(mask, aspect="auto", cmap=ListedColormap([FAINT, BLUE]), interpolation="nearest")
        axes.grid(False)
        axes.set_yticks(range(len(mask)))
        axes.set_ylabel("group", fontsize=8)
        unread = sum(not any(column) for column in zip(*mask, strict=True))
        counts = f"each group reads {sum(mask[0])} of {len(mask[0])} inputs, {unread} go unread"
        axes.set_title(f"{title}: {counts}", fontsize=8)
    axes.set_xlabel(f"input channel of {LAYER}")


def draw_finetuning(figure: Any, data: Any) -> None:
    """Draws accuracy over images a class, a panel per data set: a colour per network, a line per method."""
    figure.set_size_inches(9.0, 4.0)
    lines = dict(zip(METHODS, (dict(linestyle="-"), dict(linestyle="--"), dict(linestyle=":")), strict=True))
    sets = list(dict.fromkeys(row["data"] for row in data))
    colors = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(row["model"] for row in data))}
    for axes, name in zip(figure.subplots(1, len(sets), squeeze=False)[0], sets, strict=True):
        shown = [row for row in data if row["data"] == name]
        for row in shown:
            label = f"{short(row['model'])}, {row['method']}"
            style = dict(color=colors[row["model"]], marker="o", markersize=4, linewidth=1.2)
            axes.plot(row["images"], row["top1"], label=label, **style, **lines[row["method"]])
        axes.set(xlabel="training images a class (log scale)", ylabel=f"{DATA[name]}: top-1 (%)", xscale="log")
        counts = sorted({count for row in shown for count in row["images"]})
        axes.set_xticks(counts, list(map(str, counts)))
        axes.minorticks_off()
    drawn = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
    names = sorted(drawn)
    figure.legend([drawn[name] for name in names], names, fontsize=7, loc="outside right center")


def finetuning() -> list[dict[str, Any]]:
    """Returns the mean accuracy over images a class of every network and method."""
    return [
        {"data": data, "model": model, "method": method, "images": counts, "top1": [np.mean(cells[n]) for n in counts]}
        for data in ("cifar10", "cifar100-coarse")
        for (model, method), cells in results(data).items()
        for counts in [sorted(cells)]
    ]


def short(name: str) -> str:
    return name.removesuffix("_cifar100").removeprefix("mobilenet")


def all_figures() -> list[Figure]:
    """Returns every picture with what the files in the repository say today."""
    return [
        Figure("accuracy_macs", accuracy_over_macs(), draw_accuracy),
        Figure("accuracy_latency", accuracy_over_latency(), draw_accuracy),
        Figure("training_curves", training_curves(), draw_training_curves),
        Figure("mask_mobilenetv2_lgc", learned_masks(), draw_mask),
        Figure("finetuning", finetuning(), draw_finetuning),
    ]


def accuracy_over_macs() -> dict[str, Any]:
    zoo = default_weights().values()
    known = [(entry.model, entry.macs / 1e6, ORIGINAL_TOP1.get(entry.model)) for entry in zoo]
    taught = [entry for entry in zoo if entry.taught_by]
    alone = [entry for entry in mz.manifest().values() if not entry.taught_by]
    points = {
        "original, no pretraining": [point for point in known if point[2]],
        "this zoo, its teacher saw ImageNet": [(short(entry.model), entry.macs / 1e6, entry.top1) for entry in taught],
        "others, no pretraining († best epoch on the test set)": PUBLISHED,
        "this zoo, no pretraining": [(short(entry.model), entry.macs / 1e6, entry.top1) for entry in alone],
    }
    return {"points": points, "xlabel": "MACs (millions, log scale)", "log": True}


def accuracy_over_latency() -> dict[str, Any]:
    """Returns our optimized networks, the original's as it deploys them, and a peer, where they were timed."""
    original, zoo = [], []
    for name, entry in default_weights().items():
        rows = {form: timed(**DEPLOYED | dict(model=name, form=form)) for form in ("textbook", "plain", "optimized")}
        if rows["optimized"]:
            zoo.append((short(name), rows["optimized"]["ms"], entry.top1))
        row = rows["textbook"] or rows["plain"]
        if row and name in ORIGINAL_TOP1:
            original.append((name, row["ms"], ORIGINAL_TOP1[name]))
    peer = timed(**DEPLOYED | dict(model="CIFAR MobileNetV2, stem stride 1", form="plain"))
    top1 = next(top1 for name, _, top1 in PUBLISHED if name == "MobileNetV2 x1.0 (CIFAR)")
    processor = latency()["environment"]["device"]
    points = {
        "original's top-1, its layers as they are": original,
        "this zoo, optimized; its teacher saw ImageNet": zoo,
        "MobileNetV2 as usual for CIFAR, published top-1": [("MobileNetV2", peer["ms"], top1)] if peer else [],
    }
    return {"points": points, "xlabel": f"milliseconds per image, one thread of {processor}", "log": False}


def training_curves() -> dict[str, dict[str, list[dict[str, float]]]]:
    """Returns the epochs of the default weights' runs by where they started from and by model."""
    columns = ("epoch", "train_loss", "train_top1")
    curves: dict[str, dict[str, list[dict[str, float]]]] = {}
    for name, entry in default_weights().items():
        result = ROOT / entry.result
        parent = load_json(result)["recipe"]["init_from"].partition(".")[0]
        start = {"": "from random weights", name: "from an earlier weight"}.get(parent, f"from {short(parent)}")
        log = read_csv(result.with_name("log.csv"))
        curves.setdefault(start, {})[short(name)] = [{key: float(row[key]) for key in columns} for row in log]
    return curves


def learned_masks() -> dict[str, Any]:
    """Returns which inputs each group of `LAYER` reads: by magnitude after each pruning stage, and with images."""
    runs = {"by magnitude": (ROOT / default_weights()[LEARNED].result).parent, "with images": RUNS / WITH_IMAGES}
    result = {}
    for rule, folder in runs.items():
        for stage in json.loads((folder / "masks.json").read_text()):
            rows = [np.unpackbits(np.frombuffer(bytes.fromhex(row), np.uint8)) for row in stage["masks"][LAYER]]
            title = f"{rule}, at {100 * stage['progress']:.0f} % of training"
            result[title] = [row[: stage["inputs"][LAYER]].tolist() for row in rows]
    return result
