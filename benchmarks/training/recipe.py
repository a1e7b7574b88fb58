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

__all__ = ["RUNS", "SHARED_FIELDS", "Recipe", "load_recipe"]

# A folder MODEL.TAG per run: recipe.toml, log.csv, result.json, where needed masks.json and model.safetensors.
RUNS = Path(__file__).resolve().parents[1] / "runs"

# What decides which images and targets a step sees, and how long the training is.
SHARED_FIELDS = (
    *("epochs", "seed", "batch_size", "crop_padding", "cutmix", "sizes", "precision"),
    *("teacher", "soft_labels", "temperature"),
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
        init_from: weights to start from, in a form that `training/initial_weights.py` describes; "" for random ones.
        init_sha256: digest that the file of an installed package must have.
        calibration_images: training images, drawn by the seed, by whose outputs learned groups are chosen before the
            first step, and kept weights refitted to those of `init_from`; with 0, magnitude chooses groups in stages.
        sharing: of `mz.prune_groups`: above 0, groups with calibration images prefer inputs that other groups read.
        pretraining: what the package's weights were trained on.
        seed: initial weights, order of images and augmentation follow from it.
        batch_size: images per optimiser step.
        optimizer: timm's name of the optimiser.
        lr: peak learning rate; linear warm-up over `warmup_epochs`, then a cosine to zero, updated every step.
        momentum: of SGD and Muon.
        weight_decay: not applied to BatchNorm and biases.
        ema_decay: decay per step of the exponential moving average of the weights; 0 keeps the last weights.
        bn_batches: batches, cropped and mirrored only, that BatchNorm's statistics are re-estimated on at the end.
        crop_padding: zero padding, in pixels, around the image before the random crop.
        cutmix: share of the batches that are mixed by CutMix (arXiv 1905.04899), alpha 1.
        sizes: progressive resolution: [[share of the epochs, pixels], ...], shares add up to 1; the last is the
            resolution that the network is measured at.
        precision: "bf16" (autocast) or "fp32", of Muon's orthogonalisation, too.
        teacher: finished run, relative to benchmarks/, of a network that labels each batch as the students see it,
            cropped, mirrored and mixed, but at its own resolution (arXiv 2106.05237); "" for none.
        soft_labels: file of a teacher's soft labels, relative to benchmarks/, in place of `teacher`; "" for none. A
            step draws one of the stored views of each image.
        temperature: T of the distillation loss (arXiv 1503.02531, section 2), on both distributions.
        ce_weight: weight of the cross-entropy with the hard labels.
        kd_weight: weight of the distillation loss.
    """

    model: str
    tag: str
    epochs: int
    model_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    init_from: str = ""
    init_sha256: str = ""
    calibration_images: int = 0
    sharing: float = 0.0
    pretraining: str = ""
    seed: int = 0
    batch_size: int = 256
    optimizer: str = "nmuon"
    lr: float = 0.02
    warmup_epochs: float = 0.5
    momentum: float = 0.95
    weight_decay: float = 0.03
    ema_decay: float = 0.998
    bn_batches: int = 50
    crop_padding: int = 4
    cutmix: float = 0.5
    sizes: tuple[tuple[float, int], ...] = ((0.6, 24), (0.4, 32))
    precision: str = "bf16"
    teacher: str = ""
    soft_labels: str = "runs/efficientnet_lite2.cutmix_e8_r160/soft_labels.safetensors"
    temperature: float = 2.0
    ce_weight: float = 0.1
    kd_weight: float = 0.9

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError("epochs and batch_size must be at least 1")
        if self.precision not in ("bf16", "fp32"):
            raise ValueError(f"precision must be 'bf16' or 'fp32', not {self.precision!r}")
        if abs(sum(share for share, _ in self.sizes) - 1.0) > 1e-6:
            raise ValueError(f"the shares in sizes must add up to 1: {self.sizes}")
        for name in ("cutmix", "ema_decay"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], not {getattr(self, name)}")
        if self.teacher and self.soft_labels:
            raise ValueError("teacher and soft_labels exclude one another: set soft_labels = ''")
        if bool(self.teacher or self.soft_labels) != bool(self.kd_weight):
            raise ValueError("kd_weight goes together with teacher or soft_labels: set both or neither")
        if self.calibration_images and (not self.init_from or self.init_from.startswith("package:")):
            raise ValueError("calibration_images needs init_from = 'MODEL.TAG', whose outputs are the target")
        if self.sharing and not self.calibration_images:
            raise ValueError("sharing needs calibration_images: without, magnitude chooses groups")
        if not self.init_from.startswith("package:") == bool(self.init_sha256) == bool(self.pretraining):
            raise ValueError("init_from = 'package:...', init_sha256 and pretraining go together: set all or none")

    @property
    def name(self) -> str:
        """The weight's name, "model.tag"."""
        return f"{self.model}.{self.tag}"

    @property
    def as_teacher(self) -> str:
        """The weight's name, and what it was pretrained on."""
        return self.name + (f", pretrained on {self.pretraining}" if self.pretraining else "")

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
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        known = [field.name for field in dataclasses.fields(Recipe)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"unknown keys {', '.join(unknown)}; known are {', '.join(known)}")
        if "sizes" in values:
            values["sizes"] = tuple((float(share), int(size)) for share, size in values["sizes"])
        return Recipe(**values)
    # ValueError of TOML and its encoding, too; a missing key's TypeError names it.
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {str(error).removeprefix('Recipe.__init__() ')}") from error
