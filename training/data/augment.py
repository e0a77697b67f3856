"""Augmentation of whole batches of images, with one offset and one coin per image."""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

__all__ = ["crop_and_flip"]


def crop_and_flip(images: Tensor, generator: Generator, padding: int = 4) -> Tensor:  # (N, C, H, W) -> (N, C, H, W)
    """A random crop of the zero-padded image, flipped left to right for half of the images.

    Args:
        images: any dtype, so that stored bytes need not become floats first.
        generator: draws offsets and flips; on the CPU.
        padding: pixels on each side; 4 is the usual choice for 32-pixel images.
    """
    count, channels, height, width = images.shape
    top = torch.randint(2 * padding + 1, (count, 1), generator=generator)
    left = torch.randint(2 * padding + 1, (count, 1), generator=generator)
    flipped = torch.rand(count, 1, generator=generator) < 0.5
    rows = top + torch.arange(height)
    across = torch.arange(width)
    columns = left + torch.where(flipped, width - 1 - across, across)
    # One gather does the crop and the flip of all images.
    padded = F.pad(images, (padding, padding, padding, padding))
    return padded[
        torch.arange(count)[:, None, None, None],
        torch.arange(channels)[None, :, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]
