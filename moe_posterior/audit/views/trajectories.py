"""Competence over time, from the log alone: sampled trajectories of every cell.

Dimensions: N decisions, C clusters, E experts, S samples.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_posterior.audit.belief import RowsOfGroup
from moe_posterior.audit.storage.tables import ROUTE, Group

POINTS = 240  # samples of a trajectory at most
_FEWEST = 8
_VALUES = 1 << 21  # alphas of all samples together, about; at least _FEWEST samples whatever the number of cells

Floats = NDArray[np.float64]


class Samples(NamedTuple):
    """Posterior rows at S moments, evenly spaced over the decisions of a log except for the last."""

    numbers: NDArray[np.int64]  # (S,) decisions made until then
    times: NDArray[np.int64]  # (S,) microseconds since 1970, UTC
    alpha: NDArray[np.float32]  # (S, C, E), NaN before an expert came
    beta: NDArray[np.float32]  # (S, C, E)


class Sampler:
    """Samples of a belief as the decisions of a log saw it, at most a fixed number however long the log is.

    It samples every decision until it has too many; then it drops every other sample and samples half as often.

    Args:
        alpha, beta: the belief before the first decision.
        time: at that moment.
        points: samples at most, 240 by default; fewer where there are very many cells, never below 8.
    """

    def __init__(self, alpha: Floats, beta: Floats, time: int, points: int = POINTS) -> None:  # (C, E), (C, E)
        self.points = max(_FEWEST, min(points, _VALUES // alpha.size))
        self.stride, self.count = 1, 0
        self._samples: list[tuple[int, int, NDArray, NDArray]] = []
        self.told(alpha, beta, time)

    def told(self, alpha: Floats, beta: Floats, time: int) -> None:
        """Continue from these rows."""
        self.alpha, self.beta, self._time = alpha.copy(), beta.copy(), time
        if not self.count:
            self._samples = [self._now(time)]

    def advance(self, group: Group, rows: RowsOfGroup) -> None:
        """Add a group's decisions."""
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
        """The samples kept, and the end of the log."""
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
        np.maximum.at(last, clusters, places)  # a cluster's later versions are in later places
        seen = np.flatnonzero(last >= 0)
        self.alpha[seen], self.beta[seen] = rows.alpha[last[seen]], rows.beta[last[seen]]

    def _now(self, time: int) -> tuple[int, int, NDArray, NDArray]:
        return self.count, time, self.alpha.astype(np.float32), self.beta.astype(np.float32)

    def _keep(self, time: int) -> None:
        self._samples.append(self._now(time))
        if len(self._samples) > self.points:
            self._samples = self._samples[::2]
            self.stride *= 2
