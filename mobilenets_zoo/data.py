"""CIFAR-100 and CIFAR-10 as arrays, from Parquet files, a torchvision root or the Hugging Face Hub."""

import hashlib
import io
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["ImageSet", "load_images"]

# Hub id -> the column that holds the class.
HUB_DATASETS = {"uoft-cs/cifar100": "fine_label", "uoft-cs/cifar10": "label"}
TORCHVISION_DATASETS = {"cifar-100-python": "CIFAR100", "cifar-10-batches-py": "CIFAR10"}


@dataclass(frozen=True)
class ImageSet:
    """One split of a labelled image data set.

    Attributes:
        images: uint8, (N, 32, 32, 3).
        labels: int64, (N,).
        classes: class names, the label is the position.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, mask: np.ndarray) -> "ImageSet":
        """Returns the images that a mask (N,) names."""
        return ImageSet(self.images[mask], self.labels[mask], self.classes)

    def sha256(self) -> str:
        """Digest of the decoded pixels (N x 32 x 32 x 3 bytes, rows in order)."""
        return hashlib.sha256(np.ascontiguousarray(self.images).data).hexdigest()


def load_images(source: str | Path, split: str) -> ImageSet:
    """Reads a whole split into memory.

    Args:
        source: a folder of Parquet files named `train-*.parquet` and `test-*.parquet` (at any depth) in the
            layout of the Hub's uoft-cs/cifar100 or uoft-cs/cifar10, one of these two ids, or a torchvision
            root (the folder that holds `cifar-100-python` or `cifar-10-batches-py`).
        split: "train" or "test".

    Raises:
        ValueError: the source is none of these, or its files can't be read; the message says what to do.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', not {split!r}")
    if str(source) in HUB_DATASETS:
        return _read_parquet(_download(str(source), split), source)
    folder = Path(source)
    if not folder.is_dir():
        raise ValueError(
            f"{source}: no such folder; give a folder of Parquet files, a torchvision root or "
            f"one of {', '.join(HUB_DATASETS)}"
        )
    files = sorted(folder.rglob(f"{split}-*.parquet"))
    if files:
        return _read_parquet(files, source)
    for name, dataset in TORCHVISION_DATASETS.items():
        if (folder / name).is_dir():
            return _read_torchvision(folder, dataset, split)
    raise ValueError(
        f"{source}: holds neither {split}-*.parquet nor {' nor '.join(TORCHVISION_DATASETS)}; give the folder "
        f"that contains one of them, or one of {', '.join(HUB_DATASETS)}"
    )


def _download(repo: str, split: str) -> list[Path]:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(repo, repo_type="dataset", allow_patterns=[f"*{split}-*.parquet"])
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{repo}: could not be downloaded ({reason}); pass a local folder instead") from error
    return sorted(Path(folder).rglob(f"{split}-*.parquet"))


def _read_parquet(files: list[Path], source: str | Path) -> ImageSet:
    import json

    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    images, labels = [], []
    classes: tuple[str, ...] = ()
    try:
        for file in files:
            table = pq.read_table(file)
            label = next((c for c in HUB_DATASETS.values() if c in table.column_names), None)
            if label is None or "img" not in table.column_names:
                raise ValueError(f"has columns {table.column_names}, expected img and fine_label or label")
            features = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
            classes = tuple(features.get("info", {}).get("features", {}).get(label, {}).get("names", classes))
            labels.append(table[label].to_numpy())
            for row in table["img"].combine_chunks().field("bytes").to_pylist():
                images.append(np.asarray(Image.open(io.BytesIO(row)).convert("RGB")))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise ValueError(f"{file}: can't be read as CIFAR Parquet: {error}; fetch {source} again") from error
    all_labels = np.concatenate(labels).astype(np.int64)
    return ImageSet(np.stack(images), all_labels, classes or tuple(map(str, range(all_labels.max() + 1))))


def _read_torchvision(folder: Path, dataset: str, split: str) -> ImageSet:
    from torchvision import datasets

    try:
        # torchvision verifies the md5 of the original archive's files before it reads them.
        data = getattr(datasets, dataset)(str(folder), train=split == "train", download=False)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{folder}: torchvision can't read {dataset} there: {error}") from error
    return ImageSet(np.asarray(data.data), np.asarray(data.targets, dtype=np.int64), tuple(data.classes))
