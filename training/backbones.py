"""Backbones trained from scratch: images in [0, 1] to feature vectors, for the mixtures of experts that read them.

Dimensions: N images, C channels, H and W pixels, F features. A backbone says the width of its output in ``out_features``, so
that a model can size its heads without running it.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_posterior.errors import InvalidArgumentError

__all__ = ["DigitsNet", "ResNet", "Trunk", "paper_resnet", "reduced_resnet"]


def _require_images(images: Tensor, channels: int, size: int | None = None) -> None:
    shape = tuple(images.shape)
    if images.ndim != 4 or shape[1] != channels or (size is not None and shape[2:] != (size, size)):
        side = "H, W" if size is None else f"{size}, {size}"
        raise InvalidArgumentError(f"images must be of shape (N, {channels}, {side}); got {shape}")


class DigitsNet(nn.Module):
    """Two 3×3 convolutions, one pooling and a linear layer for 8×8 digits; trains in seconds on a CPU.

    Args:
        out_features: F, width of the features; 64 suffices for ten classes.
        width: channels of the first convolution, the second has twice as many.

    Shapes: (N, 1, 8, 8) in [0, 1] -> (N, F), non-negative (after a ReLU).

    >>> DigitsNet(out_features=16)(torch.rand(3, 1, 8, 8)).shape
    torch.Size([3, 16])
    """

    def __init__(self, out_features: int = 64, width: int = 16) -> None:
        super().__init__()
        self.out_features = out_features
        self.conv1 = nn.Conv2d(1, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.project = nn.Linear(2 * width * 4 * 4, out_features)

    def forward(self, images: Tensor) -> Tensor:  # (N, 1, 8, 8) -> (N, F)
        """Features of the images.

        Raises:
            InvalidArgumentError: images are not (N, 1, 8, 8).
        """
        _require_images(images, channels=1, size=8)
        hidden = F.relu(self.conv1(images))
        hidden = F.max_pool2d(F.relu(self.conv2(hidden)), 2)
        return F.relu(self.project(hidden.flatten(1)))


class Trunk(nn.Module):
    """A linear layer, batch norm and ReLU on cached features: the trainable part below the heads of a mixture.

    Args:
        in_features: width of the cached features.
        out_features: F; 128 as in the paper's heads.

    Shapes: (N, in_features) -> (N, F), non-negative.

    Source: *Toward Calibrated Mixture-of-Experts Under Distribution Shift*, 2026, PACS.

    >>> Trunk(1280)(torch.rand(4, 1280)).shape
    torch.Size([4, 128])
    """

    def __init__(self, in_features: int, out_features: int = 128) -> None:
        super().__init__()
        self.out_features = out_features
        self.linear = nn.Linear(in_features, out_features)
        self.norm = nn.BatchNorm1d(out_features)

    def forward(self, features: Tensor) -> Tensor:  # (N, in) -> (N, F)
        """The trained features."""
        return F.relu(self.norm(self.linear(features)))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with batch norm around a shortcut; the shortcut is a 1×1 convolution where the shape changes.

    Source: He et al., *Deep Residual Learning for Image Recognition*, 2016, the block of ResNet-18.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, images: Tensor) -> Tensor:  # (N, in, H, W) -> (N, out, H/stride, W/stride)
        """The residual sum after a ReLU."""
        hidden = F.relu(self.norm1(self.conv1(images)), inplace=True)
        return F.relu(self.norm2(self.conv2(hidden)) + self.shortcut(images), inplace=True)


class ResNet(nn.Module):
    """A residual network for small images: a 3×3 stem without pooling, one stage a width, global average pooling.

    Images come in [0, 1], as the loaders and the corruptions have them, and are standardised here, so that nothing outside needs
    to know the constants.

    Args:
        widths: channels of each stage; the last one is F. Every stage after the first halves the resolution.
        blocks: residual blocks of each stage, as many numbers as widths.
        stem_width: channels of the stem; by default the first stage's.
        stem_stride: 1 keeps 32 × 32 pixels for the first stage; 2 quarters the cost of everything after the stem.
        channels_last: keep weights and activations in the memory format that CPU and GPU convolutions prefer.
        mean, std: of each channel, for the standardisation; the defaults are those of CIFAR-10's training images.

    Shapes: (N, 3, H, W) in [0, 1] -> (N, F), non-negative.

    Raises:
        InvalidArgumentError: widths and blocks differ in length or are empty, or mean and std do.

    Source: the stem and stages of He et al. 2016 as used for 32-pixel images.

    >>> net = ResNet(widths=(8, 16), blocks=(1, 1))
    >>> net.out_features, net(torch.rand(2, 3, 32, 32)).shape
    (16, torch.Size([2, 16]))
    """

    def __init__(
        self,
        widths: Sequence[int] = (64, 128, 256),
        blocks: Sequence[int] = (2, 2, 2),
        stem_width: int | None = None,
        stem_stride: int = 1,
        channels_last: bool = True,
        mean: Sequence[float] = (0.4914, 0.4822, 0.4465),
        std: Sequence[float] = (0.2470, 0.2435, 0.2616),
    ) -> None:
        super().__init__()
        if not widths or len(widths) != len(blocks):
            raise InvalidArgumentError(f"blocks must give one number per width {tuple(widths)}; got {tuple(blocks)}")
        if len(mean) != len(std):
            raise InvalidArgumentError(f"std must have one value per channel, {len(mean)} as in mean; got {len(std)}")
        self.out_features = widths[-1]
        self.mean: Tensor  # (1, C, 1, 1)
        self.std: Tensor  # (1, C, 1, 1)
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        channels = stem_width or widths[0]
        self.stem = nn.Sequential(
            nn.Conv2d(len(mean), channels, 3, stride=stem_stride, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )
        stages: list[nn.Module] = []
        for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            for block in range(count):
                stages.append(BasicBlock(channels, width, stride=2 if stage > 0 and block == 0 else 1))
                channels = width
        self.stages = nn.Sequential(*stages)
        self._initialise()
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.to(memory_format=self.memory_format)  # type: ignore[call-overload]  # torch's stub wants a tensor beside it

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, BasicBlock):
                # Blocks start as their shortcut alone: the first steps at a high learning rate stay stable.
                nn.init.zeros_(module.norm2.weight)

    def forward(self, images: Tensor) -> Tensor:  # (N, C, H, W) -> (N, F)
        """Features of the images.

        Raises:
            InvalidArgumentError: images are not (N, C, H, W) with as many channels as `mean` has.
        """
        _require_images(images, channels=self.mean.shape[1])
        hidden = ((images - self.mean) / self.std).contiguous(memory_format=self.memory_format)
        return self.stages(self.stem(hidden)).mean(dim=(2, 3))


def reduced_resnet() -> ResNet:
    """A residual network that two CPU cores train on CIFAR-10 in minutes: the paper's widths and F = 256 at a fraction of its cost.

    One block a stage and a strided stem; 1.2 M parameters. Under bfloat16 autocast an epoch takes about six tenths of its time in
    float32.
    """
    return ResNet(widths=(64, 128, 256), blocks=(1, 1, 1), stem_stride=2)


def paper_resnet() -> ResNet:
    """The backbone of the CIFAR-10H experiments: ResNet-18's blocks, a stem for 32 pixels, three stages, F = 256.

    About 2.8 M parameters; one epoch costs about six of the reduced network's under bfloat16 autocast, eleven in float32.

    Source: *Toward Calibrated Mixture-of-Experts Under Distribution Shift*, 2026.
    """
    return ResNet(widths=(64, 128, 256), blocks=(2, 2, 2))
