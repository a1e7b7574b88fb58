"""Tables on fine-tuning, from benchmarks/finetuning.csv."""

import statistics

from report import ROOT, markdown, read_csv

__all__ = ["METHODS", "finetuning_table", "results"]

RESULTS = ROOT / "benchmarks" / "finetuning.csv"
METHODS = ("fine-tuned", "classifier", "scratch")


def results(data: str) -> dict[tuple[str, str], dict[int, list[float]]]:
    """Returns the top-1 of every seed by (model, method) and number of images a class."""
    found: dict[tuple[str, str], dict[int, list[float]]] = {}
    for row in read_csv(RESULTS):
        if row["data"] == data:
            cells = found.setdefault((row["model"], row["method"]), {})
            cells.setdefault(int(row["per_class"]), []).append(float(row["top1"]))
    return found


def finetuning_table(data: str) -> str:
    found = results(data)
    counts = sorted({count for cells in found.values() for count in cells})
    rows = []
    for model in dict.fromkeys(model for model, _ in found):
        for method in METHODS:
            if cells := found.get((model, method)):
                rows.append([f"`{model}`", method, *(_cell(cells.get(count, [])) for count in counts)])
    return markdown(["network", "", *(f"{count:,} a class" for count in counts)], rows, left=2)


def _cell(scores: list[float]) -> str:
    """Returns mean and standard deviation, and how many seeds they are of where these aren't three."""
    if not scores:
        return "-"
    spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.1f}{spread}" + ("" if len(scores) == 3 else f" ({len(scores)})")
