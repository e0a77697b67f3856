"""All file-system calls of the log in one place, so that tests can make any single call fail."""

import contextlib
import fcntl
import itertools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, ParamSpec, TypeVar

from moe_posterior.errors import AuditError, AuditLockedError, AuditWriteError

HEAD = "head.json"
_LOCK = "writer.lock"
_SEGMENT = re.compile(r"segment-(\d{8})\.(audit|json)")
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_DRAFT = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_FOLLOW
_APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND | _NO_FOLLOW | getattr(os, "O_NONBLOCK", 0)  # a pipe is not waited for
_TRIES = 10  # attempts to lock a file that others create and remove
_P = ParamSpec("_P")
_R = TypeVar("_R")


def segment_name(number: int) -> str:
    """The file of a segment as it was written."""
    return f"segment-{number:08d}.audit"


def note_name(number: int) -> str:
    """The note about a segment that was compacted or removed."""
    return f"segment-{number:08d}.json"


def parquet_name(table: str, number: int) -> str:
    """A table of a compacted segment."""
    return f"{table}-{number:08d}.parquet"


class FileSystem:
    """The log's access to its files. Every system call goes through :meth:`call`.

    Tests replace ``call`` to fail, stop or watch at any call, or a single method to fail at one kind of call.
    """

    def call(self, function: Callable[_P, _R], *arguments: _P.args, **options: _P.kwargs) -> _R:
        """Make one system call."""
        return function(*arguments, **options)

    def names(self, folder: Path) -> list[str]:
        """The names in a folder."""
        return self.call(os.listdir, folder)

    def stat(self, path: Path) -> os.stat_result | None:
        """The status of a path, links followed; None if there is no such file."""
        try:
            return self.call(os.stat, path)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def size(self, file: BinaryIO) -> int:
        """The status of an open file."""
        return self.call(os.fstat, file.fileno()).st_size

    def read(self, path: Path) -> BinaryIO:
        """Open a file for reading."""
        return self.call(open, path, "rb")

    def append(self, path: Path) -> BinaryIO:
        """Open a file for appending, unbuffered; it must not exist."""
        return self.call(open, path, "xb", buffering=0)

    def write(self, file: BinaryIO, data: bytes) -> None:
        """Write all of it."""
        view = memoryview(data)
        while len(view):
            view = view[self.call(file.write, view) :]

    def sync(self, file: BinaryIO) -> None:
        """Sync a file's data and length to disk; not its times."""
        self.call(os.fdatasync, file.fileno())

    def sync_folder(self, folder: Path) -> None:
        """Sync a folder: names of files created, renamed or removed."""
        handle = self.call(os.open, folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self.call(os.fsync, handle)
        finally:
            os.close(handle)

    def truncate(self, path: Path, size: int) -> None:
        """Truncate a file and sync it."""
        handle = self.call(os.open, path, os.O_WRONLY | _NO_FOLLOW)
        try:
            self.call(os.ftruncate, handle, size)
            self.call(os.fsync, handle)
        finally:
            os.close(handle)

    def replace(self, path: Path, data: bytes | memoryview) -> None:
        """Write a file whole or not at all: on any failure the old one stays. A symlink of that name is not followed."""
        draft = path.with_name(path.name + ".new")
        try:
            handle = self.call(os.open, draft, _DRAFT, 0o666)
        except FileExistsError:  # left by a crash
            self.call(os.unlink, draft)
            handle = self.call(os.open, draft, _DRAFT, 0o666)
        try:
            try:
                view = memoryview(data)
                while len(view):
                    view = view[self.call(os.write, handle, view) :]
                self.call(os.fsync, handle)
            finally:
                os.close(handle)
            self.rename(draft, path)
        except OSError:
            with contextlib.suppress(OSError):  # a full disk has better uses for it
                self.remove(draft)
            raise
        self.sync_folder(path.parent)

    def rename(self, path: Path, target: Path) -> None:
        """Rename a file, replacing any file of the new name."""
        self.call(os.replace, path, target)

    def remove(self, path: Path) -> None:
        """Remove a file if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self.call(os.unlink, path)

    def make_folder(self, folder: Path) -> None:
        """Create a folder and its missing parents, and sync them."""
        missing = list(itertools.takewhile(lambda path: self.stat(path) is None, (folder, *folder.parents)))
        for path in reversed(missing):
            with contextlib.suppress(FileExistsError):
                self.call(os.mkdir, path)
            with contextlib.suppress(PermissionError):  # a folder with write but no read permission
                self.sync_folder(path.parent)


DISK = FileSystem()


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn OSErrors raised inside into an AuditWriteError that begins with ``what``."""
    try:
        yield
    except AuditError:
        raise
    except OSError as error:
        raise AuditWriteError(f"{what}: {error.strerror or error}") from error


def segment_numbers(folder: Path, files: FileSystem = DISK) -> dict[int, set[str]]:
    """The segments in the folder, in order, and the suffixes of their files."""
    try:
        names = files.names(folder)
    except OSError as error:
        raise AuditError(f"{folder} cannot be read as an audit log: {error.strerror}") from error
    found: dict[int, set[str]] = {}
    for name in names:
        if match := _SEGMENT.fullmatch(name):
            found.setdefault(int(match[1]), set()).add(match[2])
    return dict(sorted(found.items()))


def identity(stat: os.stat_result) -> tuple[int, int]:
    """The identity of a file or folder, independent of its name."""
    return stat.st_dev, stat.st_ino


class FolderLock:
    """The exclusive lock on a folder, created if missing, until :meth:`close` or the end of the process.

    Removing the lock file or renaming the folder would let a second writer in. So the holder checks with :meth:`require`, before
    every change, that both are still its own.

    Raises:
        AuditLockedError: another process holds it. AuditWriteError: the folder cannot be written.
    """

    def __init__(self, folder: Path, files: FileSystem = DISK) -> None:
        self.folder, self.files = folder, files
        with explained(f"{folder} cannot be written as an audit log"):
            files.make_folder(folder)
            self._folder = identity(files.call(os.stat, folder))
            self._file = self._locked()
            self._lock = identity(os.fstat(self._file.fileno()))

    def _locked(self) -> BinaryIO:
        for _ in range(_TRIES):
            handle = self.files.call(os.open, self.folder / _LOCK, _APPEND, 0o666)
            file = open(handle, "ab", buffering=0)  # noqa: SIM115 - held for as long as the log is open
            try:
                self.files.call(fcntl.flock, file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                there = self.files.stat(self.folder / _LOCK)
                if there is not None and identity(there) == identity(os.fstat(handle)):
                    return file
            except BlockingIOError as error:
                file.close()
                raise AuditLockedError(
                    f"{self.folder} has a writer already; an audit log takes one at a time"
                ) from error
            except BaseException:
                file.close()
                raise
            file.close()  # it was removed between opening and locking it
        raise AuditLockedError(f"{self.folder}: its {_LOCK} keeps being removed")

    def require(self) -> None:
        """Return if folder and lock are still the ones that were locked.

        Raises:
            AuditError: they are not, and what happened to them.
        """
        folder = self.files.stat(self.folder)
        if folder is None or identity(folder) != self._folder:
            what = "is gone: it was removed or renamed" if folder is None else "is another folder now: ours was renamed"
            raise AuditError(f"{self.folder} {what} while this log was open, so that nothing written reaches it")
        if self._file.closed:
            raise AuditError(f"{self.folder}: its lock was released")
        lock = self.files.stat(self.folder / _LOCK)
        if lock is None or identity(lock) != self._lock:
            what = "removed" if lock is None else "replaced"
            raise AuditError(
                f"{self.folder}: its {_LOCK} was {what} while this log was open; another process may write there now"
            )

    def close(self) -> None:
        """Release the folder."""
        self._file.close()
