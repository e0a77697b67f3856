"""Tidy records of measurements, one figure per record, in a file that is written whole or not at all."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moe_posterior.errors import InvalidArgumentError, MissingDataError
from moe_posterior.files.reading import decoding
from moe_posterior.files.rows import read_rows, write_rows

FORMAT = 1


@dataclass(frozen=True)
class Record:
    """One figure of one run; ``paper`` is the published figure to compare it with, None if there is none."""

    benchmark: str
    environment: str
    gate: str
    options: Mapping[str, Any]
    seed: int
    metric: str
    value: float | int | list[Any] | None
    paper: float | None = None

    @property
    def case(self) -> str:
        """Key of the run; all records of one run share it."""
        return case_key(self.benchmark, self.environment, self.gate, self.options, self.seed)


@dataclass(frozen=True)
class Results:
    """Records, and the command and versions that made them."""

    records: list[Record]
    about: dict[str, Any] = field(default_factory=dict)  # command, versions, processors


def case_key(benchmark: str, environment: str, gate: str, options: Mapping[str, Any], seed: int) -> str:
    """A run's key; the order of the options does not matter.

    >>> case_key("b", "synthetic", "softmax", {"y": 1, "x": 2}, 0)
    '["b", "synthetic", "softmax", {"x": 2, "y": 1}, 0]'
    """
    return json.dumps([benchmark, environment, gate, dict(options), seed], sort_keys=True)


def write(results: Results, path: str | os.PathLike[str]) -> None:
    """Write strict JSON, one record per line, or Parquet if the name ends in .parquet; whole or not at all.

    Raises:
        InvalidArgumentError: the folder does not exist, or a value that strict JSON cannot hold.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise InvalidArgumentError(f"--out must lie in an existing folder; there is no {path.parent}")
    write_rows(path, {"format": FORMAT, "about": results.about}, [asdict(record) for record in results.records])


def read(path: str | os.PathLike[str]) -> Results:
    """Read what :func:`write` wrote.

    Raises:
        MissingDataError: no such file. InvalidArgumentError: not a file of benchmark records.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingDataError(f"there is no {path}; make one with: moe-posterior benchmark b --out {path}")
    content = read_rows(path, error=InvalidArgumentError)
    with decoding(path, "a file of benchmark records, as --out writes them", error=InvalidArgumentError):
        if content["format"] != FORMAT:
            raise InvalidArgumentError(f"{path} must be of format {FORMAT}; got {content['format']!r}")
        if not isinstance(content["about"], dict):
            raise TypeError("about must be a mapping")
        return Results([_checked(Record(**record)) for record in content["records"]], content["about"])


class Resumed:
    """The records of a run that can be resumed: what the file holds already, then every addition, written at once.

    Args:
        path: the file of ``--out``; None keeps the records in memory.
        about: how the records are made.

    Raises:
        InvalidArgumentError: the file cannot be written or holds something else; found before the work, not after it.
    """

    def __init__(self, path: str | os.PathLike[str] | None, about: dict[str, Any]) -> None:
        self.path, self.about = path, about
        self.records = read(path).records if path and Path(path).is_file() else []
        self._write()

    @property
    def done(self) -> set[str]:
        """Keys of the runs that need not be repeated."""
        return {record.case for record in self.records}

    def add(self, new: Iterable[Record]) -> None:
        """Append the records of a finished run."""
        before = len(self.records)
        self.records.extend(new)
        if len(self.records) > before:
            self._write()

    def results(self, benchmark: str) -> Results:
        """The records of one benchmark."""
        return Results(select(self.records, benchmark=benchmark), self.about)

    def _write(self) -> None:
        if self.path:
            write(Results(self.records, self.about), self.path)


def _checked(record: Record) -> Record:
    names = (record.benchmark, record.environment, record.gate, record.metric)
    if not all(isinstance(name, str) for name in names) or not isinstance(record.options, dict):
        raise TypeError(f"names must be text and options a mapping, unlike {record}")
    if not isinstance(record.seed, int) or not _is_number(record.value):
        raise TypeError(f"seed and value must be numbers, unlike {record}")
    return record


def _is_number(value: object) -> bool:
    """A number, None, or nested lists of them, such as traffic shares per layer."""
    return all(map(_is_number, value)) if isinstance(value, list) else value is None or isinstance(value, int | float)


def select(records: Iterable[Record], **wanted: Any) -> list[Record]:
    """The records whose named fields equal what is wanted.

    >>> one = Record("b", "synthetic", "softmax", {}, 0, "error", 0.3)
    >>> select([one], gate="softmax") == [one], select([one], gate="posterior")
    (True, [])
    """
    return [record for record in records if all(getattr(record, name) == value for name, value in wanted.items())]
