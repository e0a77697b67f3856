"""Rows of predictions as plain arrays, checked where they enter: probabilities or confidences, labels, and what else is known.

Dimensions: n rows, K classes, E experts. Errors name where the values came from and the first bad row.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch

from moe_posterior.errors import InvalidArgumentError

__all__ = ["Columns", "Vocabulary", "confidences", "grades", "joined", "labels", "probabilities", "weights_of"]

MOST_GROUPS = 200
ROUNDED = (
    2e-2  # by how much the sum of a row that was rounded for a table may miss 1; such rows are divided by their sum
)
EXACT = 1e-3


@dataclass(frozen=True, eq=False)
class Columns:
    """Predictions on n rows; None: not known."""

    probs: np.ndarray  # (n, K) probabilities, or (n,) confidences
    target: np.ndarray  # (n,) int64 classes; float64 correctness or grades where ``probs`` are confidences
    groups: Mapping[str, np.ndarray] = field(default_factory=dict)  # column -> (n,) int64, codes of its vocabulary
    configuration: np.ndarray | None = None  # (n,) int64, codes
    weights: np.ndarray | None = None  # (n, E)
    experts: np.ndarray | None = None  # (n, E, K)
    row: np.ndarray | None = None  # (n,) uint64 ids; None: the position in the set

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, index: Any) -> "Columns":  # slice, (m,) int64 or (n,) bool
        some: dict[str, Any] = {
            one.name: None if value is None else value[index]
            for one in fields(self)
            if one.name != "groups"
            for value in [getattr(self, one.name)]
        }
        return Columns(groups={name: codes[index] for name, codes in self.groups.items()}, **some)


def joined(parts: Sequence[Columns]) -> Columns:
    """The rows of several in one; all have the same columns."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    together = {
        one.name: np.concatenate([getattr(part, one.name) for part in parts])
        for one in fields(first)
        if one.name != "groups" and getattr(first, one.name) is not None
    }
    groups = {name: np.concatenate([part.groups[name] for part in parts]) for name in first.groups}
    return Columns(groups=groups, **together)


class Vocabulary:
    """The values of a column, numbered in the order in which they are met.

    >>> vocabulary = Vocabulary("country")
    >>> vocabulary.codes(["DE", "FR"], np.array([1, 0, 1])).tolist(), vocabulary.names
    ([1, 0, 1], ['DE', 'FR'])
    """

    def __init__(self, name: str, most: int = MOST_GROUPS) -> None:
        self.name, self.most = name, most
        self.names: list[Any] = []
        self._number: dict[Any, int] = {}

    def codes(self, values: Iterable[Any], index: np.ndarray) -> np.ndarray:  # (n,) into values -> (n,) int64
        """The numbers of values.

        Raises:
            InvalidArgumentError: more different values than a column of groups can have.
        """
        numbers = []
        for value in values:
            if value not in self._number:
                if len(self.names) >= self.most:
                    raise InvalidArgumentError(
                        f"{self.name} must have at most {self.most} different values to be groups; got more"
                    )
                self._number[value] = len(self.names)
                self.names.append(value)
            numbers.append(self._number[value])
        return np.array(numbers, dtype=np.int64)[index] if numbers else np.empty(0, np.int64)


def probabilities(found: np.ndarray, where: str, *, logits: bool, first: int = 0) -> tuple[np.ndarray, int]:  # (n, K)
    """Probabilities of every class, as float32 or float64, and how many rows were rounded so that they did not sum to 1.

    Raises:
        InvalidArgumentError: NaN, infinite values, values outside [0, 1], or rows that do not sum to 1.
    """
    if found.ndim != 2 or found.shape[1] < 2:
        raise InvalidArgumentError(
            f"{where} must have one value per class, at least two (of a single probability p give 1 − p and p); got shape {found.shape}"
        )
    values = _real(found, where)
    if logits:
        finite = np.isfinite(values).all(axis=1)
        if not finite.all():
            row = int(finite.argmin())
            raise InvalidArgumentError(f"{where} must be finite logits; got {_shown(values[row])} in row {first + row}")
        return torch.softmax(torch.from_numpy(values), dim=1).numpy(), 0
    total, least = values.sum(axis=1, dtype=np.float64), values.min(axis=1)
    missed = np.abs(total - 1)
    wrong = ~((missed <= ROUNDED) & (least >= -1e-5))  # True for NaN
    if wrong.any():
        row = int(wrong.argmax())
        raise InvalidArgumentError(
            f"{where} must be probabilities that sum to 1; got {_shown(values[row])}, which sum to {total[row]:.6g}, in row "
            f"{first + row}; pass logits=True (--logits) if these are logits"
        )
    off = (missed > EXACT) | (least < 0) | (values.max(axis=1) > 1)
    if off.any():  # these rows alone, so that a row's values do not depend on the piece that it comes in
        inside = values[off].clip(0, None)
        values = values.copy()  # it may be the user's array
        values[off] = inside / inside.sum(axis=1, keepdims=True)
    return values, int((missed > EXACT).sum())


def confidences(found: np.ndarray, where: str, first: int = 0) -> np.ndarray:  # (n,) float64
    """Confidences in [0, 1].

    Raises:
        InvalidArgumentError: NaN or a value outside.
    """
    return _within(found, where, "confidences in [0, 1] (divide per cent by 100)", first)


def grades(found: np.ndarray, where: str, first: int = 0) -> np.ndarray:  # (n,) float64
    """Correctness: 1 right, 0 wrong, a grade in between.

    Raises:
        InvalidArgumentError: NaN or a value outside.
    """
    return _within(found, where, "1 for a right and 0 for a wrong answer, or a grade in between", first)


def labels(
    found: np.ndarray, where: str, names: Sequence[str], classes: int, first: int = 0
) -> np.ndarray:  # (n,) int64
    """Class indices, from indices or from the classes' names.

    Integers are indices, unless every name is an integer too: then they are names. Whole floats count as integers.

    Args:
        found: integers or texts.
        where: for the errors.
        names: of the classes, in the order of the probabilities; empty if there are none.
        classes: K.
        first: row number of the first row.

    Raises:
        InvalidArgumentError: a label that is no class.
    """
    if found.dtype.kind == "f" and (np.abs(found) < 2**53).all() and (found == np.floor(found)).all():
        found = found.astype(np.int64)
    if found.dtype.kind in "iu" and not (names and all(_is_integer(name) for name in names)):
        wrong = (found < 0) | (found >= classes)
        if wrong.any():
            row = int(wrong.argmax())
            raise InvalidArgumentError(
                f"{where} must be classes in [0, {classes - 1}]; got {found[row]} in row {first + row}"
            )
        return found.astype(np.int64)
    if found.dtype.kind not in "iuOUS":
        raise InvalidArgumentError(f"{where} must be class indices or names; got {found.dtype}")
    number = {str(int(name)) if _is_integer(name) else str(name): index for index, name in enumerate(names)}
    values, index = np.unique(found.astype(str), return_inverse=True)
    if all(_is_integer(name) for name in names):  # a table that once had a gap in a column of integers writes 1.0
        values = np.array(
            [value.removesuffix(".0") if _is_integer(value.removesuffix(".0")) else value for value in values.tolist()]
        )
    numbers = np.array([number.get(value, -1) for value in values.tolist()], dtype=np.int64)
    if not number and all(_is_integer(value) for value in values.tolist()):
        return labels(values[index.reshape(-1)].astype(np.int64), where, (), classes, first)
    codes = numbers[index.reshape(-1)]
    if (codes < 0).any():
        row = int((codes < 0).argmax())
        known = f"one of the classes {_shown(list(number))}" if number else "class indices, or come with class names"
        raise InvalidArgumentError(f"{where} must be {known}; got {str(found[row])!r} in row {first + row}")
    return codes


def weights_of(found: np.ndarray, where: str, first: int = 0) -> np.ndarray:  # (n, E)
    """Routing weights: at least 0, and some weight in every row.

    Raises:
        InvalidArgumentError: anything else.
    """
    if found.ndim != 2:
        raise InvalidArgumentError(f"{where} must have one value per expert; got shape {found.shape}")
    values = _real(found, where)
    total = values.sum(axis=1)
    wrong = ~((values.min(axis=1) >= 0) & (total > 0) & np.isfinite(total))
    if wrong.any():
        row = int(wrong.argmax())
        raise InvalidArgumentError(
            f"{where} must be routing weights of at least 0, not all 0; got {_shown(values[row])} in row {first + row}"
        )
    return values


def _within(found: np.ndarray, where: str, wanted: str, first: int) -> np.ndarray:
    if found.ndim != 1:
        raise InvalidArgumentError(f"{where} must be {wanted}, one per row; got shape {found.shape}")
    values = _real(found.astype(np.float64) if found.dtype.kind == "b" else found, where).astype(np.float64)
    wrong = ~((values >= 0) & (values <= 1))  # True for NaN
    if wrong.any():
        row = int(wrong.argmax())
        raise InvalidArgumentError(f"{where} must be {wanted}; got {values[row]:g} in row {first + row}")
    return values


def _real(found: np.ndarray, where: str) -> np.ndarray:
    if found.dtype.kind not in "iuf":
        raise InvalidArgumentError(f"{where} must be numbers; got {found.dtype}")
    kept = found.dtype.kind == "f" and found.dtype.itemsize in (4, 8) and found.dtype.isnative
    wide = np.float32 if found.dtype.kind == "f" and found.dtype.itemsize == 2 else np.float64
    return np.require(found if kept else found.astype(wide), requirements=["C", "W"])  # torch takes no read-only memory


def _is_integer(name: object) -> bool:
    text = str(name)
    return text.removeprefix("-").isdigit() and text.isascii()


def _shown(values: Any, most: int = 6) -> str:
    some = [f"{value:.4g}" if isinstance(value, (float, np.floating)) else repr(value) for value in list(values)[:most]]
    return f"[{', '.join(some)}{', …' if len(values) > most else ''}]"
