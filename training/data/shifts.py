"""Corruptions of images in [0, 1], each at five severities, as pure functions of tensors and an explicit generator.

Dimensions: N images, C channels, H and W pixels. Every function takes float images (N, C, H, W) in [0, 1], a severity of 1 (mild) to 5
(severe) and a CPU generator, and returns new images of the same shape, dtype and device, again in [0, 1].

The recipes and constants are those of CIFAR-10-C (Hendrycks and Dietterich, *Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations*, 2019), in tensor code. Where we depart from it:

- random streams differ, so single images differ although their distribution agrees;
- results stay float: the data module decides whether to round them to bytes, which CIFAR-10-C always does;
- zoom_blur magnifies by any real factor around the centre, where CIFAR-10-C rounds each crop to whole pixels;
- JPEG quality is that of the installed Pillow;
- glass blur, motion blur, snow, frost, spatter and elastic transforms are not here;
- rotation is ours;
- below 16 pixels a side (8×8 digits) noise, blur and contrast use constants of our own, chosen so that severity 5 is hard there.
"""

import io
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor

from moe_posterior.errors import InvalidArgumentError

__all__ = ["CORRUPTIONS", "Corruption", "corrupt"]

Corruption = Callable[[Tensor, int, Generator], Tensor]

SMALL_SIDE = 16  # pixels; below it the constants for small images apply
T = TypeVar("T")


def _at(constants: Sequence[T], severity: int) -> T:
    if severity not in range(1, len(constants) + 1):
        raise InvalidArgumentError(f"severity must lie in 1..{len(constants)}; got {severity}")
    return constants[severity - 1]


def _is_small(images: Tensor) -> bool:
    return min(images.shape[-2:]) < SMALL_SIDE


def _normal(images: Tensor, generator: Generator) -> Tensor:
    return torch.randn(images.shape, generator=generator).to(images)


def _filter(images: Tensor, kernel: Tensor, border: str) -> Tensor:
    """Every channel convolved with one 2-d kernel of odd sides."""
    channels = images.shape[1]
    height, width = kernel.shape
    padded = F.pad(images, (width // 2, width // 2, height // 2, height // 2), mode=border)
    return F.conv2d(padded, kernel.to(images).expand(channels, 1, height, width), groups=channels)


def _gaussian_profile(sigma: float, radius: int) -> Tensor:
    profile = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    return profile / profile.sum()


def gaussian_noise(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """Independent normal noise on each value."""
    constants = (0.1, 0.2, 0.3, 0.4, 0.5) if _is_small(images) else (0.04, 0.06, 0.08, 0.09, 0.10)
    return (images + _at(constants, severity) * _normal(images, generator)).clamp(0, 1)


def shot_noise(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """Poisson noise: each value counts so many photons at full brightness."""
    photons = _at((500, 250, 100, 75, 50), severity)
    return (torch.poisson(images.cpu() * photons, generator=generator) / photons).clamp(0, 1).to(images)


def impulse_noise(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """Salt and pepper: a share of the values becomes 0 or 1, with equal chances."""
    share = _at((0.01, 0.02, 0.03, 0.05, 0.07), severity)
    chance = torch.rand(images.shape, generator=generator).to(images.device)
    salted = torch.where(chance < share / 2, torch.ones_like(images), images)
    return torch.where((chance >= share / 2) & (chance < share), torch.zeros_like(images), salted)


def speckle_noise(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """Normal noise in proportion to the value."""
    constants = (0.06, 0.1, 0.12, 0.16, 0.2)
    return (images + images * _at(constants, severity) * _normal(images, generator)).clamp(0, 1)


def gaussian_blur(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """A Gaussian filter, cut off at four standard deviations, with repeated border pixels."""
    sigma = _at((0.5, 0.7, 0.9, 1.2, 1.6) if _is_small(images) else (0.4, 0.6, 0.7, 0.8, 1.0), severity)
    profile = _gaussian_profile(sigma, radius=int(4 * sigma + 0.5))
    return _filter(_filter(images, profile[None, :], "replicate"), profile[:, None], "replicate").clamp(0, 1)


def defocus_blur(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """A disk-shaped filter whose edge is softened by a 3×3 Gaussian."""
    radius, softening = _at(((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1)), severity)
    reach = math.ceil(radius) + 1
    offset = torch.arange(-reach, reach + 1)
    disk = (offset[:, None] ** 2 + offset[None, :] ** 2 <= radius**2).float()
    profile = _gaussian_profile(softening, radius=1)
    kernel = F.conv2d((disk / disk.sum())[None, None], torch.outer(profile, profile)[None, None], padding=1)[0, 0]
    return _filter(images, kernel, "reflect").clamp(0, 1)


def _warp(images: Tensor, matrices: Tensor) -> Tensor:  # (N, C, H, W), (N, 2, 3) -> (N, C, H, W)
    """Bilinear resampling under one affine map per image, from output to input coordinates; black outside."""
    if len(images) == 0:  # grid_sample refuses empty batches
        return images.clone()
    grid = F.affine_grid(matrices.to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def zoom_blur(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """The average of the image and of magnifications of it in steps of 1 %."""
    # As many as the published np.arange(1, 1.06, 0.01) and so on return: for the first two that includes the end.
    steps = _at((7, 12, 16, 21, 26), severity)
    total = images.clone()
    for step in range(steps):
        matrix = torch.eye(2, 3) / (1 + 0.01 * step)
        total += _warp(images, matrix.expand(len(images), 2, 3))
    return (total / (steps + 1)).clamp(0, 1)


def rotation(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """A turn around the centre by a fixed angle, to the left or right with equal chances."""
    angle = math.radians(_at((8, 16, 24, 32, 40), severity))
    turn = angle * (2 * torch.randint(2, (len(images),), generator=generator) - 1)
    # Grid coordinates run from -1 to 1 on both axes; the ratio keeps the turn rigid when H and W differ.
    ratio = images.shape[-2] / images.shape[-1]
    zero = torch.zeros_like(turn)
    rows = [turn.cos(), -ratio * turn.sin(), zero, turn.sin() / ratio, turn.cos(), zero]
    return _warp(images, torch.stack(rows, dim=1).view(-1, 2, 3)).clamp(0, 1)


def _plasma(count: int, side: int, decay: float, generator: Generator) -> Tensor:  # (count, side, side) in [0, 1]
    """Fractal clouds by the diamond-square algorithm on a torus; `side` is a power of two."""
    clouds = torch.zeros(count, side, side)
    amplitude, step = 1.0, side

    def jittered(neighbours: Tensor) -> Tensor:
        return neighbours / 4 + amplitude * (2 * torch.rand(neighbours.shape, generator=generator) - 1)

    while step >= 2:
        half = step // 2
        corners = clouds[:, ::step, ::step]
        pairs = corners + corners.roll(-1, 1)
        clouds[:, half::step, half::step] = jittered(pairs + pairs.roll(-1, 2))
        centres = clouds[:, half::step, half::step]
        clouds[:, ::step, half::step] = jittered(centres + centres.roll(1, 1) + corners + corners.roll(-1, 2))
        clouds[:, half::step, ::step] = jittered(centres + centres.roll(1, 2) + corners + corners.roll(-1, 1))
        # The published amplitude is the square of a number divided by `decay` at each scale.
        amplitude, step = amplitude / decay**2, half
    clouds -= clouds.amin(dim=(1, 2), keepdim=True)
    return clouds / clouds.amax(dim=(1, 2), keepdim=True)


def fog(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """Fractal clouds added to the image, which is then darkened back to its own maximum."""
    thickness, decay = _at(((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75)), severity)
    height, width = images.shape[-2:]
    side = 2 ** math.ceil(math.log2(max(height, width, 2)))
    clouds = _plasma(len(images), side, decay, generator)[:, None, :height, :width].to(images)
    brightest = images.amax(dim=(1, 2, 3), keepdim=True)
    return ((images + thickness * clouds) * brightest / (brightest + thickness)).clamp(0, 1)


def brightness(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """A constant added to the value channel of HSV."""
    value = images.amax(dim=1, keepdim=True)
    raised = (value + _at((0.05, 0.1, 0.15, 0.2, 0.3), severity)).clamp(max=1)
    # At fixed hue and saturation RGB is proportional to the value; black has no hue and turns grey.
    return torch.where(value > 0, images * raised / value.clamp(min=1e-6), raised).clamp(0, 1)


def contrast(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """Distances to the mean of each channel of an image, multiplied by a factor below one."""
    factor = _at((0.6, 0.4, 0.3, 0.2, 0.15) if _is_small(images) else (0.75, 0.5, 0.4, 0.3, 0.15), severity)
    mean = images.mean(dim=(2, 3), keepdim=True)
    return (mean + factor * (images - mean)).clamp(0, 1)


def saturate(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """The saturation channel of HSV scaled and raised; severities 1 and 2 take colour away, the others add it."""
    if images.shape[1] != 3:
        raise InvalidArgumentError(f"saturate needs images of 3 channels; got {images.shape[1]}")
    factor, raised = _at(((0.3, 0.0), (0.1, 0.0), (1.5, 0.0), (2.0, 0.1), (2.5, 0.2)), severity)
    value = images.amax(dim=1, keepdim=True)
    chroma = value - images.amin(dim=1, keepdim=True)
    saturation = (factor * chroma / value.clamp(min=1e-6) + raised).clamp(0, 1)
    # Grey has no hue; as in CIFAR-10-C, whose HSV calls its hue 0, it turns to red where saturation is added.
    red = torch.tensor([0.0, 1.0, 1.0]).to(images).view(1, 3, 1, 1)
    away = torch.where(chroma > 0, (value - images) / chroma.clamp(min=1e-6), red)
    return (value * (1 - saturation * away)).clamp(0, 1)


def _box_weights(source: int, target: int) -> Tensor:  # (target, source)
    """Weights of a resize to `target` pixels by averaging the source pixels whose centres lie in the target pixel."""
    scale = source / target
    centre = (torch.arange(target) + 0.5) * scale
    distance = torch.arange(source) + 0.5 - centre[:, None]
    half = max(scale, 1.0) / 2
    weights = ((distance > -half) & (distance <= half)).float()
    return weights / weights.sum(dim=1, keepdim=True)


def pixelate(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """Resized down and up again with box filters."""
    factor = _at((0.95, 0.9, 0.85, 0.75, 0.65), severity)
    height, width = images.shape[-2:]
    low_height, low_width = int(height * factor), int(width * factor)
    rows = _box_weights(low_height, height) @ _box_weights(height, low_height)
    columns = _box_weights(low_width, width) @ _box_weights(width, low_width)
    return (rows.to(images) @ images @ columns.to(images).T).clamp(0, 1)


def jpeg_compression(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """Written as JPEG at a low quality and read back; images are of 1 or 3 channels."""
    quality = _at((80, 65, 58, 50, 40), severity)
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    result = np.empty_like(pixels)
    for row, image in enumerate(pixels):
        file = io.BytesIO()
        Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(file, "JPEG", quality=quality)
        result[row] = np.asarray(Image.open(file)).reshape(image.shape)
    return (torch.from_numpy(result).permute(0, 3, 1, 2).to(images) / 255).contiguous()


CORRUPTIONS: dict[str, Corruption] = {
    function.__name__: function
    for function in (
        gaussian_noise,
        shot_noise,
        impulse_noise,
        speckle_noise,
        gaussian_blur,
        defocus_blur,
        zoom_blur,
        fog,
        brightness,
        contrast,
        saturate,
        pixelate,
        jpeg_compression,
        rotation,
    )
}


def corrupt(images: Tensor, shift: str, severity: int, generator: Generator) -> Tensor:  # (N, C, H, W) -> (N, C, H, W)
    """Images under the named corruption.

    Args:
        images: float, in [0, 1].
        shift: a key of `CORRUPTIONS`.
        severity: 1 (mild) to 5 (severe).
        generator: the only source of randomness; on the CPU.

    Raises:
        InvalidArgumentError: unknown shift, severity outside 1..5, images of another shape, dtype or range.

    >>> images = torch.rand(2, 3, 32, 32)
    >>> corrupt(images, "contrast", 5, torch.Generator()).std() < 0.2 * images.std()
    tensor(True)
    """
    if shift not in CORRUPTIONS:
        raise InvalidArgumentError(f"shift must be one of {sorted(CORRUPTIONS)}; got {shift!r}")
    if images.ndim != 4 or not images.is_floating_point():
        raise InvalidArgumentError(f"images must be float (N, C, H, W); got {images.dtype} {tuple(images.shape)}")
    if images.numel() and not (images.min() >= 0 and images.max() <= 1):
        raise InvalidArgumentError(f"images must lie in [0, 1]; got [{images.min():.3g}, {images.max():.3g}]")
    return CORRUPTIONS[shift](images, severity, generator)
