"""Closing, opening again, and what a crash or a thief can make of the two."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from audit.disks import Quick
from audit.test_verify import frames_of
from audit.worlds import live, lived, new_router

from moe_posterior.audit import AuditError, AuditLog, AuditWriteError
from moe_posterior.audit.rebuild import rebuild
from moe_posterior.audit.storage.files import HEAD, FileSystem, segment_name
from moe_posterior.audit.storage.frames import Kind
from moe_posterior.audit.storage.marks import SEAL, Head, head_bytes, read_head
from moe_posterior.audit.verify import verify

KEY = b"sixteen bytes or more"
FORMAT_1 = Path(__file__).parent / "format1"


class DyingDisk(Quick):
    """Lets a child process end inside the n-th call to the system, before or after the call does its work."""

    def __init__(self, left: int, after: bool) -> None:
        self.left, self.after = left, after

    def call(self, function, *arguments, **options):
        self.left -= 1
        if not self.left and not self.after:
            os._exit(7)
        try:
            return super().call(function, *arguments, **options)
        finally:
            if not self.left:
                os._exit(7)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("after", [False, True])
def test_a_log_that_dies_anywhere_while_it_is_opened_again_can_be_opened(tmp_path: Path, after: bool) -> None:
    source = tmp_path / "source"
    ids = lived(source, calls=3)._next_id
    ended = False
    for step in range(1, 200):
        folder = tmp_path / f"log-{step}"
        shutil.copytree(source, folder)
        child = os.fork()
        if not child:
            try:
                log = AuditLog(folder, files=DyingDisk(step, after), fsync_every=1000.0)
                log.flush()
            finally:
                os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert verify(folder).problem is None, f"call {step}"
        AuditLog.recover(folder, files=Quick())._audit.log.close()
        found = verify(folder)
        assert found.problem is None
        assert found.closed
        assert found.totals["decisions"] == ids
        shutil.rmtree(folder)
        if ended:
            break
    assert ended
    assert step > 30


def test_opening_fails_where_the_head_cannot_be_told(tmp_path: Path) -> None:
    class Refusing(FileSystem):
        def replace(self, path: Path, data: bytes) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    lived(tmp_path, calls=3)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(AuditWriteError, match=r"cannot be opened for writing.*No space"):
        AuditLog(tmp_path, files=Refusing())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert verify(tmp_path).closed
    AuditLog(tmp_path).close()
    assert verify(tmp_path).sound


def test_a_new_segment_is_not_acknowledged_before_its_head_is_told(tmp_path: Path) -> None:
    class Refusing(FileSystem):
        error = 0

        def replace(self, path: Path, data: bytes) -> None:
            if self.error and path.name == HEAD:
                raise OSError(self.error, os.strerror(self.error))
            super().replace(path, data)

    disk = Refusing()
    log = AuditLog(tmp_path, files=disk, rotate_bytes=1_000, fsync_every=1000.0)
    router = new_router(log)
    live(router, 5, seed=0)
    log.flush()
    segment = log.head.segment
    disk.error = errno.EIO
    refused = 0
    for seed in range(1, 8):
        try:
            live(router, 3, seed=seed)
            log.flush()
            assert read_head(tmp_path, None).position.segment == log.head.segment
        except AuditWriteError as error:
            refused += "Input/output error" in str(error)
    assert refused
    disk.error = 0
    log.flush()
    live(router, 3, seed=9)
    log.close()
    assert log.head.segment > segment
    assert verify(tmp_path).problem is None
    assert AuditLog(tmp_path, mode="r").decisions()["id"].to_pylist() == list(range(router._next_id))


@pytest.mark.parametrize("key", [None, KEY])
def test_a_closed_log_says_so_in_its_last_record_its_seal_and_its_head(tmp_path: Path, key: bytes | None) -> None:
    router = lived(tmp_path, key=key)
    *_, last = AuditLog(tmp_path, mode="r", key=key).read().frames()
    assert last.kind == Kind.CLOSING
    head, seal = (json.loads((tmp_path / name).read_text()) for name in (HEAD, SEAL))
    assert (head["segment"], head["frames"], head["digest"]) == (seal["segment"], seal["frames"], seal["digest"])
    assert (head["closed"], head["sealed"], head["format"]) == (True, True, 2)
    again = AuditLog.recover(tmp_path, key=key)
    assert not verify(tmp_path, key).closed
    assert again._next_id == router._next_id
    again._audit.log.close()
    assert verify(tmp_path, key).closed


@pytest.mark.parametrize("key", [None, KEY])
@pytest.mark.parametrize("reopened", [False, True])
def test_a_closed_log_that_was_cut_is_refused_whatever_older_head_is_put_back(
    tmp_path: Path, key: bytes | None, reopened: bool
) -> None:
    """Every head the log ever had, before and after every cut of its last segment."""
    folder, heads = tmp_path / "log", []
    for session in range(1 + reopened):
        log = AuditLog(folder, key=key, rotate_bytes=3_000, fsync_every=1000.0)
        router = new_router(log) if not session else log.follow(new_router(None), "other").router
        for seed in range(4):
            live(router, 5, seed=seed)
            log.flush()
            heads.append((folder / HEAD).read_bytes())
        log.close()
        heads.append((folder / HEAD).read_bytes())
    heads = list(dict.fromkeys(heads))
    assert len(heads) >= 3
    last = sorted(folder.glob("*.audit"))[-1]
    data = last.read_bytes()
    for _, end in frames_of(last)[:-1]:
        last.write_bytes(data[:end])
        for head in heads:
            (folder / HEAD).write_bytes(head)
            assert not verify(folder, key).sound, end
            with pytest.raises(AuditError):
                AuditLog(folder, key=key)
    last.write_bytes(data)
    (folder / HEAD).write_bytes(heads[-1])
    assert verify(folder, key).closed
    (folder / SEAL).unlink()
    assert "seal.json is missing" in verify(folder, key).problem
    with pytest.raises(AuditError, match=r"seal.json is missing"):
        AuditLog(folder, key=key)


def test_a_head_that_closes_a_log_without_a_closing_record_is_refused(tmp_path: Path) -> None:
    with AuditLog(tmp_path / "log") as log:
        live(new_router(log), 5, seed=0)
        log.flush()
        shutil.copytree(tmp_path / "log", tmp_path / "open")
    position = read_head(tmp_path / "open", None).position
    frames = frames_of(tmp_path / "open" / segment_name(0))
    while position.frames < len(frames):  # the head of a first commit lags
        position = verify(tmp_path / "open").head
    (tmp_path / "open" / HEAD).write_bytes(head_bytes(Head(position, True), None))
    assert "its last record does not" in verify(tmp_path / "open").problem


def test_what_was_closed_before_cannot_be_cut_off_an_open_log(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    with AuditLog(folder, key=KEY) as log:
        live(new_router(log), 5, seed=0)
        log.flush()
        early = (folder / HEAD).read_bytes()
    log = AuditLog(folder, key=KEY)
    log.flush()
    shutil.copytree(folder, tmp_path / "copy")
    log.close()
    (tmp_path / "copy" / segment_name(1)).unlink()
    assert not verify(tmp_path / "copy", KEY).sound
    (tmp_path / "copy" / HEAD).write_bytes(early)
    path = tmp_path / "copy" / segment_name(0)
    path.write_bytes(path.read_bytes()[: frames_of(path)[4][1]])
    assert "says seal.json" in verify(tmp_path / "copy", KEY).problem


@pytest.mark.parametrize("name", ["closed", "kept", "torn", "overtaken"])
def test_logs_of_format_1_are_read_and_gone_on_with(tmp_path: Path, name: str) -> None:
    """Made by the version before closing records: closed twice; compacted and cut short; torn; bricked by a crash at opening."""
    folder = tmp_path / name
    shutil.copytree(FORMAT_1 / name, folder)
    key = KEY if name == "closed" else None
    expected = json.loads((FORMAT_1 / "expected.json").read_text())[name]
    found = verify(folder, key)
    assert found.problem is None
    assert found.closed == (name in ("closed", "kept"))
    table = AuditLog(folder, mode="r", key=key).decisions(posterior=False)
    assert table["id"].to_pylist() == expected["ids"]
    assert table["experts"].to_pylist() == expected["experts"]
    signal = [None if s is None else [None if x != x else x for x in s] for s in table["signal"].to_pylist()]
    assert signal == expected["signal"]
    router = AuditLog.recover(folder, key=key)
    assert read_head(folder, key).format == 2
    live(router, 3, seed=0)
    router._audit.log.compact()
    router._audit.log.close()
    found = verify(folder, key)
    assert found.problem is None
    assert found.closed
    ids = AuditLog(folder, mode="r", key=key).decisions(posterior=False)["id"].to_pylist()
    assert ids[: len(expected["ids"])] == expected["ids"]
    assert len(ids) > len(expected["ids"])


def test_a_cut_log_of_format_1_is_refused_as_before(tmp_path: Path) -> None:
    shutil.copytree(FORMAT_1 / "closed", tmp_path / "log")
    path = tmp_path / "log" / segment_name(1)
    data = path.read_bytes()
    for _, end in frames_of(path)[:-1]:
        path.write_bytes(data[:end])
        assert not verify(tmp_path / "log", KEY).sound
    path.unlink()
    assert not verify(tmp_path / "log", KEY).sound


class Interleaved(Quick):
    """Runs something between any two calls that change or open files."""

    between: Callable[[], None] = staticmethod(lambda: None)
    inside = False

    def call(self, function, *arguments, **options):
        if self.inside:
            return super().call(function, *arguments, **options)
        self.inside = True
        try:
            self.between()
        finally:
            self.inside = False
        return super().call(function, *arguments, **options)


def session(folder: Path, disk: FileSystem, first: bool) -> None:
    log = AuditLog(folder, files=disk, rotate_bytes=2_000, fsync_every=1000.0)
    router = new_router(log) if first else log.follow(new_router(None), "router").router
    for seed in range(3):
        live(router, 4, seed=seed)
        log.flush()
    log.compact()
    live(router, 4, seed=7)
    log.flush()
    log.retain(max_bytes=12_000)
    log.close()


def test_verify_cries_no_alarm_between_any_two_calls_of_a_writer(tmp_path: Path) -> None:
    disk, verified = Interleaved(), 0

    def look() -> None:
        nonlocal verified
        if (tmp_path / "log" / HEAD).exists():
            problem = verify(tmp_path / "log").problem
            assert problem is None, problem
            verified += 1

    problems = []

    def between() -> None:
        try:
            look()
        except AssertionError as error:
            problems.append(str(error))

    disk.between = between
    for first in (True, False, False):
        session(tmp_path / "log", disk, first)
    assert problems == []
    assert verified > 300


@pytest.mark.parametrize("step", range(4))
def test_a_writer_that_does_anything_between_two_calls_of_verify_causes_no_alarm(tmp_path: Path, step: int) -> None:
    """The other way round: at each call of the reader the writer goes through a whole step of its life."""
    folder = tmp_path / "log"
    session(folder, Quick(), True)
    for at in range(1, 200):
        log: AuditLog | None = None
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        calls = 0

        def live_on(copy: Path = copy) -> None:
            nonlocal log
            log = AuditLog(copy, rotate_bytes=1_500, fsync_every=1000.0, files=Quick())
            router = log.follow(new_router(None), "router").router
            if step > 0:
                for seed in range(2):
                    live(router, 4, seed=seed)
                    log.flush()
            if step > 1:
                log.compact()
            if step > 2:
                log.retain(max_bytes=1)
            if step != 1:
                log.close()

        reader = FileSystem()

        def counted(function, *arguments, at: int = at, reader: FileSystem = reader, **options):
            nonlocal calls
            calls += 1
            if calls == at:
                live_on()
            return function(*arguments, **options)

        reader.call = counted  # type: ignore[method-assign]
        found = verify(copy, files=reader)
        assert found.problem is None, f"call {at}: {found.problem}"
        if log is not None:
            log.close()
        if calls < at:
            break
    assert at > 10


def test_a_router_recovered_from_a_closed_log_is_the_one_that_closed_it(tmp_path: Path) -> None:
    router = lived(tmp_path)
    rebuilt = rebuild(AuditLog(tmp_path, mode="r").read(), check=True)
    assert rebuilt._next_id == router._next_id
