"""``moe-posterior audit watch``: the last minutes of a log, live in a terminal. Plain ASCII, no packages beyond the log's own.

Dimensions: N decisions, C clusters, E experts.
"""

import os
import select
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from moe_posterior.audit.read import Record
from moe_posterior.audit.storage.clock import now as now_in_microseconds
from moe_posterior.audit.storage.clock import when
from moe_posterior.audit.storage.tables import ABSTAIN, EXPLORED, REFUSE, RESOLVE, ROUTE, Group
from moe_posterior.audit.views.competence import standings
from moe_posterior.audit.views.flags import Flag
from moe_posterior.audit.views.follow import Follower
from moe_posterior.audit.views.survey import SourceSurvey, Survey
from moe_posterior.errors import AuditError
from moe_posterior.escape import ascii_line

MOST_MINUTES = 24 * 60  # a row of counts a second is kept
BAR, FLAGS, SOURCES = 20, 6, 8  # width of a bar; flags and routers shown, at most
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"  # the terminal's alternate screen, cursor hidden
_LONGEST = 86_400.0  # longest interval between views, in seconds
_COUNTS = {"decisions": 0, "abstained": 1, "explored": 2, "outcomes": 3, "refused": 4}


class Window:
    """What one router did in the last seconds, one row of counts a second."""

    def __init__(self, seconds: int) -> None:
        self.seconds = seconds
        self.counts: dict[int, NDArray[np.int64]] = {}  # second since 1970 -> (5,) counts
        self.chosen: dict[int, NDArray[np.int64]] = {}  # -> (E,)
        self.latest = 0

    def add(self, group: Group) -> None:
        """Count a group, call by call."""
        calls, decisions = group.tables["calls"], group.tables["decisions"]
        seconds = calls["time"] // 1_000_000
        for kind, name in ((RESOLVE, "outcomes"), (REFUSE, "refused")):
            mask = calls["kind"] == kind
            self._count(name, seconds[mask], calls["rows"][mask])
        mine = seconds[group.call_rows(ROUTE)]
        self._count("decisions", mine, np.ones(len(mine), dtype=np.int64))
        for bit, name in ((ABSTAIN, "abstained"), (EXPLORED, "explored")):
            hit = (decisions["flags"] & bit) != 0
            self._count(name, mine[hit], np.ones(int(hit.sum()), dtype=np.int64))
        for second in np.unique(mine).tolist():
            added = np.bincount(decisions["experts"][mine == second].reshape(-1).astype(np.int64))
            old = self.chosen.get(second, np.zeros(0, dtype=np.int64))
            both = np.zeros(max(len(old), len(added)), dtype=np.int64)
            both[: len(old)] += old
            both[: len(added)] += added
            self.chosen[second] = both
        self._forget()

    def rate(self, name: str, since: float, until: float) -> float:
        """Per second, over whole seconds of the window."""
        first, last = int(since), int(until)
        total = sum(int(row[_COUNTS[name]]) for second, row in self.counts.items() if first <= second < last)
        return total / max(last - first, 1)

    def total(self, name: str, since: float) -> int:
        """Within the window."""
        return sum(int(row[_COUNTS[name]]) for second, row in self.counts.items() if second >= since)

    def shares(self, num_experts: int, since: float) -> NDArray[np.int64]:  # (E,)
        """How often each expert was chosen within the window."""
        found = np.zeros(num_experts, dtype=np.int64)
        for second, row in self.chosen.items():
            if second >= since:
                found[: len(row)] += row[:num_experts]
        return found

    def _count(self, name: str, seconds: NDArray, rows: NDArray) -> None:
        for second in np.unique(seconds).tolist():
            row = self.counts.setdefault(second, np.zeros(len(_COUNTS), dtype=np.int64))
            row[_COUNTS[name]] += int(rows[seconds == second].sum())
            self.latest = second

    def _forget(self) -> None:
        for table in (self.counts, self.chosen):
            for second in [second for second in table if abs(second - self.latest) > self.seconds]:
                del table[second]


class View:
    """What a watcher has seen of a log, in bounded memory."""

    def __init__(self, folder: Path, key: bytes | None = None, minutes: float = 5.0) -> None:
        self.folder, self.seconds = folder, max(1, round(60 * minutes))
        self.follower = Follower(folder, key)
        self.problem = ""
        self._begin()

    def _begin(self) -> None:
        self.survey, self.windows = Survey(), dict[int, Window]()
        self._restarts = self.follower.restarts

    def read(self, enough: Callable[[], bool] = lambda: False) -> None:
        """Read new records, up to a limit; a problem with the log is shown instead of raised, and retried."""
        try:
            for record in self.follower.poll():
                self._take(record)
                if enough():
                    return
            self.problem = "" if self.follower.restarts >= 0 else f"no log in {ascii_line(self.folder)} yet"
        except (AuditError, OSError) as error:
            self.problem = f"the log cannot be read: {ascii_line(error)}"

    def _take(self, record: Record) -> None:
        if self._restarts != self.follower.restarts:
            self._begin()
        self.survey.take(record, self.follower.sources)
        if isinstance(record, Group) and record.source in self.follower.sources:
            self.windows.setdefault(record.source, Window(self.seconds)).add(record)

    def lines(self, now: float, height: int = 1000) -> list[str]:
        """The view as lines of ASCII."""
        shown = [f"audit log {ascii_line(self.folder)}   {when(int(now * 1e6))}   last {self.seconds / 60:g} min"]
        if self.problem:
            shown.append(f"! {self.problem}")
        numbers = sorted(self.survey.sources, key=lambda number: -self.survey.sources[number].decisions)
        experts = max(3, (height - 6 - FLAGS) // max(1, min(len(numbers), SOURCES)) - 5)
        for number in numbers[:SOURCES]:
            window = self.windows.get(number) or Window(self.seconds)
            shown += ["", *_source_lines(self.survey.sources[number], window, now, self.seconds, experts)]
        if len(numbers) > SOURCES:
            shown.append(f"... and {len(numbers) - SOURCES} more")
        shown += ["", *self._flag_lines(), *self._log_lines(now)]
        return shown

    def _flag_lines(self) -> list[str]:
        flagged = [(one, flag) for one in self.survey.sources.values() for flag in one.flags() if flag.ended is None]
        flagged.sort(key=lambda one: (one[1].cluster is None, one[1].time), reverse=True)
        lines = [f"flags up: {len(flagged)}"]
        return lines + [f"  {_flag_line(source, flag)}" for source, flag in flagged[:FLAGS]]

    def _log_lines(self, now: float) -> list[str]:
        latest = max((window.latest for window in self.windows.values()), default=0)
        age = f"last record {max(0.0, now - latest):.0f} s ago" if latest else "nothing recorded yet"
        dropped = sum(self.survey.dropped.values())
        return [age + (f"; {dropped} records were dropped" if dropped else "")]


def _source_lines(source: SourceSurvey, window: Window, now: float, seconds: int, experts: int) -> list[str]:
    since = now - seconds
    decided = window.total("decisions", since)
    of = {name: f"{100 * window.total(name, since) / decided:.1f} %" if decided else "-" for name in _COUNTS}
    lines = [
        f"{ascii_line(source.name)}: {window.rate('decisions', now - 10, now):,.0f} decisions/s, {decided:,} in the window, "
        f"{source.decisions:,} since {when(source.first_time)}",
        f"  outcomes {of['outcomes']}, refused {window.total('refused', since):,}, abstained {of['abstained']}, "
        f"explored {of['explored']}",
    ]
    if source.sampler is None or source.flagging is None:
        return lines
    found = standings(source)
    chosen = window.shares(len(found), since)
    total = max(int(chosen.sum()), 1)
    up = {one.expert for one in found if one.flags}
    order = np.lexsort((np.arange(len(chosen)), -chosen)).tolist()
    first = [e for e in order if chosen[e] or e in up][:experts]
    lines.append(f"  {'expert':>6}  {'share':>7}  {'':{BAR}}  competence over all clusters, 95 %")
    for e in first:
        middle, low, high = found[e].over_all or (np.nan, np.nan, np.nan)
        bar = "#" * round(BAR * int(chosen[e]) / total)
        flag = "  LOW" if e in up else ""
        lines.append(f"  {e:>6}  {chosen[e] / total:>7.1%}  {bar:{BAR}}  {middle:.3f} [{low:.3f}, {high:.3f}]{flag}")
    if len(first) < len(order):
        lines.append(f"  {len(order) - len(first)} more experts")
    return lines


def _flag_line(source: SourceSurvey, flag: Flag) -> str:
    place = "over all clusters" if flag.cluster is None else f"on cluster {flag.cluster}"
    below = "the pool's" if flag.against == "pool" else "its start of"
    return (
        f"{ascii_line(source.name)}: expert {flag.expert} {place}, mean {flag.mean:.3f} below {below} {flag.level:.3f} since decision "
        f"{flag.decision}, {when(flag.time)}"
    )


@contextmanager
def _screen(stream: TextIO) -> Iterator[Callable[[list[str]], None]]:
    """How to show lines: in place on a terminal's alternate screen, one block after the other anywhere else."""
    if not stream.isatty():
        yield lambda lines: _put(stream, "\n".join(lines) + "\n\n")
        return

    def paint(lines: list[str]) -> None:
        width, height = shutil.get_terminal_size()
        cut = "".join(f"{line[: width - 1]}\x1b[K\n" for line in lines[: height - 1])
        _put(stream, f"\x1b[H{cut}\x1b[J")  # one write over the old text: without clearing first, nothing flickers

    _put(stream, _ENTER)
    try:
        yield paint
    finally:
        _put(stream, _LEAVE)


class Stop:
    """Whether Ctrl-C or a termination signal has arrived.

    The handler does not raise, since it may run anywhere: in a destructor, where the exception is lost, or inside another library,
    which may convert it. It sets a flag and wakes the waiting thread. Only a write, which may block forever if nobody reads, is
    interrupted; a second signal interrupts anything.
    """

    def __init__(self) -> None:
        self.asked = self.writing = False
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._poll = select.poll()
        self._poll.register(self._reading, select.POLLIN)

    def wait(self, seconds: float) -> None:
        """Return after so many seconds, or when a signal arrives."""
        self._poll.poll(1000 * min(seconds, _LONGEST))

    def ask(self, number: int, frame: Any) -> None:
        """The signal handler."""
        again, self.asked = self.asked, True
        with suppress(BlockingIOError):
            os.write(self._writing, b".")
        if again or self.writing:
            raise KeyboardInterrupt

    def close(self) -> None:
        """Close the pipe."""
        os.close(self._reading)
        os.close(self._writing)


@contextmanager
def _stoppable() -> Iterator[Stop]:
    """While the block runs, termination signals set the given flag."""
    stop, before = Stop(), {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, stop.ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        stop.close()


def _put(stream: TextIO, text: str) -> None:
    stream.write(text)
    stream.flush()


def watch(
    folder: Path,
    key: bytes | None = None,
    *,
    once: bool = False,
    every: float = 1.0,
    minutes: float = 5.0,
    stream: TextIO | None = None,
) -> int:
    """Show the last minutes of a log until Ctrl-C or SIGTERM; 0 then, and 1 if ``once`` found a log that cannot be read.

    Args:
        folder, key: of the log; it may be created later, rotate, and change its writer.
        once: print one view and return, for scripts.
        every: seconds between views.
        minutes: how far back shares and rates look.
        stream: the standard output by default.
    """
    stream = sys.stdout if stream is None else stream
    view = View(folder, key, minutes)
    if once:
        view.read()
        _put(stream, "\n".join(view.lines(now_in_microseconds() / 1e6)) + "\n")
        return int(bool(view.problem))
    try:
        with _stoppable() as stop, _screen(stream) as paint:
            while not stop.asked:
                view.read(lambda: stop.asked)
                height = shutil.get_terminal_size().lines if stream.isatty() else 1000
                lines = view.lines(now_in_microseconds() / 1e6, height)
                stop.writing = True
                if not stop.asked:
                    paint(lines)
                stop.writing = False
                stop.wait(every)
        return 0
    except (KeyboardInterrupt, BrokenPipeError):  # the reader of the pipe is gone
        return 0
