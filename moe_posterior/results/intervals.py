"""Intervals: Student's t over seeds, the paired bootstrap over rows, and the sign-flip permutation test.

Dimensions: n rows or pairs, R resamples, M columns.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_posterior.checks.declared import as_declared
from moe_posterior.checks.validation import count, described, floats, number, tensor
from moe_posterior.errors import InvalidArgumentError, MissingDependencyError

EXACT_BELOW = 13  # pairs, from which sign flips are drawn instead of enumerated
FLIPS = 9_999
MAX_DRAWS = 2**21  # row numbers drawn at a time: 16 MB whatever n and R are (one resample at least)
MOST_SAMPLES = 10**7  # of which each keeps the metric's value


class MeanInterval(NamedTuple):
    """A mean over seeds and half the width of its interval."""

    mean: float
    half_width: float  # NaN for a single value
    runs: int


class Interval(NamedTuple):
    """A value with its interval; the shapes are those of the metric."""

    value: Tensor  # (...)
    low: Tensor  # (...)
    high: Tensor  # (...)


class PairedBootstrap(NamedTuple):
    """Intervals of each arm, and of each arm less the reference."""

    arms: dict[str, Interval]
    differences: dict[str, Interval]  # without the reference


def mean_interval(values: Sequence[float], level: float = 0.95) -> MeanInterval:
    """Mean and Student's t interval over independent runs.

    >>> found = mean_interval([1.0, 2.0, 3.0])
    >>> found.mean, round(found.half_width, 6), found.runs
    (2.0, 2.484138, 3)

    Raises:
        InvalidArgumentError: no values.
        MissingDependencyError: scipy is not installed.
    """
    if not values:
        raise InvalidArgumentError("values must hold at least one number; got none")
    try:
        from scipy.stats import t
    except ImportError as error:
        raise MissingDependencyError("scipy", "train") from error
    runs, column = len(values), torch.tensor(values, dtype=torch.float64)
    if runs == 1:
        return MeanInterval(float(column[0]), math.nan, 1)
    half_width = float(t.ppf((1 + level) / 2, runs - 1)) * float(column.std() / math.sqrt(runs))
    return MeanInterval(float(column.mean()), half_width, runs)


def median_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Median, low and high: order statistics that hold the true median with at least this probability, whatever the distribution.

    >>> median_interval([float(x) for x in range(1, 21)])
    (10.5, 6.0, 15.0)
    """
    ordered, n = sorted(values), len(values)
    middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    outside, rank = 0.0, 0
    while rank < (n - 1) // 2 and outside + math.comb(n, rank) / 2**n <= (1 - level) / 2:
        outside += math.comb(n, rank) / 2**n
        rank += 1
    low = max(rank - 1, 0)
    return middle, ordered[low], ordered[n - 1 - low]


def plus_minus(mean: float, half_width: float, digits: int = 3, sign: str = "") -> str:
    """A mean and half of its interval as text; the mean alone if there is no interval.

    >>> plus_minus(0.25, 0.01), plus_minus(0.25, float("nan"), 1, "+")
    ('0.250 ± 0.010', '+0.2')
    """
    text = f"{mean:{sign}.{digits}f}"
    return text if math.isnan(half_width) else f"{text} ± {half_width:.{digits}f}"


def sign_flip_p(differences: Tensor, *, seed: int = 0, flips: int = FLIPS) -> float:  # (n,) -> two-sided p
    """Paired permutation test: how often would random signs give a mean difference at least this large?

    Enumerates all 2ⁿ signs for n ≤ 12 pairs; beyond that draws ``flips`` of them and counts the observed one too. With n = 5 pairs
    no p-value below 1/16 is possible.

    >>> sign_flip_p(torch.ones(5))
    0.0625
    """
    differences = differences.double()
    pairs = len(differences)
    if pairs < EXACT_BELOW:
        bits = torch.arange(2**pairs)[:, None] >> torch.arange(pairs) & 1
        means = ((1 - 2 * bits.double()) @ differences).abs()
        return float((means >= differences.sum().abs() - 1e-12).double().mean())
    moving = differences[differences != 0]  # a flip changes nothing in pairs without a difference
    generator = torch.Generator().manual_seed(seed)
    observed, extreme = moving.sum().abs(), 0
    for start in range(0, flips, 500):
        shape = (min(500, flips - start), len(moving))
        signs = 1 - 2 * torch.randint(2, shape, generator=generator, dtype=torch.int8).double()
        extreme += int(((signs @ moving).abs() >= observed - 1e-9).sum())
    return (extreme + 1) / (flips + 1)


@as_declared
def centred_interval(
    value: Tensor,  # (...) the statistic of the data
    statistics: Tensor,  # (R, ...) of the resamples
    level: float = 0.95,
) -> tuple[Tensor, Tensor]:  # (...), (...)
    """Percentile interval moved by the bootstrap's own estimate of bias; NaN wherever a resample is.

    A biased metric is more so on resampled rows: its plain percentile interval can exclude the value it belongs to. What remains is the
    bias of the value itself, so for a binned calibration error, whose bias is most of it, use
    :func:`~moe_posterior.metrics.calibration_interval`. An end may leave the range of the metric.

    Args:
        value, statistics: the metric on the data, and on each resample.
        level: two-sided, in (0, 1).

    Raises:
        InvalidArgumentError: a level outside (0, 1).

    Source: Efron & Tibshirani 1993, *An Introduction to the Bootstrap*, chapters 10 and 13.

    >>> low, high = centred_interval(torch.tensor(40.0), torch.arange(101.0))
    >>> low.item(), high.item()
    (-7.5, 87.5)
    """
    number("level", level, above=0.0, below=1.0)
    value, statistics = floats("value", value), floats("statistics", statistics)
    if not statistics.ndim or not len(statistics) or statistics.shape[1:] != value.shape:
        raise InvalidArgumentError(
            f"statistics must hold at least one resample, each of the shape of value, {tuple(value.shape)}; "
            f"got shape {tuple(statistics.shape)}"
        )
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=statistics.dtype, device=statistics.device)
    low, high = torch.quantile(statistics, tails, dim=0)
    bias = statistics.mean(dim=0) - value
    return low - bias, high - bias


@as_declared
def paired_bootstrap(
    metric_fn: Callable[..., Tensor | float],
    arms: Mapping[str, Sequence[Tensor]],
    *,
    reference: str,
    samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> PairedBootstrap:
    """Intervals of a metric for every arm and of its differences from the reference, all arms on the same resampled rows.

    Not for binned calibration errors: a difference of two rewards the sharper arm, whichever is calibrated; see
    :func:`~moe_posterior.metrics.calibration_difference`.

    Args:
        metric_fn: called with an arm's tensors, rows drawn with replacement; returns a number, or a tensor of fixed shape.
        arms: name → tensors, for instance ``(preds, target)``; all have the same rows in the same order, at least one.
        reference: the arm that the others are compared with.
        samples: R; 1,000 settle the second digit of a 95 % interval.
        seed: of the draws; the global generator is not touched.
        level: two-sided, in (0, 1).

    Returns:
        Intervals in float64. A metric that is NaN on a resample has a NaN interval. Rows count as independent; several rows of one
        person or document make the interval too narrow.

    Raises:
        InvalidArgumentError: arms, names or numbers that do not fit together.

    Source: Efron & Tibshirani 1993, *An Introduction to the Bootstrap*, chapters 8 and 13.

    >>> arms = {"old": (torch.tensor([0.0, 1.0, 0.0]),), "new": (torch.tensor([1.0, 2.0, 1.0]),)}
    >>> result = paired_bootstrap(torch.mean, arms, reference="old", samples=50)
    >>> [round(end.item(), 3) for end in result.differences["new"]]
    [1.0, 1.0, 1.0]
    """
    num_rows = _validate(arms, reference, samples)
    value = {name: _evaluate(metric_fn, tensors) for name, tensors in arms.items()}
    drawn: dict[str, list[Tensor]] = {name: [] for name in arms}
    for rows in (rows for chunk in resampled_rows(num_rows, samples, seed) for rows in chunk):
        for name, tensors in arms.items():
            drawn[name].append(_evaluate(metric_fn, [tensor[rows.to(tensor.device)] for tensor in tensors]))
    resampled = {name: torch.stack(statistics) for name, statistics in drawn.items()}
    others = [name for name in arms if name != reference]
    return PairedBootstrap(
        arms={name: _interval(value[name], resampled[name], level) for name in arms},
        differences={
            name: _interval(value[name] - value[reference], resampled[name] - resampled[reference], level)
            for name in others
        },
    )


def resampled_rows(num_rows: int, samples: int, seed: int) -> Iterator[Tensor]:  # chunks (r, n) int64, r summing to R
    """Row numbers drawn with replacement, one resample a row, in chunks of bounded size; the same for the same n and seed.

    >>> torch.cat(list(resampled_rows(5, 3, seed=0))).shape
    torch.Size([3, 5])
    """
    generator = torch.Generator().manual_seed(seed)
    chunk = max(1, MAX_DRAWS // max(num_rows, 1))
    for start in range(0, samples, chunk):
        yield torch.randint(num_rows, (min(chunk, samples - start), num_rows), generator=generator)


def bootstrap_sums(
    columns: Sequence[Tensor],  # each (n, M_i) float64, row i the same example in all
    resamples: int,
    seed: int = 0,
) -> list[Tensor]:  # each (R, M_i)
    """Column sums of every resample, for statistics that depend on the rows through sums alone: one matrix product each.

    All tensors see the same resamples as each other and as :func:`paired_bootstrap` with this seed, so differences between them are
    paired.

    Args:
        columns: at least one tensor; all have the same n ≥ 1.
        resamples: R.
        seed: of the draws; the global generator is not touched.

    Raises:
        InvalidArgumentError: no rows, unequal numbers of rows, or no resamples.

    >>> [sums] = bootstrap_sums([torch.ones(4, 1, dtype=torch.float64)], resamples=3)
    >>> sums.tolist()
    [[4.0], [4.0], [4.0]]
    """
    lengths = {len(block) for block in columns}
    if len(lengths) != 1 or 0 in lengths:
        raise InvalidArgumentError(f"columns must share one positive number of rows; got {sorted(lengths)}")
    if resamples < 1:
        raise InvalidArgumentError(f"resamples must be at least 1; got {resamples}")
    sums: list[list[Tensor]] = [[] for _ in columns]
    for rows in resampled_rows(len(columns[0]), resamples, seed):
        ones = torch.ones((), dtype=torch.float64).expand(rows.shape)
        counts = torch.zeros(rows.shape, dtype=torch.float64).scatter_add_(1, rows, ones)
        # One product per tensor, not one wide product: that may add up equal columns in another order, and two arms with the same
        # predictions would differ by 1e-17 with an interval that excludes 0.
        for block, parts in zip(columns, sums, strict=True):
            parts.append(counts @ block)
    return [torch.cat(parts) for parts in sums]


def _validate(arms: Mapping[str, Sequence[Tensor]], reference: str, samples: int) -> int:
    if reference not in arms:
        raise InvalidArgumentError(f"reference must be one of the arms {list(arms)}; got {reference!r}")
    count("samples", samples, most=MOST_SAMPLES)
    for name, tensors in arms.items():
        if not isinstance(tensors, Sequence) or not all(isinstance(rows, Tensor) and rows.ndim for rows in tensors):
            raise InvalidArgumentError(f"arms[{name!r}] must be tensors of one row or more; got {described(tensors)}")
    lengths = {len(rows) for tensors in arms.values() for rows in tensors}
    if len(lengths) != 1 or 0 in lengths:
        raise InvalidArgumentError(f"arms must share one positive number of rows; got {sorted(lengths)}")
    return lengths.pop()


def _evaluate(metric_fn: Callable[..., Tensor | float], tensors: Sequence[Tensor]) -> Tensor:
    try:
        found = metric_fn(*tensors)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(f"metric_fn must take an arm's {len(tensors)} tensors: {error}") from error
    if not isinstance(found, (Tensor, float, int)):
        raise InvalidArgumentError(f"metric_fn must return a tensor or a number; got {described(found)}")
    return tensor("metric_fn's result", found).detach().double().cpu()


def _interval(value: Tensor, statistics: Tensor, level: float) -> Interval:
    return Interval(value, *centred_interval(value, statistics, level))
