"""Faults of the file system: calls that fail or are counted, a disk that is full, processes that end at once."""

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CALLS = (
    "open",
    "write",
    "fsync",
    "fchmod",
    "replace",
    "mkdir",
    "chmod",
    "rename",
    "close",
)  # of os, that writing makes


def calls_of(write: Callable[[], None]) -> list[str]:
    """The calls a write makes, in order."""
    made: list[str] = []
    with interposed(lambda name, number: made.append(name)):
        write()
    return made


@contextmanager
def interposed(before: Callable[[str, int], None]) -> Iterator[None]:
    """Call ``before`` with the name and the number of each file-system call, which is made after it unless that raises."""
    patch, count = pytest.MonkeyPatch(), 0

    def wrapped(name: str) -> Callable[..., object]:
        own = getattr(os, name)

        def call(*given: object, **named: object) -> object:
            nonlocal count
            count += 1
            if name == "close":
                own(*given)  # which a close does even where it fails
            before(name, count)
            return None if name == "close" else own(*given, **named)

        return call

    for name in CALLS:
        patch.setattr(os, name, wrapped(name))
    try:
        yield
    finally:
        patch.undo()


def error_of(write: Callable[[], object], before: Callable[[str, int], None]) -> Exception | None:
    try:
        with interposed(before):
            write()
    except Exception as error:
        return error
    return None


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file takes more than ``size`` bytes; Python ignores the signal that comes with the error."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def names_beside(path: Path) -> set[str]:
    return {other.name for other in path.parent.iterdir()}


def in_child(run: Callable[[], None]) -> int:
    """The signal that ended a forked process, or its status."""
    child = os.fork()
    if child == 0:
        try:
            run()
        finally:
            os._exit(99)
    status = os.waitpid(child, 0)[1]
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
