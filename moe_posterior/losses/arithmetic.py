"""Pieces that several losses share.

Dimensions: N rows, K classes, G groups or routing configurations.
"""

import math

import torch
from torch import Tensor


def mean_of(values: Tensor) -> Tensor:  # (N,) -> ()
    return values.sum() / max(len(values), 1)


def top_label(probs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:  # (N, K), (N,) -> (N,), (N,)
    confidence, label = probs.max(1)
    return confidence, label.eq(target).to(confidence.dtype)


def true_class_nll(probs: Tensor, target: Tensor) -> Tensor:  # (N, K), (N,) -> (N,)
    true = probs.gather(1, target.long()[:, None])[:, 0]
    # Clamp no higher than the type requires: at the clamp the log has no gradient, and a tilt would give such rows all the weight.
    return -true.clamp(min=torch.finfo(true.dtype).tiny).log()


def tilted(losses: Tensor, eta: float, detach_weights: bool) -> Tensor:  # (N,) -> ()
    """Σ q_i L_i with q = softmax(η L); in the gradient q is over the rows that have one.

    A probability that underflowed to 0 shows in the value with the full weight of the worst row, but nothing can be learned from it:
    if it also took the weight of the others in the gradient, the whole batch would learn nothing.
    """
    share = (eta * losses).softmax(0)
    value = ((share.detach() if detach_weights else share) * losses).sum()
    sunk = losses >= -math.log(torch.finfo(losses.dtype).tiny) * (
        1 - 1e-6
    )  # False for NaN, which must stay in the gradient
    if not sunk.any() or sunk.all():
        return value
    learnt = tilted(losses[~sunk], eta, detach_weights)
    return learnt + (value - learnt).detach()


def multiplied(weights: Tensor, exponent: Tensor) -> Tensor:  # (G,), (G,) -> (G,)
    """Weights times exp(exponent), normalised; in log space, where a large step cannot overflow and no weight gets stuck at 0."""
    exponent = exponent.nan_to_num(0.0, 0.0, 0.0)  # an overflow under mixed precision must not become permanent
    logs = weights.clamp(min=torch.finfo(weights.dtype).tiny).log()
    return (logs + exponent.to(weights.dtype)).softmax(0)


def group_means(values: Tensor, groups: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:  # (N,), (N,) -> (G,), (G,)
    # Accumulating index_put sums in a fixed order on a GPU too, unlike index_add.
    groups = groups.long()
    sums = values.new_zeros(num_groups).index_put((groups,), values, accumulate=True)
    count = torch.bincount(groups, minlength=num_groups)
    return sums / count.clamp(min=1), count


def root(power: Tensor, norm: float) -> Tensor:
    """The norm-th root; below 1e-12, where rounding dominates and the slope is unbounded, 0 with slope 0."""
    positive = power > 1e-12
    return torch.where(positive, power.where(positive, 1.0).pow(1 / norm), power * 0)
