"""Reading a log: its records in order, and the tables that an auditor asks for.

Dimensions: N decisions, M outcomes, E experts, k experts per decision.
"""

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_posterior.audit.belief import BeliefState, RowsOfGroup, belief_of, knobs
from moe_posterior.audit.storage.arrow import pyarrow as pa
from moe_posterior.audit.storage.chain import Chain
from moe_posterior.audit.storage.compact import read_compacted
from moe_posterior.audit.storage.files import DISK, FileSystem
from moe_posterior.audit.storage.frames import Frame, Kind
from moe_posterior.audit.storage.marks import Note
from moe_posterior.audit.storage.state import Checkpoint, decode_checkpoint, decode_event, encode_json
from moe_posterior.audit.storage.tables import ABSTAIN, EXPLORED, REFUSE, RESOLVE, ROUTE, Group, decode
from moe_posterior.errors import AuditError

TIME = pa.timestamp("us", tz="UTC")
Record = Group | Checkpoint | dict[str, Any]  # a dict is an event


class Source(NamedTuple):
    """What a reader knows of one router or gate at one point of the log."""

    name: str
    checkpoint: Checkpoint
    belief: BeliefState | None


def records_of(frame: Frame) -> Iterator[Record]:
    """What a frame holds.

    Raises:
        AuditError: its content is malformed, though its hash is right.
    """
    try:
        if frame.kind == Kind.GROUP:
            yield from decode(frame.payload())
        elif frame.kind == Kind.CHECKPOINT:
            yield decode_checkpoint(frame.payload())
        elif frame.kind == Kind.EVENT:
            yield decode_event(frame.payload())
    except AuditError as error:
        raise AuditError(f"segment {frame.segment}, record {frame.number}: {error}") from error


class Reader:
    """Groups, checkpoints and events of a log, in order. Every hash is checked before what it covers is read.

    Reading beside the writer is fine: the log ends, for this iteration, where it ended when the iteration came there.
    """

    def __init__(self, folder: Path, key: bytes | None, *, start: int = 0, files: FileSystem = DISK) -> None:
        self.folder, self.key, self.start, self.files = folder, key, start, files
        self.chain: Chain | None = None  # of the last iteration
        self.sources: dict[int, Source] = {}  # as of the record given last

    def __iter__(self) -> Iterator[Record]:
        self.chain, self.sources = Chain(self.folder, self.key, start=self.start, files=self.files), {}
        for frame in self.chain:
            records = self._compacted(frame) if isinstance(frame, Note) else records_of(frame)
            for record in records:
                if isinstance(record, Checkpoint):
                    self._note(record)
                elif isinstance(record, Group) and record.source in self.sources:
                    _check_fit(record, self.sources[record.source].checkpoint)
                yield record

    def _note(self, checkpoint: Checkpoint) -> None:
        source, name = checkpoint.settings["source"], checkpoint.settings["name"]
        self.sources[source] = Source(name, checkpoint, belief_of(checkpoint))

    def _compacted(self, note: Note) -> Iterator[Record]:
        if not note.removed:
            yield from read_compacted(self.folder, note, self.key, files=self.files)

    def frames(self) -> Iterator[Frame]:
        """The verified frames themselves, without those of compacted segments."""
        self.chain = Chain(self.folder, self.key, start=self.start, files=self.files)
        return (frame for frame in self.chain if isinstance(frame, Frame))

    def groups(self) -> Iterator[tuple[Group, Source | None, RowsOfGroup | None]]:
        """Every group with its source and the posterior rows its decisions rested on (None where none was recorded)."""
        for record in self:
            if isinstance(record, Group):
                source = self.sources.get(record.source)
                rows = None if source is None or source.belief is None else source.belief.advance(record)
                yield record, source, rows

    def events(self) -> Any:
        """What happened beside decisions and outcomes, oldest first: columns time, source, event, detail (JSON)."""
        rows = []
        for record in self:
            if isinstance(record, Checkpoint):
                said = record.settings
                detail = {
                    name: said.get(name)
                    for name in ("knobs", "num_experts", "num_clusters", "top_k", "options", "rate")
                }
                rows.append((said.get("time", 0), said["name"], f"checkpoint: {said.get('reason')}", detail))
            elif isinstance(record, dict):
                rows.append((record.get("time", 0), record.get("name", ""), str(record.get("event")), record))
        columns = list(zip(*rows, strict=True)) or [(), (), (), ()]
        details = [encode_json(detail).decode() for detail in columns[3]]
        names = ["time", "source", "event", "detail"]
        arrays = [pa.array(columns[0], TIME), pa.array(columns[1], pa.string()), pa.array(columns[2], pa.string())]
        return pa.Table.from_arrays([*arrays, pa.array(details, pa.string())], names)

    def decisions(
        self,
        *,
        ids: list[int] | None = None,
        expert: int | None = None,
        cluster: int | None = None,
        last: int | None = None,
        posterior: bool = True,
    ) -> Any:
        """The paper's full entries, one row a decision.

        Columns: source, id, time, cluster (where a query has several, the nearest of the first clustering), distance, version (of
        that cluster's posterior row), mode (the score that ranked), experts, scores and means (best first; the posterior mean
        competence of each, what the score is a bound of), abstain, explored, alpha and beta (all E experts, as the decision saw
        them, of several clusters mixed by its shares), signal (one a slot, null while there is no outcome) and resolved (when it
        came). Means, alpha and beta are null where the source has no belief; means also where a far token was given less than its
        cluster's (``novelty="discount"``).

        Args:
            ids, expert, cluster: only these decisions; ``expert`` is one that was chosen.
            last: only so many, the latest.
            posterior: False leaves means, alpha and beta out: for wide pools they are nearly all of the table.
        """
        parts: deque[Any] = deque()
        rows = 0
        outcomes = _Outcomes()
        for group, source, belief in self.groups():
            outcomes.add(group)
            kept = _selected(group, ids, expert, cluster)
            if not len(kept):
                continue
            parts.append(_decision_table(group, source, belief if posterior else None, kept))
            rows += len(kept)
            while last is not None and rows - parts[0].num_rows >= last:
                rows -= parts.popleft().num_rows
        table = pa.concat_tables(parts) if parts else _decision_schema().empty_table()
        if last is not None and rows > last:
            table = table.slice(rows - last)
        table = outcomes.join(table)
        return table.drop_columns(["source_number"] if posterior else ["source_number", "means", "alpha", "beta"])

    def outcomes(self) -> Any:
        """Outcomes, one row a decision and slot, in the order they came.

        Columns: source, id, slot, time, signal, threshold, outcome (the signal binarised; null where it counted fractionally or
        was NaN), accepted, reason (of a refusal).
        """
        tables = [_outcome_table(group, source) for group, source, _ in self.groups()]
        return pa.concat_tables(tables) if tables else _OUTCOMES.empty_table()

    def posterior(self) -> Any:
        """The cells of the posterior, one row a change: source, cluster, version, expert, alpha, beta; checkpoints come whole."""
        parts = []
        for record in self:
            if isinstance(record, Checkpoint) and "alpha" in record.arrays:
                parts.append(_checkpoint_cells(record))
            elif isinstance(record, Group) and record.rows("posterior"):
                name = self.sources[record.source].name if record.source in self.sources else ""
                columns = record.tables["posterior"]
                arrays = {"source": np.full(record.rows("posterior"), name, dtype=object), **columns}
                parts.append(pa.table({n: pa.array(a) for n, a in arrays.items()}, schema=_CELLS))
        return pa.concat_tables(parts) if parts else _CELLS.empty_table()


def _check_fit(group: Group, checkpoint: Checkpoint) -> None:
    """Raise AuditError if a group speaks of clusters or experts that its source does not have."""
    said = checkpoint.settings
    bounds = (
        ("decisions", "cluster", said["num_clusters"]),
        ("decisions", "experts", said["num_experts"]),
        ("members", "cluster", said["num_clusters"]),
        ("posterior", "cluster", said["num_clusters"]),
        ("posterior", "expert", said["num_experts"]),
    )
    for table, column, size in bounds:
        values = group.tables[table][column]
        if values.size and int(values.max()) >= size:
            raise AuditError(f"a group of {said['name']!r} speaks of {column} {int(values.max())}; there are {size}")
    if group.top_k != said["top_k"]:
        raise AuditError(f"a group of {said['name']!r} has {group.top_k} experts a decision, not {said['top_k']}")


_CELLS = pa.schema(
    [
        ("source", pa.string()),
        ("cluster", pa.uint32()),
        ("version", pa.uint32()),
        ("expert", pa.uint16()),
        ("alpha", pa.float64()),
        ("beta", pa.float64()),
    ]
)
_OUTCOMES = pa.schema(
    [
        ("source", pa.string()),
        ("id", pa.int64()),
        ("slot", pa.uint16()),
        ("time", TIME),
        ("signal", pa.float64()),
        ("threshold", pa.float64()),
        ("outcome", pa.bool_()),
        ("accepted", pa.bool_()),
        ("reason", pa.string()),
    ]
)


def _checkpoint_cells(checkpoint: Checkpoint) -> Any:
    alpha, beta = checkpoint.arrays["alpha"], checkpoint.arrays["beta"]
    clusters, experts = np.indices(alpha.shape).reshape(2, -1)
    columns = {
        "source": np.full(alpha.size, checkpoint.settings["name"], dtype=object),
        "cluster": clusters.astype(np.uint32),
        "version": checkpoint.arrays["versions"].astype(np.uint32)[clusters],
        "expert": experts.astype(np.uint16),
        "alpha": alpha.reshape(-1),
        "beta": beta.reshape(-1),
    }
    return pa.table({name: pa.array(column) for name, column in columns.items()}, schema=_CELLS)


def _selected(group: Group, ids: list[int] | None, expert: int | None, cluster: int | None) -> NDArray[np.int64]:
    decisions = group.tables["decisions"]
    keep = np.ones(group.rows("decisions"), dtype=np.bool_)
    if ids is not None:
        keep &= np.isin(group.decision_ids(), ids)
    if expert is not None:
        keep &= (decisions["experts"] == expert).any(axis=1)
    if cluster is not None:
        keep &= decisions["cluster"] == cluster
    return np.flatnonzero(keep)


def _decision_schema() -> Any:
    floats = pa.list_(pa.float64())
    return pa.schema(
        [
            ("source_number", pa.int64()),
            ("source", pa.string()),
            ("id", pa.int64()),
            ("time", TIME),
            ("cluster", pa.uint32()),
            ("distance", pa.float32()),
            ("version", pa.uint32()),
            ("mode", pa.string()),
            ("experts", pa.list_(pa.uint16())),
            ("scores", pa.list_(pa.float32())),
            ("means", floats),
            ("abstain", pa.bool_()),
            ("explored", pa.bool_()),
            ("alpha", floats),
            ("beta", floats),
        ]
    )


def _lists(values: NDArray, kind: Any) -> Any:  # (N, k)
    offsets = np.arange(0, values.size + 1, values.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.reshape(-1))).cast(kind)


def _decision_table(group: Group, source: Source | None, belief: RowsOfGroup | None, kept: NDArray) -> Any:
    schema, rows = _decision_schema(), len(kept)
    columns = {name: values[kept] for name, values in group.tables["decisions"].items()}
    calls = group.tables["calls"]
    flags, experts = columns.pop("flags"), columns.pop("experts")
    arrays = {
        "source_number": pa.array(np.full(rows, group.source)),
        "source": pa.array([source.name if source else ""] * rows, pa.string()),
        "id": pa.array(group.decision_ids()[kept]),
        "time": pa.array(calls["time"][group.call_rows(ROUTE)[kept]]).cast(TIME),
        "mode": pa.array([str(knobs(source.checkpoint).get("score", "")) if source else ""] * rows, pa.string()),
        "experts": _lists(experts, schema.field("experts").type),
        "scores": _lists(columns.pop("scores"), schema.field("scores").type),
        "abstain": pa.array(flags & ABSTAIN != 0),
        "explored": pa.array(flags & EXPLORED != 0),
        **{name: pa.array(values) for name, values in columns.items()},
    }
    beliefs = dict.fromkeys(("alpha", "beta", "means"))
    if belief is not None:
        beliefs["alpha"], beliefs["beta"] = alpha, beta = belief.believed(group, kept)
        if source is not None and source.checkpoint.settings.get("options", {}).get("novelty") != "discount":
            won, lost = (np.take_along_axis(table, experts.astype(np.int64), axis=1) for table in (alpha, beta))
            beliefs["means"] = won / (won + lost)
    for name, values in beliefs.items():
        kind = schema.field(name).type
        arrays[name] = pa.nulls(rows, kind) if values is None else _lists(values, kind)
    return pa.table([arrays[name] for name in schema.names], schema=schema)


def _outcome_table(group: Group, source: Source | None) -> Any:
    calls, top_k = group.tables["calls"], group.top_k
    threshold = None if source is None else knobs(source.checkpoint).get("threshold")
    parts = []
    for kind, table in ((RESOLVE, "outcomes"), (REFUSE, "refusals")):
        columns, accepted = group.tables[table], kind == RESOLVE
        repeats = top_k if accepted else 1
        call_of = np.repeat(group.call_rows(kind), repeats)
        rows = len(call_of)
        signal = columns["signal"].reshape(-1)
        seen = (~np.isnan(signal)) & (threshold is not None) & accepted
        arrays = {
            "source": pa.array([source.name if source else ""] * rows, pa.string()),
            "id": pa.array(np.repeat(columns["id"], repeats)),
            "slot": pa.array(
                np.tile(np.arange(top_k, dtype=np.uint16), rows // top_k) if accepted else columns["slot"]
            ),
            "time": pa.array(calls["time"][call_of]).cast(TIME),
            "signal": pa.array(signal),
            "threshold": pa.array([threshold] * rows, pa.float64()),
            "outcome": pa.array(signal >= (threshold or 0.0), mask=~seen),
            "accepted": pa.array(np.full(rows, accepted)),
            "reason": pa.nulls(rows, pa.string()) if accepted else pa.array(columns["reason"], pa.string()),
        }
        order = pa.array(call_of)
        parts.append(pa.table([*arrays.values(), order], [*arrays, "call"]))
    return pa.concat_tables(parts).sort_by("call").drop_columns(["call"]).cast(_OUTCOMES)


class _Outcomes:
    """Accepted outcomes, to be joined to their decisions."""

    def __init__(self) -> None:
        self._parts: dict[int, list[tuple[NDArray, NDArray, NDArray]]] = {}

    def add(self, group: Group) -> None:
        if group.rows("outcomes"):
            outcomes = group.tables["outcomes"]
            times = group.tables["calls"]["time"][group.call_rows(RESOLVE)]
            self._parts.setdefault(group.source, []).append((outcomes["id"], outcomes["signal"], times))

    def join(self, table: Any) -> Any:
        """The table with the columns signal and resolved."""
        signals: list[Any] = [None] * table.num_rows
        times = np.zeros(table.num_rows, dtype=np.int64)
        found = np.zeros(table.num_rows, dtype=np.bool_)
        sources, ids = table["source_number"].to_numpy(), table["id"].to_numpy()
        for source, parts in self._parts.items():
            known, values, came = (np.concatenate(columns) for columns in zip(*parts, strict=True))
            order = np.argsort(known, kind="stable")
            rows = np.flatnonzero(sources == source)
            places = np.searchsorted(known[order], ids[rows]).clip(max=len(known) - 1)
            hit = known[order][places] == ids[rows]
            rows, places = rows[hit], order[places[hit]]
            found[rows], times[rows] = True, came[places]
            for row, value in zip(rows.tolist(), values[places].tolist(), strict=True):
                signals[row] = value
        table = table.append_column("signal", pa.array(signals, pa.list_(pa.float64())))
        return table.append_column("resolved", pa.array(times, mask=~found).cast(TIME))
