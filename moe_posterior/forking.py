"""Locks that a forked child can still use, although the thread that held them does not exist there to release them."""

import os
import threading
import time
import weakref

from moe_posterior.errors import ForkedError

_PATIENCE = 1.0  # seconds a fork waits, in total, for threads that are changing something
_LOCKS: "weakref.WeakSet[ForkLock]" = weakref.WeakSet()
_held = threading.local()


class ForkLock:
    """A reentrant lock, as a context manager, over something that other threads change.

    A process that forks first waits for those threads, for at most a second; the child then gets the lock free and the guarded object
    consistent. If a thread held it longer, the object may be half changed in the child, and taking the lock there is an error.

    Args:
        guarded: what the error message calls the guarded object.

    Raises:
        ForkedError: on entering, in such a child.

    >>> lock = ForkLock("this router")
    >>> with lock, lock:
    ...     pass
    """

    def __init__(self, guarded: str) -> None:
        self.guarded = guarded
        self.torn = False
        self.inner = threading.RLock()
        _LOCKS.add(self)

    def __enter__(self) -> None:
        if self.torn:
            raise ForkedError(
                f"another thread was changing {self.guarded} when this process was forked, so it may be half changed here: "
                "load a saved one, or fork while no thread uses it"
            )
        self.inner.acquire()

    def __exit__(self, *exception: object) -> None:
        self.inner.release()


def _take_all() -> None:
    until = time.monotonic() + _PATIENCE
    _held.locks = [lock for lock in list(_LOCKS) if lock.inner.acquire(timeout=max(0.0, until - time.monotonic()))]


def _release_all() -> None:
    for lock in _held.locks:
        lock.inner.release()
    _held.locks = []


def _renew_all() -> None:
    whole = set(map(id, _held.locks))
    _held.locks = []
    for lock in list(_LOCKS):
        lock.torn |= id(lock) not in whole
        lock.inner = threading.RLock()


os.register_at_fork(before=_take_all, after_in_parent=_release_all, after_in_child=_renew_all)
