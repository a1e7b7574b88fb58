"""Batch augmentation by its own promises."""

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as TF
from training.augment import count_views, crop_and_mirror, cutmix_box, resize


def pictures(n: int = 64, seed: int = 0) -> torch.Tensor:
    """Smooth random pictures, uint8 (n, 32, 32, 3)."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(n, 3, 6, 6, generator=generator)
    return (TF.resize(small, [32, 32]) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


@pytest.mark.parametrize("padding", [0, 1, 4])
def test_views_are_all_windows_of_the_padded_image_mirrored_or_not(padding):
    image = pictures(1)
    views = torch.arange(count_views(padding))
    out = crop_and_mirror(image.expand(len(views), -1, -1, -1), views, padding)
    assert out.dtype == torch.uint8
    padded = torch.nn.functional.pad(image[0], (0, 0, padding, padding, padding, padding))
    places = range(2 * padding + 1)
    expected = [
        padded[y : y + 32, x : x + 32].flip(1) if mirrored else padded[y : y + 32, x : x + 32]
        for y in places
        for x in places
        for mirrored in (False, True)
    ]
    assert torch.equal(out, torch.stack(expected))


def test_cutmix_rectangles_have_the_area_that_was_drawn():
    generator = np.random.default_rng(0)
    boxes = [cutmix_box(generator, 32) for _ in range(2000)]
    areas = [(rows.stop - rows.start) * (columns.stop - columns.start) / 1024 for rows, columns in boxes]
    assert all(0 <= s.start <= s.stop <= 32 for box in boxes for s in box)
    # 1 - lambda is uniform in [0, 1]; edges cut off a part, so the mean lies below a half.
    assert 0.25 < np.mean(areas) < 0.45
    assert max(areas) > 0.9
    assert np.std([rows.start for rows, _ in boxes]) > 3


def test_resize_keeps_the_mean_and_the_layout():
    x = torch.rand(4, 3, 32, 32).to(memory_format=torch.channels_last)
    assert resize(x, 32) is x
    for size in (16, 48):
        other = resize(x, size)
        assert other.shape == (4, 3, size, size)
        assert other.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(other.mean(), x.mean(), rtol=0.02, atol=0)
