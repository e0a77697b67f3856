"""PACS: leave one domain out from every layout of the files, and projections fitted on training rows alone."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from moe_posterior.errors import InvalidArgumentError, MissingDataError
from moe_posterior.training.data import PACS
from moe_posterior.training.data.base import candidate_folders
from moe_posterior.training.data.features import fit_projection

SIDE = 12
COPIES = 5  # images of each domain and class
DOMAINS = ("art_painting", "cartoon", "photo", "sketch")
CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
PARTS = ("train", "val", "test")
ROWS = [(domain, label, copy) for domain in range(4) for label in range(7) for copy in range(COPIES)]


def png(domain: int, label: int, copy: int) -> bytes:
    """An image whose red channel tells its domain, green its class and blue its copy."""
    file = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), (50 * domain, 30 * label, 40 * copy)).save(file, "PNG")
    return file.getvalue()


def decoded(images: torch.Tensor) -> list[tuple[int, int, int]]:
    corner = images[:, :, 0, 0].tolist()
    return [(red // 50, green // 30, blue // 40) for red, green, blue in corner]


def write_parquet(path: Path, domains: tuple[str, ...] = DOMAINS) -> None:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    struct = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    columns = {
        "image": pyarrow.array([{"bytes": png(*row), "path": None} for row in ROWS], struct),
        "domain": [domains[row[0]] for row in ROWS],
        "label": pyarrow.array([row[1] for row in ROWS], pyarrow.int64()),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def write_folders(root: Path) -> None:
    for domain, label, copy in ROWS:
        folder = root / DOMAINS[domain] / CLASSES[label]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"pic_{copy}.png").write_bytes(png(domain, label, copy))


def write_features(root: Path, width: int = 6) -> np.ndarray:
    features = np.random.default_rng(0).normal(size=(len(ROWS), width)).astype(np.float16)
    domain, label = (np.array([row[i] for row in ROWS], dtype=np.int8) for i in (0, 1))
    np.savez(root / "features_efficientnet_lite0.npz", features=features, domain=domain, label=label)
    return features


def layout(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """Files in one of the layouts, and the arguments that read them."""
    if name == "parquet":
        write_parquet(root / "pacs.parquet")
        return {"root": str(root)}
    if name == "folders":
        write_folders(root)
        return {"root": str(root)}
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", root / "cache")  # leaves the user's cache alone
    write_parquet(root / "hub" / "data" / "train-00000-of-00001.parquet")
    return {"root": str(root / "nothing_here"), "hub_name": str(root / "hub")}


@pytest.mark.parametrize("name", ["parquet", "folders", "hub"])
@pytest.mark.parametrize("held_out", ["photo", "sketch"])
def test_every_layout_gives_the_same_disjoint_splits_without_a_test_row_in_training(
    name: str, held_out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = PACS(held_out=held_out, inputs="pixels", size=SIDE, val_fraction=0.2, **layout(name, tmp_path, monkeypatch))
    seen = {part: decoded(data.split(part).inputs) for part in PARTS}
    target = DOMAINS.index(held_out)
    assert sorted(seen["test"]) == [row for row in ROWS if row[0] == target]
    assert sorted(seen["train"] + seen["val"]) == [row for row in ROWS if row[0] != target]
    # Stratified: one of five copies of each domain and class.
    assert sorted({row[:2] for row in seen["val"]}) == sorted(row[:2] for row in seen["val"])
    assert len(seen["val"]) == 21
    for part in PARTS:
        assert data.domains(part).tolist() == [row[0] for row in seen[part]]
        assert data.split(part).targets.tolist() == [row[1] for row in seen[part]]


def test_pixels_are_resized_and_scaled_and_only_training_batches_are_augmented(tmp_path: Path) -> None:
    write_parquet(tmp_path / "pacs.parquet")
    data = PACS(str(tmp_path), inputs="pixels", size=16)
    assert data.input_shape == (3, 16, 16) == tuple(data.split("train").inputs.shape[1:])
    for loader, augmented in ((data.val_dataloader(), False), (data.train_dataloader(), True)):
        batch = next(iter(loader))
        part = data.split("train" if augmented else "val")
        stored = part.inputs[batch["index"]].float() / 255
        assert torch.equal(batch["input"], stored) != augmented
        assert torch.equal(batch["group"], part.groups[batch["index"]])
    assert torch.equal(
        next(iter(data.train_evaluation_dataloader()))["input"], data.split("train").inputs.float() / 255
    )


def test_features_split_like_pixels_and_the_seed_alone_decides_how(tmp_path: Path) -> None:
    write_parquet(tmp_path / "pacs.parquet")
    features = torch.from_numpy(write_features(tmp_path)).float()
    numbers = {row: number for number, row in enumerate(ROWS)}

    def rows(seed: int) -> dict[str, list[int]]:
        pixels = PACS(str(tmp_path), inputs="pixels", size=SIDE, seed=seed)
        plain = PACS(str(tmp_path), standardise=False, seed=seed)
        found = {part: [numbers[row] for row in decoded(pixels.split(part).inputs)] for part in PARTS}
        for part in PARTS:
            assert torch.equal(plain.split(part).inputs, features[found[part]])
            assert plain.split(part).inputs.dtype == torch.float32
        return found

    first = rows(42)
    assert first == rows(42)
    assert first["val"] != rows(43)["val"]
    assert first["test"] == rows(43)["test"]


@pytest.mark.parametrize(("standardise", "project"), [(True, None), (False, 3), (True, 3)])
def test_projection_is_that_of_scikit_learn_on_training_rows_alone(
    standardise: bool, project: int | None, tmp_path: Path
) -> None:
    write_features(tmp_path)
    raw = PACS(str(tmp_path), standardise=False)
    data = PACS(str(tmp_path), standardise=standardise, project=project)
    rows = {part: raw.split(part).inputs.double().numpy() for part in PARTS}
    if standardise:
        scaler = StandardScaler().fit(rows["train"])
        rows = {part: scaler.transform(values) for part, values in rows.items()}
    if project is not None:
        pca = PCA(project, svd_solver="full").fit(rows["train"])
        signs = np.sign(pca.components_[np.arange(project), np.abs(pca.components_).argmax(axis=1)])
        rows = {part: pca.transform(values) * signs for part, values in rows.items()}
    for part in PARTS:
        np.testing.assert_allclose(data.split(part).inputs.numpy(), rows[part], atol=1e-5)
    assert data.input_shape == (project or 6,)


@given(st.integers(1, 5), st.integers(0, 1000))
def test_axes_are_orthonormal_signed_and_of_falling_variance(project: int, seed: int) -> None:
    rows = torch.randn(20, 5, generator=torch.Generator().manual_seed(seed)).half()
    fitted = fit_projection(rows, standardise=False, project=project)
    assert fitted.axes is not None
    torch.testing.assert_close(fitted.axes.T @ fitted.axes, torch.eye(project, dtype=torch.float64))
    variance = fitted(rows).var(dim=0)
    assert torch.all(variance[:-1] >= variance[1:] - 1e-4)
    assert torch.all(fitted.axes.gather(0, fitted.axes.abs().argmax(dim=0, keepdim=True)) > 0)


def test_constant_features_stay_finite() -> None:
    assert fit_projection(torch.ones(4, 2))(torch.ones(1, 2)).tolist() == [[0.0, 0.0]]


def test_limit_keeps_the_first_rows_of_each_domain_and_class(tmp_path: Path) -> None:
    write_parquet(tmp_path / "pacs.parquet")
    data = PACS(str(tmp_path), inputs="pixels", size=SIDE, limit=2, val_fraction=0.5)
    assert [len(data.split(part)) for part in PARTS] == [21, 21, 14]
    assert {row[2] for part in PARTS for row in decoded(data.split(part).inputs)} == {0, 1}


def test_every_test_row_is_hard(tmp_path: Path) -> None:
    write_features(tmp_path)
    assert {name: int(mask.sum()) for name, mask in PACS(str(tmp_path)).subsets().items()} == {
        "overall": 35,
        "hard": 35,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": "features"}, r"features_efficientnet_lite0\.npz.*MOE_POSTERIOR_DATA.*moe-posterior cache"),
        ({"inputs": "pixels", "hub_name": None}, r"pacs\.parquet.*DOMAIN/LABEL.*MOE_POSTERIOR_DATA"),
        ({"inputs": "pixels", "hub_name": "no_such_folder/at/all"}, r"no_such_folder.*pacs\.parquet"),
    ],
)
def test_files_that_are_nowhere_say_what_to_put_where(arguments: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match=message) as caught:
        PACS(str(tmp_path), **arguments).setup()
    assert str(tmp_path) in str(caught.value)


def test_an_incomplete_folder_names_the_missing_domains(tmp_path: Path) -> None:
    write_folders(tmp_path)
    shutil.rmtree(tmp_path / "cartoon")
    with pytest.raises(MissingDataError, match=r"\['cartoon'\] are missing"):
        PACS(str(tmp_path), inputs="pixels").setup()
    (tmp_path / "cartoon").mkdir()
    with pytest.raises(MissingDataError, match=r"none in \['cartoon'\]"):
        PACS(str(tmp_path), inputs="pixels").setup()


def test_unknown_domains_in_the_file_are_rejected(tmp_path: Path) -> None:
    write_parquet(tmp_path / "pacs.parquet", ("art_painting", "cartoon", "photo", "quickdraw"))
    with pytest.raises(InvalidArgumentError, match=r"domains must be among .*got \['quickdraw'\]"):
        PACS(str(tmp_path), inputs="pixels").setup()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"held_out": "clipart"}, "held_out must be one of"),
        ({"inputs": "sound"}, "inputs must be one of"),
        ({"val_fraction": 1.0}, "val_fraction must lie in"),
        ({"size": 0}, "size must be at least 1"),
        ({"inputs": "pixels", "project": 8}, "project must be None for pixels"),
    ],
)
def test_arguments_out_of_range_are_rejected(arguments: dict, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        PACS(**arguments)


def test_more_axes_than_features_are_rejected(tmp_path: Path) -> None:
    write_features(tmp_path)
    with pytest.raises(InvalidArgumentError, match=r"project must lie in 1\.\.6 .*got 7"):
        PACS(str(tmp_path), project=7).setup()


def require(file: str) -> None:
    folders = candidate_folders("pacs")
    if not any((folder / file).is_file() for folder in folders):
        pytest.skip(f"{file} is in none of {[str(folder) for folder in folders]}")


@pytest.mark.parametrize(("held_out", "count"), list(zip(DOMAINS, (2048, 2344, 1670, 3929), strict=True)))
def test_the_published_domains_have_their_published_sizes(held_out: str, count: int) -> None:
    require("features_efficientnet_lite0.npz")
    data = PACS(held_out=held_out)
    sizes = [len(data.split(part)) for part in PARTS]
    assert sizes[2] == count
    assert sum(sizes) == 9991
    assert set(data.domains("train").tolist()) == set(range(4)) - {DOMAINS.index(held_out)}


def test_real_images_are_read_with_the_labels_of_the_features() -> None:
    require("pacs.parquet")
    require("features_efficientnet_lite0.npz")
    pixels = PACS(inputs="pixels", size=32, limit=3, val_fraction=0.34)
    features = PACS(limit=3, val_fraction=0.34)
    for part in PARTS:
        assert torch.equal(pixels.split(part).targets, features.split(part).targets)
    # Sketches are black on white.
    brightness = [pixels.split(part).inputs.double().mean().item() for part in ("train", "test")]
    assert brightness[1] > 200 > brightness[0]
