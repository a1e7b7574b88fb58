"""Augmentation of whole batches on the device that trains. All randomness comes from the generator that is passed."""

import math

import torch
from torch.nn import functional as F

__all__ = ["crop_and_flip", "erase", "resize", "trivial_augment"]


def crop_and_flip(images: torch.Tensor, padding: int, generator: torch.Generator, flip: bool = True) -> torch.Tensor:
    """Crops each image at a random place out of its zero-padded self and mirrors half of them.

    Args:
        images: uint8, (N, H, W, C).
        padding: pixels added on each side before the crop.
        generator: on the images' device.
        flip: whether to mirror.

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
    columns = left + torch.where(mirror & flip, width - 1 - columns, columns)
    return padded[torch.arange(n, device=device)[:, None, None], rows[:, :, None], columns[:, None, :]]


def trivial_augment(images: torch.Tensor, share: float, generator: torch.Generator) -> torch.Tensor:
    """Applies one random operation of random strength to each image (TrivialAugment Wide, arXiv 2103.10158, table 1).

    Every operation is computed for the whole batch and each image takes the one that it drew, so that the number of
    kernels doesn't grow with the batch.

    Args:
        images: uint8, (N, H, W, C).
        share: probability that an image is changed at all.
        generator: on the images' device.

    Returns:
        uint8, (N, H, W, C).
    """
    n, device = len(images), images.device
    x = images.permute(0, 3, 1, 2).float()
    operations = torch.randint(14, (n,), generator=generator, device=device)
    operations[torch.rand(n, generator=generator, device=device) >= share] = 0  # identity
    strength = torch.randint(31, (n,), generator=generator, device=device) / 30
    sign = torch.where(torch.rand(n, generator=generator, device=device) < 0.5, -1.0, 1.0)

    x = _affine(x, operations, strength * sign)
    factor = (1.0 + 0.99 * strength * sign)[:, None, None, None]
    level = strength[:, None, None, None]
    grey = (x * torch.tensor([0.2989, 0.587, 0.114], device=device)[:, None, None]).sum(1, keepdim=True)
    step = 2.0 ** (6.0 * level).round()  # posterize keeps 8 to 2 bits
    results = {
        6: x * factor,  # brightness
        7: grey + (x - grey) * factor,  # colour
        8: grey.mean((2, 3), keepdim=True).floor() * (1 - factor) + x * factor,  # contrast
        9: _smooth(x) * (1 - factor) + x * factor,  # sharpness
        10: (x / step).floor() * step,  # posterize
        11: torch.where(x >= 255.0 * (1 - level), 255.0 - x, x),  # solarize
        12: _autocontrast(x),
        13: _equalize(x),
    }
    for operation, result in results.items():
        x = torch.where((operations == operation)[:, None, None, None], result, x)
    return x.clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def _affine(x: torch.Tensor, operations: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    """Operations 1 to 5: shear x, shear y, translate x, translate y, rotate; `amount` in [-1, 1]."""
    size = x.shape[-1]
    angle = torch.where(operations == 5, amount * math.radians(135.0), 0.0)
    theta = torch.zeros(len(x), 2, 3, device=x.device)
    theta[:, 0, 0] = theta[:, 1, 1] = angle.cos()
    theta[:, 0, 1], theta[:, 1, 0] = -angle.sin(), angle.sin()
    theta[:, 0, 1] += torch.where(operations == 1, 0.99 * amount, 0.0)
    theta[:, 1, 0] += torch.where(operations == 2, 0.99 * amount, 0.0)
    shift = (32.0 * amount).round() * 2.0 / size  # pixels to the grid's [-1, 1]
    theta[:, 0, 2] = torch.where(operations == 3, shift, 0.0)
    theta[:, 1, 2] = torch.where(operations == 4, shift, 0.0)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="nearest", padding_mode="zeros", align_corners=False)


def _smooth(x: torch.Tensor) -> torch.Tensor:
    """The 3x3 filter behind Pillow's sharpness; borders stay."""
    kernel = torch.tensor([[1.0, 1.0, 1.0], [1.0, 5.0, 1.0], [1.0, 1.0, 1.0]], device=x.device) / 13.0
    channels = x.shape[1]
    inner = F.conv2d(x, kernel.expand(channels, 1, 3, 3), groups=channels)
    smooth = x.clone()
    smooth[:, :, 1:-1, 1:-1] = inner
    return smooth


def _autocontrast(x: torch.Tensor) -> torch.Tensor:
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(high > low, (x - low) * 255.0 / (high - low).clamp_min(1.0), x)


def _equalize(x: torch.Tensor) -> torch.Tensor:
    """Pillow's histogram equalisation, per image and channel."""
    n, channels, height, width = x.shape
    values = x.round().long().clamp(0, 255).reshape(n * channels, -1)
    histogram = torch.zeros(n * channels, 256, device=x.device).scatter_add_(
        1, values, torch.ones_like(x).view_as(values)
    )
    last = 255 - (histogram.flip(1) > 0).float().argmax(1, keepdim=True)  # the brightest value that occurs
    step = ((histogram.sum(1, keepdim=True) - histogram.gather(1, last)) / 255.0).floor()
    before = histogram.cumsum(1) - histogram
    table = ((before + (step / 2).floor()) / step.clamp_min(1.0)).floor().clamp(0, 255)
    table = torch.where(step > 0, table, torch.arange(256.0, device=x.device))
    return table.gather(1, values).reshape(n, channels, height, width)


def erase(images: torch.Tensor, share: float, generator: torch.Generator) -> torch.Tensor:
    """Sets a random rectangle of some images to zero (Random Erasing, arXiv 1708.04896).

    Args:
        images: normalised, (N, C, H, W).
        share: probability that an image loses a rectangle.
        generator: on the images' device.
    """
    n, _, height, width = images.shape
    device = images.device
    draws = torch.rand(5, n, generator=generator, device=device)
    area = (0.02 + draws[0] * (1 / 3 - 0.02)) * height * width
    aspect = torch.exp((draws[1] * 2 - 1) * math.log(1 / 0.3))
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    box_height = (area * aspect).sqrt().round().clamp(1, height)
    box_width = (area / aspect).sqrt().round().clamp(1, width)
    top = (draws[2] * (height - box_height + 1)).floor()
    left = (draws[3] * (width - box_width + 1)).floor()
    inside_rows = (rows >= top[:, None]) & (rows < (top + box_height)[:, None])
    inside_columns = (columns >= left[:, None]) & (columns < (left + box_width)[:, None])
    inside = inside_rows[:, None, :, None] & inside_columns[:, None, None, :]
    return images.masked_fill(inside & (draws[4] < share)[:, None, None, None], 0.0)


def resize(images: torch.Tensor, size: int) -> torch.Tensor:
    """Resizes float images (N, C, H, W) to `size` pixels with antialiasing, for progressive resolution."""
    if images.shape[-1] == size:
        return images
    small = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return small.contiguous(memory_format=torch.channels_last)
