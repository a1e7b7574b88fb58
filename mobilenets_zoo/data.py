"""Images as arrays: CIFAR-100 and CIFAR-10 from Parquet files, a torchvision root or the Hub; folders; single files."""

import hashlib
import io
import json
import os
import pickle
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
from PIL import Image, ImageOps
from timm.data import create_transform, resolve_model_data_config

__all__ = ["CIFAR100_CLASSES", "ImageSet", "load_images", "read_image", "read_split"]

# What is decoded, and how much of it; Pillow would also call other programs for some formats.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 50_000_000
LARGE_SIDE = 1024

EXTENSIONS = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff")

UNREADABLE = (".heic", ".heif", ".avif", ".jxl")  # photos that mustn't be left out without a word

# What the folder of a split may be called, in small letters, best first.
SPLITS = {"train": ("train", "training"), "test": ("test", "testing", "val", "valid", "validation")}

# Hub id -> the column that holds the class.
HUB_DATASETS = {"uoft-cs/cifar100": "fine_label", "uoft-cs/cifar10": "label"}
TORCHVISION_DATASETS = {"cifar-100-python": "CIFAR100", "cifar-10-batches-py": "CIFAR10"}

# CIFAR-100's fine labels in alphabetical order: the position is the label.
_NAMES = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
    castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
    elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
    man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
    pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
    skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
    tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""

CIFAR100_CLASSES: tuple[str, ...] = tuple(_NAMES.split())
"""The class names of CIFAR-100 by label."""


@dataclass(frozen=True)
class ImageSet:
    """One split of a labelled image data set.

    Attributes:
        images: uint8, (N, height, width, channels).
        labels: int64, (N,).
        classes: class names, the label is the position.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, mask: np.ndarray) -> "ImageSet":
        """Returns the images that a mask (N,) or their positions name."""
        return ImageSet(self.images[mask], self.labels[mask], self.classes)

    def sha256(self) -> str:
        """Digest of the decoded pixels, a byte per value, in the order of `images`."""
        return hashlib.sha256(np.ascontiguousarray(self.images).data).hexdigest()


def load_images(source: str | Path, split: str) -> ImageSet:
    """Reads a whole split into memory.

    Args:
        source: a folder of Parquet files named `train-*.parquet` and `test-*.parquet` (at any depth) in the
            layout of the Hub's uoft-cs/cifar100 or uoft-cs/cifar10, one such file, whatever its name, one of these two
            ids, a torchvision root (the folder that holds `cifar-100-python` or `cifar-10-batches-py`), or one of its
            two folders.
        split: "train" or "test"; a single file is taken for either.

    Raises:
        ValueError: the source is none of these, holds several data sets, or its files can't be read; the message says
            what to do.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', not {split!r}")
    if str(source) in HUB_DATASETS:
        return _read_parquet(_download(str(source), split), source)
    folder = Path(source)
    if folder.is_file():
        return _read_parquet([folder], source)
    if not folder.is_dir():
        raise ValueError(
            f"{source}: no such folder; give a folder of Parquet files, a torchvision root or "
            f"one of {', '.join(HUB_DATASETS)}"
        )
    files = sorted(folder.rglob(f"{split}-*.parquet"))
    roots = [folder] if folder.name in TORCHVISION_DATASETS else [folder / name for name in TORCHVISION_DATASETS]
    found = sorted({file.parent for file in files}) + [root for root in roots if root.is_dir()]
    if len(found) > 1:
        raise ValueError(f"{source}: holds several data sets; give one of {', '.join(map(str, found))}")
    if files:
        return _read_parquet(files, source)
    if found:
        return _read_torchvision(found[0].parent, TORCHVISION_DATASETS[found[0].name], split)
    raise ValueError(
        f"{source}: holds neither {split}-*.parquet nor {' nor '.join(TORCHVISION_DATASETS)}; give the folder "
        f"that contains one of them, or one of {', '.join(HUB_DATASETS)}"
    )


def read_split(source: str | Path, split: str, model: Any, track: Callable[[Any], Iterable[Any]] = iter) -> ImageSet:
    """Reads a split into memory, resized and cropped as a model's configuration says.

    Args:
        source: what `load_images` takes, or a folder of images per class, with folders for training and testing above
            them or not. Without test images about a fifth of each class is held out for testing, by a hash of the
            images' names, of the pixels in Parquet files. But in classes of a few images, those held out stay so when
            others are added.
        split: "train" or "test".
        model: has timm's `pretrained_cfg`.
        track: wraps what is read, to show progress.

    Returns:
        Images of the model's input size, uint8 (N, height, width, 3).

    Raises:
        ValueError: no such data, an image that can't be read, test images alone where training ones are asked for, or
            folders that may be splits or classes.
    """
    root = Path(source)
    if not os.path.exists(root) and str(source) not in HUB_DATASETS:
        known = f"Parquet files, a torchvision root or one of {', '.join(HUB_DATASETS)}"
        raise ValueError(f"{source}: no such folder; give one with a folder of images for each class, {known}")
    parquet = root.is_file() or any(file for split in SPLITS for file in root.rglob(f"{split}-*.parquet"))
    torchvision = any((root / name).is_dir() or root.name == name for name in TORCHVISION_DATASETS)
    tests_alone = root.is_file() and root.name.startswith("test-")
    images: list[Any]
    if parquet or torchvision or str(source) in HUB_DATASETS:
        divided = not parquet or tests_alone or any(root.rglob("test-*.parquet"))
        data = load_images(source, split if divided else "train")
        images, labels, classes = list(data.images), data.labels, data.classes
    else:
        parts = {path.name.lower(): path for path in _visible(root) if any(map(Path.is_dir, _visible(path)))}
        found = {key: next((parts[name] for name in names if name in parts), None) for key, names in SPLITS.items()}
        named_test = os.path.basename(os.path.abspath(root)).lower() in SPLITS["test"]
        tests_alone = not found["train"] and (named_test or found["test"] is not None)
        divided = tests_alone or found["test"] is not None
        top = found[split if divided else "train"] or root
        # Where the other split is missing, this one may be a class of that name.
        beside = [path for path in _visible(root) if path not in found.values()] if None in found.values() else []
        for path in beside if top != root else []:
            if any(file.suffix.lower() in EXTENSIONS for file in _visible(path, "**/*")):
                raise ValueError(
                    f"{path}: holds images beside {top.name}, which would be left out; move it away, or, if both are "
                    f"classes, all of them into a new folder named train"
                )
        folders = [path for path in _visible(top) if path.is_dir()]
        inside = [[path for path in _visible(folder, "**/*") if not path.is_dir()] for folder in folders]
        if unread := [path for paths in inside for path in paths if path.suffix.lower() in UNREADABLE]:
            raise ValueError(f"{unread[0]}: {unread[0].suffix} can't be read; make it a JPEG or move it away")
        files = [[path for path in paths if path.suffix.lower() in EXTENSIONS] for paths in inside]
        if not all(files) or not files:
            empty = folders[files.index([])] if files else root
            kinds = "a folder of images for each class, or with train-*.parquet"
            raise ValueError(f"{empty}: holds no images; give a folder with {kinds}")
        images, classes = [path for paths in files for path in paths], tuple(folder.name for folder in folders)
        labels = np.repeat(np.arange(len(files), dtype=np.int64), list(map(len, files)))
    if tests_alone and split == "train":
        remedy = "put training images into a folder named train beside it, or rename it"
        raise ValueError(f"{source}: what is named as test images is all there is; {remedy}")
    if not divided:
        paths = isinstance(images[0], Path)
        names = [os.fsencode(x.relative_to(top).as_posix()) if paths else x.tobytes() for x in images]
        chosen = np.flatnonzero(_held_out(names, labels) == (split == "test"))
        if not len(chosen):
            raise ValueError(f"{source}: at least two images of a class are needed, one to train and one to test with")
        images, labels = [images[position] for position in chosen], labels[chosen]
    config = resolve_model_data_config(model)
    geometry = create_transform(**config, normalize=False)
    pixels = np.empty((len(images), *config["input_size"][1:], 3), dtype=np.uint8)
    for position, image in enumerate(track(images)):
        opened = read_image(image) if isinstance(image, Path) else Image.fromarray(image)
        pixels[position] = geometry(opened).permute(1, 2, 0).numpy()
    return ImageSet(pixels, labels, classes)


def _held_out(names: list[bytes], labels: np.ndarray) -> np.ndarray:
    """Returns a mask (N,): the images whose name's hash is in the lowest fifth, of each class one at least, not all."""
    values = np.array([int.from_bytes(hashlib.sha256(name).digest()[:6], "big") for name in names])
    held = values < 2**48 // 5
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        members = members[values[members].argsort(kind="stable")]
        held[members[-1]], held[members[0]] = False, True  # in this order, for a class of one image
    return held


def _visible(folder: Path, pattern: str = "*") -> list[Path]:
    # In the order of the names on every system: paths of Windows ignore case.
    paths = sorted(folder.glob(pattern), key=lambda path: path.relative_to(folder).parts)
    hidden = (".", "__MACOSX")  # the latter in archives that were packed on a Mac
    return [path for path in paths if not any(part.startswith(hidden) for part in path.relative_to(folder).parts)]


def _download(repo: str, split: str) -> list[Path]:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(repo, repo_type="dataset", allow_patterns=[f"*{split}-*.parquet"])
    except Exception as error:  # proxies and broken transfers raise what their library has
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{repo}: could not be downloaded ({reason}); pass a local folder instead") from error
    return sorted(Path(folder).rglob(f"{split}-*.parquet"))


def _read_parquet(files: list[Path], source: str | Path) -> ImageSet:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    classes: tuple[str, ...] = ()
    try:
        for file in files:
            table = pq.read_table(file)
            label = next((c for c in HUB_DATASETS.values() if c in table.column_names), None)
            if label is None or "img" not in table.column_names:
                raise ValueError(f"has columns {table.column_names}, expected img and fine_label or label")
            column, kind = table[label], table.schema.field("img").type
            if column.null_count or not pa.types.is_integer(column.type):
                raise ValueError(f"{label} must hold whole numbers and no nulls, it holds {column.type}")
            fields = [kind[i] for i in range(kind.num_fields)] if pa.types.is_struct(kind) else []
            if not any(field.name == "bytes" and "binary" in str(field.type) for field in fields):
                raise ValueError(f"img must hold structs with a binary field bytes, it holds {kind}")
            names = _class_names(table.schema.metadata, label)
            if labels and names != classes:
                raise ValueError(f"names other classes than {files[0].name}, it belongs to another data set")
            classes = names
            labels.append(column.to_numpy().astype(np.int64))
            for row in table["img"].combine_chunks().field("bytes").to_pylist():
                image = read_image(row or b"", "an image")
                if images and image.size != images[0].shape[1::-1]:
                    raise ValueError(f"images of {images[0].shape[1::-1]} and {image.size} pixels are mixed")
                images.append(np.asarray(image))
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise ValueError(f"{file}: can't be read as CIFAR Parquet: {error}; fetch {source} again") from error
    if not images:
        raise ValueError(f"{source}: its Parquet files hold no images; fetch it again")
    all_labels = np.concatenate(labels)
    count = len(classes) or int(all_labels.max()) + 1
    if all_labels.min() < 0 or all_labels.max() >= count:
        raise ValueError(
            f"{source}: labels reach from {all_labels.min()} to {all_labels.max()}, there are {count} classes; "
            "fetch it again"
        )
    return ImageSet(np.stack(images), all_labels, classes or tuple(map(str, range(count))))


def _class_names(metadata: Optional[dict[bytes, bytes]], label: str) -> tuple[str, ...]:
    """Returns the class names that the `datasets` library has stored in a Parquet file, none where it hasn't."""
    document = json.loads((metadata or {}).get(b"huggingface", b"null"))
    for key in ("info", "features", label, "names"):
        document = document.get(key) if isinstance(document, dict) else None
    return tuple(map(str, document)) if isinstance(document, list) else ()


def read_image(content: bytes | str | Path, name: str = "") -> Image.Image:
    """Decodes an image for a classifier: RGB, turned upright, transparency on white, 16 bits scaled to 8.

    Images with more than `LARGE_SIDE` pixels on a side come back smaller.

    Args:
        content: a file of one of `FORMATS`, or its path.
        name: of the image, for error messages; by default the path.

    Raises:
        ValueError: no such file, one that can't be opened, broken, or with more than `MAX_PIXELS` pixels.
    """
    if not isinstance(content, bytes):
        path, name = Path(content), name or str(content)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ValueError(f"{name}: {error.strerror or error}; give a file that can be read") from error
    image = _decode(content, name)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.nan_to_num(np.asarray(image))  # greys of more than 8 bits; anything wider than 16 is clipped
        largest = next((most for most in (1.0, 255.0) if image.mode == "F" and values.max() <= most), 65535.0)
        scale = 255.0 / largest
        rows = [(row.clip(0, None) * scale).clip(0, 255).round().astype(np.uint8) for row in values]
        image = Image.fromarray(np.stack(rows))
    if max(image.size) > LARGE_SIDE:
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        image.thumbnail((LARGE_SIDE, LARGE_SIDE), Image.Resampling.BICUBIC, reducing_gap=2.0)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _decode(content: bytes, name: str) -> Image.Image:
    """Decodes and turns upright what is within the limits."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(content), formats=FORMATS)
        with opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            opened.draft("RGB", (LARGE_SIDE, LARGE_SIDE))  # a JPEG decoder can leave out detail
            image = ImageOps.exif_transpose(opened)
            image.load()
            return image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"{name}: has more than {MAX_PIXELS / 1e6:.0f} million pixels; make it smaller") from None
    # Pillow's decoders raise what they like on broken data, SyntaxError and struct.error among it.
    except Exception as error:
        raise ValueError(f"{name}: not a readable image; give a PNG, JPEG, WebP, GIF, BMP or TIFF file") from error


def _read_torchvision(folder: Path, dataset: str, split: str) -> ImageSet:
    from torchvision import datasets

    try:
        # torchvision verifies the md5 of the original archive's files before it reads them.
        data = getattr(datasets, dataset)(str(folder), train=split == "train", download=False)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{folder}: torchvision can't read {dataset} there: {error}") from error
    return ImageSet(np.asarray(data.data), np.asarray(data.targets, dtype=np.int64), tuple(data.classes))
