"""Crashes and failing disks: nothing acknowledged is lost, nothing is dropped in silence, no router is stuck."""

import errno
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import BinaryIO

import pytest
from audit.worlds import EMBEDDINGS, flat_state, live, new_router

from moe_posterior.audit import AuditError, AuditLockedError, AuditLog, AuditWriteError
from moe_posterior.audit.rebuild import rebuild
from moe_posterior.audit.storage.files import HEAD, FileSystem, segment_name
from moe_posterior.audit.storage.frames import genesis
from moe_posterior.audit.storage.marks import Head, Position, head_bytes
from moe_posterior.audit.verify import verify, verify_decisions

ROOT = Path(__file__).resolve().parents[2]


class FailingDisk(FileSystem):
    """A disk that refuses the chosen calls while ``error`` is set; a refused write still writes half of it."""

    def __init__(self, *calls: str) -> None:
        self.calls, self.error = calls, 0
        self.refused = 0
        self.release = threading.Event()
        self.release.set()

    def _may(self, call: str) -> None:
        self.release.wait()
        if self.error and call in self.calls:
            self.refused += 1
            raise OSError(self.error, os.strerror(self.error))

    def append(self, path: Path) -> BinaryIO:
        self._may("append")
        return super().append(path)

    def write(self, file: BinaryIO, data: bytes) -> None:
        if self.error and "write" in self.calls:
            super().write(file, data[: len(data) // 2])
        self._may("write")
        super().write(file, data)

    def sync(self, file: BinaryIO) -> None:
        self._may("sync")
        super().sync(file)

    def sync_folder(self, folder: Path) -> None:
        self._may("sync_folder")
        super().sync_folder(folder)

    def truncate(self, path: Path, size: int) -> None:
        self._may("truncate")
        super().truncate(path, size)

    def replace(self, path: Path, data: bytes) -> None:
        self._may("replace")
        super().replace(path, data)


def crash_runs(folder: Path, runs: int, seed: int) -> str:
    script = [sys.executable, str(ROOT / "tests/audit/crashes.py"), str(folder), str(runs), str(seed)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(script, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_killed_writers_lose_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    assert "none lost" in crash_runs(tmp_path / "log", 3, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 9))
def test_two_hundred_killed_writers_lose_nothing(tmp_path: Path, seed: int) -> None:
    assert "none lost" in crash_runs(tmp_path / "log", 25, seed)


@pytest.mark.parametrize("keep", [0, 1, 20, 59, 60, 100, -1])
def test_a_torn_tail_is_cut_and_a_new_segment_begun(tmp_path: Path, keep: int) -> None:
    log = AuditLog(tmp_path)
    router = new_router(log)
    live(router, 10, seed=0)
    log.flush()
    log._lock_file.close()  # as if it had died
    log._writer = None
    path = tmp_path / segment_name(0)
    size = path.stat().st_size
    with open(path, "r+b") as file:
        data = file.read()
        file.write(data[-200:][: keep if keep >= 0 else None] if keep != -1 else b"\0" * 4096)
    tail = verify(tmp_path)
    torn = keep != 0
    if keep in (60, 100):  # long enough to be a record, and none: nobody can tell a torn write from an altered one
        assert "its head was altered" in tail.problem
        with pytest.raises(AuditError, match="its head was altered"):
            AuditLog.recover(tmp_path)
        return
    assert tail.sound
    assert tail.torn_bytes == path.stat().st_size - size
    assert bool(tail.torn) == torn
    recovered = AuditLog.recover(tmp_path)
    assert path.stat().st_size == size
    live(recovered, 5, seed=1)
    recovered._audit.log.close()
    assert (tmp_path / segment_name(1)).exists()
    assert verify(tmp_path).sound
    assert flat_state(rebuild(AuditLog(tmp_path, mode="r").read(), check=True)) == flat_state(recovered)


@pytest.mark.parametrize("left", [None, b"", b"MPA1", bytes(30)])
def test_a_writer_that_died_at_birth_leaves_a_log_that_can_be_opened(tmp_path: Path, left: bytes | None) -> None:
    position = Position(0, 0, genesis(None))
    (tmp_path / HEAD).write_bytes(head_bytes(Head(position, False), None))
    if left is not None:
        (tmp_path / segment_name(0)).write_bytes(left)
    assert verify(tmp_path).problem is None
    assert len(AuditLog(tmp_path, mode="r").decisions()) == 0
    with pytest.raises(AuditError, match="no router named"):
        AuditLog.recover(tmp_path)
    with AuditLog(tmp_path) as log:
        router = new_router(log)
        live(router, 5, seed=0)
    assert verify(tmp_path).problem is None
    assert len(AuditLog(tmp_path, mode="r").decisions()) > 0


def test_ids_that_were_given_before_a_crash_are_not_given_again(tmp_path: Path) -> None:
    log = AuditLog(tmp_path, fsync_every=1000.0)
    router = new_router(log)
    durable = router.route(EMBEDDINGS[0])
    log.flush()
    lost = [router.route(embedding).id for embedding in EMBEDDINGS[:50]]
    log._lock_file.close()
    log._writer = None
    recovered = AuditLog.recover(tmp_path)
    new = recovered.route(EMBEDDINGS[0]).id
    assert new not in lost
    assert new > max(lost)
    assert new % recovered.max_pending == (durable.id + 1) % recovered.max_pending  # the ring goes on in its order
    with pytest.raises(ValueError, match=f"decision {lost[3]} "):
        recovered.resolve(lost[3], 1.0)
    recovered.resolve(durable.id, 1.0)
    recovered._audit.log.close()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize(
    "calls",
    [("write",), ("sync",), ("write", "append"), ("sync", "truncate"), ("append",), ("sync_folder",), ("replace",)],
)
def test_a_refusing_disk_raises_and_is_written_to_once_it_takes_more(tmp_path: Path, calls: tuple, error: int) -> None:
    disk = FailingDisk(*calls)
    log = AuditLog(tmp_path, files=disk, fsync_every=0.01, rotate_bytes=1_500)
    router = new_router(log)
    waiting = live(router, 10, seed=0)
    log.flush()
    disk.error = error
    problem = ""
    for seed in range(100):
        before = router._next_id
        try:
            router.route(EMBEDDINGS[seed])
        except AuditWriteError as refused:
            problem = str(refused)
            break
        time.sleep(0.005)
    if calls not in (("append",), ("sync_folder",), ("replace",)):  # these are needed only for a new segment
        assert os.strerror(error) in problem
        assert router._next_id == before  # nothing was decided
        with pytest.raises(AuditWriteError, match="records wait to be written"):
            log.flush()
    disk.error = 0
    log.flush()
    live(router, 20, seed=5, waiting=waiting)
    log.close()
    assert verify(tmp_path).problem is None
    reader = AuditLog(tmp_path, mode="r").read()
    assert reader.decisions()["id"].to_pylist() == list(range(router._next_id))
    assert flat_state(rebuild(reader, check=True)) == flat_state(router)
    assert verify_decisions(reader).disagreements == 0


def test_what_is_dropped_is_counted_and_the_log_goes_on_with_a_checkpoint(tmp_path: Path) -> None:
    disk = FailingDisk("write")
    log = AuditLog(tmp_path, files=disk, fsync_every=0.01, on_full="drop")
    router = new_router(log)
    live(router, 10, seed=0)
    log.flush()
    recorded = router._next_id
    disk.error = errno.ENOSPC
    router.route(EMBEDDINGS[0])
    deadline = time.monotonic() + 10
    while log.has_room() and time.monotonic() < deadline:
        time.sleep(0.005)
    given = router._next_id
    waiting = live(router, 10, seed=1)  # decides on
    dropped = router._next_id - given
    assert log.dropped["decisions"] == dropped > 0
    disk.error = 0
    log.flush()
    live(router, 10, seed=2, waiting=waiting)
    log.close()
    log = AuditLog(tmp_path, mode="r")
    assert verify(tmp_path).sound
    ids = log.decisions()["id"].to_pylist()
    assert set(range(recorded)) <= set(ids)
    assert len(ids) == router._next_id - dropped
    events = log.read().events().to_pylist()
    (lost,) = [event["detail"] for event in events if event["event"] == "dropped"]
    assert f'"decisions":{dropped}' in lost
    assert flat_state(rebuild(log.read())) == flat_state(router)


def test_a_full_queue_holds_the_router_back_and_says_so_when_it_stays_full(tmp_path: Path) -> None:
    disk = FailingDisk()
    log = AuditLog(tmp_path, files=disk, fsync_every=0.01, max_queue=50_000, max_wait=0.3)
    router = new_router(log)
    log.flush()
    disk.release.clear()  # a disk that hangs
    while log.has_room():
        router.route_batch(EMBEDDINGS)
    with pytest.raises(AuditWriteError, match="stayed full"):
        router.route_batch(EMBEDDINGS)
    assert log._writer.queued_bytes < 100_000
    disk.release.set()
    router.route_batch(EMBEDDINGS)
    log.close()
    ids = AuditLog(tmp_path, mode="r").decisions()["id"].to_pylist()
    assert ids == list(range(router._next_id))


def test_memory_stays_bounded_when_decisions_come_faster_than_the_disk_takes_them(tmp_path: Path) -> None:
    class SlowDisk(FileSystem):
        def sync(self, file: BinaryIO) -> None:
            time.sleep(0.05)
            super().sync(file)

    log = AuditLog(tmp_path, files=SlowDisk(), fsync_every=0.0, max_queue=100_000)
    router = new_router(log)
    most = 0
    for _ in range(300):
        router.route_batch(EMBEDDINGS)
        most = max(most, log._writer.queued_bytes)
    log.close()
    assert most < 130_000
    assert len(AuditLog(tmp_path, mode="r").decisions(posterior=False)) == 300 * len(EMBEDDINGS)


def test_a_second_writer_is_refused_and_a_reader_is_not(tmp_path: Path) -> None:
    with AuditLog(tmp_path) as log:
        router = new_router(log)
        live(router, 5, seed=0)
        log.flush()
        with pytest.raises(AuditLockedError, match="has a writer already"):
            AuditLog(tmp_path)
        assert len(AuditLog(tmp_path, mode="r").decisions()) == router._next_id
    AuditLog(tmp_path).close()


def test_folders_that_cannot_be_written_are_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AuditWriteError, match="cannot be written"):
        AuditLog(tmp_path / "file")
    with pytest.raises(AuditWriteError, match="cannot be written"):
        AuditLog("/proc/audit")
    with pytest.raises(AuditError, match="not an audit log"):
        AuditLog(tmp_path, mode="r")


_FULL_FOR_REAL = """
import resource, signal, sys
from audit.worlds import EMBEDDINGS, new_router
from moe_posterior.audit import AuditLog, AuditWriteError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log = AuditLog(sys.argv[1], fsync_every=0.0)
router = new_router(log)
log.flush()
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
try:
    for _ in range(10_000):
        router.route_batch(EMBEDDINGS)
        log.flush()
except AuditWriteError as error:
    print(router._next_id, error)
"""


def test_a_file_system_that_really_takes_no_more_raises(tmp_path: Path) -> None:
    """The limit on a file's size: a short write, then EFBIG. Nothing is simulated."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _FULL_FOR_REAL, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert "File too large" in result.stdout, result.stdout + result.stderr
    assert verify(tmp_path).sound
    ids = AuditLog(tmp_path, mode="r").decisions(posterior=False)["id"].to_pylist()
    assert ids == list(range(len(ids)))
    assert len(ids) >= int(result.stdout.split()[0]) - 2 * len(EMBEDDINGS)


def test_a_closed_log_takes_nothing_more(tmp_path: Path) -> None:
    with AuditLog(tmp_path) as log:
        router = new_router(log)
    with pytest.raises(AuditWriteError, match="closed"):
        router.route(EMBEDDINGS[0])
    log.close()  # twice is fine
    with pytest.raises(AuditWriteError, match="open for reading"):
        AuditLog(tmp_path, mode="r").flush()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_neither_writes_nor_closes_its_parents_log(tmp_path: Path) -> None:
    log = AuditLog(tmp_path)
    router = new_router(log)
    live(router, 5, seed=1)
    log.flush()
    child = os.fork()
    if child == 0:
        try:
            router.route(EMBEDDINGS[0])
            os._exit(1)
        except AuditWriteError as error:
            log.close()
            os._exit(0 if "forked" in str(error) else 2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    live(router, 5, seed=2)
    log.flush()
    with pytest.raises(AuditLockedError):
        AuditLog(tmp_path)
    assert verify(tmp_path).problem is None
    log.close()
    assert verify(tmp_path).closed


def test_a_log_that_was_closed_over_a_hanging_disk_keeps_its_folder_until_the_disk_returns(tmp_path: Path) -> None:
    disk = FailingDisk()
    log = AuditLog(tmp_path, files=disk, fsync_every=0)
    router = new_router(log)
    log.flush()
    disk.release.clear()
    router.route(EMBEDDINGS[0])
    with pytest.raises(AuditWriteError, match="longer than"):
        log.close(timeout=0.1)
    with pytest.raises(AuditLockedError):
        AuditLog(tmp_path)
    disk.release.set()
    for _ in range(500):
        try:
            AuditLog(tmp_path).close()
            break
        except AuditLockedError:
            time.sleep(0.01)
    assert verify(tmp_path).problem is None
    assert AuditLog(tmp_path, mode="r").decisions()["id"].to_pylist() == [0]


def test_nobody_waits_for_a_writer_that_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = AuditLog(tmp_path, fsync_every=0)
    router = new_router(log)
    log.flush()
    waits = []
    monkeypatch.setattr(log._writer._collector, "frames", lambda items: [][0])
    router.route(EMBEDDINGS[0])
    with pytest.raises(AuditWriteError, match="index out of range"):
        log.flush()
    wait_for = log._writer._progress.wait_for
    monkeypatch.setattr(
        log._writer._progress, "wait_for", lambda done, timeout: waits.append(done()) or wait_for(done, 0)
    )
    for call in (log.flush, lambda: router.route(EMBEDDINGS[0])):
        with pytest.raises(AuditWriteError, match="index out of range"):
            call()
    assert waits == [True, True]
    with pytest.raises(AuditWriteError, match="index out of range"):
        log.close()
    with AuditLog(tmp_path) as again:
        again.follow(router)
    assert verify(tmp_path).sound
