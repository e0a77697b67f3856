"""Running sums over the rows of one model on one evaluation set, and a random sample of the rows, in bounded memory.

Dimensions: n rows, B bins, G values of a column of groups, C configurations.
"""

from collections.abc import Mapping

import numpy as np
import torch

from moe_posterior.bins import bin_indices
from moe_posterior.evaluation.columns import Columns, joined
from moe_posterior.evaluation.priority import Smallest, priorities
from moe_posterior.evaluation.routes import MOST
from moe_posterior.metrics import BinSums
from moe_posterior.prediction import Totals
from moe_posterior.report.evaluation import scored_rows

__all__ = ["BLOCK", "Running"]

BLOCK = 65_536  # rows added up at a time, whatever pieces they come in, so that the sums are the same to the last bit
SCORES, MOMENTS = 3, 6


class Running:
    """What is kept of the rows seen so far."""

    def __init__(self, sample: int, n_bins: int, seed: int) -> None:
        self.sample, self.n_bins, self.seed = sample, n_bins, seed
        self.n = 0
        self.classes = True  # class probabilities, not confidences
        self._pending: list[tuple[Columns, np.ndarray]] = []  # rows and their ids
        self._waiting = 0
        self._sums: dict[str | None, np.ndarray] = {
            None: np.zeros((SCORES + MOMENTS, n_bins))
        }  # group column -> (9, G · B)
        self._configurations = np.zeros((3, n_bins))  # (3, C · B)
        self._smallest = Smallest(sample)
        self._held: list[tuple[Columns, np.ndarray, np.ndarray]] = []  # rows, ids, priorities

    def add(self, columns: Columns, ids: np.ndarray) -> None:  # (n,) uint64
        """Take some more rows."""
        while len(columns):
            room = BLOCK - self._waiting
            self._pending.append((columns[:room], ids[:room]))
            self._waiting += min(room, len(columns))
            columns, ids = columns[room:], ids[room:]
            if self._waiting == BLOCK:
                self._flush()

    def finish(self) -> tuple[Columns, np.ndarray]:
        """The sampled rows with their ids, in the order of the ids; all rows where there are no more than the sample holds."""
        self._flush()
        self._compact()
        columns, ids, _ = self._held[0]
        order = np.argsort(ids, kind="stable")
        return columns[order], ids[order]

    @property
    def rows(self) -> int:
        """Rows taken so far."""
        return self.n + self._waiting

    @property
    def overall(self) -> Totals:
        """Sums over all rows."""
        return _totals(self._sums[None])

    def totals(self, column: str) -> list[Totals]:
        """Sums over the rows of each value of a column of groups, by code."""
        sums = self._sums.get(column, np.zeros((SCORES + MOMENTS, 0)))
        return [_totals(part) for part in np.split(sums, max(1, sums.shape[1] // self.n_bins), axis=1) if part.size]

    def configurations(self) -> Mapping[int, BinSums]:
        """Sums of each configuration that occurs, by code."""
        parts = np.split(self._configurations, self._configurations.shape[1] // self.n_bins, axis=1)
        found = {code: torch.from_numpy(part.copy())[:, None] for code, part in enumerate(parts) if part[0].any()}
        return {code: BinSums(part[1], part[2], part[0]) for code, part in found.items()}

    def _flush(self) -> None:
        if not self._pending:
            return
        columns = joined([part for part, _ in self._pending])
        ids = np.concatenate([part for _, part in self._pending])
        self._pending, self._waiting = [], 0
        self.n += len(columns)
        self.classes = columns.probs.ndim == 2
        self._add_up(columns)
        ranks = priorities(ids, self.seed, "sample")
        chosen = self._smallest.offer(ranks)
        self._held.append((columns[chosen], ids[chosen], ranks[chosen]))
        if sum(len(part) for part, *_ in self._held) > 2 * self.sample + BLOCK:
            self._compact()

    def _add_up(self, columns: Columns) -> None:
        answers, scores = scored_rows(torch.from_numpy(columns.probs), torch.from_numpy(columns.target))
        said, right = answers.confidence.numpy(), answers.correct.numpy()
        bins = bin_indices(answers.confidence, self.n_bins).numpy()
        count = np.ones_like(said)
        values = [*scores.numpy().T, count, said, right, said * (1 - said), right**2, (said - right) ** 2]
        for name, codes in ((None, np.zeros_like(bins)), *columns.groups.items()):
            self._sums[name] = _added(self._sums.get(name), values, codes * self.n_bins + bins, self.n_bins)
        if columns.configuration is not None:
            known = columns.configuration < MOST
            place = (columns.configuration * self.n_bins + bins)[known]
            some = [value[known] for value in (count, said, right)]
            self._configurations = _added(self._configurations, some, place, self.n_bins)

    def _compact(self) -> None:
        columns = joined([part for part, *_ in self._held])
        ids, ranks = (np.concatenate([part[i] for part in self._held]) for i in (1, 2))
        if len(ranks) > self.sample:
            chosen = np.sort(np.argpartition(ranks, self.sample - 1)[: self.sample])
            columns, ids, ranks = columns[chosen], ids[chosen], ranks[chosen]
        self._held = [(columns, ids, ranks)]


def _added(sums: np.ndarray | None, values: list[np.ndarray], place: np.ndarray, n_bins: int) -> np.ndarray:
    """Sums grown to hold every place, with the values added."""
    known = 0 if sums is None else sums.shape[1]
    size = max(known, (int(place.max()) // n_bins + 1) * n_bins if len(place) else 0)
    found = np.stack([np.bincount(place, value, minlength=size) for value in values])
    if sums is not None:
        found[:, :known] += sums
    return found


def _totals(sums: np.ndarray) -> Totals:  # (9, B)
    return Totals(torch.from_numpy(sums[:SCORES].sum(axis=1)), torch.from_numpy(sums[SCORES:].copy()))
