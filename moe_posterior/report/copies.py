"""Means and shares with intervals that count the copies of one data row, under several shifts, as one row.

Dimensions: N predictions, n data rows.
"""

import math

import torch
from torch import Tensor

from moe_posterior.metrics import wilson_interval
from moe_posterior.report.schema import Difference

__all__ = ["mean_of_copies", "share_of_copies"]

Z = 1.959963984540054  # standard normal quantile of a two-sided 95 % interval
SMALLEST = 1e-14  # relative spread of a mean that rounding alone gives


def mean_of_copies(values: Tensor, rows: Tensor) -> Difference:  # (N,) float64, (N,) int64
    """The mean of ``values``, its 95 % interval and the two-sided p-value of a mean of 0.

    The variance is summed over data rows, not predictions, and the interval is normal: from about a hundred rows on it is right
    for bounded values.

    >>> found = mean_of_copies(torch.tensor([1.0, 1.0, -1.0, 0.0] * 50).double(), torch.arange(200))
    >>> round(found["value"], 2), round(found["low"], 2), round(found["high"], 2)
    (0.25, 0.13, 0.37)
    """
    _, which = rows.unique(return_inverse=True)
    mean = values.mean()
    totals = torch.zeros(int(which.max()) + 1, dtype=torch.float64).index_add_(0, which, values - mean)
    count = len(totals)
    error = float((totals.square().sum() * count / max(count - 1, 1)).sqrt() / len(values))
    value = float(mean)
    if error <= SMALLEST * max(float(values.abs().max()), SMALLEST):  # every row says the same
        return {"value": value, "low": value, "high": value, "p_value": 1.0 if value == 0 else 0.0}
    p_value = math.erfc(abs(value) / error / math.sqrt(2))
    return {"value": value, "low": value - Z * error, "high": value + Z * error, "p_value": p_value}


def share_of_copies(wrong: Tensor, counted: Tensor, rows: Tensor) -> list[float]:  # (N,) float64 each, (N,) int64
    """95 % Wilson interval of the share of ``wrong`` among the ``counted``, at as many independent answers as those are worth.

    >>> wrong, all_of_them = torch.tensor([1.0, 0.0, 0.0, 0.0] * 25).double(), torch.ones(100).double()
    >>> [round(end, 3) for end in share_of_copies(wrong, all_of_them, torch.arange(100))]
    [0.175, 0.343]
    >>> [round(end, 3) for end in share_of_copies(wrong, all_of_them, torch.arange(100) % 50)]  # each row twice
    [0.175, 0.343]
    """
    count, errors = counted.sum(), wrong.sum()
    share = errors / count
    _, which = rows.unique(return_inverse=True)
    residual = torch.zeros(int(which.max()) + 1, dtype=torch.float64).index_add_(0, which, wrong - share * counted)
    simple = count * share * (1 - share)
    most = torch.tensor(float(torch.bincount(which).max()))
    copies = (residual.square().sum() / simple).clamp(min=1.0) if simple > 0 else most
    low, high = wilson_interval(errors / copies, count / copies)
    return [float(low), float(high)]
