"""The live view: follows a writer through rotation, death and return, and behaves in a terminal and in a pipe."""

import io
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from audit.worlds import EMBEDDINGS, E, new_router

from moe_posterior import InvalidArgumentError
from moe_posterior.audit import AuditLog
from moe_posterior.audit.storage.tables import Group
from moe_posterior.audit.views.cli import audit
from moe_posterior.audit.views.follow import Follower
from moe_posterior.audit.views.watch import Stop, View, Window, watch

ROOT = Path(__file__).resolve().parents[2]
WATCHER = """
import pathlib, sys
from moe_posterior.audit.views.watch import watch
sys.exit(watch(pathlib.Path(sys.argv[1]), every={every}))
"""
WRITER = """
import sys, time
from audit.worlds import EMBEDDINGS, new_router
from moe_posterior import InvalidArgumentError
from moe_posterior.audit import AuditLog
from moe_posterior.audit.views.cli import audit
log = AuditLog(sys.argv[1], fsync_every=0.02, rotate_bytes=4000)
router = new_router(log)
for call in range(int(sys.argv[2])):
    decisions = router.route_batch(EMBEDDINGS[call % 100 : call % 100 + 50])
    router.resolve_batch(decisions.ids, (decisions.experts != 1).astype(float))
    time.sleep(0.005)
if len(sys.argv) > 3:
    log.close()
print("done", flush=True)
time.sleep(60)
"""


def child(*arguments: str, **options) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", *arguments], env=environment, **options)


def decisions_of(folder: Path) -> int:
    return sum(group.rows("decisions") for group, _, _ in AuditLog(folder, mode="r").read().groups())


def fill(log: AuditLog, calls: int = 20, name: str = "router") -> None:
    router = new_router(None)
    router._audit = log.follow(router, name)
    for call in range(calls):
        decisions = router.route_batch(EMBEDDINGS[call : call + 50])
        router.resolve_batch(decisions.ids, (decisions.experts != 1).astype(float))


def test_a_follower_sees_every_decision_once_through_rotation_a_kill_and_a_second_writer(tmp_path) -> None:
    folder, seen = tmp_path / "log", 0
    follower = Follower(folder)
    assert list(follower.poll()) == []

    def look() -> int:
        return sum(record.rows("decisions") for record in follower.poll() if isinstance(record, Group))

    for arguments in (["10000"], ["100", "close"]):
        writer = child(WRITER, str(folder), *arguments, stdout=subprocess.PIPE, text=True)
        try:
            deadline, goal = time.monotonic() + 60, seen + 4000
            while seen < goal if len(arguments) == 1 else not select.select([writer.stdout], [], [], 0)[0]:
                seen += look()
                time.sleep(0.003)
                assert time.monotonic() < deadline
        finally:
            writer.kill()
            writer.wait()
            writer.stdout.close()
    seen += look()
    assert len(list(folder.glob("segment-*.audit"))) > 3
    assert seen == decisions_of(folder) > 8000
    assert follower.restarts == 0
    assert follower.sources[0].checkpoint.settings["num_experts"] == E


def test_a_follower_begins_again_where_the_writer_took_something_back(tmp_path) -> None:
    folder, saved = tmp_path / "log", tmp_path / "saved"
    log = AuditLog(folder, fsync_every=0.0)
    fill(log)
    log.flush()
    shutil.copytree(folder, saved)
    follower = Follower(folder)
    list(follower.poll())
    fill(log, name="another")
    log.close()
    assert sum(record.rows("decisions") for record in follower.poll() if isinstance(record, Group)) == 1000
    assert follower.restarts == 0
    shutil.rmtree(folder)
    shutil.copytree(saved, folder)
    with AuditLog(folder) as again:
        fill(again, 3)
    records = list(follower.poll())
    assert follower.restarts == 1
    assert (
        sum(record.rows("decisions") for record in records if isinstance(record, Group)) == decisions_of(folder) == 1150
    )


def test_one_view_tells_the_rates_shares_competence_and_flags(tmp_path) -> None:
    with AuditLog(tmp_path) as log:
        fill(log)
    out = io.StringIO()
    assert watch(tmp_path, once=True, stream=out) == 0
    text = out.getvalue()
    assert text.isascii()
    assert "\x1b" not in text
    assert "1,000 in the window" in text
    assert "outcomes 100.0 %" in text
    view = View(tmp_path)
    view.read()
    (source,) = view.survey.sources.values()
    rows = AuditLog(tmp_path, mode="r").decisions().to_pylist()
    for expert in range(E):
        share = np.mean([row["experts"][0] == expert for row in rows])
        if share:
            (line,) = [line for line in text.splitlines() if re.match(rf" +{expert} +\d", line)]
            assert f"{share:.1%}" in line
            assert ("LOW" in line) == any(flag.expert == expert and flag.ended is None for flag in source.flags())
    assert f"flags up: {sum(flag.ended is None for flag in source.flags())}" in text


def test_what_is_older_than_the_window_counts_no_more(tmp_path) -> None:
    with AuditLog(tmp_path) as log:
        fill(log)
    view = View(tmp_path, minutes=1.0)
    view.read()
    assert "1,000 in the window" in "\n".join(view.lines(time.time()))
    text = "\n".join(view.lines(time.time() + 100))
    assert "0 in the window, 1,000 since" in text
    assert re.search(r"last record 1\d\d s ago", text)


def test_a_window_counts_by_second_and_forgets() -> None:
    window = Window(10)
    calls = {"kind": [0, 1, 2, 0], "rows": [3, 2, 1, 1], "time": [5_000_000, 5_500_000, 6_000_000, 30_200_000]}
    flags = {"flags": [1, 3, 0, 2], "experts": [[0], [1], [1], [4]]}
    tables = {
        "calls": {name: np.array(column) for name, column in calls.items()},
        "decisions": {name: np.array(column) for name, column in flags.items()},
    }
    window.seconds = 100
    window.add(Group(0, 1, tables))
    assert [window.total(name, 0) for name in ("decisions", "abstained", "explored", "outcomes", "refused")] == [
        4,
        2,
        2,
        2,
        1,
    ]
    assert window.total("decisions", 6) == 1
    assert window.shares(6, 0).tolist() == [1, 2, 0, 0, 1, 0]
    assert window.rate("decisions", 3, 9) == 0.5
    window.seconds = 10
    window.add(Group(0, 1, tables))
    assert set(window.counts) == set(window.chosen) == {30}


def test_names_cannot_write_to_the_terminal(tmp_path) -> None:
    with AuditLog(tmp_path) as log:
        fill(log, name="evil\x1b[2J\r\nname\x07")
    out = io.StringIO()
    watch(tmp_path, once=True, stream=out)
    assert "evil\\x1b[2J\\r\\nname\\x07: " in out.getvalue()
    assert set(re.findall(r"[\x00-\x1f\x7f-\x9f]", out.getvalue())) == {"\n"}


def test_the_command_prints_one_view_and_refuses_senseless_options(tmp_path, capsys) -> None:
    with AuditLog(tmp_path) as log:
        fill(log)
    assert audit(["watch", str(tmp_path), "--once", "--minutes", "2"]) == 0
    assert "last 2 min" in capsys.readouterr().out
    for option in (["--every", "0"], ["--minutes", "nan"], ["--minutes", "1e9"]):
        with pytest.raises(InvalidArgumentError, match="--every must be above 0"):
            audit(["watch", str(tmp_path), "--once", *option])


@pytest.mark.parametrize("damage", ["nothing", "flipped"])
def test_a_log_that_is_not_there_or_altered_is_said_and_watched_on(tmp_path, damage: str) -> None:
    folder = tmp_path / "log"
    if damage == "flipped":
        with AuditLog(folder) as log:
            fill(log)
        (file,) = folder.glob("*.audit")
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    out = io.StringIO()
    assert watch(folder, once=True, stream=out) == 1
    assert "! " in out.getvalue()
    view = View(folder)
    view.read()
    assert view.problem
    shutil.rmtree(folder, ignore_errors=True)
    with AuditLog(folder) as log:
        fill(log)
    view.read()
    assert not view.problem
    assert "1,000 in the window" in "\n".join(view.lines(time.time()))


class Screen(io.StringIO):
    """A terminal that calls something as it is written to."""

    def __init__(self, written: Callable[[str], object]) -> None:
        super().__init__()
        self.written = written

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.written(text)
        return super().write(text)


class Lossy:
    def __init__(self, act: Callable[[], object]) -> None:
        self.act = act

    def __del__(self) -> None:  # whatever is raised here is ignored
        self.act()


def _in_a_destructor(act: Callable[[], object]) -> None:
    Lossy(act)


def _where_errors_are_translated(act: Callable[[], object]) -> None:
    try:
        act()
    except BaseException as error:
        raise ImportError("of another library, which knows no interruption") from error


def _in_a_callback_of_c(act: Callable[[], object]) -> None:
    sorted([2, 1], key=lambda value: act() or value)


def _broken_pipe() -> None:
    raise BrokenPipeError


@pytest.mark.parametrize("request_to_end", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("place", ["read", "lines", "write", "wait", "leave"])
@pytest.mark.parametrize("how", [_in_a_destructor, _where_errors_are_translated, _in_a_callback_of_c])
def test_a_request_to_end_ends_it_well_wherever_it_comes(
    how: Callable, place: str, request_to_end: int, tmp_path, monkeypatch
) -> None:
    if place in ("write", "leave") and how is not _in_a_callback_of_c:
        pytest.skip("no other code of ours or others runs there")
    with AuditLog(tmp_path) as log:
        fill(log)
    asked = []

    def ask() -> None:
        if not asked:
            asked.append(1)
            os.kill(os.getpid(), request_to_end)
            time.sleep(0)  # the handler runs

    whole = getattr(View, place, None)
    if whole is not None:
        monkeypatch.setattr(View, place, lambda view, *rest: (how(ask), whole(view, *rest))[1])
    if place == "wait":
        monkeypatch.setattr(Stop, "wait", lambda stop, seconds: how(ask))
    screen = Screen(lambda text: {"write": "\x1b[H", "leave": "1049l"}.get(place, "\0") in text and ask())
    if place == "leave":
        monkeypatch.setattr(Stop, "wait", lambda stop, seconds: _broken_pipe())
    before = signal.getsignal(request_to_end)
    assert watch(tmp_path, every=0.0, stream=screen) == 0
    assert asked
    assert screen.getvalue().endswith("\x1b[?25h\x1b[?1049l")
    assert signal.getsignal(request_to_end) is before


def test_a_request_to_end_wakes_who_waits(tmp_path) -> None:
    code = WATCHER.format(every=1e9)
    with AuditLog(tmp_path) as log:
        fill(log)
    watcher = child(code, str(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    started = watcher.stdout.read(1)
    watcher.send_signal(signal.SIGTERM)
    _, errors = watcher.communicate(timeout=120)
    assert (started, watcher.returncode, errors) == (b"a", 0, b"")


@pytest.mark.parametrize("request_to_end", [signal.SIGINT, signal.SIGTERM])
def test_in_a_terminal_it_repaints_without_clearing_and_ends_well(request_to_end, tmp_path) -> None:
    writer = child(WRITER, str(tmp_path / "log"), "100000", stdout=subprocess.DEVNULL)
    ours, theirs = pty.openpty()
    code = WATCHER.format(every=0.05)
    try:
        watcher = child(code, str(tmp_path / "log"), stdout=theirs, stderr=subprocess.PIPE)
        os.close(theirs)
        shown, deadline = b"", time.monotonic() + 60
        while shown.count(b"\x1b[H") < 8 or shown.count(b"in the window") < 3:
            assert time.monotonic() < deadline, shown[-2000:]
            if select.select([ours], [], [], 0.2)[0]:
                shown += os.read(ours, 65536)
        watcher.send_signal(request_to_end)
        while watcher.poll() is None or select.select([ours], [], [], 0)[0]:
            assert time.monotonic() < deadline
            if select.select([ours], [], [], 0.1)[0]:
                try:
                    shown += os.read(ours, 65536)
                except OSError:  # the other end is closed
                    break
        assert watcher.wait(20) == 0
        assert watcher.stderr.read() == b""
    finally:
        writer.kill()
        writer.wait()
        os.close(ours)
    assert shown.startswith(b"\x1b[?1049h\x1b[?25l")
    assert shown.endswith(b"\x1b[?25h\x1b[?1049l")
    assert b"\x1b[2J" not in shown
    frames = shown.split(b"\x1b[H")[1:-1]
    assert all(frame.endswith(b"\x1b[J") for frame in frames)
    plain = [re.sub(rb"\x1b\[\??\d*[A-Za-z]", b"", line) for frame in frames for line in frame.split(b"\r\n")]
    assert all(len(line) < 80 for line in plain)
    assert max(frame.count(b"\r\n") for frame in frames) < 24


def test_in_a_pipe_it_prints_block_after_block_and_stops_when_nobody_reads(tmp_path) -> None:
    with AuditLog(tmp_path) as log:
        fill(log)
    code = WATCHER.format(every=0.05)
    watcher = child(code, str(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines = [watcher.stdout.readline() for _ in range(40)]
    watcher.stdout.close()
    assert watcher.wait(30) == 0
    assert "Traceback" not in watcher.stderr.read()
    assert sum(line.startswith("audit log ") for line in lines) >= 2
    assert "\x1b" not in "".join(lines)
