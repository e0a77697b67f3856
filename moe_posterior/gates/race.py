"""Exploration that fades with evidence: experts race until their bounds separate, and the bound alone decides after.

Dimensions: N tokens, E experts, k experts per token.

Of the experts that may still be the best of a cluster, each token draws one. A cell of few observations is always in the race, one of
many never; between the two an expert is out once its upper bound lies below the lower bound of the k-th best. An expert that fell is
tried now and then, ever more rarely while it fails, so that a recovery is found. Draws depend on (seed, number of the decision) alone.

Sources: Maron and Moore, *Hoeffding Races*, 1994, for who is in; Thompson, *On the likelihood that one unknown probability exceeds
another*, 1933, for the draws, here normal ones of the posterior's mean and standard deviation; Steele, Lea and Flood, *Fast splittable
pseudorandom number generators*, 2014, for the random words.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moe_posterior import beta as beta_functions

FEW = 20.0  # pseudo-observations (alpha + beta) of a cell up to which its expert is in the race whatever they say: an unlucky start
MANY = 50.0  # from which on it is out: as many as a pooled record is worth, so that what is known needs no exploring
RETRIED = 0.1  # share of decisions that may go to fallen experts, where nothing is known of them
PATIENCE = 20.0  # observations by which that share falls e-fold
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 0xFFFFFFFFFFFFFFFF
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


class Race(NamedTuple):
    """Who may still be among the best of each token's cell, and what is believed of them."""

    mean: Floats  # (N, E)
    std: Floats  # (N, E)
    entered: Bools  # (N, E)
    retried: Floats  # (N, E) probability that this fallen expert is tried
    leaders: NDArray[np.int64]  # (N, k) the k highest lower bounds

    @property
    def open(self) -> Bools:  # (N,)
        """Whether anything is left to draw."""
        return (self.entered.sum(axis=1) > self.leaders.shape[1]) | self.retried.any(axis=1)

    def of(self, rows: NDArray[np.int64]) -> "Race":
        """The same of some tokens."""
        return Race(self.mean[rows], self.std[rows], self.entered[rows], self.retried[rows], self.leaders[rows])


def start(
    mean: Floats,  # (N, E)
    std: Floats,  # (N, E)
    count: Floats,  # (N, E) alpha + beta
    active: Bools,  # (E,)
    fallen: Bools,  # (E,)
    leaders: NDArray[np.int64],  # (N, k)
    *,
    width: float,
) -> Race:
    """Find who is in the race: the bounds are ``mean ± width * std``.

    A fallen expert outside the race is tried less often the more is known of it since: together at most RETRIED.

    >>> one, none = np.ones((1, 2)), np.zeros(2, dtype=bool)
    >>> far, best = np.array([[0.9, 0.2]]), np.array([[0]])
    >>> start(far, 0.1 * one, 30 * one, ~none, none, best, width=1.0).open.tolist()  # .8 is above .3
    [False]
    >>> start(far, 0.1 * one, 5 * one, ~none, none, best, width=1.0).open.tolist()  # an unlucky start decides nothing
    [True]
    """
    leading = np.zeros(mean.shape, dtype=np.bool_)
    np.put_along_axis(leading, leaders, True, axis=1)
    lower, upper = mean - width * std, mean + width * std
    kth = np.where(leading, lower, np.inf).min(axis=1, keepdims=True)
    entered = ((upper > kth) | (count < FEW)) & (count < MANY) & active
    entered |= leading
    share = np.zeros(mean.shape)
    if fallen.any():
        share = np.where(fallen & ~leading, RETRIED * np.exp(-count / PATIENCE), 0.0)
        share *= np.minimum(1.0, RETRIED / np.maximum(share.sum(axis=1, keepdims=True), RETRIED))
    return Race(mean, std, entered, share, leaders)


def start_from(
    alpha: Tensor,  # (N, E)
    beta: Tensor,  # (N, E)
    active: Tensor,  # (E,) bool
    fallen: Tensor,  # (E,) bool
    leaders: Tensor,  # (N, k)
    *,
    width: float,
) -> Race:
    """:func:`start` from a belief's pseudo-counts, on any device: the race itself runs on the host, to be the same everywhere."""
    belief = (beta_functions.mean(alpha, beta), beta_functions.std(alpha, beta), alpha + beta)
    mean, std, count, running, tried, leading = (part.numpy(force=True) for part in (*belief, active, fallen, leaders))
    return start(mean, std, count, running, tried, leading, width=width)


def draw(race: Race, seed: int, numbers: NDArray[np.int64]) -> NDArray[np.int64]:  # (N,) -> (N, k)
    """The experts chosen by the decisions with these numbers: the leaders, if nothing is left to draw."""
    chosen = race.leaders.copy()
    rows = np.flatnonzero(race.open)
    if len(rows):
        chosen[rows] = choose(race.of(rows), uniforms(seed, numbers[rows], 2 * race.mean.shape[1] + 1))
    return chosen


def choose(race: Race, uniform: Floats) -> NDArray[np.int64]:  # (N, 2E + 1) in (0, 1) -> (N, k), in no order
    """The k highest draws among those in the race; with probability ``retried`` that expert takes the place of the last."""
    num_experts, top_k = race.mean.shape[1], race.leaders.shape[1]
    first, second = uniform[:, :num_experts], uniform[:, num_experts:-1]
    normal = np.sqrt(-2 * np.log(first)) * np.cos(2 * np.pi * second)  # Box and Muller
    drawn = np.where(race.entered, race.mean + race.std * normal, -np.inf)
    chosen = np.argsort(-drawn, axis=1, kind="stable")[:, :top_k]
    ends = race.retried.cumsum(axis=1)
    hit = uniform[:, -1] < ends[:, -1]
    if hit.any():
        who = (ends <= uniform[:, -1:]).sum(axis=1)
        rows = np.flatnonzero(hit & (chosen != who[:, None]).all(axis=1))
        chosen[rows, -1] = who[rows]
    return chosen


def uniforms(seed: int, numbers: NDArray[np.int64], columns: int) -> Floats:  # (N,) -> (N, columns)
    """Uniform in (0, 1), from (seed, number, column) alone.

    >>> here, there = uniforms(0, np.array([7]), 3), uniforms(0, np.array([6, 7, 8]), 3)
    >>> bool((here[0] == there[1]).all()), bool((here != there[0]).all())
    (True, True)
    """
    key = np.uint64(_mix_one((seed & _MASK) * _GOLDEN + 1))
    with np.errstate(over="ignore"):
        rows = _mix(numbers.astype(np.uint64) * np.uint64(_GOLDEN) + key)
        steps = np.arange(1, columns + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
        words = _mix(rows[:, None] + steps)
    return ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _mix_one(word: int) -> int:
    return int(_mix(np.array([word & _MASK], dtype=np.uint64))[0])
