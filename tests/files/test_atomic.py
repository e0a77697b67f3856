"""What is written whole or not at all: under every failing call, every kill, and beside other writers."""

import errno
import os
import resource
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import pytest
from faults import calls_of, error_of, in_child, interposed, names_beside

from moe_posterior.errors import InvalidArgumentError, UnwritableFileError
from moe_posterior.files import atomic, drafts

OLD, NEW = b"old" * 100_000, b"new" * 200_000


def write_file(path: Path) -> None:
    atomic.write_bytes(path, NEW)


def write_folder(path: Path) -> None:
    with atomic.replacing_folder(path) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "deep").write_bytes(NEW)
        atomic.write_bytes(folder / "file", NEW)


def old_file(path: Path) -> None:
    path.write_bytes(OLD)


def old_folder(path: Path) -> None:
    path.mkdir()
    (path / "file").write_bytes(OLD)
    (path / "of old").write_bytes(OLD)


def content(path: Path) -> bytes | dict[str, bytes] | None:
    if path.is_dir():
        return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    return path.read_bytes() if path.exists() else None


OLD_FOLDER, NEW_FOLDER = {"file": OLD, "of old": OLD}, {"file": NEW, "inner/deep": NEW}
KINDS = {
    "file": (old_file, write_file, OLD, NEW),
    "folder": (old_folder, write_folder, OLD_FOLDER, NEW_FOLDER),
}


@contextmanager
def no_exchange() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setattr(drafts, "exchange", lambda one, other: False)
    patch.setattr(atomic, "exchange", lambda one, other: False)
    try:
        yield
    finally:
        patch.undo()


@pytest.mark.parametrize("at_once", [True, False], ids=["exchanging", "stepping aside"])
@pytest.mark.parametrize("exists", [True, False], ids=["replacing", "making"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_failing_call_leaves_the_old_or_the_new_and_says_so(
    kind: str, exists: bool, at_once: bool, tmp_path: Path
) -> None:
    make_old, write, old, new = KINDS[kind]
    with nullcontext() if at_once else no_exchange():
        probe = place(tmp_path, "probe", make_old if exists else None)
        calls = calls_of(lambda: write(probe))
        assert {"open", "fsync", "close"} <= set(calls)
        for number, called in enumerate(calls, 1):
            path = place(tmp_path, str(number), make_old if exists else None)

            def fail(name: str, at: int, number: int = number) -> None:
                if at == number:
                    raise OSError(errno.ENOSPC, f"no {name}")

            error = error_of(lambda path=path: write(path), fail)
            if error is None:
                assert called in ("open", "close"), (called, number)  # of what is no longer wanted
                assert content(path) == new
            else:
                assert isinstance(error, OSError)
                assert str(error).endswith(f"no {called}")
                assert error.errno == errno.ENOSPC
                assert (
                    isinstance(error, UnwritableFileError) or called == "mkdir"
                )  # which the block itself may have called
                assert content(path) in ((old if exists else None), new), (called, number)
                assert names_beside(path) <= {"it"}, (called, number)
            write(path)  # clears away what could not be removed then
            assert (content(path), names_beside(path)) == (new, {"it"})


@pytest.mark.parametrize("at_once", [True, False], ids=["exchanging", "stepping aside"])
@pytest.mark.parametrize("exists", [True, False], ids=["replacing", "making"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_kill_at_every_call_leaves_the_old_or_the_new_and_the_next_write_clears_up(
    kind: str, exists: bool, at_once: bool, tmp_path: Path
) -> None:
    make_old, write, old, new = KINDS[kind]
    with nullcontext() if at_once else no_exchange():
        probe = place(tmp_path, "probe", make_old if exists else None)
        calls = calls_of(lambda: write(probe))
        for number in range(1, len(calls) + 1):
            path = place(tmp_path, str(number), make_old if exists else None)
            assert in_child(lambda path=path, number=number: killed(write, path, number)) == signal.SIGKILL
            found = content(path)
            if found is None and exists:  # between the two renames, where the system cannot exchange
                assert (kind, at_once) == ("folder", False)
                with suppress(ZeroDivisionError), atomic.replacing_folder(path):
                    raise ZeroDivisionError
                found = content(path)
                assert found == old
            assert found in ((old if exists else None), new), calls[number - 1]
            write(path)
            assert (content(path), names_beside(path)) == (new, {"it"}), calls[number - 1]


@pytest.mark.parametrize("size", [1, 100_000, 599_999])
@pytest.mark.parametrize("kills", [True, False], ids=["killed", "refused"])
def test_a_disk_that_is_full_in_the_middle_of_a_write_leaves_the_old_file(
    size: int, kills: bool, tmp_path: Path
) -> None:
    path = place(tmp_path, "a", old_file)

    def fill() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if kills else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            write_file(path)
        except UnwritableFileError as error:
            os._exit(int(error.errno != errno.EFBIG or names_beside(path) != {"it"}))
        os._exit(2)

    assert in_child(fill) == (signal.SIGXFSZ if kills else 0)
    assert content(path) == OLD
    write_file(path)
    assert (content(path), names_beside(path)) == (NEW, {"it"})


def test_an_exception_within_the_block_passes_through_and_leaves_the_old(tmp_path: Path) -> None:
    path = place(tmp_path, "a", old_file)
    for error in (KeyboardInterrupt(), ZeroDivisionError(), PermissionError("of another file")):

        def write(path: Path, error: BaseException = error) -> None:
            with atomic.replacing(path) as file:
                file.write(NEW)
                raise error

        with pytest.raises(type(error)) as raised:
            write(path)
        assert raised.value is error
    assert (content(path), names_beside(path)) == (OLD, {"it"})


def test_a_block_that_closes_the_file_itself_is_whole_too(tmp_path: Path) -> None:
    with atomic.replacing(tmp_path / "it") as file, file:
        file.write(NEW)
    assert content(tmp_path / "it") == NEW


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o444])
def test_the_permissions_of_the_old_file_stay(mode: int, tmp_path: Path) -> None:
    path = place(tmp_path, "a", old_file)
    path.chmod(mode)
    seen = []
    with atomic.replacing(path) as file:
        file.write(NEW)
        seen = [stat.S_IMODE(other.stat().st_mode) for other in path.parent.iterdir() if other != path]
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert seen == [0o600]  # nobody reads meanwhile what only the owner may


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_file_and_a_folder_that_are_new_honour_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write_file(tmp_path / "file")
        write_folder(tmp_path / "folder")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~umask


def test_a_link_in_the_place_of_the_file_or_its_draft_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    path = place(tmp_path, "a", None)
    for name in ("it", ".it.moe-new", ".it.moe-new2"):
        (path.parent / name).symlink_to(victim)
    write_file(path)
    assert (content(path), path.is_symlink(), victim.read_bytes()) == (NEW, False, b"precious")
    assert names_beside(path) == {"it", ".it.moe-new", ".it.moe-new2"}  # they are not ours to remove


def test_a_lock_file_is_never_emptied_nor_a_link_followed(tmp_path: Path) -> None:
    victim, lock = tmp_path / "victim", tmp_path / ".lock"
    victim.write_bytes(b"precious")
    lock.symlink_to(victim)
    with pytest.raises(UnwritableFileError, match=r"\.lock cannot be written"):
        atomic.open_lock(lock)
    lock.unlink()
    lock.write_bytes(b"kept")
    atomic.open_lock(lock).close()
    atomic.append(lock, " and more")
    assert (victim.read_bytes(), lock.read_bytes()) == (b"precious", b"kept and more")
    lock.unlink()
    lock.symlink_to(victim)
    with pytest.raises(UnwritableFileError):
        atomic.append(lock, "more")
    assert victim.read_bytes() == b"precious"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnwritableFileError, match="not a plain file"):
        atomic.open_lock(tmp_path / "pipe")


def test_what_is_no_file_is_refused_by_name_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "null").symlink_to("/dev/null")
    os.mkfifo(tmp_path / "pipe")
    for name, said in {"folder": "a folder", "null": "a device", "pipe": "a device"}.items():
        with pytest.raises(UnwritableFileError, match=said):
            write_file(tmp_path / name)
    for wrong in (None, 3, "", "a\0b", b"\0", "/", ".."):
        with pytest.raises(InvalidArgumentError, match="path must be"):
            write_file(wrong)  # type: ignore[arg-type]
    (tmp_path / "file").write_bytes(OLD)
    with pytest.raises(UnwritableFileError, match="not a folder"):
        write_folder(tmp_path / "file")
    assert names_beside(tmp_path / "it") == {"folder", "null", "pipe", "file"}


def test_a_name_as_long_as_the_file_system_takes_can_be_written(tmp_path: Path) -> None:
    for name in ("n" * 255, "ü" * 127):
        write_file(tmp_path / name)
        write_file(tmp_path / name)
    assert len(list(tmp_path.iterdir())) == 2


def test_writers_at_once_each_leave_a_whole_file_and_no_draft(tmp_path: Path) -> None:
    path, errors = tmp_path / "it", []
    whole = [bytes([number]) * 300_000 for number in range(6)]

    def work(number: int) -> None:
        try:
            for _ in range(10):
                atomic.write_bytes(path, whole[number])
                assert path.read_bytes() in whole
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert names_beside(path) == {"it"}


def test_a_reader_never_misses_a_folder_that_is_replaced(tmp_path: Path) -> None:
    path, missed, done = place(tmp_path, "a", old_folder), [], threading.Event()

    def read() -> None:
        while not done.is_set():
            missed.append(not path.is_dir())

    thread = threading.Thread(target=read)
    thread.start()
    for _ in range(30):
        with atomic.replacing_folder(path) as folder:
            (folder / "file").write_bytes(b"new")
    done.set()
    thread.join()
    if drafts.exchange(path, path):
        assert not any(missed)
    assert names_beside(path) == {"it"}


def place(root: Path, name: str, make_old: Callable[[Path], None] | None) -> Path:
    folder = root / name
    folder.mkdir()
    if make_old is not None:
        make_old(folder / "it")
    return folder / "it"


def killed(write: Callable[[Path], None], path: Path, number: int) -> None:
    def kill(name: str, at: int) -> None:
        if at == number:
            os.kill(os.getpid(), signal.SIGKILL)

    with interposed(kill):
        write(path)
