import os
import sys
import threading
from pathlib import Path

import pytest
import torch

from moe_posterior.errors import DamagedFileError, MissingDataError, MissingDependencyError
from moe_posterior.files.tensorfile import digest, load_tensors, save_tensors

HEADER = {"kind": "test", "names": ["a", "b"]}


def tensors() -> dict[str, torch.Tensor]:
    table = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    return {
        "nan": torch.tensor([torch.nan, -0.0, torch.inf]),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "none": torch.zeros(0, 2, dtype=torch.int64),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "view": table[:, 1],
        "same": table[:, 1],
    }


@pytest.fixture(params=["safetensors", "torch"])
def written(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if request.param == "torch":
        monkeypatch.setitem(sys.modules, "safetensors", None)
        monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    else:
        pytest.importorskip("safetensors")
    path = tmp_path / "file"
    save_tensors(path, tensors(), HEADER)
    return path


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return digest(left) == digest(right)


def test_what_is_written_is_read_bit_for_bit(written: Path) -> None:
    read, header = load_tensors(written, "test")
    assert header == HEADER
    assert same(read, tensors())
    assert read["view"].tolist() == [1.0, 5.0, 9.0]


def test_no_altered_or_shortened_file_is_read_as_something_else(written: Path) -> None:
    good = written.read_bytes()
    refused = 0
    places = sorted({*range(0, len(good), max(1, len(good) // 150)), *range(40), len(good) - 1})
    for place in places:
        flipped = bytes([*good[:place], good[place] ^ 0x10, *good[place + 1 :]])
        for content in (flipped, good[:place]):
            written.write_bytes(content)
            try:
                read, header = load_tensors(written, "test")
            except DamagedFileError:
                refused += 1
            else:  # padding or a time stamp of the container
                assert same(read, tensors())
                assert header == HEADER
    assert refused > len(places)


def test_a_file_of_another_kind_or_origin_is_refused(written: Path, tmp_path: Path) -> None:
    with pytest.raises(DamagedFileError, match="kind 'other'; got 'test'"):
        load_tensors(written, "other")
    torch.save({"weights": torch.ones(2)}, tmp_path / "foreign")
    with pytest.raises(DamagedFileError):
        load_tensors(tmp_path / "foreign", "test")
    with pytest.raises(MissingDataError, match="there is no file"):
        load_tensors(tmp_path / "absent", "test")


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = written.read_bytes()

    def broken(*_: object) -> None:
        raise OSError("disk full")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, broken)
            with pytest.raises(OSError, match="disk full"):
                save_tensors(written, {"other": torch.zeros(1)}, {"kind": "test"})
        assert written.read_bytes() == good
        assert [path.name for path in written.parent.iterdir()] == [written.name]


def test_safetensors_without_the_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("safetensors")
    save_tensors(tmp_path / "file", tensors(), HEADER)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(MissingDependencyError, match="safetensors"):
        load_tensors(tmp_path / "file", "test")


def test_threads_that_write_one_file_leave_one_of_their_files_whole(tmp_path: Path) -> None:
    failures: list[Exception] = []

    def write(value: float) -> None:
        try:
            for _ in range(40):
                save_tensors(tmp_path / "file", {"a": torch.full((20_000,), value)}, {"kind": "test"})
                (content, _) = load_tensors(tmp_path / "file", "test")
                assert len(content["a"].unique()) == 1
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(float(number),)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_same_content_is_the_same_file(tmp_path: Path) -> None:
    for number in range(12):
        save_tensors(tmp_path / str(number), tensors(), HEADER)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
