"""Clocks that are set, wrong or broken: nothing is deleted for it, what is recorded is read back, and it is said."""

import json
import time
import warnings
from pathlib import Path

import pytest
from audit.worlds import EMBEDDINGS, live, new_router

from moe_posterior.audit import AuditLog
from moe_posterior.audit.rebuild import rebuild
from moe_posterior.audit.storage.clock import BELIEVED, now
from moe_posterior.audit.storage.files import segment_numbers
from moe_posterior.audit.storage.state import MAX_TIME
from moe_posterior.audit.verify import verify, verify_decisions
from moe_posterior.cli import main

YEARS = 365.25 * 86_400
CLOCKS: dict[str, float] = {  # seconds since 1970
    "ten years ahead": 1_790_000_000 + 10 * YEARS,
    "ten years back": 1_790_000_000 - 10 * YEARS,
    "at 1970": 0.0,
    "before 1970": -1.0,
    "long before 1970": -1e12,
    "the last second of 9999": MAX_TIME / 1e6 - 1e-3,
    "after 9999": MAX_TIME / 1e6,
    "long after 9999": 1e15,
    "no number": float("nan"),
    "infinite": float("inf"),
    "minus infinite": float("-inf"),
}


CASES = [
    pytest.param(when, wrong, marks=[pytest.mark.slow] if when != "in between" and "long" not in wrong else [])
    for when in ("from the start", "in between", "when opened again")
    for wrong in CLOCKS
]


class Clock:
    """Time that tests set: the wall clock as they like, the other forward."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall, self.passed = 1_790_000_000.0, 0.0
        begun = time.monotonic()
        monkeypatch.setattr(time, "time", lambda: self.wall)
        monkeypatch.setattr(time, "time_ns", self._nanoseconds)
        monkeypatch.setattr(time, "monotonic", lambda: begun + self.passed)

    def _nanoseconds(self) -> float:
        return int(self.wall * 1e9) if abs(self.wall) < 1e18 else self.wall  # NaN too

    def run(self, seconds: float) -> None:
        self.wall += seconds
        self.passed += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def segments(folder: Path) -> list[int]:
    return [number for number, suffixes in segment_numbers(folder).items() if suffixes]


def rotate(log: AuditLog, router: object, clock: Clock, times: int, seconds: float) -> None:
    """So many segments, with so much time between them."""
    for _ in range(times):
        router.route_batch(EMBEDDINGS[:20])
        log.flush()
        clock.run(seconds)
        log._writer.generation += 1  # as if the segment were full
        router.route_batch(EMBEDDINGS[:20])
        log.flush()


def read_every_way(folder: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> int:
    """Decisions read; every reader has to take the times that are there."""
    log = AuditLog(folder, mode="r")
    assert verify(folder).problem is None
    assert verify_decisions(log.read()).disagreements == 0
    rebuild(log.read(), check=True)
    assert len(log.outcomes().to_pylist()) > 0
    assert len(log.read().events().to_pylist()) > 0
    for command in (
        ["show", folder],
        ["show", folder, "--json"],
        ["stats", folder],
        ["stats", folder, "--json"],
        ["export", folder, "--out", out],
        ["export", folder, "--out", out, "--format", "csv"],
        ["export", folder, "--html", out / "page.html"],
        ["watch", folder, "--once"],
        ["verify", folder, "--decisions"],
        ["replay", folder],
    ):
        assert main(["audit", *map(str, command)]) == 0, capsys.readouterr()
    return len(log.decisions().to_pylist())


@pytest.mark.filterwarnings("ignore:.*clock:RuntimeWarning")
@pytest.mark.parametrize(("when", "wrong"), CASES)
def test_what_was_recorded_under_a_wrong_clock_is_read_in_every_way(
    when: str, wrong: str, clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = clock.wall
    for turn in range(2):
        clock.wall = CLOCKS[wrong] if when == "from the start" or (when == "when opened again" and turn) else right
        with AuditLog(tmp_path / "log", rotate_bytes=3000) as log:
            router = new_router(log)
            live(router, 6, seed=turn)
            log.flush()
            if when == "in between":
                clock.wall = CLOCKS[wrong]
                live(router, 6, seed=turn + 2)
                log.flush()
                clock.wall = right
            live(router, 6, seed=turn + 4)
            log.compact()
    assert read_every_way(tmp_path / "log", tmp_path, capsys) > 50
    assert AuditLog.recover(tmp_path / "log").route(EMBEDDINGS[0]).experts


@pytest.mark.filterwarnings("ignore:.*clock:RuntimeWarning")
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("wrong", CLOCKS)
def test_no_clock_makes_retention_delete_what_is_not_old(
    wrong: str, compact: bool, clock: Clock, tmp_path: Path
) -> None:
    right = clock.wall
    with AuditLog(tmp_path, retain_seconds=3 * 86_400.0, compact=compact) as log:
        router = new_router(log)
        rotate(log, router, clock, 3, 60.0)
        clock.wall = CLOCKS[wrong]
        rotate(log, router, clock, 2, 60.0)  # upkeep runs at each of them
        clock.wall = right
        rotate(log, router, clock, 2, 60.0)
        log._background.join()
        assert log.retain(max_seconds=3 * 86_400.0) == 0
    clock.wall = CLOCKS[wrong]
    with AuditLog(tmp_path) as log:
        rotate(log, new_router(log), clock, 1, 60.0)
        assert log.retain(max_seconds=3 * 86_400.0) == 0
    assert segments(tmp_path)[0] == 0


@pytest.mark.parametrize("compact", [False, True])
def test_time_that_passed_makes_segments_old(compact: bool, clock: Clock, tmp_path: Path) -> None:
    with AuditLog(tmp_path) as log:
        rotate(log, new_router(log), clock, 4, 3600.0)  # segment n was sealed when n + 1 began
        if compact:
            log.compact()
        first = segments(tmp_path)
        assert log.retain(max_seconds=2.5 * 3600) == 1
        clock.run(3600.0)
        assert log.retain(max_seconds=2.5 * 3600) == 1
        assert segments(tmp_path) == first[2:]
    clock.run(BELIEVED / 2)  # nobody wrote meanwhile
    with AuditLog(tmp_path) as log:
        rotate(log, new_router(log), clock, 1, 60.0)
        assert log.retain(max_seconds=BELIEVED / 2 + 1800) == 2
    clock.run(30 * BELIEVED)  # longer than a clock alone is believed
    with AuditLog(tmp_path) as log:
        rotate(log, new_router(log), clock, 1, 60.0)
        assert log.retain(max_seconds=2 * BELIEVED) == 0
    assert verify(tmp_path).problem is None


@pytest.mark.parametrize("step", [10 * YEARS, -10 * YEARS, 3600.0, -3600.0])
def test_a_clock_that_is_set_is_warned_of_and_on_record(step: float, clock: Clock, tmp_path: Path) -> None:
    with AuditLog(tmp_path) as log:
        router = new_router(log)
        rotate(log, router, clock, 1, 60.0)
        clock.wall += step
        with pytest.warns(RuntimeWarning, match=f"the clock was set by {step:.0f} s"):
            log.retain(max_seconds=1e9)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            rotate(log, router, clock, 1, 60.0)
            log.retain(max_seconds=1e9)
    events = AuditLog(tmp_path, mode="r").read().events().to_pylist()
    said = [json.loads(event["detail"])["seconds"] for event in events if event["event"] == "clock stepped"]
    assert said == [pytest.approx(step, abs=1.0)]


@pytest.mark.parametrize("wrong", CLOCKS)
def test_times_are_within_what_readers_know_and_a_clock_beyond_is_said(wrong: str, clock: Clock) -> None:
    clock.wall = CLOCKS[wrong]
    beyond = not 0 <= clock.wall < MAX_TIME / 1e6
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        time_ = now()
    assert isinstance(time_, int)
    assert 0 <= time_ < MAX_TIME
    assert len(said) == beyond
    assert all("holds times from 1970 to 9999" in str(one.message) for one in said)
    assert beyond or abs(time_ / 1e6 - clock.wall) < 1


def test_the_live_view_shows_what_comes_after_a_clock_that_was_ahead(
    clock: Clock, tmp_path: Path, capsys: object
) -> None:
    with AuditLog(tmp_path) as log:
        router = new_router(log)
        right = clock.wall
        clock.wall += 10 * YEARS
        router.route_batch(EMBEDDINGS[:20])
        log.flush()
        clock.wall = right
        router.route_batch(EMBEDDINGS[:30])
    assert main(["audit", "watch", str(tmp_path), "--once"]) == 0
    assert "30 in the window" in capsys.readouterr().out
