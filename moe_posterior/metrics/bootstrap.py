"""Bootstrap intervals of any metric, for each of several arms and for the differences between them on the same resamples.

Dimensions: n rows, R resamples.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_posterior.checks.declared import as_declared
from moe_posterior.checks.validation import count, described, floats, number, tensor
from moe_posterior.errors import InvalidArgumentError

MOST_SAMPLES = 10**7  # of which each keeps the metric's value


class Interval(NamedTuple):
    """A value with its interval; the shapes are those of the metric."""

    value: Tensor  # (...)
    low: Tensor  # (...)
    high: Tensor  # (...)


class PairedBootstrap(NamedTuple):
    """Intervals of each arm, and of each arm less the reference."""

    arms: dict[str, Interval]
    differences: dict[str, Interval]  # without the reference


@as_declared
def centred_interval(
    value: Tensor,  # (...) the statistic of the data
    statistics: Tensor,  # (R, ...) of the resamples
    level: float = 0.95,
) -> tuple[Tensor, Tensor]:  # (...), (...)
    """Percentile interval moved by the bootstrap's own estimate of bias; NaN wherever a resample is.

    A biased metric is more so on resampled rows: its plain percentile interval can exclude the value it belongs to. What remains is the
    bias of the value itself, so for a binned calibration error, where that is most of it, take
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
    generator = torch.Generator().manual_seed(seed)
    for _ in range(samples):
        rows = torch.randint(num_rows, (num_rows,), generator=generator)
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
