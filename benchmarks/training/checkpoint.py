"""Training checkpoints that are whole or absent."""

from pathlib import Path
from typing import Any

import torch

from mobilenets_zoo.files import atomic_write

__all__ = ["CHECKPOINT", "load_checkpoint", "save_checkpoint"]

CHECKPOINT = "checkpoint.pt"


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Writes `state` (tensors and plain values) as the folder's checkpoint.

    Raises:
        OSError: the folder can't be written; the old checkpoint stays.
    """
    with atomic_write(folder / CHECKPOINT) as file:
        torch.save(state, file)


def load_checkpoint(folder: Path, device: torch.device) -> dict[str, Any]:
    """Reads the folder's checkpoint.

    Raises:
        ValueError: it can't be read.
    """
    path = folder / CHECKPOINT
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # zip, pickle and OS errors, by what is damaged
        raise ValueError(f"{path} can't be read ({error}): start in another --out") from error
