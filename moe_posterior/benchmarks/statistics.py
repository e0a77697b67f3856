"""Intervals over seeds and paired permutation tests.

Dimensions: S seeds, T queries.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_posterior.errors import InvalidArgumentError, MissingDependencyError

EXACT_BELOW = 13  # pairs; beyond it sign flips are drawn instead of enumerated
FLIPS = 9_999


class Summary(NamedTuple):
    """Mean over seeds and half the width of its 95 % interval; NaN width for a single seed."""

    mean: float
    half_width: float
    runs: int


def summarise(values: Sequence[float], level: float = 0.95) -> Summary:
    """Mean and t interval over seeds.

    >>> summarise([1.0, 2.0, 3.0])
    Summary(mean=2.0, half_width=2.484138, runs=3)

    Raises:
        InvalidArgumentError: no values. MissingDependencyError: without scipy.
    """
    if not values:
        raise InvalidArgumentError("values must hold at least one number; got none")
    try:
        from scipy.stats import t
    except ImportError as error:
        raise MissingDependencyError("scipy", "train") from error
    column = torch.tensor(values, dtype=torch.float64)
    if len(values) == 1:
        return Summary(float(column[0]), float("nan"), 1)
    standard_error = float(column.std() / len(values) ** 0.5)
    return Summary(
        float(column.mean()), round(float(t.ppf((1 + level) / 2, len(values) - 1)) * standard_error, 6), len(values)
    )


def sign_flip_p(differences: Tensor, *, seed: int = 0, flips: int = FLIPS) -> float:  # (n,) -> two-sided p
    """Paired permutation test: how often would random signs give a mean difference at least this large?

    Enumerates all 2ⁿ signs for n ≤ 12 pairs, draws ``flips`` otherwise (the observed one counts as one of them). With n = 5 seeds no
    p below 1/16 is possible; over queries there are enough pairs.

    >>> sign_flip_p(torch.ones(5))
    0.0625
    """
    differences = differences.double()
    count = len(differences)
    if count < EXACT_BELOW:
        bits = torch.arange(2**count)[:, None] >> torch.arange(count) & 1
        means = ((1 - 2 * bits.double()) @ differences).abs()
        return float((means >= differences.sum().abs() - 1e-12).double().mean())
    moving = differences[differences != 0]  # pairs without a difference do not change under a flip
    generator = torch.Generator().manual_seed(seed)
    observed, extreme = moving.sum().abs(), 0
    for start in range(0, flips, 500):
        shape = (min(500, flips - start), len(moving))
        signs = 1 - 2 * torch.randint(2, shape, generator=generator, dtype=torch.int8).double()
        extreme += int(((signs @ moving).abs() >= observed - 1e-9).sum())
    return (extreme + 1) / (flips + 1)
