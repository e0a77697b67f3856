"""How competence went, from the log alone: sampled trajectories of every cell, and when an expert fell below the pool.

Dimensions: N decisions, C clusters, E experts, R posterior rows, S samples.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_posterior.audit.belief import RowsOfGroup
from moe_posterior.audit.tables import ROUTE, Group

DEVIATIONS = 2.0  # "falling more than two posterior standard deviations below the pool mean"
POINTS = 240  # samples of a trajectory at most
_FEWEST = 8
_VALUES = 1 << 21  # alphas of all samples together, about; at least _FEWEST samples whatever the number of cells
_CHUNK = 1 << 20  # cells looked at together

Floats = NDArray[np.float64]


def moments(alpha: Floats, beta: Floats) -> tuple[Floats, Floats]:  # (R, E), (R, E) -> 2 x (R, E)
    """Posterior mean and standard deviation."""
    total = alpha + beta
    mean = alpha / total
    return mean, np.sqrt(mean * (1 - mean) / (total + 1))


def below_pool(
    alpha: Floats,  # (R, E)
    beta: Floats,  # (R, E)
    active: NDArray[np.bool_],  # (E,)
) -> NDArray[np.bool_]:  # (R, E)
    """Which experts stand more than two posterior standard deviations below the pool: ``mean + 2 std < pool mean``.

    The pool mean is the plain mean over the active experts of the same row. Weighted by traffic it would follow the expert that gets
    most of it, and the fall of just that expert would hide itself.

    Source: *Bayesian Posterior Routing in Multi-Agent Systems*, "Benchmark B": "falling more than two posterior standard deviations
    below the pool mean".

    >>> alpha, beta = np.array([[9.0, 9.0, 1.0]]), np.array([[1.0, 1.0, 9.0]])
    >>> below_pool(alpha, beta, np.array([True, True, True])).tolist()
    [[False, False, True]]
    >>> below_pool(alpha, beta, np.array([True, True, False])).tolist()
    [[False, False, False]]
    """
    if not active.any():
        return np.zeros(alpha.shape, dtype=np.bool_)
    mean, std = moments(alpha, beta)
    pool = mean[:, active].mean(axis=1, keepdims=True)
    return active & (mean + DEVIATIONS * std < pool)


class Flag(NamedTuple):
    """One expert on one cluster that stood below the pool at some decision, though not from the start."""

    expert: int
    cluster: int
    number: int  # of the first decision that rested on such a row, counted from 0 in the log
    decision: int  # its id
    time: int  # microseconds since 1970, UTC
    mean: float
    std: float
    pool: float  # mean of the active experts
    fell: bool  # its own mean had gone down since the log was told of it; False: the others rose
    times: int  # how often it went below
    ended: int | None  # id of the first decision after it last came back up; None: still below
    ended_time: int | None


class Falls:
    """Which cells went below the pool, when first, and when they came back; memory for every cell once.

    What a checkpoint says because somebody said so (a fit, a warm start, a change of the pool) is where cells start from: low there is
    low from the start and no fall.
    """

    def __init__(self, alpha: Floats, beta: Floats, active: NDArray[np.bool_]) -> None:  # (C, E), (C, E), (E,)
        shape = alpha.shape
        self.low = np.zeros(shape, dtype=np.bool_)
        self._first = np.full(shape, -1, dtype=np.int64)  # number of the decision
        self._ids, self._when = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        self._mean, self._std, self._pool = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        self._fell = np.zeros(shape, dtype=np.bool_)
        self._times = np.zeros(shape, dtype=np.int64)
        self._ended, self._ended_time = np.full(shape, -1, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        self.active = active
        self.told(alpha, beta, active, 0, 0)

    def told(self, alpha: Floats, beta: Floats, active: NDArray[np.bool_], next_id: int, time: int) -> None:
        """Begin anew from these rows; what was flagged stays known."""
        self._grow(len(active))
        before = self.low
        self.active, self._start = active, moments(alpha, beta)[0]
        self.low = below_pool(alpha, beta, active)
        clusters, experts = np.nonzero(before & ~self.low)
        self._end(clusters, experts, next_id, time)

    def advance(self, group: Group, rows: RowsOfGroup, number: int) -> None:
        """Look at the rows that the group's decisions rested on; ``number`` decisions came before."""
        places, first = np.unique(rows.places(group.tables["decisions"]), return_index=True)
        ids, calls = group.decision_ids(), group.call_rows(ROUTE)
        times = group.tables["calls"]["time"]
        step = max(1, _CHUNK // len(self.active))
        for begin in range(0, len(places), step):
            kept, at = places[begin : begin + step], first[begin : begin + step]
            self._look(rows.keys[kept] >> 32, rows.alpha[kept], rows.beta[kept], number + at, ids[at], times[calls[at]])

    def flags(self) -> list[Flag]:
        """Every flag, in the order in which they went up."""
        clusters, experts = np.nonzero(self._first >= 0)
        order = np.lexsort((experts, clusters, self._first[clusters, experts]))
        return [self._flag(int(c), int(e)) for c, e in zip(clusters[order], experts[order], strict=True)]

    def _flag(self, cluster: int, expert: int) -> Flag:
        at = cluster, expert
        still = bool(self.low[at]) or self._ended[at] < 0
        return Flag(
            expert,
            cluster,
            int(self._first[at]),
            int(self._ids[at]),
            int(self._when[at]),
            float(self._mean[at]),
            float(self._std[at]),
            float(self._pool[at]),
            bool(self._fell[at]),
            int(self._times[at]),
            None if still else int(self._ended[at]),
            None if still else int(self._ended_time[at]),
        )

    def _look(
        self, clusters: NDArray, alpha: Floats, beta: Floats, numbers: NDArray, ids: NDArray, times: NDArray
    ) -> None:  # (R,), (R, E), (R, E), (R,), (R,), (R,); ordered by cluster, then version
        low = below_pool(alpha, beta, self.active)
        before = np.empty_like(low)
        before[1:] = low[:-1]
        starts = np.flatnonzero(np.diff(clusters, prepend=-1))
        before[starts] = self.low[clusters[starts]]
        ends = np.append(starts[1:], len(clusters)) - 1
        self.low[clusters[ends]] = low[ends]
        rows, experts = np.nonzero(low & ~before)
        np.add.at(self._times, (clusters[rows], experts), 1)
        rows, experts = rows[::-1], experts[::-1]  # of several assignments to a cell the last one counts: the earliest
        new = self._first[clusters[rows], experts] < 0
        rows, experts = rows[new], experts[new]
        at = clusters[rows], experts
        mean, std = moments(alpha[rows], beta[rows])
        picked = np.arange(len(rows)), experts
        self._first[at], self._ids[at], self._when[at] = numbers[rows], ids[rows], times[rows]
        self._mean[at], self._std[at] = mean[picked], std[picked]
        self._pool[at] = mean[:, self.active].mean(axis=1) if len(rows) else 0.0
        self._fell[at] = mean[picked] < self._start[at]
        rows, experts = np.nonzero(before & ~low)
        self._end(clusters[rows], experts, ids[rows], times[rows])

    def _end(self, clusters: NDArray, experts: NDArray, ids: NDArray | int, times: NDArray | int) -> None:
        self._ended[clusters, experts], self._ended_time[clusters, experts] = ids, times

    def _grow(self, num_experts: int) -> None:
        missing = num_experts - len(self.active)
        if missing > 0:
            for name, table in vars(self).items():
                if isinstance(table, np.ndarray) and table.ndim == 2:
                    filler = -1 if name in ("_first", "_ended") else 0
                    setattr(self, name, np.pad(table, ((0, 0), (0, missing)), constant_values=filler))


class Samples(NamedTuple):
    """Posterior rows at S moments, evenly spaced over the decisions of a log but for the last one."""

    numbers: NDArray[np.int64]  # (S,) decisions made until then
    times: NDArray[np.int64]  # (S,) microseconds since 1970, UTC
    alpha: NDArray[np.float32]  # (S, C, E), NaN before an expert came
    beta: NDArray[np.float32]  # (S, C, E)


class Sampler:
    """Keeps at most so many samples of a belief, as the decisions of a log saw it, however long the log is.

    It samples every decision, until it has too many; then it drops every other sample and takes half as many from there on.

    Args:
        alpha, beta: the belief before the first decision.
        time: then.
        points: samples at most, 240 by default; fewer where there are very many cells, never below 8.
    """

    def __init__(self, alpha: Floats, beta: Floats, time: int, points: int = POINTS) -> None:  # (C, E), (C, E)
        self.points = max(_FEWEST, min(points, _VALUES // alpha.size))
        self.stride, self.count = 1, 0
        self._samples: list[tuple[int, int, NDArray, NDArray]] = []
        self.told(alpha, beta, time)
        self._keep(time)

    def told(self, alpha: Floats, beta: Floats, time: int) -> None:
        """Go on from these rows."""
        self.alpha, self.beta, self._time = alpha.copy(), beta.copy(), time

    def advance(self, group: Group, rows: RowsOfGroup) -> None:
        """Take in a group's decisions."""
        clusters = group.tables["decisions"]["cluster"]
        places = rows.places(group.tables["decisions"])
        times = group.tables["calls"]["time"][group.call_rows(ROUTE)]
        begin = 0
        while begin < len(places):
            end = min(len(places), begin + self.stride - self.count % self.stride)
            self._see(clusters[begin:end], places[begin:end], rows)
            self.count += end - begin
            self._time = int(times[end - 1])
            if self.count % self.stride == 0:
                self._keep(self._time)
            begin = end

    def samples(self) -> Samples:
        """What was kept, and where the log ends."""
        kept = list(self._samples)
        if kept[-1][0] != self.count:
            kept.append(self._now(self._time))
        numbers, times, alpha, beta = zip(*kept, strict=True)
        width = self.alpha.shape[1]
        tables = [
            np.stack([np.pad(t, ((0, 0), (0, width - t.shape[1])), constant_values=np.nan) for t in part])
            for part in (alpha, beta)
        ]
        return Samples(np.array(numbers), np.array(times), *tables)

    def _see(self, clusters: NDArray, places: NDArray, rows: RowsOfGroup) -> None:
        last = np.full(len(self.alpha), -1, dtype=np.int64)
        np.maximum.at(last, clusters, places)  # a cluster's later versions lie in later places
        seen = np.flatnonzero(last >= 0)
        self.alpha[seen], self.beta[seen] = rows.alpha[last[seen]], rows.beta[last[seen]]

    def _now(self, time: int) -> tuple[int, int, NDArray, NDArray]:
        return self.count, time, self.alpha.astype(np.float32), self.beta.astype(np.float32)

    def _keep(self, time: int) -> None:
        self._samples.append(self._now(time))
        if len(self._samples) > self.points:
            self._samples = self._samples[::2]
            self.stride *= 2
