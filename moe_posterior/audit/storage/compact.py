"""Sealed segments as Parquet, written and read back.

A compacted segment is a few Parquet files and a note with their hashes; the hash of the note stands in a later record of the log. The
files hold the columns an auditor asks for (ids and times in full), and what replay needs in addition, so that nothing is lost.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moe_posterior.audit.storage.arrow import parquet
from moe_posterior.audit.storage.arrow import pyarrow as pa
from moe_posterior.audit.storage.files import DISK, FileSystem, parquet_name
from moe_posterior.audit.storage.frames import MAX_PAYLOAD, Frame, Kind, keyed_hash
from moe_posterior.audit.storage.marks import Note
from moe_posterior.audit.storage.state import MAX_TIME, Checkpoint, decode_checkpoint, decode_event, decode_json
from moe_posterior.audit.storage.tables import RESOLVE, ROUTE, TABLES, Group, check_calls, decode, empty_tables
from moe_posterior.errors import AuditError

BEGUN = (
    "made",
    "after",
)  # by the clock, in seconds since 1970; seconds after the segment before, in one run of a writer
_BLOCK = 1 << 20
_MOST_PACKED = 1000  # bytes that one byte of a large Parquet file may unpack to


def file_hash(path: Path, key: bytes | None, files: FileSystem = DISK) -> str:
    """BLAKE2b of a whole file, block by block; a MAC if there is a key."""
    state = hashlib.blake2b(key=key or b"", digest_size=32)
    try:
        with files.read(path) as file:
            while block := file.read(_BLOCK):
                state.update(block)
    except OSError as error:
        raise AuditError(f"{path.name} cannot be read: {error.strerror}") from error
    return state.hexdigest()


def begun_of(said: dict[str, Any]) -> dict[str, float]:
    """When a segment was begun, from what its first frame says: see ``BEGUN``."""
    found = {name: said.get(name) for name in BEGUN}
    return {n: float(v) for n, v in found.items() if isinstance(v, int | float) and 0 <= v < MAX_TIME / 1e6}


class SegmentTables:
    """Collects a segment's records to write them as Parquet."""

    def __init__(self) -> None:
        self.groups: list[tuple[int, Group]] = []
        self.others: list[tuple[int, int, bytes]] = []
        self.totals: Counter[str] = Counter()

    def add(self, frame: Frame) -> None:
        """Add a frame."""
        if frame.kind == Kind.GROUP:
            for group in decode(frame.payload()):
                self.groups.append((frame.number, group))
                self.totals.update({name: group.rows(name) for name in TABLES})
                times = group.tables["calls"]["time"]
                if len(times):
                    self.totals["first_time"] = self.totals["first_time"] or int(times[0])
                    self.totals["last_time"] = int(times[-1])
        elif frame.kind in (Kind.CHECKPOINT, Kind.EVENT):
            self.others.append((frame.number, int(frame.kind), frame.payload()))
        elif frame.kind == Kind.SEGMENT:
            begun = begun_of(decode_json(frame.payload()))
            self.totals.update({f"{name}_time": int(1e6 * seconds) for name, seconds in begun.items()})

    def write(self, folder: Path, number: int, key: bytes | None, files: FileSystem) -> dict[str, str]:
        """Write the tables; returns their names and hashes."""
        hashes = {}
        for table in (*TABLES, "others"):
            content = self._others() if table == "others" else self._table(table)
            if not content.num_rows:
                continue
            path = folder / parquet_name(table, number)
            made = pa.BufferOutputStream()
            parquet.write_table(content, made, compression="zstd", compression_level=3, row_group_size=1 << 18)
            data = made.getvalue().to_pybytes()
            files.replace(path, data)
            hashes[path.name] = keyed_hash(key, data).hex()
        return hashes

    def _table(self, table: str) -> Any:
        parts = [_arrow(number, group, table) for number, group in self.groups if group.rows(table)]
        return pa.concat_tables(parts) if parts else pa.table({})

    def _others(self) -> Any:
        columns = list(zip(*self.others, strict=True)) or [(), (), ()]
        types = {"frame": pa.int64(), "kind": pa.int8(), "payload": pa.binary()}
        return pa.table({n: pa.array(c, t) for (n, t), c in zip(types.items(), columns, strict=True)})


def _arrow(number: int, group: Group, table: str) -> Any:
    rows = group.rows(table)
    arrays: dict[str, Any] = {
        "frame": pa.array(np.full(rows, number)),
        "source": pa.array(np.full(rows, group.source, dtype=np.uint32)),
    }
    if table == "calls":
        arrays["top_k"] = pa.array(np.full(rows, group.top_k, dtype=np.uint16))
    if table == "decisions":
        arrays["id"] = pa.array(group.decision_ids())
    if table in ("decisions", "outcomes"):
        times = group.tables["calls"]["time"][group.call_rows(ROUTE if table == "decisions" else RESOLVE)]
        arrays["time"] = pa.array(times).cast(pa.timestamp("us", tz="UTC"))
    for column in TABLES[table]:
        values = group.tables[table][column.name]
        if column.per_slot:
            flat = pa.array(np.ascontiguousarray(values).reshape(-1))
            offsets = pa.array(np.arange(0, values.size + 1, values.shape[1], dtype=np.int32))
            arrays[column.name] = pa.ListArray.from_arrays(offsets, flat)
        else:
            arrays[column.name] = pa.array(values, pa.string() if column.dtype is object else None)
    return pa.table(arrays)


def read_compacted(
    folder: Path, note: Note, key: bytes | None, *, events_only: bool = False, files: FileSystem = DISK
) -> Iterator[Group | Checkpoint | dict[str, Any]]:
    """The records of a compacted segment, in order, after the hash of each of its files was checked.

    Raises:
        AuditError: a file is missing, altered, or malformed.
    """
    for name, expected in sorted(note.files.items()):
        if file_hash(folder / name, key, files) != expected:
            raise AuditError(f"segment {note.segment}, {name}: its hash does not match: altered")
    try:
        yield from _records(folder, note, events_only, files)
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise AuditError(f"segment {note.segment}: its Parquet files are malformed: {error}") from error


def _records(
    folder: Path, note: Note, events_only: bool, files: FileSystem
) -> Iterator[Group | Checkpoint | dict[str, Any]]:
    names = {table: parquet_name(table, note.segment) for table in (*TABLES, "others")}
    records: list[tuple[int, Any]] = []
    if names["others"] in note.files:
        others = _table_of(folder / names["others"], files)
        for number, kind, payload in zip(*(others[n].to_pylist() for n in ("frame", "kind", "payload")), strict=True):
            if len(payload) > MAX_PAYLOAD:
                raise AuditError(f"a record of segment {note.segment} is too long")
            if kind == Kind.EVENT:
                records.append((number, decode_event(payload)))
            elif not events_only:
                records.append((number, decode_checkpoint(payload)))
    if not events_only:
        tables = {t: _table_of(folder / n, files) for t, n in names.items() if n in note.files and t != "others"}
        records += _groups(tables)
    for _, record in sorted(records, key=lambda pair: pair[0]):
        yield record


def _table_of(path: Path, files: FileSystem) -> Any:
    """Read one of our tables, after its footer shows our compression and a plausible unpacked size."""
    with files.read(path) as file, parquet.ParquetFile(file) as whole:
        said = whole.metadata
        chunks = [said.row_group(g).column(c) for g in range(said.num_row_groups) for c in range(said.num_columns)]
        if any(chunk.compression not in ("ZSTD", "UNCOMPRESSED") for chunk in chunks):
            raise AuditError(f"{path.name} is not compressed the way this library compresses")
        size = sum(max(chunk.total_uncompressed_size, 8 * chunk.num_values) for chunk in chunks)
        if size > max(MAX_PAYLOAD, _MOST_PACKED * os.fstat(file.fileno()).st_size):
            raise AuditError(f"{path.name} unpacks to {size} bytes, implausibly many for a file of its size")
        return whole.read()


def _groups(tables: dict[str, Any]) -> list[tuple[int, Group]]:
    """Tables cut at their frame and source columns, which are in order."""
    found: dict[tuple[int, int], Group] = {}
    tops: dict[int, int] = {}
    if "calls" in tables:
        pairs = zip(tables["calls"]["source"].to_numpy(), tables["calls"]["top_k"].to_numpy(), strict=True)
        tops = {int(source): int(k) for source, k in set(pairs)}
    for table, content in tables.items():
        frames, sources = content["frame"].to_numpy(), content["source"].to_numpy()
        columns: dict[str, Any] = {}
        for column in TABLES[table]:
            values = content[column.name].combine_chunks()
            columns[column.name] = values if column.per_slot else values.to_numpy(zero_copy_only=False)
        keys = (frames.astype(np.int64) << 32) + sources
        starts = np.flatnonzero(np.diff(keys, prepend=-1))
        for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(keys)], strict=True):
            frame, source = int(frames[start]), int(sources[start])
            top_k = tops.get(source, 1)
            group = found.setdefault((frame, source), Group(source, top_k, empty_tables(top_k)))
            group.tables[table].update(
                {
                    column.name: columns[column.name].slice(start, end - start).flatten().to_numpy().reshape(-1, top_k)
                    if column.per_slot
                    else columns[column.name][start:end]
                    for column in TABLES[table]
                }
            )
    for group in found.values():
        check_calls(group)
    return [(frame, group) for (frame, _), group in found.items()]
