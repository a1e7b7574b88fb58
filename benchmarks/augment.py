"""Augmentation of whole uint8 batches on the device that trains."""

import torch
from torch.nn import functional as F

__all__ = ["crop_and_flip", "resize"]


def crop_and_flip(images: torch.Tensor, padding: int, generator: torch.Generator) -> torch.Tensor:
    """Crops each image at a random place out of its zero-padded self and mirrors half of them.

    Args:
        images: uint8, (N, H, W, C).
        padding: pixels added on each side before the crop.
        generator: on the images' device.

    Returns:
        uint8, (N, H, W, C).
    """
    n, height, width, _ = images.shape
    device = images.device
    padded = F.pad(images, (0, 0, padding, padding, padding, padding))
    top = torch.randint(2 * padding + 1, (n, 1), generator=generator, device=device)
    left = torch.randint(2 * padding + 1, (n, 1), generator=generator, device=device)
    mirror = torch.rand((n, 1), generator=generator, device=device) < 0.5
    rows = top + torch.arange(height, device=device)
    columns = torch.arange(width, device=device)
    columns = left + torch.where(mirror, width - 1 - columns, columns)
    return padded[torch.arange(n, device=device)[:, None, None], rows[:, :, None], columns[:, None, :]]


def resize(images: torch.Tensor, size: int) -> torch.Tensor:
    """Resizes float images (N, C, H, W) to `size` pixels with antialiasing, for progressive resolution."""
    if images.shape[-1] == size:
        return images
    small = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return small.contiguous(memory_format=torch.channels_last)
