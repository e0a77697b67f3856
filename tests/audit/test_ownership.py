"""A log whose files are taken away under its writer says so, and two writers that met by accident do each other no harm."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from audit.disks import Quick
from audit.worlds import EMBEDDINGS, live, new_router

from moe_posterior import PosteriorRouter
from moe_posterior.audit import AuditError, AuditLog, AuditWriteError
from moe_posterior.audit.storage.files import HEAD, segment_name
from moe_posterior.audit.storage.marks import SEAL
from moe_posterior.audit.verify import verify


def writing(folder: Path, **options: object) -> tuple[AuditLog, PosteriorRouter]:
    log = AuditLog(folder, fsync_every=1000.0, max_wait=0.1, **options)
    router = new_router(log)
    live(router, 5, seed=0)
    log.flush()
    return log, router


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def rename_folder(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


def swap_folder(folder: Path) -> None:
    rename_folder(folder)
    shutil.copytree(folder.with_name("elsewhere"), folder)


def swap_segment(folder: Path) -> None:
    path = folder / segment_name(0)
    data = path.read_bytes()
    path.rename(folder / "kept")
    path.write_bytes(data)


def swap_lock(folder: Path) -> None:
    (folder / "writer.lock").rename(folder / "kept")
    (folder / "writer.lock").touch()


ACCIDENTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "folder removed": (shutil.rmtree, "is gone: it was removed or renamed"),
    "folder renamed": (rename_folder, "is gone: it was removed or renamed"),
    "folder replaced": (swap_folder, "is another folder now"),
    "folder a file": (lambda folder: (shutil.rmtree(folder), folder.touch()), "is another folder now"),
    "segment removed": (lambda folder: (folder / segment_name(0)).unlink(), "segment-00000000.audit was removed"),
    "segment renamed": (lambda f: (f / segment_name(0)).rename(f / "x"), "segment-00000000.audit was renamed"),
    "segment replaced": (swap_segment, "another file was put in the place of segment-00000000.audit"),
    "segment emptied": (
        lambda folder: os.truncate(folder / segment_name(0), 0),
        "somebody else changed segment-00000000",
    ),
    "segment longer": (lambda f: os.truncate(f / segment_name(0), 10**5), "somebody else changed segment-00000000"),
    "lock removed": (lambda folder: (folder / "writer.lock").unlink(), "its writer.lock was removed"),
    "lock replaced": (swap_lock, "its writer.lock was replaced"),
}


@pytest.mark.parametrize("waiting", [False, True])
@pytest.mark.parametrize("accident", ACCIDENTS)
def test_flush_does_not_return_for_what_is_gone(tmp_path: Path, accident: str, waiting: bool) -> None:
    log, router = writing(tmp_path / "log")
    if waiting:
        router.route(EMBEDDINGS[0])
    happens, message = ACCIDENTS[accident]
    happens(tmp_path / "log")
    before = contents(tmp_path / "log") if (tmp_path / "log").is_dir() else None
    for _ in range(2):
        with pytest.raises(AuditWriteError, match=message):
            log.flush()
    decided = router._next_id
    with pytest.raises(AuditWriteError, match=message):
        router.route(EMBEDDINGS[0])
    assert router._next_id == decided
    for call in (log.compact, log.retain, log.close):
        with pytest.raises(AuditError, match=message):
            call()
    assert (contents(tmp_path / "log") if (tmp_path / "log").is_dir() else None) == before


@pytest.mark.parametrize("accident", ["folder renamed", "folder replaced", "lock removed", "segment removed"])
@pytest.mark.parametrize("then", ["rotate", "compact", "retain", "close"])
def test_no_step_of_a_writer_touches_a_folder_that_is_no_longer_its_own(
    tmp_path: Path, accident: str, then: str
) -> None:
    folder = tmp_path / "log"
    log, router = writing(folder, rotate_bytes=1)
    for seed in range(3):
        live(router, 3, seed=seed)
        log.flush()
    assert log.head.segment > 1
    if accident == "segment removed":
        (folder / segment_name(log.head.segment)).unlink()
    else:
        ACCIDENTS[accident][0](folder)
    folder.mkdir(exist_ok=True)
    before = contents(folder)
    steps: dict[str, Callable[[], object]] = {
        "rotate": lambda: (router.route(EMBEDDINGS[0]), log.flush()),
        "compact": log.compact,
        "retain": lambda: log.retain(max_bytes=1),
        "close": log.close,
    }
    with pytest.raises(AuditError, match=r"removed|renamed"):
        steps[then]()
    assert contents(folder) == before


@pytest.mark.parametrize("accident", ["lock removed", "folder renamed"])
@pytest.mark.parametrize("rotate_bytes", [1, 10**6])
def test_two_writers_lose_nothing_of_each_other(tmp_path: Path, accident: str, rotate_bytes: int) -> None:
    folder = tmp_path / "log"
    first, router = writing(folder, rotate_bytes=rotate_bytes)
    router.route(EMBEDDINGS[0])  # not flushed: nobody was told that it is safe
    acknowledged = router._next_id - 1
    ACCIDENTS[accident][0](folder)
    with AuditLog(folder, fsync_every=1000.0, rotate_bytes=rotate_bytes) as second:
        other = new_router(second) if accident == "folder renamed" else second.follow(new_router(None)).router
        for seed in range(4):
            live(other, 4, seed=seed)
            second.flush()
            with pytest.raises(AuditWriteError, match=r"removed|renamed|replaced"):
                first.flush()
        with pytest.raises(AuditError):
            first.close()
        live(other, 4, seed=5)
    found = verify(folder)
    assert found.problem is None
    assert found.closed
    ids = AuditLog(folder, mode="r").decisions()["id"].to_pylist()
    if accident == "folder renamed":
        assert ids == list(range(other._next_id))
        assert verify(folder.with_name("elsewhere")).problem is None
        ids = AuditLog(folder.with_name("elsewhere"), mode="r").decisions()["id"].to_pylist()
    assert set(range(acknowledged)) <= set(ids)


def test_a_second_writer_between_check_and_write_leaves_a_log_that_verifies(tmp_path: Path) -> None:
    """The narrowest window: the first has found all in order, the second takes over, then the first's write reaches the disk."""
    folder = tmp_path / "log"

    class Slow(Quick):
        meanwhile: Callable[[], None] | None = None

        def write(self, file: object, data: bytes) -> None:
            if self.meanwhile is not None:
                meanwhile, self.meanwhile = self.meanwhile, None
                meanwhile()
            super().write(file, data)

    disk = Slow()
    log, router = writing(folder, files=disk)
    acknowledged = router._next_id

    def take_over() -> None:
        (folder / "writer.lock").unlink()
        with AuditLog(folder, files=Quick()) as second:
            live(second.follow(new_router(None)).router, 5, seed=3)

    disk.meanwhile = take_over
    router.route(EMBEDDINGS[0])
    with pytest.raises(AuditWriteError, match=r"writer\.lock was replaced"):
        log.flush()
    found = verify(folder)
    assert found.problem is None
    assert found.cut_bytes > 0  # said, and no part of the log
    ids = AuditLog(folder, mode="r").decisions()["id"].to_pylist()
    assert ids[:acknowledged] == list(range(acknowledged))
    assert acknowledged not in ids
    AuditLog(folder).close()


def test_a_segment_that_another_process_put_there_is_not_removed(tmp_path: Path) -> None:
    log, router = writing(tmp_path / "log", rotate_bytes=1)
    foreign = tmp_path / "log" / segment_name(log.head.segment + 1)
    foreign.write_bytes(b"somebody else's")
    router.route(EMBEDDINGS[0])
    with pytest.raises(AuditWriteError, match="exists and is not ours"):
        log.flush()
    assert foreign.read_bytes() == b"somebody else's"


@pytest.mark.parametrize("which", [0, 1])
def test_a_sealed_segment_that_is_gone_is_missed_at_the_next_rotation(tmp_path: Path, which: int) -> None:
    log, router = writing(tmp_path, rotate_bytes=1)
    for seed in range(3):
        live(router, 3, seed=seed)
        log.flush()
    assert log.compact() > 1
    (tmp_path / f"segment-{which:08d}.json").unlink()
    live(router, 3, seed=4)
    with pytest.raises(AuditWriteError, match=f"segment {which} was removed by somebody else"):
        log.flush()


@pytest.mark.parametrize("name", ["writer.lock", f"{HEAD}.new", f"{SEAL}.new", segment_name(0)])
def test_no_link_is_followed_for_writing(tmp_path: Path, name: str) -> None:
    target = tmp_path / "precious"
    target.write_bytes(b"precious")
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / name).symlink_to(target)
    try:
        log, _ = writing(tmp_path / "log")
        log.close()
    except AuditError:
        pass
    assert target.read_bytes() == b"precious"


def test_the_folder_stays_the_same_where_the_process_goes_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    log, router = writing(Path("log"), rotate_bytes=1)
    monkeypatch.chdir(tmp_path / "other")
    live(router, 5, seed=1)
    log.close()
    assert verify(tmp_path / "log").closed
    assert list((tmp_path / "other").iterdir()) == []
