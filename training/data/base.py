"""The base of all classification data sets: in-memory splits, reproducible batches, and shifted copies of the test rows.

Dimensions: N rows of a batch or split; an input row has any shape. The data are small, so a split is one tensor in its stored
dtype and a batch is one indexing operation; no Python runs per row.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from moe_posterior.errors import InvalidArgumentError

__all__ = [
    "Batch",
    "BatchKey",
    "ClassificationData",
    "EpochBatches",
    "EvaluationSet",
    "Split",
    "candidate_folders",
    "generator_for",
    "stratified_split",
]

CLEAN = "clean"
DATA_VARIABLE = "MOE_POSTERIOR_DATA"


class Batch(TypedDict):
    """What every loader yields."""

    input: Tensor  # (N, ...)
    target: Tensor  # (N,) int64
    index: Tensor  # (N,) int64, row number within the split
    group: NotRequired[Tensor]  # (N,) int64, where the split knows groups


@dataclass(frozen=True)
class EvaluationSet:
    """The test rows under one shift; order and labels are the same in all evaluation sets of one data module."""

    shift: str  # `test_name` for the stored test rows, else the name of a shift
    severity: int  # 0 for the stored test rows, 1 (mild) to 5
    loader: "DataLoader[Batch]"


@dataclass(frozen=True)
class BatchKey:
    """Which rows a batch holds, and what its randomness is seeded with."""

    rows: Tensor  # (N,) int64
    epoch: int
    number: int  # counts the batches of all processes within the epoch


Augmentation = Callable[[Tensor, torch.Generator], Tensor]


def generator_for(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by all the parts and nothing else.

    Parts are hashed together, so that ("noise", 1, 23) and ("noise", 12, 3) share nothing; hash() would change between processes.

    >>> first, second = generator_for("shuffle", 42, 0), generator_for("shuffle", 42, 0)
    >>> torch.equal(torch.rand(3, generator=first), torch.rand(3, generator=second))
    True
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def candidate_folders(subfolder: str, data_dir: str | Path | None = None) -> list[Path]:
    """Folders in which a data set may be, the most specific first; they need not exist.

    These are `data_dir`, else the folder named by the environment variable MOE_POSTERIOR_DATA (its subfolder, then itself), else
    `../shared/data/<subfolder>` beside the project's root.
    """
    if data_dir is not None:
        return [Path(data_dir)]
    root = os.environ.get(DATA_VARIABLE)
    if root:
        return [Path(root) / subfolder, Path(root)]
    return [Path(__file__).resolve().parents[3] / "shared" / "data" / subfolder]


def stratified_split(
    targets: Tensor,  # (N,) int64
    fractions: Sequence[float],
    generator: torch.Generator,
) -> list[Tensor]:  # one (n,) int64 per fraction
    """Disjoint row numbers, in rising order, such that every part holds its fraction of every class.

    Args:
        targets: class of each row.
        fractions: share of each part, non-negative, summing to at most 1; rows left over belong to no part.
        generator: decides which rows go where.

    Rounding is to the nearest row of cumulated shares within a class, so fractions that sum to 1 use every row.

    Raises:
        InvalidArgumentError: a fraction is negative or they sum to more than 1.
    """
    if min(fractions) < 0 or sum(fractions) > 1 + 1e-9:
        raise InvalidArgumentError(f"fractions must be non-negative and sum to at most 1; got {tuple(fractions)}")
    bounds = torch.tensor([0.0, *fractions], dtype=torch.float64).cumsum(0)
    parts: list[list[Tensor]] = [[] for _ in fractions]
    for label in targets.unique():
        rows = (targets == label).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        cuts = (bounds * len(rows)).round().long().tolist()
        for part, start, stop in zip(parts, cuts[:-1], cuts[1:], strict=True):
            part.append(rows[start:stop])
    return [torch.cat(part).sort().values for part in parts]


class Split(Dataset[Batch]):
    """Rows held in memory, indexed a batch at a time.

    Args:
        inputs: (N, ...) in the stored dtype; uint8 keeps images at a quarter of their float size.
        targets: (N,) int64.
        scale: a float batch is ``inputs / scale``; 255 for uint8 images, None leaves the dtype alone.
        augmentation: applied to the stored rows of each batch before scaling, with a generator seeded by (seed, epoch, batch).
        seed: of the augmentation.
        groups: (N,) int64, a known subpopulation of each row, for objectives and reports over groups.

    Raises:
        InvalidArgumentError: inputs, targets and groups differ in length.
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        scale: float | None = None,
        augmentation: Augmentation | None = None,
        seed: int = 42,
        groups: Tensor | None = None,
    ) -> None:
        for name, values in (("targets", targets), ("groups", groups)):
            if values is not None and len(inputs) != len(values):
                raise InvalidArgumentError(
                    f"{name} must have one entry per input row, {len(inputs)}; got {len(values)}"
                )
        self.inputs = inputs
        self.targets = targets
        self.scale = scale
        self.augmentation = augmentation
        self.seed = seed
        self.groups = groups

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, key: BatchKey) -> Batch:
        inputs = self.inputs[key.rows]
        if self.augmentation is not None:
            inputs = self.augmentation(inputs, generator_for("augmentation", self.seed, key.epoch, key.number))
        if self.scale is not None:
            inputs = inputs.float() / self.scale
        batch: Batch = {"input": inputs, "target": self.targets[key.rows], "index": key.rows}
        if self.groups is not None:
            batch["group"] = self.groups[key.rows]
        return batch


class EpochBatches(DistributedSampler[BatchKey]):
    """Batches of row numbers, in an order that depends on (seed, epoch) alone; ``set_epoch`` picks the epoch.

    It is a DistributedSampler so that Lightning keeps it instead of wrapping it, which would hide ``set_epoch``. With several
    processes each takes every so-many-th row. While shuffling the last rows are filled up from the first ones, since unequal numbers
    of batches would stall gradient exchange; in evaluation no row is repeated.

    Args:
        dataset: the split; only its length matters.
        batch_size: rows of a batch; the last one may be smaller.
        shuffle: a new order each epoch; else the stored order.
        seed: of the order.
    """

    def __init__(self, dataset: Split, batch_size: int, shuffle: bool, seed: int) -> None:
        if batch_size < 1:
            raise InvalidArgumentError(f"batch_size must be at least 1; got {batch_size}")
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        world_size = torch.distributed.get_world_size() if distributed else 1
        rank = torch.distributed.get_rank() if distributed else 0
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed)
        self.batch_size = batch_size

    def _rows(self) -> Tensor:
        count = len(self.dataset)  # type: ignore[arg-type]
        if not self.shuffle:
            return torch.arange(count)[self.rank :: self.num_replicas]
        rows = torch.randperm(count, generator=generator_for("shuffle", self.seed, self.epoch))
        rows = torch.cat([rows, rows[: -count % self.num_replicas]])
        return rows[self.rank :: self.num_replicas]

    def __iter__(self) -> Iterator[BatchKey]:
        for step, rows in enumerate(self._rows().split(self.batch_size)):
            if len(rows):
                yield BatchKey(rows, self.epoch, step * self.num_replicas + self.rank)

    def __len__(self) -> int:
        count = len(self.dataset)  # type: ignore[arg-type]
        if self.shuffle:
            count += -count % self.num_replicas
        rows = len(range(self.rank, count, self.num_replicas))
        return -(-rows // self.batch_size)


class ClassificationData(lightning.LightningDataModule):
    """Base of the data modules: splits in, loaders, shifted evaluation sets and hard subsets out.

    A child sets `name`, `class_names` and `input_shape`, returns the three splits in `load`, and may say how test inputs shift
    (`known_shifts`, `default_shifts`, `shifted`) and which test rows are hard (`subsets`). Where the stored test rows are not
    distributed as the training rows, `test_shift` names that shift; reports then call them by it and never "clean".

    Args:
        batch_size: rows of a batch, in every loader.
        seed: of the splits, the order of training rows, the augmentation and the shifts.
        augmentation: of training batches only; see `Split`.
    """

    name: str
    class_names: tuple[str, ...]
    input_shape: tuple[int, ...]
    group_names: tuple[str, ...] = ()  # of the groups that splits and batches carry
    membership_names: tuple[str, ...] = ()  # of overlapping subpopulations, the columns of `groups`
    test_shift: str | None = None  # of the stored test rows; None: distributed as the training rows
    known_shifts: tuple[str, ...] = ()
    default_shifts: tuple[str, ...] = ()

    def __init__(self, batch_size: int = 128, seed: int = 42, augmentation: Augmentation | None = None) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.seed = seed
        self.augmentation = augmentation
        self.splits: dict[str, Split] = {}

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    @property
    def test_name(self) -> str:
        """What the stored test rows are called in reports: "clean", or the shift that they are under."""
        return CLEAN if self.test_shift is None else self.test_shift

    @property
    def num_groups(self) -> int:
        """How many groups the batches tell apart."""
        return len(self.group_names)

    def load(self) -> Mapping[str, Split]:
        """The splits "train", "val" and "test"; called once."""
        raise NotImplementedError(f"{type(self).__name__} must implement load()")

    def shifted(self, test: Split, shift: str, severity: int) -> Split:
        """The test rows under one of `known_shifts`; the same rows in the same order."""
        raise NotImplementedError(f"{type(self).__name__} must implement shifted() for its known_shifts")

    def subsets(self) -> dict[str, Tensor]:
        """Boolean masks over the test rows, (n_test,) each: "overall", and where the data know them "hard" and "easy"."""
        return {"overall": torch.ones(len(self.split("test")), dtype=torch.bool)}

    def groups(self, part: str) -> Tensor:  # (n, G) bool
        """Which of the subpopulations in `membership_names` each row of a split belongs to."""
        return torch.zeros(len(self.split(part)), 0, dtype=torch.bool)

    def setup(self, stage: str | None = None) -> None:
        """Load the splits, once; called by the Trainer and, where there is none, on first use."""
        if not self.splits:
            self.splits = dict(self.load())

    def split(self, part: str) -> Split:
        """The rows of "train", "val" or "test" as stored."""
        self.setup()
        return self.splits[part]

    def loader(self, split: Split, shuffle: bool = False) -> "DataLoader[Batch]":
        """Batches of a split, reproducible given (seed, epoch)."""
        sampler = EpochBatches(split, self.batch_size, shuffle, self.seed)
        # batch_size=None hands each key of the sampler to the split as it is: the split answers with a whole batch.
        return DataLoader(split, sampler=sampler, batch_size=None, num_workers=0)

    def train_dataloader(self) -> "DataLoader[Batch]":
        """Training rows, shuffled and augmented anew each epoch."""
        stored = self.split("train")
        split = Split(stored.inputs, stored.targets, stored.scale, self.augmentation, self.seed, stored.groups)
        return self.loader(split, shuffle=True)

    def train_evaluation_dataloader(self) -> "DataLoader[Batch]":
        """Training rows in stored order without augmentation: what evidence is rebuilt from."""
        return self.loader(self.split("train"))

    def val_dataloader(self) -> "DataLoader[Batch]":
        """Validation rows in stored order without augmentation."""
        return self.loader(self.split("val"))

    def test_dataloader(self) -> "DataLoader[Batch]":
        """Test rows in stored order, unshifted."""
        return self.loader(self.split("test"))

    def evaluation_sets(
        self, shifts: Sequence[str] | None = None, severities: Sequence[int] = (1, 2, 3, 4, 5)
    ) -> Iterator[EvaluationSet]:
        """The stored test rows, then each shift at each severity; each is built when it is asked for and held no longer.

        Args:
            shifts: names; by default `default_shifts`. An empty sequence leaves the stored rows alone.
            severities: 1 (mild) to 5 (severe).

        Raises:
            InvalidArgumentError: an unknown shift or a severity outside 1..5.
        """
        names = self.default_shifts if shifts is None else tuple(shifts)
        # Checked before the first set is built: evaluating the sets before a misspelt one may take minutes.
        if unknown := [name for name in names if name not in self.known_shifts]:
            raise InvalidArgumentError(f"shifts of {self.name} must be among {self.known_shifts}; got {unknown}")
        if wrong := [severity for severity in severities if severity not in range(1, 6)]:
            raise InvalidArgumentError(f"severities must lie in 1..5; got {wrong}")
        return self._build_evaluation_sets(names, severities)

    def _build_evaluation_sets(self, shifts: Sequence[str], severities: Sequence[int]) -> Iterator[EvaluationSet]:
        test = self.split("test")
        yield EvaluationSet(self.test_name, 0, self.loader(test))
        for shift in shifts:
            for severity in severities:
                yield EvaluationSet(shift, severity, self.loader(self.shifted(test, shift, severity)))
