"""The tables on choosing groups: what benchmarks/groups.py and benchmarks/compress.py measured."""

from typing import Any

from report import ROOT, load_json, markdown

__all__ = ["compress_table", "groups_table"]


def _macs(row: dict[str, Any], key: str) -> str:
    return f"{row[key] / 1e6:.1f}"


def _time(row: dict[str, Any]) -> str:
    return f"{row['time']['share']:.2f}" if "time" in row else "-"


def groups_table() -> str:
    """Returns what each start of the family has right at once, and after one epoch."""
    rows, results = [], load_json(ROOT / "benchmarks" / "groups.json")["rows"]
    for row in results:
        arguments = "".join(f" `{key}={value}`" for key, value in row["model_args"].items())
        start = "images" if row["calibration_images"] else "-" if row["row"] == "dense" else "weights alone"
        start += f", `sharing={row['sharing']}`" if row["sharing"] else ""
        costs = [_macs(row, "macs"), _macs(row, "optimized_macs"), _time(row)]
        scores = [f"{row[key]:.2f}" for key in ("start_top1", "top1")]
        rows.append([f"`{row['model']}`{arguments}", start, *costs, *scores])
    header = ["model", "start", "MACs (M)", "optimized (M)", "time", "at once (%)", "after it (%)"]
    starts = []
    for row in (row for row in results if "start" in row):
        spent = "{seconds} s and {megabytes:,} MB ({threads} threads, {device})".format(**row["start"])
        starts.append(f"Choosing and refitting `{row['model']}` took {spent}, all that the process held.")
    return "\n\n".join([markdown(header, rows, left=2), *starts])


def compress_table() -> str:
    """Returns what is left of timm's networks, pruned by each rule, at once and after one more epoch."""
    rows = []
    for row in load_json(ROOT / "benchmarks" / "compress.json")["rows"]:
        optimized = _macs(row, "optimized_macs") if "optimized_macs" in row else "-"
        costs = [f"{_macs(row, 'macs')} to {_macs(row, 'condensed_macs')}", optimized, _time(row)]
        pairs = [[row.get(rule + when) for when in ("", "_epoch")] for rule in ("dense", "magnitude", "images")]
        scores = [" / ".join(f"{value:.1f}" for value in pair if value is not None) for pair in pairs]
        rows.append([f"`{row['network']}`", f"{row['size']}", *costs, *scores])
    header = ["network", "pixels", "MACs (M)", "optimized (M)", "time", "dense (%)", "magnitude", "with images"]
    return markdown(header, rows)
