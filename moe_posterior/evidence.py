"""What observed outcomes add to a belief: pure functions on counts. How they fade is in :mod:`~moe_posterior.forgetting`.

Dimensions: M observations, N tokens, C clusters, E experts. A cell is a (cluster, expert) pair; cells are numbered
``cluster * E + expert``.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_posterior.checks.validation import floats, number, real, tensor
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.forgetting import discounts


class Evidence(NamedTuple):
    """Successes and failures to add to a belief: plain sums, so they merge across ranks and replicas by addition."""

    successes: Tensor  # (C, E) float64
    failures: Tensor  # (C, E) float64


class ProxyNoise(NamedTuple):
    """How often a noisy competence signal errs: the rates of a judge that stands in for the truth.

    Args:
        false_positive: probability that a failure is reported as a success.
        false_negative: probability that a success is reported as a failure.
    """

    false_positive: float = 0.0
    false_negative: float = 0.0

    @property
    def contrast(self) -> float:
        """``1 - false_positive - false_negative``: 1 for a perfect signal, 0 for one that carries no information."""
        return 1.0 - self.false_positive - self.false_negative

    def validate(self) -> None:
        """Raise InvalidArgumentError unless both are probabilities and the signal carries information."""
        rates = real(self.false_positive), real(self.false_negative)
        if not all(rate is not None and 0 <= rate < 1 for rate in rates) or not self.contrast > 0:
            raise InvalidArgumentError(
                f"proxy noise must be a false_positive_rate and a false_negative_rate in [0, 1) that sum to "
                f"less than 1 (else the signal is uninformative); got "
                f"false_positive={self.false_positive}, false_negative={self.false_negative}"
            )


def debias(signal: Tensor, noise: ProxyNoise) -> tuple[Tensor, Tensor]:  # (M,) -> (M,), (M,)
    """Unbiased success and failure counts from a signal with known error rates.

    From ``E[signal] = fp + (1 - fp - fn) θ`` follows ``r = (signal - fp) / (1 - fp - fn)``, unbiased for θ though outside [0, 1] for
    a single observation. Its variance is that of a clean observation divided by about the contrast squared, so both counts are
    weighted by the contrast squared: the posterior then is as wide as what was really learned.

    >>> success, failure = debias(torch.tensor([1.0, 0.0], dtype=torch.float64), ProxyNoise(0.1, 0.1))
    >>> [round(v, 3) for v in (success / (success + failure)).tolist()], [round(v, 3) for v in (success + failure).tolist()]
    ([1.125, -0.125], [0.64, 0.64])
    """
    contrast = noise.contrast
    unbiased = (signal - noise.false_positive) / contrast
    weight = contrast**2
    return weight * unbiased, weight * (1 - unbiased)


def proxy_ece_bound(noise: ProxyNoise, uncertainty: float) -> float:
    """How far a de-biased competence estimate can still be off if each error rate is only known up to ``±uncertainty``.

    The estimate is ``(mean signal - fp) / (1 - fp - fn)``. If the true rates are fp + a and fn + b, it is off by
    ``(a (1 - θ) - b θ) / (1 - fp - fn)``, so by at most ``uncertainty / (1 - fp - fn)``, and so is the calibration error of a routing
    score that equals it. Sampling error comes on top.

    Raises:
        InvalidArgumentError: invalid rates, or a negative uncertainty.

    >>> round(proxy_ece_bound(ProxyNoise(0.1, 0.1), 0.02), 3)
    0.025
    """
    noise.validate()
    if not uncertainty >= 0:
        raise InvalidArgumentError(f"uncertainty must be at least 0; got {uncertainty}")
    return min(1.0, uncertainty / noise.contrast)


def pooled_odds(
    successes: Tensor,  # (E, C)
    failures: Tensor,  # (E, C)
    expected: Tensor,  # (E, C) prior mean competence
    strength: Tensor | float,  # (E,), or one for all
    foreseen: tuple[Tensor, Tensor]
    | None = None,  # 2 x (E, C) successes and failures expected; None: by the prior means
) -> Tensor:  # (E,)
    """By what factor each expert's odds of success, over all clusters together, differ from what its prior means expect.

    ``[(κ m + Σ s) / (κ m + Σ n p)] / [(κ (1-m) + Σ f) / (κ (1-m) + Σ n (1-p))]`` with p the expectation of a cell, m the expert's mean
    expectation and κ the strength: 1 without evidence; after κ observations the record weighs as much as the expectation.
    Under a flat prior the odds it leads to are those of the pooled mean.

    Source: the idea of a hierarchical Beta (Gelman et al., *Bayesian Data Analysis*, chapter 5: a cell's prior mean is drawn to
    its expert's pooled mean), in a form that respects prior means that differ between clusters.

    >>> successes, failures = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> round(pooled_odds(successes, failures, torch.full((1, 2), 0.5), strength=1e-9).item(), 3)
    3.0
    """
    total, centre = successes + failures, expected.mean(dim=1)
    # A de-biased noisy signal can push counts below zero; odds stay positive.
    happened = [(strength * centre + successes.sum(1)), (strength * (1 - centre) + failures.sum(1))]
    won, lost = (total * expected, total * (1 - expected)) if foreseen is None else foreseen
    likely = [strength * centre + won.sum(1), strength * (1 - centre) + lost.sum(1)]
    tiny = torch.as_tensor(1e-6 * strength + 1e-12, dtype=centre.dtype, device=centre.device)
    won, lost = (torch.maximum(h, tiny) / torch.maximum(f, tiny) for h, f in zip(happened, likely, strict=True))
    return won / lost


def shift_odds(mean: Tensor, odds: Tensor) -> Tensor:  # (C, E), (E,) -> (C, E)
    """The mean whose odds are ``odds`` times those of ``mean``; stays within (0, 1).

    >>> shift_odds(torch.tensor([[0.5]]), torch.tensor([3.0])).item()
    0.75
    """
    return mean * odds / (mean * odds + (1 - mean))


def between_cluster_strength(successes: Tensor, failures: Tensor) -> Tensor:  # (C, E), (C, E) -> (E,)
    """How alike an expert's clusters are, as the pseudo-observations its pooled mean is worth in each: by moments.

    For cell rates p_c from n_c observations around the pooled mean m, the variance between clusters is what the sampling
    variance leaves over, ``τ² = Var(p) - mean(m (1-m) / n)``, and a Beta with mean m and that variance has strength
    ``m (1-m) / τ² - 1``. Clipped to [1, 1000]; one where fewer than two cells were seen.

    Source: the method of moments of the beta-binomial, Gelman et al., *Bayesian Data Analysis*, chapter 5.
    """
    total = successes + failures
    seen = total > 0
    count = seen.sum(dim=0)
    mean = (successes.sum(dim=0) / total.sum(dim=0).clamp(min=1e-12)).clamp(1e-6, 1 - 1e-6)
    rate = torch.where(seen, successes / total.clamp(min=1e-12), mean)
    spread = ((rate - mean).square() * seen).sum(dim=0) / (count - 1).clamp(min=1)
    within = mean * (1 - mean)
    sampling = (torch.where(seen, within / total.clamp(min=1e-12), 0.0)).sum(dim=0) / count.clamp(min=1)
    between = (spread - sampling).clamp(min=1e-9)
    strength = (within / between - 1).clamp(1.0, 1000.0)
    return torch.where(count > 1, strength, torch.ones_like(strength))


def degraded_log_likelihood_ratio(
    signal: Tensor,  # (M,) in [0, 1]
    expected: Tensor,  # (M,) competence believed so far
    degraded_share: float,
    noise: ProxyNoise | None = None,
) -> Tensor:  # (M,)
    """log P(signal | competence fell to ``degraded_share * expected``) - log P(signal | as expected): what CUSUM adds up.

    A noisy signal is taken as it comes: both probabilities are those of the signal, ``fp + (1 - fp - fn) θ``.

    Source: Page 1954, *Continuous Inspection Schemes*.
    """
    healthy = expected.clamp(1e-3, 1 - 1e-3)
    degraded = degraded_share * healthy
    if noise is not None:
        healthy, degraded = (noise.false_positive + noise.contrast * theta for theta in (healthy, degraded))
    return signal * torch.log(degraded / healthy) + (1 - signal) * torch.log((1 - degraded) / (1 - healthy))


def novelty_weight(distance: Tensor, radius: Tensor) -> Tensor:  # (N,), (N,) -> (N,) in [0, 1]
    """How far a cluster's evidence speaks for a token: 1 within the radius, then ``exp(1 - (distance / radius)²)``.

    >>> novelty_weight(torch.tensor([0.5, 1.0, 2.0, torch.inf]), torch.ones(4)).tolist()[:2]
    [1.0, 1.0]
    """
    ratio = distance / radius.clamp(min=torch.finfo(radius.dtype).tiny)
    return torch.exp((1 - ratio.square()).clamp(max=0.0)).nan_to_num(0.0)


class Observation(NamedTuple):
    """Outcomes that were observed, flattened row by row."""

    cells: Tensor  # (M,) int64
    signal: Tensor  # (M,) float64 in [0, 1]
    weight: Tensor | None = None  # (M,) float64, the part of an observation that counts here; None: all of it
    expected: Tensor | None = None  # (M,) float64 in [0, 1], prior mean of each; None where nobody counts it


def read_outcomes(
    cluster_ids: Tensor,  # (N,) int64
    outcome: Tensor,  # (N, E), or (N, k) with expert_indices
    expert_indices: Tensor | None,  # (N, k) int64
    shape: tuple[int, int],  # C, E
    threshold: float | None,
) -> Observation:
    """Validate outcomes, drop the unobserved ones (NaN), and binarise at the threshold unless it is None.

    Raises:
        InvalidArgumentError: wrong shape, an index out of range, an outcome outside [0, 1], or such a threshold.
    """
    num_clusters, num_experts = shape
    cluster_ids, outcome = tensor("cluster_ids", cluster_ids), floats("outcome", outcome)
    if expert_indices is not None:
        expert_indices = tensor("expert_indices", expert_indices)
        if not expert_indices.ndim:
            raise InvalidArgumentError("expert_indices must have shape (N, k); got one number")
    if cluster_ids.ndim != 1 or not _is_integer(cluster_ids):
        raise InvalidArgumentError(
            f"cluster_ids must be integers of shape (N,); got {cluster_ids.dtype} of shape {tuple(cluster_ids.shape)}"
        )
    columns = num_experts if expert_indices is None else expert_indices.shape[-1]
    expected = (cluster_ids.shape[0], columns)
    if tuple(outcome.shape) != expected:
        raise InvalidArgumentError(f"outcome must have shape {expected}; got {tuple(outcome.shape)}")
    if expert_indices is None:
        expert_indices = torch.arange(num_experts, device=outcome.device).expand(expected)
    elif tuple(expert_indices.shape) != expected:
        raise InvalidArgumentError(f"expert_indices must have shape {expected}; got {tuple(expert_indices.shape)}")
    if not _is_integer(expert_indices):
        raise InvalidArgumentError(f"expert_indices must be integers; got {expert_indices.dtype}")
    _require_range("expert_indices", expert_indices, num_experts)
    _require_range("cluster_ids", cluster_ids, num_clusters)
    if threshold is not None:
        threshold = number("threshold", threshold, least=0.0, most=1.0)
    wrong = (outcome < 0) | (outcome > 1)
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise InvalidArgumentError(
            f"outcome must lie in [0, 1] or be NaN (not observed); got {outcome[row, column].item():g} at ({row}, {column})"
        )
    flat = outcome.reshape(-1)
    observed = ~torch.isnan(flat)
    # Small integer types would overflow in the product.
    cells = (cluster_ids.long()[:, None] * num_experts + expert_indices.long()).reshape(-1)[observed]
    flat = flat[observed]
    # Compared in the outcome's own dtype: float32's 0.7 lies below float64's.
    signal = flat if threshold is None else flat >= threshold
    return Observation(cells, signal.to(torch.float64))


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _require_range(name: str, indices: Tensor, size: int) -> None:
    if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= size):
        raise InvalidArgumentError(
            f"{name} must lie in [0, {size}); got values from {int(indices.min())} to {int(indices.max())}"
        )


def shared_outcomes(
    members: Tensor,  # (N, J) int64
    shares: Tensor,  # (N, J)
    outcome: Tensor,  # (N, E), or (N, k) with expert_indices
    expert_indices: Tensor | None,  # (N, k) int64
    shape: tuple[int, int],  # C, E
    threshold: float | None,
) -> Observation:
    """:func:`read_outcomes` of tokens in several clusters at once: each observation counts in all of them, by the token's shares.

    Raises:
        InvalidArgumentError: as there, or shares that are not of the members' shape or not in [0, 1].
    """
    if members.ndim != 2 or not members.shape[1] or shares.shape != members.shape:
        raise InvalidArgumentError(
            f"shares must have the shape of cluster_ids, (N, J); got {tuple(shares.shape)} and {tuple(members.shape)}"
        )
    if not bool(((shares >= 0) & (shares <= 1)).all()):
        raise InvalidArgumentError("shares must lie in [0, 1]; got a value outside, or NaN")
    seen = read_outcomes(members[:, 0], outcome, expert_indices, shape, threshold)
    _require_range("cluster_ids", members, shape[0])
    rows = (~torch.isnan(outcome)).nonzero()[:, 0]  # of every observation, in the order in which it was read
    members, experts = members.long()[rows], seen.cells % shape[1]
    cells, signal = members * shape[1] + experts[:, None], seen.signal[:, None].expand(members.shape)
    return Observation(cells.reshape(-1), signal.reshape(-1), shares.double()[rows].reshape(-1))


def total_by_cell(
    seen: Observation,
    noise: ProxyNoise | None,
    fading: float | None,
) -> tuple[Tensor, Tensor]:  # (U,) int64, (3, U) float64; (4, U) where outcomes come with what was expected of them
    """The cells a batch touches, and for each its successes, failures and number of observations, by weight.

    The fourth row is the successes that were expected. With ``fading`` an observation is discounted for every later one of its cell in
    the batch.
    """
    success, failure = seen.signal, 1 - seen.signal
    if noise is not None:
        success, failure = debias(seen.signal, noise)
    if seen.weight is not None:
        success, failure = success * seen.weight, failure * seen.weight
    if fading is not None:
        discount = discounts(seen.cells, fading, seen.weight)
        success, failure = success * discount, failure * discount
    cells, place = seen.cells.unique(return_inverse=True)
    parts = [success, failure, torch.ones_like(success) if seen.weight is None else seen.weight]
    if seen.expected is not None:
        parts.append((success + failure) * seen.expected)
    columns = torch.stack(parts)
    rows = torch.arange(len(columns), device=columns.device)[:, None].expand_as(columns)
    totals = columns.new_zeros(len(columns), len(cells))
    # Accumulating index_put_ counts duplicate cells and, unlike scatter_add_, sums in a fixed order on a GPU too.
    return cells, totals.index_put_((rows, place.expand_as(columns)), columns, accumulate=True)
