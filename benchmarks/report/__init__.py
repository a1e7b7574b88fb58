"""The tables and pictures of README and docs, and what they are made of. Run by benchmarks/tables.py."""

import csv
import json
from pathlib import Path
from typing import Any

__all__ = ["ROOT", "RUNS", "TIMINGS", "load_json", "markdown", "read_csv"]

ROOT = Path(__file__).resolve().parents[2]
RUNS, TIMINGS = ROOT / "benchmarks" / "runs", ROOT / "benchmarks" / "timings"


def markdown(header: list[str], rows: list[list[str]], left: int = 1) -> str:
    """Returns a table whose first `left` columns are aligned to the left."""
    align = ["---" if i < left else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, align, *rows])


def load_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
