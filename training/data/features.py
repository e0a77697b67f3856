"""Features instead of raw inputs: how they are standardised and projected, and the data module that reads a cache of them.

Dimensions: N rows, D features as stored, P features kept by a projection.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from moe_posterior.errors import InvalidArgumentError
from moe_posterior.training.data import manifest
from moe_posterior.training.data.base import ClassificationData, Split

__all__ = ["CachedFeatures", "PassThrough", "Projection", "fit_projection"]


@dataclass(frozen=True, eq=False)
class Projection:
    """An affine map of feature rows: ``((x - mean) / scale) @ axes``."""

    mean: Tensor  # (D,) float64
    scale: Tensor  # (D,) float64
    axes: Tensor | None  # (D, P) float64, orthonormal columns; None keeps all features

    def __call__(self, features: Tensor) -> Tensor:  # (N, D) -> (N, P) float32
        """The mapped rows."""
        rows = (features.double() - self.mean) / self.scale
        return (rows if self.axes is None else rows @ self.axes).float()


def fit_projection(
    features: Tensor,  # (N, D)
    standardise: bool = True,
    project: int | None = None,
) -> Projection:
    """The standardisation and principal axes of the given rows, which should be training rows only.

    Args:
        features: any float type; computed in float64, since half precision overflows in sums of squares.
        standardise: divide by the standard deviation of each feature (constant features by 1); else only centre, and only where
            features are projected.
        project: P, principal axes to keep, those of the largest variance first; None keeps the features themselves.

    The sign of an axis is arbitrary: it is chosen such that the entry of the largest magnitude is positive.

    Raises:
        InvalidArgumentError: project is not in 1..min(N, D).

    Source: Pearson 1901, *On Lines and Planes of Closest Fit to Systems of Points in Space*.

    >>> rows = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]])
    >>> fit_projection(rows, standardise=False, project=1)(rows).flatten().round(decimals=3).tolist()
    [-2.828000068664551, 0.0, 2.828000068664551]
    """
    rows = features.double()
    if project is not None and not 1 <= project <= min(rows.shape):
        raise InvalidArgumentError(
            f"project must lie in 1..{min(rows.shape)} (rows, features) or be None; got {project}"
        )
    centred = standardise or project is not None
    mean = rows.mean(dim=0) if centred else rows.new_zeros(rows.shape[1])
    rows = rows - mean
    scale = torch.ones_like(mean)
    if standardise:
        deviation = rows.square().mean(dim=0).sqrt()
        scale = torch.where(deviation > 0, deviation, scale)
    if project is None:
        return Projection(mean, scale, None)
    rows = rows / scale
    _, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))  # eigenvalues rise
    axes = vectors.flip(1)[:, :project]
    largest = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True))
    return Projection(mean, scale, (axes * largest.sign()).contiguous())


class PassThrough(nn.Module):
    """The backbone of data that are features already.

    Args:
        out_features: F, the width of the features.

    Shapes: (N, F) -> (N, F).

    >>> PassThrough(3)(torch.ones(1, 3))
    tensor([[1., 1., 1.]])
    """

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features

    def forward(self, features: Tensor) -> Tensor:  # (N, F) -> (N, F)
        """The features themselves.

        Raises:
            InvalidArgumentError: they are not (N, out_features).
        """
        if features.ndim != 2 or features.shape[1] != self.out_features:
            raise InvalidArgumentError(
                f"features must be of shape (N, {self.out_features}); got {tuple(features.shape)}"
            )
        return features

    def extra_repr(self) -> str:
        """Shown when printed."""
        return f"out_features={self.out_features}"


class CachedFeatures(ClassificationData):
    """What ``moe-posterior cache`` stored: the features of a frozen backbone, so that heads train in seconds.

    Splits, labels, groups, hard subsets and shifts are those of the data module that was cached; the cached severities of a shift can
    be evaluated and no others. Nothing is augmented: features of the training rows were computed from the stored inputs.

    A cache is refused if it is unfinished, if one of its files is damaged, if a file that the data were read from has
    changed since, or if it belongs to other data or another backbone than those given here.

    Args:
        folder: as given to ``moe-posterior cache --out``.
        data: if given, the cache must hold the features of these data; reads them once to compare.
        backbone: if given, the cache must have been made by this network with these weights.
        standardise: to zero mean and unit variance over the training rows.
        project: number of principal axes of the training rows to keep; None keeps all features.
        batch_size: rows of a batch.
        seed: of the order of training rows.

    Shapes: input (N, F) float32.

    Raises:
        MissingDataError: the folder holds no cache, or an unfinished one.
        InvalidArgumentError: the cache is stale, damaged, or belongs to something else.
    """

    def __init__(
        self,
        folder: str,
        data: ClassificationData | None = None,
        backbone: nn.Module | None = None,
        standardise: bool = False,
        project: int | None = None,
        batch_size: int = 128,
        seed: int = 42,
    ) -> None:
        super().__init__(batch_size, seed)
        self.folder = Path(folder)
        self.manifest = manifest.read(self.folder)
        described = self.manifest["data"]
        self.name = described["name"]
        self.class_names = tuple(described["class_names"])
        self.group_names = tuple(described["group_names"])
        self.membership_names = tuple(described["membership_names"])
        self.test_shift = described.get("test_shift")
        self.input_shape = (project or self.manifest["features"],)
        self.known_shifts = tuple(dict.fromkeys(shift for shift, _ in manifest.shifts(self.manifest)))
        self.default_shifts = self.known_shifts
        self.standardise = standardise
        self.project = project
        self._data, self._backbone = data, backbone
        self._projection: Projection | None = None

    def load(self) -> Mapping[str, Split]:
        """The cached splits as float32.

        Raises:
            MissingDataError: the cache is unfinished. InvalidArgumentError: it is stale, damaged or of something else.
        """
        manifest.require_current(self.folder, self.manifest, self._data, self._backbone)
        stored = {part: manifest.load_part(self.folder, self.manifest, part) for part in manifest.SPLITS}
        if self.standardise or self.project is not None:
            self._projection = fit_projection(stored["train"]["features"], self.standardise, self.project)
        return {part: self._split(arrays) for part, arrays in stored.items()}

    def _split(self, arrays: Mapping[str, Tensor]) -> Split:
        features = arrays["features"]
        inputs = features.float() if self._projection is None else self._projection(features)
        return Split(inputs, arrays["target"], groups=arrays.get("group"))

    def shifted(self, test: Split, shift: str, severity: int) -> Split:
        """The cached features of the shifted test rows.

        Raises:
            InvalidArgumentError: this shift was not cached at this severity.
        """
        if (shift, severity) not in manifest.shifts(self.manifest):
            raise InvalidArgumentError(
                f"severities of {shift} must be among the cached ones, {manifest.shifts(self.manifest)}; got {severity}"
            )
        return self._split(manifest.load_part(self.folder, self.manifest, manifest.shift_part(shift, severity)))

    def subsets(self) -> dict[str, Tensor]:
        """The masks of the data module that was cached."""
        return manifest.load_part(self.folder, self.manifest, manifest.SUBSETS)

    def domains(self, part: str) -> Tensor:  # (n,) int64
        """The group of each row, a number into `group_names`.

        Raises:
            InvalidArgumentError: the data know no groups.
        """
        groups = self.split(part).groups
        if groups is None:
            raise InvalidArgumentError(f"domains needs data that know groups; {self.name} does not")
        return groups

    def groups(self, part: str) -> Tensor:  # (n, G) bool
        """Membership of each row in the groups `membership_names`, which may overlap.

        Raises:
            InvalidArgumentError: the data know no such groups.
        """
        arrays = manifest.load_part(self.folder, self.manifest, part)
        if "membership" not in arrays:
            raise InvalidArgumentError(f"groups needs data with overlapping groups; {self.name} has none")
        return arrays["membership"]
