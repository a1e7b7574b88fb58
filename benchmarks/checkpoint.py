"""Training checkpoints that are whole or absent, in parts of at most 15 MiB.

`checkpoint.json` names the parts and their sha256. Parts of a new checkpoint get new names; the index is replaced
last, in one rename, so a process that dies at any moment leaves the old checkpoint or the new one.
"""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import torch

from mobilenets_zoo.files import atomic_write

__all__ = ["INDEX", "load_checkpoint", "save_checkpoint"]

INDEX = "checkpoint.json"
PART_BYTES = 15 * 2**20


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Writes `state` (tensors and plain values) as the folder's checkpoint.

    Raises:
        OSError: the folder can't be written; the old checkpoint stays.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    parts: list[dict[str, Any]] = []
    try:
        for start in range(0, len(data), PART_BYTES):
            content = data[start : start + PART_BYTES]
            name = f"checkpoint-{step:08d}-{len(parts):02d}.part"
            with atomic_write(folder / name) as file:
                file.write(content)
            parts.append({"file": name, "sha256": hashlib.sha256(content).hexdigest()})
        with atomic_write(folder / INDEX, "w") as file:
            file.write(json.dumps({"step": step, "parts": parts}, indent=2) + "\n")
    finally:
        _remove_unused_parts(folder)


def load_checkpoint(folder: Path, device: torch.device) -> dict[str, Any]:
    """Reads the folder's checkpoint.

    Raises:
        ValueError: a part is missing or altered; the message names it.
    """
    index = json.loads((folder / INDEX).read_text())
    data = io.BytesIO()
    for part in index["parts"]:
        path = folder / part["file"]
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != part["sha256"]:
            raise ValueError(f"{path} is missing or altered: the checkpoint can't be resumed; start in another --out")
        data.write(path.read_bytes())
    data.seek(0)
    return torch.load(data, map_location=device, weights_only=True)


def _remove_unused_parts(folder: Path) -> None:
    index = folder / INDEX
    used = {part["file"] for part in json.loads(index.read_text())["parts"]} if index.exists() else set()
    for path in folder.glob("checkpoint-*.part"):
        if path.name not in used:
            path.unlink(missing_ok=True)
