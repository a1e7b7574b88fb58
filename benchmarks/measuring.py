"""What every measurement shares: where it ran, and how the forms of the same work take turns."""

import platform
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import safetensors
import timm
import torch
import torchvision

import mobilenets_zoo as mz

__all__ = ["environment", "interleaved"]


def environment(device: str = "cpu") -> dict[str, str | int]:
    """Returns processor or GPU, threads and the versions that matter."""
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "safetensors": safetensors.__version__,
        "mobilenets_zoo": mz.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def interleaved(forms: Sequence[Callable[[], object]], seconds: float, min_rounds: int = 5) -> list[list[float]]:
    """Returns the run times of each form in seconds, taken in turns and in changing order.

    Drift of the machine's speed hits all forms alike, and each finds the caches as another leaves them.

    Args:
        forms: what to time.
        seconds: time to spend per form, after two runs that don't count.
        min_rounds: runs of each form that are made even where they take longer.
    """
    start = time.perf_counter()
    for _ in range(2):
        start = time.perf_counter()
        for form in forms:
            form()
    rounds = max(min_rounds, int(seconds * len(forms) / (time.perf_counter() - start)))
    times: list[list[float]] = [[] for _ in forms]
    order = list(range(len(forms)))
    for _ in range(rounds):
        random.shuffle(order)
        for i in order:
            start = time.perf_counter()
            forms[i]()
            times[i].append(time.perf_counter() - start)
    return times
