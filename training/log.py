"""The metrics of a run as ``metrics.csv``. When a run is resumed the file is too: no epoch is lost or written twice."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from moe_posterior.errors import DamagedFileError
from moe_posterior.files.atomic import append, write_text
from moe_posterior.files.torchfile import read_plain_file

__all__ = ["MetricsFile"]

FILE = "metrics.csv"
STEP = "step"


class MetricsFile(Logger):
    """A logger that writes each line at once, so that metrics are on file before the checkpoint that follows them.

    Lightning's own CSVLogger deletes the file of an earlier session and buffers a hundred lines.

    Args:
        folder: of the file; created if needed.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.path = Path(folder) / FILE
        self._columns: list[str] | None = None  # None: not read from the file yet

    @property
    def name(self) -> str:
        """Empty: the folder is the name."""
        return ""

    @property
    def version(self) -> str:
        """Empty: a run has one file."""
        return ""

    @property
    def save_dir(self) -> str:
        """The file's folder."""
        return str(self.path.parent)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: they are in ``config.yaml`` beside it."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a line; a new metric gets a column, which is empty in earlier lines."""
        row = {STEP: step, **metrics}
        if self._columns is None:
            self._columns, _ = _read(self.path)
        if new := [name for name in row if name not in self._columns]:
            _, rows = _read(self.path)
            self._columns += sorted(new)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, _text(self._columns, rows, header=True))
        append(self.path, _text(self._columns, [row], header=False))

    def keep_before(self, step: int) -> None:
        """Drop the lines from this step on, which will be written again, and a last line that a kill left unfinished.

        Raises:
            DamagedFileError: the file is not one of this logger's.
        """
        if not self.path.exists():
            return
        columns, rows = _read(self.path)
        write_text(self.path, _text(columns, [row for row in rows if int(row[STEP]) < step], header=bool(columns)))
        self._columns = columns


def _read(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Columns and whole lines."""
    if not path.exists():
        return [], []
    try:
        whole, end, rest = read_plain_file(path).rpartition(b"\n")  # what follows the last line end is unfinished
        if rest and not end:  # the columns come whole or not at all
            raise ValueError("it has no line of columns")
        reader = csv.DictReader(io.StringIO(whole.decode(), newline=""), strict=True)
        columns, rows = list(reader.fieldnames or []), list(reader)
        if columns and STEP not in columns:
            raise ValueError(f"it has no column {STEP!r}")
        for row in rows:
            if None in row or not row[STEP].isdecimal():
                raise ValueError(f"line {row} does not fit the columns")
    except DamagedFileError:
        raise
    except (OSError, ValueError, csv.Error, TypeError, AttributeError) as error:
        raise DamagedFileError(f"{path} must be the figures of this run; got {error}; move it away to go on") from error
    return columns, rows


def _text(columns: list[str], rows: list[dict[str, Any]], *, header: bool) -> str:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
