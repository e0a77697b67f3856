"""The capital of every stream that a monitor watches, advanced many rows at a time.

Dimensions: J streams (everything, then one per configuration in the order in which they came), S directions, D sizes of a bet,
N rows, T rows given to streams: each row to everything and to its configuration.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_posterior.checks.validation import described
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.monitoring.bets import (
    DIRECTIONS,
    SIZES,
    Array,
    Index,
    log_payoffs,
    log_start_weight,
    running_capital,
)


class Rows(NamedTuple):
    """Rows in the order in which they came."""

    expected: Array  # (N,) accuracy under the null
    tolerance: Array  # (N,) by which it may be off
    outcome: Array  # (N,)
    slot: Index  # (N,) stream of the row's configuration; -1: none
    number: Index  # (N,) rows that came before, known or not

    def part(self, rows: slice) -> "Rows":
        """Some of the rows."""
        return Rows(self.expected[rows], self.tolerance[rows], self.outcome[rows], self.slot[rows], self.number[rows])


class Streams:
    """Capital, and what is needed to say since when and by how much; a few hundred bytes a stream whatever the traffic."""

    def __init__(self, scale: float) -> None:
        self.scale = scale
        bets = (0, len(DIRECTIONS), len(SIZES))
        self.capital = np.zeros(bets)  # log, of the mixture over starts
        self.best = np.zeros(bets)  # log, of the best single start
        self.since = np.zeros(bets, np.int64)  # number of the row with which the best start began
        self.stretch = np.zeros((*bets, 3))  # since the best start: rows, gap, squares
        self.total = np.zeros((0, 3))  # since the last reset: rows, gap, squares
        self.seen = np.zeros(0, np.int64)  # rows ever, which the start weights count

    ARRAYS = ("capital", "best", "since", "stretch", "total", "seen")

    def __len__(self) -> int:
        return len(self.seen)

    def grow(self, size: int) -> None:
        """Make room for this many streams; new ones have no capital."""
        extra = size - len(self)
        for name in self.ARRAYS:
            old = getattr(self, name)
            fill = -np.inf if name in ("capital", "best") else 0
            setattr(self, name, np.concatenate([old, np.full((extra, *old.shape[1:]), fill, old.dtype)]))

    def restore(self, tables: Mapping[str, NDArray[Any]], size: int) -> None:
        """Take over stored arrays of this many streams.

        Raises:
            InvalidArgumentError: an array of another shape, or with NaN.
        """
        for name in self.ARRAYS:
            own = getattr(self, name)
            table = np.array(tables[name], own.dtype)
            if table.shape != (size, *own.shape[1:]) or np.isnan(table).any():
                raise InvalidArgumentError(
                    f"{name} must be of shape {(size, *own.shape[1:])} without NaN; got {described(table)}"
                )
            setattr(self, name, table)

    def clear(self, streams: Index) -> None:
        """Take the capital of these streams; what has not begun to bet yet stays, so the error budget is not spent twice."""
        self.capital[streams] = self.best[streams] = -np.inf
        for name in ("since", "stretch", "total"):
            getattr(self, name)[streams] = 0

    def evidence(self) -> Array:  # (J, S)
        """Log e-value of each stream and direction: the mean over sizes of a bet."""
        return _mean_of_sizes(self.capital)

    def play(self, rows: Rows, threshold: Array) -> int:  # (J, S) log thresholds
        """Advance by the rows up to the first that lifts a stream over its threshold, that one included; the number of rows taken."""
        given = _Given(rows)
        bets = len(DIRECTIONS) * len(SIZES)
        pays = log_payoffs(rows.expected, rows.tolerance, rows.outcome)[given.row]  # (T, S, D)
        place = self.seen[given.stream] + given.rank + 1
        start = log_start_weight(place.astype(np.float64), self.scale)
        before = self.capital[given.stream[given.first]].reshape(-1, bets)
        flat = running_capital(pays.reshape(-1, bets), start, before, given.segment)
        running = flat.reshape(pays.shape)
        needed = threshold[given.stream]
        over = (running.max(axis=2) >= needed).any(1)  # a mean reaches no more than the largest
        over[over] = (_mean_of_sizes(running[over]) >= needed[over]).any(1)
        taken = len(rows.outcome)
        if over.any():
            taken = int(given.row[over].min()) + 1
            kept = given.row < taken
            given, pays, start, running = given.part(kept), pays[kept], start[kept], running[kept]
        self._settle(rows, given, pays, start, running)
        return taken

    def _settle(self, rows: Rows, given: "_Given", pays: Array, start: Array, running: Array) -> None:
        first = given.first
        last = np.append(first[1:], len(given.segment)) - 1
        stream = given.stream[first]
        self.capital[stream] = running[last]
        gap = (rows.expected - rows.outcome)[given.row]
        sums = np.stack([np.ones_like(gap), gap, gap**2], axis=1)  # (T, 3)
        whole = np.add.reduceat(sums, first)
        self.total[stream] += whole
        self.seen[stream] += last - first + 1
        self._settle_best(rows, given, pays, start, sums, first, last)

    def _settle_best(
        self, rows: Rows, given: "_Given", pays: Array, start: Array, sums: Array, first: Index, last: Index
    ) -> None:
        stream = given.stream[first]
        paid = np.cumsum(pays, axis=0)
        before = paid - pays
        rest = paid[last][given.segment] - before  # (T, S, D) log payoff from each row to its segment's end
        fresh = start[:, None, None] + rest
        best_fresh = np.maximum.reduceat(fresh, first)  # (G, S, D)
        old = self.best[stream] + rest[first]
        is_best = fresh == best_fresh[given.segment]
        row = np.where(is_best, np.arange(len(start))[:, None, None], -1)
        begin = np.maximum.reduceat(row, first)  # (G, S, D)
        behind = np.cumsum(sums, axis=0)
        own = behind[last][:, None, None] - behind[begin] + sums[begin]  # (G, S, D, 3)
        longer = self.stretch[stream] + (behind[last] - behind[first] + sums[first])[:, None, None]
        anew = best_fresh > old
        self.best[stream] = np.where(anew, best_fresh, old)
        self.since[stream] = np.where(anew, rows.number[given.row[begin]], self.since[stream])
        self.stretch[stream] = np.where(anew[..., None], own, longer)


class _Given:
    """Which row goes to which stream: segments of adjacent rows of one stream, in order."""

    def __init__(self, rows: Rows) -> None:
        order = np.argsort(rows.slot, kind="stable")
        order = order[rows.slot[order] >= 0]
        everything = np.arange(len(rows.slot))
        self.row = np.concatenate([everything, order])
        self.stream = np.concatenate([np.zeros_like(everything), rows.slot[order]])
        self._number()

    def part(self, kept: NDArray[np.bool_]) -> "_Given":
        found = object.__new__(_Given)
        found.row, found.stream = self.row[kept], self.stream[kept]
        found._number()
        return found

    def _number(self) -> None:
        fresh = np.diff(self.stream, prepend=-1) != 0
        self.first = np.flatnonzero(fresh)
        self.segment = np.cumsum(fresh) - 1
        self.rank = np.arange(len(self.row)) - self.first[self.segment]


def _mean_of_sizes(capital: Array) -> Array:  # (..., D) -> (...)
    return np.logaddexp.reduce(capital, axis=-1) - np.log(len(SIZES))
