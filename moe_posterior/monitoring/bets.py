"""E-values of a calibration monitor: what a bet against a stated confidence pays, and how bets are spread over starting points.

Dimensions: N rows, S directions, D sizes of a bet.

A bet of size δ says that the log-odds of being right are δ lower (overconfident) or higher (underconfident) than stated. It pays the
likelihood ratio, which is affine in the outcome. So its mean is at most 1 for any outcome in [0, 1] whose mean is not on the bet's side
of what the null allows, whatever the distribution, and products of it are supermartingales (Ville 1939).
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Index = NDArray[np.int64]

SIZES = np.array([0.2, 0.5, 1.1, 2.4])  # log-odds: from .90 down to .88, .85, .75, .45
DIRECTIONS = ("overconfident", "underconfident")
MARGIN = (
    1e-3  # the null is widened to this distance from 0 and 1, so that one wrong answer never pays an infinite amount
)


def log_payoffs(expected: Array, tolerance: Array, outcome: Array) -> Array:  # 3 x (N,) -> (N, 2, D)
    """Log payoff of every bet on each row; 0 where no outcome could prove the direction.

    The null is ``|E[outcome] − expected| ≤ tolerance``. A bet on overconfidence is played at the lower end of that range and
    one on underconfidence at the upper end, where the null is hardest to reject.

    >>> expected, none = np.array([0.9, 0.9]), np.zeros(2)
    >>> np.exp(log_payoffs(expected, none, np.array([1.0, 0.0])))[:, 0].round(2).tolist()  # the answer was right, and wrong
    [[0.98, 0.94, 0.83, 0.5], [1.19, 1.55, 2.5, 5.51]]
    """
    found = np.zeros((len(expected), 2, len(SIZES)))
    for side, sign in enumerate((-1.0, 1.0)):
        at = expected + sign * tolerance
        provable = at >= MARGIN if sign < 0 else at <= 1 - MARGIN
        null = at.clip(MARGIN, 1 - MARGIN)[:, None]
        odds = null / (1 - null) * np.exp(sign * SIZES)
        claimed = odds / (1 + odds)
        pays = 1 + (outcome[:, None] - null) * (claimed - null) / (null * (1 - null))
        found[:, side] = np.where(provable[:, None], np.log(pays), 0.0)
    return found


def log_start_weight(row: Array, scale: float) -> Array:  # (N,) counted from 1 -> (N,)
    """Log share of the capital that starts to bet at a stream's row ``row``; the shares add up to 1 over all rows for ever.

    Half starts at the first row, for a model that is off from the beginning. The rest is ``scale / ((scale + row − 1)(scale + row))``:
    nearly even up to ``scale`` rows, then falling with the square.

    >>> np.exp(log_start_weight(np.array([1.0, 2.0, 1e4, 1e6]), 1e4)).round(6).tolist()
    [0.50005, 5e-05, 1.3e-05, 0.0]
    """
    rest = np.log(scale / 2) - np.log(scale + row - 1) - np.log(scale + row)
    return np.where(row == 1, np.logaddexp(rest, np.log(0.5)), rest)


def log_stream_weight(place: Array, scale: float) -> Array:  # (J,) counted from 1 -> (J,)
    """Log share of the error budget of the configuration that came ``place``-th; the shares add up to 1, however many may come.

    >>> np.exp(log_stream_weight(np.array([1.0, 2.0, 3.0]), 1.0)).round(3).tolist()
    [0.5, 0.167, 0.083]
    """
    return np.log(scale) - np.log(scale + place - 1) - np.log(scale + place)


def running_capital(pays: Array, start: Array, before: Array, segment: Index) -> Array:
    """Log capital after every row, of each bet: ``M ← payoff · (M + start weight)``, row by row within each segment.

    With ``L`` the sum of log payoffs so far, ``log M = L + log Σ exp(start weight − L before the start)``: one running sum.
    Segments of about equal length are padded to a block, so their number costs little.

    Args:
        pays: (N, K) log payoffs, rows of a segment adjacent and in order.
        start: (N,) log start weights.
        before: (G, K) log capital of each segment before its first row.
        segment: (N,) number of each row's segment, in [0, G).
    """
    length = np.bincount(segment, minlength=len(before))
    first = np.cumsum(length) - length
    found = np.empty_like(pays)
    size = np.frexp(length)[1]  # lengths in [2^(size − 1), 2^size)
    for one in np.unique(size).tolist():
        members = np.flatnonzero(size == one)
        steps = np.arange(int(length[members].max()))[:, None]  # (T, 1)
        inside = steps < length[members]  # (T, G')
        rows = np.where(inside, first[members] + steps, first[members])
        paid = np.cumsum(pays[rows], axis=0)  # (T, G', K)
        stake = start[rows][..., None] - paid + pays[rows]
        stake[0] = np.logaddexp(stake[0], before[members])
        capital = np.logaddexp.accumulate(stake, axis=0) + paid
        found[rows[inside]] = capital[inside]
    return found
