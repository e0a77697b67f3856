"""Reading a log: its records in order, each verified before it is read. The tables an auditor asks for are made in ``entries.py``.

Dimensions: N decisions, M outcomes, E experts, k experts per decision.
"""

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_posterior.audit.belief import RowsOfGroup, Source, belief_of
from moe_posterior.audit.entries import (
    CELLS,
    OUTCOMES,
    TIME,
    Outcomes,
    cells_of_checkpoint,
    cells_of_group,
    decision_schema,
    decision_table,
    outcome_table,
    selected,
)
from moe_posterior.audit.storage.arrow import pyarrow as pa
from moe_posterior.audit.storage.chain import Chain
from moe_posterior.audit.storage.compact import read_compacted
from moe_posterior.audit.storage.files import DISK, FileSystem
from moe_posterior.audit.storage.frames import Frame, Kind
from moe_posterior.audit.storage.marks import Note
from moe_posterior.audit.storage.state import Checkpoint, decode_checkpoint, decode_event, encode_json
from moe_posterior.audit.storage.tables import Group, decode
from moe_posterior.errors import AuditError

Record = Group | Checkpoint | dict[str, Any]  # a dict is an event


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

    Reading while the writer runs is fine: an iteration ends where the log ended when it got there.
    """

    def __init__(self, folder: Path, key: bytes | None, *, start: int = 0, files: FileSystem = DISK) -> None:
        self.folder, self.key, self.start, self.files = folder, key, start, files
        self.chain: Chain | None = None  # of the last iteration
        self.sources: dict[int, Source] = {}  # as of the last record returned

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
        """The verified frames, without those of compacted segments."""
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
        """Events other than decisions and outcomes, oldest first: columns time, source, event, detail (JSON)."""
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
        arrays = [
            pa.array(columns[0], TIME),
            pa.array(columns[1], pa.string()),
            pa.array(columns[2], pa.string()),
        ]
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
        them, of several clusters mixed by its shares; by a learned prior those of the chosen, NaN for the others), signal (one a
        slot, null while there is no outcome) and resolved (when it came). Means, alpha and beta are null where the source has no
        belief; means also where a far token was given less than its cluster's (``novelty="discount"`` without a learned prior).

        Args:
            ids, expert, cluster: only these decisions; ``expert`` is one that was chosen.
            last: only this many of the latest.
            posterior: False leaves means, alpha and beta out: for wide pools they are nearly all of the table.
        """
        parts: deque[Any] = deque()
        rows = 0
        outcomes = Outcomes()
        for group, source, belief in self.groups():
            outcomes.add(group)
            kept = selected(group, ids, expert, cluster)
            if not len(kept):
                continue
            parts.append(decision_table(group, source, belief if posterior else None, kept))
            rows += len(kept)
            while last is not None and rows - parts[0].num_rows >= last:
                rows -= parts.popleft().num_rows
        table = pa.concat_tables(parts) if parts else decision_schema().empty_table()
        if last is not None and rows > last:
            table = table.slice(rows - last)
        table = outcomes.join(table)
        return table.drop_columns(["source_number"] if posterior else ["source_number", "means", "alpha", "beta"])

    def outcomes(self) -> Any:
        """Outcomes, one row a decision and slot, in the order they came.

        Columns: source, id, slot, time, signal, threshold, outcome (the signal binarised; null where it counted fractionally or
        was NaN), accepted, reason (of a refusal).
        """
        tables = [outcome_table(group, source) for group, source, _ in self.groups()]
        return pa.concat_tables(tables) if tables else OUTCOMES.empty_table()

    def posterior(self) -> Any:
        """The cells of the posterior, one row a change: source, cluster, version, expert, alpha, beta; checkpoints come whole."""
        parts = []
        for record in self:
            if isinstance(record, Checkpoint) and "alpha" in record.arrays:
                parts.append(cells_of_checkpoint(record))
            elif isinstance(record, Group) and record.rows("posterior"):
                name = self.sources[record.source].name if record.source in self.sources else ""
                parts.append(cells_of_group(record, name))
        return pa.concat_tables(parts) if parts else CELLS.empty_table()


def _check_fit(group: Group, checkpoint: Checkpoint) -> None:
    """Raise AuditError if a group names clusters or experts that its source does not have."""
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
            raise AuditError(f"a group of {said['name']!r} names {column} {int(values.max())}; there are {size}")
    if group.top_k != said["top_k"]:
        raise AuditError(f"a group of {said['name']!r} has {group.top_k} experts a decision, not {said['top_k']}")
