"""The test that intervals of the calibration error invert: the debiased statistic against its distribution under a supposed truth.

Dimensions: A arms, M bins in use, Q supposed truths, S draws, n independent rows.

Many truths have one calibration error, and the statistic's noise and remaining bias differ between them. Two stand for all: the
likeliest one (the gaps of the data, shrunk or stretched) and the one with the same gap everywhere. An interval holds what either
one allows. Draws are a scrambled Sobol sequence: the tails of a thousand independent draws would be off by a seventh, in every interval
alike.

Source: inversion at an estimated nuisance parameter is the hybrid resampling of Chuang & Lai 2000, *Hybrid Resampling Methods for
Confidence Intervals*; the statistic is the debiased l1 error of Kumar, Liang & Ma 2019, *Verified Uncertainty Calibration*, with its
normal expectation in closed form; sharing out the tails near 0 follows Feldman & Cousins 1998, *Unified Approach to the Classical
Statistical Analysis of Small Signals*.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_posterior.metrics.ece import expected_absolute
from moe_posterior.metrics.gaps import GapSums

BISECTIONS = 12
REACH = 8.0  # standard deviations beyond the estimate to search for an end
SLACK = 4.0  # standard deviations by which a bin's share may exceed the one seen, far from what it says
FEW = 10  # with fewer draws in a tail, a normal tail is used


@dataclass(frozen=True, eq=False)
class GapTest:
    """The test behind intervals: the statistic of the data, and draws of it under any supposed truth."""

    sums: GapSums
    noise: Tensor  # (M,) standard deviation of each gap, held fixed
    root: Tensor  # (M, M) symmetric root of the correlation
    inverse: Tensor  # (M, M) its pseudo-inverse
    draws: Tensor  # (S, M) standard normal, spread evenly

    @classmethod
    def start(cls, sums: GapSums, draws: int, seed: int) -> "GapTest":
        """From sums; the draws are the same for the same seed and number of bins."""
        count = sums.count / sums.inflation.clamp(min=1e-12)
        mixed = (sums.correct / sums.count * count + 2 * sums.said) / (
            count + 2
        )  # a bin without errors still has noise
        values, vectors = torch.linalg.eigh(sums.correlation)
        kept = values.clamp(min=0).sqrt()
        back = torch.where(kept > 1e-6, 1 / kept, 0.0)
        even = torch.quasirandom.SobolEngine(len(values), scramble=True, seed=seed).draw(draws, dtype=torch.float64)
        normal = torch.special.ndtri(even.clamp(1e-9, 1 - 1e-9))
        return cls(sums, sums.noise(mixed), vectors * kept @ vectors.T, vectors * back @ vectors.T, normal)

    def statistic(self, gap: Tensor) -> Tensor:  # (..., M) -> (..., A)
        """Debiased error of each arm, not clipped."""
        return debiased(self.sums, gap, self.noise)

    def drawn(self, truth: Tensor) -> Tensor:  # (Q, M) -> (Q, S, M)
        """Gaps of as many rows drawn from each truth: normal, with the skewness of right-or-wrong answers."""
        sums = self.sums
        gap = truth / sums.share
        accuracy = (sums.said - gap).clamp(0, 1)
        gap, binary = sums.said - accuracy, accuracy * (1 - accuracy)
        square = binary + gap.square()  # of confidence − correct
        std = sums.weight * (sums.count * square * sums.inflation).sqrt()
        cube = gap * (gap.square() + 3 * binary) + binary * (2 * accuracy - 1)
        skew = (
            cube / (square.pow(1.5) * (sums.count / sums.inflation.clamp(min=1e-12)).sqrt()).clamp(min=1e-300)
        ).clamp(-1, 1)
        mean = gap * sums.share
        normal = self.draws @ self.root
        lean = (mean / std.clamp(min=1e-300)) @ self.inverse / max(sums.rows, 1) ** 0.5  # (Q, M)
        # A row lies in one bin of a set, so gaps that are not 0 vary against each other: covariance S R S − gap gapᵀ / n.
        size = lean.square().sum(1, keepdim=True).clamp(max=1)
        lean = lean * ((1 - (1 - size).sqrt()) / size.clamp(min=1e-300)).sqrt()
        normal = normal - (self.draws @ lean.T).T[..., None] * (lean @ self.root)[:, None]
        drawn = mean[:, None] + std[:, None] * (normal + skew[:, None] / 6 * (normal.square() - 1))
        # Accuracy is at most 1, so at confidence 1 a gap below 0 means that all answers were right.
        room, far = sums.share, sums.share * (1 + SLACK / sums.count.sqrt())
        near = sums.said >= 0.5
        return drawn.clamp((sums.said - 1) * torch.where(near, room, far), sums.said * torch.where(near, far, room))

    def likely(self, errors: Sequence[float]) -> Tensor:  # one error an arm -> (M,)
        """The likeliest gaps with these errors: the data's, each shrunk or stretched by its variance times one number an arm."""
        gap, variance = self.sums.gap, self.noise.square()
        size = gap.abs()
        for arm, error in enumerate(errors):
            own = self.sums.arm == arm
            size[own] = _moved(size[own], variance[own], error)
        return self._feasible(size)

    def even(self, errors: Sequence[float]) -> Tensor:  # one error an arm -> (M,)
        """The same gap in every bin, with the signs of the data."""
        return self._feasible(self.sums.share * torch.tensor(errors, dtype=torch.float64)[self.sums.arm])

    @property
    def reach(self) -> float:
        """How far from the estimate to search for an end; if all answers were alike, as far as one different answer per bin implies."""
        return REACH * float(torch.maximum(self.noise.square().sum(), self.sums.weight.square().sum()).sqrt())

    def _feasible(self, size: Tensor) -> Tensor:  # (M,) ≥ 0 -> (M,)
        sums = self.sums
        over = sums.gap >= 0  # more confident than right
        room = torch.where(over, sums.said, 1 - sums.said) * sums.share
        other = torch.where(over, 1 - sums.said, sums.said) * sums.share
        over = over ^ ((size > room) & (other > room))
        return torch.where(over, size, -size)


def debiased(sums: GapSums, gap: Tensor, noise: Tensor) -> Tensor:  # (..., M), (M,) -> (..., A)
    parts = 2 * gap.abs() - expected_absolute(gap, noise)
    return parts @ torch.nn.functional.one_hot(sums.arm).double()


def _moved(size: Tensor, variance: Tensor, error: float) -> Tensor:
    """``(size − λ variance)₊`` with λ chosen to make the sum equal the error."""
    total, noise = float(size.sum()), float(variance.sum())
    if noise <= 0:
        return size * (error / total) if total > 0 else torch.full_like(size, error / len(size))
    if error >= total:
        return size + variance * ((error - total) / noise)
    ratio = (size / variance.clamp(min=1e-300)).sort(descending=True)
    sizes, variances = size[ratio.indices].cumsum(0), variance[ratio.indices].cumsum(0)
    shrink = (sizes - error) / variances.clamp(min=1e-300)  # λ if exactly the first bins stay
    stays = ratio.values > shrink
    index = int(stays.nonzero()[-1]) if stays.any() else 0
    return (size - float(shrink[index].clamp(min=0)) * variance).clamp(min=0)


def below_share(drawn: Tensor, value: float) -> Tensor:  # (Q, S) -> (Q,)
    """Probability of a statistic below the value, ties counted half; from a normal tail if few draws are left there."""
    share = ((drawn < value - 1e-12).double() + (drawn <= value + 1e-12).double()).mean(1) / 2
    tail = torch.special.ndtr((value - drawn.mean(1)) / drawn.std(1).clamp(min=1e-12))
    few = FEW / drawn.shape[1]
    return torch.where(share < few, tail.clamp(max=few), torch.where(share > 1 - few, tail.clamp(min=1 - few), share))


def last(holds: Callable[[float], bool], start: float, end: float) -> float:
    """The last point from start towards end at which the condition holds, found by bisection."""
    if holds(end):
        return end
    for _ in range(BISECTIONS):
        middle = (start + end) / 2
        start, end = (middle, end) if holds(middle) else (start, middle)
    return start
