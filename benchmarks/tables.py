"""Writes every generated table and picture; with --check fails, and writes nothing, where one is stale.

    python benchmarks/tables.py [--check]

Sources are the registered models, mobilenets_zoo/weights/manifest.json and benchmarks/results/. A table in a Markdown
file stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`; pictures are drawn by benchmarks/figures.py.
"""

import argparse
import csv
import dataclasses
import json
import re
import statistics
import sys
import textwrap
from pathlib import Path
from typing import Any

import timm
from figures import all_figures
from latency import BATCHES, THREADS
from rewrite_choice import totals
from training.recipe import load_recipe

import mobilenets_zoo as mz
from mobilenets_zoo.cli import FAST_MS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

# CIFAR-100 top-1 that the original reports for the same parameters and MACs (docs/design.md names the source).
ORIGINAL_TOP1 = {
    "mobilenetv1_cifar100": 77.10,
    "mobilenetv1_w050_cifar100": 75.30,
    "mobilenetv1_w025_cifar100": 72.58,
    "mobilenetv2_cifar100": 77.40,
    "mobilenetv2_t4_cifar100": 76.81,
    "mobilenetv2_t1_cifar100": 74.32,
    "mobilenetv2_lgc_cifar100": 76.30,
    "mobilenetv2_lgc_proj_cifar100": 77.20,
    "mobilenetv2_gc_lgc_cifar100": 76.60,
    "mobilenetv2_lgc_exp_cifar100": 76.50,
    "mobilenetv2_lgc_gc_cifar100": 76.20,
    "mobilenetv2_gc_cifar100": 75.50,
    "mobilenetv2_gc_exp_cifar100": 75.90,
    "mobilenetv2_gc_proj_cifar100": 76.60,
}


def profiles() -> dict[str, mz.Profile]:
    """Returns the deployed cost of every model, measured on the models themselves."""
    result = {}
    for name in sorted(timm.list_models("*_cifar100")):
        model = timm.create_model(name)
        if any(isinstance(module, mz.LearnedGroupConv2d) for module in model.modules()):
            model = timm.create_model(name, condensed=True)
        result[name] = mz.profile(model)
    return result


def markdown(header: list[str], rows: list[list[str]]) -> str:
    align = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, align, *rows])


def load_latency() -> dict[str, Any]:
    return json.loads((RESULTS / "latency.json").read_text())


def milliseconds(document: dict[str, Any], **wanted: Any) -> float | None:
    rows = [row for row in document["rows"] if all(row.get(key) == value for key, value in wanted.items())]
    return rows[0]["ms"] if rows else None


# How the tables time a model.
DEPLOYED: dict[str, Any] = dict(form="optimized", runtime="onnxruntime", precision="fp32", threads=1, batch=1)


def default_weights() -> dict[str, mz.pretrained.WeightEntry]:
    """Returns the weight that each model loads by default."""
    defaults = {name: timm.get_pretrained_cfg(name).tag for name in timm.list_models("*_cifar100")}
    return {entry.model: entry for entry in mz.manifest().values() if defaults[entry.model] == entry.tag}


def models_table(costs: dict[str, mz.Profile]) -> str:
    weights = default_weights()
    latency = load_latency()
    rows = []
    for name, cost in sorted(costs.items(), key=lambda item: (item[0].split("_")[0], -item[1].macs, item[0])):
        entry = weights.get(name)
        top1, tag = (f"{entry.top1:.2f}", f"`{entry.tag}`") if entry else ("-", "not trained yet")
        time = milliseconds(latency, model=name, **DEPLOYED)
        row = [f"`{name}`", f"{cost.params / 1e6:.3f}", f"{cost.macs / 1e6:.1f}", f"{time:.2f}" if time else "-"]
        original = f"{ORIGINAL_TOP1[name]:.2f}" if name in ORIGINAL_TOP1 else "-"
        rows.append([*row, top1, original, tag])
    return markdown(["model", "params (M)", "MACs (M)", "ms", "top-1 (%)", "original (%)", "weights"], rows)


def flagship() -> str:
    """Returns the README's sentence on the best network that answers in under 10 ms."""
    latency = load_latency()
    times = {name: milliseconds(latency, model=name, **DEPLOYED) or 0.0 for name in ORIGINAL_TOP1}
    best = max((e for e in default_weights().values() if times[e.model] < FAST_MS), key=lambda entry: entry.top1)
    others = sum(entry.taught_by is not None for entry in mz.manifest().values()) - 1
    alone = [f"`{entry.name}`" for entry in mz.manifest().values() if not entry.taught_by]
    result = json.loads((ROOT / best.result).read_text())
    return wrapped(
        f"`{best.model}` has **{best.top1:.2f} % top-1** with {best.params / 1e6:.2f} M parameters in "
        f"{times[best.model]:.1f} ms an image (the architecture's source reports {ORIGINAL_TOP1[best.model]:.2f} %), "
        f"after {result['recipe']['epochs']} epochs on one {result['training']['device']}. It and {others} other "
        "weights were taught by an EfficientNet-Lite2 that was pretrained on ImageNet-1k and fine-tuned here "
        f"([how](docs/training.md)); {' and '.join(alone)} learned from CIFAR-100's labels alone."
    )


def state() -> str:
    """Returns the README's paragraph on how the weights compare with the original's."""
    weights = {name: entry for name, entry in default_weights().items() if name in ORIGINAL_TOP1}
    gaps = {name: entry.top1 - ORIGINAL_TOP1[name] for name, entry in weights.items()}
    above = [f"`{name}` ({gap:+.2f})" for name, gap in sorted(gaps.items(), key=lambda item: -item[1]) if gap >= 0]
    below = {name: -gap for name, gap in gaps.items() if gap < 0}
    text = f"**The state of the weights.** {', '.join(above) or 'None'} of {len(gaps)} reach the original's accuracy"
    if below:
        epochs = [json.loads((ROOT / weights[name].result).read_text())["recipe"]["epochs"] for name in below]
        text += f"; the others are {min(below.values()):.1f} to {max(below.values()):.1f} points below it. Theirs were "
        text += f"short runs of {min(epochs)} to {max(epochs)} epochs, where the original took 400"
    return wrapped(f"{text}.")


def wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def weights_table() -> str:
    rows = []
    for entry in mz.manifest().values():
        result = json.loads((ROOT / entry.result).read_text())
        scores, training = result["evaluation"], result["training"]
        log = f"benchmarks/logs/{Path(entry.result).stem}.csv"
        files = {"recipe": entry.recipe, "log": log, "result": entry.result}
        together = training.get("together", 1)
        shared = f" for {together} together" if together > 1 else ""
        rows.append(
            [
                f"`{entry.name}`",
                f"{scores['top1']:.2f}",
                f"{scores['top5']:.2f}",
                f"{scores['loss']:.3f}",
                f"{scores['ece']:.1f}",
                ", ".join(f"[{label}](../{path})" for label, path in files.items()),
                str(result["recipe"]["epochs"]),
                f"{result['training_seconds'] / 60:.1f}{shared}",
                training["device"],
                entry.taught_by.partition(".")[0] if entry.taught_by else "the labels alone",
            ]
        )
    header = [
        "weight",
        "top-1 (%)",
        "top-5 (%)",
        "loss",
        "ECE (%)",
        "files",
        "epochs",
        "minutes",
        "trained on",
        "taught by",
    ]
    return markdown(header, rows)


# What a group is worth: the dense parent, and the networks that started from it with one recipe.
FAMILY = (
    *("mobilenetv2_cifar100", "mobilenetv2_lgc_cifar100", "mobilenetv2_gc_lgc_cifar100", "mobilenetv2_lgc_gc_cifar100"),
    *("mobilenetv2_gc_cifar100", "mobilenetv2_lgc_proj_cifar100", "mobilenetv2_gc_proj_cifar100"),
    *("mobilenetv2_lgc_exp_cifar100", "mobilenetv2_gc_exp_cifar100", "mobilenetv2_t4_cifar100"),
)


def family_table(costs: dict[str, mz.Profile]) -> str:
    weights, latency = default_weights(), load_latency()
    rows = []
    for name in FAMILY:
        entry, cost = weights[name], costs[name]
        result = json.loads((ROOT / entry.result).read_text())
        parent = result["recipe"]["init_from"].partition(".")[0]
        start = (
            f"`{parent}`, then {result['recipe']['epochs']} epochs"
            if parent
            else f"{result['recipe']['epochs']} epochs"
        )
        sizes = [
            f"{cost.params / 1e6:.3f}",
            f"{cost.macs / 1e6:.1f}",
            f"{milliseconds(latency, model=name, **DEPLOYED):.2f}",
        ]
        rows.append([f"`{name}`", *sizes, f"{result['training_loss']:.3f}", f"{entry.top1:.2f}", start])
    return markdown(["model", "params (M)", "MACs (M)", "ms", "training loss", "top-1 (%)", "training"], rows)


def read_log(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def teacher_table() -> str:
    rows = [
        [
            row["epoch"],
            row["size"],
            f"{float(row['train_top1']):.1f}",
            f"{float(row['holdout_top1']):.2f}",
            f"{float(row['seconds']):.1f}",
        ]
        for row in read_log(ROOT / "benchmarks" / "teacher" / "log.csv")
    ]
    device = json.loads((ROOT / "benchmarks" / "teacher" / "run.json").read_text())["device"]
    header = ["epoch", "pixels", "training top-1 (%)", "held-out top-1 (%)", "seconds"]
    return f"{markdown(header, rows)}\n\nOn one {device}; training top-1 is of batches half of which CutMix has mixed."


def tuning_table() -> str:
    rows = []
    for path in sorted((ROOT / "benchmarks" / "recipes" / "tuning").glob("*.toml")):
        recipe = load_recipe(path)
        log = read_log(ROOT / "benchmarks" / "logs" / "tuning" / f"{path.stem}.csv")
        last = [f"{float(log[-1][key]):.2f}" for key in ("train_top1", "holdout_top1")]
        rows.append([f"`{recipe.model}`", f"{recipe.lr:g}", str(recipe.batch_size), str(len(log)), *last])
    return markdown(["model", "Muon's lr", "batch", "epochs", "training top-1 (%)", "held-out top-1 (%)"], rows)


def train_speed_table() -> str:
    document = json.loads((RESULTS / "train_speed.json").read_text())
    rows = [
        [
            f"`{row['model']}`",
            row["way"],
            f"{row['images_per_second']:.0f}",
            f"{row['images_per_second'] / 2:.0f}",
            f"{100 * row['outside']:.1f}",
        ]
        for row in document["rows"]
    ]
    env = document["environment"]
    header = ["model", "way", "images/s", "per core", "outside network and optimiser (%)"]
    source = f"On two cores of an {env['device']}, torch {env['torch']}, {document['precision']}, batch "
    source += f"{document['batch_size']}, {document['optimizer']}, medians of {document['turns']} turns."
    return f"{markdown(header, rows)}\n\n{source}"


def condensed_layer_table() -> str:
    document = json.loads((RESULTS / "condensed_layer.json").read_text())
    cells: dict[str, dict[tuple[int, int, str], dict[str, Any]]] = {}
    for row in document["rows"]:
        cells.setdefault(row["what"], {})[row["threads"], row["batch"], row["layout"]] = row
    columns = list(next(iter(cells.values())))
    header = ["layer", *(f"{layout}, {_count(t, 'thread')}, batch {b}" for t, b, layout in columns)]
    rows = []
    for what, by_column in cells.items():
        texts = []
        for column in columns:
            row = by_column[column]
            text = f"{row['dense'] / row['condensed']:.2f}"
            if "textbook" in row:
                text += f" ({row['dense'] / row['textbook']:.2f})"
            texts.append(text)
        rows.append([what, *texts])
    env = document["environment"]
    source = f"Measured on {env['device']} with torch {env['torch']}, fp32, medians of interleaved runs."
    return f"{markdown(header, rows)}\n\n{source}"


# The dense network that ratios refer to.
REFERENCE = ("mobilenetv2_cifar100", "plain")


def latency_source(document: dict[str, Any]) -> str:
    env = document["environment"]
    versions = ", ".join(f"{key} {env[key]}" for key in ("onnxruntime", "openvino", "torch") if key in env)
    return f"Measured on {env['device']}, {versions}; medians of interleaved runs."


def pass_times(document: dict[str, Any], batches: tuple[int, ...], **wanted: Any) -> list[float]:
    """Returns a form's milliseconds per image at the best of `batches`, per pass; none if it wasn't timed."""
    rows = [row for row in document["rows"] if row["batch"] in batches and wanted.items() <= row.items()]
    return [min(times) for times in zip(*(row["passes"] for row in rows), strict=True)]


def ratios(document: dict[str, Any], model: str, form: str, batches: tuple[int, ...], **cell: Any) -> list[float]:
    """Returns the reference's time over the form's, per pass, so that what changes between passes cancels."""
    times = pass_times(document, batches, model=model, form=form, **cell)
    reference = pass_times(document, batches, model=REFERENCE[0], form=REFERENCE[1], **cell) if times else []
    return [base / time for base, time in zip(reference, times, strict=True)]


def ratio_rows(document: dict[str, Any], cells: list[dict[str, Any]], **common: Any) -> list[list[str]]:
    """Returns a row per model and form: the median over passes of the reference's time over its own, per cell."""
    rows = []
    for model, form in dict.fromkeys((row["model"], row["form"]) for row in document["rows"]):
        found = [ratios(document, model, form, **common, **cell) for cell in cells]
        if any(found):
            texts = [f"{statistics.median(values):.2f}" if values else "-" for values in found]
            rows.append([f"`{model}`" if "cifar100" in model else model, form, *texts])
    return rows


ORT_CELLS: dict[str, dict[str, Any]] = {
    "1 thread, batch 1": dict(threads=1, batches=(1,)),
    "2 threads, batch 1": dict(threads=2, batches=(1,)),
    "1 thread, batch 64": dict(threads=1, batches=(64,)),
    "2 threads, batch 64": dict(threads=2, batches=(64,)),
    "best batch": dict(threads=1, batches=BATCHES["onnxruntime"]),
}


def latency_table(precision: str) -> str:
    document = load_latency()
    rows = ratio_rows(document, list(ORT_CELLS.values()), runtime="onnxruntime", precision=precision)
    cell = dict(model=REFERENCE[0], form=REFERENCE[1], runtime="onnxruntime", precision=precision)
    times = []
    for threads in THREADS:
        passes = pass_times(document, (1,), threads=threads, **cell)
        times.append(f"{_median_and_range(passes)} ms on {_count(threads, 'thread')}")
    note = f"1.00 is, per image at batch 1, {', '.join(times)}: median of {len(passes)} passes (lowest to highest)."
    tags = sorted({f"`{file['weights']}`" for file in document["files"] if "cifar100" in file["model"]})
    note += (
        f" {latency_source(document)} The networks had weights of {', '.join(tags)}: which hidden channels an optimized"
    )
    note += " one leaves out follows from its weights, so newer ones may differ a little."
    return f"{markdown(['model', 'form', *ORT_CELLS], rows)}\n\n{note}"


# The forms that learned groups are sold on, and the network without any gather or shuffle that limits them.
LIMITED = (
    "mobilenetv2_lgc_cifar100",
    "mobilenetv2_gc_lgc_cifar100",
    "mobilenetv2_lgc_gc_cifar100",
    "mobilenetv2_lgc_proj_cifar100",
    "gc without shuffles",
)


def limit_table() -> str:
    document = load_latency()
    common: dict[str, Any] = dict(form="optimized", runtime="onnxruntime", precision="fp32")
    rows = []
    for model in LIMITED:
        cells = [_median_and_range(ratios(document, model, **common, **cell)) for cell in ORT_CELLS.values()]
        rows.append([f"`{model}`" if "cifar100" in model else model, *cells])
    return markdown(["optimized", *ORT_CELLS], rows)


def eager_table() -> str:
    document = load_latency()
    cells: list[dict[str, Any]] = [
        dict(threads=threads, batches=(batch,), layout=layout)
        for threads, batch in ((1, 1), (2, 1), (1, 8))
        for layout in ("NCHW", "channels_last")
    ]
    columns = [f"{c['layout']}, {_count(c['threads'], 'thread')}, batch {c['batches'][0]}" for c in cells]
    header = ["model", "form", *columns]
    rows = ratio_rows(document, cells, runtime="eager")
    return f"{markdown(header, rows)}\n\n{latency_source(document)}"


def openvino_table() -> str:
    document = load_latency()
    cells = {header: cell for header, cell in ORT_CELLS.items() if header != "best batch"}
    rows = ratio_rows(document, list(cells.values()), runtime="openvino")
    return f"{markdown(['model', 'form', *cells], rows)}\n\n{latency_source(document)}"


def files_table() -> str:
    rows = []
    for file in load_latency()["files"]:
        if file["form"] in ("plain", "optimized"):
            macs = f"{file['macs'] / 1e6:.1f}" if file["macs"] else "-"
            size = [f"{file['bytes'] / 1e6:.2f}", f"{file['peak_mib']:.0f}"]
            name = f"`{file['model']}`" if "cifar100" in file["model"] else file["model"]
            rows.append([name, file["form"], file["precision"], macs, *size])
    return markdown(["model", "form", "precision", "MACs (M)", "file (MB)", "peak memory (MiB)"], rows)


def rewrite_choice_table() -> str:
    document = json.loads((RESULTS / "rewrite_choice.json").read_text())
    rows = []
    for model in dict.fromkeys(row["model"] for row in document["rows"]):
        for threads in THREADS:
            sums = totals(document["rows"], model, threads)
            rows.append([f"`{model}`", str(threads), *(f"{value / 1000:.2f}" for value in sums.values())])
    env = document["environment"]
    header = ["model", "threads", "chosen (ms)", "fastest (ms)", "as condensed (ms)", "slowest (ms)"]
    source = f"Measured on {env['device']}, onnxruntime {env['onnxruntime']}, one image; medians of interleaved runs."
    return f"{markdown(header, rows)}\n\n{source}"


def finetune_table() -> str:
    document = json.loads((RESULTS / "finetune.json").read_text())
    groups: dict[tuple[str, str, int], dict[str, list[float]]] = {}
    for row in document["rows"]:
        cell = groups.setdefault((row["model"], row["data"], row["epochs"]), {})
        cell.setdefault(row["method"], []).append(row["evaluation"]["top1"])
    methods = list(dict.fromkeys(row["method"] for row in document["rows"]))
    tags = {row["model"]: row["start"] for row in document["rows"] if row["start"] != "scratch"}
    rows = [
        [f"`{model}.{tags[model]}`", data, str(epochs), *(_mean_and_range(cell[method]) for method in methods)]
        for (model, data, epochs), cell in groups.items()
    ]
    env, seeds = document["environment"], len({row["seed"] for row in document["rows"]})
    source = f"Test top-1 in %, mean of {seeds} seeds (lowest to highest), last epoch, on {env['device']}."
    return f"{markdown(['model', 'data', 'epochs', *methods], rows)}\n\n{source}"


def _mean_and_range(values: list[float]) -> str:
    return f"{sum(values) / len(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def _median_and_range(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def with_table(path: Path, name: str, table: str, texts: dict[Path, str]) -> None:
    """Puts a table between its markers in the text of a file."""
    text = texts.get(path) or path.read_text(encoding="utf-8")
    pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"{path}: needs exactly one pair of {name} markers")
    texts[path] = pattern.sub(lambda match: f"{match[1]}{table}\n{match[2]}", text)


def generated() -> dict[Path, str]:
    """Returns the content that each generated file should have."""
    costs = profiles()
    latency = load_latency()
    rows = {
        name: {**dataclasses.asdict(cost), "ms": milliseconds(latency, model=name, **DEPLOYED)}
        for name, cost in costs.items()
    }
    texts = {ROOT / "mobilenets_zoo" / "profiles.json": json.dumps(rows, indent=2) + "\n"}
    with_table(ROOT / "README.md", "models", models_table(costs), texts)
    with_table(ROOT / "README.md", "flagship", flagship(), texts)
    with_table(ROOT / "README.md", "state", state(), texts)
    with_table(ROOT / "docs" / "models.md", "models", models_table(costs), texts)
    with_table(ROOT / "docs" / "models.md", "weights", weights_table(), texts)
    with_table(ROOT / "docs" / "lgc.md", "family", family_table(costs), texts)
    with_table(ROOT / "docs" / "training.md", "teacher", teacher_table(), texts)
    with_table(ROOT / "docs" / "training.md", "tuning", tuning_table(), texts)
    with_table(ROOT / "docs" / "training.md", "train-speed", train_speed_table(), texts)
    with_table(ROOT / "docs" / "design.md", "condensed-layer", condensed_layer_table(), texts)
    with_table(ROOT / "docs" / "design.md", "rewrite-choice", rewrite_choice_table(), texts)
    condensing = ROOT / "docs" / "condensing.md"
    for precision in ("fp32", "int8"):
        with_table(condensing, f"latency-{precision}", latency_table(precision), texts)
    with_table(condensing, "latency-limit", limit_table(), texts)
    with_table(condensing, "latency-eager", eager_table(), texts)
    with_table(condensing, "latency-openvino", openvino_table(), texts)
    with_table(condensing, "files", files_table(), texts)
    with_table(ROOT / "docs" / "finetuning.md", "finetune", finetune_table(), texts)
    return texts


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail where a table is stale, write nothing")
    args = parser.parse_args(argv)
    stale = []
    for path, text in generated().items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(str(path.relative_to(ROOT)))
            if not args.check:
                with mz.files.atomic_write(path, "w", encoding="utf-8") as file:
                    file.write(text)
    for figure in all_figures(ORIGINAL_TOP1):
        if not figure.is_current():
            stale.append(str(figure.path.relative_to(ROOT)))
            if not args.check:
                figure.path.parent.mkdir(exist_ok=True)
                with mz.files.atomic_write(figure.path, "w", encoding="utf-8") as file:
                    file.write(figure.svg())
    if args.check and stale:
        print(f"stale: {', '.join(stale)}; run python benchmarks/tables.py", file=sys.stderr)
        return 1
    print("up to date" if not stale else f"wrote {', '.join(stale)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
