"""Tables and sentences on the models and their weights."""

import textwrap
from pathlib import Path
from typing import Any

import timm

import mobilenets_zoo as mz
from mobilenets_zoo.cli import FAST_MS
from report.files import EARLIER, RESULTS, load_latency, load_result, markdown

__all__ = [
    "DEPLOYED",
    "ORIGINAL_TOP1",
    "default_weights",
    "family_table",
    "flagship",
    "milliseconds",
    "models_table",
    "profiles",
    "state",
    "weights_table",
]

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


# How the tables time a model.
DEPLOYED: dict[str, Any] = dict(form="optimized", runtime="onnxruntime", precision="fp32", threads=1, batch=1)


def profiles() -> dict[str, mz.Profile]:
    """Returns the deployed cost of every model, measured on the models themselves."""
    result = {}
    for name in sorted(timm.list_models("*_cifar100")):
        model = timm.create_model(name)
        if mz.learned_layers(model):
            model = timm.create_model(name, condensed=True)
        result[name] = mz.profile(model)
    return result


def milliseconds(document: dict[str, Any], **wanted: Any) -> float | None:
    rows = [row for row in document["rows"] if all(row.get(key) == value for key, value in wanted.items())]
    return rows[0]["ms"] if rows else None


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
    result = load_result(best.result)
    return wrapped(
        f"`{best.model}` has **{best.top1:.2f} % top-1** with {best.params / 1e6:.2f} M parameters in "
        f"{times[best.model]:.1f} ms an image (the architecture's source reports {ORIGINAL_TOP1[best.model]:.2f} %), "
        f"after {' + '.join(map(str, chain_epochs(result)))} epochs on one {result['training']['device']}. It and "
        f"{others} other weights were taught by an EfficientNet-Lite2 that was pretrained on ImageNet-1k and "
        f"fine-tuned here ([how](docs/training.md)); {' and '.join(alone)} learned from CIFAR-100's labels alone."
    )


def state() -> str:
    """Returns the README's paragraph on how the weights compare with the original's."""
    weights = {name: entry for name, entry in default_weights().items() if name in ORIGINAL_TOP1}
    gaps = {name: entry.top1 - ORIGINAL_TOP1[name] for name, entry in weights.items()}
    above = [f"`{name}` ({gap:+.2f})" for name, gap in sorted(gaps.items(), key=lambda item: -item[1]) if gap >= 0]
    count = f"All {len(gaps)}" if len(above) == len(gaps) else f"{len(above)} of {len(gaps)}"
    text = f"**The state of the weights.** {count} reach the original's accuracy; points above it: "
    text += f"{', '.join(above) or 'none'}."
    below = [-gap for gap in gaps.values() if gap < 0]
    if below:
        text += f" The others are {min(below):.1f} to {max(below):.1f} points below it."
    epochs = [sum(chain_epochs(load_result(entry.result))) for entry in weights.values()]
    text += f" The weights took {min(epochs)} to {max(epochs)} epochs, those of the networks they started from "
    return wrapped(text + "included, where the original took 400.")


def wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def chain_epochs(result: dict[str, Any]) -> list[int]:
    """Returns the epochs of each training behind a weight: those it started from, one after the other, and its own."""
    own, start = result["recipe"]["epochs"], result["recipe"]["init_from"]
    if not start:
        return [own]
    entry = mz.manifest().get(start)
    return [*chain_epochs(load_result(entry.result if entry else EARLIER / start / "result.json")), own]


def weights_table() -> str:
    rows = []
    for entry in mz.manifest().values():
        result = load_result(entry.result)
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
                " + ".join(map(str, chain_epochs(result))),
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


# What a group is worth: the dense parent, and the networks that started from it.
PARENT = "mobilenetv2_cifar100"
FAMILY = (
    *(PARENT, "mobilenetv2_gc_cifar100", "mobilenetv2_gc_lgc_cifar100", "mobilenetv2_lgc_gc_cifar100"),
    *("mobilenetv2_lgc_cifar100", "mobilenetv2_gc_proj_cifar100", "mobilenetv2_lgc_proj_cifar100"),
    *("mobilenetv2_gc_exp_cifar100", "mobilenetv2_lgc_exp_cifar100", "mobilenetv2_t4_cifar100"),
)
# What ends the tags of recipes that differ in nothing but model, width and seed.
ALIKE = {"after 5 epochs (%)": "kd_e5_r32", "after 30 (%)": "kd_cutmix_e30_r32"}


def family_table(costs: dict[str, mz.Profile]) -> str:
    weights, latency = default_weights(), load_result(RESULTS / "family_latency.json")
    alike: dict[tuple[str, float], dict[str, list[dict[str, Any]]]] = {}  # by model and width, by heading
    for file in (*sorted(RESULTS.glob("mobilenet*.json")), *sorted(EARLIER.glob("*/result.json"))):
        result = load_result(file)
        for heading, suffix in ALIKE.items():
            if result["tag"].endswith(suffix) and result["recipe"]["init_from"].startswith(f"{PARENT}."):
                key = (result["model"], result["recipe"]["model_args"].get("width_mult", 1.0))
                alike.setdefault(key, {}).setdefault(heading, []).append(result)
    rows = []
    for name in FAMILY:
        entry, cost = weights[name], costs[name]
        epochs = " + ".join(map(str, chain_epochs(load_result(entry.result))))
        time = f"{milliseconds(latency, model=name, **DEPLOYED):.2f}"
        cells = [time, *_top1s(alike.pop((name, 1.0), {})), epochs, f"{entry.top1:.2f}"]
        rows.append([f"`{name}`", f"{cost.params / 1e6:.3f}", f"{cost.macs / 1e6:.1f}", *cells])
    for (name, width), results in alike.items():
        any_result = next(iter(results.values()))[0]
        time = f"{milliseconds(latency, model=f'{name}, width_mult={width:g}', **DEPLOYED):.2f}"
        size = [f"{any_result['params'] / 1e6:.3f}", f"{any_result['macs'] / 1e6:.1f}", time]
        rows.insert(1, [f"`{name}`, `width_mult={width:g}`", *size, *_top1s(results), "-", "-"])
    header = ["model", "params (M)", "MACs (M)", "ms", *ALIKE, "weight: epochs", "top-1 (%)"]
    env = latency["environment"]
    source = f"Times on one core of an {env['device']} with ONNX Runtime {env['onnxruntime']}, all in one run; "
    source += "where two figures stand, of two seeds."
    return f"{markdown(header, rows)}\n\n{source}"


def _top1s(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Returns, for each heading of ALIKE, the top-1 of each seed."""
    by_seed = [sorted(results.get(heading, []), key=lambda result: result["seed"]) for heading in ALIKE]
    return [" and ".join(f"{r['evaluation']['top1']:.2f}" for r in seeds) or "-" for seeds in by_seed]
