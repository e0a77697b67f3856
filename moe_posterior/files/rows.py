"""Many small records in one file: JSON to read with the eyes, or Parquet at a twentieth of the size, by the file's name.

The records are flat mappings with the same keys. In Parquet every value but text stands as its JSON, so that it comes back as it was
written, to the last digit of a float; how the records came about is in the file's metadata.
"""

import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_posterior.errors import DamagedFileError, InvalidArgumentError, MissingDependencyError, MoEPosteriorError
from moe_posterior.files.atomic import write_bytes, write_text
from moe_posterior.files.reading import decoding, read_json
from moe_posterior.files.torchfile import read_plain_file

_KEY = b"moe_posterior"


def write_rows(path: str | os.PathLike[str], about: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write records and what they are about, whole or not at all; ``.parquet`` in the name asks for Parquet, all else for JSON.

    Raises:
        InvalidArgumentError: a value that strict JSON cannot hold. MissingDependencyError: Parquet without pyarrow.
    """
    try:
        header = {name: json.loads(json.dumps(value, allow_nan=False)) for name, value in about.items()}
        lines = [json.dumps(dict(row), allow_nan=False) for row in rows]
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(f"records must be strict JSON: {error}") from error
    if Path(path).suffix == ".parquet":
        write_bytes(path, _as_parquet(header, [dict(row) for row in rows]))
        return
    named = "".join(f"{json.dumps(name)}: {json.dumps(value)},\n" for name, value in header.items())
    write_text(path, f'{{{named}"records": [\n' + ",\n".join(lines) + "\n]}\n")


def read_rows(
    path: str | os.PathLike[str], advice: str = "", error: type[MoEPosteriorError] = DamagedFileError
) -> dict[str, Any]:
    """What :func:`write_rows` wrote: its header, and the rows as ``records``.

    Raises:
        MissingDataError: there is no such file; the advice says what to do. ``error``: it holds something else.
    """
    if Path(path).suffix != ".parquet":
        return read_json(path, advice, error)
    data = read_plain_file(path)
    with decoding(path, "a Parquet file of records", advice, error):
        return _from_parquet(data)


def _as_parquet(header: dict[str, Any], rows: list[dict[str, Any]]) -> bytes:
    arrow, parquet = _pyarrow()
    names = list(rows[0]) if rows else []
    columns = {name: [row[name] for row in rows] for name in names}
    texts = [name for name, column in columns.items() if all(isinstance(value, str) for value in column)]
    cells = {name: column if name in texts else [json.dumps(v) for v in column] for name, column in columns.items()}
    metadata = {_KEY: json.dumps({"header": header, "texts": texts}).encode()}
    schema = arrow.schema([(name, arrow.string()) for name in names], metadata=metadata)
    file = io.BytesIO()
    parquet.write_table(arrow.table(cells, schema=schema), file, compression="zstd", compression_level=19)
    return file.getvalue()


def _from_parquet(data: bytes) -> dict[str, Any]:
    arrow, parquet = _pyarrow()
    table = parquet.read_table(arrow.BufferReader(data))
    notes = json.loads(table.schema.metadata[_KEY])
    columns = {
        name: values if name in notes["texts"] else [json.loads(value) for value in values]
        for name, values in table.to_pydict().items()
    }
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return {**notes["header"], "records": rows}


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError("pyarrow", "train") from error
    return pyarrow, pyarrow.parquet
