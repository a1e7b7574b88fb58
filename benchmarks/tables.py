"""Writes every generated table; with --check fails, and writes nothing, where one is stale.

    python benchmarks/tables.py [--check]

Sources are the registered models, mobilenets_zoo/weights/manifest.json and benchmarks/results/. A table in a Markdown
file stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`.
"""

import argparse
import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import timm

import mobilenets_zoo as mz

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

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


def profiles() -> dict[str, mz.Profile]:
    """Returns the deployed cost of every model, measured on the models themselves."""
    result = {}
    for name in sorted(timm.list_models("*_cifar100")):
        model = timm.create_model(name)
        if any(isinstance(module, mz.LearnedGroupConv2d) for module in model.modules()):
            model = timm.create_model(name, condensed=True)
        result[name] = mz.profile(model)
    return result


def markdown(header: list[str], rows: list[list[str]]) -> str:
    align = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, align, *rows])


def models_table(costs: dict[str, mz.Profile]) -> str:
    weights = {entry.model: entry for entry in mz.manifest().values()}
    rows = []
    for name, cost in sorted(costs.items(), key=lambda item: (item[0].split("_")[0], -item[1].macs, item[0])):
        entry = weights.get(name)
        top1, tag = (f"{entry.top1:.2f}", f"`{entry.tag}`") if entry else ("-", "not trained yet")
        row = [f"`{name}`", f"{cost.params / 1e6:.3f}", f"{cost.macs / 1e6:.1f}", top1, f"{ORIGINAL_TOP1[name]:.2f}"]
        rows.append([*row, tag])
    return markdown(["model", "params (M)", "MACs (M)", "top-1 (%)", "original (%)", "weights"], rows)


def weights_table() -> str:
    rows = []
    for entry in mz.manifest().values():
        result = json.loads((ROOT / entry.result).read_text())
        scores, training = result["evaluation"], result["training"]
        rows.append(
            [
                f"`{entry.name}`",
                f"{scores['top1']:.2f}",
                f"{scores['top5']:.2f}",
                f"{scores['loss']:.3f}",
                f"{scores['ece']:.1f}",
                str(result["recipe"]["epochs"]),
                f"{result['training_seconds'] / 60:.0f}",
                training["device"],
            ]
        )
    header = ["weight", "top-1 (%)", "top-5 (%)", "loss", "ECE (%)", "epochs", "minutes", "trained on"]
    return markdown(header, rows)


def condensed_layer_table() -> str:
    document = json.loads((RESULTS / "condensed_layer.json").read_text())
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


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def with_table(path: Path, name: str, table: str, texts: dict[Path, str]) -> None:
    """Puts a table between its markers in the text of a file."""
    text = texts.get(path) or path.read_text(encoding="utf-8")
    pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"{path}: needs exactly one pair of {name} markers")
    texts[path] = pattern.sub(lambda match: f"{match[1]}{table}\n{match[2]}", text)


def generated() -> dict[Path, str]:
    """Returns the content that each generated file should have."""
    costs = profiles()
    rows = {name: dataclasses.asdict(cost) for name, cost in costs.items()}
    texts = {ROOT / "mobilenets_zoo" / "profiles.json": json.dumps(rows, indent=2) + "\n"}
    with_table(ROOT / "README.md", "models", models_table(costs), texts)
    with_table(ROOT / "docs" / "models.md", "models", models_table(costs), texts)
    with_table(ROOT / "docs" / "models.md", "weights", weights_table(), texts)
    with_table(ROOT / "docs" / "design.md", "condensed-layer", condensed_layer_table(), texts)
    return texts


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail where a table is stale, write nothing")
    args = parser.parse_args(argv)
    stale = []
    for path, text in generated().items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(str(path.relative_to(ROOT)))
            if not args.check:
                with mz.files.atomic_write(path, "w", encoding="utf-8") as file:
                    file.write(text)
    if args.check and stale:
        print(f"stale: {', '.join(stale)}; run python benchmarks/tables.py", file=sys.stderr)
        return 1
    print("up to date" if not stale else f"wrote {', '.join(stale)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
