"""Writing files so that a reader never sees half of one."""

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

__all__ = ["atomic_write", "write_json"]


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "wb", **kwargs: Any) -> Iterator[IO[Any]]:
    """Opens a temporary file beside `path` and renames it to `path` once the block ends without an error.

    Args:
        path: the file to write or replace.
        mode: "w" or "wb".
        **kwargs: passed to `open`.

    Raises:
        OSError: the folder can't be written; nothing is left behind.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:50]}.{secrets.token_hex(8)}.tmp")
    # Made by open, not by tempfile: readable by whom the process's umask says.
    opened = open(temporary, mode.replace("w", "x"), **kwargs)  # noqa: SIM115 - closed below
    try:
        with opened as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # an interrupt may come right after the renaming
        raise


def write_json(path: str | Path, document: Any) -> None:
    """Writes a JSON document as `atomic_write` does."""
    with atomic_write(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(document, indent=2) + "\n")
