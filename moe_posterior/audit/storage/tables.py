"""What happened between two group commits, as columns: the payload of a group frame.

Dimensions: N decisions, M outcomes, k experts per decision, R rows of a table.

A payload is a sequence of parts, one for each table of each source that has rows: 16 bytes (table, k, source, rows, length) and an
Arrow IPC record batch message, padded to 8 bytes. Increasing columns are stored as differences, which zstd compresses well.
"""

import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_posterior.audit.storage.arrow import pyarrow as pa
from moe_posterior.audit.storage.state import MAX_TIME
from moe_posterior.errors import AuditError

ROUTE, RESOLVE, REFUSE = 0, 1, 2  # kinds of calls
ABSTAIN, EXPLORED = 1, 2  # bits of a decision's flags
Columns = dict[str, NDArray[Any]]


class _Column(NamedTuple):
    name: str
    dtype: Any  # numpy; object for text
    per_slot: bool = False  # (R, k)
    differences: bool = False


TABLES: dict[str, tuple[_Column, ...]] = {
    "calls": (
        _Column("kind", np.uint8),
        _Column("rows", np.uint32),  # of decisions, outcomes or refusals
        _Column("time", np.int64, differences=True),  # microseconds since 1970, UTC
        _Column("first", np.int64, differences=True),  # the first decision's id, where kind is ROUTE
        _Column("steps", np.int64, differences=True),  # of the gate, after the call: where its random draws stand
    ),
    "decisions": (
        _Column("cluster", np.uint32),
        _Column("distance", np.float32),
        _Column("version", np.uint32),  # of the cluster's posterior row
        _Column("experts", np.uint16, per_slot=True),
        _Column("scores", np.float32, per_slot=True),
        _Column("flags", np.uint8),
    ),
    "outcomes": (_Column("id", np.int64, differences=True), _Column("signal", np.float64, per_slot=True)),
    "refusals": (
        _Column("id", np.int64),
        _Column("slot", np.uint16),
        _Column("signal", np.float64),
        _Column("reason", object),
    ),
    "posterior": (  # cells of a cluster's row that differ from the version before
        _Column("cluster", np.uint32),
        _Column("version", np.uint32),
        _Column("expert", np.uint16),
        _Column("alpha", np.float64),
        _Column("beta", np.float64),
    ),
    "members": (  # of decisions on queries in several clusters: all of them, J rows a decision
        _Column("cluster", np.uint32),
        _Column("version", np.uint32),  # of that cluster's posterior row
        _Column("share", np.float32),
    ),
    "beliefs": (  # of decisions by a learned prior, which no row holds: all of them, one row a decision
        _Column("alpha", np.float64, per_slot=True),  # of the chosen
        _Column("beta", np.float64, per_slot=True),
    ),
}
_NAMES = tuple(TABLES)
_MOST = {"time": MAX_TIME, "first": 1 << 62, "steps": 1 << 62}
_HEADER, _COMPRESSION = 2, 3  # fields of an Arrow message, and of the record batch that is its header
_PART = struct.Struct("<BxHIII")  # table, k, source, rows, bytes
_CALLED = {ROUTE: "decisions", RESOLVE: "outcomes", REFUSE: "refusals"}


class Group(NamedTuple):
    """What one source did between two group commits."""

    source: int
    top_k: int
    tables: Mapping[str, Columns]

    def rows(self, table: str) -> int:
        """How many rows a table has."""
        return len(self.tables[table][TABLES[table][0].name])

    def call_rows(self, kind: int) -> NDArray[np.int64]:
        """For every row of the kind's table, the index of its call."""
        calls = self.tables["calls"]
        return np.repeat(np.arange(len(calls["kind"])), np.where(calls["kind"] == kind, calls["rows"], 0))

    def decision_ids(self) -> NDArray[np.int64]:  # (N,)
        """The ids of the decisions: each call's are consecutive."""
        calls = self.tables["calls"]
        routed = calls["kind"] == ROUTE
        rows = calls["rows"][routed].astype(np.int64)
        starts = np.cumsum(rows) - rows
        return np.repeat(calls["first"][routed] - starts, rows) + np.arange(int(rows.sum()))

    def members(self) -> Columns | None:
        """The columns of ``members``, each (N, J), where queries belong to several clusters."""
        rows, count = self.rows("members"), self.rows("decisions")
        return {n: v.reshape(count, -1) for n, v in self.tables["members"].items()} if rows and count else None


def empty_tables(top_k: int) -> dict[str, Columns]:
    """Every table without rows."""
    return {
        table: {c.name: np.zeros((0, top_k) if c.per_slot else 0, c.dtype) for c in columns}
        for table, columns in TABLES.items()
    }


def encode(groups: Iterable[Group]) -> bytes:
    """Groups as the raw payload of a frame."""
    parts: list[bytes] = []
    for group in groups:
        for number, table in enumerate(_NAMES):
            rows = group.rows(table)
            if not rows:
                continue
            message = _batch(table, group.top_k, group.tables[table]).serialize().to_pybytes()
            message += bytes(-len(message) % 8)
            parts += [_PART.pack(number, group.top_k, group.source, rows, len(message)), message]
    return b"".join(parts)


def decode(payload: bytes) -> list[Group]:
    """What :func:`encode` was given.

    Raises:
        AuditError: the payload is malformed.
    """
    found: dict[int, tuple[int, dict[str, Columns]]] = {}
    for table, top_k, source, rows, message in split(payload):
        known_k, tables = found.setdefault(source, (top_k, empty_tables(top_k)))
        if known_k != top_k or len(next(iter(tables[table].values()))):
            raise AuditError("a group holds a table twice, or with another number of experts per decision")
        tables[table] = _columns(table, top_k, rows, message)
    groups = [Group(source, top_k, tables) for source, (top_k, tables) in found.items()]
    for group in groups:
        check_calls(group)
    return groups


def check_calls(group: Group) -> None:
    """Raise AuditError unless the calls account for every row, at times that exist."""
    calls = group.tables["calls"]
    for kind, table in _CALLED.items():
        if int(calls["rows"][calls["kind"] == kind].sum()) != group.rows(table):
            raise AuditError(f"a group's calls do not add up to its {table}")
    count = group.rows("members")
    if count and (not group.rows("decisions") or count % group.rows("decisions")):
        raise AuditError("a group's members do not add up to its decisions")
    if group.rows("beliefs") not in (0, group.rows("decisions")):
        raise AuditError("a group's beliefs do not add up to its decisions")
    for name, counts in group.tables["beliefs"].items():
        if not bool(((counts > 0) & np.isfinite(counts)).all()):
            raise AuditError(f"a group's beliefs have an {name} that is not positive and finite")
    shares = group.tables["members"]["share"]
    if not bool(((shares >= 0) & (shares <= 1)).all()):
        raise AuditError("a group's members have shares outside [0, 1]")
    if len(calls["kind"]) and int(calls["kind"].max()) > REFUSE:
        raise AuditError("a group holds a call of an unknown kind")
    for column in ("time", "first", "steps"):
        if len(calls[column]) and not 0 <= int(calls[column].min()) <= int(calls[column].max()) < _MOST[column]:
            raise AuditError(f"a group's calls have an impossible {column}")


def split(payload: bytes) -> Iterator[tuple[str, int, int, int, bytes]]:
    """Table, k, source, rows and Arrow message of every part, unread.

    Raises:
        AuditError: the parts do not fit the payload.
    """
    position, view = 0, memoryview(payload)
    while position < len(payload):
        if position + _PART.size > len(payload):
            raise AuditError("a group ends inside a part")
        number, top_k, source, rows, size = _PART.unpack_from(payload, position)
        position += _PART.size
        if number >= len(_NAMES) or top_k < 1 or size > len(payload) - position:
            raise AuditError("a group holds a part that does not fit")
        yield _NAMES[number], top_k, source, rows, view[position : position + size]  # type: ignore[misc]
        position += size


def _arrow_type(column: _Column, top_k: int) -> Any:
    if column.dtype is object:
        return pa.string()
    scalar = pa.from_numpy_dtype(column.dtype)
    return pa.list_(scalar, top_k) if column.per_slot else scalar


def _schema(table: str, top_k: int) -> Any:
    return pa.schema([pa.field(c.name, _arrow_type(c, top_k)) for c in TABLES[table]])


def _batch(table: str, top_k: int, columns: Columns) -> Any:
    arrays = []
    for column in TABLES[table]:
        values = columns[column.name]
        if column.differences:
            values = np.diff(values, prepend=np.int64(0))
        if column.dtype is object:
            arrays.append(pa.array(values.tolist(), type=pa.string()))
            continue
        # From the buffer: pa.array of a numpy array first imports pandas, half a second in the writer's thread.
        flat = np.ascontiguousarray(values, dtype=column.dtype).reshape(-1)
        scalars = pa.Array.from_buffers(pa.from_numpy_dtype(column.dtype), len(flat), [None, pa.py_buffer(flat)])
        arrays.append(pa.FixedSizeListArray.from_arrays(scalars, top_k) if column.per_slot else scalars)
    return pa.RecordBatch.from_arrays(arrays, schema=_schema(table, top_k))


def _columns(table: str, top_k: int, rows: int, message: bytes) -> Columns:
    try:
        whole = pa.ipc.read_message(pa.py_buffer(message))
        if _is_compressed(memoryview(whole.metadata)):  # to any size; we compress the whole frame, with a limit
            raise AuditError(f"a table of {table} is compressed")
        batch = pa.ipc.read_record_batch(whole, _schema(table, top_k))
        batch.validate(full=True)
        if batch.num_rows != rows or any(column.null_count for column in batch.columns):
            raise AuditError(f"a table of {table} holds nulls or another number of rows than its part says")
        return {c.name: _values(c, top_k, batch.column(i)) for i, c in enumerate(TABLES[table])}
    except (pa.ArrowException, OSError, EOFError, ValueError, OverflowError, struct.error) as error:
        raise AuditError(f"a table of {table} is malformed: {error}") from error


def _is_compressed(metadata: memoryview) -> bool:
    """Whether a record batch's message, a flatbuffer, has the field that names a compression."""
    (root,) = struct.unpack_from("<I", metadata)
    offset = _flatbuffer_field(metadata, root, _HEADER)
    header = root + offset + struct.unpack_from("<I", metadata, root + offset)[0]
    return _flatbuffer_field(metadata, header, _COMPRESSION) != 0


def _flatbuffer_field(data: memoryview, table: int, slot: int) -> int:
    """Where a field of a flatbuffer's table lies, counted from the table; 0 if it is absent."""
    layout = table - struct.unpack_from("<i", data, table)[0]
    (size,) = struct.unpack_from("<H", data, layout)
    place = 4 + 2 * slot
    return int(struct.unpack_from("<H", data, layout + place)[0]) if place + 2 <= size else 0


def _values(column: _Column, top_k: int, array: Any) -> NDArray[Any]:
    if column.per_slot:
        flat = array.flatten()
        if flat.null_count:
            raise AuditError(f"column {column.name} holds nulls")
        return flat.to_numpy(zero_copy_only=False).reshape(-1, top_k)
    values = array.to_numpy(zero_copy_only=False)
    return np.cumsum(values) if column.differences else values
