"""A training recipe: one TOML file per weight. Every key is a field below; unknown keys raise."""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Recipe", "load_recipe"]


@dataclass(frozen=True)
class Recipe:
    """What a training run does, apart from where its data lies and where its files go.

    Attributes:
        model: registered model name.
        tag: names the recipe in the manifest; a tag never changes its meaning.
        epochs: passes over the training images.
        model_args: extra arguments for timm.create_model.
        seed: initial weights, order of images and augmentation follow from it.
        batch_size: images per optimiser step, over all processes.
        lr: peak learning rate; linear warm-up over `warmup_epochs`, then a cosine to zero, updated every step.
        momentum: Nesterov momentum of SGD.
        weight_decay: not applied to BatchNorm and biases.
        label_smoothing: probability mass spread over all classes.
        ema_decay: decay per step of the exponential moving average of the weights; 0 turns it off.
        crop_padding: zero padding, in pixels, around the image before the random crop.
        sizes: progressive resolution: [[share of the epochs, pixels], ...], shares add up to 1.
        precision: "bf16" (autocast) or "fp32".
    """

    model: str
    tag: str
    epochs: int
    model_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    seed: int = 0
    batch_size: int = 128
    lr: float = 0.1
    warmup_epochs: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 1e-4
    label_smoothing: float = 0.0
    ema_decay: float = 0.0
    crop_padding: int = 4
    sizes: tuple[tuple[float, int], ...] = ((1.0, 32),)
    precision: str = "bf16"

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError("epochs and batch_size must be at least 1")
        if self.precision not in ("bf16", "fp32"):
            raise ValueError(f"precision must be 'bf16' or 'fp32', not {self.precision!r}")
        if abs(sum(share for share, _ in self.sizes) - 1.0) > 1e-6:
            raise ValueError(f"the shares in sizes must add up to 1: {self.sizes}")

    def size_at(self, epoch: int) -> int:
        """Returns the training resolution of an epoch (counted from 0), in pixels."""
        end = 0.0
        for share, size in self.sizes:
            end += share
            if epoch < round(end * self.epochs):
                return size
        return self.sizes[-1][1]


def load_recipe(path: str | Path) -> Recipe:
    """Reads a recipe.

    Raises:
        ValueError: not TOML, an unknown or missing key, or a value out of range; the message names the file.
    """
    try:
        values = tomllib.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path}: can't be read as a TOML recipe: {error}") from error
    fields = {field.name: field for field in dataclasses.fields(Recipe)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ValueError(f"{path}: unknown keys {', '.join(unknown)}; known are {', '.join(fields)}")
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{path}: missing keys {', '.join(missing)}")
    if "sizes" in values:
        values["sizes"] = tuple((float(share), int(size)) for share, size in values["sizes"])
    try:
        return Recipe(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
