"""Drafts: what grows beside a file or folder until it takes its name, and what is left of one when its writer was killed.

A draft is locked for as long as its writer works, so that the next writer can tell one at work from one left behind.
"""

import ctypes
import errno
import os
import secrets
import shutil
import stat
from contextlib import suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: drafts left behind stay
    fcntl = None  # type: ignore[assignment]

NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0)
_NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL | NO_FOLLOW | getattr(os, "O_BINARY", 0)
_READ = os.O_RDONLY | NO_FOLLOW | getattr(os, "O_NONBLOCK", 0)  # a pipe is not waited for
_DRAFTS = 64  # writers of one file at once that get a draft of a known name, which the next writer can clear away
_KEPT = 50  # characters of a long name that a draft's repeats: file systems take 255 bytes
_AT_FDCWD, _EXCHANGE = -100, 2  # of Linux's renameat2


def draft_name(target: Path, ending: str) -> Path:
    """A hidden name beside a target."""
    return target.with_name(f".{target.name[:_KEPT]}.{ending}")


def new_draft(target: Path, *, folder: bool, mode: int) -> tuple[Path, int]:
    """An empty draft that was not there before, and an open handle of it, locked for as long as it is at work."""
    endings = ["moe-new", *(f"moe-new{number}" for number in range(2, _DRAFTS + 1)), f"moe-new-{secrets.token_hex(8)}"]
    for ending in endings:
        draft = draft_name(target, ending)
        for _ in range(2):
            try:
                handle = _new_folder(draft, mode) if folder else os.open(draft, _NEW_FILE, mode)
            except FileExistsError:
                if not clear_away(draft):
                    break
                continue
            if _lock(handle) is not False and _stands_for(draft, handle):
                return draft, handle
            close(handle)  # somebody took it for one left behind, in the moment before the lock
    raise OSError(errno.EEXIST, f"{_DRAFTS} drafts of it, {draft_name(target, 'moe-new')} and others, stand beside it")


def _new_folder(draft: Path, mode: int) -> int:
    os.mkdir(draft, mode)
    try:
        return os.open(draft, FOLDER | NO_FOLLOW)
    except OSError:
        remove(draft)
        raise


def clear_away(draft: Path) -> bool:
    """Remove a draft whose writer was killed; False if it may be at work, or is none of ours."""
    try:
        handle = os.open(draft, _READ)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        kind = os.fstat(handle).st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)) or not _lock(handle):
            return False
        if _stands_for(
            draft, handle
        ):  # and does until it is unlocked: any process that renames or removes it holds the lock
            remove(draft)
        return True
    finally:
        close(handle)


def close(handle: int) -> None:
    """Let go of a draft; by now it is on the disk, or not wanted."""
    with suppress(OSError):
        os.close(handle)


def _lock(handle: int) -> bool | None:
    """Whether the lock is ours now; None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without them
        return None
    return True


def _stands_for(draft: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(draft))
    except FileNotFoundError:
        return False


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all it holds, as far as the system lets us."""
    with suppress(OSError):  # which rmtree lets through where closing fails
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.unlink(path)


def exchange(one: Path, other: Path) -> bool:
    """Let two names change places in one step; False where the system or the file system cannot."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number))


def take_place(draft: Path, target: Path, aside: Path) -> None:
    """Put a draft where its target is or was, which steps aside; it steps back if that fails."""
    there = os.path.lexists(target)
    if there:
        os.rename(target, aside)
    try:
        os.rename(draft, target)
    except OSError:
        if there:
            os.rename(aside, target)
        raise


def bring_back(aside: Path, target: Path) -> None:
    """What a kill left between the two renames is the folder; what it left after them is not."""
    if not os.path.lexists(aside):
        return
    if os.path.lexists(target):
        remove(aside)
    else:
        os.rename(aside, target)
