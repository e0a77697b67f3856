"""Objectives that weigh rows by their loss, and an adversary over known groups.

Dimensions: N rows, K classes, E experts, G groups. L_i is the negative log of the probability that the *aggregate* gives to the true
class of row i.
"""

import torch
from torch import Tensor

from moe_posterior.checks.declared import as_declared
from moe_posterior.checks.validation import described, number, real, tensor
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.losses.arithmetic import group_means, mean_of, multiplied, tilted, true_class_nll
from moe_posterior.losses.checks import (
    checked,
    checked_experts,
    labelled,
    read_floats,
    read_indices,
    require_at_least,
    widened,
)


@as_declared
def nll_per_row(
    probs: Tensor,  # (N, K)
    target: Tensor,  # (N,)
) -> Tensor:  # (N,)
    """Negative log of the probability given to the true class, L_i = −log p_i[y_i], in nats.

    Finite for every probability: one that has underflowed to 0 counts as the smallest normal number of its type, 87.3 nats in float32.
    Such a row has no gradient, because 0 gives no direction; any other row has one, however small its probability. Half
    precision underflows at 6e-8: take the softmax in float32.

    Raises:
        InvalidArgumentError: a shape, dtype or value that does not fit, naming the argument.

    >>> nll_per_row(torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([0, 1]))
    tensor([ 0.6931, 87.3365])
    """
    return true_class_nll(*labelled(probs, target))


@as_declared
def nll(
    probs: Tensor,  # (N, K)
    target: Tensor,  # (N,)
) -> Tensor:  # ()
    """Mean negative log-likelihood of the aggregate: plain empirical risk minimisation.

    Raises:
        InvalidArgumentError: a shape, dtype or value that does not fit, naming the argument.

    >>> round(nll(torch.tensor([[0.75, 0.25]]), torch.tensor([1])).item(), 4)
    1.3863
    """
    return mean_of(nll_per_row(probs, target))


@as_declared
def robust(
    probs: Tensor,  # (N, K)
    target: Tensor,  # (N,)
    *,
    eta: float = 2.0,
    detach_weights: bool = False,
) -> Tensor:  # ()
    """Loss tilted to the hard rows of the batch: Σ q_i L_i with q = softmax(η L).

    As published, the gradient flows through q, and the factor on ∇L_i is q_i (1 + η (L_i − L̄_q)) with L̄_q = Σ q_i L_i. It is negative
    for rows easier than L̄_q − 1/η: the loss pushes *their* confidence down. With ``detach_weights`` the factor is q_i, never
    negative: the gradient of (1/η) log mean exp(η L), the worst expected loss within a KL ball around the batch.

    Args:
        probs: class probabilities of the aggregate.
        target: class indices.
        eta: η ≥ 0, how far the adversary tilts; 0 is the mean, the default that of the paper.
        detach_weights: hold q constant in the backward pass; the value is the same.

    Raises:
        InvalidArgumentError: a shape, dtype or value that does not fit, naming the argument.

    Source: *Toward Calibrated Mixture-of-Experts Under Distribution Shift*, arXiv 2606.20544, Robust MoE; KL-ball duality as in
    Hu and Hong 2013, *Kullback-Leibler Divergence Constrained Distributionally Robust Optimization*.

    >>> probs, target = torch.tensor([[0.5, 0.5], [0.25, 0.75]]), torch.tensor([0, 0])
    >>> [round(robust(probs, target, eta=eta).item(), 4) for eta in (0.0, 2.0)]
    [1.0397, 1.2477]
    """
    require_at_least("eta", eta, 0.0)
    return tilted(nll_per_row(probs, target), eta, detach_weights)


@as_declared
def mixture_regret(
    probs: Tensor,  # (N, K)
    expert_probs: Tensor,  # (N, E, K)
    target: Tensor,  # (N,)
) -> Tensor:  # (N,)
    """How much the mixture loses against the row's best expert in hindsight, relu(L_i − min_e L_i^e), in nats.

    An expert that was not run may be a row of zeros: it is never the best.

    Raises:
        InvalidArgumentError: a shape, dtype or value that does not fit, naming the argument.

    >>> mixture_regret(torch.tensor([[0.5, 0.5]]), torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([0]))
    tensor([0.6931])
    """
    probs, target = labelled(probs, target)
    experts = checked_experts(expert_probs, probs)
    best = true_class_nll(experts.flatten(0, 1), target.repeat_interleave(experts.shape[1])).view(experts.shape[:2])
    return (true_class_nll(probs, target) - best.amin(1)).relu()


@as_declared
def expert_disagreement(
    probs: Tensor,  # (N, K)
    expert_probs: Tensor,  # (N, E, K)
    routing_weights: Tensor,  # (N, E)
) -> Tensor:  # (N,)
    """How far the chosen experts' predictions are from the mixture's, Σ_e r_e ‖p_e − p‖²; 0 where they agree.

    Raises:
        InvalidArgumentError: a shape or dtype that does not fit, naming the argument.

    >>> experts = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    >>> expert_disagreement(torch.tensor([[0.5, 0.5]]), experts, torch.tensor([[0.5, 0.5]]))
    tensor([0.5000])
    """
    probs = checked(probs)
    experts = checked_experts(expert_probs, probs)
    routing_weights = read_floats("routing_weights", routing_weights, experts.shape[:2])
    return (widened(routing_weights) * (experts - probs[:, None]).square().sum(2)).sum(1)


@torch.no_grad()
@as_declared
def filter_mask(
    probs: Tensor,  # (N, K)
    expert_probs: Tensor,  # (N, E, K)
    routing_weights: Tensor,  # (N, E)
    target: Tensor,  # (N,)
    *,
    regret_threshold: float = 1e-6,
    disagreement_threshold: float = 0.01,
    quantile: float | None = None,
) -> Tensor:  # (N,) bool
    """The rows R on which routing matters: mixture regret or expert disagreement above its threshold. No gradient.

    Args:
        probs: class probabilities of the aggregate.
        expert_probs: class probabilities of each expert.
        routing_weights: weight of each expert in the aggregate; 0 for one that was not chosen.
        target: class indices.
        regret_threshold: in nats. The published 1e-6 lets nearly the whole batch through: a mixture of unequal experts
            always loses to the best of them.
        disagreement_threshold: a squared distance; the default is the published one.
        quantile: take the batch's quantiles at this level as both thresholds instead; 0.8 keeps the upper fifth of each.

    Raises:
        InvalidArgumentError: a shape, dtype or value that does not fit, naming the argument.

    Source: arXiv 2606.20544, Robust Filtered MoE; the quantiles are ours.

    >>> experts = torch.tensor([[[0.75, 0.25], [0.75, 0.25]], [[1.0, 0.0], [0.0, 1.0]]])
    >>> filter_mask(experts.mean(1), experts, torch.full((2, 2), 0.5), torch.tensor([0, 0]))
    tensor([False,  True])
    """
    regret = mixture_regret(probs, expert_probs, target)
    disagreement = expert_disagreement(probs, expert_probs, routing_weights)
    thresholds = {"regret_threshold": regret_threshold, "disagreement_threshold": disagreement_threshold}
    for name, threshold in thresholds.items():
        number(name, threshold, finite=False)
    if quantile is None:
        return (regret > regret_threshold) | (disagreement > disagreement_threshold)
    level = real(quantile)
    if level is None or not 0 <= level <= 1:
        raise InvalidArgumentError(f"quantile must lie in [0, 1] or be None; got {described(quantile)}")
    if not len(regret):
        return torch.zeros_like(regret, dtype=torch.bool)
    # A non-finite row must not affect the others.
    return (regret > regret.nanquantile(level)) | (disagreement > disagreement.nanquantile(level))


@as_declared
def robust_filtered(
    probs: Tensor,  # (N, K)
    expert_probs: Tensor,  # (N, E, K)
    routing_weights: Tensor,  # (N, E)
    target: Tensor,  # (N,)
    *,
    eta: float = 2.0,
    regret_threshold: float = 1e-6,
    disagreement_threshold: float = 0.01,
    quantile: float | None = None,
    detach_weights: bool = False,
) -> Tensor:  # ()
    """Mean loss plus the robust loss of the rows on which routing matters, mean L + Σ_{i∈R} softmax_R(η L)_i L_i.

    Where R is empty the second term is the mean again, so that the scale of the loss does not jump between batches.
    The arguments are those of ``robust`` and of ``filter_mask``, which gives R.

    Raises:
        InvalidArgumentError: a shape, dtype or value that does not fit, naming the argument.

    Source: arXiv 2606.20544, Robust Filtered MoE.

    >>> experts = torch.tensor([[[0.75, 0.25], [0.75, 0.25]], [[1.0, 0.0], [0.0, 1.0]]])
    >>> loss = robust_filtered(experts.mean(1), experts, torch.full((2, 2), 0.5), torch.tensor([0, 0]))
    >>> round(loss.item(), 4)  # (0.2877 + 0.6931) / 2 + 0.6931
    1.1836
    """
    require_at_least("eta", eta, 0.0)
    mask = filter_mask(
        probs,
        expert_probs,
        routing_weights,
        target,
        regret_threshold=regret_threshold,
        disagreement_threshold=disagreement_threshold,
        quantile=quantile,
    )
    losses = nll_per_row(probs, target)
    mean = mean_of(losses)
    return mean + (tilted(losses[mask], eta, detach_weights) if mask.any() else mean)


@as_declared
def group_dro(
    loss_per_row: Tensor,  # (N,)
    groups: Tensor,  # (N,) int64
    weights: Tensor,  # (G,)
    *,
    step: float = 0.01,
    adjustment: float = 0.0,
    group_sizes: Tensor | None = None,  # (G,)
) -> tuple[Tensor, Tensor]:  # (), (G,)
    """Loss under an adversary over groups, Σ_g q_g L_g after q_g ← q_g exp(step · (L_g + C/√n_g)) / Z, and the new q.

    L_g is the batch's mean loss in group g; groups that are absent keep their weight up to the normalisation Z and add
    nothing to the loss. Start from ``torch.full((G,), 1 / G)``.

    Args:
        loss_per_row: any loss of each row.
        groups: group of each row.
        weights: q after the last batch, not negative, not all 0.
        step: step of the adversary; the paper's default.
        adjustment: C ≥ 0, favours small groups, whose training loss says least about their test loss. It moves the
            adversary and, being constant, is left out of the loss.
        group_sizes: n_g, rows of each group in the training set; needed with an adjustment.

    Raises:
        InvalidArgumentError: a shape, dtype or value that does not fit, naming the argument.

    Source: Sagawa et al. 2020, *Distributionally Robust Neural Networks for Group Shifts*, algorithm 1 and equation 5.

    >>> loss, weights = group_dro(torch.tensor([1.0, 3.0]), torch.tensor([0, 1]), torch.full((2,), 0.5), step=1.0)
    >>> weights, round(loss.item(), 4)
    (tensor([0.1192, 0.8808]), 2.7616)
    """
    loss_per_row, weights = tensor("loss_per_row", loss_per_row), tensor("weights", weights)
    loss_per_row = read_floats("loss_per_row", loss_per_row, (loss_per_row.numel(),))
    weights = read_floats("weights", weights, (weights.numel(),))
    groups = read_indices("groups", groups, len(loss_per_row), len(weights))
    require_at_least("step", step, 0.0)
    require_at_least("adjustment", adjustment, 0.0)
    weights = weights.detach()
    if not (weights >= 0).all() or not 0 < weights.sum() < torch.inf:
        raise InvalidArgumentError(f"weights must be at least 0 and not all 0; got {weights.tolist()}")
    loss_per_row = widened(loss_per_row)
    group_loss, count = group_means(loss_per_row, groups, len(weights))
    gain = group_loss.detach()
    if adjustment:
        group_sizes = None if group_sizes is None else tensor("group_sizes", group_sizes)
        if (
            group_sizes is None
            or group_sizes.shape != weights.shape
            or not ((group_sizes > 0) & (group_sizes < torch.inf)).all()
        ):
            got = None if group_sizes is None else group_sizes.tolist()
            raise InvalidArgumentError(f"group_sizes must be {len(weights)} positive counts; got {got}")
        gain = gain + adjustment * group_sizes.to(gain).rsqrt()
    weights = multiplied(weights, step * gain.where(count > 0, 0.0))
    return (weights.to(group_loss.dtype) * group_loss).sum(), weights
