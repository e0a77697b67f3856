"""The time, from a clock that may be wrong: set back, years ahead, before 1970, or not a number."""

import time
import warnings
from datetime import UTC, datetime, timedelta

from moe_posterior.audit.storage.state import MAX_TIME

BELIEVED = 86_400.0  # at most so many seconds between two runs of a writer count towards a segment's age: only the clock shows them
_STEP = 300.0  # seconds a clock may drift between two checks before it is reported
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def now() -> int:
    """Microseconds since 1970, UTC, from 1970 to 9999: what every reader can show. A clock outside that range causes a warning."""
    said = time.time_ns()
    if 0 <= said < 1000 * MAX_TIME:
        return int(said // 1000)
    kept = MAX_TIME - 1 if said >= 1000 * MAX_TIME and said < float("inf") else 0
    warnings.warn(
        f"this machine's clock shows {said} ns since 1970; an audit log holds times from 1970 to 9999, and records {when(kept)}",
        RuntimeWarning,
        stacklevel=2,
    )
    return kept


def when(time: int) -> str:
    """Microseconds since 1970 as a time in UTC.

    >>> when(1_700_000_000_123_456), when(253_402_300_799_999_999)
    ('2023-11-14 22:13:20.123 UTC', '9999-12-31 23:59:59.999 UTC')
    """
    try:
        return (_EPOCH + timedelta(microseconds=time)).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3] + " UTC"
    except (OverflowError, ValueError):
        return f"{time} µs"


class Drift:
    """How far the clock has drifted from the time that passed."""

    def __init__(self) -> None:
        self._offset = _offset()

    def step(self) -> float:
        """The drift in seconds since the last check, or 0 if it is at most a few minutes."""
        before, self._offset = self._offset, _offset()
        step = self._offset - before
        return step if abs(step) > _STEP else 0.0


def _offset() -> float:
    return now() / 1e6 - time.monotonic()


def believed(made: float, next_made: float, after: float | None) -> float:
    """Seconds between the beginnings of two segments: those that passed in one run of a writer, or what its clock can show.

    >>> believed(0.0, 3600.0, None), believed(0.0, 3600.0, 60.0), believed(0.0, 3e8, None), believed(3e8, 0.0, None)
    (3600.0, 60.0, 0.0, 0.0)
    """
    if after is not None:
        return max(0.0, after)
    step = next_made - made
    return step if 0.0 <= step <= BELIEVED else 0.0
