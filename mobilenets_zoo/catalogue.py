"""What the registered models cost, how fast they are and which weights they have, without building them."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import timm

from mobilenets_zoo.pretrained import WeightsError, default_entry

__all__ = ["FAST_MS", "MODEL_PATTERN", "best_model", "model_names", "summary"]

MODEL_PATTERN = "*_cifar100"

# The slowest network that is taken where none is named, milliseconds an image.
FAST_MS = 10

WEIGHT_FIELDS = ("tag", "top1", "top5", "taught_by", "file", "bytes", "sha256", "recipe", "hub_id", "revision")


def model_names() -> list[str]:
    names = timm.list_models(MODEL_PATTERN)
    return [name for name in names if timm.model_entrypoint(name).__module__.startswith("mobilenets_zoo.")]


def summary(name: str) -> dict[str, Any]:
    """Returns size, cost and weights of a model, deployed.

    `ms` is the time of one image in ONNX Runtime, fp32, one thread, of the network that `optimize_for_inference` makes
    of the default weights, on `processor`; `optimized_macs` are that network's multiply-adds. None where it wasn't
    measured.

    Args:
        name: "model", for its default weights, or "model.tag".
    """
    row = _rows()[name.partition(".")[0]]
    try:
        entry = default_entry(name)
    except WeightsError:
        entry = None
    # The time is that of one weight; another's masks leave another network.
    timed = entry is not None and row["weight"] == entry.name
    return {
        "name": name,
        "params": row["params"],
        "macs": row["macs"],
        **{key: row[key] if timed else None for key in ("ms", "processor", "optimized_macs")},
        "weights": entry and {field: getattr(entry, field) for field in WEIGHT_FIELDS},
    }


def best_model() -> str:
    """Returns the most accurate model that takes less than `FAST_MS`, or of all where no time is known."""
    rows = [row for row in map(summary, model_names()) if row["weights"]]
    fast = [row for row in rows if row["ms"] and row["ms"] < FAST_MS]
    return max(fast or rows, key=lambda row: row["weights"]["top1"])["name"]


@lru_cache(maxsize=1)
def _rows() -> dict[str, dict[str, Any]]:
    """Returns the rows of profiles.json, which benchmarks/tables.py writes and the tests recompute."""
    return json.loads((Path(__file__).parent / "profiles.json").read_text(encoding="utf-8"))
