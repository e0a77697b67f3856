"""Online comments that may be toxic, and the identities they mention: CivilComments, and a smaller set in the same schema.

Dimensions: N comments, G = 8 identities, L tokens, D entries of an embedding.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe_posterior.errors import InvalidArgumentError, MissingDataError, MissingDependencyError
from moe_posterior.files.reading import decoding, one_line
from moe_posterior.training.data.base import ClassificationData, Split, candidate_folders, generator_for
from moe_posterior.training.data.features import fit_projection

__all__ = ["CAD", "CivilComments"]

IDENTITIES = ("male", "female", "LGBTQ", "christian", "muslim", "other_religions", "black", "white")
COLUMNS = ("id", "comment_text", "split", "toxicity", *IDENTITIES, "identity_any")
THRESHOLD = 0.5  # of the share of annotators, for toxicity and for identities
ROWS_SEED = 42  # the training rows are the same ones whatever the seed of a run
PARTS = ("train", "val", "test")


class Comments(NamedTuple):
    """The comments of one split."""

    ids: list[str]
    texts: list[str]
    targets: Tensor  # (N,) int64
    identities: Tensor  # (N, 8) bool
    any_identity: Tensor  # (N,) bool


class CivilComments(ClassificationData):
    """WILDS CivilComments: is a comment toxic, and is the model as good on comments that mention an identity?

    Reads `all_data_with_identities.csv` of WILDS: columns `id, comment_text, split` (train, val or test), `toxicity`, the eight
    identities and `identity_any`, each the share of annotators who said so; one half or more counts. Further columns are left unread.
    The file is looked for in `root`; if that is not given, in the environment variable MOE_POSTERIOR_DATA (its subfolder, then
    itself); if that is not set, in `../shared/data` (subfolder `civilcomments`, or `comments` for CAD).

    Hard test rows are those that mention any identity; each identity is a subset as well. Batches carry "group", 1 where any identity
    is mentioned. Inputs are token numbers for a `TextEncoder`, or embeddings computed before.

    Args:
        root: folder of the files; None looks in the places above.
        inputs: "tokens", or "embeddings", read from `embeddings_file`.
        tokenizer: name on the hub, or folder, of any tokenizer of `transformers`; it must be the encoder's own.
        max_length: L; longer comments are cut off, shorter ones padded.
        embeddings_file: .npz with arrays `embedding` (M, D) and `id` (M,) in any order; rows are found by their id.
        standardise: embeddings to zero mean and unit variance over the training rows.
        train_rows: training rows to use, drawn with a fixed seed; None uses all (269,038 in WILDS).
        batch_size: rows of a batch.
        seed: of the order of training rows.
        hub_name: a data set that `datasets.load_dataset` reads, in the same columns; None (default) reads the file.

    Shapes: input (N, L) int32, or (N, D) float32.

    Raises:
        MissingDataError: the file, the embeddings or the tokenizer are not found.
        InvalidArgumentError: a column, a split or an embedding is missing, or an argument is out of range.

    Source: Koh et al., *WILDS*, 2021; Borkan et al., *Nuanced Metrics for Measuring Unintended Bias*, 2019; 50,000 training
    rows and 128 tokens as in *Toward Calibrated Mixture-of-Experts Under Distribution Shift*, 2026.
    """

    name = "CivilComments"
    class_names = ("not toxic", "toxic")
    group_names = ("no identity", "any identity")
    membership_names = IDENTITIES
    test_shift = None  # a random part of the same comments; what may differ are the groups
    folder_name = "civilcomments"
    file_name = "all_data_with_identities.csv"
    advice = "of WILDS (civilcomments_v1.0, wilds.stanford.edu)"

    def __init__(
        self,
        root: str | None = None,
        inputs: str = "tokens",
        tokenizer: str = "distilbert-base-uncased",
        max_length: int = 128,
        embeddings_file: str = "embeddings_minilm.npz",
        standardise: bool = False,
        train_rows: int | None = 50_000,
        batch_size: int = 128,
        seed: int = 42,
        hub_name: str | None = None,
    ) -> None:
        if inputs not in ("tokens", "embeddings"):
            raise InvalidArgumentError(f"inputs must be one of ('tokens', 'embeddings'); got {inputs!r}")
        for argument, value in (("max_length", max_length), ("train_rows", train_rows)):
            if value is not None and value < 1:
                raise InvalidArgumentError(f"{argument} must be at least 1; got {value}")
        super().__init__(batch_size, seed)
        self.root, self.inputs = root, inputs
        self.tokenizer, self.max_length = tokenizer, max_length
        self.embeddings_file, self.standardise = embeddings_file, standardise
        self.train_rows, self.hub_name = train_rows, hub_name
        self._identities: dict[str, Tensor] = {}

    def load(self) -> Mapping[str, Split]:
        """The splits of the file; the training rows are a draw from its own.

        Raises:
            MissingDataError: a file is not found. InvalidArgumentError: a file lacks a required part.
        """
        if self.hub_name is None:
            origin = str(self._find(self.file_name, self.advice))
            table = _read_table(Path(origin))
        else:
            origin, table = self.hub_name, _read_hub(self.hub_name)
        comments = {part: _take(table, self._numbers(table["split"], part, origin)) for part in PARTS}
        inputs = self._embed(comments) if self.inputs == "embeddings" else self._tokenize(comments)
        self.input_shape = tuple(inputs["train"].shape[1:])
        self._identities = {part: rows.identities for part, rows in comments.items()}
        return {
            part: Split(inputs[part], rows.targets, groups=rows.any_identity.long()) for part, rows in comments.items()
        }

    def groups(self, part: str) -> Tensor:  # (n, 8) bool
        """Which of the eight identities each row of a split mentions."""
        self.setup()
        return self._identities[part]

    def subsets(self) -> dict[str, Tensor]:
        """Masks over the test rows: overall, hard (any identity), and one for each identity."""
        identities = self.groups("test")
        hard = {"hard": self._any_identity("test")}
        return {**super().subsets(), **hard, **{name: identities[:, i] for i, name in enumerate(IDENTITIES)}}

    def _any_identity(self, part: str) -> Tensor:
        groups = self.split(part).groups
        assert groups is not None
        return groups.bool()

    def source_files(self) -> list[Path]:
        """The files the rows are read from."""
        names = [self.file_name] if self.hub_name is None else []
        names += [self.embeddings_file] if self.inputs == "embeddings" else []
        return [self._find(name, self.advice) for name in names]

    def _find(self, file: str, advice: str) -> Path:
        folders = candidate_folders(self.folder_name, self.root)
        for folder in folders:
            if (folder / file).is_file():
                return folder / file
        places = ", ".join(str(folder / file) for folder in folders)
        raise MissingDataError(
            f"{file} of {self.name} is not at {places}; put {file} {advice} there, or name its folder by root or MOE_POSTERIOR_DATA"
        )

    def _numbers(self, splits: np.ndarray, part: str, origin: str) -> np.ndarray:  # (N,) -> (n,) int64
        rows = np.flatnonzero(splits == part)
        if not len(rows):
            raise InvalidArgumentError(f"split of {origin} must be train, val or test; got no {part} rows")
        if part == "train" and self.train_rows is not None and self.train_rows < len(rows):
            drawn = torch.randperm(len(rows), generator=generator_for("train_rows", ROWS_SEED))[: self.train_rows]
            rows = rows[drawn.sort().values.numpy()]
        return rows

    def _embed(self, comments: Mapping[str, Comments]) -> dict[str, Tensor]:
        path = self._find(self.embeddings_file, "(arrays embedding and id)")
        with decoding(path, "a file of embeddings"), np.load(path, allow_pickle=False) as stored:
            embeddings, ids = torch.from_numpy(stored["embedding"]), stored["id"].astype(str).tolist()
        places = {name: row for row, name in enumerate(ids)}
        if len(places) != len(embeddings) or len(ids) != len(embeddings):
            raise InvalidArgumentError(
                f"{path} must hold one distinct id per row; got {len(places)} for {len(embeddings)}"
            )
        absent = [name for rows in comments.values() for name in rows.ids if name not in places]
        if absent:
            raise InvalidArgumentError(
                f"{path} must hold every comment; got none for {len(absent)}, such as {absent[0]!r}"
            )
        found = {part: embeddings[[places[name] for name in rows.ids]] for part, rows in comments.items()}
        fitted = fit_projection(found["train"], self.standardise)
        return {part: fitted(rows) for part, rows in found.items()}

    def _tokenize(self, comments: Mapping[str, Comments]) -> dict[str, Tensor]:
        try:
            from transformers import AutoTokenizer
        except ModuleNotFoundError as error:
            raise MissingDependencyError("transformers", "hf") from error
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.tokenizer)
        except OSError as error:
            raise MissingDataError(
                f"the tokenizer {self.tokenizer!r} is neither a folder nor to be had from the hub ({error}); name a folder that holds "
                "one, allow downloads, or use inputs='embeddings'"
            ) from error
        settings: dict[str, Any] = {"max_length": self.max_length, "padding": "max_length", "truncation": True}
        return {
            part: torch.tensor(tokenizer(rows.texts, **settings)["input_ids"], dtype=torch.int32)
            for part, rows in comments.items()
        }


class CAD(CivilComments):
    """The Contextual Abuse Dataset in the schema of CivilComments; a stand-in, not the same data.

    Comments are from Reddit, "toxic" is any label of abuse (18.4 % of rows), and a group is "mentions one of a list of keywords",
    not what annotators saw. Reads `cad_reddit_wilds_schema.parquet`. Arguments are those of `CivilComments`; all 13,584 training rows
    are used by default, since there are fewer than 50,000.

    Source: Vidgen et al., *Introducing CAD: the Contextual Abuse Dataset*, NAACL 2021.
    """

    name = "CAD (keyword groups)"
    class_names = ("not abusive", "abusive")
    folder_name = "comments"
    file_name = "cad_reddit_wilds_schema.parquet"
    advice = "(the columns of WILDS CivilComments)"


def _read_table(path: Path) -> dict[str, np.ndarray]:
    """The columns we need, as arrays.

    Raises:
        InvalidArgumentError: a column is missing.
    """
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    try:
        if path.suffix == ".csv":
            strings = {name: pyarrow.string() for name in COLUMNS[:3]}  # a comment "null" or an id 0012 is text
            shares = {name: pyarrow.float64() for name in COLUMNS[3:]}
            table = pyarrow.csv.read_csv(
                path,
                parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
                convert_options=pyarrow.csv.ConvertOptions(
                    column_types=strings | shares, include_columns=list(COLUMNS)
                ),
            )
        else:
            table = pyarrow.parquet.read_table(path, columns=list(COLUMNS))
    except (pyarrow.ArrowInvalid, pyarrow.ArrowKeyError) as error:
        raise InvalidArgumentError(f"{path} must have the columns {COLUMNS}; got {one_line(error)}") from error
    if absent := [name for name in COLUMNS if name not in table.column_names]:
        raise InvalidArgumentError(f"{path} must have the columns {COLUMNS}; got none named {absent}")
    return {name: table[name].to_numpy() for name in COLUMNS}


def _read_hub(name: str) -> dict[str, np.ndarray]:
    """The same columns of a data set that `datasets.load_dataset` reads: a name on the hub, or a folder in any layout it knows.

    Raises:
        MissingDataError: it cannot be had. InvalidArgumentError: a column is missing.
    """
    import datasets

    try:
        rows = datasets.load_dataset(name, split="train")
    except (OSError, ValueError) as error:  # offline, unreachable, unknown, or without this split
        raise MissingDataError(
            f"the comments are not to be had as {name!r} ({error}); allow downloads, or give root"
        ) from error
    if absent := [column for column in COLUMNS if column not in rows.column_names]:
        raise InvalidArgumentError(f"{name} must have the columns {COLUMNS}; got none named {absent}")
    return {column: np.asarray(rows[column]) for column in COLUMNS}


def _take(table: Mapping[str, np.ndarray], rows: np.ndarray) -> Comments:
    identities = np.stack([table[name][rows] >= THRESHOLD for name in IDENTITIES], axis=1)
    return Comments(
        ids=table["id"][rows].astype(str).tolist(),
        texts=[text or "" for text in table["comment_text"][rows].tolist()],
        targets=torch.from_numpy((table["toxicity"][rows] >= THRESHOLD).astype(np.int64)),
        identities=torch.from_numpy(identities),
        any_identity=torch.from_numpy(table["identity_any"][rows] >= THRESHOLD),
    )
