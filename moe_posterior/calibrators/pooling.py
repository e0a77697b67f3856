"""How delivered outcomes move confidences: counts per (configuration, confidence bin), and shifts computed from them.

Dimensions: M outcomes, C configurations, B confidence bins, S prior scales.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moe_posterior.calibrators.probabilities import LOGIT_BOUND, safe_logit

NUM_BINS = 24
PRIOR_SCALES = (0.05, 0.2, 0.5, 1.0, 2.0)


class Counts(NamedTuple):
    """Sums over outcomes, all additive; the sum of logits gives the mean logit of a cell within its bin."""

    successes: Tensor  # (C, B) float64
    failures: Tensor  # (C, B) float64
    logits: Tensor  # (C, B) float64


class Shifts(NamedTuple):
    """The map computed from counts: ``logit' = offset + slope · logit + bins[bin] + configurations[c]``."""

    offset: Tensor  # ()
    slope: Tensor  # ()
    bins: Tensor  # (B,)
    configurations: Tensor  # (C,)


def logit_bins(logits: Tensor) -> Tensor:  # (M,) -> (M,) int64 in [0, B)
    """Bins of equal width in the logit, so that 0.99 and 0.999 fall into different bins.

    >>> logit_bins(torch.tensor([-20.0, 0.1, 20.0])).tolist()
    [0, 12, 23]
    """
    return ((logits / LOGIT_BOUND + 1) * (NUM_BINS / 2)).long().clamp(0, NUM_BINS - 1)


def affine_posterior(
    logits: Tensor,  # (B,) mean logit of each bin
    successes: Tensor,  # (B,)
    failures: Tensor,  # (B,)
) -> tuple[Tensor, Tensor]:  # (), ()
    """Offset and slope of a logistic recalibration, averaged over prior scales by how well each explains the outcomes.

    For one scale σ the pair maximises ``Σ s log p + f log(1 - p) - a² / (2σ²) - 2 (k - 1)² / σ²`` with
    ``p = sigmoid(a + k · logit)``: priors a ~ N(0, σ²) and k ~ N(1, (σ/2)²). The scales are weighted by the Laplace
    approximation of their marginal likelihood, times 1/σ: a large change needs strong evidence. Outcomes that agree with the
    confidences favour a small scale, which keeps the map where it is; outcomes that contradict them soon favour a large
    one, which lets it move. A negative slope becomes 0: more confident never means less often right.

    Source: Platt 1999 for the map; MacKay 1992, *The Evidence Framework Applied to Classification Networks*, for the
    weights.

    >>> nothing = torch.zeros(2, dtype=torch.float64)
    >>> [v.item() for v in affine_posterior(torch.tensor([0.0, 1.0], dtype=torch.float64), nothing, nothing)]
    [0.0, 1.0]
    """
    sigma = logits.new_tensor(PRIOR_SCALES)
    precision = torch.stack([sigma**-2, 4 * sigma**-2], dim=1)  # (S, 2)
    design = torch.stack([torch.ones_like(logits), logits], dim=1)  # (B, 2)

    def log_joint(moved: Tensor) -> Tensor:  # (S, 2) offsets from (0, 1) -> (S,)
        scores = logits + moved @ design.T  # (S, B)
        fit = successes * torch.nn.functional.logsigmoid(scores) + failures * torch.nn.functional.logsigmoid(-scores)
        return fit.sum(1) - (precision * moved.square()).sum(1) / 2

    moved = torch.zeros_like(precision)
    hessian = torch.diag_embed(precision)
    for _ in range(30):
        p = torch.sigmoid(logits + moved @ design.T)
        gradient = (successes - (successes + failures) * p) @ design - precision * moved
        curvature = (successes + failures) * p * (1 - p)
        hessian = torch.einsum("sb,bi,bj->sij", curvature, design, design) + torch.diag_embed(precision)
        step = torch.linalg.solve(hessian, gradient)
        if step.abs().max() < 1e-10:
            break
        moved = _ascend(log_joint, moved, step)
    evidence = log_joint(moved) + precision.log().sum(1) / 2 - torch.logdet(hessian) / 2 - sigma.log()
    offset, slope = torch.softmax(evidence, 0) @ moved
    return offset, (1 + slope).clamp(min=0)


def _ascend(log_joint: Callable[[Tensor], Tensor], moved: Tensor, step: Tensor) -> Tensor:
    # Newton can overshoot where the likelihood is flat; halved often enough, a step never lowers a concave function.
    before, size = log_joint(moved), torch.ones_like(moved[:, :1])
    for _ in range(12):
        worse = log_joint(moved + size * step) < before
        if not worse.any():
            break
        size = torch.where(worse[:, None], size / 2, size)
    return moved + size * step


def beta_shift(
    successes: Tensor,  # (G,)
    total: Tensor,  # (G,)
    expected: Tensor,  # (G,) sum of the confidences shown so far
    strength: float | Tensor,
) -> Tensor:  # (G,)
    """From the prior mean ``m = expected / total`` to the Beta posterior mean ``(strength · m + s) / (strength + n)``, in logits.

    >>> beta_shift(torch.tensor([3.0]), torch.tensor([4.0]), torch.tensor([2.0]), strength=1e-9).sigmoid()
    tensor([0.7500])
    >>> beta_shift(torch.tensor([0.0]), torch.tensor([0.0]), torch.tensor([0.0]), strength=10.0)
    tensor([0.])
    """
    seen = total > 0
    prior = torch.where(seen, expected / total.clamp(min=1e-12), 0.5).clamp(1e-9, 1 - 1e-9)
    posterior = (strength * prior + successes) / (strength + total)
    return torch.where(seen, torch.logit(posterior, eps=1e-9) - torch.logit(prior), 0)


def pooled_shifts(counts: Counts, strength: float | Tensor) -> Shifts:
    """The map from coarse to fine: offset and slope for all rows, then what is left per bin, then per configuration."""
    total = counts.successes + counts.failures  # (C, B)
    everywhere = total.sum(0)
    means = counts.logits.sum(0) / everywhere.clamp(min=1e-12)  # (B,)
    offset, slope = affine_posterior(means, counts.successes.sum(0), counts.failures.sum(0))
    logits = offset + slope * counts.logits / total.clamp(min=1e-12)  # (C, B)
    expected = total * torch.sigmoid(logits)
    bins = beta_shift(counts.successes.sum(0), everywhere, expected.sum(0), strength)
    expected = total * torch.sigmoid(logits + bins)
    configurations = beta_shift(counts.successes.sum(1), total.sum(1), expected.sum(1), strength)
    return Shifts(offset, slope, bins, configurations)


def count(
    confidence: Tensor,  # (M,)
    correct: Tensor,  # (M,) in [0, 1]
    slots: Tensor,  # (M,) int64 in [0, C)
    weights: Tensor,  # (M,)
    num_slots: int,
) -> Counts:
    """Counts of some outcomes."""
    logits = safe_logit(confidence)
    cells = slots * NUM_BINS + logit_bins(logits)
    values = torch.stack([correct * weights, (1 - correct) * weights, logits * weights])
    sums = values.new_zeros(3, num_slots * NUM_BINS)
    sums.index_add_(1, cells, values)
    return Counts(*sums.view(3, num_slots, NUM_BINS).unbind())
