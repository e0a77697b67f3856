"""Arrow record batches as checked columns.

Dimensions: n rows of a batch, K classes, E experts.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_posterior.errors import InvalidArgumentError
from moe_posterior.evaluation.collect import Words
from moe_posterior.evaluation.columns import Columns, confidences, grades, labels, probabilities, weights_of
from moe_posterior.evaluation.priority import hashed
from moe_posterior.evaluation.roles import Roles
from moe_posterior.evaluation.scan import Source

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Decoder", "Origin"]

Origin = tuple[str, str, int | None]  # what the columns say: model, shift, severity


@dataclass
class Decoder:
    """Reads the batches of one file."""

    source: Source
    roles: Roles
    words: Words
    logits: bool
    class_names: Sequence[str] | None
    widths: dict[str, int]  # of all files: how many classes and experts there are

    def survey(self, tick: Callable[[int], None]) -> Iterator[tuple[Origin, int, np.ndarray | None, np.ndarray | None]]:
        """Per piece and set: rows, labels and ids."""
        columns = self.roles.narrow()
        columns = columns or dict([next(iter(self.roles.columns().items()))])
        first = 0
        for batch in self.source.batches(columns):
            n = len(batch)
            target = None if self.roles.labels is None else self._plain(batch, self.roles.labels, first)
            row = self._rows(batch, first)
            for origin, index in self._origins(batch, first):
                count = len(range(*index.indices(n))) if isinstance(index, slice) else int(index.sum())
                yield origin, count, None if target is None else target[index], None if row is None else row[index]
            first += n
            tick(n)

    def pieces(self, tick: Callable[[int], None]) -> Iterator[tuple[Origin, Columns]]:
        """Per piece and set: the predictions."""
        first = 0
        for batch in self.source.batches(self.roles.columns()):
            columns = self._columns(batch, first)
            for origin, index in self._origins(batch, first):
                yield origin, columns[index]
            first += len(batch)
            tick(len(batch))

    def _columns(self, batch: "pa.RecordBatch", first: int) -> Columns:
        roles = self.roles
        if roles.probs:
            found = self._matrix(batch, "probs", first)
            probs, rounded = probabilities(found, self._where(roles.probs), logits=self.logits, first=first)
            self.words.rounded += rounded
            target = self._labels(batch, probs.shape[1], first)
        else:
            probs, target = self._answers(batch, first)
        weights = (
            weights_of(self._matrix(batch, "weights", first), self._where(roles.weights), first)
            if roles.weights
            else None
        )
        values, index = (None, None) if roles.configuration is None else self._coded(batch, roles.configuration, first)
        return Columns(
            probs,
            target,
            groups={name: self.words.group(name, *self._coded(batch, name, first)) for name in roles.groups},
            configuration=self.words.routed(weights, values, index),
            weights=weights,
            experts=self._experts(batch, probs, first) if roles.experts else None,
            row=self._rows(batch, first),
        )

    def _labels(self, batch: "pa.RecordBatch", classes: int, first: int) -> np.ndarray:
        assert self.roles.labels is not None
        found = self._plain(batch, self.roles.labels, first)
        names = self.class_names or self.source.class_names or self._suffixes()
        if names and (len(names) != classes or len(set(names)) < classes):
            raise InvalidArgumentError(
                f"{self.source.path}: class names must be {classes} different ones, as the probabilities; got {len(names)}: "
                f"{list(names)[:6]}"
            )
        return labels(found, self._where((self.roles.labels,)), names, classes, first)

    def _suffixes(self) -> Sequence[str]:
        """The classes' names where every class has a column of its own."""
        prefix = self.roles.prefixes.get("probs")
        return [name.removeprefix(prefix) for name in self.roles.probs] if prefix else []

    def _answers(self, batch: "pa.RecordBatch", first: int) -> tuple[np.ndarray, np.ndarray]:
        roles = self.roles
        assert roles.confidence is not None
        said = confidences(self._numbers(batch, roles.confidence, first), self._where((roles.confidence,)), first)
        if roles.correct is not None:
            return said, grades(self._numbers(batch, roles.correct, first), self._where((roles.correct,)), first)
        assert roles.predicted is not None
        assert roles.labels is not None
        answer, label = (_as_text(self._plain(batch, name, first)) for name in (roles.predicted, roles.labels))
        return said, (answer == label).astype(np.float64)

    def _experts(self, batch: "pa.RecordBatch", probs: np.ndarray, first: int) -> np.ndarray:  # (n, E, K)
        where = self._where(self.roles.experts)
        flat = self._matrix(batch, "experts", first)
        if probs.ndim != 2 or flat.shape[1] % probs.shape[1] or not flat.shape[1]:
            raise InvalidArgumentError(
                f"{where} must hold the probability of each of {probs.shape[-1]} classes from every expert; got {flat.shape[1]} values"
            )
        shape = (len(flat), flat.shape[1] // probs.shape[1], probs.shape[1])
        rows, _ = probabilities(flat.reshape(-1, shape[2]), where, logits=self.logits, first=first)
        experts = self.widths.setdefault("experts of weights", self.widths.get("weights", shape[1]))
        if experts != shape[1]:
            raise InvalidArgumentError(f"{where} must be of {experts} experts, as the weights; got {shape[1]}")
        return rows.reshape(shape)

    def _matrix(self, batch: "pa.RecordBatch", role: str, first: int) -> np.ndarray:  # (n, width)
        names = getattr(self.roles, role)
        column = batch.column(names[0]) if len(names) == 1 else None
        if column is not None and hasattr(column, "flatten") and "list" in str(column.type):
            found = self._lists(column, names[0], first)
        else:
            found = np.column_stack([self._numbers(batch, name, first) for name in names])
        width = self.widths.setdefault(role, found.shape[1])
        if len(found) and width != found.shape[1]:
            raise InvalidArgumentError(
                f"{self._where(names)} must hold {width} values a row, as elsewhere; got {found.shape[1]} from row {first}"
            )
        return found

    def _lists(self, column: Any, name: str, first: int) -> np.ndarray:
        """A column of lists, or of lists of lists, as rows of numbers."""
        n, where = len(column), self._where((name,))
        while "list" in str(column.type):
            self._require_all(column, where, first)
            lengths = np.asarray(column.value_lengths()) if hasattr(column, "value_lengths") else np.empty(0)
            if len(lengths) and (lengths != lengths[0]).any():
                row = int((lengths != lengths[0]).argmax())
                raise InvalidArgumentError(
                    f"{where} must hold lists of one length; got {lengths[row]} after {lengths[0]}, in row "
                    f"{first + row * n // len(lengths)}"
                )
            column = column.flatten()
        if column.null_count:
            place = int(np.asarray(column.is_null()).argmax())
            raise InvalidArgumentError(
                f"{where} must have a value everywhere; got none in row {first + place * n // len(column)}"
            )
        return column.to_numpy(zero_copy_only=False).reshape(n, -1)

    def _numbers(self, batch: "pa.RecordBatch", name: str, first: int) -> np.ndarray:
        column = batch.column(name)
        self._require_all(column, self._where((name,)), first)
        found = column.to_numpy(zero_copy_only=False)
        if found.dtype.kind not in "biuf":
            raise InvalidArgumentError(f"{self._where((name,))} must hold numbers; got {column.type}")
        return found

    def _plain(self, batch: "pa.RecordBatch", name: str, first: int) -> np.ndarray:
        """Integers, or texts."""
        column = batch.column(name)
        self._require_all(column, self._where((name,)), first)
        if str(column.type) in ("string", "large_string", "string_view") or "dictionary" in str(column.type):
            values, index = self._coded(batch, name, first)
            return np.array(values, dtype=str)[index] if values else np.empty(0, "U1")
        return column.to_numpy(zero_copy_only=False)

    def _coded(self, batch: "pa.RecordBatch", name: str, first: int) -> tuple[list, np.ndarray]:
        """A column's values, and which one each row has."""
        column = batch.column(name)
        self._require_all(column, self._where((name,)), first)
        if "list" in str(column.type) or "struct" in str(column.type):
            raise InvalidArgumentError(f"{self._where((name,))} must hold one value a row; got {column.type}")
        found = column if "dictionary" in str(column.type) else column.dictionary_encode()
        return found.dictionary.to_pylist(), found.indices.to_numpy(zero_copy_only=False).astype(np.int64)

    def _rows(self, batch: "pa.RecordBatch", first: int) -> np.ndarray | None:
        return None if self.roles.rows is None else hashed(self._plain(batch, self.roles.rows, first))

    def _origins(self, batch: "pa.RecordBatch", first: int) -> Iterator[tuple[Origin, Any]]:
        """The sets that a batch holds rows of, and which rows."""
        names = (self.roles.model, self.roles.shift, self.roles.severity)
        coded = [(values, index) for name in names if name for values, index in [self._coded(batch, name, first)]]
        if not coded:
            yield ("", "", None), slice(None)
            return
        combined = np.zeros(len(batch), np.int64)
        for values, index in coded:
            combined = combined * max(len(values), 1) + index
        for code in np.unique(combined).tolist():
            mask = combined == code
            row = int(mask.argmax())
            found = iter([values[int(index[row])] for values, index in coded])
            model, shift, severity = (next(found) if name else None for name in names)
            level = None if severity is None else self._severity(severity, first + row)
            yield (str(model if model is not None else ""), str(shift if shift is not None else ""), level), mask

    def _severity(self, value: Any, row: int) -> int:
        try:
            found = float(value)
        except (TypeError, ValueError):
            found = -1.0
        if found not in range(6):
            raise InvalidArgumentError(
                f"{self._where((self.roles.severity or '',))} must be a severity of 0 to 5; got {value!r} in row {row}"
            )
        return int(found)

    def _require_all(self, column: Any, where: str, first: int) -> None:
        if column.null_count:
            row = first + int(np.asarray(column.is_null()).argmax())
            raise InvalidArgumentError(f"{where} must have a value in every row; got none in row {row}")

    def _where(self, names: Sequence[str]) -> str:
        columns = repr(names[0]) if len(names) == 1 else f"{names[0]!r} to {names[-1]!r}"
        return f"{self.source.path}: column {columns}" if len(names) == 1 else f"{self.source.path}: columns {columns}"


def _as_text(found: np.ndarray) -> np.ndarray:  # (n,) -> (n,) texts
    """Answers or labels to compare: 1, 1.0 and their texts are one class, as a gap in a column makes floats of its integers."""
    values, index = np.unique(found.astype(str), return_inverse=True)
    return np.array([re.sub(r"^(-?\d+)\.0+$", r"\1", value) for value in values.tolist()], dtype=str)[index.reshape(-1)]
