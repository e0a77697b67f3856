"""Tests continuously whether an expert got worse, from its outcomes, at a given rate of false alarms.

Dimensions: C clusters, E experts, M outcomes.

Each outcome is compared with the record of its own cell, the outcomes before it there and what the log was told of it, by a conformal
p-value: the failures among record and outcome, and where it stands among them, ties broken by a hash of the decision's id. While a
cell's outcomes are exchangeable the p-values are uniform, whatever its competence. A bet against that, half ``1 / (2 sqrt(p))`` and
half on p below a quarter, grows when failures come more often than the record has them. The bets from every possible change on are
averaged, with weights that add to one over an endless log, so the average exceeds 1 / level with probability level at most, ever.

Source: Vovk et al., *Testing exchangeability on-line* (2003); Shin, Ramdas and Rinaldo, *E-detectors* (2023); Ville's inequality.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FALSE_ALARMS = (
    0.01  # probability that an expert that stays as it is is ever flagged: half over all clusters, half on any of them
)
_BACK = 0.05  # level at which a fallen one has risen again
_RARE, _LARGE, _SMALL = (
    0.25,
    1.6,
    0.4 / 3,
)  # half of a bet of 3.2 to 0.27 that p lies below a quarter; its integral is a half
_ODD = np.uint64(0x9E3779B97F4A7C15)
Floats = NDArray[np.float64]


class Turn(NamedTuple):
    """A cell or expert that fell, or rose again."""

    group: int
    fell: bool
    row: int  # of the outcome that showed it


class FallTest:
    """One test a group of cells: it looks for a fall, then for a rise, then for a fall again; each change begins a new record.

    Args:
        groups: the group of each cell, numbers from 0.
        level: probability that a group that stays as it is is ever said to have fallen.

    >>> test = FallTest(np.zeros((1, 1), dtype=np.int64), 0.01)
    >>> failed = np.arange(80) >= 60
    >>> test.see(np.zeros(80, dtype=np.int64), failed, uniform(np.arange(80), 1))[0]
    Turn(group=0, fell=True, row=69)
    """

    def __init__(self, groups: NDArray[np.int64], level: float) -> None:  # (C, E)
        self.groups, self.level = groups, level
        self._record = np.zeros((2, groups.size))  # successes and failures of each cell
        count = int(groups.max()) + 1
        self.fallen = np.zeros(count, dtype=np.bool_)
        self._evidence = np.full(count, -np.inf)  # log of the averaged bets
        self._seen = np.zeros(count, dtype=np.int64)

    def after(self, before: "FallTest") -> "FallTest":
        """This test continued for a pool that has grown."""
        experts = before.groups.shape[1]
        old = self.groups[:, :experts].reshape(-1)
        places = np.arange(self.groups.size).reshape(self.groups.shape)[:, :experts].reshape(-1)
        self._record[:, places] = before._record
        for name in ("fallen", "_evidence", "_seen"):
            getattr(self, name)[old] = getattr(before, name)[before.groups.reshape(-1)]
        return self

    def told(self, successes: Floats, failures: Floats, experts: list[int]) -> None:  # (C, E), (C, E)
        """Restart for these experts, from a given record."""
        for table, given in zip(self._record.reshape(2, *self.groups.shape), (successes, failures), strict=True):
            table[:, experts] = given[:, experts]
        for group in np.unique(self.groups[:, experts]).tolist():
            self.fallen[group], self._evidence[group], self._seen[group] = False, -np.inf, 0

    def see(self, cells: NDArray[np.int64], failed: NDArray[np.bool_], ties: Floats) -> list[Turn]:  # (M,), (M,), (M,)
        """Add outcomes in order of arrival: their cells, whether they were failures, and what breaks ties."""
        group = self.groups.reshape(-1)[cells]
        order = np.argsort(group, kind="stable")
        starts = np.flatnonzero(np.diff(group[order], prepend=-1))
        turns = []
        for rows in np.split(order, starts[1:]) if len(order) else []:
            turns += self._see_group(int(group[rows[0]]), rows, cells[rows], failed[rows], ties[rows])
        return sorted(turns, key=lambda turn: turn.row)

    def _see_group(
        self, group: int, rows: NDArray, cells: NDArray, failed: NDArray[np.bool_], ties: Floats
    ) -> list[Turn]:
        turns, begin = [], 0
        while begin < len(rows):
            here = slice(begin, None)
            evidence = self._bets(group, cells[here], failed[here], ties[here])
            limit = -np.log(_BACK if self.fallen[group] else self.level)
            crossed = np.flatnonzero(evidence >= limit)
            end = len(rows) if not len(crossed) else begin + int(crossed[0]) + 1
            if not len(crossed):
                kept = slice(begin, end)
                np.add.at(self._record, (failed[kept].astype(np.int64), cells[kept]), 1.0)
                self._evidence[group] = evidence[-1]
                self._seen[group] += end - begin
            else:
                self.fallen[group] ^= True
                turns.append(Turn(group, bool(self.fallen[group]), int(rows[end - 1])))
                self._record[:, self.groups.reshape(-1) == group] = 0.0
                self._evidence[group], self._seen[group] = -np.inf, 0
            begin = end
        return turns

    def _bets(self, group: int, cells: NDArray, failed: NDArray[np.bool_], ties: Floats) -> Floats:  # -> (M,), logs
        order = np.argsort(cells, kind="stable")
        before = np.empty((2, len(cells)))
        for kind, came in enumerate((~failed[order], failed[order])):
            total = np.cumsum(came) - came
            starts = np.flatnonzero(np.diff(cells[order], prepend=-1))
            within = total - np.repeat(total[starts], np.diff(np.append(starts, len(cells))))
            before[kind, order] = self._record[kind, cells[order]] + within
        successes, failures = before
        size = successes + failures + 1
        p = np.where(failed, ties * (failures + 1), failures + ties * (successes + 1)) / size
        if self.fallen[group]:
            p = 1 - p
        steps = np.cumsum(np.log(0.25 / np.sqrt(p) + np.where(p < _RARE, _LARGE, _SMALL)))
        first = self._seen[group] + 1 + np.arange(len(p))
        weights = np.log(
            1 / np.log2(first + 1) - 1 / np.log2(first + 2)
        )  # of a change at that outcome: they add to one
        begun = np.logaddexp.accumulate(np.append(self._evidence[group], weights - np.append(0.0, steps[:-1])))
        return steps + begun[1:]


def uniform(ids: NDArray, salt: int) -> Floats:
    """Numbers in (0, 1) that depend on the id alone: splitmix64.

    >>> uniform(np.array([1, 2]), 1).round(3).tolist() == uniform(np.array([1, 2]), 1).round(3).tolist()
    True
    """
    with np.errstate(over="ignore"):
        z = (ids.astype(np.uint64) + np.uint64(salt << 40)) * _ODD + _ODD
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return ((z >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53
