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

__all__ = ["SHARED_FIELDS", "Recipe", "load_recipe"]

# What decides which images a step sees.
SHARED_FIELDS = (
    *("epochs", "seed", "batch_size", "crop_padding", "trivial_augment", "mixup", "cutmix", "mix_share", "erase"),
    *("label_smoothing", "sizes", "precision", "teachers"),
)


@dataclass(frozen=True)
class Recipe:
    """What a training run does, apart from where its data lies and where its files go.

    Recipes that are trained together, in one process, share every field of `SHARED_FIELDS`.

    Attributes:
        model: registered model name.
        tag: names the recipe in the manifest; a tag never changes its meaning.
        epochs: passes over the training images.
        model_args: extra arguments for timm.create_model.
        init_from: weights to start from: a zoo name with pretrained weights, or a safetensors file; a dense
            network's weights fit a learned group convolution.
        seed: initial weights, order of images and augmentation follow from it.
        batch_size: images per optimiser step, over all processes.
        optimizer: timm's name of the optimiser.
        lr: peak learning rate; linear warm-up over `warmup_epochs`, then a cosine to zero, updated every step.
        momentum: of SGD.
        weight_decay: not applied to BatchNorm and biases.
        label_smoothing: probability mass spread over all classes.
        ema_decay: decay per step of the exponential moving average of the weights; 0 turns it off.
        bn_batches: batches, cropped and mirrored only, that BatchNorm's statistics are re-estimated on at the end.
        crop_padding: zero padding, in pixels, around the image before the random crop.
        trivial_augment: share of the images that get a TrivialAugment operation.
        mixup, cutmix: alpha of timm's Mixup, 0 turns each off.
        mix_share: share of the batches that are mixed where mixup or cutmix is on.
        erase: share of the images that lose a random rectangle.
        sizes: progressive resolution of the students: [[share of the epochs, pixels], ...], shares add up to 1.
        precision: "bf16" (autocast) or "fp32".
        teachers: names of zoo models with weights, or "NAME=FILE.safetensors"; all see the students' images, at full
            resolution.
        ce_weight: weight of the cross-entropy with the labels.
        kd_weight: weight of the distillation loss.
        kd_temperature: temperature of both distributions.
        kd_standardize: compare standardised logits.
        group_lasso: weight of the group lasso of learned group convolutions.
    """

    model: str
    tag: str
    epochs: int
    model_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    init_from: str = ""
    seed: int = 0
    batch_size: int = 128
    optimizer: str = "nesterov"
    lr: float = 0.1
    warmup_epochs: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 1e-4
    label_smoothing: float = 0.0
    ema_decay: float = 0.0
    bn_batches: int = 0
    crop_padding: int = 4
    trivial_augment: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_share: float = 1.0
    erase: float = 0.0
    sizes: tuple[tuple[float, int], ...] = ((1.0, 32),)
    precision: str = "bf16"
    teachers: tuple[str, ...] = ()
    ce_weight: float = 1.0
    kd_weight: float = 0.0
    kd_temperature: float = 2.0
    kd_standardize: bool = True
    group_lasso: float = 0.0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError("epochs and batch_size must be at least 1")
        if self.precision not in ("bf16", "fp32"):
            raise ValueError(f"precision must be 'bf16' or 'fp32', not {self.precision!r}")
        if abs(sum(share for share, _ in self.sizes) - 1.0) > 1e-6:
            raise ValueError(f"the shares in sizes must add up to 1: {self.sizes}")
        for name in ("trivial_augment", "mix_share", "erase", "label_smoothing", "ema_decay"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], not {getattr(self, name)}")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError("mixup and cutmix need an even batch_size")
        if bool(self.teachers) != bool(self.kd_weight):
            raise ValueError("teachers and kd_weight go together: set both or neither")

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
    if "teachers" in values:
        values["teachers"] = tuple(values["teachers"])
    try:
        return Recipe(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
