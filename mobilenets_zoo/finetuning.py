"""Fine-tuning a network on images of one's own: `mobilenets-zoo finetune`.

The classifier comes first, fitted to the features of the pretrained network; then all layers train, with smaller steps
the nearer they are to the input. What is kept is a moving average of the weights that remembers the start.
"""

import hashlib
import io
import json
import math
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Optional

import numpy as np
import timm
import torch
from rich.progress import Progress
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn
from torchvision.transforms import v2

import mobilenets_zoo as mz
from mobilenets_zoo.data import ImageSet, read_split
from mobilenets_zoo.evaluation import evaluate, preprocess, some
from mobilenets_zoo.models._base import MobileNetBase
from mobilenets_zoo.normalisation import normalise_
from mobilenets_zoo.pretrained import weights_as_stored, write_config
from mobilenets_zoo.profiling import eval_mode
from mobilenets_zoo.utils import atomic_write, write_json

__all__ = ["Run", "Settings", "create", "finetune"]

# After each epoch the accuracy is measured on so many of the test images; at the end on all of them.
CHECKED_IMAGES = 1000
# The default learning rate, which falls with the root of the images where there are fewer than FEW_IMAGES: worth two
# points with ten CIFAR-10 images a class.
LR, FEW_IMAGES = 3e-3, 1000
SHOWN_IMAGES = 10_000  # by default, over all epochs: minutes on a CPU
# How much of the start is in the average at the end. What lies between start and last weights is better than either
# (Wortsman et al., arXiv 2109.01903): by up to a point with 100 CIFAR-10 images a class.
START_SHARE = 0.1
OLDEST_TIMM = (1, 0, 31)  # which records a model's arguments in its config.json
PARTS = ("model", "average", "optimizer")  # of a run, in its checkpoint
WRITTEN = ("checkpoint.pt", "model.safetensors", "config.json", "result.json", "model.onnx")


@dataclass(frozen=True)
class Settings:
    """What decides the result besides network and images; ValueError where it can't."""

    epochs: Optional[int] = None  # by default 10 for 1,000 images, 5 for more, up to 40 for fewer
    batch_size: int = 32
    lr: Optional[float] = None  # AdamW's peak learning rate, that of the classifier; by default by the number of images
    layer_decay: float = 0.9  # factor on the learning rate from each layer to the one before it; none from scratch
    size: Optional[int] = None  # side of the square input in pixels; by default the network's own
    flip: bool = True  # show mirrored images, too
    freeze: bool = False  # fit the classifier alone
    scratch: bool = False  # start from random weights
    seed: int = 0  # of initial weights, order and views

    def __post_init__(self) -> None:
        if not 0 < (1.0 if self.lr is None else self.lr) < math.inf or not 0 < self.layer_decay <= 1:
            values = f"lr={self.lr} and layer_decay={self.layer_decay}"
            raise ValueError(f"lr must be finite and above 0, layer_decay above 0 and at most 1, not {values}")
        if min(1 if value is None else value for value in (self.epochs, self.batch_size, self.size)) < 1:
            values = f"epochs={self.epochs}, batch_size={self.batch_size} and size={self.size}"
            raise ValueError(f"epochs, batch_size and size must be 1 or larger, not {values}")


def finetune(
    name: str,
    source: str,
    out: Path,
    settings: Settings,
    progress: Progress,
    device: str = "cpu",
    force: bool = False,
    resume: bool = False,
) -> dict[str, Any]:
    """Fine-tunes a network and writes weights, configuration, ONNX file (where onnx is installed) and result.

    A checkpoint follows the classifier, and each epoch. After the first one, KeyboardInterrupt ends the training, and
    what was learned so far is written.

    `name` is what `timm.create_model` takes, `source` what `mz.data.read_split` takes. `out` must be new or empty,
    unless `force` (replace what an earlier run wrote) or `resume` (go on with an interrupted one).

    Returns:
        What result.json holds; `finished` is False after an interruption.

    Raises:
        ValueError: bad input, a timm that is too old, or a loss that diverges.
        RuntimeError: no such network or device, or weights that are missing or altered.
        OSError: a file can't be read or written.
    """
    if tuple(map(int, re.findall(r"\d+", timm.__version__)[:3])) < OLDEST_TIMM:
        oldest = ".".join(map(str, OLDEST_TIMM))
        raise ValueError(f"fine-tuning needs timm {oldest} or newer, this is {timm.__version__}; upgrade it with pip")
    if out.resolve().is_relative_to(Path(source).resolve()):
        raise ValueError(f"{out} lies in the folder of the images; choose another one for --out")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; choose another folder for --out")
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint.pt"
    for leftover in (file for name in WRITTEN for file in out.glob(f".{name}.*.tmp")):
        leftover.unlink()  # of a run that was killed while it wrote
    if not (force or resume) and any(out.iterdir()):
        raise ValueError(f"{out} exists; choose another folder, --resume an interrupted run there, or --force")
    tempfile.TemporaryFile(dir=out).close()  # raises where nothing can be written
    torch.ones(1, device=device).cpu()  # raises where there is no such device

    start = time.perf_counter()
    model = create(name, settings)
    weights_as_stored(model)  # raises where the result couldn't be stored
    read = partial(progress.track, description="read images")
    train_set, test_set = (read_split(source, split, model, read) for split in ("train", "test"))
    if one_sided := set(train_set.classes) ^ set(test_set.classes):
        raise ValueError(f"{source}: classes without either training or test images: {some(sorted(one_sided))}")
    if train_set.classes != test_set.classes:
        raise ValueError(f"{source}: training and test images have the same classes in different orders")
    if few := [name for label, name in enumerate(train_set.classes) if label not in train_set.labels]:
        raise ValueError(f"{source}: too few images to train and test with, of {some(few)}")
    if len(train_set.classes) < 2:
        raise ValueError(f"{source}: at least two classes are needed")
    run = Run(model.to(device), train_set, settings)
    key = {"network": name, "settings": asdict(settings), "images": [digest(part) for part in (train_set, test_set)]}
    if resume:
        run.resume(checkpoint, key)
    else:
        checkpoint.unlink(missing_ok=True)  # what else is there stays until there is something to replace it
    checked = test_set.subset(np.random.default_rng(0).permutation(len(test_set))[:CHECKED_IMAGES])
    finished, plain = False, dict[str, Any](highlight=False, markup=False, soft_wrap=True)
    try:
        for line in run.train(progress, checked):
            progress.console.print(line, **plain)
            run.save(checkpoint, key)
        finished = True
    except KeyboardInterrupt:
        if not checkpoint.exists():
            raise
    result: dict[str, Any] = {
        "model": name,
        "data": Path(source).name,
        "train_images": len(train_set),
        "classes": len(train_set.classes),
        **asdict(settings),
        "lr": run.lr if run.epochs else None,
        "epochs": run.epochs,
        "size": train_set.images.shape[1],
        "finished": finished,
        "history": run.history,
    }
    (out / "model.onnx").unlink(missing_ok=True)
    mz.save_weights(run.average.module, out / "model.safetensors")
    write_config(run.average.module, out / "config.json")
    if finished:  # what is measured is what was stored
        stored = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
        task = progress.add_task("measure", total=len(test_set))
        scores = evaluate(stored.to(device), test_set, on_progress=lambda done: progress.update(task, completed=done))
        result |= {"evaluation": scores.to_dict(), "seconds": round(time.perf_counter() - start, 1)}
    write_json(out / "result.json", result)
    if finished:
        task = progress.add_task("export", total=1)
        try:
            network = mz.optimize_for_inference(stored.cpu()) if isinstance(stored, MobileNetBase) else stored
            mz.export_onnx(network, out / "model.onnx", preprocessing=True)
        except (ImportError, ValueError, RuntimeError) as error:  # somebody else's network may not be exportable
            progress.console.print(f"model.onnx isn't written: {error}", **plain)
        progress.update(task, completed=1)
        checkpoint.unlink(missing_ok=True)
    return result


def create(name: str, settings: Settings) -> Any:
    """Returns the network to start from, still with its own classes.

    Raises:
        ValueError: it doesn't take colour images, or not of this size, its classifier isn't one linear layer or
            not all that makes its outputs, or somebody else's folder can't be loaded.
    """
    torch.manual_seed(settings.seed)
    try:
        model = timm.create_model(name, pretrained=not settings.scratch, drop_rate=0.1)
    except Exception as error:  # of many kinds, by what the folder holds
        if not name.startswith(("local-dir:", "hf-hub:")):
            raise
        raise ValueError(f"{name} can't be loaded: {type(error).__name__}: {error}") from error
    channels, height, width = model.pretrained_cfg["input_size"]
    if channels != 3:
        raise ValueError(f"{name} takes images of {channels} channel(s); give a network for colour images")
    classifier = model.get_classifier()
    if not isinstance(classifier, nn.Linear) or classifier.bias is None:
        raise ValueError(f"{name}: its classifier isn't one linear layer with a bias; give another network")
    size = (3, settings.size or height, settings.size or width)
    black = torch.zeros(1, *size)
    try:
        with eval_mode(model), torch.no_grad():
            logits = model(black)
    except Exception as error:  # an AssertionError of networks with a fixed size, others of too small ones
        raise ValueError(f"{name} can't take images of {size[1]}x{size[2]} pixels: {error}; change --size") from error
    with eval_mode(model), torch.no_grad():
        alone = classifier(model.forward_head(model.forward_features(black), pre_logits=True))
    same = isinstance(logits, torch.Tensor) and logits.shape == alone.shape
    if not same or not torch.allclose(logits, alone, rtol=1e-3, atol=1e-3, equal_nan=True):
        raise ValueError(f"{name}: more than its classifier makes its outputs; give another network")
    model.pretrained_cfg = dict(model.pretrained_cfg, input_size=size, tag="finetuned")
    for layer in mz.learned_layers(model).values():  # a finished mask stays as it is
        layer.prune_(layer.in_channels // layer.condense_factor)
    return model if settings.scratch else normalise_(model)


def digest(images: ImageSet) -> str:
    """Returns a hash of images, labels and classes."""
    content = [images.sha256(), images.labels.tolist(), images.classes]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class Run:
    """A network that learns a set of images; `average` holds what it has learned."""

    def __init__(self, model: Any, images: ImageSet, settings: Settings):
        model.reset_classifier(len(images.classes))
        model.pretrained_cfg.update(num_classes=len(images.classes), label_names=images.classes)
        self.model, self.settings = model.to(memory_format=torch.channels_last), settings
        self.epochs = 0 if settings.freeze else settings.epochs or min(40, max(5, SHOWN_IMAGES // len(images)))
        self.steps = max(1, len(images) // settings.batch_size)  # of an epoch
        self.device = next(model.parameters()).device
        self.images = torch.from_numpy(images.images).permute(0, 3, 1, 2)
        self.labels = torch.from_numpy(images.labels).to(self.device)
        few = 1.0 if settings.scratch else min(1.0, len(images) / FEW_IMAGES)
        self.lr = settings.lr or LR * few**0.5
        decay = 1.0 if settings.scratch else settings.layer_decay
        self.optimizer = create_optimizer_v2(model, "adamw", lr=self.lr, weight_decay=0.05, layer_decay=decay)
        if settings.scratch:
            self.average = ModelEmaV3(model, decay=0.99, use_warmup=True, warmup_power=0.75)
        else:
            self.average = ModelEmaV3(model, decay=START_SHARE ** (1 / max(1, self.epochs * self.steps)))
        self.fitted = settings.scratch and not settings.freeze  # a classifier of random features says nothing
        self.history: list[dict[str, float]] = []  # of the finished epochs
        side = self.images.shape[2:]
        flip = v2.RandomHorizontalFlip(0.5 if settings.flip else 0.0)
        self.view = v2.Compose([v2.RandomCrop(side, padding=max(1, side[0] // 8)), flip])

    def inputs(self, images: torch.Tensor) -> torch.Tensor:
        """Maps uint8 (N, 3, H, W) to what the network takes."""
        cfg = self.model.pretrained_cfg
        return preprocess(images.permute(0, 2, 3, 1).to(self.device), cfg["mean"], cfg["std"])

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Maps uint8 (N, 3, H, W) to what the classifier reads, (N, num_features)."""
        self.model.eval()
        maps = (self.model.forward_features(self.inputs(batch)) for batch in images.split(100))
        return torch.cat([self.model.forward_head(batch, pre_logits=True) for batch in maps])

    def fit_classifier(self) -> None:
        """Fits the classifier to the network's features: logistic regression with a quadratic penalty."""
        if not self.settings.freeze:  # the features that training starts from: BatchNorm takes the images' statistics
            order = torch.randperm(len(self.images))
            batches = order.tensor_split(math.ceil(len(order) / 128))  # of even sizes, as each counts the same
            update_bn((self.inputs(self.images[batch]) for batch in batches), self.model)
        features = self.features(self.images)
        mean, scale = features.mean(0), features.std(0)
        scale += 0.01 * scale.max()
        features = (features - mean) / scale
        linear = self.model.get_classifier()
        weight, bias = (torch.zeros_like(parameter, requires_grad=True) for parameter in linear.parameters())
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(F.linear(features, weight, bias), self.labels)
            loss += 50 / len(features) * weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        with torch.no_grad():
            linear.weight.copy_(weight / scale)
            linear.bias.copy_(bias - linear.weight @ mean)
        self.average.set(self.model)

    def train(self, progress: Progress, checked: Optional[ImageSet] = None) -> Iterator[str]:
        """Trains to the end; yields a line on each part, with the average's accuracy on the images `checked`."""
        if not self.fitted:
            self.fit_classifier()
            self.fitted = True
            text = "classifier fitted"
            if checked is not None:
                text += f": held-out images {evaluate(self.average.module, checked).top1:.1f} %"
            yield text
        while len(self.history) < self.epochs:
            yield self.epoch(progress, checked)

    def epoch(self, progress: Progress, checked: Optional[ImageSet]) -> str:
        """Trains for an epoch; order and views follow from seed and epoch."""
        number, epochs, steps = len(self.history), self.epochs, self.steps
        torch.manual_seed(1000 * self.settings.seed + number)
        batches = torch.randperm(len(self.labels)).tensor_split(steps)  # even ones: BatchNorm can't take a single image
        total = steps * epochs
        # timm warns of a schedule of one step.
        scheduler = CosineLRScheduler(self.optimizer, max(2, total), warmup_t=min(steps, total // 5), t_in_epochs=False)
        task = progress.add_task("", total=steps)
        self.model.train()
        seen = loss_sum = correct = 0.0
        for step, chosen in enumerate(batches, start=number * steps):
            scheduler.step_update(step)
            labels = self.labels[chosen.to(self.device)]
            logits = self.model(self.inputs(torch.stack([self.view(image) for image in self.images[chosen]])))
            loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.average.update(self.model, step + 1 if self.settings.scratch else None)  # timm's first step forgets
            seen += len(chosen)
            loss_sum += loss.item() * len(chosen)
            correct += (logits.argmax(1) == labels).sum().item()
            text = f"epoch {number + 1}/{epochs}: loss {loss_sum / seen:.3f}, accuracy {100 * correct / seen:.1f} %"
            progress.update(task, advance=1, description=text)
            if not loss_sum / seen < 10 * math.log(logits.shape[1]):  # ten times that of a guess; catches NaN, too
                raise ValueError(f"the loss diverges ({text}); lower --lr")
        progress.remove_task(task)
        scores = {"loss": loss_sum / seen, "accuracy": 100 * correct / seen}
        if checked is not None:
            scores["held_out"] = evaluate(self.average.module, checked).top1
            text += f", held-out images {scores['held_out']:.1f} %"
        self.history.append(scores)
        return text

    def save(self, checkpoint: Path, key: dict[str, Any]) -> None:
        """Writes a checkpoint; `key` says what it is of."""
        parts = {name: getattr(self, name).state_dict() for name in PARTS}
        content = io.BytesIO()  # torch says of a full disk where its writer stood
        torch.save({"key": key, "history": self.history, **parts}, content)
        with atomic_write(checkpoint) as file:
            file.write(content.getbuffer())

    def resume(self, checkpoint: Path, key: dict[str, Any]) -> None:
        """Takes up a checkpoint, if it is of the same network, settings and images."""
        if not checkpoint.is_file():
            raise ValueError(f"{checkpoint}: nothing was interrupted there; leave --resume out, or use --force instead")
        try:
            state = torch.load(checkpoint, map_location=self.device, weights_only=True)
            different = [name for name in key if state["key"][name] != key[name]]
            for name in [] if different else PARTS:
                getattr(self, name).load_state_dict(state[name])
            self.history, self.fitted = state["history"], True
        except Exception as error:  # of many kinds, by what is damaged
            raise ValueError(f"{checkpoint} can't be read ({error}); start anew with --force") from error
        if different:
            raise ValueError(f"{checkpoint} is of a run with other {' and '.join(different)}; give the same")
