"""Splits the experts' pooled records into a drift shared by all and each expert's own deviation, with their uncertainty.

Dimensions: E experts. All deviations are log odds of success against what the priors foresee.

An expert's deviation is a drift shared by the pool plus its own, ``x_e = g + d_e``, with ``g ~ N(0, 1)``. From the outcomes of a single
expert the two cannot be told apart, so the priors decide: most experts are steady, ``d_e ~ N(0, s_e)``, and a few break,
``d_e ~ N(0, 4)``. A loss of the size that pools share is then taken for shared, and those that were not observed inherit it; a
collapse is taken for the expert's own. Observing a second expert settles it.

Source: the random-effects model, Gelman et al., *Bayesian Data Analysis*, chapters 5 and 22 (mixtures), on the log-odds scale.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DRIFT_VARIANCE = 1.0  # of what all experts share
BROKEN_SHARE = 0.05  # prior probability that an expert's own deviation is a break
BROKEN_VARIANCE = 4.0
ALIKE = 50.0  # observations a pooled record is worth in a cluster, while it is unknown how alike the clusters are
_STEADY_LOG_ODDS = np.log((1 - BROKEN_SHARE) / BROKEN_SHARE)
_ENOUGH = 10  # observations a cell, on average
_ROUNDS = 3  # of which experts are broken given the drift, and the drift given those


Floats = NDArray[np.float64]


class Record(NamedTuple):
    """Each expert's outcomes over all clusters, and what its priors predicted; (E,) each."""

    won: Floats
    lost: Floats
    foreseen_won: Floats
    foreseen_lost: Floats
    centre: Floats  # mean of the prior means
    own_variance: Floats  # s_e
    known: Floats  # information behind the prior itself, in log odds


class Deviations(NamedTuple):
    """How far the experts are from their priors, in log odds; (E,) each."""

    total: Floats  # shared and own
    by_others: Floats  # the same, but the shared part is what the other experts' records say
    variance: Floats  # of the expert's own level
    others: Floats  # the shared part alone, as the other experts' records say


def deviations(record: Record, active: NDArray[np.bool_]) -> Deviations:  # (E,)
    """Split every expert's deviation from its prior into a drift of the pool and its own part.

    In numpy, on the host: a few dozen operations on vectors so short that torch would take most of its time to start them.

    >>> def of(lost):
    ...     one, n, lost = np.ones(2), np.array([100.0, 0.0]), np.array([lost, 0.0])
    ...     record = Record(n - lost, lost, 0.97 * n, 0.03 * n, 0.97 * one, 0.08 * one, 0 * one)
    ...     return deviations(record, one > 0).total.round(1).tolist()
    >>> of(9.0)  # the first expert lost 6 points: the second, which nobody asked, inherits most of that
    [-1.1, -1.0]
    >>> of(80.0)  # it broke down: most of that is its own
    [-4.8, -1.4]
    """
    residual, variance = _residual(record)
    own = record.own_variance
    broken = np.maximum(own, BROKEN_VARIANCE)
    drift, drift_variance = 0.0, DRIFT_VARIANCE
    for _ in range(_ROUNDS):
        beside = variance + drift_variance
        steady = _steady(residual - drift, own + beside, broken + beside)
        weight = np.where(active, steady / (own + variance), 0.0)
        said, precision = weight * residual, weight.sum() + 1 / DRIFT_VARIANCE
        drift, drift_variance = said.sum() / precision, 1 / precision
    spread = steady * own + (1 - steady) * broken
    others = (said.sum() - said) / (precision - weight)
    share = spread / (spread + variance)
    total, by_others = (base + (residual - base) * share for base in (drift, others))
    return Deviations(total, by_others, 1 / (1 / spread + 1 / variance + record.known), others)


def _residual(record: Record) -> tuple[Floats, Floats]:
    """The log odds ratio of observed to predicted outcomes, and its variance; one observation as predicted keeps both finite."""
    centre = record.centre
    parts = np.stack(record[:4])
    parts[::2] += centre
    parts[1::2] += 1 - centre
    # De-biased counts can fall below zero while there are few of them.
    won, lost, foreseen_won, foreseen_lost = np.maximum(parts, 1e-6)
    residual = np.log(won * foreseen_lost / (lost * foreseen_won))
    seen, rate = np.maximum(record.won + record.lost, 0), won / (won + lost)
    return residual, 1 / (seen * rate * (1 - rate) + 1e-9)


def _steady(off: Floats, steady: Floats, broken: Floats) -> Floats:
    """Probability that an expert is steady, from how far it is off the drift and the variances that this has either way.

    1 for an expert of which too little is known for a break to stand out.
    """
    odds = 0.5 * (np.log(broken / steady) - off**2 * (1 / steady - 1 / broken)) + _STEADY_LOG_ODDS
    return np.where(broken > steady, 1 / (1 + np.exp(-np.clip(odds, -30, 30))), 1.0)


def cell_prior(
    prior_mean: Tensor,
    strength: Tensor,
    shift: Tensor,
    variance: Tensor,
    alike: Tensor,
) -> tuple[Tensor, Tensor]:  # elementwise
    """Mean of a cell before its own outcomes, and how many observations that is worth.

    The pooled record speaks for a cell as far as the expert's level is known (``variance``, in log odds) and its clusters are alike
    (``alike``, in observations); where the cell's own prior is worth more (``strength``), that counts.

    >>> half, two = torch.tensor([0.5]), torch.tensor([2.0])
    >>> mean, worth = cell_prior(half, two, torch.zeros(1), torch.zeros(1), torch.tensor([50.0]))
    >>> round(mean.item(), 3), round(worth.item(), 3)  # the level is known exactly: as much as the clusters are alike
    (0.5, 50.0)
    """
    odds = torch.exp(shift)
    mean = prior_mean * odds / (prior_mean * odds + 1 - prior_mean)
    pooled = 1 / (1 / (alike + 1) + mean * (1 - mean) * variance) - 1
    return mean, torch.maximum(strength, pooled)


def likeness(seen: Tensor, measured: Tensor) -> Tensor:  # (C, E), (E,) -> (E,)
    """How alike an expert's clusters are, as measured, where its cells were seen often enough to say; else :data:`ALIKE`."""
    cells = (seen > 0).sum(dim=0)
    enough = (cells > 1) & (seen.sum(dim=0) >= _ENOUGH * cells)
    return torch.where(enough, measured, ALIKE)
