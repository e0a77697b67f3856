"""Every file that a command reads, torn, foreign or something else altogether: one sentence that names it, exit status 2."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from moe_posterior import MoEPosteriorError
from moe_posterior.cli import main
from moe_posterior.files.reading import read_json, read_mapping
from moe_posterior.training.data import manifest
from moe_posterior.training.study.cli import _require_same_settings
from moe_posterior.training.study.plan import STUDIES
from moe_posterior.training.study.train import load_outputs
from moe_posterior.training.trained import read_checkpoint


def folder(path: Path, whole: bytes) -> None:
    path.mkdir()


def pipe(path: Path, whole: bytes) -> None:
    os.mkfifo(path)


def holding(content: Callable[[bytes], bytes]) -> Callable[[Path, bytes], None]:
    return lambda path, whole: path.write_bytes(content(whole)) and None


DAMAGE: dict[str, Callable[[Path, bytes], None]] = {
    "a folder": folder,
    "a pipe": pipe,
    "empty": holding(lambda whole: b""),
    "binary junk": holding(lambda whole: bytes(range(256)) * 4),
    "torn in the middle": holding(lambda whole: whole[: len(whole) // 2] + b"\x00{[\xff"),
    "a list": holding(lambda whole: b"[1, 2]"),
    "nothing in JSON": holding(lambda whole: b"null"),
    "nested too deeply": holding(lambda whole: b"[" * 100_000),
    "a zip of nothing": holding(lambda whole: b"PK\x05\x06" + bytes(18)),
    "a pickle": holding(lambda whole: b"\x80\x04cos\nsystem\n."),
}
damaged = pytest.mark.parametrize("kind", DAMAGE)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two arms, the second from the first's warm-up."""
    place = tmp_path_factory.mktemp("runs")
    method = {"class_path": "moe_posterior.training.methods.Vanilla", "init_args": {"warmup_epochs": 1}}
    robust = {"class_path": "moe_posterior.training.methods.Robust", "init_args": {"warmup_epochs": 1}}
    experiment = {
        "name": "run",
        "data": {"class_path": "points.Points", "init_args": {"batch_size": 48}},
        "model": {"backbone": {"class_path": "points.Plane"}},
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "enable_model_summary": False},
        "arms": {
            "first": {"model": {"method": method}},
            "second": {"branch_from": "first", "model": {"method": robust}},
        },
    }
    (place / "run.yaml").write_text(yaml.safe_dump(experiment))
    assert main(["fit", "--config", str(place / "run.yaml"), "--run-dir", str(place)]) == 0
    return place


@pytest.fixture
def place(whole_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole_run, tmp_path / "runs")
    return tmp_path / "runs"


def spoil(path: Path, kind: str) -> None:
    whole = path.read_bytes() if path.is_file() else b'{"format": 1}'
    path.unlink(missing_ok=True)
    DAMAGE[kind](path, whole)


def refused(capsys: pytest.CaptureFixture[str], path: Path, *arguments: object) -> None:
    capsys.readouterr()
    assert main([str(word) for word in arguments]) == 2
    said = capsys.readouterr().err
    own = [line for line in said.splitlines() if line.startswith(f"moe-posterior {arguments[0]}: ")]
    assert len(own) == 1, said
    assert said.splitlines()[-1] == own[0]
    assert path.name in own[0] or "there is no run in" in own[0]
    assert len(own[0]) < 900
    assert "Traceback" not in said


@damaged
@pytest.mark.parametrize("file", ["experiment.yaml", "first/config.yaml", "first/checkpoints/last.ckpt"])
def test_evaluate_names_a_damaged_file_of_the_run(place: Path, file: str, kind: str, capsys) -> None:
    spoil(place / "run" / file, kind)
    refused(capsys, place / "run" / file, "evaluate", "--run", place / "run", "--resamples", "100")


@damaged
@pytest.mark.parametrize("file", ["first/checkpoints/last.ckpt", "first/csv/metrics.csv"])
def test_fit_names_a_damaged_file_that_it_would_go_on_from(place: Path, file: str, kind: str, capsys) -> None:
    if file.endswith("csv") and kind in ("empty", "torn in the middle"):
        pytest.skip("an empty file of figures is a start, and a torn line is written again")
    (place / "run" / "first" / "finished.json").unlink()
    spoil(place / "run" / file, kind)
    if (place / "run" / file).is_dir() and file.endswith("ckpt"):
        pytest.skip("no checkpoint is a start; what cannot be written is said by the writer")
    if kind == "a pipe" and file.endswith("ckpt"):
        pytest.skip("no plain file is no checkpoint")
    refused(capsys, place / "run" / file, "fit", "--config", place / "run.yaml", "--run-dir", place)


@damaged
def test_fit_names_a_damaged_warm_up(place: Path, kind: str, capsys) -> None:
    path = place / "run" / "first" / "checkpoints" / "warmup.ckpt"
    shutil.rmtree(place / "run" / "second")
    spoil(path, kind)
    refused(capsys, path, "fit", "--config", place / "run.yaml", "--run-dir", place)


@damaged
def test_fit_names_a_damaged_experiment_file(tmp_path: Path, kind: str, capsys) -> None:
    spoil(tmp_path / "own.yaml", kind)
    refused(capsys, tmp_path / "own.yaml", "fit", "--config", tmp_path / "own.yaml", "--run-dir", tmp_path)


@pytest.mark.parametrize(
    "text", ["a: 2020-99-99", "? [a]\n: b", "a: &x [*x]\nb: !!python/object:os.system {}", "1: 2", "a: \x07"]
)
def test_yaml_that_no_reader_takes_is_named(tmp_path: Path, text: str, capsys) -> None:
    (tmp_path / "own.yaml").write_text(text)
    refused(capsys, tmp_path / "own.yaml", "fit", "--config", tmp_path / "own.yaml", "--run-dir", tmp_path)


@pytest.mark.parametrize("part", ["state_dict", "epoch", "global_step", "loops", "optimizer_states", "lr_schedulers"])
@pytest.mark.parametrize("other", [None, "text"])
def test_a_checkpoint_without_one_of_its_parts_is_named(place: Path, part: str, other: str | None, capsys) -> None:
    path = place / "run" / "first" / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    del content[part]
    torch.save({**content, **({part: other} if other else {})}, path)
    with pytest.raises(MoEPosteriorError, match=f"holds no {part}"):
        read_checkpoint(path)
    refused(capsys, path, "evaluate", "--run", place / "run")
    (place / "run" / "first" / "finished.json").unlink()
    refused(capsys, path, "fit", "--config", place / "run.yaml", "--run-dir", place)


def test_a_checkpoint_of_another_model_is_one_sentence(place: Path, capsys) -> None:
    path = place / "run" / "first" / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    content["state_dict"] = {f"other.{name}": value for name, value in content["state_dict"].items()}
    torch.save(content, path)
    refused(capsys, path, "evaluate", "--run", place / "run")


@damaged
def test_study_names_damaged_records_and_leftovers(tmp_path: Path, kind: str, capsys) -> None:
    spoil(tmp_path / "records.json", kind)
    refused(capsys, tmp_path / "records.json", "study", "pacs", "--from", tmp_path / "records.json")
    if kind == "a pipe":
        return  # what follows is read only where it is a plain file
    spoil(tmp_path / "cell.npz", kind)
    with pytest.raises(MoEPosteriorError, match=r"cell\.npz"):
        load_outputs(tmp_path / "cell.npz")
    spoil(tmp_path / "settings.json", kind)
    if (tmp_path / "settings.json").is_file():
        with pytest.raises(MoEPosteriorError, match=r"settings\.json|made with other settings"):
            _require_same_settings(STUDIES["pacs"], tmp_path)


@pytest.mark.parametrize(
    "content", [{}, {"records": 3, "about": {}}, {"records": [{"x": 1}], "about": {}}, {"records": [1]}]
)
def test_study_names_records_of_another_kind(tmp_path: Path, content: object, capsys) -> None:
    (tmp_path / "records.json").write_text(json.dumps(content))
    refused(capsys, tmp_path / "records.json", "study", "pacs", "--from", tmp_path / "records.json")


@damaged
@pytest.mark.parametrize("option", ["--from", "--out", "--knobs"])
def test_benchmark_names_a_damaged_file(tmp_path: Path, kind: str, option: str, capsys) -> None:
    spoil(tmp_path / "file.json", kind)
    refused(capsys, tmp_path / "file.json", "benchmark", "b", "--quiet", option, tmp_path / "file.json")


@pytest.mark.parametrize(
    "change",
    [{"value": "x"}, {"value": {}}, {"options": 3}, {"gate": None}, {"seed": "one"}, {"more": 1}, {"value": ["x"]}],
)
def test_benchmark_names_records_with_values_of_another_kind(tmp_path: Path, change: dict, capsys) -> None:
    one = {"benchmark": "b", "environment": "synthetic", "gate": "softmax", "options": {}, "seed": 0, "metric": "error"}
    content = {"format": 1, "about": {}, "records": [{**one, "value": 0.5, **change}]}
    (tmp_path / "file.json").write_text(json.dumps(content))
    refused(capsys, tmp_path / "file.json", "benchmark", "b", "--quiet", "--from", tmp_path / "file.json")


CACHE = ["cache", "--data", "points.Points", "--backbone", "points.Plane"]


@damaged
def test_cache_names_damaged_weights(tmp_path: Path, kind: str, capsys) -> None:
    spoil(tmp_path / "net.pt", kind)
    refused(capsys, tmp_path / "net.pt", *CACHE, "--out", tmp_path / "out", "--weights", tmp_path / "net.pt")


@damaged
def test_cache_names_a_damaged_manifest_and_mends_a_damaged_part(tmp_path: Path, kind: str, capsys) -> None:
    assert main([*CACHE, "--out", str(tmp_path / "out")]) == 0
    stored = manifest.read(tmp_path / "out")
    spoil(tmp_path / "out" / "test.npz", kind)
    with pytest.raises(MoEPosteriorError, match=r"test\.npz"):
        manifest.load_part(tmp_path / "out", stored, "test")
    spoil(tmp_path / "out" / "manifest.json", kind)
    refused(capsys, tmp_path / "out" / "manifest.json", *CACHE, "--out", tmp_path / "out")


@pytest.mark.parametrize("key", ["data", "backbone", "settings", "sources", "features", "parts"])
@pytest.mark.parametrize("value", [3, "text", ["x"]])
def test_a_manifest_with_parts_of_another_kind_is_named(tmp_path: Path, key: str, value: object, capsys) -> None:
    assert main([*CACHE, "--out", str(tmp_path / "out")]) == 0
    path = tmp_path / "out" / "manifest.json"
    content = {**json.loads(path.read_text()), key: value}
    path.write_text(json.dumps(content))
    if key == "features":
        return  # a number is what it holds; the parts' own shapes decide
    refused(capsys, path, *CACHE, "--out", tmp_path / "out")


@damaged
def test_the_readers_themselves_raise_one_error_of_ours(tmp_path: Path, kind: str) -> None:
    spoil(tmp_path / "file", kind)
    for reader in (read_mapping, read_checkpoint):
        with pytest.raises(MoEPosteriorError, match="file") as raised:
            reader(tmp_path / "file")
        assert "\n" not in str(raised.value)
    if kind not in ("a list", "nothing in JSON"):
        with pytest.raises(MoEPosteriorError, match="file"):
            read_json(tmp_path / "file")


@damaged
@pytest.mark.parametrize("data", ["pacs", "comments", "votes"])
def test_data_modules_name_a_damaged_file(tmp_path: Path, kind: str, data: str) -> None:
    from moe_posterior.training.data import CAD, CIFAR10H, PACS

    names = {
        "pacs": "features_efficientnet_lite0.npz",
        "comments": "cad_reddit_wilds_schema.parquet",
        "votes": "train.parquet",
    }
    np.save(tmp_path / "whole.npy", np.zeros(3))
    (tmp_path / names[data]).write_bytes((tmp_path / "whole.npy").read_bytes())
    spoil(tmp_path / names[data], kind)
    if not (tmp_path / names[data]).is_file():
        pytest.skip("what is no plain file is looked for elsewhere")
    made = {
        "pacs": lambda: PACS(str(tmp_path)),
        "comments": lambda: CAD(str(tmp_path), inputs="embeddings"),
        "votes": lambda: CIFAR10H(str(tmp_path)),
    }[data]()
    with pytest.raises(MoEPosteriorError, match=names[data].replace(".", r"\.")):
        made.split("test")
