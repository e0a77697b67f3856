"""Which recordings and replays are open where the current code runs: in this thread, or in this asyncio task.

A hook on a gate hears every thread that calls the model. Inference that another thread runs meanwhile belongs to no recording, so
each recording is kept in a context variable and a hook asks whether its own is there. Threads start with an empty context,
``asyncio`` tasks and ``asyncio.to_thread`` with a copy of the current one.
"""

import weakref
from contextvars import ContextVar

_open: ContextVar[tuple["weakref.ref[object]", ...]] = ContextVar("moe_posterior_open", default=())


def enter(owner: object) -> None:
    """Open a recording or replay here; it ends with :func:`leave`, or when nobody holds it any more."""
    _open.set((*_without(None), weakref.ref(owner)))


def leave(owner: object) -> None:
    """End it here; nothing happens if it is not open."""
    _open.set(_without(owner))


def is_open(owner: object) -> bool:
    """Whether it is open here."""
    return any(each() is owner for each in _open.get())


def _without(owner: object | None) -> tuple["weakref.ref[object]", ...]:
    return tuple(each for each in _open.get() if each() is not None and each() is not owner)
