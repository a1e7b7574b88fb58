"""One network that learns: weights, their average, optimiser, pruning stages and log."""

import csv
import functools
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Optional

import numpy as np
import timm
import timm.optim.muon
import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn import functional as F

import mobilenets_zoo as mz
from mobilenets_zoo.evaluation import preprocess
from training.compiled_layers import compile_layers
from training.cpu_layers import spare_cpu
from training.initial_weights import start_from
from training.recipe import Recipe

__all__ = ["LOG_FIELDS", "Student", "health"]

LOG_FIELDS = (
    *("epoch", "size", "lr", "train_loss", "train_top1", "holdout_loss", "holdout_top1"),
    *("largest_norm", "largest_variance", "dead_channels"),
    *("images_per_second", "seconds"),
)
_ORTHOGONALIZE = timm.optim.muon.zeropower_via_newtonschulz


class Student:
    """What one recipe's network needs to take steps, stop and go on.

    Attributes:
        model: the network that takes steps; some of its layers compute in a way that suits the device.
        average: its `module` is what the training leaves: a plain network with the average of the weights, or with the
            last ones where the recipe has no average.
    """

    def __init__(
        self,
        recipe: Recipe,
        num_classes: int,
        total_steps: int,
        device: torch.device,
        out: Path,
        images: Optional[torch.Tensor] = None,
        resumed: bool = False,
    ):
        """`images` are the training images, uint8 (N, H, W, 3), of which some calibrate, where the recipe says so.

        `resumed` leaves out the start from other weights, which `load_state_dict` would replace.
        """
        self.recipe, self.out, self.total_steps = recipe, out, total_steps
        torch.manual_seed(recipe.seed)
        try:
            model = timm.create_model(recipe.model, **{**recipe.model_args, "num_classes": num_classes})
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"{recipe.name} can't be created: {error}") from error
        if recipe.init_from and not resumed:
            calibration = self._calibration(model, images)
            start_from(model, recipe.init_from, recipe.init_sha256, calibration, recipe.sharing)
        self.model: nn.Module = model.to(device).to(memory_format=torch.channels_last)
        # In step n, from 0 on, the decay is n / (n + 10), and ema_decay at most.
        self.average = ModelEmaV3(self.model, recipe.ema_decay, use_warmup=True, warmup_gamma=10.0, warmup_power=1.0)
        arguments: dict[str, Any] = dict(lr=recipe.lr, weight_decay=recipe.weight_decay, momentum=recipe.momentum)
        # Only these take part in a CUDA graph: their learning rate is a tensor that a step reads.
        self.capturable = device.type == "cuda" and recipe.optimizer in ("nmuon", "adamw")
        if device.type == "cuda":
            compile_layers(self.model)
        elif device.type == "cpu":
            spare_cpu(self.model)
        if self.capturable:
            arguments.update(lr=torch.tensor(recipe.lr, device=device), capturable=True)
        self.optimizer = create_optimizer_v2(self.model, recipe.optimizer, **arguments)
        # timm's Muon orthogonalises in bfloat16, which is half of a step on a CPU that has no instructions for it.
        dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
        timm.optim.muon.zeropower_via_newtonschulz = functools.partial(_ORTHOGONALIZE, dtype=dtype)
        self.learned = mz.learned_layers(self.model)
        self.schedule = mz.CondenseSchedule(self.model) if self.learned else None
        # Loss and accuracy, summed on the device and read now and then.
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)
        self.log: list[dict[str, float]] = []
        self.masks: list[dict[str, Any]] = []
        if self.learned and recipe.calibration_images and not resumed:
            self._record_masks(progress=0.0)

    def _calibration(self, model: nn.Module, images: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
        """Draws the recipe's calibration images, (N, 3, H, W), normalised; None for none."""
        count = self.recipe.calibration_images
        if not count:
            return None
        if images is None or count > len(images):
            raise ValueError(f"calibration_images = {count}, but there are {0 if images is None else len(images)}")
        chosen = np.random.default_rng(self.recipe.seed).choice(len(images), count, replace=False)
        cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
        return preprocess(images[torch.from_numpy(chosen).to(images.device)], cfg["mean"], cfg["std"])

    def prepare(self, step: int, steps_per_epoch: int) -> None:
        """Does what comes before a step: prunes what is due and sets the learning rate."""
        recipe = self.recipe
        self._prune(step / self.total_steps)
        warmup = recipe.warmup_epochs * steps_per_epoch
        if step < warmup:
            lr = recipe.lr * min(1.0, (step + 1) / warmup)
        else:
            lr = recipe.lr * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / (self.total_steps - warmup)))
        for group in self.optimizer.param_groups:
            if torch.is_tensor(group["lr"]):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def update(self, images: torch.Tensor, hard: torch.Tensor, soft: torch.Tensor | None = None) -> None:
        """Takes one optimiser step; a CUDA graph may hold all of it.

        Args:
            images: (B, 3, size, size).
            hard: the labels' distributions, (B, classes).
            soft: the teacher's distributions, softened, or None.
        """
        recipe = self.recipe
        enabled = recipe.precision == "bf16"
        with torch.autocast(images.device.type, torch.bfloat16, enabled=enabled, cache_enabled=False):
            logits = self.model(images)
        logits = logits.float()
        loss = recipe.ce_weight * F.cross_entropy(logits, hard)
        if soft is not None:
            log_probs = F.log_softmax(logits / recipe.temperature, dim=1)
            divergence = F.kl_div(log_probs, soft, reduction="batchmean")
            loss = loss + recipe.kd_weight * recipe.temperature**2 * divergence
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            correct = (logits.argmax(1) == hard.argmax(1)).double().mean()
            self.sums += torch.stack([loss.detach().double(), correct])

    def _prune(self, progress: float) -> None:
        """Takes the pruning stages that are due and clears what momentum and average hold at dropped places."""
        if self.schedule is None or not self.schedule.due(progress):
            return
        before = {name: layer.hoyer_index().tolist() for name, layer in self.learned.items()}
        if not self.schedule.step(progress):
            return
        self._record_masks(progress=progress, hoyer_before=before)
        for name, layer in self.learned.items():
            keep = layer.mask.repeat_interleave(layer.out_channels // layer.groups, 0)[:, :, None, None]
            states = [value for value in self.optimizer.state[layer.weight].values() if torch.is_tensor(value)]
            average = self.average.module.get_parameter(f"{name}.weight").data
            for tensor in (layer.weight.data, average, *(value for value in states if value.shape == keep.shape)):
                tensor.mul_(keep)

    def _record_masks(self, **entry: Any) -> None:
        layers = self.learned.items()
        entry["inputs"] = {name: layer.in_channels for name, layer in layers}
        entry["inputs_per_group"] = {name: int(layer.mask.sum(1)[0]) for name, layer in layers}
        # A row of hexadecimal digits per group, a bit per input.
        masks = {n: [r.tobytes().hex() for r in np.packbits(layer.mask.cpu().numpy(), 1)] for n, layer in layers}
        self.masks.append({**entry, "masks": masks})

    def write_logs(self) -> None:
        with mz.utils.atomic_write(self.out / "log.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, LOG_FIELDS)
            writer.writeheader()
            for entry in self.log:
                writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in entry.items()})
        if self.masks:
            with mz.utils.atomic_write(self.out / "masks.json", "w") as file:
                file.write(json.dumps(self.masks) + "\n")

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "average": self.average.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict() if self.schedule is not None else None,
            "sums": self.sums,
            "log": self.log,
            "masks": self.masks,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.average.module.load_state_dict(state["average"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        for saved, own in zip(state["optimizer"]["param_groups"], self.optimizer.param_groups, strict=True):
            saved.update({key: own[key] for key in ("lr", "capturable") if key in own})  # they are the device's
        self.optimizer.load_state_dict(state["optimizer"])
        self.sums.copy_(state["sums"])
        self.log, self.masks = state["log"], state["masks"]


@torch.inference_mode()
def health(model: nn.Module, batches: Iterable[torch.Tensor]) -> dict[str, float]:
    """Returns what grows or dies unseen in a long training.

    Args:
        batches: normalised images, (N, C, H, W).

    Returns:
        `largest_norm` of the weights of one output channel of a convolution; `largest_variance` that a BatchNorm
        holds; `dead_channels`, the percentage of the channels behind a ReLU that are zero everywhere in all images.
    """
    alive: dict[nn.Module, torch.Tensor] = {}

    def watch(module: nn.Module, _: Any, output: torch.Tensor) -> None:
        positive = output.amax((0, 2, 3)) > 0
        alive[module] = alive.get(module, False) | positive

    rectifiers = [module for module in model.modules() if isinstance(module, (nn.ReLU, nn.ReLU6))]
    hooks = [module.register_forward_hook(watch) for module in rectifiers]
    for batch in batches:
        model(batch)
    for hook in hooks:
        hook.remove()
    learned = {id(layer.weight): layer for layer in mz.learned_layers(model).values()}  # without what masks drop
    weights = [learned[id(p)].masked_weight() if id(p) in learned else p for p in model.parameters() if p.ndim == 4]
    variances = [buffer for name, buffer in model.named_buffers() if name.endswith("running_var")]
    values = {
        "largest_norm": max(weight.flatten(1).norm(dim=1).max().item() for weight in weights),
        "largest_variance": max((variance.max().item() for variance in variances), default=0.0),
    }
    if alive:
        values["dead_channels"] = 100 - 100 * torch.cat(list(alive.values())).double().mean().item()
    return values
