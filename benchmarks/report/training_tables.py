"""Tables on how the weights were trained: teacher, tuning, the trainer's speed, fine-tuning."""

import json
import statistics

from training.recipe import load_recipe

from report.files import EARLIER, RESULTS, ROOT, load_result, markdown, read_log
from report.model_tables import default_weights

__all__ = ["finetune_table", "once_more_table", "teacher_table", "train_speed_table", "tuning_table"]

LEARNED_SIDES = ("expansion", "projection")


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
    device = load_result("benchmarks/teacher/run.json")["device"]
    header = ["epoch", "pixels", "training top-1 (%)", "held-out top-1 (%)", "seconds"]
    return f"{markdown(header, rows)}\n\nOn one {device}; training top-1 is of batches half of which CutMix has mixed."


def tuning_table() -> str:
    rows = []
    for path in sorted((ROOT / "benchmarks" / "recipes" / "tuning").glob("*.toml")):
        recipe = load_recipe(path)
        log = read_log(ROOT / "benchmarks" / "logs" / "tuning" / f"{path.stem}.csv")
        last = [f"{float(log[-1][key]):.2f}" for key in ("train_top1", "holdout_top1")]
        optimizer = {"nmuon": "Muon", "adamw": "AdamW"}[recipe.optimizer]
        settings = [optimizer, f"{recipe.lr:g}", f"{recipe.weight_decay:g}", " ".join(row["size"] for row in log)]
        rows.append([f"`{recipe.model}`", *settings, *last, _hoyer_before_pruning(path.stem)])
    header = ["model", "optimiser", "lr", "weight decay", "pixels", "training top-1 (%)", "held-out top-1 (%)"]
    return markdown([*header, "Hoyer index"], rows)


def _hoyer_before_pruning(name: str) -> str:
    """Returns the mean Hoyer index of expansions and projections before a tuning run's first pruning stage."""
    path = ROOT / "benchmarks" / "logs" / "tuning" / f"{name}.masks.json"
    if not path.exists():
        return "-"
    indices = json.loads(path.read_text(encoding="utf-8"))[0]["hoyer_before"]
    kinds = [[v for layer, values in indices.items() if kind in layer for v in values] for kind in LEARNED_SIDES]
    return " / ".join(f"{statistics.mean(values):.3f}" for values in kinds)


def once_more_table() -> str:
    """Returns what came of networks that went on learning from their own finished weights."""
    files = (*sorted(RESULTS.glob("mobilenet*.json")), *sorted(EARLIER.glob("*/result.json")))
    results = {f"{r['model']}.{r['tag']}": r for r in map(load_result, files)}
    weights = default_weights()
    rows = []
    for result in results.values():
        recipe, model = result["recipe"], result["model"]
        start = results.get(recipe["init_from"])
        if start is None or start["model"] != model or recipe["model_args"]:
            continue
        kept = "yes" if result["tag"] == weights[model].tag else "no"
        settings = [recipe["epochs"], f"{recipe['lr']:g}", f"{recipe['cutmix']:g}", f"{recipe['weight_decay']:g}"]
        measured = [f"{r['evaluation']['top1']:.2f} ({r['evaluation']['loss']:.3f})" for r in (start, result)]
        rows.append([f"`{model}`", *map(str, settings), *measured, kept])
    rows.sort(key=lambda row: (-int(row[1]), row[0]))
    header = ["model", "epochs", "lr", "CutMix", "weight decay", "before: top-1 (loss)", "after", "kept"]
    return markdown(header, rows)


def train_speed_table() -> str:
    document = load_result(RESULTS / "train_speed.json")
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


def finetune_table() -> str:
    document = load_result(RESULTS / "finetune.json")
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
