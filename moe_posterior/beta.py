"""Moments, bounds and draws of Beta-distributed competence.

Dimensions: C clusters, E experts. Every function is elementwise over alpha and beta, broadcasts like torch, keeps the dtype
it is given and holds no state; all but :func:`quantile` and :func:`thompson` are differentiable.
"""

import torch
from torch import Tensor

from moe_posterior.errors import InvalidArgumentError

_MAX_FRACTION_STEPS = (
    10_000  # the fraction converges in O(sqrt(max(alpha, beta))) steps: pseudo-counts up to about 10^7
)
_NEWTON_STEPS = 60  # a handful suffice; the bracket shrinks by half at least whenever Newton would leave it


def mean(alpha: Tensor, beta: Tensor) -> Tensor:  # (C, E), (C, E) -> (C, E)
    """Posterior mean competence, ``alpha / (alpha + beta)``."""
    return alpha / (alpha + beta)


def variance(alpha: Tensor, beta: Tensor) -> Tensor:  # (C, E), (C, E) -> (C, E)
    """Posterior variance, ``mean (1 - mean) / (alpha + beta + 1)``."""
    total = alpha + beta
    return (alpha / total) * (beta / total) / (total + 1)


def std(alpha: Tensor, beta: Tensor) -> Tensor:  # (C, E), (C, E) -> (C, E)
    """Posterior standard deviation of competence."""
    return variance(alpha, beta).sqrt()


def lcb(alpha: Tensor, beta: Tensor, risk_aversion: float) -> Tensor:  # (C, E), (C, E) -> (C, E)
    """Lower confidence bound ``mean - risk_aversion * std``: prefers the proven over the promising.

    At equal means the cell with less evidence scores lower; without exploration it can stay unvisited forever.

    Args:
        alpha, beta: posterior pseudo-counts, positive.
        risk_aversion: λ ≥ 0 in standard deviations; 0 ranks by the mean.

    Source: *Bayesian Posterior Routing in Multi-Agent Systems*, "From Posterior to Routing Decision".

    >>> one = torch.ones(())
    >>> round(lcb(one, one, 1.0).item(), 3), round(lcb(6 * one, 6 * one, 1.0).item(), 3)
    (0.211, 0.361)
    """
    return mean(alpha, beta) - risk_aversion * std(alpha, beta)


def cdf(alpha: Tensor, beta: Tensor, value: Tensor) -> Tensor:  # (C, E), (C, E), (C, E) -> (C, E)
    """Probability that competence lies below ``value``: the regularised incomplete beta function.

    torch has no ``betainc``; this is the continued fraction of DLMF §8.17(v) by Lentz's method, in float64, on the side of
    the mean where it converges.

    >>> ones = torch.ones(())
    >>> round(cdf(3 * ones, 3 * ones, ones / 2).item(), 6)
    0.5
    """
    a, b, x = torch.broadcast_tensors(alpha.double(), beta.double(), value.double())
    swap = x > (a + 1) / (a + b + 2)
    a, b, x = torch.where(swap, b, a), torch.where(swap, a, b), torch.where(swap, 1 - x, x)
    inside = x.clamp(min=torch.finfo(torch.float64).tiny)  # at 0 the density of alpha < 1 is infinite, the answer is 0
    below = torch.exp(_log_density(a, b, inside) + torch.log1p(-inside) + torch.log(inside) - torch.log(a))
    below = torch.where(x > 0, below * _incomplete_beta_fraction(a, b, inside), 0.0)
    return torch.where(swap, 1 - below, below).to(alpha.dtype)


def _log_density(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    normaliser = torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b)
    return torch.special.xlogy(a - 1, x) + torch.special.xlog1py(b - 1, -x) + normaliser


def _incomplete_beta_fraction(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """1 / (1 + d1/(1 + d2/(1 + …))) with the coefficients of DLMF 8.17.23, by the modified Lentz recurrence."""
    tiny, epsilon = torch.finfo(torch.float64).tiny, torch.finfo(torch.float64).eps
    c = torch.ones_like(x)
    d = _away_from_zero(1 - (a + b) * x / (a + 1), tiny).reciprocal()
    fraction = d
    converged = torch.zeros_like(x, dtype=torch.bool)
    for m in range(1, _MAX_FRACTION_STEPS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for coefficient in (even, odd):
            d = _away_from_zero(1 + coefficient * d, tiny).reciprocal()
            c = _away_from_zero(1 + coefficient / c, tiny)
            # A cell that has arrived stays: its value must not depend on how long the others take.
            fraction = torch.where(converged, fraction, fraction * c * d)
        # Rounding keeps converged cells jittering by an ulp or two: each needs to arrive once, not all at the same step.
        converged = converged | ((c * d - 1).abs() <= 4 * epsilon)
        if bool(converged.all()):
            break
    return fraction


def _away_from_zero(value: Tensor, tiny: float) -> Tensor:
    return torch.where(value.abs() < tiny, torch.full_like(value, tiny), value)


@torch.no_grad()
def quantile(alpha: Tensor, beta: Tensor, probability: float) -> Tensor:  # (C, E), (C, E) -> (C, E)
    """Competence that the posterior exceeds with probability ``1 - probability``: an exact credible bound.

    Newton's method on :func:`cdf`, kept inside a shrinking bracket. Not differentiable.

    Args:
        alpha, beta: posterior pseudo-counts, positive.
        probability: level in (0, 1); 0.05 gives the lower end of a one-sided 95 % credible interval.

    Raises:
        InvalidArgumentError: ``probability`` outside (0, 1).

    >>> ones = torch.ones((), dtype=torch.float64)
    >>> round(quantile(ones, ones, 0.05).item(), 6)  # Beta(1, 1) is uniform
    0.05
    """
    if not 0.0 < probability < 1.0:
        raise InvalidArgumentError(f"probability must lie in (0, 1); got {probability}")
    a, b = torch.broadcast_tensors(alpha.double(), beta.double())
    low, high = torch.zeros_like(a), torch.ones_like(a)
    x, arrived = mean(a, b), torch.zeros_like(a, dtype=torch.bool)
    for _ in range(_NEWTON_STEPS):
        excess = cdf(a, b, x) - probability
        low, high = torch.where(excess < 0, x, low), torch.where(excess < 0, high, x)
        newton = x - excess * torch.exp(-_log_density(a, b, x))
        inside = (newton > low) & (newton < high)
        step = torch.where(inside, newton, (low + high) / 2)
        moved = (step - x).abs()
        x = torch.where(arrived, x, step)  # as in the fraction: alone or among others, a cell's bound is the same
        arrived = arrived | (moved <= 1e-14)
        if bool(arrived.all()):
            break
    return x.to(alpha.dtype)


def interval(alpha: Tensor, beta: Tensor, level: float = 0.95) -> tuple[Tensor, Tensor]:  # 2 x (C, E) -> 2 x (C, E)
    """The equal-tailed credible interval: competence lies in it with probability ``level``, and as likely below as above it.

    Args:
        alpha, beta: posterior pseudo-counts, positive.
        level: in (0, 1).

    Raises:
        InvalidArgumentError: a level outside (0, 1).

    >>> ones = torch.ones((), dtype=torch.float64)
    >>> [round(end.item(), 6) for end in interval(ones, ones)]  # Beta(1, 1) is uniform
    [0.025, 0.975]
    """
    if not 0.0 < level < 1.0:
        raise InvalidArgumentError(f"level must lie in (0, 1); got {level}")
    tail = (1 - level) / 2
    return quantile(alpha, beta, tail), quantile(alpha, beta, 1 - tail)


def thompson(
    alpha: Tensor,  # (C, E)
    beta: Tensor,  # (C, E)
    generator: torch.Generator | None = None,
) -> Tensor:  # (C, E)
    """One draw of competence from every Beta(alpha, beta): the exploring decision rule.

    Args:
        alpha, beta: posterior pseudo-counts, positive, on the generator's device.
        generator: source of randomness; the same state gives the same draws.

    Source: *Bayesian Posterior Routing in Multi-Agent Systems*, "Thompson Sampling vs. Deterministic Score".
    """
    parameters = torch.stack(torch.broadcast_tensors(alpha, beta), dim=-1)
    # torch.distributions.Beta draws by the same kernel but accepts no generator.
    return torch._sample_dirichlet(parameters.contiguous(), generator=generator)[..., 0]
