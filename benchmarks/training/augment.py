"""Crops, mirroring, CutMix and resizing of whole batches on the device that trains. Nothing here draws at random."""

import numpy as np
import torch
from torch.nn import functional as F

__all__ = ["count_views", "crop_and_mirror", "cutmix_box", "resize"]


def count_views(padding: int) -> int:
    """Returns how many views `crop_and_mirror` knows: every place of the crop, mirrored or not."""
    return 2 * (2 * padding + 1) ** 2


def crop_and_mirror(images: torch.Tensor, views: torch.Tensor, padding: int) -> torch.Tensor:
    """Cuts each image out of its zero-padded self.

    Args:
        images: uint8, (N, H, W, C).
        views: integers below `count_views(padding)`, (N,): (top * (2 * padding + 1) + left) * 2 + mirrored.
        padding: pixels added on each side before the crop.

    Returns:
        uint8, (N, H, W, C).
    """
    n, height, width, _ = images.shape
    device = images.device
    views = views.long()[:, None]
    places = 2 * padding + 1
    top, left, mirrored = views // 2 // places, views // 2 % places, views % 2
    padded = F.pad(images, (0, 0, padding, padding, padding, padding))
    rows = top + torch.arange(height, device=device)
    columns = torch.arange(width, device=device)
    columns = left + torch.where(mirrored == 1, width - 1 - columns, columns)
    return padded[torch.arange(n, device=device)[:, None, None], rows[:, :, None], columns[:, None, :]]


def cutmix_box(generator: np.random.Generator, size: int) -> tuple[slice, slice]:
    """Draws the rectangle that CutMix takes from another image (arXiv 1905.04899, section 3.1, alpha 1).

    Returns:
        Rows and columns, clipped to an image of `size` pixels; the share of the other image is the rectangle's area.
    """
    half = 0.5 * size * np.sqrt(1.0 - generator.random())
    edges = generator.random(2)[:, None] * size + np.array([-half, half])
    (top, bottom), (left, right) = np.clip(np.rint(edges), 0, size).astype(int).tolist()
    return slice(top, bottom), slice(left, right)


def resize(images: torch.Tensor, size: int) -> torch.Tensor:
    """Resizes float images (N, C, H, W) to `size` pixels: antialiased bilinear down, bicubic up."""
    if images.shape[-1] == size:
        return images
    mode, antialias = ("bilinear", True) if size < images.shape[-1] else ("bicubic", False)
    resized = F.interpolate(images, size=(size, size), mode=mode, antialias=antialias, align_corners=False)
    return resized.contiguous(memory_format=torch.channels_last)
