"""Worst calibration error under any reweighting of routing configurations, RCE(ρ).

Dimensions: G configurations, N predictions, R radii. A shift that only changes how often each configuration occurs moves
the distribution P over configurations to some Q; RCE(ρ) is the largest Σ_g q_g |gap_g| with KL(Q‖P) ≤ ρ, in nats.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_posterior.checks.declared import as_declared
from moe_posterior.checks.validation import floats, number
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.metrics.calibration import read_predictions, top_label
from moe_posterior.metrics.configurations import (
    MIN_COUNT,
    Configurations,
    configuration_calibration,
    read_configurations,
)
from moe_posterior.metrics.ece import expected_absolute

BISECTIONS = 60  # bisections of the tilt: more than the bits of a float64


class RceCurve(NamedTuple):
    """RCE(ρ) over radii."""

    rho: Tensor  # (R,) nats
    value: Tensor  # (R,) NaN where no configuration could be judged
    worst: Tensor  # (R, G) the distributions that attain it; 0 for configurations that were left out
    covered: float  # share of the predictions in configurations with enough of them


@as_declared
def reweighted_calibration_error(
    gap: Tensor,  # (G,)
    share: Tensor,  # (G,)
    rho: float,
) -> tuple[Tensor, Tensor]:  # (), (G,) float64
    """The largest Σ_g q_g |gap_g| over distributions with KL(Q‖P) ≤ ρ, and the Q that attains it.

    The maximiser is the exponential tilt q_g ∝ p_g exp(t |gap_g|), with t found by bisection on KL(Q‖P) = ρ. At ρ = 0 it is P,
    and the value the calibration error over configurations; from ρ = −log P(worst configurations) on it is P restricted to those.

    Args:
        gap: accuracy − confidence of each configuration; may be NaN only where the share is 0.
        share: P; non-negative, and normalised here.
        rho: radius in nats, ≥ 0; ``inf`` allows every Q on the support of P.

    Raises:
        InvalidArgumentError: a shape or value that does not fit.

    Source: Hu & Hong 2013, *Kullback-Leibler Divergence Constrained Distributionally Robust Optimization*.

    >>> value, worst = reweighted_calibration_error(torch.tensor([0.0, -0.5]), torch.tensor([0.75, 0.25]), rho=0.1)
    >>> round(value.item(), 4), round(worst[1].item(), 4)
    (0.2283, 0.4567)
    """
    gap, share = floats("gap", gap), floats("share", share)
    if gap.ndim != 1 or gap.shape != share.shape:
        raise InvalidArgumentError(
            f"gap and share must have one shape (G,); got {tuple(gap.shape)} and {tuple(share.shape)}"
        )
    share = share.double()
    if not ((share >= 0).all() and 0 < share.sum() < math.inf):
        raise InvalidArgumentError(f"share must be non-negative and finite with a positive sum; got {share.tolist()}")
    rho = number("rho", rho, least=0.0, finite=False)
    support = share > 0
    size = gap.double().abs()[support]
    if not size.isfinite().all():
        raise InvalidArgumentError("gap must be finite wherever share is positive; got NaN or infinity")
    worst = torch.zeros_like(share)
    worst[support] = _worst_distribution(size, share[support] / share.sum(), rho)
    return (worst[support] * size).sum(), worst


def _worst_distribution(
    size: Tensor,  # (G,) ≥ 0
    share: Tensor,  # (G,) > 0, sums to 1
    rho: float,
) -> Tensor:  # (G,)
    top = size == size.max()
    limit = torch.where(top, share, 0.0) / share[top].sum()
    if rho == 0:
        return share
    if rho >= -float(share[top].sum().log()):
        return limit
    scaled = (size - size.max()) / (
        size.max() - size.min()
    )  # in [−1, 0], which makes the tilt independent of the gap's scale

    def tilted(tilt: float) -> tuple[Tensor, float]:
        log_ratio = tilt * scaled  # log q / p, up to its normaliser
        log_ratio = log_ratio - (share.log() + log_ratio).logsumexp(0)
        q = share * log_ratio.exp()
        return q, float((q * log_ratio).sum())

    low, high = 0.0, 1.0
    while tilted(high)[1] < rho and high < 2.0**60:  # two nearly equal maxima: the limit is reached only at infinity
        low, high = high, 2 * high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if tilted(middle)[1] <= rho else (low, middle)
    return tilted(low)[0]


@as_declared
def debiased_gap(
    gap: Tensor,  # (G,)
    accuracy: Tensor,  # (G,)
    count: Tensor,  # (G,)
) -> Tensor:  # (G,) ≥ 0
    """|gap| minus what sampling noise adds: 2|g| − E|g + noise|, at least 0.

    The noise is N(0, p̃(1 − p̃)/n) with p̃ = (n p̂ + 1)/(n + 2): with the plain p̂ a small configuration without errors would seem
    noise-free and keep its whole gap. The estimate is still biased upwards for true gaps near 0, because of the clamp.

    Source: Kumar, Liang & Ma 2019, *Verified Uncertainty Calibration*, appendix on the l1 error; Laplace's rule of succession.

    >>> gap, accuracy = torch.tensor([0.1, 0.1]), torch.tensor([0.8, 0.8])
    >>> [round(value, 3) for value in debiased_gap(gap, accuracy, torch.tensor([20, 2000])).tolist()]
    [0.086, 0.1]
    """
    gap, accuracy, count = floats("gap", gap), floats("accuracy", accuracy), floats("count", count).double()
    if not gap.shape == accuracy.shape == count.shape:
        raise InvalidArgumentError(
            f"gap, accuracy and count must have one shape; got {[tuple(x.shape) for x in (gap, accuracy, count)]}"
        )
    smoothed = (count * accuracy + 1) / (count + 2)
    noise = (smoothed * (1 - smoothed) / count).sqrt()
    gap = gap.double()
    return (2 * gap.abs() - expected_absolute(gap, noise)).clamp(min=0)


@as_declared
def rce_curve(
    preds: Tensor,  # (N, K) probabilities or (N,) confidences
    target: Tensor,  # (N,)
    configurations: Configurations,
    rhos: Sequence[float],
    *,
    min_count: int = MIN_COUNT,
    debias: bool = True,
) -> RceCurve:
    """RCE(ρ) of predictions, over the configurations with enough of them.

    An adversary who picks the largest of many noisy gaps also picks noise, so the plain curve is biased upwards, more so at larger ρ.
    Debiased gaps remove most of that but the adversary still chooses after the fact; for a bound biased only downwards, see
    :func:`cross_fitted_rce_curve`.

    Args:
        preds, target: as in :func:`~moe_posterior.metrics.calibration_error`.
        configurations: from :func:`~moe_posterior.metrics.configuration_ids`.
        rhos: radii in nats, each ≥ 0.
        min_count: smaller configurations are left out, and P is renormalised over the rest; ``covered`` says how much that is.
        debias: use :func:`debiased_gap`.

    Raises:
        InvalidArgumentError: a shape, dtype or value that does not fit, naming the argument.

    >>> from moe_posterior.metrics import configuration_ids
    >>> configurations = configuration_ids(torch.zeros(4).long(), torch.tensor([[0], [0], [1], [1]]), 2, num_clusters=1)
    >>> preds, target = torch.tensor([0.5, 0.5, 0.75, 0.75]), torch.tensor([0, 1, 1, 1])
    >>> curve = rce_curve(preds, target, configurations, [0.0, torch.inf], min_count=2, debias=False)
    >>> curve.value.tolist(), curve.worst.tolist()
    ([0.125, 0.25], [[0.5, 0.5], [0.0, 1.0]])
    """
    rhos = _radii(rhos)
    result = configuration_calibration(preds, target, configurations, min_count=min_count)
    judged = result.count >= min_count
    gap = debiased_gap(result.gap, result.accuracy, result.count) if debias else result.gap.abs()
    share = torch.where(judged, result.share, 0.0)
    radii = torch.tensor(rhos, dtype=torch.float64, device=share.device)
    if not judged.any():
        return RceCurve(radii, torch.full_like(radii, torch.nan), share.expand(len(radii), -1), 0.0)
    pairs = [reweighted_calibration_error(gap, share, rho) for rho in rhos]
    values, worst = torch.stack([value for value, _ in pairs]), torch.stack([q for _, q in pairs])
    return RceCurve(radii, values, worst, float(share.sum()))


@as_declared
def cross_fitted_rce_curve(
    preds: Tensor,  # (N, K) probabilities or (N,) confidences
    target: Tensor,  # (N,)
    configurations: Configurations,
    rhos: Sequence[float],
    *,
    min_count: int = MIN_COUNT,
    splits: int = 20,
    seed: int = 0,
) -> Tensor:  # (R,) float64
    """RCE(ρ) with the worst distribution chosen on one half of each configuration and evaluated on the other.

    The evaluating half contributes its gap with the sign found on the choosing half, so neither choice sees the noise it is judged on:
    given P, the expectation is at most the true RCE(ρ), and may be below 0 if there is nothing to find. Compare with
    :func:`rce_curve`, which is biased upwards.

    Args:
        preds, target, configurations, rhos: as in :func:`rce_curve`.
        min_count: at least 2, so that both halves have a prediction.
        splits: random halvings to average, each used both ways.
        seed: of the halvings.

    Raises:
        InvalidArgumentError: a shape, dtype or value that does not fit, naming the argument.

    >>> from moe_posterior.metrics import configuration_ids
    >>> configurations = configuration_ids(torch.zeros(4).long(), torch.tensor([[0], [0], [1], [1]]), 2, num_clusters=1)
    >>> preds, target = torch.tensor([0.5, 0.5, 0.75, 0.75]), torch.tensor([1, 1, 1, 1])
    >>> cross_fitted_rce_curve(preds, target, configurations, [0.0, torch.inf], min_count=2).tolist()
    [0.375, 0.5]
    """
    rhos = _radii(rhos)
    preds, target = read_predictions(preds, target)
    configurations = read_configurations(configurations, len(preds), min_count)
    if min_count < 2 or splits < 1:
        raise InvalidArgumentError(
            f"min_count must be at least 2 and splits at least 1; got {min_count!r} and {splits!r}"
        )
    confidence, correct = top_label(preds, target)
    ids, groups = configurations.ids, len(configurations.table)
    count = torch.bincount(ids, minlength=groups)
    share = torch.where(count >= min_count, count, 0).double()
    if not share.any():
        return torch.full((len(rhos),), torch.nan, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(len(rhos), dtype=torch.float64, device=ids.device)
    for _ in range(splits):
        halves = _half_gaps(correct - confidence, ids, groups, generator)  # (2, G)
        for chosen, judge in (halves, halves.flip(0)):
            for index, rho in enumerate(rhos):
                _, worst = reweighted_calibration_error(chosen, share, rho)
                total[index] += (worst * chosen.sign() * judge)[share > 0].sum()
    return total / (2 * splits)


def _radii(rhos: Sequence[float]) -> list[float]:
    return [number(f"rhos[{index}]", rho, least=0.0, finite=False) for index, rho in enumerate(rhos)]


def _half_gaps(
    residual: Tensor,  # (N,) correct − confidence
    ids: Tensor,  # (N,)
    groups: int,
    generator: torch.Generator,
) -> Tensor:  # (2, G) mean residual of each half of each configuration
    shuffled = torch.randperm(len(ids), generator=generator).to(ids.device)
    order = shuffled[ids[shuffled].argsort(stable=True)]  # by configuration, in random order within each
    cell = ids[order] + groups * (torch.arange(len(ids), device=ids.device) % 2)
    sums = residual.new_zeros(2 * groups).index_add_(0, cell, residual[order])
    return (sums / torch.bincount(cell, minlength=2 * groups)).view(2, groups)
