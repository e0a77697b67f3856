"""The study's data: images or cached features, groups for the objectives that use them, and rows left out to simulate a shift.

Dimensions: n rows, D hidden size.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache

import torch
from torch import Tensor

from moe_posterior.errors import InvalidArgumentError
from moe_posterior.training.data import CAD, CIFAR10H, PACS, ClassificationData
from moe_posterior.training.data.base import Split, generator_for

__all__ = ["CORRUPTED_SPLIT", "SIMULATED_SPLIT", "SOURCES", "Source"]

SIMULATED_SPLIT = "simulated"
CORRUPTED_SPLIT = "corrupted"
BATCH_SIZE = 128  # as in the paper
TRAIN_FRACTION = 0.4  # of CIFAR-10's 50,000 training images: 18,000 to train on, 2,000 for validation
CORRUPTED_ROWS, SEVERITY = 2000, 3  # test images under each corruption


class Source(ClassificationData):
    """Another module's splits with other groups, and the training and validation rows of one part moved to a split of their own.

    Args:
        data: the module.
        groups: of a split's rows, by the split's name.
        left_out: which rows of a split are left out, by the split's name; None leaves out none.

    Raises:
        InvalidArgumentError: everything would be left out.
    """

    def __init__(
        self,
        data: ClassificationData,
        groups: Callable[[str], Tensor],
        group_names: tuple[str, ...],
        left_out: Callable[[str], Tensor] | None = None,
    ) -> None:
        super().__init__(data.batch_size, data.seed)
        self.name, self.class_names, self.group_names = data.name, data.class_names, group_names
        self.test_shift = data.test_shift
        self._data, self._groups, self._left_out = data, groups, left_out

    def load(self) -> Mapping[str, Split]:
        """Train, val and test, and what was left out."""
        whole = {part: self._grouped(part) for part in ("train", "val", "test")}
        if self._left_out is None:
            return whole
        masks = {part: self._left_out(part) for part in ("train", "val")}
        if any(bool(mask.all()) for mask in masks.values()):
            raise InvalidArgumentError(f"left_out must leave rows to train on; it takes all of {self.name}")
        removed = [_rows(whole[part], masks[part]) for part in masks]
        inputs, targets = (torch.cat([getattr(split, name) for split in removed]) for name in ("inputs", "targets"))
        kept = {part: _rows(whole[part], ~mask) for part, mask in masks.items()}
        return {**kept, "test": whole["test"], SIMULATED_SPLIT: Split(inputs, targets)}

    def subsets(self) -> dict[str, Tensor]:
        """Masks over the test rows, as the module has them."""
        return self._data.subsets()

    def _grouped(self, part: str) -> Split:
        split = self._data.split(part)
        return Split(split.inputs, split.targets, split.scale, groups=self._groups(part))


def _rows(split: Split, mask: Tensor) -> Split:
    groups = None if split.groups is None else split.groups[mask]
    return Split(split.inputs[mask], split.targets[mask], split.scale, groups=groups)


@lru_cache(maxsize=2)  # the cells of one setting and seed share their rows
def _pacs(setting: str, seed: int, inner: str | None) -> ClassificationData:
    data = PACS(held_out=setting, batch_size=BATCH_SIZE, seed=seed)
    left_out = None
    if inner is not None:
        number = data.domain_names.index(inner)

        def left_out(part: str) -> Tensor:
            return data.domains(part) == number

    return Source(data, data.domains, data.domain_names, left_out)


@lru_cache(maxsize=2)
def _comments(setting: str, seed: int, inner: str | None) -> ClassificationData:
    data = CAD(inputs="embeddings", standardise=True, batch_size=BATCH_SIZE, seed=seed)
    left_out = None
    if inner is not None:
        column = data.membership_names.index(inner)

        def left_out(part: str) -> Tensor:
            return data.groups(part)[:, column]

    def groups(part: str) -> Tensor:  # label and identity, as in WILDS
        split = data.split(part)
        assert split.groups is not None
        return 2 * split.groups + split.targets

    names = tuple(f"{label}, {identity}" for identity in data.group_names for label in data.class_names)
    return Source(data, groups, names, left_out)


class _Images(CIFAR10H):
    """CIFAR-10H whose groups are its labels, with test images under each default corruption as one more split."""

    @property
    def group_names(self) -> tuple[str, ...]:  # type: ignore[override]  # no groups but the labels are known
        """The classes."""
        return self.class_names

    def load(self) -> Mapping[str, Split]:
        """Train, val, test, and the corrupted images."""
        splits = super().load()
        rows = torch.randperm(len(splits["test"]), generator=generator_for("corrupted", self.seed))[:CORRUPTED_ROWS]
        test = Split(splits["test"].inputs[rows], splits["test"].targets[rows], scale=255)
        parts = [self.shifted(test, shift, SEVERITY) for shift in self.default_shifts]
        corrupted = Split(
            torch.cat([part.inputs for part in parts]), torch.cat([part.targets for part in parts]), scale=255
        )
        with_groups = {**splits, CORRUPTED_SPLIT: corrupted}
        return {
            name: Split(split.inputs, split.targets, split.scale, groups=split.targets)
            for name, split in with_groups.items()
        }


@lru_cache(maxsize=2)
def _cifar10h(setting: str, seed: int, inner: str | None) -> ClassificationData:
    return _Images(batch_size=BATCH_SIZE, seed=seed, train_fraction=TRAIN_FRACTION)


SOURCES: dict[str, Callable[[str, int, str | None], ClassificationData]] = {
    "pacs": _pacs,
    "comments": _comments,
    "cifar10h": _cifar10h,
}
