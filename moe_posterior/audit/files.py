"""Everything the log asks of the file system, in one place, so that tests can make it fail."""

import fcntl
import os
import re
from pathlib import Path
from typing import BinaryIO

from moe_posterior.errors import AuditError, AuditLockedError, AuditWriteError

HEAD = "head.json"
_LOCK = "writer.lock"
_SEGMENT = re.compile(r"segment-(\d{8})\.(audit|json)")


def segment_name(number: int) -> str:
    """The file of a segment as it was written."""
    return f"segment-{number:08d}.audit"


def note_name(number: int) -> str:
    """The file that says what became of a segment that was compacted or removed."""
    return f"segment-{number:08d}.json"


def parquet_name(table: str, number: int) -> str:
    """A table of a compacted segment."""
    return f"{table}-{number:08d}.parquet"


def segment_numbers(folder: Path) -> dict[int, set[str]]:
    """Which segments there are traces of, in order, and the suffixes of their files."""
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise AuditError(f"{folder} cannot be read as an audit log: {error.strerror}") from error
    found: dict[int, set[str]] = {}
    for name in names:
        if match := _SEGMENT.fullmatch(name):
            found.setdefault(int(match[1]), set()).add(match[2])
    return dict(sorted(found.items()))


class FileSystem:
    """The calls that change files. A test replaces this by one that fails where it wants."""

    def append(self, path: Path) -> BinaryIO:
        """Open a file for appending, unbuffered; it must not exist."""
        return open(path, "xb", buffering=0)

    def write(self, file: BinaryIO, data: bytes) -> None:
        """Write all of it."""
        view = memoryview(data)
        while len(view):
            view = view[file.write(view) :]

    def sync(self, file: BinaryIO) -> None:
        """To the disk, with the file's length; not its times."""
        os.fdatasync(file.fileno())

    def sync_folder(self, folder: Path) -> None:
        """Names of files made, renamed or removed, to the disk."""
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def truncate(self, path: Path, size: int) -> None:
        """Cut a file, to the disk."""
        with open(path, "r+b") as file:
            file.truncate(size)
            os.fsync(file.fileno())

    def replace(self, path: Path, data: bytes) -> None:
        """Write a small file whole or not at all."""
        temporary = path.with_name(path.name + ".new")
        with open(temporary, "wb") as file:
            self.write(file, data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        self.sync_folder(path.parent)

    def remove(self, path: Path) -> None:
        """Remove a file if it is there."""
        path.unlink(missing_ok=True)


def lock(folder: Path) -> BinaryIO:
    """The right to write to the folder, made where it is missing, until the returned file is closed or the process ends.

    Raises:
        AuditLockedError: somebody else has it. AuditWriteError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / _LOCK, "ab")  # noqa: SIM115 - held for as long as the log is open
    except OSError as error:
        raise AuditWriteError(f"{folder} cannot be written as an audit log: {error.strerror}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise AuditLockedError(f"{folder} has a writer already; an audit log takes one at a time") from error
    return file
