"""Tables on how long networks and layers take."""

import statistics
from typing import Any

from latency import BATCHES, THREADS

from report.files import RESULTS, load_latency, load_result, markdown

__all__ = [
    "eager_table",
    "files_table",
    "latency_table",
    "layer_table",
    "limit_table",
    "openvino_table",
    "summary_table",
]

# The dense network that ratios refer to.
REFERENCE = ("mobilenetv2_cifar100", "plain")


def latency_source(document: dict[str, Any]) -> str:
    env = document["environment"]
    versions = ", ".join(f"{key} {env[key]}" for key in ("onnxruntime", "openvino", "torch") if key in env)
    return f"Measured on {env['device']}, {versions}; medians of interleaved runs."


def pass_times(document: dict[str, Any], batches: tuple[int, ...], **wanted: Any) -> list[float]:
    """Returns a form's milliseconds per image at the best of `batches`, per pass; none if it wasn't timed."""
    rows = [row for row in document["rows"] if row["batch"] in batches and wanted.items() <= row.items()]
    return [min(times) for times in zip(*(row["passes"] for row in rows), strict=True)]


def ratios(document: dict[str, Any], model: str, form: str, batches: tuple[int, ...], **cell: Any) -> list[float]:
    """Returns the reference's time over the form's, per pass, so that what changes between passes cancels."""
    times = pass_times(document, batches, model=model, form=form, **cell)
    reference = pass_times(document, batches, model=REFERENCE[0], form=REFERENCE[1], **cell) if times else []
    return [base / time for base, time in zip(reference, times, strict=True)]


def ratio_rows(document: dict[str, Any], cells: list[dict[str, Any]], **common: Any) -> list[list[str]]:
    """Returns a row per model and form: the median over passes of the reference's time over its own, per cell."""
    rows = []
    for model, form in dict.fromkeys((row["model"], row["form"]) for row in document["rows"]):
        found = [ratios(document, model, form, **common, **cell) for cell in cells]
        if any(found):
            texts = [f"{statistics.median(values):.2f}" if values else "-" for values in found]
            rows.append([f"`{model}`" if "cifar100" in model else model, form, *texts])
    return rows


ORT_CELLS: dict[str, dict[str, Any]] = {
    "1 thread, batch 1": dict(threads=1, batches=(1,)),
    "2 threads, batch 1": dict(threads=2, batches=(1,)),
    "1 thread, batch 64": dict(threads=1, batches=(64,)),
    "2 threads, batch 64": dict(threads=2, batches=(64,)),
    "best batch": dict(threads=1, batches=BATCHES["onnxruntime"]),
}


def latency_table(precision: str) -> str:
    document = load_latency()
    rows = ratio_rows(document, list(ORT_CELLS.values()), runtime="onnxruntime", precision=precision)
    cell = dict(model=REFERENCE[0], form=REFERENCE[1], runtime="onnxruntime", precision=precision)
    times = []
    for threads in THREADS:
        passes = pass_times(document, (1,), threads=threads, **cell)
        times.append(f"{_median_and_range(passes)} ms on {_count(threads, 'thread')}")
    note = f"1.00 is, per image at batch 1, {', '.join(times)}: median of {len(passes)} passes (lowest to highest)."
    tags = sorted({f"`{file['weights']}`" for file in document["files"] if "cifar100" in file["model"]})
    note += f" {latency_source(document)} The networks had weights of {', '.join(tags)}. Which hidden channels an"
    note += (
        " optimized one leaves out follows from its weights, and its form from the rules of that time: newer ones may"
    )
    note += " differ a little."
    return f"{markdown(['model', 'form', *ORT_CELLS], rows)}\n\n{note}"


# The forms that learned groups are sold on, and the network without any gather or shuffle that limits them.
LIMITED = (
    "mobilenetv2_lgc_cifar100",
    "mobilenetv2_gc_lgc_cifar100",
    "mobilenetv2_lgc_gc_cifar100",
    "mobilenetv2_lgc_proj_cifar100",
    "gc without shuffles",
)


def limit_table() -> str:
    document = load_latency()
    common: dict[str, Any] = dict(form="optimized", runtime="onnxruntime", precision="fp32")
    rows = []
    for model in LIMITED:
        cells = [_median_and_range(ratios(document, model, **common, **cell)) for cell in ORT_CELLS.values()]
        rows.append([f"`{model}`" if "cifar100" in model else model, *cells])
    return markdown(["optimized", *ORT_CELLS], rows)


# What condensing buys, in nine rows.
SUMMARY = (
    *(("mobilenetv2_lgc_cifar100", form) for form in ("textbook", "condensed", "optimized")),
    *((f"mobilenetv2_{name}_cifar100", "optimized") for name in ("gc_lgc", "lgc_gc", "lgc_proj", "lgc_exp", "gc")),
    ("gc without shuffles", "optimized"),
)


def summary_table() -> str:
    cells = {header: cell for header, cell in ORT_CELLS.items() if header != "best batch"}
    rows = ratio_rows(load_latency(), list(cells.values()), runtime="onnxruntime", precision="fp32")
    shown = {(row[0].strip("`"), row[1]): row for row in rows}
    return markdown(["model", "form", *cells], [shown[key] for key in SUMMARY])


def eager_table() -> str:
    document = load_latency()
    cells: list[dict[str, Any]] = [
        dict(threads=threads, batches=(batch,), layout=layout)
        for threads, batch in ((1, 1), (2, 1), (1, 8))
        for layout in ("NCHW", "channels_last")
    ]
    columns = [f"{c['layout']}, {_count(c['threads'], 'thread')}, batch {c['batches'][0]}" for c in cells]
    header = ["model", "form", *columns]
    rows = ratio_rows(document, cells, runtime="eager")
    return f"{markdown(header, rows)}\n\n{latency_source(document)}"


def openvino_table() -> str:
    document = load_latency()
    cells = {header: cell for header, cell in ORT_CELLS.items() if header != "best batch"}
    rows = ratio_rows(document, list(cells.values()), runtime="openvino")
    return f"{markdown(['model', 'form', *cells], rows)}\n\n{latency_source(document)}"


def files_table() -> str:
    rows = []
    for file in load_latency()["files"]:
        if file["form"] in ("plain", "optimized"):
            macs = f"{file['macs'] / 1e6:.1f}" if file["macs"] else "-"
            size = [f"{file['bytes'] / 1e6:.2f}", f"{file['peak_mib']:.0f}"]
            name = f"`{file['model']}`" if "cifar100" in file["model"] else file["model"]
            rows.append([name, file["form"], file["precision"], macs, *size])
    return markdown(["model", "form", "precision", "MACs (M)", "file (MB)", "peak memory (MiB)"], rows)


def layer_table() -> str:
    document = load_result(RESULTS / "layer_latency.json")
    cells: dict[str, dict[tuple[int, int, str], dict[str, Any]]] = {}
    for row in document["rows"]:
        cells.setdefault(row["what"], {})[row["threads"], row["batch"], row["layout"]] = row
    columns = list(next(iter(cells.values())))
    header = ["layer", *(f"{layout}, {_count(t, 'thread')}, batch {b}" for t, b, layout in columns)]
    rows = []
    for what, by_column in cells.items():
        texts = []
        for column in columns:
            row = by_column[column]
            text = f"{row['dense'] / row['condensed']:.2f}"
            if "textbook" in row:
                text += f" ({row['dense'] / row['textbook']:.2f})"
            texts.append(text)
        rows.append([what, *texts])
    env = document["environment"]
    source = f"Measured on {env['device']} with torch {env['torch']}, fp32, medians of interleaved runs."
    return f"{markdown(header, rows)}\n\n{source}"


def _median_and_range(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
