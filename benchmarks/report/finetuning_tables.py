"""Tables on fine-tuning, from benchmarks/finetuning.csv and finetuning_trials.csv."""

import statistics

from report import ROOT, markdown, read_csv

__all__ = ["DATA", "METHODS", "finetuning_table", "results", "trials_table"]

RESULTS = ROOT / "benchmarks" / "finetuning.csv"
TRIALS = ROOT / "benchmarks" / "finetuning_trials.csv"
METHODS = ("fine-tuned", "classifier", "scratch")
DATA = {"cifar10": "CIFAR-10", "cifar100-coarse": "superclasses", "digits": "digits", "photos": "photos"}


def results(data: str) -> dict[tuple[str, str], dict[int, list[float]]]:
    """Returns the top-1 of every seed by (model, method) and number of images a class; foreign networks are last."""
    found: dict[tuple[str, str], dict[int, list[float]]] = {}
    for row in sorted(read_csv(RESULTS), key=lambda row: not row["model"].endswith("_cifar100")):
        if row["data"] == data:
            cells = found.setdefault((row["model"], row["method"]), {})
            cells.setdefault(int(row["per_class"]), []).append(float(row["top1"]))
    return found


def finetuning_table(*sets: str, timed: int = 0) -> str:
    """Returns a row for each network and method and a column for each data set and number of images a class.

    With `timed`, the last column is the median of fine-tuning's seconds on the first set with so many images a class.
    """
    found = {data: cells for data in sets if (cells := results(data))}
    counts = {data: sorted({count for by in cells.values() for count in by}) for data, cells in found.items()}
    columns = [(data, count) for data in found for count in counts[data]]
    rows = []
    for model in dict.fromkeys(model for cells in found.values() for model, _ in cells):
        for method in METHODS:
            scores = [found[data].get((model, method), {}).get(count, []) for data, count in columns]
            if any(scores):
                seconds = [_seconds(sets[0], model, timed) if method == "fine-tuned" else "-"] if timed else []
                rows.append([_short(model), method, *map(_cell, scores), *seconds])
    header = [f"{DATA[data]}: {count:,}" if count == counts[data][0] else f"{count:,}" for data, count in columns]
    return markdown(["network", "", *header, *([f"seconds ({timed})"] if timed else [])], rows, left=2)


def _seconds(data: str, model: str, per_class: int) -> str:
    key = {"data": data, "model": model, "method": "fine-tuned", "per_class": str(per_class)}
    found = [float(row["seconds"]) for row in read_csv(RESULTS) if key.items() <= row.items()]
    return f"{statistics.median(found):.0f}" if found else "-"


def _short(model: str) -> str:
    return f"`{model.removesuffix('_cifar100').removeprefix('mobilenet')}`"


def _cell(scores: list[float]) -> str:
    """Returns mean and standard deviation, and how many seeds they are of where these aren't three."""
    if not scores:
        return "-"
    spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.1f}{spread}" + ("" if len(scores) == 3 else f" ({len(scores)})")


def trials_table() -> str:
    """Returns the means of what was tried on held-out images, a column for each network."""
    trials: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for row in read_csv(TRIALS):
        scores = trials.setdefault((row["comparison"], row["per_class"], row["setting"]), {})
        scores.setdefault(row["model"], []).append(float(row["top1"]))
    models = dict.fromkeys(model for scores in trials.values() for model in scores)
    rows = [
        [*key, *(f"{statistics.mean(by[model]):.2f} ({len(by[model])})" if model in by else "-" for model in models)]
        for key, by in trials.items()
    ]
    return markdown(["comparison", "a class", "setting", *map(_short, models)], rows, left=3)
