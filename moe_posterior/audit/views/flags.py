"""Which experts fell, from the log alone: flags on every cell and every expert, with the outcome that raised each.

A flag goes up where :class:`~moe_posterior.audit.views.falls.FallTest` finds that outcomes got worse; an expert that was always
bad has not fallen. A flag against the pool also requires that the expert is two standard deviations below the others.

Dimensions: N decisions, C clusters, E experts, R posterior rows.
"""

from collections import deque
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from moe_posterior.audit.belief import RowsOfGroup
from moe_posterior.audit.storage.tables import RESOLVE, ROUTE, Group
from moe_posterior.audit.views.falls import FALSE_ALARMS, FallTest, Turn, uniform

DEVIATIONS = 2.0  # "falling more than two posterior standard deviations below the pool mean"

Against = Literal["pool", "start"]
AGAINST: tuple[Against, ...] = get_args(Against)
Floats = NDArray[np.float64]


def moments(alpha: Floats, beta: Floats) -> tuple[Floats, Floats]:  # (R, E), (R, E) -> 2 x (R, E)
    """Posterior mean and standard deviation."""
    total = alpha + beta
    mean = alpha / total
    return mean, np.sqrt(mean * (1 - mean) / (total + 1))


def below_pool(
    mean: Floats,  # (R, E)
    std: Floats,  # (R, E)
    active: NDArray[np.bool_],  # (E,)
) -> tuple[NDArray[np.bool_], Floats]:  # (R, E), (R, E)
    """Which experts stand more than two posterior standard deviations below the pool, ``mean + 2 std < pool mean``, and the pool mean.

    The pool mean is the plain mean over the active experts of the same row. Weighted by traffic, it would follow the expert with most
    of it, and hide the fall of that very expert.

    Source: *Bayesian Posterior Routing in Multi-Agent Systems*, "Benchmark B": "falling more than two posterior standard deviations
    below the pool mean".

    >>> mean, std = np.array([[0.9, 0.9, 0.1]]), np.full((1, 3), 0.1)
    >>> below_pool(mean, std, np.array([True, True, True]))[0].tolist()
    [[False, False, True]]
    >>> below_pool(mean, std, np.array([True, True, False]))[0].tolist()
    [[False, False, False]]
    """
    pool = mean[:, active].mean(axis=1, keepdims=True) if active.any() else np.zeros((len(mean), 1))
    return active & (mean + DEVIATIONS * std < pool), np.broadcast_to(pool, mean.shape)


class Flag(NamedTuple):
    """One expert that fell, on one cluster or over all."""

    expert: int
    cluster: int | None  # None: over all clusters
    against: Against
    number: int  # decisions in the log before the outcome that raised it; against the pool, before the decision that rested on it
    decision: int  # id of the decision that had this outcome, or of that one
    time: int  # when the outcome came, or the decision was made, microseconds since 1970, UTC
    mean: float  # of the posterior, as the decisions before saw it
    std: float
    level: float  # where the mean stood when the log was told of the expert, or the pool's mean
    times: int  # how often it fell
    ended: int | None  # id of the decision with whose outcome it had risen again, or which saw it so; None: still down
    ended_time: int | None


class Outcomes(NamedTuple):
    """Outcomes of one group, one row a slot, in the order in which they came."""

    cells: NDArray[np.int64]  # (M,) cluster * E + expert
    signal: Floats  # (M,)
    numbers: NDArray[np.int64]  # (M,) decisions before each
    ids: NDArray[np.int64]  # (M,)
    times: NDArray[np.int64]  # (M,)


def outcomes_of(
    group: Group, number: int, known: NDArray[np.bool_], clusters: NDArray, experts: NDArray, shape: tuple[int, ...]
) -> Outcomes:  # (M,), (M,), (M, k)
    """The usable outcomes of a group; ``number`` decisions came before it."""
    calls, outcomes = group.tables["calls"], group.tables["outcomes"]
    routed = np.cumsum(np.where(calls["kind"] == ROUTE, calls["rows"], 0).astype(np.int64))
    at, signal = group.call_rows(RESOLVE), outcomes["signal"]
    rows, slots = np.nonzero((known & (clusters >= 0) & (clusters < shape[0]))[:, None] & ~np.isnan(signal))
    cells = clusters[rows] * shape[1] + experts[rows, slots]
    call = at[rows]
    return Outcomes(cells, signal[rows, slots], number + routed[call], outcomes["id"][rows], calls["time"][call])


class _Raised:
    """The flags of one table of cells."""

    def __init__(self, shape: tuple[int, int], against: Against) -> None:
        self.against: Against = against
        self.up = np.zeros(shape, dtype=np.bool_)
        self._flags: dict[tuple[int, int], Flag] = {}

    def turn(self, cell: tuple[int, int], up: bool, flag: Flag) -> None:
        """Raise a flag, or take it down at the flag's decision."""
        old = self._flags.get(cell)
        self.up[cell] = up
        if up:
            first = flag if old is None else old
            self._flags[cell] = first._replace(times=first.times + 1, ended=None, ended_time=None)
        elif old is not None:
            self._flags[cell] = old._replace(ended=flag.decision, ended_time=flag.time)

    def end(self, experts: list[int], next_id: int, time: int) -> None:
        """End the flags of these experts; they stay in the list."""
        for cell in np.argwhere(self.up[:, experts]).tolist():
            place = cell[0], experts[cell[1]]
            self.up[place] = False
            self._flags[place] = self._flags[place]._replace(ended=next_id, ended_time=time)

    def widen(self, missing: int) -> None:
        """Make room for new experts."""
        self.up = np.pad(self.up, ((0, 0), (0, missing)))

    def flags(self) -> list[Flag]:
        return list(self._flags.values())


class Flagging:
    """All flags of one belief: every cell and every expert over all clusters, fallen, and fallen below the pool.

    An expert that stays as it is, is flagged with probability ``FALSE_ALARMS`` at most however long the log is read: half of that over
    all clusters, the other half shared by its cells.

    Args:
        alpha, beta: the initial belief, after a fit, a warm start or an added expert.
        active: experts that are in the pool.
        initial: pseudo-counts of a cell without evidence; a cell with no more has no record to fall from.
    """

    def __init__(self, alpha: Floats, beta: Floats, active: NDArray[np.bool_], initial: float) -> None:  # (C, E), (E,)
        clusters, experts = alpha.shape
        self.initial, self.active = initial, active
        self.mean, self.std = moments(alpha, beta)  # as decisions saw it
        self.start = self.mean.copy()
        self.tests = self._tests(clusters, experts)
        self.raised = {
            (a, whole): _Raised((1 if whole else clusters, experts), a) for a in AGAINST for whole in (True, False)
        }
        self._vouch(alpha, beta, list(range(experts)))

    def told(
        self, alpha: Floats, beta: Floats, active: NDArray[np.bool_], experts: list[int], next_id: int, time: int
    ) -> None:
        """Continue from this belief and restart for these experts; their flags end and stay in the list."""
        missing = alpha.shape[1] - self.mean.shape[1]
        mean, std = moments(alpha, beta)
        kept = np.setdiff1d(np.arange(self.mean.shape[1]), experts)
        mean[:, kept], std[:, kept] = self.mean[:, kept], self.std[:, kept]
        self.start = np.pad(self.start, ((0, 0), (0, missing)))
        self.start[:, experts] = mean[:, experts]
        self.mean, self.std, self.active = mean, std, active
        if missing:
            self.tests = tuple(new.after(old) for new, old in zip(self._tests(*alpha.shape), self.tests, strict=True))
        for raised in self.raised.values():
            raised.widen(missing)
            raised.end(experts, next_id, time)
        self._vouch(alpha, beta, experts)

    def advance(self, rows: RowsOfGroup, group: Group, number: int, came: Outcomes, threshold: float | None) -> None:
        """Add a group: the rows behind its decisions, and its outcomes; ``number`` decisions came before it."""
        turns = self._learn(came, threshold)
        places, first = np.unique(rows.places(group.tables["decisions"]), return_index=True)
        if turns or any(raised.up.any() for raised in self.raised.values()):
            self._look(rows, group, number, came, turns, places, first)
        elif len(places):  # no expert has fallen: the last row of each cluster is enough
            clusters = rows.keys[places] >> 32
            last = places[np.append(np.flatnonzero(np.diff(clusters)), len(clusters) - 1)]
            self.mean[rows.keys[last] >> 32], self.std[rows.keys[last] >> 32] = moments(
                rows.alpha[last], rows.beta[last]
            )

    def _learn(self, came: Outcomes, threshold: float | None) -> list[tuple[bool, Turn]]:
        """Experts that fell or recovered with these outcomes, over all clusters (True) or on one, in order of time."""
        num_experts = self.mean.shape[1]
        salted = came.ids * num_experts + came.cells % num_experts
        # An outcome between 0 and 1 counts as success or failure, drawn once by its id.
        failed = came.signal < (uniform(salted, 2) if threshold is None else threshold)
        ties = uniform(salted, 1)
        turns = [
            (whole, turn)
            for whole, test in zip((True, False), self.tests, strict=True)
            for turn in test.see(came.cells, failed, ties)
        ]
        return sorted(turns, key=lambda one: one[1].row)

    def _look(
        self,
        rows: RowsOfGroup,
        group: Group,
        number: int,
        came: Outcomes,
        turns: list[tuple[bool, Turn]],
        places: NDArray,
        first: NDArray,
    ) -> None:
        """Row by row, in order of time: raise and end flags according to the outcomes so far."""
        ids, times = group.decision_ids(), group.tables["calls"]["time"][group.call_rows(ROUTE)]
        waiting = deque(turns)
        for at in np.argsort(first).tolist():
            decision = int(first[at])
            while waiting and came.numbers[waiting[0][1].row] <= number + decision:
                self._turn(came, *waiting.popleft())
            row = places[at]
            cluster = int(rows.keys[row] >> 32)
            self.mean[cluster], self.std[cluster] = moments(rows.alpha[row : row + 1], rows.beta[row : row + 1])
            self._against_pool(cluster, (number + decision, int(ids[decision]), int(times[decision])))
        for one in waiting:
            self._turn(came, *one)

    def _turn(self, came: Outcomes, whole: bool, turn: Turn) -> None:
        num_experts = self.mean.shape[1]
        cell = (0, turn.group) if whole else (turn.group // num_experts, turn.group % num_experts)
        at = int(came.numbers[turn.row]), int(came.ids[turn.row]), int(came.times[turn.row])
        self.raised["start", whole].turn(cell, turn.fell, self._flag("start", whole, cell, at))

    def flags(self) -> list[Flag]:
        """Every flag, in the order they were raised."""
        found = [flag for raised in self.raised.values() for flag in raised.flags()]
        return sorted(found, key=lambda flag: (flag.number, flag.cluster is not None, flag.expert, flag.cluster or 0))

    def low(self) -> NDArray[np.bool_]:  # (C, E)
        """Experts below the pool that have not fallen."""
        return below_pool(self.mean, self.std, self.active)[0] & ~self.raised["pool", False].up

    def _against_pool(self, cluster: int, at: tuple[int, int, int]) -> None:
        for whole, row in ((True, 0), (False, cluster)):
            raised, start = self.raised["pool", whole], self.raised["start", whole]
            if not (start.up[row].any() or raised.up[row].any()):
                continue
            mean, std = (table[row : row + 1] for table in self._table(whole))
            up = start.up[row] & below_pool(mean, std, self.active)[0][0]
            for expert in np.flatnonzero(up != raised.up[row]).tolist():
                cell = row, expert
                raised.turn(cell, bool(up[expert]), self._flag("pool", whole, cell, at))

    def _flag(self, against: Against, whole: bool, cell: tuple[int, int], at: tuple[int, int, int]) -> Flag:
        (mean, std), (place, expert) = self._table(whole), cell
        level = self.start[:, expert].mean() if whole else self.start[cell]
        if against == "pool":
            level = below_pool(mean, std, self.active)[1][cell]
        shown = float(mean[cell]), float(std[cell]), float(level)
        return Flag(expert, None if whole else place, against, *at, *shown, 0, None, None)

    def _table(self, whole: bool) -> tuple[Floats, Floats]:  # 2 x (C, E), or 2 x (1, E)
        """The plain mean over clusters treats the cells as independent: where evidence is pooled, its std comes out too small."""
        if not whole:
            return self.mean, self.std
        return self.mean.mean(axis=0)[None], np.sqrt((self.std**2).sum(axis=0))[None] / len(self.mean)

    def _vouch(self, alpha: Floats, beta: Floats, experts: list[int]) -> None:
        known = alpha + beta > self.initial * (1 + 1e-9)
        for test in self.tests:
            test.told(np.where(known, alpha, 0.0), np.where(known, beta, 0.0), experts)

    @staticmethod
    def _tests(clusters: int, experts: int) -> tuple[FallTest, ...]:
        cells = np.arange(clusters * experts).reshape(clusters, experts)
        share = FALSE_ALARMS / 2
        return FallTest(cells % experts, share), FallTest(cells, share / clusters)
