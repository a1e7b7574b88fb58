"""Tables on how long networks take."""

import functools
import statistics
from typing import Any, Optional

from report import TIMINGS, load_json, markdown

__all__ = ["DEPLOYED", "NARROW", "int8_table", "latency", "not_shipped", "summary_table", "timed", "timings_table"]

FP32: dict[str, Any] = dict(runtime="onnxruntime", precision="fp32")
FP32_CELLS = {
    "batch 1": FP32 | dict(threads=1, batch=1),
    "batch 64": FP32 | dict(threads=1, batch=64),
}
EAGER = dict(runtime="eager", threads=1, batch=1)
# How the tables of models time one.
DEPLOYED = FP32_CELLS["batch 1"] | dict(form="optimized")
NARROW = "mobilenetv2_cifar100, width_mult=0.55"  # the dense network with as many multiply-adds as grouped ones
# What condensing buys: the time of REFERENCE over that of each of these.
REFERENCE = dict(model="mobilenetv2_cifar100", form="plain")
SUMMARY = (
    *(("mobilenetv2_lgc_cifar100", form) for form in ("textbook", "condensed", "optimized")),
    *((f"mobilenetv2_{name}_cifar100", "optimized") for name in ("gc_lgc", "lgc_gc", "lgc_proj", "lgc_exp", "gc")),
    ("gc without shuffles", "optimized"),
    (NARROW, "optimized"),
)


@functools.cache
def latency() -> dict[str, Any]:
    return load_json(TIMINGS / "latency.json")


def timed(**wanted: Any) -> Optional[dict[str, Any]]:
    """Returns the row of latency.json that has all of these values; None where there is none."""
    return next((row for row in latency()["rows"] if wanted.items() <= row.items()), None)


def not_shipped(defaults: set[str]) -> str:
    """Returns what is wrong where latency.json timed other weights than today's default ones, else ""."""
    weights = {row["weight"] for row in latency()["rows"] if row["weight"]}
    faults = {"isn't what a model loads by default": weights - defaults, "wasn't timed": defaults - weights}
    texts = [f"{', '.join(sorted(names))} {fault}" for fault, names in faults.items() if names]
    again = "run python benchmarks/latency.py --out benchmarks/timings/latency.json"
    return f"benchmarks/timings/latency.json: {'; '.join(texts)}; {again}" if texts else ""


def summary_table() -> str:
    rows = []
    for model, form in SUMMARY:
        ratios = [_ratio(model, form, cell) for cell in FP32_CELLS.values()]
        macs = _macs(timed(model=model, form=form, **FP32))
        rows.append([_code(model), form, macs, *ratios])
    env, base = latency()["environment"], _ms(timed(**REFERENCE, **FP32_CELLS["batch 1"]))
    source = f"1.00 is {base} ms an image on one thread: {env['device']}, ONNX Runtime {env['onnxruntime']}."
    return f"{markdown(['model', 'form', 'MACs (M)', *FP32_CELLS], rows)}\n\n{source}"


def _ratio(model: str, form: str, cell: dict[str, Any]) -> str:
    """Returns the median over passes of the reference's time over a form's, so that drift cancels."""
    row, reference = timed(model=model, form=form, **cell), timed(**REFERENCE, **cell)
    if row is None or reference is None:
        return "-"
    return f"{statistics.median(a / b for a, b in zip(reference['passes'], row['passes'], strict=True)):.2f}"


def timings_table() -> str:
    cells = [*FP32_CELLS.values(), EAGER]
    rows = []
    for model, form in dict.fromkeys((row["model"], row["form"]) for row in latency()["rows"]):
        found = [timed(model=model, form=form, **cell) for cell in cells]
        rows.append([_code(model), form, _macs(next(filter(None, found))), *map(_ms, found)])
    env = latency()["environment"]
    header = ["model", "form", "MACs (M)", *FP32_CELLS, "eager"]
    source = f"On {env['device']}: ONNX Runtime {env['onnxruntime']}, eager PyTorch {env['torch']}."
    return f"{markdown(header, rows)}\n\n{source}"


def int8_table() -> str:
    cell = FP32_CELLS["batch 1"]
    rows = []
    for model in dict.fromkeys(row["model"] for row in latency()["rows"] if row["precision"] == "int8"):
        plain, dense = (
            timed(model=model, form=form, **cell | dict(precision="int8")) for form in ("plain", "optimized")
        )
        files = [f"{row['bytes'] / 1e6:.2f}" if row else "-" for row in (dense, timed(model=model, **DEPLOYED))]
        rows.append([_code(model), _macs(plain), _ms(plain), _macs(dense), _ms(dense), *files])
    header = ["model", "plain: MACs (M)", "ms", "dense: MACs (M)", "ms", "file (MB)", "fp32 file (MB)"]
    return markdown(header, rows)


def _code(model: str) -> str:
    return f"`{model}`" if "_cifar100" in model else model


def _ms(row: Optional[dict[str, Any]]) -> str:
    return f"{row['ms']:.2f}" if row else "-"


def _macs(row: Optional[dict[str, Any]]) -> str:
    return f"{row['macs'] / 1e6:.1f}" if row else "-"
