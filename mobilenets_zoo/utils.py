"""What commands share: writing files so that a reader never sees half of one, a progress bar, freed memory."""

import contextlib
import ctypes
import errno
import json
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["atomic_write", "keep_freed_memory", "progress_bar", "write_json"]


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "wb", **kwargs: Any) -> Iterator[IO[Any]]:
    """Opens a temporary file beside `path` and renames it to `path` once the block ends without an error.

    Args:
        path: the file to write or replace.
        mode: "w" or "wb".
        **kwargs: passed to `open`.

    Raises:
        OSError: no such folder, or it can't be written; nothing is left behind.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "No such folder", str(path.parent))
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


def progress_bar() -> Progress:
    """Returns a progress bar on standard error."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


def keep_freed_memory() -> bool:
    """Lets this process keep the memory of freed maps for the next ones; returns whether malloc accepts it.

    glibc gives large ones back to the system, and each layer on a CPU waits while it hands out zeroed pages one by one.
    The process then stays at about the most memory that it has needed. Other C libraries have no such switch.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    m_mmap_max, m_trim_threshold = -4, -1  # of malloc.h; mallopt(3)
    return mallopt is not None and bool(mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, -1))
