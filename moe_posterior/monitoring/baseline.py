"""What a model's confidences meant on reference rows: the null of a monitor for a model that was never perfectly calibrated.

Dimensions: N rows, C configurations.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from moe_posterior.monitoring.bets import MARGIN, Array, Index

PRIOR_STD = 0.5  # log-odds by which a configuration is expected to differ from the others
STEPS = 50
WIDE = 2.5  # standard errors; with 2 a few reference rows alone raise alarms


class Baseline(NamedTuple):
    """Accuracy as a function of confidence, ``sigmoid(offset + slope · logit(confidence) + configuration's shift)``."""

    coefficients: Array  # (2,) offset, slope
    covariance: Array  # (2, 2)
    shifts: dict[int, tuple[float, float]]  # configuration -> shift and its standard error

    def expected(self, confidence: Array, configuration: Index | None) -> tuple[Array, Array]:  # 2 x (N,) -> 2 x (N,)
        """Accuracy that the reference rows imply, and WIDE standard errors of it."""
        design = _design(confidence)
        shift, own = np.zeros(len(confidence)), np.zeros(len(confidence))
        if configuration is not None and self.shifts:
            ids, where = np.unique(configuration, return_inverse=True)
            known = np.array([self.shifts.get(int(one), (0.0, 0.0)) for one in ids])
            shift, own = known[where].T
        accuracy = _sigmoid(design @ self.coefficients + shift)
        variance = np.einsum("ni,ij,nj->n", design, self.covariance, design) + own**2
        return accuracy, WIDE * accuracy * (1 - accuracy) * np.sqrt(variance)


def fit_baseline(confidence: Array, outcome: Array, configuration: Index | None) -> Baseline:
    """Logistic regression of the outcomes on the confidences' log-odds, then one shift per configuration, shrunk towards 0.

    >>> rng = np.random.default_rng(0)
    >>> shown = rng.uniform(0.6, 0.95, 5000)
    >>> right = (rng.random(5000) < shown - 0.1).astype(float)  # ten points overconfident
    >>> [round(float(part[0]), 2) for part in fit_baseline(shown, right, None).expected(np.array([0.8]), None)]
    [0.69, 0.02]
    """
    design = _design(confidence)
    prior = np.diag([1e-2, 1e-2])  # offset and slope N((0, 1), 10²): only for rows that are all alike

    def slopes(found: Array) -> tuple[Array, Array]:
        accuracy = _sigmoid(design @ found)
        weight = accuracy * (1 - accuracy)
        gradient = design.T @ (outcome - accuracy) - prior @ (found - [0.0, 1.0])
        return gradient, (design * weight[:, None]).T @ design + prior

    coefficients, curvature = _newton(slopes, np.array([0.0, 1.0]))
    shifts: dict[int, tuple[float, float]] = {}
    if configuration is not None:
        logits = design @ coefficients
        for one in np.unique(configuration):
            mine = configuration == one
            shifts[int(one)] = _shift(logits[mine], outcome[mine])
    return Baseline(coefficients, np.asarray(np.linalg.inv(curvature), np.float64), shifts)


def _shift(logits: Array, outcome: Array) -> tuple[float, float]:
    def slopes(found: Array) -> tuple[Array, Array]:
        accuracy = _sigmoid(logits + found[0])
        gradient = np.array([(outcome - accuracy).sum()]) - found / PRIOR_STD**2
        return gradient, np.array([[(accuracy * (1 - accuracy)).sum() + PRIOR_STD**-2]])

    found, curvature = _newton(slopes, np.zeros(1))
    return float(found[0]), float(curvature[0, 0] ** -0.5)


def _newton(slopes: Callable[[Array], tuple[Array, Array]], start: Array) -> tuple[Array, Array]:
    found = start
    for _ in range(STEPS):
        gradient, curvature = slopes(found)
        step = np.linalg.solve(curvature, gradient)
        step *= min(
            1.0, 2.0 / max(float(np.abs(step).max()), 1e-12)
        )  # a full step may overshoot where answers are nearly all alike
        found = found + step
        if float(np.abs(step).max()) < 1e-10:
            break
    return found, slopes(found)[1]


def _design(confidence: Array) -> Array:  # (N,) -> (N, 2)
    inside = confidence.clip(MARGIN, 1 - MARGIN)
    return np.stack([np.ones_like(inside), np.log(inside) - np.log1p(-inside)], axis=1)


def _sigmoid(values: Array) -> Array:
    return 1 / (1 + np.exp(-values.clip(-50, 50)))
