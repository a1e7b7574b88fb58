"""Tables on choosing groups: what benchmarks/groups.py and compress.py measured."""

from typing import Any

from report import ROOT, load_json, markdown

__all__ = ["compress_table", "groups_table"]


def _macs(row: dict[str, Any], key: str) -> str:
    return f"{row[key] / 1e6:.1f}"


def groups_table() -> str:
    """Returns what each start of the family has right at once, and after one epoch."""
    rows = []
    for row in load_json(ROOT / "benchmarks" / "groups.json")["rows"]:
        arguments = "".join(f" `{key}={value}`" for key, value in row["model_args"].items())
        start = "images" if row["calibration_images"] else "weights alone"
        costs = [_macs(row, "macs"), _macs(row, "optimized_macs"), f"{row['ms']:.2f}" if "ms" in row else "-"]
        rows.append([f"`{row['model']}`{arguments}", start, *costs, f"{row['start_top1']:.2f}", f"{row['top1']:.2f}"])
    header = ["model", "start", "MACs (M)", "optimized (M)", "ms", "at once (%)", "after an epoch (%)"]
    return markdown(header, rows, left=2)


def compress_table() -> str:
    """Returns what is left of networks of timm, pruned by magnitude and with images."""
    rows = []
    for row in load_json(ROOT / "benchmarks" / "compress.json")["rows"]:
        macs = f"{_macs(row, 'macs')} -> {_macs(row, 'condensed_macs')}"
        shares = [row.get(key) for key in ("dense", "magnitude", "images", "magnitude_epoch", "images_epoch")]
        texts = ["-" if share is None else f"{share:.1f}" for share in shares]
        rows.append([row["network"], str(row["size"]), str(row["layers"]), macs, *texts])
    header = ["network", "pixels", "layers", "MACs (M)", "dense", "magnitude", "images"]
    return markdown([*header, "magnitude, an epoch", "images, an epoch"], rows)
