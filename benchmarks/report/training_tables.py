"""Tables on how the weights were trained: the teacher, and the runs that no weight was taken from."""

from report import ROOT, RUNS, load_json, markdown, read_csv

__all__ = ["FIVE_EPOCHS", "experiments", "experiments_table", "teacher_table"]

FIVE_EPOCHS = "five epochs from the dense parent"
# Comparisons of which each model has one row.
TOGETHER = dict.fromkeys(("earlier weights", "going on from its own weight"), "earlier and longer")


def experiments() -> list[dict[str, str]]:
    return read_csv(ROOT / "benchmarks" / "experiments.csv")


def experiments_table() -> str:
    """Returns a row per comparison, model and kind of images; docs/lgc.md shows the five epochs from the parent."""
    groups: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    for row in experiments():
        if row["comparison"] != FIVE_EPOCHS:
            comparison = TOGETHER.get(row["comparison"], row["comparison"])
            groups.setdefault((comparison, row["model"], row["images"]), []).append(row)
    rows = []
    for (comparison, model, images), runs in groups.items():
        epochs = sorted({int(run["epochs"]) for run in runs})
        length = f"{epochs[0]} to {epochs[-1]}" if len(epochs) > 1 else str(epochs[0])
        tops = (f"{run['setting'].removeprefix(f'{comparison} ')}: {run['top1']}" for run in runs)
        rows.append([comparison, f"`{model}`", length, images, "; ".join(tops)])
    return markdown(["comparison", "model", "epochs", "images", "setting: top-1 (%)"], rows, left=5)


def teacher_table() -> str:
    folder = RUNS / "efficientnet_lite2.cutmix_e8_r160"
    rows = [[row["epoch"], row["size"], f"{float(row['holdout_top1']):.2f}"] for row in read_csv(folder / "log.csv")]
    device = load_json(folder / "result.json")["device"]
    return f"{markdown(['epoch', 'pixels', 'held-out top-1 (%)'], rows)}\n\nOn one {device}."
