"""Turns recorded items into the frames to write: concatenation, differences, order.

Dimensions: N decisions, M outcomes, R captured posterior rows, C clusters, E experts, k experts per decision.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_posterior.audit.storage.frames import Kind
from moe_posterior.audit.storage.state import Checkpoint, encode_checkpoint, encode_json
from moe_posterior.audit.storage.tables import REFUSE, RESOLVE, ROUTE, Columns, Group, empty_tables, encode


class One(NamedTuple):
    """A single decision, as plain Python values: the cheapest to record."""

    source: int
    time: int
    first: int
    steps: int
    cluster: int
    distance: float
    version: int
    experts: list[int]
    scores: list[float]
    flags: int


class Many(NamedTuple):
    """A batch of decisions with consecutive ids."""

    source: int
    time: int
    first: int
    steps: int
    columns: Columns
    members: Columns | None = None  # of queries in several clusters, J rows a decision
    beliefs: Columns | None = None  # of decisions by a learned prior, one row each


class Rows(NamedTuple):
    """Posterior rows that the next decision uses."""

    source: int
    clusters: NDArray | list[int]  # (R,)
    versions: NDArray | list[Any]  # (R,)
    alpha: NDArray  # (R, E), less the base
    beta: NDArray
    base: tuple[NDArray, NDArray] | None  # 2 x (C, E): the prior, still to be added
    whole: bool  # alpha and beta hold all C rows

    def counts(self) -> tuple[NDArray, NDArray]:  # 2 x (R, E)
        """Alpha and beta less the base."""
        return (self.alpha[self.clusters], self.beta[self.clusters]) if self.whole else (self.alpha, self.beta)


class Resolved(NamedTuple):
    """Outcomes that the belief has accepted."""

    source: int
    time: int
    steps: int
    ids: NDArray  # (M,)
    signal: NDArray  # (M, k)


class Refused(NamedTuple):
    """Outcomes that the belief has refused, one row a slot."""

    source: int
    time: int
    ids: NDArray  # (M,)
    slots: NDArray  # (M,)
    signal: NDArray  # (M,)
    reason: str


class Marked(NamedTuple):
    """A checkpoint; one of a later generation than the segment begins a new segment."""

    source: int
    checkpoint: Checkpoint
    generation: int


class Event(NamedTuple):
    """A rare event."""

    source: int
    value: dict[str, Any]


Item = One | Many | Rows | Resolved | Refused | Marked | Event


class Raw(NamedTuple):
    """A frame that is not in the chain yet."""

    kind: Kind
    payload: bytes
    rotate: bool = False  # begins a new segment


def changed_cells(
    clusters: NDArray,  # (R,)
    versions: NDArray,  # (R,)
    alpha: NDArray,  # (R, E)
    beta: NDArray,  # (R, E)
    known: tuple[NDArray, NDArray],  # 2 x (C, E), brought up to date
) -> Columns:
    """The cells in which each captured row differs from its cluster's row before.

    >>> known = np.ones((1, 3)), np.ones((1, 3))
    >>> alpha, beta = np.array([[1.0, 2, 1], [1, 2, 4]]), np.ones((2, 3))
    >>> cells = changed_cells(np.array([0, 0]), np.array([5, 6]), alpha, beta, known)
    >>> cells["version"].tolist(), cells["expert"].tolist(), cells["alpha"].tolist()
    ([5, 6], [1, 2], [2.0, 4.0])
    """
    order = np.argsort(clusters, kind="stable")
    clusters, versions, alpha, beta = clusters[order], versions[order], alpha[order], beta[order]
    before = [np.empty_like(alpha), np.empty_like(beta)]
    starts = np.flatnonzero(np.diff(clusters, prepend=-1))
    for previous, now, table in zip(before, (alpha, beta), known, strict=True):
        previous[1:] = now[:-1]
        previous[starts] = table[clusters[starts]]
        ends = np.append(starts[1:], len(clusters)) - 1
        table[clusters[ends]] = now[ends]
    rows, experts = np.nonzero((alpha != before[0]) | (beta != before[1]))
    return {
        "cluster": clusters[rows].astype(np.uint32),
        "version": versions[rows].astype(np.uint32),
        "expert": experts.astype(np.uint16),
        "alpha": alpha[rows, experts],
        "beta": beta[rows, experts],
    }


class _Gathering:
    """One source's items of one group."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, int, int, int]] = []  # kind, rows, time, first, steps
        self.ones: list[One] = []
        self.decisions: list[Columns] = []
        self.members: list[Columns] = []
        self.beliefs: list[Columns] = []
        self.rows: list[Rows] = []
        self.resolved: list[Resolved] = []
        self.refused: list[Refused] = []

    def add(self, item: Item) -> None:
        if isinstance(item, One):
            self.calls.append((ROUTE, 1, item.time, item.first, item.steps))
            self.ones.append(item)
        elif isinstance(item, Many):
            self._close_ones()
            self.calls.append((ROUTE, len(item.columns["cluster"]), item.time, item.first, item.steps))
            self.decisions.append(item.columns)
            if item.members is not None:
                self.members.append(item.members)
            if item.beliefs is not None:
                self.beliefs.append(item.beliefs)
        elif isinstance(item, Rows):
            self.rows.append(item)
        elif isinstance(item, Resolved):
            self.calls.append((RESOLVE, len(item.ids), item.time, 0, item.steps))
            self.resolved.append(item)
        elif isinstance(item, Refused):
            self.calls.append((REFUSE, len(item.ids), item.time, 0, 0))
            self.refused.append(item)

    def group(self, source: int, top_k: int, known: tuple[NDArray, NDArray] | None) -> Group:
        self._close_ones()
        tables = empty_tables(top_k)
        if self.calls:
            columns = zip(*self.calls, strict=True)
            tables["calls"] = {
                name: np.array(values, dtype=old.dtype)
                for (name, old), values in zip(tables["calls"].items(), columns, strict=True)
            }
            _carry_forward(tables["calls"])
        if self.decisions:
            tables["decisions"] = {
                name: np.concatenate([part[name] for part in self.decisions]) for name in tables["decisions"]
            }
        for table, parts in (("members", self.members), ("beliefs", self.beliefs)):
            if parts:
                tables[table] = {name: np.concatenate([part[name] for part in parts]) for name in tables[table]}
        if self.rows and known is not None:
            clusters = np.concatenate([rows.clusters for rows in self.rows])
            versions = np.concatenate([rows.versions for rows in self.rows])
            counts = zip(*(rows.counts() for rows in self.rows), strict=True)
            alpha, beta = (np.concatenate(tables_of) for tables_of in counts)
            base = self.rows[0].base  # one for all: a new one comes with a checkpoint, which ends the group
            if base is not None:
                alpha, beta = base[0][clusters] + alpha, base[1][clusters] + beta
            tables["posterior"] = changed_cells(clusters, versions, alpha, beta, known)
        if self.resolved:
            tables["outcomes"] = {
                "id": np.concatenate([item.ids for item in self.resolved]),
                "signal": np.concatenate([item.signal for item in self.resolved]),
            }
        if self.refused:
            tables["refusals"] = {
                "id": np.concatenate([item.ids for item in self.refused]),
                "slot": np.concatenate([item.slots for item in self.refused]).astype(np.uint16),
                "signal": np.concatenate([item.signal for item in self.refused]),
                "reason": np.array([item.reason for item in self.refused for _ in item.ids], dtype=object),
            }
        return Group(source, top_k, tables)

    def _close_ones(self) -> None:
        if not self.ones:
            return
        columns = list(zip(*self.ones, strict=True))
        names = {"cluster": 4, "distance": 5, "version": 6, "experts": 7, "scores": 8, "flags": 9}
        dtypes = {"distance": np.float32, "scores": np.float32, "experts": np.uint16, "flags": np.uint8}
        self.decisions.append({n: np.array(columns[i], dtype=dtypes.get(n, np.uint32)) for n, i in names.items()})
        self.ones = []


def _carry_forward(calls: Columns) -> None:
    """Calls without ids or steps repeat those of the call before: zero differences compress to nothing."""
    for name, has in (("first", calls["kind"] == ROUTE), ("steps", calls["kind"] != REFUSE)):
        last = np.maximum.accumulate(np.where(has, np.arange(len(has)), 0))
        calls[name] = calls[name][last]


class Collector:
    """Turns items into frames; remembers the posterior rows already written, to write only changes."""

    def __init__(self) -> None:
        self.generation = 0
        self._known: dict[int, tuple[NDArray, NDArray]] = {}
        self._top_k: dict[int, int] = {}

    def frames(self, items: list[Item]) -> list[Raw]:
        """The frames of these items, in their order."""
        frames: list[Raw] = []
        open_groups: dict[int, _Gathering] = {}
        for item in items:
            if not isinstance(item, Marked | Event):
                open_groups.setdefault(item.source, _Gathering()).add(item)
                continue
            self._close(open_groups, frames)
            if isinstance(item, Event):
                frames.append(Raw(Kind.EVENT, encode_json(item.value)))
            else:
                frames.append(self._mark(item))
        self._close(open_groups, frames)
        return frames

    def _mark(self, item: Marked) -> Raw:
        rotate, self.generation = item.generation > self.generation, max(self.generation, item.generation)
        self._top_k[item.source] = item.checkpoint.settings["top_k"]
        if "alpha" in item.checkpoint.arrays:
            self._known[item.source] = tuple(item.checkpoint.arrays[name].copy() for name in ("alpha", "beta"))  # type: ignore[assignment]
        return Raw(Kind.CHECKPOINT, encode_checkpoint(item.checkpoint), rotate)

    def _close(self, open_groups: dict[int, _Gathering], frames: list[Raw]) -> None:
        groups = [
            gathering.group(source, self._top_k[source], self._known.get(source))
            for source, gathering in open_groups.items()
        ]
        if groups:
            frames.append(Raw(Kind.GROUP, encode(groups)))
        open_groups.clear()
