"""The thread that turns noted items into synced frames, in groups, and the queue in front of it."""

import threading
import time
from collections import deque
from collections.abc import Callable

from moe_posterior.audit.storage.collect import Collector, Item, Raw
from moe_posterior.audit.storage.segments import Segments
from moe_posterior.errors import AuditWriteError

_LARGE = 8 << 20  # bytes of items that are not kept waiting for the next group commit, and about what one frame holds
_PATIENCE = (0.05, 5.0)  # seconds between attempts while the disk refuses: at first, at most


class Writer:
    """Items in, durable frames out. Producers call :meth:`put`, which only appends; one thread does the rest."""

    def __init__(
        self,
        segments: Segments,
        *,
        sync_every: float,
        max_queue: int,
        rotate_bytes: int,
        rotate_seconds: float,
        on_rotate: Callable[[], None],
    ) -> None:
        self.segments = segments
        self.sync_every, self.max_queue = sync_every, max_queue
        self.rotate_bytes, self.rotate_seconds, self.on_rotate = rotate_bytes, rotate_seconds, on_rotate
        self.generation = 0  # what sources compare with theirs: a higher one asks for checkpoints that begin a segment
        self.failure: Exception | None = None  # of the last attempt to write
        self._queue: deque[tuple[Item, int]] = deque()
        self._put_bytes = self._written_bytes = 0  # each has one writer: no lock
        self._put_items = self._written_items = 0
        self._lock = threading.Lock()
        self._wake, self._progress = threading.Event(), threading.Condition()
        self._attempts = 0  # that failed
        self._asked = self._checked = (
            0  # how often somebody wanted to know whether all is in place, and up to which it is
        )
        self._stopping = self._ended = False
        self._collector = Collector()
        self._segment = segments.position.segment
        self._unwritten: list[Raw] = []
        self._taken_items = self._taken_bytes = 0  # what they were made of
        self._thread = threading.Thread(target=self._run, name="audit log", daemon=True)
        self._thread.start()

    @property
    def queued_bytes(self) -> int:
        """What is noted down and not yet on the disk."""
        return self._put_bytes - self._written_bytes

    def put(self, item: Item, size: int) -> None:
        """Note an item; about ``size`` bytes of memory."""
        with self._lock:
            if self._stopping:
                raise AuditWriteError(f"{self.segments.folder}: this log is closed")
            self._put_bytes += size
            self._put_items += 1
            self._queue.append((item, size))
        if (not self.sync_every or self.queued_bytes > _LARGE) and not self._wake.is_set():
            self._wake.set()

    def has_room(self) -> bool:
        """Whether more may be noted down."""
        return self.failure is None and self.queued_bytes < self.max_queue

    def wait_for_room(self, max_wait: float) -> None:
        """Return once there is room.

        Raises:
            AuditWriteError: the disk refuses, or there is no room after ``max_wait`` seconds.
        """
        if self.has_room():
            return
        self._wake.set()
        with self._progress:
            self._progress.wait_for(lambda: self.failure is not None or self.has_room(), max_wait)
        if not self.has_room():
            raise self._error(f"its queue of {self.max_queue} bytes stayed full for {max_wait:g} s")

    def flush(self, timeout: float) -> None:
        """Return once everything noted down before is on the disk, in the log's folder.

        Raises:
            AuditWriteError: it is not; it is kept, and written once the disk takes it, unless the folder is no longer the log's.
        """
        with self._lock:
            goal = self._put_items
            self._asked = ticket = self._asked + 1
        attempts = self._attempts
        self._wake.set()
        with self._progress:
            self._progress.wait_for(
                lambda: (
                    (self._written_items >= goal and self._checked >= ticket)
                    or (self.failure is not None and (self._attempts > attempts or self._ended))
                ),
                timeout,
            )
        if self._written_items < goal or self._checked < ticket:
            raise self._error(f"it took longer than {timeout:g} s")

    def stop(self, timeout: float) -> None:
        """Write what is left and end the thread.

        Raises:
            AuditWriteError: not all could be written. The thread has ended all the same, and the rest is lost; only where a call to
                the disk does not return, it lives on until it does.
        """
        with self._lock:
            self._stopping = True
        self._wake.set()
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise self._error(f"it took longer than {timeout:g} s")
        if self._written_items < self._put_items:
            raise self._error("it was closed meanwhile")

    def when_ended(self, then: Callable[[], None]) -> None:
        """Do something once the thread writes no more; now, unless the disk holds it."""
        if not self._thread.is_alive():
            then()
            return

        def wait() -> None:
            self._thread.join()
            then()

        threading.Thread(target=wait, name="audit log, closing", daemon=True).start()

    def _error(self, otherwise: str) -> AuditWriteError:
        waiting = self._put_items - self._written_items
        reason = otherwise
        if self.failure is not None:
            reason = f"{'the disk says: ' if isinstance(self.failure, OSError) else ''}{self.failure}"
        return AuditWriteError(f"{self.segments.folder}: {waiting} records wait to be written; {reason}")

    def _run(self) -> None:
        patience = _PATIENCE[0]
        while True:
            stopping = self._stopping
            if not stopping:
                self._wake.wait((self.sync_every or None) if self.failure is None else patience)
            self._wake.clear()
            try:
                self._write_all()
                patience = _PATIENCE[0]
            except Exception as error:
                patience = min(2 * patience, _PATIENCE[1])
                with self._progress:
                    self.failure = error
                    self._attempts += 1
                    self._ended = not isinstance(error, OSError)
                    self._progress.notify_all()
                if self._ended:
                    return  # a bug of ours: those who wait are told, and nothing more is accepted
            if stopping:
                return

    def _write_all(self) -> None:
        asked = self._asked
        self._commit()  # what an earlier attempt left
        if asked > self._checked and not self._queue:
            self.segments.require()
        while self._queue:
            items, size = [], 0
            while self._queue and size <= _LARGE:
                item, bytes_ = self._queue.popleft()
                items.append(item)
                size += bytes_
            self._taken_items, self._taken_bytes = len(items), size
            self._unwritten = self._collector.frames(items)
            self._commit()
        if asked > self._checked:
            with self._progress:
                self._checked = asked
                self._progress.notify_all()

    def _commit(self) -> None:
        if not self._unwritten and not self._taken_items:
            return
        try:
            self.segments.commit(self._unwritten)
        except OSError:
            del self._unwritten[: self.segments.done]
            raise
        self._unwritten = []
        self._written_items += self._taken_items
        self._written_bytes += self._taken_bytes
        self._taken_items = self._taken_bytes = 0
        if self.segments.position.segment != self._segment:
            self._segment = self.segments.position.segment
            self.on_rotate()
        mended = self.failure is not None
        with self._progress:
            self.failure = None
            self._progress.notify_all()
        self._ask_for_rotation(mended)

    def _ask_for_rotation(self, mended: bool) -> None:
        """A full or old segment is to end; so is one that had to be begun without a checkpoint."""
        if self._collector.generation < self.generation:
            return  # asked already
        begun = self.segments.opened
        old = begun is not None and time.monotonic() - begun > self.rotate_seconds
        if mended or old or self.segments.size > self.rotate_bytes:
            self.generation += 1
