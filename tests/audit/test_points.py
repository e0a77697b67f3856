"""Every call to the file system fails, or is the last one: the log opens, holds what was acknowledged, and nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from audit.points import count_points, crash_states, holds_after_crash, holds_after_failure

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("for_good", [False, True])
def test_a_failing_call_is_told_and_costs_nothing_that_was_acknowledged(tmp_path: Path, for_good: bool) -> None:
    """A sample of the places in the code that call the system, in each step of a log's life; all calls are marked slow."""
    keys = count_points(tmp_path / "count")
    places = list(dict(zip(reversed(keys), reversed(range(len(keys))), strict=True)).values())
    print(f"{len(keys)} calls, from {len(places)} places")
    assert len(keys) > 900
    assert {key[1] for key in keys} == {"open", "flush", "compact", "retain", "close", "reopen"}
    for point in places[for_good :: 8 + 2 * for_good]:
        holds_after_failure(tmp_path / "log", point, for_good=for_good)


def test_a_crash_at_any_call_costs_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    """A sample of what a killed process or a power cut could leave."""
    points, states = crash_states(tmp_path / "life")
    kept = list(states)
    print(f"{points} calls, {len(kept)} different states of the folder")
    assert len(kept) > 250
    for state, told in kept[::8]:
        holds_after_crash(tmp_path / "log", state, told)


@pytest.mark.slow
def test_every_state_that_a_crash_could_leave_is_a_log(tmp_path: Path) -> None:
    points, states = crash_states(tmp_path / "life")
    count = 0
    for state, told in states:
        holds_after_crash(tmp_path / "log", state, told)
        count += 1
    print(f"{points} calls, {count} different states: nothing acknowledged was lost")


@pytest.mark.slow
def test_every_single_call_fails_or_ends_the_process(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "tests/audit/points.py"), str(tmp_path / "points")]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(script, capture_output=True, text=True, env=environment, cwd=ROOT)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("nothing acknowledged was lost") == 2
