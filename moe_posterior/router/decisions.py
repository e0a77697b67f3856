"""What a router answers: where a query goes, and why.

Dimensions: N queries, k experts per query.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from moe_posterior import beta as beta_functions


class Decision(NamedTuple):
    """Where one query goes, and why."""

    id: int  # hand it back with the outcome
    expert: int  # the best; `experts` has all k
    score: float  # what the gate ranked it by: by default the lower confidence bound of its competence, also where it explored
    cluster: int
    distance: float  # to the cluster's centroid; inf for an embedding that holds NaN or inf
    abstain: bool  # escalate instead: the score is below the router's threshold, or the embedding is broken
    explored: bool  # not what the belief alone would have chosen
    experts: tuple[int, ...]  # k, best first
    weights: tuple[float, ...]  # k, sum to 1
    alphas: tuple[float, ...]  # k, pseudo-successes of the belief that it rests on, which may have moved on since
    betas: tuple[float, ...]  # k, pseudo-failures

    @property
    def mean(self) -> float:
        """The best expert's posterior mean competence: the estimate of success to show. ``score`` is a bound, and lies below it."""
        return self.means[0]

    @property
    def means(self) -> tuple[float, ...]:  # k
        """The posterior mean competence of each of the ``experts``."""
        return tuple(a / (a + b) for a, b in zip(self.alphas, self.betas, strict=True))

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """The equal-tailed credible interval of the best expert's competence, exact; computed when asked for, in about 0.05 s.

        Raises:
            InvalidArgumentError: a level outside (0, 1).
        """
        alpha, beta = torch.tensor([[self.alphas[0]], [self.betas[0]]], dtype=torch.float64).unbind()
        low, high = beta_functions.interval(alpha, beta, level)
        return low.item(), high.item()


class Decisions(NamedTuple):
    """Where a batch of queries goes: the fields of :class:`Decision` as arrays."""

    ids: NDArray[np.int64]  # (N,)
    experts: NDArray[np.int64]  # (N, k)
    scores: NDArray[np.float32]  # (N, k)
    clusters: NDArray[np.int64]  # (N,)
    distance: NDArray[np.float32]  # (N,)
    abstain: NDArray[np.bool_]  # (N,)
    explored: NDArray[np.bool_]  # (N,)
    weights: NDArray[np.float32]  # (N, k)
    alphas: NDArray[np.float64]  # (N, k)
    betas: NDArray[np.float64]  # (N, k)

    @property
    def means(self) -> NDArray[np.float64]:  # (N, k)
        """The posterior mean competence of each chosen expert: the estimates of success to show."""
        return self.alphas / (self.alphas + self.betas)

    def interval(self, level: float = 0.95) -> tuple[NDArray[np.float64], NDArray[np.float64]]:  # 2 x (N, k)
        """Lower and upper ends of the equal-tailed credible intervals, as :meth:`Decision.interval` for every chosen expert.

        Raises:
            InvalidArgumentError: a level outside (0, 1).
        """
        distinct, place = np.unique(np.stack([self.alphas, self.betas]).reshape(2, -1), axis=1, return_inverse=True)
        alpha, beta = torch.from_numpy(distinct).unbind()
        ends = beta_functions.interval(alpha, beta, level)
        low, high = (end.numpy()[place.reshape(self.alphas.shape)] for end in ends)
        return low, high
