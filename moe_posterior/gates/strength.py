"""How many observations a prior is worth, and how its level compares with the outcomes: from held-out counts.

Dimensions: C clusters, E experts.
"""

import torch
from torch import Tensor

from moe_posterior import evidence as evidence_functions

_WEAKEST, _STRONGEST, _STEPS = 0.0, 4.0, 161  # of the grid of strengths, as powers of ten
_WITHIN = 1.92  # nats below the maximum: half of the 95 % quantile of chi-squared with one degree of freedom
_LEVEL = 2.0  # observations that an expert's expected level is worth against what happened
_EDGE = 1e-4  # a cell's mean stays this far from 0 and 1


def safe_strength(successes: Tensor, failures: Tensor, foreseen: Tensor) -> float:  # 3 x (C, E)
    """The smallest strength κ of the prior that the counts do not reject: cautious where there are few of them.

    Cell (c, e) deviates from its prior mean, ``foreseen / n``, as one draw from a Beta of strength κ: its successes are beta-binomial.
    Of the κ whose likelihood, over all cells together, lies within the 95 % interval of the most likely one, this is the smallest,
    and at most the mean number of observations of a cell. The most likely κ itself is often unbounded: where the cells happen to
    deviate no more than by chance, no evidence would ever overrule the prior.

    Args:
        successes, failures: counts of outcomes that the prior was not learned from; fractions are fine.
        foreseen: the sum of the prior means of those outcomes.

    Source: the beta-binomial, Gelman et al., *Bayesian Data Analysis*, chapter 5; the interval by the profile likelihood.

    >>> n = torch.full((50, 1), 20.0)
    >>> apart = torch.where(torch.arange(50)[:, None] % 2 > 0, 0.9, 0.1) * n  # clusters differ widely, and the prior does not know
    >>> safe_strength(apart, n - apart, 0.5 * n) < 2.0
    True
    """
    successes, failures = successes.double().clamp(min=0), failures.double().clamp(min=0)
    total = successes + failures
    seen = total > 0
    if not bool(seen.any()):
        return 10.0**_WEAKEST
    won, lost, total = successes[seen], failures[seen], total[seen]
    mean = (foreseen.double()[seen] / total).clamp(_EDGE, 1 - _EDGE)
    grid = torch.logspace(_WEAKEST, _STRONGEST, _STEPS, dtype=torch.float64)
    likelihood = torch.stack([_log_likelihood(won, lost, mean, float(strength)) for strength in grid]).cpu()
    lowest = grid[likelihood >= likelihood.max() - _WITHIN][0]
    return min(float(lowest), float(total.mean()))


def _log_likelihood(won: Tensor, lost: Tensor, mean: Tensor, strength: float) -> Tensor:  # 3 x (M,) -> ()
    alpha, beta = strength * mean, strength * (1 - mean)
    return (_log_beta(alpha + won, beta + lost) - _log_beta(alpha, beta)).sum()


def _log_beta(alpha: Tensor, beta: Tensor) -> Tensor:
    return torch.lgamma(alpha) + torch.lgamma(beta) - torch.lgamma(alpha + beta)


def levelled_means(successes: Tensor, failures: Tensor, foreseen: Tensor) -> Tensor:  # 3 x (C, E) -> (C, E)
    """The mean prior of every cell, its level moved in log odds to where held-out outcomes put each expert.

    A cell without rows has its expert's overall mean. It is shown for a cluster, and pooled for a token far from all clusters.

    >>> n = torch.full((2, 1), 1000.0)
    >>> round(levelled_means(0.8 * n, 0.2 * n, 0.9 * n).mean().item(), 2)  # .9 was foreseen, .8 came
    0.8
    """
    total = successes + failures
    overall = (foreseen.sum(dim=0) + 1) / (total.sum(dim=0) + 2)
    mean = torch.where(total > 0, foreseen / total.clamp(min=1e-12), overall).clamp(_EDGE, 1 - _EDGE)
    tables = (successes.T, failures.T, mean.T, _LEVEL, (foreseen.T, (total - foreseen).T))
    return evidence_functions.shift_odds(mean, evidence_functions.pooled_odds(*tables)).clamp(_EDGE, 1 - _EDGE)
