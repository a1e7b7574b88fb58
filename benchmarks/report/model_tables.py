"""Tables and sentences on the models and their weights."""

import functools
import re
from typing import Any

import timm

import mobilenets_zoo as mz
from report import ROOT, RUNS, load_json, markdown
from report.latency_tables import DEPLOYED, NARROW, latency, timed
from report.training_tables import FIVE_EPOCHS, experiments

__all__ = ["ORIGINAL_TOP1", "default_weights", "family_table", "models_table", "profiles", "weights_table"]

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


def profiles() -> dict[str, dict[str, Any]]:
    """Returns what profiles.json says of every model: its deployed cost, and what was timed.

    `params` and `macs` are of the condensed network, measured on the model itself; `optimized_macs` and `ms` (one image
    on one thread of `processor` in ONNX Runtime) of the network that `optimize_for_inference` makes of `weight`; these
    four are None where the model wasn't timed.
    """
    result = {}
    for name in sorted(timm.list_models("*_cifar100")):
        model = timm.create_model(name)
        cost = mz.profile(timm.create_model(name, condensed=True) if mz.learned_layers(model) else model)
        row = timed(model=name, **DEPLOYED) or {}
        times = {"optimized_macs": row.get("macs"), "ms": row.get("ms"), "weight": row.get("weight")}
        times["processor"] = latency()["environment"]["device"] if row else None
        result[name] = {"params": cost.params, "macs": cost.macs, **times}
    return result


def default_weights() -> dict[str, mz.pretrained.WeightEntry]:
    """Returns the weight that each model loads by default, where it has one."""
    entries = {
        name: mz.manifest().get(f"{name}.{timm.get_pretrained_cfg(name).tag}")
        for name in timm.list_models("*_cifar100")
    }
    return {name: entry for name, entry in entries.items() if entry}


# Columns of the weights' table: key in the evaluation, digits.
SCORES = {"top-1": ("top1", 2), "top-5": ("top5", 2), "ECE": ("ece", 1)}
COSTS = ["params (M)", "MACs (M)", "optimized (M)", "ms"]


def _costs(row: dict[str, Any]) -> list[str]:
    texts = [f"{row['params'] / 1e6:.3f}", f"{row['macs'] / 1e6:.1f}"]
    return [*texts, *([f"{row['optimized_macs'] / 1e6:.1f}", f"{row['ms']:.2f}"] if row["ms"] else ["-", "-"])]


def models_table(rows: dict[str, dict[str, Any]]) -> str:
    weights = default_weights()
    table = []
    for name, row in sorted(rows.items(), key=lambda item: (item[0].split("_")[0], -item[1]["macs"], item[0])):
        top1 = f"{weights[name].top1:.2f}" if name in weights else "-"
        original = f"{ORIGINAL_TOP1[name]:.2f}" if name in ORIGINAL_TOP1 else "-"
        table.append([f"`{name}`", *_costs(row), top1, original, str(measured_runs(name, row["params"]))])
    return _with_source(markdown(["model", *COSTS, "top-1 (%)", "original (%)", "runs"], table))


def _with_source(table: str) -> str:
    """Adds a line on where milliseconds come from."""
    env = latency()["environment"]
    return f"{table}\n\nms: {env['device']}, ONNX Runtime {env['onnxruntime']}."


@functools.cache
def results() -> list[dict[str, Any]]:
    """Returns the results of the runs that have a folder and were measured on the test images."""
    found = [load_json(path) for path in sorted(RUNS.glob("*/result.json"))]
    return [result for result in found if "evaluation" in result]


def measured_runs(model: str, params: int) -> int:
    """Returns how many finished runs of a model, at its own width, were measured on the test images."""
    others = [row for row in experiments() if row["images"] == "test"]
    return sum(row["model"] == model and int(row["params"]) == params for row in [*results(), *others])


def chain_epochs(result: dict[str, Any]) -> list[int]:
    """Returns the epochs of each training behind a weight: those it started from, one after the other, and its own."""
    own, start = result["recipe"]["epochs"], result["recipe"]["init_from"]
    return [*chain_epochs(load_json(RUNS / start / "result.json")), own] if start else [own]


def weights_table() -> str:
    rows = []
    for entry in mz.manifest().values():
        result = load_json(ROOT / entry.result)
        scores = (f"{result['evaluation'][key]:.{digits}f}" for key, digits in SCORES.values())
        epochs = "+".join(map(str, chain_epochs(result)))
        device = re.sub(r"\(R\)|Processor|NVIDIA|Intel|AMD", "", result["training"]["device"]).strip()
        taught = "yes" if entry.taught_by else "no"
        rows.append([f"[`{entry.name}`](../{entry.recipe})", *scores, epochs, device, taught])
    return markdown(["weight", *SCORES, "epochs", "on", "KD"], rows)


PARENT = "mobilenetv2_cifar100"  # whose weights the family of docs/lgc.md started from
Size = tuple[str, int, int]  # model, parameters, multiply-adds: tells a narrowed network from the model's own


def five_epochs() -> tuple[dict[Size, list[str]], dict[Size, list[str]]]:
    """Returns top-1 after five epochs from the parent, by network: from its weights alone, and chosen with images."""
    alone: dict[Size, list[str]] = {}
    images: dict[Size, list[str]] = {}
    found = [(row, alone) for row in experiments() if row["comparison"] == FIVE_EPOCHS]
    for result in results():
        recipe, top1 = result["recipe"], {"top1": result["evaluation"]["top1"]}
        if recipe["epochs"] == 5 and recipe["init_from"].startswith(f"{PARENT}."):
            found.append((result | top1, images if recipe.get("calibration_images") else alone))
    for row, column in found:
        size = row["model"], int(row["params"]), int(row["macs"])
        column.setdefault(size, []).append(f"{float(row['top1']):.2f}")
    return alone, images


def family_table(costs: dict[str, dict[str, Any]]) -> str:
    """Returns what groups cost and leave of the dense parent: the networks that started from its weights."""
    alone, images = five_epochs()
    rows = []
    for name, entry in default_weights().items():
        result = load_json(ROOT / entry.result)
        if name == PARENT or result["recipe"]["init_from"].startswith(f"{PARENT}."):
            size = name, entry.params, entry.macs
            five = [" and ".join(column.pop(size, ["-"])) for column in (alone, images)]
            epochs = " + ".join(map(str, chain_epochs(result)))
            rows.append((entry.macs, [f"`{name}`", *_costs(costs[name]), *five, epochs, f"{entry.top1:.2f}"]))
    for size in dict.fromkeys([*alone, *images]):  # what remains is the narrowed network
        row = timed(model=NARROW, **DEPLOYED) or {}
        cost = {"params": size[1], "macs": size[2], "optimized_macs": row.get("macs"), "ms": row.get("ms")}
        label = " ".join(f"`{part}`" for part in NARROW.split(", "))
        five = [" and ".join(column.get(size, ["-"])) for column in (alone, images)]
        rows.append((size[2], [label, *_costs(cost), *five, "-", "-"]))
    rows.sort(key=lambda row: (row[1][0] != f"`{PARENT}`", row[0]))
    header = ["model", *COSTS, "5 epochs (%)", "with images (%)", "weight: epochs", "top-1 (%)"]
    return _with_source(markdown(header, [row for _, row in rows]))
