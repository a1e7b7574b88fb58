"""Writes every generated table and picture; with --check fails, and writes nothing, where one is stale.

    python benchmarks/tables.py [--check]

Sources are the registered models, mobilenets_zoo/weights/manifest.json and benchmarks/results/; what each table and
picture shows is in benchmarks/report/. A table in a Markdown file stands between `<!-- NAME:begin -->` and
`<!-- NAME:end -->`.
"""

import argparse
import dataclasses
import json
import re
import sys
from pathlib import Path

from report.figures import all_figures
from report.files import ROOT, load_latency
from report.latency_tables import (
    eager_table,
    files_table,
    latency_table,
    layer_table,
    limit_table,
    openvino_table,
    summary_table,
)
from report.model_tables import (
    DEPLOYED,
    family_table,
    flagship,
    milliseconds,
    models_table,
    profiles,
    state,
    weights_table,
)
from report.training_tables import finetune_table, once_more_table, teacher_table, train_speed_table, tuning_table

import mobilenets_zoo as mz


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
    latency = load_latency()
    rows = {
        name: {**dataclasses.asdict(cost), "ms": milliseconds(latency, model=name, **DEPLOYED)}
        for name, cost in costs.items()
    }
    texts = {ROOT / "mobilenets_zoo" / "profiles.json": json.dumps(rows, indent=2) + "\n"}
    readme, docs = ROOT / "README.md", ROOT / "docs"
    tables = [
        (readme, "models", models_table(costs)),
        (readme, "flagship", flagship()),
        (readme, "state", state()),
        (docs / "models.md", "models", models_table(costs)),
        (docs / "models.md", "weights", weights_table()),
        (docs / "lgc.md", "family", family_table(costs)),
        (docs / "training.md", "teacher", teacher_table()),
        (docs / "training.md", "tuning", tuning_table()),
        (docs / "training.md", "once-more", once_more_table()),
        (docs / "training.md", "train-speed", train_speed_table()),
        (docs / "design.md", "layer-latency", layer_table()),
        (docs / "condensing.md", "latency-summary", summary_table()),
        (docs / "condensing.md", "latency-fp32", latency_table("fp32")),
        (docs / "condensing.md", "latency-int8", latency_table("int8")),
        (docs / "condensing.md", "latency-limit", limit_table()),
        (docs / "condensing.md", "latency-eager", eager_table()),
        (docs / "condensing.md", "latency-openvino", openvino_table()),
        (docs / "condensing.md", "files", files_table()),
        (docs / "finetuning.md", "finetune", finetune_table()),
    ]
    for path, name, table in tables:
        with_table(path, name, table, texts)
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
    for figure in all_figures():
        if not figure.is_current():
            stale.append(str(figure.path.relative_to(ROOT)))
            if not args.check:
                figure.path.parent.mkdir(exist_ok=True)
                with mz.files.atomic_write(figure.path, "w", encoding="utf-8") as file:
                    file.write(figure.svg())
    if args.check and stale:
        print(f"stale: {', '.join(stale)}; run python benchmarks/tables.py", file=sys.stderr)
        return 1
    print("up to date" if not stale else f"wrote {', '.join(stale)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
