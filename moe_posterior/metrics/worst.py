"""The worst of many groups, without those too small to judge."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_posterior.checks.declared import as_declared
from moe_posterior.checks.validation import floats, real
from moe_posterior.errors import InvalidArgumentError


@dataclass(frozen=True)
class WorstGroup:
    """Which group is worst, by how much, and on how many predictions that rests."""

    index: int | None  # None: no group could be judged
    value: float  # NaN: no group could be judged
    count: int


@as_declared
def worst_group(
    values: Tensor,  # (G,)
    count: Tensor,  # (G,)
    *,
    min_count: int = 1,
    largest: bool = True,
) -> WorstGroup:
    """The group with the worst value; groups below ``min_count`` and NaN values do not take part.

    The maximum over noisy groups is biased upwards, the more the smaller they are: give ``min_count``, and an interval.

    Args:
        values: a figure per group, for instance ``GroupedCalibration.calibration_error``.
        count: predictions behind each value.
        min_count: the fewest predictions a group must have.
        largest: True if large is bad (an error); False if small is bad (an accuracy). Of equal groups, the first.

    Raises:
        InvalidArgumentError: shapes or values that do not fit.

    >>> worst_group(torch.tensor([0.5, 0.25, 0.125]), torch.tensor([3, 200, 100]), min_count=20)
    WorstGroup(index=1, value=0.25, count=200)
    """
    values, count = floats("values", values), floats("count", count)
    if values.ndim != 1 or values.shape != count.shape:
        raise InvalidArgumentError(
            f"values and count must have one shape (G,); got {tuple(values.shape)} and {tuple(count.shape)}"
        )
    if not (real(min_count) or 0) >= 1:
        raise InvalidArgumentError(f"min_count must be at least 1; got {min_count!r}")
    judged = ((count >= min_count) & ~values.isnan()).nonzero()[:, 0]
    if not len(judged):
        return WorstGroup(None, float("nan"), 0)
    index = int(judged[torch.argmax(values[judged] if largest else -values[judged])])
    return WorstGroup(index, float(values[index]), int(count[index]))
