"""Batch augmentation against torchvision's operations and by its own promises."""

import pytest
import torch
from augment import _affine, _autocontrast, _equalize, _smooth, crop_and_flip, erase, resize, trivial_augment
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF


def pictures(n: int = 64, seed: int = 0) -> torch.Tensor:
    """Smooth random pictures, uint8 (n, 32, 32, 3)."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(n, 3, 6, 6, generator=generator)
    return (v2.functional.resize(small, [32, 32]) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_crop_without_padding_only_mirrors():
    images = pictures()
    out = crop_and_flip(images, 0, generator())
    mirrored = [torch.equal(a, b.flip(1)) for a, b in zip(out, images, strict=True)]
    same = [torch.equal(a, b) for a, b in zip(out, images, strict=True)]
    assert all(m or s for m, s in zip(mirrored, same, strict=True))
    assert 10 < sum(same) < 54


def test_crops_are_windows_of_the_padded_image():
    images = pictures(16)
    out = crop_and_flip(images, 4, generator())
    assert out.dtype == torch.uint8
    for image, crop in zip(images, out, strict=True):
        padded = torch.nn.functional.pad(image, (0, 0, 4, 4, 4, 4))
        windows = [padded[y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
        assert any(torch.equal(crop, window) or torch.equal(crop, window.flip(1)) for window in windows)


@pytest.mark.parametrize("function", [crop_and_flip, trivial_augment])
def test_equal_generators_give_equal_images(function):
    images = pictures()
    argument = 4 if function is crop_and_flip else 1.0
    assert torch.equal(function(images, argument, generator(1)), function(images, argument, generator(1)))
    assert not torch.equal(function(images, argument, generator(1)), function(images, argument, generator(2)))


def test_trivial_augment_changes_the_share_that_it_is_told():
    images = pictures(600)
    assert torch.equal(trivial_augment(images, 0.0, generator()), images)
    for share in (0.5, 1.0):
        changed = (trivial_augment(images, share, generator()) != images).flatten(1).any(1).float().mean().item()
        assert 0.75 * share < changed <= share + 0.05  # one operation in 14 is the identity, weak ones change nothing


def test_operations_agree_with_torchvision():
    images = pictures().permute(0, 3, 1, 2)
    x = images.float()
    assert torch.equal(_equalize(x), TF.equalize(images).float())
    assert (_autocontrast(x) - TF.autocontrast(images).float()).abs().max() <= 1
    expected = TF.adjust_sharpness(images, 0.0).float()
    assert (_smooth(x) - expected).abs().max() <= 1


@pytest.mark.parametrize("operation", range(1, 6))
def test_affine_operations_agree_with_torchvision(operation):
    x = pictures(4).permute(0, 3, 1, 2).float()
    amount = 0.25
    ours = _affine(x, torch.full((4,), operation), torch.full((4,), amount))
    arguments = dict(angle=0.0, translate=[0, 0], scale=1.0, shear=[0.0, 0.0])
    if operation == 5:
        candidates = [TF.rotate(x, angle) for angle in (135 * amount, -135 * amount)]
    elif operation in (3, 4):
        shifts = [[8, 0], [-8, 0]] if operation == 3 else [[0, 8], [0, -8]]
        candidates = [TF.affine(x, **{**arguments, "translate": shift}) for shift in shifts]
    else:
        degrees = torch.rad2deg(torch.atan(torch.tensor(0.99 * amount))).item()
        pairs = [[degrees, 0.0], [-degrees, 0.0]] if operation == 1 else [[0.0, degrees], [0.0, -degrees]]
        candidates = [TF.affine(x, **{**arguments, "shear": pair}, center=[16, 16]) for pair in pairs]
    agreement = max((ours == candidate).float().mean().item() for candidate in candidates)
    assert agreement > 0.95  # nearest-neighbour ties may fall either way
    assert (ours == x).float().mean() < 0.9


def test_erase_cuts_rectangles_of_the_right_size():
    x = torch.ones(400, 3, 32, 32)
    erased = erase(x, 0.5, generator()) == 0
    hit = erased.flatten(1).any(1)
    assert 0.4 < hit.float().mean() < 0.6
    for image in erased[hit][:20]:
        rows, columns = image[0].any(1), image[0].any(0)
        assert image[0].sum() == rows.sum() * columns.sum()  # a full rectangle
    area = erased[hit][:, 0].float().mean((1, 2))
    assert area.min() > 0.01
    assert area.max() < 0.4


def test_resize_keeps_the_mean_and_the_layout():
    x = torch.rand(4, 3, 32, 32).to(memory_format=torch.channels_last)
    assert resize(x, 32) is x
    small = resize(x, 16)
    assert small.shape == (4, 3, 16, 16)
    assert small.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(small.mean(), x.mean(), rtol=0.02, atol=0)
