"""The audit log's public class: a folder that one process writes and any number of processes read."""

import os
import threading
import time
import warnings
import weakref
from multiprocessing.util import Finalize
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Self, get_args

from torch import nn

from moe_posterior.audit.attach import Attachment, attach
from moe_posterior.audit.limits import require_name, require_router
from moe_posterior.audit.read import Reader
from moe_posterior.audit.rebuild import rebuild_from_end
from moe_posterior.audit.recorder import RouterRecorder
from moe_posterior.audit.storage.chain import beside_upkeep
from moe_posterior.audit.storage.clock import Drift, now
from moe_posterior.audit.storage.collect import Event, Item, Raw
from moe_posterior.audit.storage.files import FileSystem, explained
from moe_posterior.audit.storage.frames import Kind, check_key
from moe_posterior.audit.storage.marks import Position, read_head
from moe_posterior.audit.storage.resume import resume
from moe_posterior.audit.storage.segments import Place, Segments
from moe_posterior.audit.storage.state import encode_json, require_text
from moe_posterior.audit.storage.upkeep import Upkeep
from moe_posterior.audit.storage.writer import Writer
from moe_posterior.checks.declared import as_declared
from moe_posterior.checks.validation import number
from moe_posterior.errors import AuditError, AuditWriteError, InvalidArgumentError
from moe_posterior.router import PosteriorRouter

OnFull = Literal["block", "drop"]
_WRITING: "weakref.WeakSet[AuditLog]" = weakref.WeakSet()


class AuditLog:
    """Every decision, every outcome, and the belief each decision rested on: append-only, hash-chained, crash-safe.

    Recording appends to a queue in memory; a thread writes in groups and syncs. Once :meth:`flush` returns, everything
    recorded before is on disk. No query and no embedding is stored.

    Args:
        folder: one log. ``"w"`` creates it or resumes it.
        mode: ``"w"`` (default) the one writer, ``"r"`` a reader, also beside a writer.
        fsync_every: seconds between group commits, 0.1 by default: what a crash of the machine can cost. 0 commits at once.
        key: 16 to 64 secret bytes make every hash a MAC: without them nobody can rewrite the log unseen. None (default): anyone who can
            write the folder can also rewrite all of it consistently.
        max_queue: bytes of memory for what is not yet on the disk; 128 MiB by default.
        on_full: what to do when the queue is full or the disk fails. ``"block"`` (default): wait up to ``max_wait`` seconds for room,
            then raise, and raise at once while the disk fails; nothing is decided unrecorded. ``"drop"``: go on deciding, count what
            is lost, and write the count and a fresh checkpoint once there is room.
        rotate_bytes, rotate_seconds: size and age at which a new segment begins, with a checkpoint of the belief; 64 MiB, one hour.
        compact: turn sealed segments into Parquet in the background, for DuckDB and similar tools; False by default.
        retain_bytes, retain_seconds: remove the oldest sealed segments beyond this total size or age; None (default) keeps
            all. A note keeps their totals and their place in the chain. Age is time that passed while the log was being written;
            between two runs of a writer, for which there is only the clock, at most one day counts.
        files: for tests: the calls that touch the disk.

    Raises:
        AuditLockedError: another writer has the folder. AuditWriteError: it cannot be written. AuditError: the folder holds no valid
            log. InvalidArgumentError: an option out of range.

    >>> import tempfile, numpy as np
    >>> folder = tempfile.mkdtemp()
    >>> embeddings = np.array([[0.0, 0.0], [0.0, 1.0], [9.0, 9.0], [9.0, 8.0]], dtype=np.float32)
    >>> with AuditLog(folder) as log:
    ...     router = PosteriorRouter(num_experts=3, hidden_size=2, num_clusters=2, audit=log)
    ...     router.fit(embeddings)
    ...     decision = router.route(embeddings[0])
    ...     router.resolve(decision.id, 0.0)
    >>> AuditLog(folder, mode="r").decisions().select(["id", "cluster", "experts", "signal"]).to_pylist()
    [{'id': 0, 'cluster': 0, 'experts': [1], 'signal': [0.0]}]
    """

    @as_declared
    def __init__(
        self,
        folder: str | PathLike[str],
        *,
        mode: Literal["w", "r"] = "w",
        fsync_every: float = 0.1,
        key: bytes | None = None,
        max_queue: int = 128 << 20,
        on_full: OnFull = "block",
        max_wait: float = 10.0,
        rotate_bytes: int = 64 << 20,
        rotate_seconds: float = 3600.0,
        compact: bool = False,
        retain_bytes: int | None = None,
        retain_seconds: float | None = None,
        files: FileSystem | None = None,
    ) -> None:
        self.folder, self.mode, self.key = Path(folder), mode, check_key(key)
        if mode not in ("w", "r") or on_full not in get_args(OnFull):
            raise InvalidArgumentError(
                f"mode must be 'w' or 'r' and on_full one of {list(get_args(OnFull))}; got {mode!r}, {on_full!r}"
            )
        limits = {"max_queue": max_queue, "rotate_bytes": rotate_bytes, "rotate_seconds": rotate_seconds}
        for name, value in (("fsync_every", fsync_every), ("max_wait", max_wait)):
            number(name, value, least=0, most=threading.TIMEOUT_MAX)
        for name, value in limits.items():
            if not value >= 1:
                raise InvalidArgumentError(f"{name} must be at least 1; got {value}")
        self.on_full, self.max_wait = on_full, max_wait
        self.reached_id = 0  # every id the log knows of is below this
        self.dropped: dict[str, int] = {}
        self._keeping = threading.Lock()
        self._forked = False
        self._names: dict[str, int] = {}
        self._followed: dict[str, weakref.ref[PosteriorRouter]] = {}
        self._writer: Writer | None = None
        if mode == "r":
            read_head(self.folder, self.key)
            return
        self._drift = Drift()
        self._policy = (compact, retain_bytes, retain_seconds)
        self._background: threading.Thread | None = None
        self.folder = self.folder.absolute()  # the process may change its working folder
        place = Place(self.folder, self.key, files or FileSystem())
        self._lock_file = place.lock
        try:
            self._upkeep = Upkeep(place, self._tell_durably)
            with explained(f"{self.folder} cannot be opened for writing"):
                resumed = resume(place)
            self._names, self.reached_id = resumed.names, resumed.reached_id
            segments = Segments(place, resumed.start, self._said_in_segments)
            self._writer = Writer(
                segments,
                sync_every=fsync_every,
                max_queue=max_queue,
                rotate_bytes=rotate_bytes,
                rotate_seconds=rotate_seconds,
                on_rotate=self._keep_up_in_background,
            )
        except BaseException:
            self._lock_file.close()
            raise
        start = resumed.start
        found = {"continues": start.position.frames > 0, "clean": start.clean, "cut": resumed.cut}
        self.put(Event(0, {"event": "opened", "time": now(), **found}))
        _WRITING.add(self)
        self._at_exit = _close_at_exit(self)

    def follow(self, router: PosteriorRouter, name: str = "router") -> RouterRecorder:
        """Record what this router does from now on; ``PosteriorRouter(..., audit=log)`` calls it.

        Several routers may share a log under different names.
        """
        return self._follow(router, name, "attached")

    def attach(self, model: nn.Module, *, rate: float = 1.0, name: str = "model", seed: int = 0) -> Attachment:
        """Record the gates of a model: a share of the tokens of every forward, and their outcomes when the gates observe them.

        The rate is written into the log. Hooks see eager forwards only, so a compiled model must be attached to before it is compiled
        and run eagerly; detach from a model before it is pickled or copied.

        Args:
            model: holds at least one :class:`~moe_posterior.Gate`.
            rate: share of the tokens, in (0, 1]; 1 (default) records all.
            name: the gates appear in the log as ``name.place.in.model``.
            seed: of the sample, which has its own generator.

        Raises:
            InvalidArgumentError: no gate, or a rate out of range. AuditError: a gate is already being recorded.

        >>> import tempfile, torch
        >>> from moe_posterior import PosteriorMoE
        >>> moe = PosteriorMoE(nn.ModuleList([nn.Linear(8, 8) for _ in range(4)]), hidden_size=8, num_clusters=4)
        >>> moe.gate.fit(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)))
        >>> folder = tempfile.mkdtemp()
        >>> with AuditLog(folder) as log, log.attach(moe, rate=0.5):
        ...     routing = moe.route(torch.ones(1000, 8))
        ...     moe.observe(routing, torch.ones(1000, 2))
        >>> table = AuditLog(folder, mode="r").decisions()
        >>> 400 < len(table) < 600, table["source"][0].as_py(), table["signal"][0].as_py()
        (True, 'model.gate', [1.0, 1.0])
        """
        self._require_writer()
        return attach(self, model, rate, name, seed)

    def _follow(self, router: PosteriorRouter, name: str, reason: str) -> RouterRecorder:
        self._require_writer()
        followed = self._followed.get(require_text(name))
        if followed is not None and followed() not in (None, router):
            raise InvalidArgumentError(f"name must be a text that no other router in this log goes by; got {name!r}")
        require_router(router)
        recorder = RouterRecorder(self, router, self.source_of(name), name, reason)
        self._followed[name] = weakref.ref(router)
        return recorder

    def source_of(self, name: str) -> int:
        """The number of a router or gate in the files."""
        if require_text(name) not in self._names:
            require_name(name, self._names)
            self._names[name] = len(self._names)
        return self._names[name]

    @classmethod
    def recover(cls, folder: str | PathLike[str], *, name: str = "router", **options: Any) -> PosteriorRouter:
        """The router that wrote this folder, as of its last durable record, with its pending decisions, and recording again.

        The belief is rebuilt bit for bit from the last checkpoint and what came after it. After a crash, ids continue after a gap,
        so that none that was given but not yet written is given twice.

        Args:
            folder: of the log.
            name: which router, where several share a log.
            options: of :class:`AuditLog`.

        Raises:
            AuditError: there is no such log, no such router in it, or it was altered. Otherwise as :class:`AuditLog`.
        """
        log = cls(folder, **options)
        try:
            router = rebuild_from_end(log.folder, log.key, name, log._lock_file.files)
            router.record_with(log._follow(router, name, "recovered"))
            log.flush()
        except BaseException:
            log.close()
            raise
        return router

    def read(self) -> Reader:
        """The log's records, in order and verified as they are read; see :class:`~moe_posterior.audit.read.Reader`."""
        return Reader(self.folder, self.key)

    def decisions(self, **filters: Any) -> Any:
        """The paper's full entries, as a ``pyarrow.Table``; see :meth:`Reader.decisions`."""
        return beside_upkeep(self.folder, lambda: self.read().decisions(**filters))

    def outcomes(self) -> Any:
        """Outcomes, one row a decision and slot, also refused ones; see :meth:`Reader.outcomes`."""
        return beside_upkeep(self.folder, lambda: self.read().outcomes())

    def flush(self, timeout: float = 60.0) -> None:
        """Wait until everything recorded so far is on disk.

        Raises:
            AuditWriteError: it is not, after ``timeout`` seconds or because the disk fails; it stays queued. Or another process
                removed, renamed or changed the folder, its lock or the current segment, and nothing more is recorded.
        """
        self._require_writer().flush(timeout)

    def compact(self) -> int:
        """Convert every sealed segment to Parquet now; returns how many. Rotation seals a segment; so does reopening a log."""
        with self._keeping, explained(f"{self.folder} cannot be compacted"):
            self._require_writer().flush(60.0)
            return self._upkeep.compact()

    def retain(self, max_bytes: int | None = None, max_seconds: float | None = None) -> int:
        """Remove the oldest sealed segments beyond a total size or an age; returns how many were removed."""
        with self._keeping, explained(f"{self.folder}: old segments cannot be removed"):
            writer = self._require_writer()
            self._note_clock()
            writer.flush(60.0)
            begun = writer.segments.opened
            elapsed = 0.0 if begun is None else time.monotonic() - begun
            return self._upkeep.retain(max_bytes, max_seconds, elapsed)

    def close(self, timeout: float = 60.0) -> None:
        """Write what is left, seal the log's end and release the folder. A closed log can be opened again.

        Raises:
            AuditWriteError: not everything could be written; the rest is lost, and the message says how much. If the disk still
                hangs after ``timeout`` seconds, the folder is released once it no longer does.
        """
        if self._writer is None:
            return
        if self._background is not None:
            self._background.join(timeout)
        writer, self._writer = self._writer, None
        self._at_exit.cancel()
        try:
            with explained(f"{self.folder} cannot be closed"):
                writer.stop(timeout)
                writer.segments.close(Raw(Kind.CLOSING, encode_json({"time": now()})))
        finally:
            writer.when_ended(self._lock_file.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def head(self) -> Position:
        """The end of what is on disk; keep its digest elsewhere to prove later that nothing before it was changed."""
        if self._writer is not None:
            return self._writer.segments.position
        return read_head(self.folder, self.key).position

    @property
    def generation(self) -> int:
        """Rises when the log needs checkpoints to begin a new segment."""
        return self._require_writer().generation

    def require_open(self) -> None:
        """Raise AuditWriteError where nothing can ever be recorded again: the log is closed, or another process is its writer."""
        self._require_writer()

    def has_room(self) -> bool:
        """Whether something can be recorded now."""
        return self._require_writer().has_room()

    def admit(self) -> bool:
        """Whether the next event will be recorded; waits or raises as ``on_full`` says."""
        writer = self._require_writer()
        if writer.has_room():
            return True
        if self.on_full == "drop":
            return False
        writer.wait_for_room(self.max_wait)
        return True

    def put(self, item: Item, size: int = 500) -> None:
        """Record an item of about ``size`` bytes."""
        self._require_writer().put(item, size)

    def count_dropped(self, what: str, count: int) -> None:
        """Note that something was not recorded."""
        self.dropped[what] = self.dropped.get(what, 0) + count

    def _said_in_segments(self) -> dict[str, Any]:
        """What each segment's first frame repeats, so that a log can be resumed from its last segment."""
        return {"sources": dict(self._names), "reached": self.reached_id}

    def _tell_durably(self, event: dict[str, Any]) -> None:
        self.put(Event(0, {**event, "time": now()}))
        self.flush()

    def _note_clock(self) -> None:
        """Record that the clock was set or drifts: times in the log are then not in order."""
        step = self._drift.step()
        if step and self._writer is not None:
            self.put(Event(0, {"event": "clock stepped", "time": now(), "seconds": round(step, 3)}))
            warnings.warn(
                f"{self.folder}: the clock was set by {step:.0f} s; the age of segments goes by the time that passed",
                RuntimeWarning,
                stacklevel=2,
            )

    def _keep_up_in_background(self) -> None:
        self._note_clock()
        compact, max_bytes, max_seconds = self._policy
        if not compact and max_bytes is None and max_seconds is None:
            return
        if self._background is None or not self._background.is_alive():
            self._background = threading.Thread(target=self._keep_up, name="audit upkeep", daemon=True)
            self._background.start()

    def _keep_up(self) -> None:
        compact, max_bytes, max_seconds = self._policy
        try:
            if compact:
                self.compact()
            if max_bytes is not None or max_seconds is not None:
                self.retain(max_bytes, max_seconds)
        except (AuditError, OSError) as error:  # recording continues; the next rotation tries again
            warnings.warn(f"{self.folder}: upkeep of old segments failed: {error}", RuntimeWarning, stacklevel=2)

    def _require_writer(self) -> Writer:
        if self._writer is None:
            state = "open for reading" if self.mode == "r" else "closed"
            state = "written by the process that this one was forked from" if self._forked else state
            raise AuditWriteError(f"{self.folder}: this log is {state}")
        return self._writer

    def _leave_to_parent(self) -> None:
        """In a forked child: the writer's thread does not exist here, and the log's end and lock belong to the parent."""
        self._keeping = threading.Lock()
        if self._writer is not None:
            self._writer, self._forked = None, True
            self._lock_file.close()


def _leave_all_to_parent() -> None:
    for log in list(_WRITING):
        log._leave_to_parent()


os.register_at_fork(after_in_child=_leave_all_to_parent)


def _close_at_exit(log: AuditLog) -> Finalize:
    """Also when a ``multiprocessing`` worker exits, which runs only its own finalizers."""
    reference = weakref.ref(log)

    def close() -> None:
        if (alive := reference()) is not None:
            alive.close(timeout=5.0)

    return Finalize(None, close, exitpriority=100)
