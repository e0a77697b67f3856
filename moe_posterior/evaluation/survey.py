"""The first pass: how many rows every set has, which sets hold the same rows, and which rows are held out for calibration.

Dimensions: n rows of a piece.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moe_posterior.errors import InvalidArgumentError
from moe_posterior.evaluation.priority import Smallest, hashed, mixed, priorities

__all__ = ["MOST_HELD_OUT", "Facts", "Key", "Plan", "Survey", "place_text", "planned"]

MOST_HELD_OUT = 50_000
LEAST_ROWS = 40  # of the base set, below which nothing is held out: the rest would say nothing
PURPOSE = "hold out"

Key = tuple[str, str, int]  # model, shift, severity


@dataclass(frozen=True)
class Facts:
    """What is known of a set before its predictions are read."""

    n: int
    digest: int | None  # of its rows: labels in their order, or ids with labels; None where neither is known
    lowest: np.ndarray  # the smallest hold-out priorities
    identified: bool = False  # rows have ids, so that those held out are known in every set


class Survey:
    """Facts of one set, gathered piece by piece."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._n = 0
        self._digest = np.uint64(0)
        self._known = True
        self._identified = False
        self._smallest = Smallest(MOST_HELD_OUT)

    def add(self, n: int, target: np.ndarray | None, row: np.ndarray | None) -> None:  # (n,) labels, (n,) uint64 ids
        """Take note of some more rows."""
        ids = np.arange(self._n, self._n + n, dtype=np.uint64) if row is None else row
        self._n += n
        self._identified = row is not None
        self._smallest.offer(priorities(ids, self.seed, PURPOSE))
        self._known = self._known and (target is not None or row is not None)
        with np.errstate(over="ignore"):
            each = mixed(ids)
            if target is not None:
                each = mixed(each ^ _numbers(target))
            self._digest = self._digest + each.sum(dtype=np.uint64)

    def facts(self) -> Facts:
        """What was found."""
        return Facts(self._n, int(self._digest) if self._known else None, self._smallest.found(), self._identified)


@dataclass(frozen=True)
class Plan:
    """Which rows of which sets are held out, and how the sets hang together."""

    base: tuple[str, int]  # shift, severity of the stored test rows
    sets: tuple[tuple[str, int], ...]  # the base first
    models: tuple[str, ...]
    facts: Mapping[Key, Facts]
    same: frozenset[
        tuple[str, int]
    ]  # sets of the base's rows, or of rows with ids as the base has; the base among them
    held_out: int  # rows of the base
    limit: np.uint64 | None  # rows with a priority up to this are held out

    def number(self, place: tuple[str, int]) -> int:
        """A number of the rows of a set, the same for sets that hold the same rows."""
        digests = [self.facts[self.models[0], *one].digest for one in self.sets]
        own = digests[self.sets.index(place)]
        return self.sets.index(place) if own is None else digests.index(own)

    def is_held_out(self, place: tuple[str, int], ids: np.ndarray, seed: int) -> np.ndarray:  # (n,) -> (n,) bool
        """Which rows of a set are held out."""
        if self.limit is None or place not in self.same:
            return np.zeros(len(ids), bool)
        return priorities(ids, seed, PURPOSE) <= self.limit


def planned(facts: Mapping[Key, Facts], share: float) -> Plan:
    """The plan for these sets, of which those of severity 0 are the base.

    Raises:
        InvalidArgumentError: a set without rows, or models that do not cover the same sets with the same rows.
    """
    models = tuple(dict.fromkeys(model for model, *_ in facts))
    places = tuple(dict.fromkeys((shift, severity) for _, shift, severity in facts))
    sets = tuple(sorted(places, key=lambda place: place[1] > 0))
    base = sets[0]
    if base[1]:
        raise InvalidArgumentError(f"one set must be the stored test rows, of severity 0; got {[*sets]}")
    for place in sets:
        _require_same_rows(facts, models, place)
    digest, n = facts[models[0], *base].digest, facts[models[0], *base].n
    identified = facts[models[0], *base].identified
    same = {
        place
        for place in sets
        for one in [facts[models[0], *place]]
        if (digest is not None and one.digest == digest) or (identified and one.identified)
    }
    held_out = min(round(share * n), MOST_HELD_OUT) if n >= LEAST_ROWS else 0
    limit = facts[models[0], *base].lowest[held_out - 1] if held_out else None
    return Plan(base, sets, models, facts, frozenset({base, *same}), held_out, limit)


def place_text(place: tuple[str, int]) -> str:
    """A set's name in a sentence.

    >>> place_text(("fog", 3)), place_text(("fog", 1))
    ('fog (severity 3)', 'fog')
    """
    return f"{place[0]} (severity {place[1]})" if place[1] > 1 else place[0]


def _require_same_rows(facts: Mapping[Key, Facts], models: tuple[str, ...], place: tuple[str, int]) -> None:
    found = {model: facts.get((model, *place)) for model in models}
    absent = [model for model, one in found.items() if one is None]
    if absent:
        raise InvalidArgumentError(f"every model must have predictions on {place_text(place)}; got none of {absent}")
    for one in found.values():
        if one is not None and len(np.unique(one.lowest)) < len(one.lowest):
            raise InvalidArgumentError(f"row ids must differ within {place_text(place)}; got one twice")
    known = {model: (one.n, one.digest) for model, one in found.items() if one is not None}
    if not all(n for n, _ in known.values()):
        raise InvalidArgumentError(f"{place_text(place)} must hold at least one row; got none")
    if len({n for n, _ in known.values()}) > 1:
        sizes = {model: n for model, (n, _) in known.items()}
        raise InvalidArgumentError(f"every model must predict the same rows of {place_text(place)}; got {sizes} rows")
    if len({digest for _, digest in known.values()}) > 1:
        raise InvalidArgumentError(
            f"every model must predict the same rows of {place_text(place)} in the same order (or give row ids); "
            f"got other labels for one of {list(known)}"
        )


def _numbers(target: np.ndarray) -> np.ndarray:  # (n,) labels of any type -> (n,) uint64
    if target.dtype.kind in "iub":
        return target.astype(np.int64).view(np.uint64)
    if target.dtype.kind == "f":
        return target.astype(np.float64).view(np.uint64)
    values, index = np.unique(target.astype(str), return_inverse=True)
    return hashed(values.tolist())[index.reshape(-1)]
