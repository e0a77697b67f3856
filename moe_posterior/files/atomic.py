"""Files and folders that are written whole or not at all.

What is new grows in a draft beside the old one, reaches the disk, and takes the old one's name in one step of the file system.
Until then the old one is as it was, whatever happens: a full disk, an exception, a kill. No symbolic link is followed: a link in
the place of the file is replaced, one in the place of a draft or a lock is refused.
"""

import errno
import io
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from moe_posterior.errors import InvalidArgumentError, MoEPosteriorError, UnwritableFileError
from moe_posterior.files.drafts import (
    FOLDER,
    NO_FOLLOW,
    bring_back,
    clear_away,
    close,
    draft_name,
    exchange,
    new_draft,
    remove,
    take_place,
)

_READ = os.O_RDONLY | NO_FOLLOW | getattr(os, "O_NONBLOCK", 0)  # a pipe is not waited for
_LOCK = os.O_RDWR | os.O_CREAT | os.O_APPEND | NO_FOLLOW | getattr(os, "O_NONBLOCK", 0)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file that takes the place of ``path`` once the block ends; if it raises, ``path`` is as it was.

    The new file has the permissions of the old one, or what the umask leaves. A killed writer can leave a hidden draft
    (``.NAME.moe-new``), which the next one removes.

    Raises:
        UnwritableFileError: the file system refuses, or something other than a file is there. Only where the folder cannot be
            synced at the very end is the new file in place then.
        InvalidArgumentError: ``path`` is no path.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with replacing(f"{folder}/example") as file:
    ...         _ = file.write(b"whole")
    ...     Path(folder, "example").read_bytes()
    b'whole'
    """
    target = checked(path)
    with _explained(target):
        old = _old_file(target)
        draft, handle = new_draft(target, folder=False, mode=0o666 if old is None else 0o600)
    placed = False
    file = _Draft(handle, target)
    try:
        yield file
        with _explained(target):
            if not file.closed:
                file.flush()
            if old is not None:
                _take_over(handle, old)
            os.fsync(handle)
            os.replace(draft, target)
            placed = True
            _sync_folder(target.parent)
    finally:
        with suppress(Exception):  # of a flush that already failed
            file.close()
        if not placed:
            remove(draft)
        close(handle)  # last: the lock on it says that the draft is at work


def write_bytes(path: str | os.PathLike[str], data: bytes | memoryview) -> None:
    """Put ``data`` in the place of a file; see :func:`replacing`."""
    with replacing(path) as file:
        file.write(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Put a text in the place of a file, in UTF-8 with its line ends as they are; see :func:`replacing`.

    A lone surrogate, which UTF-8 does not have, is written as its escape, which JSON reads back.
    """
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def copy(source: str | os.PathLike[str], path: str | os.PathLike[str]) -> str:
    """Put a copy of one file in the place of another; see :func:`replacing`. Stands in for :func:`shutil.copy2`."""
    with open(source, "rb") as content, replacing(path) as file:
        shutil.copyfileobj(content, file)
    return os.fspath(path)


@contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty folder that takes the place of the folder ``path`` once the block ends; if it raises, ``path`` is as it was.

    On Linux the two change places in one step, so that a reader finds the one or the other. Where the system cannot do that there
    is a moment without either; what a kill left in that moment comes back at the next call.

    Raises:
        UnwritableFileError: the file system refuses, or something other than a folder is there.
        InvalidArgumentError: ``path`` is no path.
    """
    target = checked(path)
    aside = draft_name(target, "moe-old")
    with _explained(target):
        bring_back(aside, target)
        old = _old_folder(target)
        draft, handle = new_draft(target, folder=True, mode=0o777)
    swapped = placed = False
    try:
        yield draft
        with _explained(target):
            if old is not None:
                os.chmod(draft, stat.S_IMODE(old.st_mode))
            _sync_tree(draft)
            swapped = old is not None and exchange(draft, target)
            if not swapped:
                take_place(draft, target, aside)
            placed = True
            _sync_folder(target.parent)
    finally:
        if not placed:
            remove(draft)
        close(handle)
        if swapped:
            clear_away(draft)  # the old folder, unless the next writer was faster
        elif placed:
            remove(aside)


def open_lock(path: str | os.PathLike[str]) -> BinaryIO:
    """A file to hold a lock on: made where it is missing, never emptied, and a plain file, not one that a link points to.

    Raises:
        UnwritableFileError: it cannot be opened for writing, or is something else. InvalidArgumentError: ``path`` is no path.
    """
    target = checked(path)
    with _explained(target):
        handle = os.open(target, _LOCK, 0o666)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise OSError(errno.EINVAL, "it is not a plain file")
    return open(handle, "ab", buffering=0)


def append(path: str | os.PathLike[str], text: str) -> None:
    """Add a text to the end of a plain file, which is made where it is missing; no link is followed.

    This is no write of all or nothing: a kill or a full disk can leave a part of the text, which readers must expect.

    Raises:
        UnwritableFileError: the file system refuses. InvalidArgumentError: ``path`` is no path.
    """
    with _explained(checked(path)), open_lock(path) as file:
        data = memoryview(text.encode("utf-8", "backslashreplace"))
        while data:
            data = data[file.write(data) :]


def checked(path: str | os.PathLike[str], name: str = "path") -> Path:
    """The path of a file that an argument names.

    Raises:
        InvalidArgumentError: it is no path.
    """
    try:
        found = Path(os.fsdecode(path))
    except TypeError:
        raise InvalidArgumentError(f"{name} must be a path; got {type(path).__name__}") from None
    if "\0" in os.fspath(found) or found.name in ("", ".."):
        raise InvalidArgumentError(f"{name} must be the path of a file; got {os.fspath(path)!r}")
    return found


class _Draft(io.BufferedWriter):
    """A draft being written. Its own failures say which file it was; others within the block stay what they are."""

    def __init__(self, handle: int, target: Path) -> None:
        super().__init__(_Raw(handle, target))


class _Raw(io.FileIO):
    def __init__(self, handle: int, target: Path) -> None:
        super().__init__(handle, "wb", closefd=False)
        self._target = target

    def write(self, data: Any, /) -> int:
        with _explained(self._target):
            return os.write(self.fileno(), data)


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    try:
        yield
    except MoEPosteriorError:
        raise
    except OSError as error:
        explained = UnwritableFileError(f"{target} cannot be written: {error.strerror or error}")
        explained.errno = error.errno
        raise explained from error


def _old_file(target: Path) -> os.stat_result | None:
    """The file to be replaced, if there is one; a link does not count, since its permissions say nothing."""
    try:
        found = os.lstat(target)
    except FileNotFoundError:
        return None
    link = stat.S_ISLNK(found.st_mode)
    if link:
        try:
            found = os.stat(target)
        except OSError:  # a link to nowhere, or in a circle
            return None
    if not stat.S_ISREG(found.st_mode):  # to replace /dev/null or a link to it helps nobody
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a device, pipe or socket"
        raise OSError(errno.EINVAL, f"it is {kind}, not a file")
    return None if link else found


def _old_folder(target: Path) -> os.stat_result | None:
    try:
        found = os.lstat(target)
    except FileNotFoundError:
        return None
    if not stat.S_ISDIR(found.st_mode):
        raise OSError(errno.ENOTDIR, "it is there and is not a folder")
    return found


def _take_over(handle: int, old: os.stat_result) -> None:
    """Give the new file the old one's owner, if the system lets us, and permissions."""
    new = os.fstat(handle)
    if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid) and hasattr(os, "fchown"):
        with suppress(OSError):
            os.fchown(handle, old.st_uid, old.st_gid)
    if hasattr(os, "fchmod"):
        os.fchmod(handle, stat.S_IMODE(old.st_mode) & 0o777)


def _sync_folder(folder: Path) -> None:
    """Names of files made, renamed or removed, to the disk, where the file system knows how."""
    if os.name != "posix":
        return
    handle = os.open(folder, FOLDER)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def _sync_tree(folder: Path) -> None:
    for place, _, names in os.walk(folder):
        for name in names:
            handle = os.open(os.path.join(place, name), _READ)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        _sync_folder(Path(place))
