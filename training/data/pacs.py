"""PACS: photographs, art paintings, cartoons and sketches of the same seven things; one domain is held out and tested on."""

import io
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

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
from moe_posterior.training.data.features import fit_projection

__all__ = ["PACS"]

PIXELS_FILE = "pacs.parquet"
FEATURES_FILE = "features_efficientnet_lite0.npz"
FEATURES = 1280
SUFFIXES = (".jpg", ".jpeg", ".png")


class Rows(NamedTuple):
    """All four domains in the stored order; images may be encoded still."""

    inputs: Tensor | list[bytes]  # (N, D) features, or N encoded images
    domains: Tensor  # (N,) int64
    labels: Tensor  # (N,) int64


class PACS(ClassificationData):
    """Leave one domain out: train and validate on three domains, test on the whole fourth.

    Inputs are images, or the features of a pretrained network, `features_efficientnet_lite0.npz` (arrays `features` (n, 1280), `domain`
    and `label` as numbers in the order below). Images come from the first of these that is there: `pacs.parquet` in the
    hub's schema (`image {bytes, path}`, `domain`, `label`); folders `DOMAIN/LABEL/*.jpg`; the hub. The folders looked at are
    `root`; if that is not given, the environment variable MOE_POSTERIOR_DATA (its subfolder `pacs`, then itself); if that is
    not set, `../shared/data/pacs`.

    The split of the source domains is drawn per domain and class; validation rows are never augmented. The held-out domain is
    the shift (`test_shift`), so all test rows are hard: no row of their domain was trained on. Batches carry the domain as "group".

    Args:
        root: folder of the files; None looks in the places above.
        held_out: the domain to test on: art_painting, cartoon, photo or sketch.
        inputs: "features" or "pixels".
        size: pixels a side; images of another size are resized. 128 is what half a gigabyte holds; pretrained networks want 224.
        standardise: features to zero mean and unit variance over the training rows; pixels stay as they are.
        project: number of principal axes of the training rows' features to keep; None keeps all features.
        augment: random crop (an eighth of padding) and horizontal flip of training images.
        val_fraction: share of the source rows kept for validation.
        limit: keep only the first so many rows of each domain and class; for smoke tests.
        batch_size: rows of a batch; 128 as in the paper.
        seed: of split, order and augmentation.
        hub_name: data set the hub is asked for, or a local folder that `datasets.load_dataset` reads; None never asks.

    Shapes: input (N, 3, size, size) float in [0, 1], or (N, 1280) float, (N, project) if projected.

    Raises:
        MissingDataError: the files are not found.
        InvalidArgumentError: an unknown domain, class or kind of input, or a number out of its range.

    Source: Li et al., *Deeper, Broader and Artier Domain Generalization*, 2017; protocol as in *Toward Calibrated
    Mixture-of-Experts Under Distribution Shift*, 2026.
    """

    name = "PACS"
    class_names = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
    domain_names = ("art_painting", "cartoon", "photo", "sketch")
    group_names = domain_names

    def __init__(
        self,
        root: str | None = None,
        held_out: str = "sketch",
        inputs: str = "features",
        size: int = 128,
        standardise: bool = True,
        project: int | None = None,
        augment: bool = True,
        val_fraction: float = 0.1,
        limit: int | None = None,
        batch_size: int = 128,
        seed: int = 42,
        hub_name: str | None = "flwrlabs/pacs",
    ) -> None:
        _require_one_of("held_out", held_out, self.domain_names)
        _require_one_of("inputs", inputs, ("features", "pixels"))
        if not 0 < val_fraction < 1:
            raise InvalidArgumentError(f"val_fraction must lie in (0, 1); got {val_fraction}")
        for argument, value in (("size", size), ("limit", limit), ("project", project)):
            if value is not None and value < 1:
                raise InvalidArgumentError(f"{argument} must be at least 1; got {value}")
        pixels = inputs == "pixels"
        if pixels and project is not None:
            raise InvalidArgumentError(f"project must be None for pixels; got {project}")
        super().__init__(
            batch_size, seed, partial(crop_and_flip, padding=max(1, size // 8)) if pixels and augment else None
        )
        self.root, self.hub_name = root, hub_name
        self.held_out, self.inputs = held_out, inputs
        self.test_shift = f"held-out {held_out}"
        self.size, self.standardise, self.project = size, standardise, project
        self.val_fraction, self.limit = val_fraction, limit
        self.input_shape = (3, size, size) if pixels else (project or FEATURES,)

    def load(self) -> Mapping[str, Split]:
        """The splits; images stay bytes.

        Raises:
            MissingDataError: the files are not found. InvalidArgumentError: they hold unknown domains or classes.
        """
        rows = self._read()
        kept = self._limited(rows)
        target = self.domain_names.index(self.held_out)
        source = kept[rows.domains[kept] != target]
        strata = rows.domains[source] * self.num_classes + rows.labels[source]
        shares = (1 - self.val_fraction, self.val_fraction)
        train, val = stratified_split(strata, shares, generator_for("split", self.seed))
        if not len(train) or not len(val):
            raise InvalidArgumentError(
                f"val_fraction must leave rows to train and to validate on; got {len(train)} and {len(val)} at {self.val_fraction}"
            )
        parts = {"train": source[train], "val": source[val], "test": kept[rows.domains[kept] == target]}
        if isinstance(rows.inputs, list):
            encoded = rows.inputs
            inputs = {part: _decode([encoded[row] for row in numbers], self.size) for part, numbers in parts.items()}
        else:
            # Fitted on training rows alone: the held-out domain must leave no trace in what it is tested with.
            fitted = fit_projection(rows.inputs[parts["train"]], self.standardise, self.project)
            inputs = {part: fitted(rows.inputs[numbers]) for part, numbers in parts.items()}
        scale = 255 if self.inputs == "pixels" else None
        return {
            part: Split(inputs[part], rows.labels[numbers], scale, groups=rows.domains[numbers])
            for part, numbers in parts.items()
        }

    def _limited(self, rows: Rows) -> Tensor:  # (n,) int64
        strata = rows.domains * self.num_classes + rows.labels
        if self.limit is None:
            return torch.arange(len(strata))
        return (
            torch.cat([(strata == stratum).nonzero().flatten()[: self.limit] for stratum in strata.unique()])
            .sort()
            .values
        )

    def domains(self, part: str) -> Tensor:  # (n,) int64
        """The domain of each row of a split, a number into `domain_names`.

        It lets a shift be simulated without the test domain: fit on two source domains, measure on the third.
        """
        groups = self.split(part).groups
        assert groups is not None
        return groups

    def subsets(self) -> dict[str, Tensor]:
        """Masks over the test rows: overall, and hard, which here is the same."""
        overall = super().subsets()["overall"]
        return {"overall": overall, "hard": overall.clone()}

    def source_files(self) -> list[Path]:
        """The files the rows are read from, as far as they are single files."""
        wanted = FEATURES_FILE if self.inputs == "features" else PIXELS_FILE
        return [path for folder in self._folders() if (path := folder / wanted).is_file()][:1]

    def _folders(self) -> list[Path]:
        return candidate_folders("pacs", self.root)

    def _read(self) -> Rows:
        if files := self.source_files():
            return self._read_features(files[0]) if self.inputs == "features" else self._read_parquet(files[0])
        if self.inputs == "features":
            places = ", ".join(str(folder / FEATURES_FILE) for folder in self._folders())
            raise MissingDataError(
                f"the features of PACS are not at {places}; put {FEATURES_FILE} (arrays features, domain, label) there, name its "
                "folder by root or MOE_POSTERIOR_DATA, or cache others: moe-posterior cache --data PACS --data.inputs pixels"
            )
        for folder in self._folders():
            if any((folder / domain).is_dir() for domain in self.domain_names):
                return self._read_folders(folder)
        return self._read_hub()

    def _read_features(self, path: Path) -> Rows:
        with decoding(path, "a file of features"), np.load(path, allow_pickle=False) as stored:
            features, domains, labels = (torch.from_numpy(stored[name]) for name in ("features", "domain", "label"))
        if not len(features) == len(domains) == len(labels) or features.ndim != 2:
            raise InvalidArgumentError(
                f"{path} must hold features (n, F), domain (n,) and label (n,); got {tuple(features.shape)}, "
                f"{tuple(domains.shape)} and {tuple(labels.shape)}"
            )
        self.input_shape = (self.project or features.shape[1],)
        return Rows(features, self._numbers(domains, len(self.domain_names)), self._numbers(labels, self.num_classes))

    def _read_parquet(self, path: Path) -> Rows:
        import pyarrow.parquet

        with decoding(path, "a file of images as the hub's flwrlabs/pacs"):
            table = pyarrow.parquet.read_table(path, columns=["image", "domain", "label"])
            encoded = table["image"].combine_chunks().field("bytes").to_pylist()
            domains, labels = table["domain"].to_pylist(), table["label"].to_pylist()
        return self._rows(encoded, domains, labels)

    def _read_folders(self, folder: Path) -> Rows:
        if absent := [name for name in self.domain_names if not (folder / name).is_dir()]:
            raise MissingDataError(f"{folder} must hold a folder for each domain of PACS; {absent} are missing")
        files = [
            (path, domain, label)
            for domain in self.domain_names
            for label, name in enumerate(self.class_names)
            for path in sorted((folder / domain / name).glob("*"))
            if path.suffix.lower() in SUFFIXES
        ]
        if empty := [name for name in self.domain_names if name not in {domain for _, domain, _ in files}]:
            raise MissingDataError(f"{folder} must hold images DOMAIN/LABEL/*.jpg; there are none in {empty}")
        return self._rows(
            [path.read_bytes() for path, _, _ in files], [row[1] for row in files], [row[2] for row in files]
        )

    def _read_hub(self) -> Rows:
        import datasets

        try:
            if self.hub_name is None:
                raise OSError("hub_name is None")
            rows = datasets.load_dataset(self.hub_name, split="train")
        except (OSError, ValueError) as error:  # offline, unreachable, unknown, or without this split
            places = ", ".join(str(folder) for folder in self._folders())
            raise MissingDataError(
                f"the images of PACS are neither in {places} nor on the hub as {self.hub_name!r} ({error}); put {PIXELS_FILE} (columns "
                "image, domain and label, as the hub's flwrlabs/pacs) or folders DOMAIN/LABEL/*.jpg there, name the folder by "
                "root or MOE_POSTERIOR_DATA, or allow downloads"
            ) from error
        rows = rows.cast_column("image", datasets.Image(decode=False))
        return self._rows([image["bytes"] for image in rows["image"]], list(rows["domain"]), list(rows["label"]))

    def _rows(self, encoded: list[bytes], domains: Sequence[str], labels: Sequence[int]) -> Rows:
        if unknown := sorted(set(domains) - set(self.domain_names)):
            raise InvalidArgumentError(f"domains must be among {self.domain_names}; got {unknown}")
        numbers = torch.tensor([self.domain_names.index(domain) for domain in domains])
        return Rows(encoded, numbers, self._numbers(torch.tensor(labels), self.num_classes))

    def _numbers(self, values: Tensor, count: int) -> Tensor:  # (N,) -> (N,) int64
        if len(values) and not 0 <= int(values.min()) <= int(values.max()) < count:
            raise InvalidArgumentError(
                f"domains and labels must lie in 0..{count - 1}; got {int(values.min())}..{int(values.max())}"
            )
        return values.long()


def _require_one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise InvalidArgumentError(f"{name} must be one of {tuple(known)}; got {value!r}")


def _decode(encoded: Sequence[bytes], size: int) -> Tensor:  # (N, 3, size, size) uint8
    pixels = np.empty((len(encoded), size, size, 3), dtype=np.uint8)
    for row, stored in enumerate(encoded):
        image = Image.open(io.BytesIO(stored)).convert("RGB")
        pixels[row] = np.asarray(
            image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BICUBIC)
        )
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
