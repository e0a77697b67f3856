"""Corruptions: range, shape, determinism, severity, and the published recipes checked another way."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor

from moe_posterior.errors import InvalidArgumentError
from moe_posterior.training.data import CORRUPTIONS, corrupt
from moe_posterior.training.data.shifts import _plasma

COLOUR_ONLY = {"saturate"}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def photographs() -> Tensor:  # (12, 3, 32, 32)
    """Real pictures: 32-pixel tiles of the photograph that comes with scikit-learn."""
    from sklearn.datasets import load_sample_image

    picture = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1).float() / 255
    small = torch.nn.functional.avg_pool2d(picture[None], 4)[0]
    return torch.stack([small[:, y : y + 32, x : x + 32] for y in (0, 32, 64) for x in (0, 32, 64, 96)])


@pytest.mark.parametrize("shift", CORRUPTIONS)
@pytest.mark.parametrize("severity", [1, 5])
def test_corruptions_keep_shape_dtype_and_range(photographs: Tensor, shift: str, severity: int) -> None:
    before = photographs.clone()
    result = corrupt(photographs, shift, severity, generator())
    assert result.shape == photographs.shape
    assert result.dtype == photographs.dtype
    assert result.min() >= 0
    assert result.max() <= 1
    assert not torch.equal(result, photographs)
    assert torch.equal(photographs, before), "the input was changed in place"


@pytest.mark.parametrize("shift", CORRUPTIONS)
def test_corruptions_take_extreme_images_without_nan(shift: str) -> None:
    images = torch.stack([torch.zeros(3, 32, 32), torch.ones(3, 32, 32)])
    assert corrupt(images, shift, 5, generator()).isfinite().all()


@pytest.mark.parametrize("shift", CORRUPTIONS)
def test_an_empty_batch_stays_empty(shift: str) -> None:
    assert corrupt(torch.empty(0, 3, 32, 32), shift, 3, generator()).shape == (0, 3, 32, 32)


@pytest.mark.parametrize("shift", sorted(set(CORRUPTIONS) - COLOUR_ONLY))
def test_corruptions_take_small_grey_images(shift: str) -> None:
    assert corrupt(torch.rand(3, 1, 8, 8, generator=generator()), shift, 5, generator()).shape == (3, 1, 8, 8)


@pytest.mark.parametrize("shift", CORRUPTIONS)
def test_the_generator_alone_decides_the_result(photographs: Tensor, shift: str) -> None:
    first = corrupt(photographs, shift, 3, generator(1))
    torch.manual_seed(123)  # must not matter
    assert torch.equal(first, corrupt(photographs, shift, 3, generator(1)))


@pytest.mark.parametrize("shift", ["gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "fog", "rotation"])
def test_random_corruptions_differ_between_generators(photographs: Tensor, shift: str) -> None:
    assert not torch.equal(corrupt(photographs, shift, 3, generator(1)), corrupt(photographs, shift, 3, generator(2)))


# saturate removes colour at 1 and 2 and adds it from 3 on: its distance to the original is not monotone, nor is the published one's.
@pytest.mark.parametrize("shift", sorted(set(CORRUPTIONS) - {"saturate"}))
def test_higher_severities_lie_farther_from_the_original(photographs: Tensor, shift: str) -> None:
    distances = [
        (corrupt(photographs, shift, severity, generator()) - photographs).square().mean().item()
        for severity in range(1, 6)
    ]
    assert distances == sorted(distances)
    assert distances[4] > 1.3 * distances[0]


def test_gaussian_noise_has_the_published_standard_deviation() -> None:
    noise = corrupt(torch.full((4, 3, 32, 32), 0.5), "gaussian_noise", 5, generator()) - 0.5
    assert noise.std().item() == pytest.approx(0.10, rel=0.03)


def test_shot_noise_has_the_variance_of_photon_counts() -> None:
    noise = corrupt(torch.full((4, 3, 32, 32), 0.25), "shot_noise", 5, generator()) - 0.25
    assert noise.var().item() == pytest.approx(0.25 / 50, rel=0.05)


def test_impulse_noise_replaces_its_share_half_by_white_half_by_black() -> None:
    result = corrupt(torch.full((8, 3, 32, 32), 0.5), "impulse_noise", 5, generator())
    assert (result == 1).double().mean().item() == pytest.approx(0.035, rel=0.1)
    assert (result == 0).double().mean().item() == pytest.approx(0.035, rel=0.1)


@pytest.mark.parametrize("severity", range(1, 6))
def test_gaussian_blur_agrees_with_scipy(photographs: Tensor, severity: int) -> None:
    sigma = (0.4, 0.6, 0.7, 0.8, 1.0)[severity - 1]
    expected = ndimage.gaussian_filter(photographs.numpy(), (0, 0, sigma, sigma), mode="nearest", truncate=4.0)
    actual = corrupt(photographs, "gaussian_blur", severity, generator())
    torch.testing.assert_close(actual, torch.from_numpy(expected), atol=1e-5, rtol=0)


def test_defocus_blur_spreads_a_point_over_a_softened_disk() -> None:
    point = torch.zeros(1, 1, 32, 32)
    point[0, 0, 16, 16] = 1
    result = corrupt(point, "defocus_blur", 5, generator())[0, 0]
    assert result.sum().item() == pytest.approx(1, abs=1e-5)
    # Radius 1.5 covers the nine pixels around the centre; a softening of 0.1 pixels leaves them alike.
    torch.testing.assert_close(result[15:18, 15:18], torch.full((3, 3), 1 / 9), atol=1e-4, rtol=0)


@pytest.mark.parametrize("severity", range(1, 6))
def test_pixelate_agrees_with_pillow_up_to_rounding(photographs: Tensor, severity: int) -> None:
    factor = (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1]
    low = int(32 * factor)
    actual = corrupt(photographs, "pixelate", severity, generator())
    for image, result in zip(photographs, actual, strict=True):
        picture = Image.fromarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
        picture = picture.resize((low, low), Image.Resampling.BOX).resize((32, 32), Image.Resampling.BOX)
        difference = np.asarray(picture) / 255 - result.permute(1, 2, 0).numpy()
        assert np.abs(difference).max() < 2 / 255


def test_jpeg_compression_is_pillows_at_the_published_quality(photographs: Tensor) -> None:
    file = io.BytesIO()
    Image.fromarray((photographs[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()).save(
        file, "JPEG", quality=40
    )
    expected = torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1).float() / 255
    torch.testing.assert_close(corrupt(photographs[:1], "jpeg_compression", 5, generator())[0], expected)


@pytest.mark.parametrize("shift", ["brightness", "saturate"])
@pytest.mark.parametrize("severity", range(1, 6))
def test_hsv_corruptions_agree_with_the_standard_librarys_colours(
    photographs: Tensor, shift: str, severity: int
) -> None:
    import colorsys

    colours = torch.cat([photographs[0, :, ::4, ::4].flatten(1).T, torch.tensor([[0.0, 0, 0], [0.5, 0.5, 0.5]])])
    actual = corrupt(colours.T.reshape(1, 3, 1, -1), shift, severity, generator())[0, :, 0].T
    for colour, result in zip(colours.tolist(), actual.tolist(), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*colour)
        if shift == "brightness":
            value = min(value + (0.05, 0.1, 0.15, 0.2, 0.3)[severity - 1], 1)
        else:
            factor, raised = ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2))[severity - 1]
            saturation = min(saturation * factor + raised, 1)
        assert result == pytest.approx(colorsys.hsv_to_rgb(hue, saturation, value), abs=1e-5)


def test_contrast_keeps_the_mean_and_shrinks_the_deviation(photographs: Tensor) -> None:
    result = corrupt(photographs, "contrast", 5, generator())
    torch.testing.assert_close(result.mean(dim=(2, 3)), photographs.mean(dim=(2, 3)))
    torch.testing.assert_close(result.std(dim=(2, 3)), 0.15 * photographs.std(dim=(2, 3)))


def test_zoom_blur_keeps_the_centre_sharper_than_the_border(photographs: Tensor) -> None:
    change = (corrupt(photographs, "zoom_blur", 5, generator()) - photographs).abs().mean(dim=(0, 1))
    assert change[12:20, 12:20].mean() < change[:, :4].mean()


def test_fog_clouds_are_smoother_at_higher_decay_and_fill_the_unit_interval() -> None:
    rough, smooth = _plasma(8, 32, 1.2, generator()), _plasma(8, 32, 3.0, generator())
    for clouds in (rough, smooth):
        assert torch.equal(clouds.amin(dim=(1, 2)), torch.zeros(8))
        assert torch.equal(clouds.amax(dim=(1, 2)), torch.ones(8))
    assert smooth.diff(dim=2).abs().mean() < rough.diff(dim=2).abs().mean()


@pytest.mark.parametrize("side", [(32, 32), (24, 32)])
def test_rotation_turns_a_point_by_its_angle_to_either_side(side: tuple[int, int]) -> None:
    height, width = side
    images = torch.zeros(20, 1, height, width)
    images[:, :, height // 2 - 1 : height // 2 + 1, width - 6 : width - 4] = 1  # a block right of the centre
    result = corrupt(images, "rotation", 5, generator())[:, 0]
    mass = result.sum(dim=(1, 2))
    x = (result.sum(dim=1) * (torch.arange(width) + 0.5 - width / 2)).sum(dim=1) / mass
    y = (result.sum(dim=2) * (torch.arange(height) + 0.5 - height / 2)).sum(dim=1) / mass
    angles = torch.atan2(y, x).rad2deg()
    torch.testing.assert_close(angles.abs(), torch.full((20,), 40.0), atol=1.0, rtol=0)
    torch.testing.assert_close((x**2 + y**2).sqrt(), torch.full((20,), width / 2 - 5.0), atol=0.3, rtol=0)
    assert len(angles.sign().unique()) == 2


@pytest.mark.parametrize("severity", [0, 6, -1])
def test_corrupt_rejects_a_severity_outside_one_to_five(photographs: Tensor, severity: int) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"1\.\.5; got {severity}"):
        corrupt(photographs, "fog", severity, generator())


def test_corrupt_names_the_shifts_it_knows(photographs: Tensor) -> None:
    with pytest.raises(InvalidArgumentError, match=r"gaussian_noise.*got 'snow'"):
        corrupt(photographs, "snow", 1, generator())


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 32, 32), "images must be float"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "images must be float"),
        (torch.full((1, 3, 32, 32), 2.0), r"must lie in \[0, 1\]"),
        (torch.full((1, 3, 32, 32), math.nan), r"must lie in \[0, 1\]"),
    ],
)
def test_corrupt_rejects_images_of_another_shape_dtype_or_range(images: Tensor, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        corrupt(images, "contrast", 1, generator())


def test_saturate_rejects_grey_images() -> None:
    with pytest.raises(InvalidArgumentError, match="3 channels; got 1"):
        corrupt(torch.rand(1, 1, 32, 32), "saturate", 1, generator())
