"""Cached features: what is stored is what the backbone says, a stale cache is refused, and an interrupted one goes on."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moe_posterior.cli import main
from moe_posterior.errors import InvalidArgumentError, MissingDataError
from moe_posterior.training.backbones import DigitsNet
from moe_posterior.training.cache import cache
from moe_posterior.training.data import PACS, CachedFeatures, ClassificationData, Digits
from moe_posterior.training.data.base import Split
from moe_posterior.training.data.features import PassThrough

PARTS = ("train", "val", "test")
BACKBONE = "moe_posterior.training.backbones.DigitsNet"
CALLS: list[int] = []


class Toy(ClassificationData):
    """Rows read from a file, with groups that overlap and a shift."""

    name = "Toy"
    class_names = ("a", "b")
    group_names = ("left", "right")
    membership_names = ("tall", "old", "red")
    input_shape = (4,)
    known_shifts = ("louder",)

    def __init__(self, file: str, batch_size: int = 7, seed: int = 42) -> None:
        super().__init__(batch_size, seed)
        self.file = file

    def source_files(self) -> list[Path]:
        return [Path(self.file)]

    def load(self) -> dict[str, Split]:
        rows = torch.from_numpy(np.load(self.file))
        labels = torch.arange(len(rows)) % 2
        cuts = {"train": slice(0, 20), "val": slice(20, 26), "test": slice(26, None)}
        return {part: Split(rows[cut], labels[cut], groups=1 - labels[cut]) for part, cut in cuts.items()}

    def groups(self, part: str) -> Tensor:
        return self.split(part).inputs[:, :3] > 0

    def shifted(self, test: Split, shift: str, severity: int) -> Split:
        return Split(test.inputs * (1 + severity), test.targets)

    def subsets(self) -> dict[str, Tensor]:
        return {**super().subsets(), "hard": self.groups("test")[:, 0]}


class Doubling(nn.Module):
    """Features that anyone can compute; counts its calls and can be told to fail."""

    def __init__(self, factor: float = 2.0, fail_at: int | None = None) -> None:
        super().__init__()
        self.out_features = 4
        self.factor = nn.Parameter(torch.tensor(factor))
        self.drop = nn.Dropout(0.5)

    def forward(self, rows: Tensor) -> Tensor:
        CALLS.append(len(rows))
        return self.drop(rows) * self.factor


@pytest.fixture
def rows(tmp_path: Path) -> np.ndarray:
    CALLS.clear()
    rows = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    np.save(tmp_path / "rows.npy", rows)
    return rows


@pytest.fixture
def run(tmp_path: Path, rows: np.ndarray) -> Callable[..., Path]:
    """The command on the toy data; returns the folder."""

    def command(*arguments: str, out: str = "cached") -> Path:
        toy = ["--data", f"{__name__}.Toy", "--data.file", str(tmp_path / "rows.npy")]
        assert cache([*toy, "--backbone", f"{__name__}.Doubling", "--out", str(tmp_path / out), *arguments]) == 0
        return tmp_path / out

    return command


def test_what_is_read_is_what_the_backbone_says_in_half_precision(run: Callable[..., Path], rows: np.ndarray) -> None:
    folder = run("--shifts", "louder", "--severities", "1", "3")
    data = CachedFeatures(str(folder))
    expected = torch.from_numpy((rows * 2).astype(np.float16).astype(np.float32))
    assert torch.equal(torch.cat([data.split(part).inputs for part in PARTS]), expected)
    assert [len(data.split(part)) for part in PARTS] == [20, 6, 14]
    sets = {(item.shift, item.severity): item.loader.dataset.inputs for item in data.evaluation_sets(severities=(1, 3))}
    assert list(sets) == [("clean", 0), ("louder", 1), ("louder", 3)]
    for (_, severity), inputs in sets.items():
        torch.testing.assert_close(inputs, expected[26:] * (1 + severity), rtol=1e-3, atol=1e-3)
    assert data.num_classes == 2
    assert data.input_shape == (4,)
    assert next(iter(data.train_dataloader()))["input"].dtype == torch.float32


def test_names_labels_groups_and_subsets_are_those_of_the_data(run: Callable[..., Path], tmp_path: Path) -> None:
    data, source = CachedFeatures(str(run())), Toy(str(tmp_path / "rows.npy"))
    assert (data.name, data.class_names, data.group_names) == (source.name, source.class_names, source.group_names)
    for part in PARTS:
        assert torch.equal(data.split(part).targets, source.split(part).targets)
        assert torch.equal(data.domains(part), source.split(part).groups)
        assert torch.equal(data.groups(part), source.groups(part))
    assert {name: mask.tolist() for name, mask in data.subsets().items()} == {
        name: mask.tolist() for name, mask in source.subsets().items()
    }


def test_a_severity_that_was_not_cached_is_refused(run: Callable[..., Path]) -> None:
    data = CachedFeatures(str(run("--shifts", "louder", "--severities", "1")))
    with pytest.raises(InvalidArgumentError, match=r"severities of louder must be .*\('louder', 1\).*; got 2"):
        list(data.evaluation_sets(severities=(1, 2)))


def test_finished_parts_are_not_run_again_and_new_shifts_are_added(run: Callable[..., Path]) -> None:
    run()
    assert sum(CALLS) == 40
    run()
    assert sum(CALLS) == 40
    run("--shifts", "louder", "--severities", "2")
    assert sum(CALLS) == 40 + 14


def test_an_interrupted_cache_goes_on_and_ends_up_the_same(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(out="whole")
    CALLS.clear()
    forward = Doubling.forward

    def interrupted(self: Doubling, rows: Tensor) -> Tensor:
        if sum(CALLS) >= 20:
            raise KeyboardInterrupt
        return forward(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Doubling, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run()
    with pytest.raises(MissingDataError, match=r"unfinished: val\.npz is missing; run the same cache command again"):
        CachedFeatures(str(whole.parent / "cached")).setup()
    folder = run()
    assert sum(CALLS) == 40, "the training rows were run twice"
    names = {path.name for path in whole.iterdir()}
    assert names == {path.name for path in folder.iterdir()}
    assert all((folder / name).read_bytes() == (whole / name).read_bytes() for name in names)


@pytest.mark.parametrize("stop_at", ["val.npz", "manifest.json"])
def test_a_cache_that_died_while_writing_is_recovered(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, stop_at: str, tmp_path: Path
) -> None:
    replace, seen = os.replace, []

    def dying(source: Path, target: Path) -> None:
        seen.append(Path(target).name)
        if Path(target).name == stop_at and "train.npz" in seen:
            raise OSError("the disk is full")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying)
        with pytest.raises(OSError, match="disk is full"):
            run()
    with pytest.raises(MissingDataError, match="unfinished"):
        CachedFeatures(str(tmp_path / "cached")).setup()
    folder = run()
    assert len(CachedFeatures(str(folder)).split("val")) == 6
    assert not list(folder.glob(".*.moe-*"))


def test_a_truncated_file_is_refused_and_made_again(run: Callable[..., Path]) -> None:
    folder = run()
    whole = (folder / "val.npz").read_bytes()
    (folder / "val.npz").write_bytes(whole[:-9])
    with pytest.raises(InvalidArgumentError, match=r"val\.npz must be the file that manifest\.json describes"):
        CachedFeatures(str(folder)).setup()
    CALLS.clear()
    run()
    assert sum(CALLS) == 6
    assert (folder / "val.npz").read_bytes() == whole


def test_another_backbone_is_refused_and_named_unless_overwritten(run: Callable[..., Path], rows: np.ndarray) -> None:
    folder = run()
    with pytest.raises(
        InvalidArgumentError, match=r"differs in: backbone options .*3\.0.*; backbone weights .*--overwrite"
    ):
        run("--backbone.factor", "3.0")
    run("--backbone.factor", "3.0", "--overwrite")
    np.testing.assert_allclose(CachedFeatures(str(folder)).split("train").inputs, 3 * rows[:20], atol=1e-2)


def test_other_weights_or_data_are_refused_and_named_when_reading(
    run: Callable[..., Path], rows: np.ndarray, tmp_path: Path
) -> None:
    folder, file = str(run()), str(tmp_path / "rows.npy")
    CachedFeatures(folder, data=Toy(file, batch_size=3), backbone=Doubling()).setup()
    with pytest.raises(InvalidArgumentError, match=r"stale one, which differs in: backbone weights"):
        CachedFeatures(folder, backbone=Doubling(2.001)).setup()
    with pytest.raises(InvalidArgumentError, match=r"differs in: backbone class .*PassThrough"):
        CachedFeatures(folder, backbone=PassThrough(4)).setup()
    changed = rows.copy()
    changed[22, 1] += 1
    np.save(tmp_path / "other.npy", changed)
    with pytest.raises(InvalidArgumentError, match=r"differs in: data val rows \([^;]*\)\. "):
        CachedFeatures(folder, data=Toy(str(tmp_path / "other.npy"))).setup()


def test_a_source_file_that_changed_since_makes_the_cache_stale(
    run: Callable[..., Path], rows: np.ndarray, tmp_path: Path
) -> None:
    folder, file = str(run()), tmp_path / "rows.npy"
    os.utime(file, (1, 1))
    CachedFeatures(folder).setup()  # touched, not changed
    np.save(file, rows + 1)
    os.utime(file, (2, 2))
    with pytest.raises(InvalidArgumentError, match=r"differs in: source file .*rows\.npy"):
        CachedFeatures(folder).setup()
    with pytest.raises(InvalidArgumentError, match=r"data train rows .*; data val rows .*; data test rows"):
        run()
    file.unlink()
    CachedFeatures(folder).setup()  # the cache may have moved to another machine


def test_buffers_left_out_of_the_state_dict_count_as_weights(tmp_path: Path) -> None:
    from moe_posterior.training.backbones import ResNet
    from moe_posterior.training.data.manifest import describe_backbone, differences

    first, second = (ResNet(widths=(4,), blocks=(1,), mean=mean) for mean in ((0.5, 0.5, 0.5), (0.4, 0.5, 0.5)))
    second.load_state_dict(first.state_dict())
    found = differences(describe_backbone(first), describe_backbone(second), "backbone")
    assert [words.split(" (")[0] for words in found] == ["backbone weights"]


def test_weights_come_from_a_checkpoint_with_a_prefix(tmp_path: Path) -> None:
    net = DigitsNet(out_features=8)
    entries = {f"backbone.{name}": value for name, value in net.state_dict().items()} | {"head.weight": torch.ones(2)}
    torch.save({"state_dict": entries, "epoch": 3}, tmp_path / "last.ckpt")
    command = [
        "--data",
        "moe_posterior.training.data.Digits",
        "--backbone",
        BACKBONE,
        "--backbone.out_features",
        "8",
        "--out",
        str(tmp_path / "c"),
    ]
    command += ["--weights", str(tmp_path / "last.ckpt"), "--prefix"]
    with pytest.raises(
        InvalidArgumentError, match=r"(?s)with prefix 'encoder\.' must fit the backbone; got .*Missing key"
    ):
        cache([*command, "encoder."])
    assert cache([*command, "backbone."]) == 0
    data, source = CachedFeatures(str(tmp_path / "c"), backbone=net), Digits()
    with torch.no_grad():
        expected = net(source.split("test").inputs.float() / 16)
    torch.testing.assert_close(data.split("test").inputs, expected, atol=2e-3, rtol=2e-3)
    assert {name: int(mask.sum()) for name, mask in data.subsets().items()} == {"overall": 629, "hard": 92, "easy": 537}


def test_the_seed_decides_untrained_weights(tmp_path: Path) -> None:
    command = ["--data", "moe_posterior.training.data.Digits", "--backbone", BACKBONE, "--out"]
    for folder, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        cache([*command, str(tmp_path / folder), "--seed", seed])
    a, b, c = (json.loads((tmp_path / name / "manifest.json").read_text())["backbone"]["weights"] for name in "abc")
    assert a == b != c


def test_standardised_and_projected_features_are_fitted_on_training_rows(run: Callable[..., Path]) -> None:
    data = CachedFeatures(str(run()), standardise=True, project=2)
    train = data.split("train").inputs
    assert data.input_shape == (2,) == tuple(train.shape[1:])
    covariance = train.T.cov(correction=0)
    assert covariance[0, 0] >= covariance[1, 1]
    torch.testing.assert_close(covariance[0, 1], torch.tensor(0.0), atol=1e-5, rtol=0)


def test_data_from_a_yaml_file_and_domains_of_pacs_reach_the_cache(tmp_path: Path) -> None:
    rows, width = 4 * 7 * 4, 3
    features = np.random.default_rng(0).normal(size=(rows, width)).astype(np.float16)
    domain, label = np.arange(rows) // 28, np.arange(rows) % 7
    np.savez(tmp_path / "features_efficientnet_lite0.npz", features=features, domain=domain, label=label)
    settings = {
        "class_path": "moe_posterior.training.data.PACS",
        "init_args": {"root": str(tmp_path), "held_out": "photo", "val_fraction": 0.25},
    }
    (tmp_path / "data.yaml").write_text(json.dumps(settings))
    backbone = ["--backbone", "moe_posterior.training.data.features.PassThrough", "--backbone.out_features", str(width)]
    assert cache(["--data", str(tmp_path / "data.yaml"), *backbone, "--out", str(tmp_path / "c")]) == 0
    data, source = CachedFeatures(str(tmp_path / "c")), PACS(str(tmp_path), held_out="photo", val_fraction=0.25)
    assert data.group_names == source.domain_names
    for part in PARTS:
        assert torch.equal(data.domains(part), source.domains(part))
    with pytest.raises(InvalidArgumentError, match="PACS has none"):
        data.groups("train")


class Overflowing(PassThrough):
    def forward(self, features: Tensor) -> Tensor:
        return features * 1e6


class Pictures(PassThrough):
    def forward(self, features: Tensor) -> Tensor:
        return features[:, None]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Overflowing", "finite in half precision .* row 0 of train"),
        ("Pictures", r"one feature vector per row, \(7, F\)"),
    ],
)
def test_features_that_cannot_be_stored_are_refused(run: Callable[..., Path], name: str, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        run("--backbone", f"{__name__}.{name}", "--backbone.out_features", "4")


def test_an_unknown_shift_is_refused_before_anything_is_written(run: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"shifts of Toy must be among .*got \['quieter'\]"):
        run("--shifts", "quieter")
    assert not (tmp_path / "cached").exists()
    assert not CALLS


def test_overwriting_removes_what_the_cache_made_and_nothing_beside_it(run: Callable[..., Path]) -> None:
    folder = run("--shifts", "louder", "--severities", "1")
    (folder / "mine.npz").touch()
    run("--backbone.factor", "3.0", "--overwrite")
    assert (folder / "mine.npz").exists()
    assert not (folder / "test-louder-1.npz").exists()


def test_folders_without_a_readable_cache_say_so(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match=r"there is no cache of features at .*moe-posterior cache --data"):
        CachedFeatures(str(tmp_path))
    (tmp_path / "manifest.json").write_text('{"format": 1, "da')
    with pytest.raises(InvalidArgumentError, match="is not valid JSON"):
        CachedFeatures(str(tmp_path))
    (tmp_path / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(InvalidArgumentError, match="must have format 1; got 99"):
        CachedFeatures(str(tmp_path))


def test_help_teaches_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cache(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "moe-posterior cache --data Digits --backbone" in text
    assert "CachedFeatures" in text


HOSTILE = {
    "not YAML": "a: {",
    "no text": b"\xff\xfe\x00",
    "code": "!!python/object/apply:os.system ['true']",
    "nested too deeply": "[" * 5000,
    "nothing": "",
    "a list": "- class_path",
    "keys that are lists": "? [a, b]\n: c",
    "a month too many": "class_path: 2001-99-99",
    "a class that is a number": "class_path: 3",
    "a class of many": "class_path: [Digits, PACS]",
    "other keys": "class_path: Digits\nfolder: x",
    "arguments in a list": "class_path: Digits\ninit_args: [1]",
    "arguments that contain themselves": "class_path: Digits\ninit_args: &a {x: *a}",
    "arguments that grow": "class_path: Digits\ninit_args:\n  a: &a [1,1,1,1,1,1,1,1,1,1]\n"
    + "".join(
        f"  {new}: &{new} [{','.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    ),
    "no class of the kind": "class_path: os.system",
    "a surrogate": 'class_path: "\\ud800"',
}


@pytest.mark.parametrize("option", ["--data", "--backbone"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_class_file_that_is_none_is_one_sentence(tmp_path: Path, option: str, kind: str, capsys) -> None:
    file, content = tmp_path / "own.yaml", HOSTILE[kind]
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    own = {"--data": "Digits", "--backbone": "moe_posterior.training.backbones.DigitsNet", option: str(file)}
    words = [word for pair in own.items() for word in pair]
    assert main(["cache", *words, "--out", str(tmp_path / "c")]) == 2
    [said] = capsys.readouterr().err.splitlines()
    assert said.startswith("moe-posterior cache: ")
    assert len(said) < 2000
