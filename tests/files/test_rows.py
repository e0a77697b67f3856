"""Records come back as they were written, from JSON and from Parquet."""

import json
from pathlib import Path

import pytest

from moe_posterior.errors import DamagedFileError, InvalidArgumentError, MissingDataError
from moe_posterior.files.rows import read_rows, write_rows

ROWS = [
    {"gate": "softmax", "options": {"x": 1, "y": [None, True]}, "seed": 3, "value": 0.1 + 0.2, "paper": None},
    {"gate": 'a "quoted" | name', "options": {}, "seed": 4, "value": [1e-300, 2.5], "paper": 18.4},
]
HEADER = {"format": 1, "about": {"command": "moe-posterior benchmark b", "processors": 2}}
KINDS = pytest.mark.parametrize("name", ["records.json", "records.parquet", "records"])


@KINDS
@pytest.mark.parametrize("rows", [ROWS, [], [{"a": "text"}]])
def test_records_come_back_as_they_were(tmp_path: Path, name: str, rows: list) -> None:
    write_rows(tmp_path / name, HEADER, rows)
    assert read_rows(tmp_path / name) == {**HEADER, "records": rows}


@KINDS
def test_what_json_cannot_hold_is_refused_and_the_old_file_stays(tmp_path: Path, name: str) -> None:
    write_rows(tmp_path / name, HEADER, ROWS)
    for value in (float("nan"), object(), {1, 2}):
        with pytest.raises(InvalidArgumentError, match="strict JSON"):
            write_rows(tmp_path / name, HEADER, [{"value": value}])
    assert read_rows(tmp_path / name)["records"] == ROWS


@KINDS
def test_a_file_of_something_else_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(MissingDataError):
        read_rows(tmp_path / name)
    for content in (b"", b"PAR1", b"\x00\xff junk", b"{"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DamagedFileError, match=name):
            read_rows(tmp_path / name)


def test_the_kept_records_are_small_and_whole() -> None:
    folder = Path(__file__).resolve().parents[2] / "results"
    kept = list(folder.rglob("*.parquet"))
    assert kept
    assert sum(path.stat().st_size for path in kept) < 2e6
    for path in kept:
        content = read_rows(path)
        assert content["records"]
        assert json.dumps(content["about"])
