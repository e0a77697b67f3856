"""The tables for an auditor: decisions with their beliefs and outcomes, outcomes alone, cells of the posterior.

Dimensions: N decisions, E experts, k experts per decision.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_posterior.audit.belief import RowsOfGroup, Source, knobs
from moe_posterior.audit.storage.arrow import pyarrow as pa
from moe_posterior.audit.storage.state import Checkpoint
from moe_posterior.audit.storage.tables import ABSTAIN, EXPLORED, REFUSE, RESOLVE, ROUTE, Group

TIME = pa.timestamp("us", tz="UTC")
CELLS = pa.schema(
    [
        ("source", pa.string()),
        ("cluster", pa.uint32()),
        ("version", pa.uint32()),
        ("expert", pa.uint16()),
        ("alpha", pa.float64()),
        ("beta", pa.float64()),
    ]
)
OUTCOMES = pa.schema(
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


def cells_of_checkpoint(checkpoint: Checkpoint) -> Any:
    """All cells of the posterior, as a checkpoint holds them."""
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
    return pa.table({name: pa.array(column) for name, column in columns.items()}, schema=CELLS)


def cells_of_group(group: Group, name: str) -> Any:
    """The cells of the posterior that a group's outcomes changed, of the source of this name."""
    columns = group.tables["posterior"]
    arrays = {"source": np.full(group.rows("posterior"), name, dtype=object), **columns}
    return pa.table({n: pa.array(a) for n, a in arrays.items()}, schema=CELLS)


def selected(group: Group, ids: list[int] | None, expert: int | None, cluster: int | None) -> NDArray[np.int64]:
    """Which of a group's decisions were asked for."""
    decisions = group.tables["decisions"]
    keep = np.ones(group.rows("decisions"), dtype=np.bool_)
    if ids is not None:
        keep &= np.isin(group.decision_ids(), ids)
    if expert is not None:
        keep &= (decisions["experts"] == expert).any(axis=1)
    if cluster is not None:
        keep &= decisions["cluster"] == cluster
    return np.flatnonzero(keep)


def decision_schema() -> Any:
    """The columns of decisions, before their outcomes are joined."""
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


def decision_table(group: Group, source: Source | None, belief: RowsOfGroup | None, kept: NDArray) -> Any:
    """Entries for these decisions of a group."""
    schema, rows = decision_schema(), len(kept)
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
        blended = source is None or source.checkpoint.settings.get("options", {}).get("novelty") == "discount"
        if not blended or group.rows("beliefs"):
            won, lost = (np.take_along_axis(table, experts.astype(np.int64), axis=1) for table in (alpha, beta))
            beliefs["means"] = won / (won + lost)
    for name, values in beliefs.items():
        kind = schema.field(name).type
        arrays[name] = pa.nulls(rows, kind) if values is None else _lists(values, kind)
    return pa.table([arrays[name] for name in schema.names], schema=schema)


def outcome_table(group: Group, source: Source | None) -> Any:
    """Outcomes of a group, accepted and refused, in the order they came."""
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
    return pa.concat_tables(parts).sort_by("call").drop_columns(["call"]).cast(OUTCOMES)


class Outcomes:
    """Accepted outcomes, to be joined to their decisions."""

    def __init__(self) -> None:
        self._parts: dict[int, list[tuple[NDArray, NDArray, NDArray]]] = {}

    def add(self, group: Group) -> None:
        """Keep the outcomes of a group."""
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
