"""Writes every generated table and picture; with --check fails, and writes nothing, where one is stale.

    python benchmarks/tables.py [--check]

Sources are the registered models, mobilenets_zoo/weights/manifest.json, and what benchmarks/ holds: runs/, timings/,
groups.json and the CSV files. What each table and picture shows is in benchmarks/report/. A table in a Markdown file
stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`. --check also fails where the timings are of other weights
than those that models load by default today.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from report import ROOT
from report.figures import all_figures
from report.finetuning_tables import finetuning_table, trials_table
from report.group_tables import compress_table, groups_table
from report.latency_tables import int8_table, not_shipped, summary_table, timings_table
from report.model_tables import default_weights, family_table, five_epochs_table, models_table, profiles, weights_table
from report.training_tables import experiments_table, teacher_table

import mobilenets_zoo as mz


def with_table(text: str, name: str, table: str) -> str:
    """Returns a Markdown text with a table between its markers."""
    pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
    text, count = pattern.subn(lambda match: f"{match[1]}{table}\n{match[2]}", text)
    if count != 1:
        raise ValueError(f"a page needs exactly one pair of {name} markers, not {count}")
    return text


def generated() -> dict[Path, str]:
    """Returns the content that each generated file should have."""
    costs = profiles()
    docs = ROOT / "docs"
    tables = {
        ROOT / "README.md": {"models": models_table(costs)},
        docs / "models.md": {"weights": weights_table()},
        docs / "lgc.md": {
            "groups": groups_table(),
            "five": five_epochs_table(),
            "compress": compress_table(),
            "family": family_table(costs),
        },
        docs / "training.md": {"teacher": teacher_table(), "experiments": experiments_table()},
        docs / "condensing.md": {"latency-summary": summary_table()},
        docs / "finetuning.md": {
            "worth": finetuning_table("cifar10", "photos", timed=100),
            "worth-more": finetuning_table("cifar100-coarse", "digits"),
            "trials": trials_table(),
        },
        docs / "timings.md": {"timings": timings_table(), "latency-int8": int8_table()},
    }
    texts = {ROOT / "mobilenets_zoo" / "profiles.json": json.dumps(costs, indent=2) + "\n"}
    for path, named in tables.items():
        texts[path] = path.read_text(encoding="utf-8")
        for name, table in named.items():
            texts[path] = with_table(texts[path], name, table)
    return texts


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail where a table is stale, write nothing")
    args = parser.parse_args(argv)
    fault = not_shipped({entry.name for entry in default_weights().values()})
    if args.check and fault:
        print(fault, file=sys.stderr)
        return 1
    texts = {path: text for path, text in generated().items() if not path.exists() or path.read_text("utf-8") != text}
    figures = [figure for figure in all_figures() if not figure.is_current()]
    names = ", ".join(str(path.relative_to(ROOT)) for path in [*texts, *(figure.path for figure in figures)])
    if args.check and names:
        print(f"stale: {names}; run python benchmarks/tables.py", file=sys.stderr)
        return 1
    for path, text in (texts | {figure.path: figure.svg() for figure in figures}).items():
        path.parent.mkdir(exist_ok=True)
        with mz.utils.atomic_write(path, "w", encoding="utf-8") as file:
            file.write(text)
    print(f"wrote {names}" if names else "up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
