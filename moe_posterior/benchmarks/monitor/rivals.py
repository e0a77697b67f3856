"""Detectors of drift by others, each asked for the first row at which it raises an alarm.

Dimensions: T rows of a stream.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from moe_posterior.errors import MissingDependencyError

Array = NDArray[np.float64]
BINS = 100


def pit_monitor(values: Array, rng: np.random.Generator, alpha: float = 0.05) -> int | None:  # (T,) in [0, 1]
    """First alarm of PITMonitor on probability integral transforms; the null is that they are exchangeable.

    Each value's rank among all so far, ties broken at random, is bet on with the histogram of earlier ranks; the bets are mixed over
    starting points with weights 1 / (t (t + 1)), and an alarm is raised at 1 / alpha.

    Source: Farran 2026, *When Your Model Stops Working: Anytime-Valid Calibration Monitoring*, with its default of 100 bins.
    """
    ranked: list[float] = []
    counts = np.ones(BINS)
    capital = 0.0
    for row, value in enumerate(values.tolist()):
        insort(ranked, value)
        low, high = bisect_left(ranked, value), bisect_right(ranked, value)
        rank = (low + rng.uniform(0, high - low)) / (row + 1)
        place = min(int(rank * BINS), BINS - 1)
        pays = counts[place] * BINS / (BINS + row)
        counts[place] += 1
        capital = pays * (capital + 1 / ((row + 1) * (row + 2)))
        if capital >= 1 / alpha:
            return row
    return None


def transformed(confidence: Array, correct: Array, rng: np.random.Generator) -> Array:  # 2 x (T,) -> (T,)
    """Randomised probability integral transform of a right-or-wrong answer: uniform on [0, 1] if the confidence holds.

    >>> low, high = transformed(np.full(2, 0.9), np.array([0.0, 1.0]), np.random.default_rng(0))
    >>> bool(low < 0.1), bool(high >= 0.1)
    (True, True)
    """
    luck = rng.random(len(confidence))
    wrong = 1 - confidence
    return np.where(correct > 0, wrong + luck * confidence, luck * wrong)


def adwin(residual: Array) -> int | None:  # (T,) confidence − correct
    """First alarm of ADWIN with river's defaults.

    Source: Bifet & Gavaldà 2007, *Learning from Time-Changing Data with Adaptive Windowing*.
    """
    return _of_river("ADWIN", residual)


def page_hinkley(residual: Array) -> int | None:  # (T,)
    """First alarm of the Page-Hinkley test with river's defaults.

    Source: Page 1954, *Continuous Inspection Schemes*.
    """
    return _of_river("PageHinkley", residual)


def _of_river(name: str, residual: Array) -> int | None:
    try:
        from river import drift
    except ImportError as error:
        raise MissingDependencyError("river", "drift") from error
    detector: Callable[[], object] = getattr(drift, name)
    found = detector()
    for row, value in enumerate(residual.tolist()):
        found.update(value)  # type: ignore[attr-defined]
        if found.drift_detected:  # type: ignore[attr-defined]
            return row
    return None
