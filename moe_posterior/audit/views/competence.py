"""Competence at the end of a log: the one function behind the terminal's table, the page and the live view.

Dimensions: C clusters, E experts.
"""

from collections import Counter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_posterior.audit.views.flags import moments
from moe_posterior.audit.views.survey import SourceSurvey

Z = 1.96  # of a central 95 % interval


class Estimate(NamedTuple):
    """A posterior mean and its central 95 % interval."""

    mean: float
    low: float
    high: float


class Standing(NamedTuple):
    """One expert at the end of a log."""

    expert: int
    active: bool  # in the pool
    chosen: int  # slots given to it
    outcomes: int  # received and not NaN
    observed: float | None  # their plain mean, without any prior
    over_all: Estimate | None  # competence with equal weight for each cluster; None without a belief
    asked: Estimate | None  # each cluster weighted by how often the expert was asked there; None if never
    flags: int  # that are up
    low: int  # clusters where it is below the pool without having fallen


def standings(source: SourceSurvey) -> list[Standing]:
    """Every expert of a router or gate, by number.

    Competence is the posterior as the last decisions saw it, so that a warm start, pooling and forgetting count as they do for the
    router; intervals treat clusters as independent, and are too narrow where the router pools evidence between them.
    """
    seen, won = source.seen.tolist(), source.won.tolist()
    observed = [w / n if n else None for n, w in zip(seen, won, strict=True)]
    chosen = source.chosen.tolist()
    if source.flagging is None or source.sampler is None:  # a gate without a belief
        return [Standing(e, True, chosen[e], int(seen[e]), observed[e], None, None, 0, 0) for e in range(len(chosen))]
    mean, std = moments(source.sampler.alpha, source.sampler.beta)
    low = source.flagging.low().sum(axis=0).tolist()
    up = Counter(flag.expert for flag in source.flags() if flag.ended is None)
    evenly = np.ones(len(mean), dtype=np.int64)
    return [
        Standing(
            e,
            active,
            chosen[e],
            int(seen[e]),
            observed[e],
            over_clusters(mean[:, e], std[:, e], evenly),
            over_clusters(mean[:, e], std[:, e], source.traffic[:, e]),
            up[e],
            low[e],
        )
        for e, active in enumerate(source.flagging.active.tolist())
    ]


def over_clusters(mean: NDArray, std: NDArray, weights: NDArray) -> Estimate | None:  # (C,), (C,), (C,)
    """A weighted mean over clusters with its interval; None where all weights are zero.

    >>> [round(value, 3) for value in over_clusters(np.array([0.4, 0.8]), np.array([0.1, 0.1]), np.array([1, 3]))]
    [0.7, 0.545, 0.855]
    >>> over_clusters(np.ones(1), np.ones(1), np.zeros(1)) is None
    True
    """
    total = int(weights.sum())
    if not total:
        return None
    value, spread = float(mean @ weights) / total, float(np.sqrt((std * weights) @ (std * weights))) / total
    return Estimate(value, max(0.0, value - Z * spread), min(1.0, value + Z * spread))
