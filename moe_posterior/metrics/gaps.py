"""Binned calibration gaps of one or two arms, with what is needed to know how far chance moves them.

Dimensions: N predictions of a set, K classes, n independent rows, J evaluation sets, A arms, M bins in use over all arms and sets.
An interval of a calibration error depends on the predictions only through a few sums per bin, so after one pass over the rows the
cost is the same for a hundred rows as for a million.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_posterior.bins import bin_indices
from moe_posterior.checks.validation import integers
from moe_posterior.metrics.calibration import read_predictions, top_label

CHUNK = 2**21  # entries of a dense block of row sums: 16 MB, whatever the number of rows

Sets = Sequence[tuple[Any, Any]]  # pairs of (N, K) probabilities or (N,) confidences, and (N,) labels


@dataclass(frozen=True, eq=False)
class GapSums:
    """Sums over the bins in use; an arm's calibration error is the mean over its sets of the sum over their bins."""

    rows: int  # n: rows that vary independently; predictions about one row count as one
    arm: Tensor  # (M,) int64
    weight: Tensor  # (M,) 1 / (J · N): turns a sum over predictions into a part of the arm's mean error
    count: Tensor  # (M,) predictions
    confidence: Tensor  # (M,) sum of confidences
    correct: Tensor  # (M,) correct predictions, or the sum of their grades
    spread: Tensor  # (M,) sum of c(1 − c): the variance of ``correct`` if the confidences are right
    inflation: Tensor  # (M,) variance over that of as many independent right-or-wrong answers
    correlation: Tensor  # (M, M) of the gaps over rows

    @property
    def gap(self) -> Tensor:  # (M,)
        """Confidence − accuracy of a bin times the bin's share: their absolute values add up to the plain error."""
        return (self.confidence - self.correct) * self.weight

    @property
    def said(self) -> Tensor:  # (M,)
        """Mean confidence of each bin."""
        return self.confidence / self.count

    def noise(self, accuracy: Tensor) -> Tensor:  # (M,) -> (M,)
        """Standard deviation of each gap if its bin has this accuracy."""
        return self.weight * (self.count * accuracy * (1 - accuracy)).clamp(min=0).sqrt() * self.inflation.sqrt()

    @property
    def share(self) -> Tensor:  # (M,) adds up to 1 in each arm
        """Share of an arm's predictions in each bin, averaged over sets."""
        return self.count * self.weight


def moments_of(confidence: Tensor, correct: Tensor, n_bins: int) -> Tensor:  # (N,), (N,) float64 -> (6, B)
    """Sums over the rows in each bin, which add up over chunks of rows: all of :class:`GapSums` but the correlations.

    The six are the count, the confidences c, the grades r, c(1 − c), r² and (c − r)².
    """
    return _moments(confidence, correct, bin_indices(confidence, n_bins), n_bins)


def gap_sums(arms: Sequence[Sets], n_bins: int, rows: Any = None, totals: Sequence[Tensor] | None = None) -> GapSums:
    """The sums of each arm's evaluation sets, in bins of equal width.

    Sets of equal size hold the same rows in the same order, in every arm; sets of different sizes hold different rows.

    Args:
        arms: the sets of each arm, at least one set each.
        n_bins: bins on [0, 1].
        rows: (N,) data row behind each prediction, if sets hold copies of rows; by default all differ.
        totals: if the sets are samples, the :func:`moments_of` all rows of each set, arm after arm. The sums are then exact, and only
            the correlations are those of the sample.

    Raises:
        InvalidArgumentError: a shape, dtype or value that does not fit, naming the argument.
    """
    sets = [(arm, len(own), read_predictions(*one)) for arm, own in enumerate(arms) for one in own]
    judged = [top_label(preds.cpu(), target.cpu()) for _, _, (preds, target) in sets]
    sizes = [len(said) for said, _ in judged]
    row, total = _numbered(sizes, rows)
    confidence, correct = (torch.cat(parts) for parts in zip(*judged, strict=True))
    place = torch.cat([bin_indices(said, n_bins) + n_bins * index for index, (said, _) in enumerate(judged)])
    sampled = _moments(confidence, correct, place, len(sets) * n_bins)
    full = sampled if totals is None else torch.cat(tuple(totals), dim=1)
    count, said, seen, spread, grades, _ = full
    alone = sampled[5]
    used = count > 0
    products = _products(confidence - correct, place, row, used, total, independent=len(sets) == 1 and rows is None)
    binary = seen * (1 - seen / count)  # sum of squares about the mean, if every answer is right or wrong
    graded = torch.where(binary > 1e-9, (grades - seen.square() / count) / binary, 1.0)[used]
    diagonal = products.diagonal()
    copies = torch.where(alone[used] > 1e-12, diagonal / alone[used], 1.0)
    scale = diagonal.clamp(min=1e-300).sqrt()
    correlation = (products / scale / scale[:, None]).fill_diagonal_(1.0)
    which = torch.tensor([arm for arm, *_ in sets]).repeat_interleave(n_bins)[used]
    whole = sizes if totals is None else [float(one[0].sum()) for one in totals]
    weights = [1 / (own * max(size, 1)) for (_, own, *_), size in zip(sets, whole, strict=True)]
    total = total if totals is None else round(total * sum(whole) / max(sum(sizes), 1))
    weight = torch.tensor(weights, dtype=torch.float64).repeat_interleave(n_bins)[used]
    kept = [part[used] for part in (count, said, seen, spread)]
    return GapSums(total, which, weight, kept[0], kept[1], kept[2], kept[3], copies * graded, correlation)


def _moments(confidence: Tensor, correct: Tensor, place: Tensor, places: int) -> Tensor:  # -> (6, places)
    columns = [torch.ones_like(correct), confidence, correct, confidence * (1 - confidence), correct.square()]
    columns.append((confidence - correct).square())
    full = torch.zeros(len(columns), places, dtype=torch.float64)
    return full.index_add_(1, place, torch.stack(columns))


def _numbered(sizes: Sequence[int], rows: Any) -> tuple[Tensor, int]:  # (P,), and how many different ones
    """Index of the independent row behind every prediction."""
    if rows is None:
        kinds = {size: torch.arange(size) for size in sizes}
    else:
        known = integers("rows", rows, (sizes[0],)).cpu().unique(return_inverse=True)[1]
        kinds = dict.fromkeys(sizes, known)
    starts, total = {}, 0
    for size, own in kinds.items():
        starts[size] = total
        total += int(own.max()) + 1 if size else 0
    return torch.cat([kinds[size] + starts[size] for size in sizes]), total


def _products(
    residual: Tensor,  # (P,) of all predictions of all sets
    place: Tensor,  # (P,) bin among those of all sets
    row: Tensor,  # (P,) in [0, rows)
    used: Tensor,  # bool, one a bin
    rows: int,
    *,
    independent: bool,
) -> Tensor:  # (M, M) sums over rows of the products of their summed residuals
    column = used.cumsum(0)[place] - 1
    size = int(used.sum())
    if independent:
        return torch.zeros(size, dtype=torch.float64).index_add_(0, column, residual.square()).diag()
    total = torch.zeros(size, size, dtype=torch.float64)
    for block in _dense_blocks(residual, column, row, rows, size):
        total += block.T @ block
    return total


def _dense_blocks(residual: Tensor, column: Tensor, row: Tensor, rows: int, size: int) -> Iterator[Tensor]:
    order = row.argsort(stable=True)
    residual, column, row = residual[order], column[order], row[order]
    step = max(1, CHUNK // max(size, 1))
    for start in range(0, rows, step):
        first, last = torch.searchsorted(row, torch.tensor([start, start + step])).tolist()
        block = torch.zeros(min(step, rows - start) * size, dtype=torch.float64)
        cell = (row[first:last] - start) * size + column[first:last]
        yield block.index_add_(0, cell, residual[first:last]).view(-1, size)
