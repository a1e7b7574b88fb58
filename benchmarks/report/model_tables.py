"""Tables and sentences on the models and their weights."""

import functools
import re
from typing import Any

import timm

import mobilenets_zoo as mz
from report import ROOT, RUNS, load_json, markdown
from report.latency_tables import DEPLOYED, NARROW, latency, timed
from report.training_tables import FIVE_EPOCHS, experiments

__all__ = [
    *("ORIGINAL_TOP1", "default_weights", "profiles"),
    *("family_table", "five_epochs_table", "models_table", "weights_table"),
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
Network = tuple[str, int, int]  # model, parameters, multiply-adds: tells a narrowed network from the model's own
ALONE = "weights alone, lr 0.02"  # a start and a learning rate: those of all rows of experiments.csv


def five_epochs() -> dict[Network, dict[str, list[str]]]:
    """Returns top-1 after five epochs from the parent, by network and by start and learning rate."""
    found = [(row, row["top1"], ALONE) for row in experiments() if row["comparison"] == FIVE_EPOCHS]
    for row in results():
        recipe = row["recipe"]
        if recipe["init_from"].startswith(f"{PARENT}.") and row["tag"].endswith("_e5_r32"):
            start = "images" if recipe.get("calibration_images") else "weights alone"
            start += f", sharing={recipe['sharing']}" if recipe.get("sharing") else ""
            found.append((row, row["evaluation"]["top1"], f"{start}, lr {recipe['lr']:g}"))
    table: dict[Network, dict[str, list[str]]] = {}
    for row, top1, start in found:
        network = row["model"], int(row["params"]), int(row["macs"])
        table.setdefault(network, {}).setdefault(start, []).append(f"{float(top1):.2f}")
    return table


def _label(network: Network) -> str:
    """Returns the model's name, with its width where it isn't the model's own."""
    own = default_weights()[network[0]].params == network[1]
    if not own and network[0] != PARENT:
        raise ValueError(f"only {PARENT} has runs at another width, not {network[0]}")
    return " ".join(f"`{part}`" for part in ([network[0]] if own else NARROW.split(", ")))


def five_epochs_table() -> str:
    """Returns what is left after five epochs of the networks whose groups or channels were chosen with images."""
    table = {of: tops for of, tops in five_epochs().items() if any(start.startswith("images") for start in tops)}
    starts = sorted({start for tops in table.values() for start in tops}, reverse=True)
    rows = [[_label(of), *(" and ".join(tops.get(start, ["-"])) for start in starts)] for of, tops in table.items()]
    return markdown(["model", *(f"{start} (%)" for start in starts)], rows)


def family_table(costs: dict[str, dict[str, Any]]) -> str:
    """Returns what groups cost and leave of the dense parent: the networks that started from its weights."""
    after_five = {of: " and ".join(tops[ALONE]) for of, tops in five_epochs().items() if ALONE in tops}
    rows = []
    for name, entry in default_weights().items():
        result = load_json(ROOT / entry.result)
        if name == PARENT or result["recipe"]["init_from"].startswith(f"{PARENT}."):
            five = after_five.pop((name, entry.params, entry.macs), "-")
            epochs = " + ".join(map(str, chain_epochs(result)))
            rows.append((entry.macs, [f"`{name}`", *_costs(costs[name]), five, epochs, f"{entry.top1:.2f}"]))
    for network, tops in after_five.items():  # what remains is the narrowed one
        row = timed(model=NARROW, **DEPLOYED) or {}
        cost = {"params": network[1], "macs": network[2], "optimized_macs": row.get("macs"), "ms": row.get("ms")}
        rows.append((network[2], [_label(network), *_costs(cost), tops, "-", "-"]))
    rows.sort(key=lambda row: (row[1][0] != f"`{PARENT}`", row[0]))
    header = ["model", *COSTS, "after 5 epochs (%)", "weight: epochs", "top-1 (%)"]
    return _with_source(markdown(header, [row for _, row in rows]))
