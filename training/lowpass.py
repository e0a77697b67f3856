"""The low-pass filter of FGR: what JPEG at a low quality leaves of an image, without its file format.

Dimensions: N images, H and W pixels.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["lowpass"]

BLOCK = 8
QUALITIES = (15, 18, 25)
# Quantisation of the luminance in 8 × 8 DCT coefficients at quality 50; ITU-T T.81, table K.1.
LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)


@lru_cache(maxsize=1)
def dct_matrix() -> Tensor:  # (8, 8) float32, orthonormal: coefficients = M @ block @ M.T
    """The DCT-II of eight points."""
    n = torch.arange(BLOCK, dtype=torch.float64)
    matrix = torch.cos(math.pi * (2 * n + 1) * n[:, None] / (2 * BLOCK)) * math.sqrt(2 / BLOCK)
    matrix[0] /= math.sqrt(2)
    return matrix.float()


def quantisation_table(quality: int) -> Tensor:  # (8, 8) float32, in grey levels of 0 to 255
    """JPEG's luminance table at a quality from 1 to 99, scaled as the Independent JPEG Group's encoder does.

    >>> int(quantisation_table(50)[0, 0]), int(quantisation_table(25)[0, 0])
    (16, 32)
    """
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return torch.floor((torch.tensor(LUMINANCE) * scale + 50) / 100).clamp(1, 255)


def lowpass(
    images: Tensor,  # (N, channels, H, W) in [0, 1]
    generator: torch.Generator,
    qualities: Sequence[int] = QUALITIES,
) -> Tensor:
    """Round every 8 × 8 block's DCT coefficients as JPEG would, at a quality drawn for each image; every channel alike.

    Sizes that are no multiple of 8 are padded by repetition and cut again.

    >>> flat = torch.full((1, 3, 8, 8), 0.5)
    >>> bool((lowpass(flat, torch.Generator().manual_seed(0)) - 0.5).abs().max() < 0.05)
    True
    """
    height, width = images.shape[-2:]
    padded = F.pad(images.float(), (0, -width % BLOCK, 0, -height % BLOCK), mode="replicate")
    blocks = padded.unfold(2, BLOCK, BLOCK).unfold(3, BLOCK, BLOCK)  # (N, channels, rows, columns, 8, 8)
    matrix = dct_matrix().to(images.device)
    tables = torch.stack([quantisation_table(quality) for quality in qualities]) / 255
    drawn = tables[torch.randint(len(qualities), (len(images),), generator=generator)].to(images.device)
    step = drawn[:, None, None, None]
    coefficients = matrix @ (blocks - 0.5) @ matrix.T
    kept = torch.round(coefficients / step) * step
    blocks = matrix.T @ kept @ matrix + 0.5
    rows, columns = blocks.shape[2:4]
    whole = blocks.transpose(3, 4).reshape(*images.shape[:2], rows * BLOCK, columns * BLOCK)
    return whole[..., :height, :width].clamp(0, 1).to(images.dtype)
