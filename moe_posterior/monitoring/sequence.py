"""A confidence sequence for a mean gap: an interval that holds at all times at once.

The outcomes may depend on the past and their means may change; the interval is for the average of the conditional means so far.
"""

import math

import numpy as np

RATES = np.geomspace(0.002, 0.9, 12)  # of the exponential bets; they suit between a dozen and a few 100,000 rows
PSI = -np.log1p(-RATES) - RATES


def half_width(squares: float, rows: int, log_alpha: float) -> float:
    """Half the width of the interval of a mean of outcomes in [0, 1]; at most 1.

    Args:
        squares: sum of squared differences between each outcome and what was expected of it before it came.
        rows: number of outcomes.
        log_alpha: log of the probability that the interval ever fails, both sides together.

    Source: Howard, Ramdas, McAuliffe & Sekhon 2021, *Time-uniform, Nonparametric, Nonasymptotic Confidence Sequences*, theorem 4
    (empirical Bernstein), mixed over a grid of rates.

    >>> round(half_width(squares=90.0, rows=1000, log_alpha=math.log(0.05)), 3)
    0.036
    """
    if rows == 0:
        return 1.0
    wanted = math.log(2 * len(RATES)) - log_alpha
    low, high = 0.0, float(rows)
    for _ in range(50):
        middle = (low + high) / 2
        reached = np.logaddexp.reduce(RATES * middle - PSI * squares) >= wanted
        low, high = (low, middle) if reached else (middle, high)
    return min(1.0, high / rows)
