"""CivilComments in the exact schema of WILDS, its stand-in CAD, and the encoder that reads the tokens of either."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_posterior.errors import InvalidArgumentError, MissingDataError
from moe_posterior.training.data import CAD, CivilComments
from moe_posterior.training.data.base import candidate_folders
from moe_posterior.training.text import TextEncoder

PARTS = ("train", "val", "test")
IDENTITIES = ("male", "female", "LGBTQ", "christian", "muslim", "other_religions", "black", "white")
# WILDS's file has an unnamed index and these columns, among others that we leave unread.
COLUMNS = ("", "id", "comment_text", "split", "created_date", "rating", "toxicity", "severe_toxicity", "identity_attack",
           *IDENTITIES, "asian_latino_etc", "disability_any", "identity_any", "num_identities")  # fmt: skip
COUNTS = {"train": 30, "val": 10, "test": 20}


def wilds_rows() -> list[dict]:
    """Comments with known shares; some sit exactly on the threshold or just below it."""
    rng = np.random.default_rng(0)
    shares = (0.0, 0.2, 0.4999, 0.5, 0.7, 1.0)
    rows = []
    for number, part in enumerate(rng.permutation([part for part, count in COUNTS.items() for _ in range(count)])):
        row = dict.fromkeys(COLUMNS, "0.0")
        row |= {
            "": str(number),
            "id": f"{1000 - number:06d}",
            "split": part,
            "created_date": "2017-01-05",
            "rating": "approved",
        }
        row["comment_text"] = f'comment {number}, "quoted"\nand a second line' if number % 3 else "null"
        row["toxicity"] = str(rng.choice(shares))
        drawn = rng.choice(shares, size=8, p=(0.6, 0.1, 0.1, 0.1, 0.05, 0.05))
        row |= {name: str(share) for name, share in zip(IDENTITIES, drawn, strict=True)}
        row["asian_latino_etc"] = str(rng.choice(shares))
        row["identity_any"] = str(max(*drawn, float(row["asian_latino_etc"])))
        rows.append(row)
    return rows


def write_csv(folder: Path, rows: list[dict]) -> None:
    with (folder / "all_data_with_identities.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def write_embeddings(folder: Path, rows: list[dict], seed: int = 1) -> dict[str, np.ndarray]:
    """Embeddings in another order than the comments."""
    rng = np.random.default_rng(seed)
    embeddings = {row["id"]: rng.normal(size=5).astype(np.float16) for row in rows}
    ids = rng.permutation(list(embeddings))
    np.savez(folder / "embeddings_minilm.npz", embedding=np.stack([embeddings[name] for name in ids]), id=ids)
    return embeddings


@pytest.fixture
def rows(tmp_path: Path) -> list[dict]:
    rows = wilds_rows()
    write_csv(tmp_path, rows)
    return rows


def of_part(rows: list[dict], part: str) -> list[dict]:
    return [row for row in rows if row["split"] == part]


def test_splits_labels_identities_and_embeddings_are_those_of_the_file(tmp_path: Path, rows: list[dict]) -> None:
    embeddings = write_embeddings(tmp_path, rows)
    data = CivilComments(str(tmp_path), inputs="embeddings")
    for part in PARTS:
        expected = of_part(rows, part)
        split = data.split(part)
        assert len(split) == COUNTS[part]
        assert split.targets.tolist() == [int(float(row["toxicity"]) >= 0.5) for row in expected]
        assert data.groups(part).tolist() == [[float(row[name]) >= 0.5 for name in IDENTITIES] for row in expected]
        assert split.groups.tolist() == [int(float(row["identity_any"]) >= 0.5) for row in expected]
        assert split.inputs.tolist() == [embeddings[row["id"]].astype(np.float32).tolist() for row in expected]
    assert data.input_shape == (5,)
    assert data.groups("train").dtype == torch.bool


def test_hard_rows_mention_any_identity_and_each_identity_is_a_subset(tmp_path: Path, rows: list[dict]) -> None:
    write_embeddings(tmp_path, rows)
    subsets = CivilComments(str(tmp_path), inputs="embeddings").subsets()
    assert list(subsets) == ["overall", "hard", *IDENTITIES]
    columns = {"hard": "identity_any", **{name: name for name in IDENTITIES}}
    for name, column in columns.items():
        assert subsets[name].tolist() == [float(row[column]) >= 0.5 for row in of_part(rows, "test")]
    # identity_any also counts identities that have no subset of their own.
    assert (subsets["hard"] & ~torch.stack([subsets[name] for name in IDENTITIES]).any(dim=0)).any()


def test_training_rows_are_a_fixed_draw_whatever_the_seed(tmp_path: Path, rows: list[dict]) -> None:
    write_embeddings(tmp_path, rows)

    def inputs(**arguments: int) -> torch.Tensor:
        return CivilComments(str(tmp_path), inputs="embeddings", **arguments).split("train").inputs

    drawn, everything = inputs(train_rows=12), inputs()
    assert torch.equal(drawn, inputs(train_rows=12, seed=7))
    assert len(drawn) == 12 < len(everything) == 30
    places = [(everything == row).all(dim=1).nonzero().item() for row in drawn]
    assert places == sorted(set(places))
    assert places != list(range(12))


def test_standardised_embeddings_have_unit_variance_over_training_rows_alone(tmp_path: Path, rows: list[dict]) -> None:
    write_embeddings(tmp_path, rows)
    data = CivilComments(str(tmp_path), inputs="embeddings", standardise=True)
    train, test = data.split("train").inputs, data.split("test").inputs
    torch.testing.assert_close(train.std(dim=0, unbiased=False), torch.ones(5))
    assert (test.mean(dim=0).abs() > 1e-3).all()


def tokenizer_in(folder: Path, words: list[str]) -> Path:
    """A word-level tokenizer with BERT's special tokens, saved where transformers finds it."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    core.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder)
    return folder


def test_tokens_are_cut_and_padded_and_a_comment_that_reads_null_is_text(tmp_path: Path, rows: list[dict]) -> None:
    folder = tokenizer_in(tmp_path / "tokenizer", ["comment", "null", "line"])
    data = CivilComments(str(tmp_path), tokenizer=str(folder), max_length=6)
    for part in PARTS:
        split = data.split(part)
        assert split.inputs.shape == (COUNTS[part], 6)
        assert split.inputs.dtype == torch.int32
        for row, tokens in zip(of_part(rows, part), split.inputs.tolist(), strict=True):
            if row["comment_text"] == "null":
                assert tokens == [2, 5, 3, 0, 0, 0]
            else:
                assert tokens[:2] + tokens[-1:] == [2, 4, 3]
    batch = next(iter(data.val_dataloader()))
    assert set(batch) == {"input", "target", "index", "group"}


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("model")
    config = transformers.DistilBertConfig(
        vocab_size=12, dim=8, n_layers=2, n_heads=2, hidden_dim=16, max_position_embeddings=16, initializer_range=0.5
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.DistilBertModel(config).save_pretrained(folder)
    return folder


def test_the_encoder_gives_the_first_tokens_vector_whatever_the_padding(tiny_model: Path) -> None:
    import transformers

    encoder = TextEncoder(str(tiny_model)).eval()
    assert encoder.out_features == 8
    reference = transformers.DistilBertModel.from_pretrained(tiny_model).eval()
    alone = torch.tensor([[2, 7, 5, 3]])
    expected = reference(input_ids=alone).last_hidden_state[:, 0]
    long = torch.tensor([[2, 4, 9, 5, 6, 3, 0, 0]])
    padded = torch.cat([torch.nn.functional.pad(alone, (0, 4)), long]).int()
    torch.testing.assert_close(encoder(padded)[:1], expected)
    torch.testing.assert_close(encoder(alone), expected)
    assert not torch.allclose(encoder(padded)[1:], expected, atol=1e-3)


def test_a_frozen_encoder_neither_drops_out_nor_learns_and_another_does_both(tiny_model: Path) -> None:
    tokens = torch.tensor([[2, 7, 5, 3]])
    frozen = TextEncoder(str(tiny_model), frozen=True).train()
    assert torch.equal(frozen(tokens), frozen(tokens))
    assert not any(weight.requires_grad for weight in frozen.parameters())
    assert frozen.training
    free = TextEncoder(str(tiny_model)).train()
    assert not torch.equal(free(tokens), free(tokens))
    free(tokens).sum().backward()
    assert all(weight.grad is not None for weight in free.encoder.transformer.parameters())


def test_the_encoder_names_what_it_cannot_read(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"tokens must be integers of shape \(N, L\); got torch.float32"):
        TextEncoder(str(tiny_model))(torch.zeros(2, 3))
    with pytest.raises(MissingDataError, match=r"the encoder .*no_model.* is neither a folder"):
        TextEncoder(str(tmp_path / "no_model"))


def test_files_that_are_nowhere_say_what_to_put_where(tmp_path: Path, rows: list[dict]) -> None:
    with pytest.raises(
        MissingDataError, match=r"embeddings_minilm\.npz of CivilComments is not at .*MOE_POSTERIOR_DATA"
    ):
        CivilComments(str(tmp_path), inputs="embeddings").setup()
    with pytest.raises(MissingDataError, match=r"the tokenizer .*no_tokenizer.* is neither a folder"):
        CivilComments(str(tmp_path), tokenizer=str(tmp_path / "no_tokenizer")).setup()
    with pytest.raises(MissingDataError, match=r"all_data_with_identities\.csv of CivilComments .* of WILDS"):
        CivilComments(str(tmp_path / "elsewhere")).setup()


def test_the_stand_in_never_takes_the_file_of_civilcomments_nor_its_name(tmp_path: Path, rows: list[dict]) -> None:
    with pytest.raises(MissingDataError, match=r"cad_reddit_wilds_schema\.parquet of CAD \(keyword groups\)"):
        CAD(str(tmp_path)).setup()
    assert CAD.name == "CAD (keyword groups)" != CivilComments.name


@pytest.mark.parametrize("column", ["identity_any", "LGBTQ", "split"])
def test_a_file_without_a_column_is_rejected(tmp_path: Path, rows: list[dict], column: str) -> None:
    write_csv(tmp_path, [{key: value for key, value in row.items() if key != column} for row in rows])
    with pytest.raises(InvalidArgumentError, match=rf"must have the columns .*{column}.*got .*{column}"):
        CivilComments(str(tmp_path)).setup()


def test_a_file_without_a_split_is_rejected(tmp_path: Path, rows: list[dict]) -> None:
    write_csv(tmp_path, [row for row in rows if row["split"] != "val"])
    with pytest.raises(InvalidArgumentError, match=r"split of .* must be train, val or test; got no val rows"):
        CivilComments(str(tmp_path)).setup()


def test_comments_without_an_embedding_are_counted(tmp_path: Path, rows: list[dict]) -> None:
    missing = of_part(rows, "test")[4]["id"]
    write_embeddings(tmp_path, [row for row in rows if row["id"] != missing])
    with pytest.raises(InvalidArgumentError, match=f"must hold every comment; got none for 1, such as '{missing}'"):
        CivilComments(str(tmp_path), inputs="embeddings").setup()


def test_ids_that_occur_twice_are_rejected(tmp_path: Path, rows: list[dict]) -> None:
    np.savez(tmp_path / "embeddings_minilm.npz", embedding=np.zeros((3, 2), np.float16), id=np.array(["a", "b", "a"]))
    with pytest.raises(InvalidArgumentError, match="one distinct id per row; got 2 for 3"):
        CivilComments(str(tmp_path), inputs="embeddings").setup()


@pytest.mark.parametrize("arguments", [{"inputs": "audio"}, {"train_rows": 0}, {"max_length": 0}])
def test_arguments_out_of_range_are_rejected(arguments: dict) -> None:
    with pytest.raises(InvalidArgumentError, match=f"{next(iter(arguments))} must be"):
        CivilComments(**arguments)


@pytest.fixture(scope="module")
def cad() -> CAD:
    folders = candidate_folders("comments")
    if not any((folder / CAD.file_name).is_file() for folder in folders):
        pytest.skip(f"{CAD.file_name} is in none of {[str(folder) for folder in folders]}")
    return CAD(inputs="embeddings")


def test_cad_has_its_documented_sizes_and_no_comment_in_two_splits(cad: CAD) -> None:
    import pyarrow.parquet

    assert [len(cad.split(part)) for part in PARTS] == [13584, 4526, 5307]
    labels = torch.cat([cad.split(part).targets for part in PARTS])
    assert round(labels.double().mean().item(), 3) == 0.184
    table = pyarrow.parquet.read_table(cad.source_files()[0], columns=["id", "split", "black"])
    ids = table["id"].to_pylist()
    assert len(set(ids)) == len(ids)
    black = [
        b >= 0.5
        for b, part in zip(table["black"].to_pylist(), table["split"].to_pylist(), strict=True)
        if part == "test"
    ]
    assert cad.subsets()["black"].tolist() == black


def test_a_linear_probe_on_cads_embeddings_beats_chance(cad: CAD) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    train, test = cad.split("train"), cad.split("test")
    probe = LogisticRegression(max_iter=200).fit(train.inputs.numpy(), train.targets.numpy())
    assert roc_auc_score(test.targets.numpy(), probe.predict_proba(test.inputs.numpy())[:, 1]) > 0.7


def test_a_data_set_of_the_hub_in_the_same_columns_is_read_alike(rows: list[dict], tmp_path: Path) -> None:
    import pyarrow.parquet

    write_embeddings(tmp_path, rows)
    texts = ("id", "comment_text", "split")
    columns = {name: [row[name] for row in rows] for name in texts}
    columns |= {name: [float(row[name]) for row in rows] for name in ("toxicity", *IDENTITIES, "identity_any")}
    hub = tmp_path / "hub"
    hub.mkdir()
    pyarrow.parquet.write_table(pyarrow.table(columns), hub / "train.parquet")
    options = {"root": str(tmp_path), "inputs": "embeddings"}
    from_file, from_hub = CivilComments(**options), CivilComments(**options, hub_name=str(hub))
    for part in PARTS:
        assert torch.equal(from_file.split(part).inputs, from_hub.split(part).inputs)
        assert torch.equal(from_file.split(part).targets, from_hub.split(part).targets)
        assert torch.equal(from_file.groups(part), from_hub.groups(part))


def test_a_hub_data_set_that_cannot_be_had_says_so(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match="are not to be had as"):
        CivilComments(root=str(tmp_path), hub_name=str(tmp_path / "nowhere")).split("train")
