"""What a measurement or a training run ran on."""

import platform
from pathlib import Path

import safetensors
import timm
import torch
import torchvision

import mobilenets_zoo as mz

__all__ = ["environment"]


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
