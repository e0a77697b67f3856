"""Who went low, from the log alone: flags on every cell and every expert, with the decision at which each went up.

Dimensions: N decisions, C clusters, E experts, R posterior rows.
"""

from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from moe_posterior.audit.belief import RowsOfGroup
from moe_posterior.audit.tables import ROUTE, Group

DEVIATIONS = 2.0  # "falling more than two posterior standard deviations below the pool mean"
_CHUNK = 1 << 20  # cells looked at together

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

    The pool mean is the plain mean over the active experts of the same row. Weighted by traffic it would follow the expert that gets
    most of it, and the fall of just that expert would hide itself.

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
    """One expert that stood low at some decision, on one cluster or over all, though not from the start."""

    expert: int
    cluster: int | None  # None: its mean over all clusters
    against: Against
    number: int  # of the first decision that rested on such a row, counted from 0 in the log
    decision: int  # its id
    time: int  # microseconds since 1970, UTC
    mean: float
    std: float
    level: float  # more than two stds above the mean: the pool's mean, or where the expert stood at the start
    fell: bool  # its own mean was more than a std below the highest it had had; False: the others rose
    times: int  # how often it went below
    ended: int | None  # id of the first decision after it last came back up; None: still low
    ended_time: int | None


class Falls:
    """Which cells of a table of competence went low, when first, and when they came back; memory for every cell once.

    Args:
        mean, std: where the cells start from, because somebody said so: a fit, a warm start, a newcomer. Who is low there has not
            fallen.
        active: experts that are in the pool.
        against: what two standard deviations are counted from: ``"pool"``, see :func:`below_pool`, or ``"start"``, the cell's own mean
            here.
    """

    def __init__(self, mean: Floats, std: Floats, active: NDArray[np.bool_], against: Against) -> None:  # (C, E)
        shape = mean.shape
        self.against: Against = against
        self.active = active
        self._first = np.full(shape, -1, dtype=np.int64)  # number of the decision
        self._ids, self._when = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        self._mean, self._std, self._level = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        self._fell = np.zeros(shape, dtype=np.bool_)
        self._times = np.zeros(shape, dtype=np.int64)
        self._open = np.zeros(shape, dtype=np.bool_)
        self._ended, self._ended_time = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        self._start, self._peak = mean.copy(), mean.copy()
        self.low = self._compared(np.arange(len(mean)), mean, std)[0]

    def told(
        self, mean: Floats, std: Floats, active: NDArray[np.bool_], experts: list[int], next_id: int, time: int
    ) -> None:
        """Begin anew with these experts, from this table, perhaps with more columns; what was flagged ends and stays known."""
        self._grow(len(active))
        self.active = active
        self._start[:, experts] = self._peak[:, experts] = mean[:, experts]
        self.low[:, experts] = self._compared(np.arange(len(mean)), mean, std)[0][:, experts]
        clusters, columns = np.nonzero(self._open[:, experts])
        self._end(clusters, np.array(experts, dtype=np.int64)[columns], next_id, time)
        self._open[:, experts] = False

    @property
    def low_from_start(self) -> NDArray[np.bool_]:  # (C, E)
        """Who is low without having fallen."""
        return self.low & ~self._open

    def look(
        self, clusters: NDArray, mean: Floats, std: Floats, numbers: NDArray, ids: NDArray, times: NDArray
    ) -> None:  # (R,), (R, E), (R, E), (R,), (R,), (R,)
        """Look at rows of the table, ordered by cluster and then by time, each with the first decision that rested on it."""
        low, level = self._compared(clusters, mean, std)
        before, ends = _before(clusters, low, self.low)
        self.low[clusters[ends]] = low[ends]
        peak = _highest(clusters, mean, self._peak)
        self._peak[clusters[ends]] = peak[ends]
        rows, experts = np.nonzero(low & ~before)
        np.add.at(self._times, (clusters[rows], experts), 1)
        self._open[clusters[rows], experts] = True
        rows, experts = rows[::-1], experts[::-1]  # of several assignments to a cell the last one counts: the earliest
        new = self._first[clusters[rows], experts] < 0
        rows, experts = rows[new], experts[new]
        at, picked = (clusters[rows], experts), (rows, experts)
        self._first[at], self._ids[at], self._when[at] = numbers[rows], ids[rows], times[rows]
        self._mean[at], self._std[at], self._level[at] = mean[picked], std[picked], level[picked]
        self._fell[at] = mean[picked] + std[picked] < peak[picked]
        rows, experts = np.nonzero(before & ~low)
        self._end(clusters[rows], experts, ids[rows], times[rows])
        self._open[clusters[ends]] &= low[ends]

    def flags(self, *, over_all: bool = False) -> list[Flag]:
        """Every flag, in the order in which they went up; ``over_all``: the table's one row speaks of all clusters."""
        clusters, experts = np.nonzero(self._first >= 0)
        order = np.lexsort((experts, clusters, self._first[clusters, experts]))
        pairs = zip(clusters[order].tolist(), experts[order].tolist(), strict=True)
        return [self._flag(cluster, expert, None if over_all else cluster) for cluster, expert in pairs]

    def _compared(self, clusters: NDArray, mean: Floats, std: Floats) -> tuple[NDArray[np.bool_], Floats]:
        if self.against == "pool":
            return below_pool(mean, std, self.active)
        start = self._start[clusters]
        return self.active & (mean + DEVIATIONS * std < start), start

    def _flag(self, row: int, expert: int, cluster: int | None) -> Flag:
        at = row, expert
        still = bool(self._open[at])
        return Flag(
            expert,
            cluster,
            self.against,
            int(self._first[at]),
            int(self._ids[at]),
            int(self._when[at]),
            float(self._mean[at]),
            float(self._std[at]),
            float(self._level[at]),
            bool(self._fell[at]),
            int(self._times[at]),
            None if still else int(self._ended[at]),
            None if still else int(self._ended_time[at]),
        )

    def _end(self, clusters: NDArray, experts: NDArray, ids: NDArray | int, times: NDArray | int) -> None:
        self._ended[clusters, experts], self._ended_time[clusters, experts] = ids, times

    def _grow(self, num_experts: int) -> None:
        missing = num_experts - len(self.active)
        if missing > 0:
            for name, table in vars(self).items():
                if isinstance(table, np.ndarray) and table.ndim == 2:
                    filler = -1 if name == "_first" else 0
                    setattr(self, name, np.pad(table, ((0, 0), (0, missing)), constant_values=filler))


def _before(clusters: NDArray, rows: NDArray, table: NDArray) -> tuple[NDArray, NDArray]:
    """For rows ordered by cluster, each one's predecessor there, the first of them from the table; and where clusters end."""
    before = np.empty_like(rows)
    before[1:] = rows[:-1]
    starts = np.flatnonzero(np.diff(clusters, prepend=-1))
    before[starts] = table[clusters[starts]]
    return before, np.append(starts[1:], len(clusters)) - 1


def _highest(clusters: NDArray, mean: Floats, peak: Floats) -> Floats:  # (R,), (R, E), (C, E) -> (R, E)
    """For rows ordered by cluster and time, the highest mean so far, beginning with the table's."""
    lift = 2.0 * np.cumsum(np.diff(clusters, prepend=-1) != 0)[:, None]  # above all that came before in another cluster
    return np.maximum(np.maximum.accumulate(mean + lift, axis=0) - lift, peak[clusters])


class Flagging:
    """All flags of one belief: every cell and every expert over all clusters, against the pool and against its own start.

    An expert's mean over all clusters is the plain one, and its variance takes the cells for independent: where evidence is pooled
    between clusters, they are not, and the std comes out too small.
    """

    def __init__(self, alpha: Floats, beta: Floats, active: NDArray[np.bool_]) -> None:  # (C, E), (C, E), (E,)
        self.mean, self.std = moments(alpha, beta)  # as decisions saw it
        self.cells = [Falls(self.mean, self.std, active, against) for against in AGAINST]
        self.experts = [Falls(*self._over_all(), active, against) for against in AGAINST]

    def told(
        self, alpha: Floats, beta: Floats, active: NDArray[np.bool_], experts: list[int], next_id: int, time: int
    ) -> None:
        """Go on from this belief, and begin anew with these experts; their flags end and stay known."""
        mean, std = moments(alpha, beta)
        kept = np.setdiff1d(np.arange(self.mean.shape[1]), experts)
        mean[:, kept], std[:, kept] = self.mean[:, kept], self.std[:, kept]
        self.mean, self.std = mean, std
        for falls in self.cells:
            falls.told(self.mean, self.std, active, experts, next_id, time)
        for falls in self.experts:
            falls.told(*self._over_all(), active, experts, next_id, time)

    def advance(self, group: Group, rows: RowsOfGroup, number: int) -> None:
        """Look at the rows that the group's decisions rested on; ``number`` decisions came before."""
        places, first = np.unique(rows.places(group.tables["decisions"]), return_index=True)
        in_time = np.argsort(first)
        ids, times = group.decision_ids(), group.tables["calls"]["time"][group.call_rows(ROUTE)]
        step = max(1, _CHUNK // self.mean.shape[1])
        for begin in range(0, len(places), step):
            chunk = np.sort(in_time[begin : begin + step])  # by cluster, then by version, which is by time
            at, clusters = first[chunk], rows.keys[places[chunk]] >> 32
            mean, std = moments(rows.alpha[places[chunk]], rows.beta[places[chunk]])
            for falls in self.cells:
                falls.look(clusters, mean, std, number + at, ids[at], times[at])
            order = np.argsort(at)
            whole = self._followed(clusters, mean, std, order)
            at = at[order]
            for falls in self.experts:
                falls.look(np.zeros(len(at), dtype=np.int64), *whole, number + at, ids[at], times[at])

    def flags(self) -> list[Flag]:
        """Every flag, in the order in which they went up."""
        found = [flag for falls in self.experts for flag in falls.flags(over_all=True)]
        found += [flag for falls in self.cells for flag in falls.flags()]
        return sorted(found, key=lambda flag: flag.number)

    def _over_all(self) -> tuple[Floats, Floats]:  # 2 x (1, E)
        clusters = len(self.mean)
        return self.mean.mean(axis=0)[None], np.sqrt((self.std**2).sum(axis=0))[None] / clusters

    def _followed(
        self, clusters: NDArray, mean: Floats, std: Floats, order: NDArray
    ) -> tuple[Floats, Floats]:  # -> 2 x (R, E)
        """The experts' means over all clusters after each of the rows, in the order of time."""
        count, results = len(self.mean), []
        for table, values in ((self.mean, mean), (self.std, std)):
            power = 1 if table is self.mean else 2
            before, ends = _before(clusters, values, table)
            steps = (values**power - before**power)[order]
            results.append((table**power).sum(axis=0) + np.cumsum(steps, axis=0))
            table[clusters[ends]] = values[ends]
        return results[0] / count, np.sqrt(results[1].clip(min=0)) / count
