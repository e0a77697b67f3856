"""A log as plain tables, for other tools."""

from pathlib import Path
from typing import Any, Literal

from moe_posterior.audit.read import Reader
from moe_posterior.audit.storage.arrow import parquet
from moe_posterior.audit.storage.arrow import pyarrow as pa
from moe_posterior.escape import spreadsheet
from moe_posterior.files.atomic import replacing


def export(reader: Reader, folder: Path, form: Literal["parquet", "csv"] = "parquet") -> dict[str, int]:
    """Write decisions, outcomes, posterior and events, one file each; returns their paths and numbers of rows.

    Each table is held in memory while it is written. In CSV, lists are joined by semicolons, and a text that a spreadsheet would
    treat as a formula gets a leading apostrophe.
    """
    folder.mkdir(parents=True, exist_ok=True)
    views = {
        "decisions": reader.decisions,
        "outcomes": reader.outcomes,
        "posterior": reader.posterior,
        "events": reader.events,
    }
    written = {}
    for name, view in views.items():
        table, path = view(), folder / f"{name}.{form}"
        if form == "parquet":
            with replacing(path) as file:
                parquet.write_table(table, file, compression="zstd")
        else:
            from pyarrow import csv

            with replacing(path) as file:
                csv.write_csv(_flat(table), file)
        written[str(path)] = table.num_rows
    return written


def _flat(table: Any) -> Any:
    for index, field in enumerate(table.schema):
        if pa.types.is_list(field.type):
            texts = [None if row is None else ";".join(map(repr, row)) for row in table[field.name].to_pylist()]
        elif pa.types.is_string(field.type):
            texts = [None if text is None else spreadsheet(text) for text in table[field.name].to_pylist()]
        else:
            continue
        table = table.set_column(index, field.name, pa.array(texts, pa.string()))
    return table
