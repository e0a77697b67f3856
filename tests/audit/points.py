"""Every call that an audit log makes to the file system during a scripted life, and what is left if it fails, or is the last one.

Run as a script, ``python points.py FOLDER``, it goes through all of them in child processes that really end.
"""

import builtins
import errno
import io
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from audit.disks import SYNCS, Quick
from audit.worlds import EMBEDDINGS, D

from moe_posterior import PosteriorRouter
from moe_posterior.audit import AuditError, AuditLog
from moe_posterior.audit.verify import verify

OPTIONS = {"fsync_every": 1000.0, "rotate_bytes": 1_200, "max_wait": 0.0}
WRITES = ("write", "writev")
_SITES = 4  # frames of the stack that tell one place in the code from another


class _ReadFile(io.FileIO):
    """A file whose reads are calls like all others."""

    disk: "Counted"

    def readinto(self, buffer: Any, /) -> int:
        return self.disk.count(super().readinto, (buffer,), {})


class Counted(Quick):
    """Counts calls; ``before`` is told of each, with its number, and may raise."""

    def __init__(self, before: Callable[[int, Callable[..., Any], tuple[Any, ...]], None] = lambda *_: None) -> None:
        self.calls, self.before, self.step = 0, before, ""

    def call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        if function is builtins.open and arguments[1:] == ("rb",):
            return self.count(self._open, arguments[:1], {})
        return self.count(super().call, (function, *arguments), options)

    def count(self, function: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        named = arguments if callable(arguments[0]) else (function, *arguments)
        self.before(self.calls, named[0], named[1:])
        self.calls += 1
        return function(*arguments, **options)

    def _open(self, path: Path) -> Any:
        raw = _ReadFile(path, "rb")
        raw.disk = self
        return io.BufferedReader(raw)


class Told:
    """What a session decided and what it was told to be safe."""

    def __init__(self) -> None:
        self.given: dict[int, tuple[int, tuple[int, ...]]] = {}
        self.signals: dict[int, float] = {}
        self.safe_ids: set[int] = set()
        self.safe_signals: set[int] = set()
        self.errors: list[Exception] = []

    def acknowledge(self) -> None:
        self.safe_ids, self.safe_signals = set(self.given), set(self.signals)


class Session:
    """Open, write, rotate, compact, retain, close, and all of it again; what is refused is tried once more, then passed over."""

    def __init__(self, folder: Path, disk: Counted, told: Told, on_safe: Callable[[], None] = lambda: None) -> None:
        self.folder, self.disk, self.told, self.on_safe = folder, disk, told, on_safe
        self.log: AuditLog | None = None
        self.router: PosteriorRouter | None = None

    def run(self) -> None:
        self._try("open", self._open)
        for turn in range(2):
            for seed in range(3):
                self._try("write", lambda seed=seed: self._route(seed))
                self._try("flush", self._flush)
            self._try("compact", lambda: self.log.compact())
            self._try("write", lambda: self._route(3))
            self._try("flush", self._flush)
            self._try("retain", lambda: self.log.retain(max_bytes=8_000))
            if not turn:
                self._try("close", self._close)
                self._try("reopen", self._recover)
        self._try("close", self._close)

    def _try(self, step: str, do: Callable[[], object]) -> None:
        self.disk.step = step
        for _ in range(2):
            if step not in ("open", "reopen") and self.log is None:
                return
            try:
                do()
                return
            except AuditError as error:
                self.told.errors.append(error)

    def _open(self) -> None:
        self.log = AuditLog(self.folder, files=self.disk, **OPTIONS)
        self.router = PosteriorRouter(3, D, 2, max_pending=8, audit=self.log)
        self.router.fit(EMBEDDINGS[:20])

    def _recover(self) -> None:
        if self.log is None and self.router is not None:
            self.router = AuditLog.recover(self.folder, files=self.disk, **OPTIONS)
            self.log = self.router._audit.log

    def _route(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        batch = self.router.route_batch(EMBEDDINGS[rng.integers(200, size=6)])
        for i, cluster, experts in zip(batch.ids, batch.clusters, batch.experts, strict=True):
            self.told.given[int(i)] = int(cluster), tuple(experts.tolist())
        for i in batch.ids[::2].tolist():
            signal = float(rng.random())
            self.router.resolve(i, signal)
            self.told.signals[i] = signal

    def _flush(self) -> None:
        self.log.flush()
        self.told.acknowledge()
        self.on_safe()

    def _close(self) -> None:
        log, self.log = self.log, None
        log.close()
        self.told.acknowledge()
        self.on_safe()


def abandon(session: Session) -> None:
    """Leave the log as a process leaves it that is no more."""
    if session.log is not None:
        session.log._lock_file.close()
        session.log._writer = None


def holds(folder: Path, told: Told) -> None:
    """The folder is a log that opens, is sound, holds all that was called safe and nothing that was never decided, and goes on."""
    found = verify(folder)
    if (folder / "head.json").exists():
        assert found.problem is None, found.problem
    try:
        router = AuditLog.recover(folder, files=Quick(), fsync_every=1000.0)
        log = router._audit.log
        if router.gate.clusterer.fitted:
            router.route(EMBEDDINGS[0])
    except AuditError as error:
        if told.safe_ids or "no router named" not in str(error):
            raise
        log = AuditLog(folder, files=Quick(), fsync_every=1000.0)
    log.close()
    found = verify(folder)
    assert found.problem is None, found.problem
    assert found.closed
    reader = AuditLog(folder, mode="r")
    decisions = reader.decisions(posterior=False).to_pylist()
    there = {row["id"]: (row["cluster"], tuple(row["experts"])) for row in decisions}
    assert len(there) == len(decisions), "an id was given twice"
    new = max(there, default=0)
    invented = {i: row for i, row in there.items() if told.given.get(i) != row and (i != new or i in told.given)}
    assert not invented, invented
    lost = told.safe_ids - set(there)
    assert len(lost) <= found.removed["decisions"], f"lost: {sorted(lost)}"
    assert not lost or max(lost) < min(there)
    signals = {row["id"]: row["signal"] for row in reader.outcomes().to_pylist() if row["accepted"]}
    assert {i for i, signal in signals.items() if told.signals.get(i) != signal} == set()
    lost = {i for i in told.safe_signals - set(signals) if i in there}
    assert not lost, f"outcomes lost: {lost}"


def site(step: str) -> tuple[Any, ...]:
    """Where in the code, in which step: one key for calls that are made by the same lines."""
    frame, lines = sys._getframe(3), []
    while frame is not None and len(lines) < _SITES:
        if "/audit/" in frame.f_code.co_filename and "files.py" not in frame.f_code.co_filename:
            lines.append((Path(frame.f_code.co_filename).name, frame.f_lineno))
        frame = frame.f_back
    return step, *lines


def count_points(folder: Path) -> list[tuple[Any, ...]]:
    """The calls of the whole session, each by its function, step and place in the code."""
    keys: list[tuple[Any, ...]] = []

    def note(number: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        keys.append((getattr(function, "__name__", "?"), *site(disk.step)))

    disk = Counted(note)
    Session(folder, disk, Told()).run()
    return keys


def fail_at(folder: Path, point: int, error: int, for_good: bool) -> Told:
    """A session whose call ``point`` fails, with all after it or alone."""

    def refuse(number: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        if number == point or (for_good and number > point):
            disk.calls += 1
            if getattr(function, "__name__", "") == "write" and number == point:  # a full disk takes the beginning
                function(*arguments[:-1], bytes(arguments[-1])[: len(arguments[-1]) // 2])
            raise OSError(error, os.strerror(error))

    disk, told = Counted(refuse), Told()
    session = Session(folder, disk, told)
    session.run()
    disk.before = lambda *_: None
    abandon(session)
    return told


class Machine(Counted):
    """Keeps, before every call that changes something, what a crash of the process and a power cut would leave.

    A file's content is on the disk as of its last sync, a folder's names as of the folder's. What was not synced may be lost or not,
    names apart from contents; bytes that were written may come back as zeros.
    """

    def __init__(self, folder: Path, told: Told) -> None:
        super().__init__(self._keep)
        self.folder, self.told = folder, told
        self.states: dict[tuple[tuple[str, bytes], ...], tuple[int, int, frozenset[int], frozenset[int]]] = {}
        self.points = 0
        self._synced: dict[int, bytes] = {}  # by inode
        self._names: dict[str, int] = {}
        self._graves: list[int] = []  # descriptors that keep inodes from being used again

    def _keep(self, number: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.points += 1
        if not self.folder.is_dir():
            return
        live = {path.name: path for path in self.folder.iterdir()}
        inodes = {name: path.stat().st_ino for name, path in live.items()}
        content = {inodes[name]: path.read_bytes() for name, path in live.items()}
        if function in (os.unlink, os.replace) and Path(arguments[-1]).exists():
            self._graves.append(os.open(arguments[-1], os.O_RDONLY))
        everything = {name: content[inode] for name, inode in inodes.items()}
        synced = {i: self._synced.get(i, b"") for i in {*inodes.values(), *self._names.values()}}
        zeros = {
            i: synced[i] + bytes(len(data) - len(synced[i])) if data.startswith(synced[i]) else data
            for i, data in content.items()
        }
        kinds = [
            everything,
            {name: synced[i] for name, i in self._names.items()},
            {name: synced[i] for name, i in inodes.items()},
            {name: synced[i] for name, i in inodes.items() if name in self._names},  # renamed, and new ones lost
            {name: content.get(i, synced[i]) for name, i in self._names.items()},
            {name: zeros[i] for name, i in inodes.items()},
        ]
        if getattr(function, "__name__", "") == "write":
            target = arguments[0] if isinstance(arguments[0], int) else function.__self__.fileno()  # type: ignore[attr-defined]
            half = bytes(arguments[-1])[: len(arguments[-1]) // 2]
            inode = os.fstat(target).st_ino
            kinds.append({name: data + half * (inodes[name] == inode) for name, data in everything.items()})
        for kind in kinds:
            state = tuple(sorted((n, data) for n, data in kind.items() if n != "writer.lock"))
            self.states[state] = self._now()
        if function in SYNCS:
            stat = os.fstat(arguments[0])
            if stat.st_ino in content:
                self._synced[stat.st_ino] = content[stat.st_ino]
            elif stat.st_ino == self.folder.stat().st_ino:
                self._names = inodes

    def _now(self) -> tuple[int, int, frozenset[int], frozenset[int]]:
        return (
            len(self.told.given),
            len(self.told.signals),
            frozenset(self.told.safe_ids),
            frozenset(self.told.safe_signals),
        )


def crash_states(folder: Path) -> tuple[int, Iterator[tuple[dict[str, bytes], Told]]]:
    """How many calls a session makes, and every different state that a crash at one of them could leave, with what was safe by then."""
    told = Told()
    machine = Machine(folder, told)
    Session(folder, machine, told).run()
    for grave in machine._graves:
        os.close(grave)
    assert not told.errors

    def states() -> Iterator[tuple[dict[str, bytes], Told]]:
        for state, (_, _, ids, signals) in machine.states.items():
            then = Told()
            then.given, then.signals = told.given, told.signals
            then.safe_ids, then.safe_signals = set(ids), set(signals)
            yield dict(state), then

    return machine.points, states()


def exit_at(folder: Path, point: int) -> Told:
    """A session in a child process that ends, without a word, instead of its call ``point``."""
    reading, writing = os.pipe()
    child = os.fork()
    told = Told()
    if not child:
        try:
            os.close(reading)

            def stop(number: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
                if number == point:
                    os._exit(0)

            def tell() -> None:
                os.write(writing, f"{sorted(told.safe_ids)}|{sorted(told.safe_signals)}\n".encode())

            Session(folder, Counted(stop), told, tell).run()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writing)
    with open(reading) as lines:
        said = lines.read().splitlines()
    assert os.waitpid(child, 0)[1] == 0
    if said:
        ids, signals = said[-1].split("|")
        told.safe_ids, told.safe_signals = set(eval(ids)), set(eval(signals))
    return told


def main(folder: Path) -> int:
    """All points: as errors, alone and for good, and as real ends of a process."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    everything = Told()
    Session(folder / "whole", Counted(), everything).run()
    points = len(count_points(folder / "count"))
    for point in range(points):
        told = exit_at(folder / "log", point)
        told.given, told.signals = everything.given, everything.signals
        if (folder / "log").exists():
            holds(folder / "log", told)
            shutil.rmtree(folder / "log")
    print(f"{points} calls to the file system, the process ended at each: nothing acknowledged was lost")
    for point in range(points):
        holds_after_failure(folder / "log", point, for_good=False)
        holds_after_failure(folder / "log", point, for_good=True)
    print(f"{points} calls to the file system, failed alone and for good: nothing acknowledged was lost")
    return 0


def holds_after_failure(folder: Path, point: int, *, for_good: bool) -> None:
    """A failing call is told to somebody; one that fails alone keeps nothing from being written in the end."""
    told = fail_at(folder, point, (errno.ENOSPC, errno.EIO)[point % 2], for_good)
    assert told.errors, f"call {point} failed in silence"
    assert for_good or told.safe_ids == set(told.given), f"the log did not get over call {point}: {told.errors[-1]}"
    if folder.exists():
        holds(folder, told)
        shutil.rmtree(folder)


def holds_after_crash(folder: Path, state: dict[str, bytes], told: Told) -> None:
    """One of :func:`crash_states`."""
    folder.mkdir()
    for name, data in state.items():
        (folder / name).write_bytes(data)
    holds(folder, told)
    shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
