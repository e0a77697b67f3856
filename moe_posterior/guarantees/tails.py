"""How few errors prove that an error rate is at most a level: exact binomial tails, and bounds for grades.

A test on m independent rows passes if so few errors would be seen with probability at most δ, were the rate above the level.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

EXACT_ROWS = (
    200_000  # beyond these Hoeffding's bound, which needs no table, is as good: it costs 0.0005 of risk at most
)
_ROUNDING = 1e-9  # of a sum of grades


def passes(
    errors: Tensor,  # (R,) float64: sum of losses of each test's rows
    rows: Tensor,  # (R,) int64
    level: float,
    probability: float,
    *,
    graded: bool = False,
) -> Tensor:  # (R,) bool
    """Whether each test proves an error rate of at most ``level``; if the true rate is above it, with ``probability`` at most.

    Args:
        errors, rows: what each test saw.
        level, probability: α and δ, each in (0, 1).
        graded: losses may lie anywhere in [0, 1]: the better of Hoeffding's and Bentkus' bounds replaces the exact binomial tail.

    Source: Clopper & Pearson 1934 (binomial); Bates et al. 2021, *Distribution-Free, Risk-Controlling Prediction Sets*
    (Hoeffding–Bentkus).

    >>> passes(torch.tensor([0.0, 0.0, 1.0]), torch.tensor([21, 22, 22]), 0.1, 0.1)
    tensor([False,  True, False])
    """
    whole = torch.ceil(errors - _ROUNDING)
    limit = int(rows.max()) if len(rows) else 0
    table = allowed_errors(min(limit, EXACT_ROWS), level, probability / math.e if graded else probability)
    exact = (rows <= EXACT_ROWS) & (whole <= table[rows.clamp(max=len(table) - 1)])
    return exact | (_hoeffding(errors, rows, level, probability) if graded or limit > EXACT_ROWS else False)


def allowed_errors(rows: int, level: float, probability: float) -> Tensor:  # (at least rows + 1,) int64
    """For every number of rows m from 0, the most errors c with P(Bin(m, level) ≤ c) ≤ probability; −1 where even none is too many.

    >>> allowed_errors(22, 0.1, 0.1)[[21, 22]].tolist()
    [-1, 0]
    """
    return _table(1 << max(10, rows.bit_length()), level, probability)


@lru_cache(maxsize=64)
def _table(size: int, level: float, probability: float) -> Tensor:
    """By recurrence over m: one more row lowers the tail by a part of its last term."""
    odds = level / (1 - level)
    first = max(0, math.ceil(math.log(probability) / math.log1p(-level) - 1e-12))
    found = [-1] * min(first, size)
    errors, last = 0, math.exp(first * math.log1p(-level))  # the tail's last term, P(Bin(m, level) = errors)
    tail = last
    for m in range(first, size):
        more = last * (m - errors) / (errors + 1) * odds
        if tail + more <= probability:
            errors, last, tail = errors + 1, more, tail + more
        found.append(errors)
        tail -= level * last
        last *= (m + 1) * (1 - level) / (m + 1 - errors)
    return torch.tensor(found)


def _hoeffding(errors: Tensor, rows: Tensor, level: float, probability: float) -> Tensor:  # (R,), (R,) -> (R,) bool
    rate = (errors / rows.clamp(min=1)).clamp(max=1)
    divergence = torch.special.xlogy(rate, rate / level) + torch.special.xlogy(1 - rate, (1 - rate) / (1 - level))
    return (rate < level) & (rows * divergence >= -math.log(probability))
