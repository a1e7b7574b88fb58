"""What the tables are made of: logs, results and how a Markdown table is written."""

import csv
import json
from pathlib import Path
from typing import Any

from training.initial_weights import EARLIER

__all__ = ["EARLIER", "RESULTS", "ROOT", "load_latency", "load_result", "markdown", "read_log"]

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    align = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, align, *rows])


def load_result(path: str | Path) -> dict[str, Any]:
    """Returns a JSON file; the path is relative to the project's root."""
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def load_latency() -> dict[str, Any]:
    return load_result(RESULTS / "latency.json")


def read_log(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
