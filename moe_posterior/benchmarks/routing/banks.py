"""Labelled examples in several domains, split for experts, warm start and stream.

Dimensions: n examples, D hidden size.
"""

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from moe_posterior.errors import MissingDataError, MissingDependencyError

PARTS = ("experts", "warm", "stream")
PACS_DIMENSIONS = 64
CIFAR_ROWS, CIFAR_DIMENSIONS = 6000, 96


@dataclass(frozen=True, eq=False)
class Bank:
    """Examples of a data set in all its domains; all examples of an image are in the same part."""

    hidden: Tensor  # (n, D) float32
    label: Tensor  # (n,) int64
    domain: Tensor  # (n,) int64
    part: Tensor  # (n,) int64, index into PARTS
    held_out: Tensor  # (number of domains,) bool: domains missing from the warm start
    linear: bool = False  # experts are linear discriminants, else RBF support-vector machines

    @property
    def num_labels(self) -> int:
        """Possible answers."""
        return int(self.label.max()) + 1

    @property
    def is_held_out(self) -> Tensor:  # (n,) bool
        """Whether the example's domain is held out."""
        return self.held_out[self.domain]

    @property
    def query_class(self) -> Tensor:  # (n,) int64
        """Query classes of the environment: domain times half of the labels."""
        return 2 * self.domain + (self.label >= self.num_labels // 2).long()

    @property
    def num_classes(self) -> int:
        """M."""
        return 2 * len(self.held_out)


def data_folder(name: str, file: str) -> Path:
    """The folder that holds a file: ``$MOE_POSTERIOR_DATA/<name>`` if set, otherwise ``../shared/data/<name>`` next to the project.

    Raises:
        MissingDataError: the file is not there.
    """
    root = os.environ.get("MOE_POSTERIOR_DATA")
    project = Path(__file__).resolve().parents[3]
    folder = (Path(root) if root else project.parent / "shared" / "data") / name
    if not (folder / file).is_file():
        raise MissingDataError(
            f"there is no {file} in {folder}; put it there, or set MOE_POSTERIOR_DATA to the folder that holds {name}/{file}"
        )
    return folder


def split_parts(count: int, seed: int) -> Tensor:  # (count,) int64
    """A random third of the images for each part.

    >>> torch.bincount(split_parts(9, seed=0)).tolist()
    [3, 3, 3]
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return torch.empty(count, dtype=torch.int64).index_put_((order,), torch.arange(count) * len(PARTS) // count)


def _across_domains(
    images: Tensor,  # (n, ...)
    label: Tensor,  # (n,)
    transforms: dict[str, Callable[[Tensor], Tensor]],
    held_out: set[str],
    features: Callable[[Tensor], Tensor],
    seed: int,
    linear: bool,
) -> Bank:
    """Every image under every transform."""
    hidden = torch.cat([features(transform(images)) for transform in transforms.values()])
    domain = torch.arange(len(transforms)).repeat_interleave(len(images))
    repeats = len(transforms)
    mask = torch.tensor([name in held_out for name in transforms])
    return Bank(hidden, label.repeat(repeats), domain, split_parts(len(images), seed).repeat(repeats), mask, linear)


def _noisy(images: Tensor, std: float) -> Tensor:
    """Fixed noise, so a domain holds the same images for every seed."""
    return (images + std * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)


def _blurred(images: Tensor) -> Tensor:
    """3 × 3 mean over the last two dimensions."""
    flat = images.reshape(-1, 1, *images.shape[-2:])
    return torch.nn.functional.avg_pool2d(flat, 3, stride=1, padding=1).view_as(images)


DIGIT_DOMAINS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda images: images,
    "quarter turn": lambda images: images.rot90(1, (1, 2)),
    "mirrored": lambda images: images.flip(2),
    "inverted": lambda images: 1 - images,
    "noisy": lambda images: _noisy(images, 0.2),
    "blurred": _blurred,
    "upside down": lambda images: images.rot90(2, (1, 2)),
    "inverted, turned": lambda images: 1 - images.rot90(3, (1, 2)),
    "faint, noisy": lambda images: _noisy(0.4 * images, 0.1),
    "moved": lambda images: images.roll((2, 1), (1, 2)),
}
CIFAR_DOMAINS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda images: images,
    "dark": lambda images: 0.35 * images,
    "grey": lambda images: images.mean(dim=1, keepdim=True).expand_as(images),
    "mirrored down": lambda images: images.flip(2),
    "inverted": lambda images: 1 - images,
    "blurred": lambda images: _blurred(_blurred(images)),
}


@lru_cache(maxsize=2)
def digits(seed: int) -> Bank:
    """scikit-learn's 1,797 handwritten digits under ten transforms, four of them held out; hidden = 64 pixels, scaled by 4.

    Source: Alpaydin and Kaynak, *Optical Recognition of Handwritten Digits*, UCI 1998.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependencyError("scikit-learn", "train") from error
    raw = load_digits()
    images = torch.as_tensor(raw.images).float() / 16
    label = torch.as_tensor(raw.target).long()
    held_out = {"upside down", "inverted, turned", "faint, noisy", "moved"}
    return _across_domains(images, label, DIGIT_DOMAINS, held_out, lambda x: 4 * x.flatten(1), seed, linear=False)


@lru_cache(maxsize=2)
def pacs(seed: int) -> Bank:
    """PACS: 9,991 images in four domains, sketch held out; hidden = 64 principal components of ImageNet features, PCA on the warm part.

    Source: Li et al., *Deeper, Broader and Artier Domain Generalization*, 2017; features as the data folder describes them.
    """
    import numpy as np

    file = "features_efficientnet_lite0.npz"
    raw = np.load(data_folder("pacs", file) / file, allow_pickle=False)
    features = torch.as_tensor(raw["features"].astype("float32"))
    names, domain = np.unique(raw["domain"], return_inverse=True)
    _, label = np.unique(raw["label"], return_inverse=True)
    held_out = torch.tensor(["sketch" in str(name) or str(name) == "3" for name in names])
    domain_ids, part = torch.as_tensor(domain), split_parts(len(features), seed)
    seen = (part == PARTS.index("warm")) & ~held_out[domain_ids]
    hidden = _principal(features, features[seen], PACS_DIMENSIONS)
    return Bank(hidden, torch.as_tensor(label), domain_ids, part, held_out, linear=True)


@lru_cache(maxsize=2)
def cifar10h(seed: int) -> Bank:
    """The first 6,000 test images of CIFAR-10 under six transforms, two of them held out.

    hidden = principal components of edge histograms and colours on a 4 × 4 grid: hand-made features, so experts are often wrong.

    Source: Peterson et al., *Human Uncertainty Makes Classification More Robust*, 2019; Dalal & Triggs 2005 (edge histograms).
    """
    try:
        import numpy as np
        import pyarrow.parquet
        from PIL import Image
    except ImportError as error:
        raise MissingDependencyError(error.name or "pyarrow", "train") from error
    path = data_folder("cifar10h", "test.parquet") / "test.parquet"
    table = pyarrow.parquet.read_table(path, columns=["img", "label"]).slice(0, CIFAR_ROWS)
    encoded = table["img"].combine_chunks().field("bytes").to_pylist()
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(image)).convert("RGB")) for image in encoded])
    images = torch.as_tensor(pixels).permute(0, 3, 1, 2).float() / 255
    label = torch.tensor(table["label"].to_pylist(), dtype=torch.int64)
    raw = _across_domains(images, label, CIFAR_DOMAINS, {"inverted", "blurred"}, edge_features, seed, linear=True)
    seen = (raw.part == PARTS.index("warm")) & ~raw.is_held_out
    hidden = _principal(raw.hidden, raw.hidden[seen], CIFAR_DIMENSIONS)
    return Bank(hidden, raw.label, raw.domain, raw.part, raw.held_out, linear=True)


def edge_features(images: Tensor) -> Tensor:  # (n, 3, 32, 32) -> (n, 4·4·8 + 4·4·3)
    """Histograms of 8 edge directions and mean colours on a 4 × 4 grid, each block scaled to unit length."""
    grey = images.mean(dim=1)
    down, right = torch.gradient(grey, dim=(1, 2))
    strength, angle = (down.square() + right.square()).sqrt(), torch.atan2(down, right)
    direction = ((angle + torch.pi) * 4 / torch.pi).long().clamp(0, 7)
    planes = torch.zeros(len(images), 8, 32, 32).scatter_(1, direction[:, None], strength[:, None])
    edges = torch.nn.functional.avg_pool2d(planes, 8).flatten(1)
    colours = torch.nn.functional.avg_pool2d(images, 8).flatten(1)
    return torch.cat([torch.nn.functional.normalize(block, dim=1) for block in (edges, colours)], dim=1)


def _principal(points: Tensor, fitted_on: Tensor, dimensions: int) -> Tensor:  # (n, D), (m, D) -> (n, dimensions)
    """Projection on the leading principal directions, scaled so that a coordinate has unit variance on average."""
    centre = fitted_on.mean(dim=0)
    covariance = torch.cov((fitted_on - centre).T.double())
    values, vectors = torch.linalg.eigh(covariance)
    leading = vectors[:, -dimensions:].flip(1)
    return ((points - centre).double() @ leading / values[-dimensions:].mean().sqrt()).float()


BANKS: dict[str, Callable[[int], Bank]] = {"digits": digits, "pacs": pacs, "cifar10h": cifar10h}
