"""Files of records: what they hold comes back, and a run that is resumed repeats nothing."""

import pytest

from moe_posterior.benchmarks.records import Record, Results, Resumed, read, write
from moe_posterior.errors import InvalidArgumentError


def record(seed: int, value: object = 0.5) -> Record:
    return Record("b", "synthetic", "softmax", {"experts": 16}, seed, "error", value)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["r.json", "r.parquet"])
def test_numbers_lists_and_lists_of_a_layer_each_come_back(tmp_path, name: str) -> None:
    pytest.importorskip("pyarrow")
    found = [record(0), record(1, None), record(2, [0.1, 0.2]), record(3, [[0.25, 0.75], [0.5, 0.5]])]
    write(Results(found, {"command": "c"}), tmp_path / name)
    assert read(tmp_path / name) == Results(found, {"command": "c"})


@pytest.mark.parametrize("value", ["a", [[0.5], "a"], {"a": 1}])
def test_anything_but_numbers_is_refused(tmp_path, value: object) -> None:
    write(Results([record(0, value)]), tmp_path / "r.json")
    with pytest.raises(InvalidArgumentError, match="not a file of benchmark records"):
        read(tmp_path / "r.json")


def test_a_resumed_file_keeps_what_it_has_and_knows_which_runs_are_done(tmp_path) -> None:
    path = tmp_path / "r.json"
    Resumed(path, {}).add([record(0)])
    again = Resumed(path, {"command": "c"})
    assert again.done == {record(0).case}
    again.add([record(1)])
    assert read(path) == Results([record(0), record(1)], {"command": "c"})


def test_a_file_that_cannot_be_written_is_found_out_before_the_work(tmp_path) -> None:
    with pytest.raises(InvalidArgumentError, match="--out must lie in an existing folder"):
        Resumed(tmp_path / "nowhere" / "r.json", {})
    kept = Resumed(None, {})
    kept.add([record(0)])
    assert kept.results("b").records == [record(0)]
    assert kept.results("lm").records == []
