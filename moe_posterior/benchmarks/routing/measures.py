"""Figures of merit of a trace, as pure functions of one-dimensional tensors.

Dimensions: T queries.

The three calibration measures are those of :mod:`moe_posterior.metrics`, kept here because published records were made with them: the
ECE differs in the last bit, the noise floor and the debiased ECE are simulated where the library uses closed forms (within 0.001).
"""

import torch
from torch import Tensor

from moe_posterior.bins import bin_indices

N_BINS = 15
WINDOW = 50
NOISE_DRAWS = 200


def calibration_error(confidence: Tensor, outcome: Tensor, n_bins: int = N_BINS) -> float:  # (T,), (T,)
    """ECE: bin by confidence into equal widths, average |mean outcome − mean confidence| by bin size. NaN without queries.

    Outcomes may be graded in [0, 1]. Biased upwards by noise: see :func:`noise_floor` and :func:`debiased_calibration_error`.

    >>> round(calibration_error(torch.tensor([0.9, 0.9]), torch.tensor([1.0, 0.0])), 3)
    0.4
    """
    if not len(confidence):
        return float("nan")
    counts, gap = _bin_gaps(confidence, outcome, n_bins)
    return float(gap.abs().sum() / counts.sum())


def noise_floor(confidence: Tensor, n_bins: int = N_BINS, *, draws: int = NOISE_DRAWS, seed: int = 0) -> float:
    """Mean ECE of a perfectly calibrated router with the same scores: outcomes drawn from the scores themselves.

    >>> noise_floor(torch.ones(100))  # nothing left to chance
    0.0
    """
    generator = torch.Generator().manual_seed(seed)
    probability = confidence.double().clamp(0, 1).expand(draws, -1)
    outcomes = torch.bernoulli(probability, generator=generator)
    return sum(calibration_error(confidence, row, n_bins) for row in outcomes) / draws


def debiased_calibration_error(
    confidence: Tensor,  # (T,)
    outcome: Tensor,  # (T,)
    n_bins: int = N_BINS,
    *,
    draws: int = NOISE_DRAWS,
    seed: int = 0,
) -> float:
    """ECE minus its bias, simulated at the calibration found: 2·ECE − mean ECE of resampled outcomes, at least 0.

    In each bin of n queries with accuracy p̂ the accuracy is redrawn as N(p̂, p̂(1 − p̂)/n), so the simulated excess is what noise
    adds to |p̂ − confidence| at this gap. Graded outcomes use their own variance.

    Source: Kumar, Liang & Ma 2019, *Verified Uncertainty Calibration*, section 5 and its appendix on the ℓ1 error.
    """
    if not len(confidence):
        return float("nan")
    counts, sums = _bin_gaps(confidence, outcome, n_bins)
    used = counts > 0
    counts, gap = counts[used], (sums[used] / counts[used])
    variance = _bin_variances(confidence, outcome, n_bins)[used] / counts
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(draws, len(counts), dtype=torch.float64, generator=generator) * variance.sqrt()
    weight = counts / counts.sum()
    plain = float((weight * gap.abs()).sum())
    simulated = float(((gap + noise).abs() * weight).sum(dim=1).mean())
    return max(0.0, 2 * plain - simulated)


def _bin_gaps(
    confidence: Tensor, outcome: Tensor, n_bins: int
) -> tuple[Tensor, Tensor]:  # counts, sums of the gap: (B,)
    bins = bin_indices(confidence, n_bins)
    gap = outcome.double() - confidence.double()
    counts = torch.bincount(bins, minlength=n_bins).double()
    return counts, torch.zeros(n_bins, dtype=torch.float64).index_add_(0, bins, gap)


def _bin_variances(confidence: Tensor, outcome: Tensor, n_bins: int) -> Tensor:  # (B,), of one outcome
    bins = bin_indices(confidence, n_bins)
    counts = torch.bincount(bins, minlength=n_bins).double().clamp(min=1)
    zeros = torch.zeros(n_bins, dtype=torch.float64)
    mean = zeros.index_add(0, bins, outcome.double()) / counts
    square = zeros.index_add(0, bins, outcome.double().square()) / counts
    return (square - mean.square()).clamp(min=0)


def next_windows(values: Tensor, window: int = WINDOW) -> Tensor:  # (T,) -> (T − window + 1,)
    """Mean over each query and those after it: entry t covers ``[t, t + window)``. Empty if T < window.

    >>> next_windows(torch.tensor([1.0, 0.0, 1.0]), window=2).tolist()
    [0.5, 0.5]
    """
    if len(values) < window:
        return values.new_zeros(0, dtype=torch.float64)
    total = torch.cat([torch.zeros(1, dtype=torch.float64), values.double().cumsum(0)])
    return (total[window:] - total[:-window]) / window


def _first(condition: Tensor, otherwise: int) -> int:
    hits = condition.nonzero()
    return int(hits[0]) if len(hits) else otherwise


def recovery(after: Tensor, level: float | Tensor = 0.85, window: int = WINDOW) -> int:  # (T',)
    """Queries after the change until the *next* ``window`` queries average at least ``level``; T' if they never do.

    0 means that the gate never fell behind. A monitor that averages the last ``window`` queries, all of them after the change, sees
    the recovery exactly ``window`` queries later. ``level`` may be a tensor (T',), whose windows are then the target.

    >>> recovery(torch.tensor([0.0, 0.0, 1.0, 1.0]), window=2)
    2
    """
    target = next_windows(level, window) if isinstance(level, Tensor) else level
    return _first(next_windows(after, window) >= target - 1e-9, len(after))


def queries_until_avoided(
    chosen: Tensor,  # (T,) int64
    affected: Tensor,  # (T,) bool
    expert: int,
    *,
    window: int = WINDOW,
    share: float = 0.05,
) -> tuple[int, int]:
    """Queries, and affected queries among them, until the expert gets at most ``share`` of the next ``window`` affected queries.

    (T, number of affected) if that never happens.

    >>> chosen, affected = torch.tensor([0, 1, 0, 1, 1]), torch.tensor([True, False, True, True, True])
    >>> queries_until_avoided(chosen, affected, expert=0, window=2)
    (3, 2)
    """
    rows = affected.nonzero()[:, 0]
    picked = next_windows((chosen[rows] == expert).double(), window)
    first = _first(picked <= share + 1e-9, len(rows))
    if first == len(rows):
        return len(chosen), len(rows)
    return (0 if first == 0 else int(rows[first - 1]) + 1), first


def queries_until_stable(
    expected: Tensor, *, window: int = WINDOW, margin: float = 0.02, tail: int = 250
) -> int:  # (T,)
    """Queries until the next ``window`` are, on average, within ``margin`` of the level of the last ``tail`` queries.

    >>> queries_until_stable(torch.cat([torch.zeros(100), torch.ones(400)]))
    99
    """
    level = float(expected[-tail:].double().mean())
    return recovery(expected, level - margin, window)
