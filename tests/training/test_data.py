"""Data modules: splits, determinism by (seed, epoch), aligned evaluation sets, hard subsets, and clear errors."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from moe_posterior.errors import InvalidArgumentError, MissingDataError
from moe_posterior.training.data import CIFAR10H, ClassificationData, Digits
from moe_posterior.training.data.augment import crop_and_flip
from moe_posterior.training.data.base import (
    BatchKey,
    EpochBatches,
    Split,
    candidate_folders,
    generator_for,
    stratified_split,
)

LIMIT = 2000


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits(batch_size=100)


@pytest.fixture(scope="module")
def cifar() -> CIFAR10H:
    folders = candidate_folders("cifar10h")
    if not any((folder / "test.parquet").is_file() for folder in folders):
        pytest.skip(f"CIFAR-10H is at none of {[str(folder) for folder in folders]}")
    data = CIFAR10H(limit=LIMIT)
    data.setup()
    return data


def gather(loader: torch.utils.data.DataLoader, epoch: int = 0) -> dict[str, Tensor]:
    loader.sampler.set_epoch(epoch)
    batches = list(loader)
    return {key: torch.cat([batch[key] for batch in batches]) for key in ("input", "target", "index")}


# --- splits -------------------------------------------------------------------------------------------------------------


def test_stratified_split_is_disjoint_complete_and_keeps_class_shares() -> None:
    targets = torch.tensor([0] * 60 + [1] * 40 + [2] * 20)
    parts = stratified_split(targets, (0.5, 0.25, 0.25), generator_for("test"))
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(120))
    assert [targets[part].bincount().tolist() for part in parts] == [[30, 20, 10], [15, 10, 5], [15, 10, 5]]


def test_stratified_split_may_leave_rows_out() -> None:
    parts = stratified_split(torch.zeros(100, dtype=torch.int64), (0.1, 0.2), generator_for("test"))
    assert [len(part) for part in parts] == [10, 20]
    assert not set(parts[0].tolist()) & set(parts[1].tolist())


@pytest.mark.parametrize("fractions", [(0.7, 0.4), (-0.1, 0.5)])
def test_stratified_split_rejects_impossible_fractions(fractions: tuple[float, float]) -> None:
    with pytest.raises(InvalidArgumentError, match="fractions must be non-negative and sum to at most 1"):
        stratified_split(torch.zeros(10, dtype=torch.int64), fractions, generator_for("test"))


def test_digits_are_split_without_overlap_into_all_the_rows_there_are(digits: Digits) -> None:
    from sklearn.datasets import load_digits

    parts = [digits.split(part) for part in ("train", "val", "test")]
    assert [len(part) for part in parts] == [898, 270, 629]
    # As multisets of images the parts make up the source: no row is lost and none stands in two parts.
    rows = torch.cat([part.inputs.flatten(1) for part in parts]).tolist()
    assert sorted(rows) == sorted(load_digits().data.tolist())


def test_another_seed_draws_another_split() -> None:
    assert not torch.equal(Digits(seed=1).split("test").inputs, Digits(seed=2).split("test").inputs)


def test_validation_rows_of_cifar_are_stratified_and_not_training_rows(cifar: CIFAR10H) -> None:
    train, val = cifar.split("train"), cifar.split("val")
    assert len(train) + len(val) == LIMIT
    assert (val.targets.bincount(minlength=10) - LIMIT / 100).abs().max() <= 5
    assert not {bytes(image.numpy()) for image in train.inputs} & {bytes(image.numpy()) for image in val.inputs}


def test_train_fraction_keeps_that_share_of_every_class(cifar: CIFAR10H) -> None:
    part = CIFAR10H(limit=LIMIT, train_fraction=0.5)
    assert len(part.split("train")) + len(part.split("val")) == pytest.approx(LIMIT / 2, abs=10)
    full = cifar.split("train").targets.bincount()
    assert (part.split("train").targets.bincount() - full / 2).abs().max() <= 1


# --- batches ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_every_row_comes_once_an_epoch_with_its_own_label(digits: Digits, part: str) -> None:
    split = digits.split(part)
    loader = getattr(digits, f"{part}_dataloader")()
    seen = gather(loader)
    assert len(list(loader)) == len(loader)
    assert torch.equal(seen["index"].sort().values, torch.arange(len(split)))
    assert torch.equal(seen["target"], split.targets[seen["index"]])
    torch.testing.assert_close(seen["input"], split.inputs[seen["index"]].float() / 16)


def test_batches_have_the_promised_shapes_types_and_range(digits: Digits) -> None:
    batch = next(iter(digits.train_dataloader()))
    assert batch["input"].shape == (100, *digits.input_shape)
    assert batch["input"].dtype == torch.float32
    assert (batch["input"].min(), batch["input"].max()) == (0, 1)
    assert batch["target"].dtype == batch["index"].dtype == torch.int64


def test_training_order_depends_on_seed_and_epoch_and_nothing_else() -> None:
    def order(seed: int, epoch: int) -> Tensor:
        return gather(Digits(seed=seed).train_dataloader(), epoch)["index"]

    first = order(1, 3)
    torch.manual_seed(99)  # must not matter
    assert torch.equal(first, order(1, 3))
    assert not torch.equal(first, order(1, 4))
    assert not torch.equal(first, order(2, 3))


def test_evaluation_loaders_keep_the_stored_order_in_every_epoch(digits: Digits) -> None:
    for loader in (digits.train_evaluation_dataloader(), digits.val_dataloader(), digits.test_dataloader()):
        assert torch.equal(gather(loader, epoch=5)["index"], torch.arange(len(loader.dataset)))


def test_augmentation_of_a_row_changes_with_the_epoch_and_repeats_with_the_seed(cifar: CIFAR10H) -> None:
    first = gather(cifar.train_dataloader(), epoch=1)
    again = gather(CIFAR10H(limit=LIMIT).train_dataloader(), epoch=1)
    assert all(torch.equal(first[key], again[key]) for key in first)
    later = gather(cifar.train_dataloader(), epoch=2)
    by_row = [seen["input"][seen["index"].argsort()] for seen in (first, later)]
    assert (by_row[0] == by_row[1]).flatten(1).all(dim=1).double().mean() < 0.1


@pytest.mark.parametrize("other", [(42, 1, 0), (42, 0, 1), (43, 0, 0)], ids=["epoch", "batch", "seed"])
def test_the_same_rows_are_augmented_anew_for_another_epoch_batch_or_seed(other: tuple[int, int, int]) -> None:
    images = torch.rand(50, 1, 8, 8, generator=generator_for("images"))

    def augmented(seed: int, epoch: int, number: int) -> Tensor:
        split = Split(images, torch.zeros(50, dtype=torch.int64), augmentation=crop_and_flip, seed=seed)
        return split[BatchKey(torch.arange(50), epoch, number)]["input"]

    assert torch.equal(augmented(42, 0, 0), augmented(42, 0, 0))
    assert not torch.equal(augmented(42, 0, 0), augmented(*other))


def test_rows_that_evidence_is_rebuilt_from_are_not_augmented(cifar: CIFAR10H) -> None:
    seen = gather(cifar.train_evaluation_dataloader())
    torch.testing.assert_close(seen["input"], cifar.split("train").inputs.float() / 255)


def test_without_augmentation_training_inputs_are_the_stored_ones(cifar: CIFAR10H) -> None:
    data = CIFAR10H(limit=LIMIT, augment=False)
    seen = gather(data.train_dataloader())
    torch.testing.assert_close(seen["input"], data.split("train").inputs[seen["index"]].float() / 255)


def test_crop_and_flip_gives_each_image_a_window_of_its_padded_self() -> None:
    images = torch.rand(40, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    result = crop_and_flip(images, torch.Generator().manual_seed(1), padding=2)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    found = []
    for image, cropped in zip(padded, result, strict=True):
        windows = {(y, x): image[:, y : y + 6, x : x + 6] for y in range(5) for x in range(5)}
        found += [
            (y, x, flip)
            for (y, x), window in windows.items()
            for flip in (False, True)
            if torch.equal(window.flip(2) if flip else window, cropped)
        ]
    assert len(found) == 40
    assert len({flip for _, _, flip in found}) == 2
    assert len({(y, x) for y, x, _ in found}) > 10


def test_crop_and_flip_keeps_bytes_and_empty_batches() -> None:
    assert crop_and_flip(torch.empty(0, 3, 32, 32, dtype=torch.uint8), torch.Generator()).shape == (0, 3, 32, 32)
    assert crop_and_flip(torch.ones(2, 3, 8, 8, dtype=torch.uint8), torch.Generator()).dtype == torch.uint8


def test_an_empty_split_gives_no_batches() -> None:
    split = Split(torch.empty(0, 1, 8, 8), torch.empty(0, dtype=torch.int64))
    for shuffle in (False, True):
        sampler = EpochBatches(split, batch_size=4, shuffle=shuffle, seed=0)
        assert list(sampler) == []
        assert len(sampler) == 0


@pytest.mark.parametrize("shuffle", [False, True])
def test_processes_share_the_rows_without_loss_and_train_on_equal_numbers(shuffle: bool) -> None:
    split = Split(torch.arange(23), torch.zeros(23, dtype=torch.int64))
    seen: list[list[int]] = []
    numbers: list[int] = []
    for rank in range(4):
        sampler = EpochBatches(split, batch_size=4, shuffle=shuffle, seed=0)
        sampler.rank, sampler.num_replicas = rank, 4
        keys = list(sampler)
        assert len(keys) == len(sampler)
        seen.append(torch.cat([key.rows for key in keys]).tolist())
        numbers += [key.number for key in keys]
    together = sorted(row for rows in seen for row in rows)
    assert len(numbers) == len(set(numbers)), "two batches would share their random numbers"
    assert set(together) == set(range(23))
    if shuffle:
        assert {len(rows) for rows in seen} == {6}
    else:
        assert together == list(range(23))


def test_lightning_sets_the_epoch_so_that_a_resumed_run_sees_the_same_batches(digits: Digits, tmp_path: Path) -> None:
    import lightning

    class Recorder(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.orders: dict[int, list[int]] = {}

        def training_step(self, batch: dict[str, Tensor], number: int) -> Tensor:
            self.orders.setdefault(self.current_epoch, []).extend(batch["index"].tolist())
            return self.weight * 0

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def train(epochs: int, resume: Path | None = None) -> Recorder:
        module = Recorder()
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=digits, ckpt_path=resume, weights_only=False)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module

    whole = train(3)
    train(1)
    resumed = train(3, resume=tmp_path / "1.ckpt")
    assert resumed.orders == {1: whole.orders[1], 2: whole.orders[2]}
    assert whole.orders[1] != whole.orders[2]


# --- evaluation sets ----------------------------------------------------------------------------------------------------


def test_evaluation_sets_start_clean_and_keep_rows_and_labels_in_order(digits: Digits) -> None:
    targets = digits.split("test").targets
    seen = []
    for evaluation in digits.evaluation_sets(severities=(1, 5)):
        rows = gather(evaluation.loader)
        seen.append((evaluation.shift, evaluation.severity))
        assert torch.equal(rows["index"], torch.arange(len(targets)))
        assert torch.equal(rows["target"], targets)
        assert rows["input"].shape == (len(targets), 1, 8, 8)
        assert rows["input"].dtype == torch.float32
    assert seen[0] == ("clean", 0)
    assert seen[1:] == [(shift, severity) for shift in digits.default_shifts for severity in (1, 5)]


def test_shifted_sets_do_not_depend_on_batch_size_or_on_what_was_built_before(digits: Digits) -> None:
    sets = list(digits.evaluation_sets(("gaussian_noise", "rotation"), (2,)))
    alone = list(Digits(batch_size=7).evaluation_sets(("rotation",), (2,)))
    assert torch.equal(gather(sets[2].loader)["input"], gather(alone[1].loader)["input"])


@pytest.mark.parametrize("shift", Digits.default_shifts)
def test_each_severity_costs_a_nearest_neighbour_accuracy_on_digits(digits: Digits, shift: str) -> None:
    train = gather(digits.train_evaluation_dataloader())
    model = KNeighborsClassifier(1).fit(train["input"].flatten(1), train["target"])
    accuracies = []
    for evaluation in digits.evaluation_sets((shift,), (1, 3, 5)):
        rows = gather(evaluation.loader)
        accuracies.append(model.score(rows["input"].flatten(1), rows["target"]))
    assert accuracies[0] > 0.95
    assert accuracies[1:] == sorted(accuracies[1:], reverse=True)
    assert accuracies[3] < 0.8


def test_evaluation_sets_reject_unknown_shifts_and_severities_before_building_any(digits: Digits) -> None:
    with pytest.raises(InvalidArgumentError, match=r"shifts of Digits must be among .*got \['snow'\]"):
        digits.evaluation_sets(("rotation", "snow"))
    with pytest.raises(InvalidArgumentError, match=r"severities must lie in 1\.\.5; got \[0\]"):
        digits.evaluation_sets(severities=(0, 1))


def test_cifar_evaluation_sets_are_aligned_and_rounded_to_bytes(cifar: CIFAR10H) -> None:
    clean, *shifted = list(cifar.evaluation_sets(severities=(5,)))
    reference = gather(clean.loader)
    assert [evaluation.shift for evaluation in shifted] == list(cifar.default_shifts)
    for evaluation in shifted:
        rows = gather(evaluation.loader)
        assert torch.equal(rows["target"], reference["target"])
        assert torch.equal(rows["index"], reference["index"])
        assert evaluation.loader.dataset.inputs.dtype == torch.uint8
        assert 0.01 < (rows["input"] - reference["input"]).square().mean().sqrt() < 0.3


# --- subsets ------------------------------------------------------------------------------------------------------------


def test_hard_digits_are_those_a_nearest_neighbour_vote_gets_wrong(digits: Digits) -> None:
    subsets = digits.subsets()
    assert {name: int(mask.sum()) for name, mask in subsets.items()} == {"overall": 629, "hard": 92, "easy": 537}
    train, test = digits.split("train"), digits.split("test")
    model = KNeighborsClassifier(15).fit(train.inputs.flatten(1), train.targets)
    wrong = torch.from_numpy(model.predict(test.inputs.flatten(1))) != test.targets
    assert wrong[subsets["hard"]].double().mean() > 0.2
    assert not wrong[subsets["easy"]].any()


def test_human_agreement_splits_the_first_cifar_test_images_as_counted_by_hand(cifar: CIFAR10H) -> None:
    probs = cifar.human_probs()
    subsets = cifar.subsets()
    largest = np.array([max(row) for row in probs.tolist()])
    assert subsets["hard"].tolist() == (largest < 0.7 - 1e-6).tolist()
    assert subsets["easy"].tolist() == (largest > 0.9 + 1e-6).tolist()
    assert subsets["overall"].all()
    assert not (subsets["hard"] & subsets["easy"]).any()


def test_the_whole_test_set_has_the_documented_numbers_of_hard_and_easy_images(cifar: CIFAR10H) -> None:
    data = CIFAR10H()
    path = next(folder for folder in candidate_folders("cifar10h") if (folder / "test.parquet").is_file())
    images, labels = data._read("test")
    data.splits = {"test": Split(images, labels)}
    assert {name: int(mask.sum()) for name, mask in data.subsets().items()} == {
        "overall": 10000,
        "hard": 327,
        "easy": 8721,
    }
    published = torch.from_numpy(np.load(path / "cifar10h-probs.npy")).float()
    torch.testing.assert_close(data.human_probs(), published)


def test_a_data_set_without_hard_rows_still_has_an_overall_mask() -> None:
    class Plain(ClassificationData):
        name, class_names, input_shape = "plain", ("a", "b"), (1,)

        def load(self) -> dict[str, Split]:
            return {"test": Split(torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64))}

    assert Plain().subsets()["overall"].tolist() == [True] * 3
    with pytest.raises(InvalidArgumentError, match="shifts of plain"):
        Plain().evaluation_sets(("rotation",))


# --- CIFAR files --------------------------------------------------------------------------------------------------------


def write_cifar(folder: Path, labels: list[int], parts: tuple[str, ...] = ("train", "test"), data: str = "") -> None:
    """Files in the hub's schema: uniform images whose brightness is their label."""
    import pyarrow
    import pyarrow.parquet

    (folder / data).mkdir(parents=True, exist_ok=True)
    images = []
    for label in labels:
        file = io.BytesIO()
        Image.new("RGB", (32, 32), (20 * label,) * 3).save(file, "PNG")
        images.append({"bytes": file.getvalue(), "path": None})
    schema = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = pyarrow.table({"img": pyarrow.array(images, schema), "label": pyarrow.array(labels, pyarrow.int64())})
    for part in parts:
        name = f"{part}-00000-of-00001.parquet" if data else f"{part}.parquet"
        pyarrow.parquet.write_table(table, folder / data / name)


LABELS = list(range(10)) * 4


def write_counts(folder: Path, labels: list[int]) -> None:
    np.save(folder / "cifar10h-counts.npy", 50 * np.eye(10, dtype=np.int64)[labels])


def test_a_folder_in_the_hubs_schema_is_read(tmp_path: Path) -> None:
    write_cifar(tmp_path, LABELS)
    write_counts(tmp_path, LABELS)
    data = CIFAR10H(data_dir=str(tmp_path), val_fraction=0.25)
    assert [len(data.split(part)) for part in ("train", "val", "test")] == [30, 10, 40]
    test = gather(data.test_dataloader())
    torch.testing.assert_close(test["input"].mean(dim=(1, 2, 3)) * 255 / 20, test["target"].float())
    assert data.subsets()["easy"].all()


def test_the_environment_variable_may_name_the_folder_or_its_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar(tmp_path / "cifar10h", LABELS)
    for root in (tmp_path, tmp_path / "cifar10h"):
        monkeypatch.setenv("MOE_POSTERIOR_DATA", str(root))
        assert len(CIFAR10H().split("test")) == 40


def test_images_absent_from_the_folder_come_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path / "hub", LABELS, data="data")
    (tmp_path / "votes").mkdir()
    write_counts(tmp_path / "votes", LABELS)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")  # leaves the user's cache alone
    data = CIFAR10H(data_dir=str(tmp_path / "votes"), hub_name=str(tmp_path / "hub"), limit=20)
    test = gather(data.test_dataloader())
    torch.testing.assert_close(test["input"].mean(dim=(1, 2, 3)) * 255 / 20, test["target"].float())
    assert len(test["target"]) == 20
    assert data.human_probs().shape == (20, 10)


def test_images_that_are_nowhere_name_every_place_and_what_to_put_there(tmp_path: Path) -> None:
    data = CIFAR10H(data_dir=str(tmp_path), hub_name=str(tmp_path / "no_such_hub_folder"))
    with pytest.raises(MissingDataError) as caught:
        data.setup()
    for part in (str(tmp_path / "train.parquet"), "no_such_hub_folder", "uoft-cs/cifar10", "MOE_POSTERIOR_DATA"):
        assert part in str(caught.value)


def test_missing_votes_say_where_they_live_and_training_works_without_them(tmp_path: Path) -> None:
    write_cifar(tmp_path, LABELS)
    data = CIFAR10H(data_dir=str(tmp_path))
    assert next(iter(data.train_dataloader()))["input"].shape[1:] == (3, 32, 32)
    with pytest.raises(MissingDataError, match=r"cifar10h-counts\.npy.*jcpeterson/cifar-10h"):
        data.subsets()


def test_votes_for_other_rows_are_rejected(tmp_path: Path) -> None:
    write_cifar(tmp_path, LABELS)
    write_counts(tmp_path, LABELS[1:] + LABELS[:1])
    with pytest.raises(InvalidArgumentError, match=r"belong to the test images.*got 0\.0%"):
        CIFAR10H(data_dir=str(tmp_path)).human_probs()


def test_votes_for_too_few_rows_are_rejected(tmp_path: Path) -> None:
    write_cifar(tmp_path, LABELS)
    write_counts(tmp_path, LABELS[:20])
    with pytest.raises(InvalidArgumentError, match=r"must be \(40, 10\); got \(20, 10\)"):
        CIFAR10H(data_dir=str(tmp_path)).human_probs()


# --- arguments ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"val_fraction": 0.0}, "val_fraction"),
        ({"train_fraction": 1.5}, "train_fraction"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"shifts": ("snow",)}, r"shifts must be among .*got \['snow'\]"),
    ],
)
def test_cifar_rejects_arguments_out_of_range(arguments: dict, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        CIFAR10H(**arguments)


def test_digits_reject_fractions_that_leave_nothing_to_train_on() -> None:
    with pytest.raises(InvalidArgumentError, match=r"got 0\.5 and 0\.5"):
        Digits(val_fraction=0.5, test_fraction=0.5)


def test_a_batch_size_of_zero_is_rejected(digits: Digits) -> None:
    with pytest.raises(InvalidArgumentError, match="batch_size must be at least 1; got 0"):
        EpochBatches(digits.split("test"), batch_size=0, shuffle=False, seed=0)


def test_a_split_rejects_targets_of_another_length() -> None:
    with pytest.raises(InvalidArgumentError, match="one entry per input row, 3; got 2"):
        Split(torch.zeros(3, 1), torch.zeros(2, dtype=torch.int64))
