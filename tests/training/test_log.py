"""metrics.csv across the sessions of a run: no line is lost, none stands twice, and what is no such file is named."""

import csv
from pathlib import Path

import pytest

from moe_posterior import DamagedFileError
from moe_posterior.training.log import MetricsFile


def lines(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def session(folder: Path, steps: range) -> MetricsFile:
    """Logs every step, and a figure of its own at every third."""
    log = MetricsFile(str(folder))
    for step in steps:
        log.log_metrics({"epoch": step // 4, "loss": 1 / (step + 1)}, step)
        if step % 3 == 2:
            log.log_metrics({"epoch": step // 4, "val": 0.5 * step}, step)
    return log


@pytest.mark.parametrize("stopped", range(1, 12))
@pytest.mark.parametrize("kept", [0, 1, 4, 8])
def test_sessions_that_were_cut_anywhere_leave_the_file_of_one_undisturbed(
    tmp_path: Path, stopped: int, kept: int
) -> None:
    undisturbed = session(tmp_path / "whole", range(12)).path
    session(tmp_path / "cut", range(stopped))
    done = min(kept, stopped)  # what the last checkpoint has seen
    log = MetricsFile(str(tmp_path / "cut"))
    log.keep_before(done)
    session(tmp_path / "cut", range(done, 12))
    assert lines(log.path) == lines(undisturbed)


@pytest.mark.parametrize("lost", range(1, 20))
def test_a_line_that_a_kill_left_unfinished_is_dropped(tmp_path: Path, lost: int) -> None:
    path = session(tmp_path, range(4)).path
    whole = lines(path)
    session_data = path.read_bytes()
    path.write_bytes(session_data[:-lost])
    MetricsFile(str(tmp_path)).keep_before(100)
    found = lines(path)
    assert found == whole[: len(found)]
    assert len(found) == session_data[:-lost].count(b"\n") - 1


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x81\x00junk\n\xff\xfe\n",
        b"epoch,loss\n0,0.5\n",
        b"step,loss\nsoon,0.5\n",
        b"step,loss\n1,0.5,0.7\n",
        b"\x00\x01\n\x02\n",
        b'step,loss\n"1,0.5\n',
        b"step",
        b"[1, 2]",
    ],
)
def test_a_file_that_is_no_log_of_a_run_is_named_and_left(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"metrics\.csv must be the figures of this run"):
        MetricsFile(str(tmp_path)).keep_before(5)
    assert path.read_bytes() == content


def test_a_folder_in_its_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").mkdir()
    with pytest.raises(DamagedFileError, match=r"metrics\.csv"):
        MetricsFile(str(tmp_path)).keep_before(5)


def test_an_empty_file_is_a_start(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_bytes(b"")
    MetricsFile(str(tmp_path)).keep_before(0)
    session(tmp_path, range(3))
    assert [row["step"] for row in lines(tmp_path / "metrics.csv")] == ["0", "1", "2", "2"]
