"""The table on choosing groups: what benchmarks/groups.py measured."""

from typing import Any

from report import ROOT, load_json, markdown

__all__ = ["groups_table"]


def _macs(row: dict[str, Any], key: str) -> str:
    return f"{row[key] / 1e6:.1f}"


def groups_table() -> str:
    """Returns what each start of the family has right at once, and after one epoch."""
    rows, results = [], load_json(ROOT / "benchmarks" / "groups.json")["rows"]
    for row in results:
        arguments = "".join(f" `{key}={value}`" for key, value in row["model_args"].items())
        start = "images" if row["calibration_images"] else "-" if row["row"] == "dense" else "weights alone"
        if row["row"].endswith("_faster"):
            start += f", lr {row['lr']}"
        costs = [_macs(row, "macs"), _macs(row, "optimized_macs"), f"{row['ms']:.2f}" if "ms" in row else "-"]
        rows.append([f"`{row['model']}`{arguments}", start, *costs, f"{row['start_top1']:.2f}", f"{row['top1']:.2f}"])
    header = ["model", "start", "MACs (M)", "optimized (M)", "ms", "at once (%)", "after an epoch (%)"]
    starts = []
    for row in (row for row in results if "start" in row):
        spent = "{seconds} s and {megabytes:,} MB ({threads} threads, {device})".format(**row["start"])
        starts.append(f"Choosing and refitting `{row['model']}` took {spent}, all that the process held.")
    return "\n\n".join([markdown(header, rows, left=2), *starts])
