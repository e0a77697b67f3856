"""The posterior rows behind decisions, reassembled from checkpoints and changed cells.

Dimensions: N decisions, C clusters, E experts, R rows of the posterior in one group.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_posterior.audit.storage.state import Checkpoint
from moe_posterior.audit.storage.tables import Columns, Group
from moe_posterior.checks.soundness import require_sound
from moe_posterior.errors import AuditError, InvalidArgumentError

_MOST_CELLS = 1 << 24  # of one group's rows, in addition to two whole tables: far more than a writer produces


class RowsOfGroup(NamedTuple):
    """Rows of one group, ordered by (cluster, version); a decision uses the latest one up to its version."""

    keys: NDArray[np.int64]  # (R,) cluster * 2^32 + version
    alpha: NDArray[np.float64]  # (R, E)
    beta: NDArray[np.float64]  # (R, E)
    clusterings: int = 1

    def places(self, decisions: Columns) -> NDArray[np.int64]:  # -> (N,)
        """The row of each decision."""
        return np.searchsorted(self.keys, _keys(decisions["cluster"], decisions["version"]), side="right") - 1

    def believed(self, group: Group, kept: NDArray) -> tuple[NDArray, NDArray]:  # (n,) -> 2 x (n, E)
        """The belief behind these decisions of the group: their cluster's row, or several mixed by share in the same order.

        If the group records the belief about the chosen experts, that, with NaN for the others.
        """
        if group.rows("beliefs"):
            experts = group.tables["decisions"]["experts"][kept].astype(np.int64)
            alpha, beta = (np.full((len(experts), self.alpha.shape[1]), np.nan) for _ in range(2))
            for table, name in ((alpha, "alpha"), (beta, "beta")):
                np.put_along_axis(table, experts, group.tables["beliefs"][name][kept], axis=1)
            return alpha, beta
        members = group.members()
        if members is None:
            places = self.places({name: group.tables["decisions"][name][kept] for name in ("cluster", "version")})
            return self.alpha[places], self.beta[places]
        members = {name: values[kept] for name, values in members.items()}
        places, shares = self.places(members), members["share"].astype(np.float64)[:, :, None]
        alpha, beta = (table[places[:, 0]] * shares[:, 0] for table in (self.alpha, self.beta))
        for place in range(1, places.shape[1]):
            alpha += self.alpha[places[:, place]] * shares[:, place]
            beta += self.beta[places[:, place]] * shares[:, place]
        return alpha / self.clusterings, beta / self.clusterings


def _keys(clusters: NDArray, versions: NDArray) -> NDArray[np.int64]:
    return (clusters.astype(np.int64) << 32) + versions.astype(np.int64)


class BeliefState:
    """One source's posterior rows, as of the reader's current position."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        arrays = checkpoint.arrays
        try:
            self.alpha, self.beta = arrays["alpha"].copy(), arrays["beta"].copy()  # (C, E)
            self.versions = arrays["versions"].astype(np.int64)  # (C,)
            self.active: NDArray[np.bool_] = arrays["active"]  # (E,)
        except KeyError as error:
            raise AuditError(f"a checkpoint lacks the array {error}") from error
        shape = self.alpha.shape
        sound = len(shape) == 2 and self.beta.shape == shape and self.alpha.dtype == self.beta.dtype == np.float64
        if not sound or self.versions.shape != shape[:1] or self.active.shape != shape[1:]:
            raise AuditError("a checkpoint's posterior has arrays of different shapes")
        _require_sound({"alpha": self.alpha, "beta": self.beta})
        options = checkpoint.settings.get("options")
        self.clusterings = options.get("clusterings", 1) if isinstance(options, dict) else 1
        if type(self.clusterings) is not int or self.clusterings < 1 or shape[0] % self.clusterings:
            raise AuditError(f"a checkpoint's {shape[0]} clusters do not divide into {self.clusterings!r} clusterings")

    def shown(self) -> tuple[NDArray, NDArray]:  # 2 x (C, E)
        """Alpha and beta of the first clustering, which holds each decision's cluster: it has seen the same outcomes as the others."""
        rows = len(self.alpha) // self.clusterings
        return self.alpha[:rows], self.beta[:rows]

    def advance(self, group: Group) -> RowsOfGroup:
        """Apply a group's changed cells and return the rows its decisions used.

        Raises:
            AuditError: more rows than a writer would put into one group, or invalid pseudo-counts.
        """
        cells, decisions = group.tables["posterior"], group.tables["decisions"]
        _require_sound(cells)
        num_experts = self.alpha.shape[1]
        rested = (cells["cluster"], decisions["cluster"], group.tables["members"]["cluster"])
        clusters = np.unique(np.concatenate(rested)).astype(np.int64)
        bases = (clusters << 32) + self.versions[clusters]
        cell_keys = _keys(cells["cluster"], cells["version"])
        keys = np.union1d(bases, cell_keys)
        if len(keys) * num_experts > _MOST_CELLS + 2 * self.alpha.size:
            raise AuditError("a group holds more posterior rows than a writer would put into one")
        base_places = np.searchsorted(keys, bases)
        cell_places = np.searchsorted(keys, cell_keys)
        last = np.zeros((len(keys), num_experts), dtype=np.int64)
        last[base_places] = base_places[:, None]
        last[cell_places, cells["expert"]] = cell_places
        np.maximum.accumulate(last, axis=0, out=last)  # a base row is set everywhere: nothing leaks between clusters
        rows = []
        for table, name in ((self.alpha, "alpha"), (self.beta, "beta")):
            values = np.empty((len(keys), num_experts))
            values[base_places] = table[clusters]
            values[cell_places, cells["expert"]] = cells[name]
            rows.append(np.take_along_axis(values, last, axis=0))
            if len(keys):
                ends = np.append(base_places[1:], len(keys)) - 1
                table[clusters] = rows[-1][ends]
        if len(keys):
            self.versions[clusters] = keys[np.append(base_places[1:], len(keys)) - 1] & 0xFFFFFFFF
        return RowsOfGroup(keys, rows[0], rows[1], self.clusterings)


def _require_sound(tables: Columns) -> None:
    try:
        require_sound(tables)
    except InvalidArgumentError as error:
        raise AuditError(f"a logged posterior row is invalid: {error}") from error


def belief_of(checkpoint: Checkpoint) -> BeliefState | None:
    """The belief that a checkpoint holds; None for a gate without one."""
    return BeliefState(checkpoint) if "alpha" in checkpoint.arrays else None


def knobs(checkpoint: Checkpoint) -> dict[str, Any]:
    """The knobs in force when the checkpoint was made."""
    found = checkpoint.settings.get("knobs")
    return found if isinstance(found, dict) else {}


class Source(NamedTuple):
    """What a reader knows about one router or gate at one point of the log."""

    name: str
    checkpoint: Checkpoint
    belief: BeliefState | None
