"""Files of predictions, read piece by piece: Parquet, CSV, JSON lines, npz, and Hugging Face data sets on disk.

Every format becomes a stream of Arrow record batches. Only npz files are read whole, as numpy keeps them.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_posterior.errors import DamagedFileError, InvalidArgumentError, MissingDataError, MissingDependencyError
from moe_posterior.files.reading import decoding, read_json

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["SUFFIXES", "Source", "is_data_set", "open_source"]

SUFFIXES = (".parquet", ".csv", ".csv.gz", ".jsonl", ".jsonl.gz", ".ndjson", ".npz")
BATCH = 131_072  # rows of Parquet to decode at a time
BLOCK = 1 << 24  # bytes of text to parse at a time
WHAT = {
    ".csv": "a CSV table",
    ".json": "a file of JSON lines",
    ".npz": "an npz file of arrays",
    ".parquet": "a Parquet file",
}

Batches = Iterator["pa.RecordBatch"]
Wanted = Mapping[str, bool]  # column -> whether it is to hold numbers, and not names


@dataclass(frozen=True)
class Source:
    """One file, or a data set of several files, with its columns."""

    path: Path
    types: Mapping[str, "pa.DataType"]
    read: Callable[[Wanted], Batches]
    rows: int | None  # None: known only when it was read
    class_names: Sequence[str] | None  # of the labels, where the data set has them

    def batches(self, columns: Wanted) -> Batches:
        """The rows of some columns, in pieces; the mapping says of each column whether it is to hold numbers.

        Raises:
            DamagedFileError: the file is torn, or not what its name says.
        """
        with _decoding(self.path):
            yield from self.read(columns)


def open_source(path: Path) -> Source:
    """A file, or a folder that holds a Hugging Face data set.

    Raises:
        MissingDataError: there is none. DamagedFileError: it cannot be read as what its name says, or is empty.
        InvalidArgumentError: a name that says no known format, or columns of one name.
        MissingDependencyError: without pyarrow.
    """
    pyarrow()
    if not path.exists():
        raise MissingDataError(f"{path} is not there")
    kind: Callable[[Path], Source] = _of_data_set
    if not path.is_dir():
        name = path.name.removesuffix(".gz").lower()
        kinds = {".parquet": _of_parquet, ".csv": _of_csv, ".jsonl": _of_json, ".ndjson": _of_json, ".npz": _of_npz}
        known = next((ending for ending in kinds if name.endswith(ending)), None)
        if known is None:
            raise InvalidArgumentError(f"{path} must be one of {', '.join(SUFFIXES)}, or a folder; got {path.suffix!r}")
        kind = kinds[known]
    with _decoding(path):
        if path.is_file() and not path.stat().st_size:
            raise DamagedFileError(f"{path} is empty")
        return kind(path)


def is_data_set(folder: Path) -> bool:
    """Whether a folder is a data set as ``datasets`` saves it."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def pyarrow() -> Any:
    """The package.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise MissingDependencyError("pyarrow", "evaluate") from error
    return pyarrow


def _decoding(path: Path) -> AbstractContextManager[None]:
    name = path.name.removesuffix(".gz").lower()
    what = next((text for ending, text in WHAT.items() if ending in name), "a data set of Arrow files")
    return decoding(path, f"{what} that can be read")


def _of_parquet(path: Path) -> Source:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        types, rows = _types(path, file.schema_arrow), file.metadata.num_rows

    def read(columns: Wanted) -> Batches:
        with ParquetFile(path) as file:
            yield from file.iter_batches(BATCH, columns=list(columns))

    return Source(path, types, read, rows, _feature_names(_metadata(path)))


def _metadata(path: Path) -> Any:
    """What the ``datasets`` package wrote about the columns."""
    from pyarrow.parquet import read_schema

    found = (read_schema(path).metadata or {}).get(b"huggingface")
    return json.loads(found).get("info") if found else None


def _of_csv(path: Path) -> Source:
    from pyarrow import csv

    separator, point = _written(path)

    def opened(columns: Sequence[str] | None, types: Mapping[str, Any]) -> Any:
        return csv.open_csv(
            path,
            read_options=csv.ReadOptions(block_size=BLOCK, use_threads=True),
            parse_options=csv.ParseOptions(delimiter=separator),
            convert_options=csv.ConvertOptions(
                include_columns=columns,
                column_types=types,
                strings_can_be_null=True,
                null_values=[""],
                decimal_point=point,
            ),
        )

    with opened(None, {}) as reader:
        types = _types(path, reader.schema)

    def read(columns: Wanted) -> Batches:
        # What the first block shows may not hold for all rows: 1 may be followed by 0.5, or by a name.
        text = pyarrow().string()
        wide = {name: _widest(types[name]) if numeric else text for name, numeric in columns.items()}
        with opened(list(columns), wide) as reader:
            yield from reader

    return Source(path, types, read, None, None)


def _written(path: Path) -> tuple[str, str]:
    """What separates the columns, and the decimal point: many spreadsheets write semicolons, and then commas in numbers."""
    from pyarrow import input_stream

    with input_stream(path) as stream:
        head = stream.read(1 << 16).decode(errors="replace").splitlines()
    separator = max(",;\t", key=head[0].count) if head else ","
    comma = separator != "," and any(re.search(r"(^|[;\t])\d*,\d+([;\t]|$)", line) for line in head[1:])
    return separator, "," if comma else "."


def _of_json(path: Path) -> Source:
    from pyarrow import input_stream, json, schema

    def opened(types: Mapping[str, Any] | None) -> Any:
        options = json.ParseOptions(
            explicit_schema=None if types is None else schema(list(types.items())),
            unexpected_field_behavior="infer" if types is None else "ignore",
        )
        stream = input_stream(path, compression="gzip" if path.name.endswith(".gz") else None)
        return json.open_json(stream, read_options=json.ReadOptions(block_size=BLOCK), parse_options=options)

    with opened(None) as reader:
        types = _types(path, reader.schema)

    def read(columns: Wanted) -> Batches:
        wide = {name: _widest(types[name]) if numeric else types[name] for name, numeric in columns.items()}
        with opened(wide) as reader:
            yield from reader

    return Source(path, types, read, None, None)


def _of_npz(path: Path) -> Source:
    arrow = pyarrow()
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    lengths = {name: array.shape[0] if array.ndim else 0 for name, array in arrays.items()}
    rows = max(lengths.values(), default=0)
    arrays = {name: array for name, array in arrays.items() if lengths[name] == rows}
    if not rows:
        raise DamagedFileError(f"{path} holds no arrays with rows")
    columns = {name: _as_column(array) for name, array in arrays.items()}
    table = arrow.table(columns)

    def read(names: Wanted) -> Batches:
        yield from table.select(list(names)).to_batches(BATCH)

    return Source(path, _types(path, table.schema), read, rows, None)


def _as_column(array: np.ndarray) -> Any:
    """An array as an Arrow column, in this machine's order of bytes; further dimensions become lists of fixed size."""
    arrow = pyarrow()
    found = arrow.array(np.ascontiguousarray(array, array.dtype.newbyteorder("=")).reshape(-1))
    for size in array.shape[:0:-1]:
        found = arrow.FixedSizeListArray.from_arrays(found, size)
    return found


def _of_data_set(folder: Path) -> Source:
    import pyarrow.ipc as ipc

    if (folder / "dataset_dict.json").is_file():
        splits = read_json(folder / "dataset_dict.json")["splits"]
        if len(splits) > 1:
            raise InvalidArgumentError(
                f"{folder} holds the splits {splits}; give the folder of one, as {folder / splits[-1]}"
            )
        return _of_data_set(folder / splits[0])
    if not (folder / "state.json").is_file():
        raise MissingDataError(f"{folder} holds no files of predictions ({', '.join(SUFFIXES)}) and no saved data set")
    files = [folder / one["filename"] for one in read_json(folder / "state.json")["_data_files"]]
    if not files:
        raise DamagedFileError(f"{folder} is a data set without rows")

    def read(columns: Wanted) -> Batches:
        for file in files:
            with pyarrow().memory_map(str(file)) as source, ipc.open_stream(source) as reader:
                for batch in reader:
                    yield batch.select(list(columns))

    with pyarrow().memory_map(str(files[0])) as source, ipc.open_stream(source) as reader:
        types = _types(folder, reader.schema)
    return Source(folder, types, read, None, _feature_names(read_json(folder / "dataset_info.json")))


def _feature_names(info: Any) -> Sequence[str] | None:
    """The names of the classes, if one column is a ClassLabel."""
    features = (info or {}).get("features") or {}
    found = [one["names"] for one in features.values() if isinstance(one, dict) and one.get("_type") == "ClassLabel"]
    return found[0] if len(found) == 1 else None


def _types(path: Path, schema: "pa.Schema") -> dict[str, "pa.DataType"]:
    twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if twice:
        raise InvalidArgumentError(f"{path} must have columns of different names; got {twice[0]!r} twice")
    return dict(zip(schema.names, schema.types, strict=True))


def _widest(kind: "pa.DataType") -> "pa.DataType":
    """A type that numbers in later rows fit too: floats, where the first rows show integers or nothing."""
    types = pyarrow().types
    if types.is_list(kind):
        return pyarrow().list_(_widest(kind.value_type))
    return pyarrow().float64() if types.is_integer(kind) or types.is_floating(kind) or types.is_null(kind) else kind
