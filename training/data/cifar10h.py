"""CIFAR-10 with the human votes of CIFAR-10H on its test images.

Images are CIFAR-10's; row i of the votes belongs to test image i. How far humans agree says which test images are hard, and their
shares are a reference no single label gives.
"""

import io
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from moe_posterior.errors import InvalidArgumentError, MissingDataError
from moe_posterior.files.reading import decoding
from moe_posterior.training.data.augment import crop_and_flip
from moe_posterior.training.data.base import (
    ClassificationData,
    Split,
    candidate_folders,
    generator_for,
    stratified_split,
)
from moe_posterior.training.data.shifts import CORRUPTIONS, corrupt

__all__ = ["CIFAR10H"]

COUNTS_FILE = "cifar10h-counts.npy"
MIN_AGREEMENT = 0.95  # of the most frequent vote with the label; the published files reach 0.992
CHUNK = 1000  # images corrupted at a time: bounds the memory of a float copy


class CIFAR10H(ClassificationData):
    """CIFAR-10 images, human votes on the test images, CIFAR-10-C-style shifts.

    Images come from a folder holding `train.parquet` and `test.parquet` (columns `img {bytes, path}` and `label`), else from the hub.
    Votes come from `cifar10h-counts.npy` in such a folder. Folders are tried in this order: `data_dir`; if that is not given,
    the environment variable MOE_POSTERIOR_DATA (its subfolder `cifar10h`, then itself); if that is not set, `../shared/data/cifar10h`.

    Hard test images are those where the largest share of human votes is below 0.7 (327 of 10,000); easy ones where it is above 0.9
    (8,721). The validation rows are a stratified draw from the training rows and are never augmented.

    Args:
        data_dir: folder of the files; None looks in the places above.
        batch_size: rows of a batch; 128 as in the paper.
        seed: of split, order, augmentation and shifts.
        val_fraction: share of the training rows kept for validation.
        train_fraction: share of the training rows used at all, drawn per class; for learning curves and quick runs.
        limit: read only so many leading rows of each of the two files; for smoke tests.
        augment: random crop (4 pixels of padding) and horizontal flip of training batches.
        shifts: names the default evaluation sets use, keys of `shifts.CORRUPTIONS`: by default one noise, one blur, and three
            changes of the image's contrast, resolution and coding.
        hub_name: data set the hub is asked for, or a local folder that `datasets.load_dataset` reads.

    Shapes: input (N, 3, 32, 32) float in [0, 1], not standardised.

    Raises:
        MissingDataError: images or votes are not found.
        InvalidArgumentError: a fraction outside its range, a limit below 1, an unknown shift, or votes that belong to other rows.

    Source: Peterson et al., *Human Uncertainty Makes Classification More Robust*, 2019; subsets as in *Toward Calibrated
    Mixture-of-Experts Under Distribution Shift*, 2026.
    """

    name = "CIFAR-10H"
    class_names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    input_shape = (3, 32, 32)
    test_shift = None  # drawn as the training images were
    known_shifts = tuple(CORRUPTIONS)

    def __init__(
        self,
        data_dir: str | None = None,
        batch_size: int = 128,
        seed: int = 42,
        val_fraction: float = 0.1,
        train_fraction: float = 1.0,
        limit: int | None = None,
        augment: bool = True,
        shifts: Sequence[str] = ("gaussian_noise", "defocus_blur", "contrast", "pixelate", "jpeg_compression"),
        hub_name: str = "uoft-cs/cifar10",
    ) -> None:
        if not 0 < val_fraction < 1 or not 0 < train_fraction <= 1:
            raise InvalidArgumentError(
                f"val_fraction must lie in (0, 1) and train_fraction in (0, 1]; got {val_fraction} and {train_fraction}"
            )
        if limit is not None and limit < 1:
            raise InvalidArgumentError(f"limit must be at least 1 or None; got {limit}")
        if unknown := set(shifts) - set(CORRUPTIONS):
            raise InvalidArgumentError(f"shifts must be among {sorted(CORRUPTIONS)}; got {sorted(unknown)}")
        super().__init__(batch_size, seed, crop_and_flip if augment else None)
        self.data_dir = data_dir
        self.val_fraction = val_fraction
        self.train_fraction = train_fraction
        self.limit = limit
        self.default_shifts = tuple(shifts)
        self.hub_name = hub_name

    def load(self) -> Mapping[str, Split]:
        """The splits; images stay bytes.

        Raises:
            MissingDataError: images are not found.
        """
        images, labels = self._read("train")
        test_images, test_labels = self._read("test")
        shares = [(1 - self.val_fraction) * self.train_fraction, self.val_fraction * self.train_fraction]
        train, val = stratified_split(labels, shares, generator_for("split", self.seed))
        return {
            "train": Split(images[train], labels[train], scale=255),
            "val": Split(images[val], labels[val], scale=255),
            "test": Split(test_images, test_labels, scale=255),
        }

    def _read(self, part: str) -> tuple[Tensor, Tensor]:
        folders = candidate_folders("cifar10h", self.data_dir)
        for folder in folders:
            if (folder / f"{part}.parquet").is_file():
                return _read_parquet(folder / f"{part}.parquet", self.limit)
        return _read_hub(self.hub_name, part, self.limit, folders)

    def shifted(self, test: Split, shift: str, severity: int) -> Split:
        """The test images under a corruption, rounded to bytes as CIFAR-10-C is."""
        generator = generator_for("shift", self.seed, shift, severity)
        images = torch.empty_like(test.inputs)
        for start in range(0, len(images), CHUNK):
            rows = slice(start, start + CHUNK)
            corrupted = corrupt(test.inputs[rows].float() / 255, shift, severity, generator)
            images[rows] = (corrupted * 255).round().to(torch.uint8)
        return Split(images, test.targets, scale=255)

    @cached_property
    def counts(self) -> Tensor:  # (n_test, 10) int64
        """Human votes for each class on each test image.

        Raises:
            MissingDataError: the file of counts is not found.
            InvalidArgumentError: its rows do not belong to the test images.
        """
        folders = candidate_folders("cifar10h", self.data_dir)
        path = next((folder / COUNTS_FILE for folder in folders if (folder / COUNTS_FILE).is_file()), None)
        if path is None:
            places = ", ".join(str(folder / COUNTS_FILE) for folder in folders)
            raise MissingDataError(
                f"the human votes of CIFAR-10H are not at {places}; put data/{COUNTS_FILE} of "
                "github.com/jcpeterson/cifar-10h there, or name its folder by data_dir or MOE_POSTERIOR_DATA"
            )
        targets = self.split("test").targets
        with decoding(path, "a file of human votes"):
            counts = torch.from_numpy(np.load(path, allow_pickle=False)).long()
        if counts.ndim != 2 or counts.shape[1] != self.num_classes or len(counts) < len(targets):
            raise InvalidArgumentError(
                f"{path} must be ({len(targets)}, {self.num_classes}); got {tuple(counts.shape)}"
            )
        counts = counts[: len(targets)]
        agreement = (counts.argmax(dim=1) == targets).double().mean().item()
        if agreement < MIN_AGREEMENT:
            raise InvalidArgumentError(
                f"rows of {path} must belong to the test images: the most frequent vote must be the label for at least "
                f"{MIN_AGREEMENT:.0%} of them; got {agreement:.1%}"
            )
        return counts

    def human_probs(self) -> Tensor:  # (n_test, 10) float32
        """Shares of the human votes for each class; rows sum to 1. Raises as `counts` does."""
        return (self.counts.double() / self.counts.sum(dim=1, keepdim=True)).float()

    def subsets(self) -> dict[str, Tensor]:
        """Masks over the test rows by human agreement: overall, hard (largest share < 0.7), easy (> 0.9). Raises as `counts`."""
        votes = self.counts.double()
        agreement = votes.amax(dim=1) / votes.sum(dim=1)
        return {**super().subsets(), "hard": agreement < 0.7, "easy": agreement > 0.9}


def _decode(encoded: Sequence[bytes]) -> Tensor:  # (N, 3, 32, 32) uint8
    pixels = np.empty((len(encoded), 32, 32, 3), dtype=np.uint8)
    for row, image in enumerate(encoded):
        pixels[row] = np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _read_parquet(path: Path, limit: int | None) -> tuple[Tensor, Tensor]:
    import pyarrow.parquet

    with decoding(path, "a file of images as the hub's uoft-cs/cifar10"):
        table = pyarrow.parquet.read_table(path, columns=["img", "label"]).slice(0, limit)
        encoded = table["img"].combine_chunks().field("bytes").to_pylist()
        return _decode(encoded), torch.tensor(table["label"].to_pylist(), dtype=torch.int64)


def _read_hub(name: str, part: str, limit: int | None, folders: Sequence[Path]) -> tuple[Tensor, Tensor]:
    import datasets

    try:
        rows = datasets.load_dataset(name, split=part)
    except (OSError, ValueError) as error:  # offline, unreachable, unknown, or without this split
        places = ", ".join(str(folder / f"{part}.parquet") for folder in folders)
        raise MissingDataError(
            f"the {part} images of CIFAR-10 are neither at {places} nor on the hub as {name!r} ({error}); put train.parquet and "
            "test.parquet of the hub's uoft-cs/cifar10 (columns img and label) in one folder and name it by data_dir or "
            "MOE_POSTERIOR_DATA, or allow downloads"
        ) from error
    rows = rows.cast_column("img", datasets.Image(decode=False)).select(range(min(limit or len(rows), len(rows))))
    return _decode([image["bytes"] for image in rows["img"]]), torch.tensor(rows["label"], dtype=torch.int64)
