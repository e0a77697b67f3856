"""Pieces that several losses share.

Dimensions: N rows, K classes, G groups or routing configurations.
"""

import torch
from torch import Tensor

LEAST_PROBABILITY = 1e-12  # caps a row at 27.6 nats, as the metrics do


def mean_of(values: Tensor) -> Tensor:  # (N,) -> ()
    return values.sum() / max(len(values), 1)


def top_label(probs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:  # (N, K), (N,) -> (N,), (N,)
    confidence, label = probs.max(1)
    return confidence, label.eq(target).to(confidence.dtype)


def true_class_nll(probs: Tensor, target: Tensor) -> Tensor:  # (N, K), (N,) -> (N,)
    return -probs.gather(1, target.long()[:, None])[:, 0].clamp(min=LEAST_PROBABILITY).log()


def tilted(losses: Tensor, eta: float, detach_weights: bool) -> Tensor:  # (N,) -> ()
    share = (eta * losses).softmax(0)
    return ((share.detach() if detach_weights else share) * losses).sum()


def multiplied(weights: Tensor, exponent: Tensor) -> Tensor:  # (G,), (G,) -> (G,)
    """Weights times exp(exponent), normalised; in logs, where a large step cannot overflow nor a weight die at 0."""
    exponent = exponent.nan_to_num(0.0, 0.0, 0.0)  # an overflow under mixed precision must not stay for good
    logs = weights.clamp(min=torch.finfo(weights.dtype).tiny).log()
    return (logs + exponent.to(weights.dtype)).softmax(0)


def group_means(values: Tensor, groups: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:  # (N,), (N,) -> (G,), (G,)
    # Accumulating index_put sums in a fixed order on a GPU too, unlike index_add.
    groups = groups.long()
    sums = values.new_zeros(num_groups).index_put((groups,), values, accumulate=True)
    count = torch.bincount(groups, minlength=num_groups)
    return sums / count.clamp(min=1), count


def root(power: Tensor, norm: float) -> Tensor:
    """The norm-th root; below 1e-12, where rounding decides and the slope has no bound, 0 with slope 0."""
    positive = power > 1e-12
    return torch.where(positive, power.where(positive, 1.0).pow(1 / norm), power * 0)
