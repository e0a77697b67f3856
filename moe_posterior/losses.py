"""Training objectives for mixtures: pure functions on class probabilities and labels.

Dimensions: N rows, K classes, E experts, G groups or routing configurations. L_i is the negative log of the probability
that the *aggregate* gives to the true class of row i. Half precision is computed in float32. Every loss is a 0-d tensor
with a gradient; of a batch of no rows it is a 0 that hangs on the graph, so that a rank without data can still take part
in a backward pass. What must outlive a batch is passed in and handed back.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from moe_posterior.errors import InvalidArgumentError

GAPS = ("confidence", "soft_ece", "mmce")
LEAST_PROBABILITY = 1e-12  # caps a row at 27.6 nats, as the metrics do
LEAST_SHARE = 0.01  # of a uniform weight; see robust_config


def nll_per_row(
    probs: Tensor,  # (N, K)
    target: Tensor,  # (N,)
) -> Tensor:  # (N,)
    """Negative log of the probability given to the true class, L_i = −log max(p_i[y_i], 1e-12), in nats.

    A row at the floor has no gradient: a probability that has underflowed to 0 cannot tell in which direction to go.

    Raises:
        InvalidArgumentError: a shape, dtype or value that does not fit, naming the argument.

    >>> nll_per_row(torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([0, 1]))
    tensor([ 0.6931, 27.6310])
    """
    return _true_class_nll(_checked(probs, target), target)


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
    return _mean(nll_per_row(probs, target))


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
    _require_at_least("eta", eta, 0.0)
    return _tilted(nll_per_row(probs, target), eta, detach_weights)


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
    probs = _checked(probs, target)
    experts = _checked_experts(expert_probs, probs)
    best = _true_class_nll(experts.flatten(0, 1), target.repeat_interleave(experts.shape[1])).view(experts.shape[:2])
    return (_true_class_nll(probs, target) - best.amin(1)).relu()


def expert_disagreement(
    probs: Tensor,  # (N, K)
    expert_probs: Tensor,  # (N, E, K)
    routing_weights: Tensor,  # (N, E)
) -> Tensor:  # (N,)
    """How far the experts that were asked stand from the mixture, Σ_e r_e ‖p_e − p‖²; 0 where they agree.

    Raises:
        InvalidArgumentError: a shape or dtype that does not fit, naming the argument.

    >>> experts = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    >>> expert_disagreement(torch.tensor([[0.5, 0.5]]), experts, torch.tensor([[0.5, 0.5]]))
    tensor([0.5000])
    """
    probs = _checked(probs)
    experts = _checked_experts(expert_probs, probs)
    _require_floats("routing_weights", routing_weights, experts.shape[:2])
    return (_widened(routing_weights) * (experts - probs[:, None]).square().sum(2)).sum(1)


@torch.no_grad()
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
        routing_weights: weight of each expert in the aggregate; 0 for one that was not asked.
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
    if quantile is None:
        return (regret > regret_threshold) | (disagreement > disagreement_threshold)
    if not 0 <= quantile <= 1:
        raise InvalidArgumentError(f"quantile must lie in [0, 1] or be None; got {quantile}")
    if not len(regret):
        return torch.zeros_like(regret, dtype=torch.bool)
    return (regret > regret.quantile(quantile)) | (disagreement > disagreement.quantile(quantile))


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
    _require_at_least("eta", eta, 0.0)
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
    mean = _mean(losses)
    return mean + (_tilted(losses[mask], eta, detach_weights) if mask.any() else mean)


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
    _require_floats("loss_per_row", loss_per_row, (loss_per_row.numel(),))
    _require_floats("weights", weights, (weights.numel(),))
    _require_indices("groups", groups, len(loss_per_row), len(weights))
    _require_at_least("step", step, 0.0)
    _require_at_least("adjustment", adjustment, 0.0)
    weights = weights.detach()
    if not (weights >= 0).all() or not 0 < weights.sum() < torch.inf:
        raise InvalidArgumentError(f"weights must be at least 0 and not all 0; got {weights.tolist()}")
    loss_per_row = _widened(loss_per_row)
    group_loss, count = _group_means(loss_per_row, groups, len(weights))
    gain = group_loss.detach()
    if adjustment:
        if group_sizes is None or group_sizes.shape != weights.shape or not (group_sizes > 0).all():
            got = None if group_sizes is None else group_sizes.tolist()
            raise InvalidArgumentError(f"group_sizes must be {len(weights)} positive counts; got {got}")
        gain = gain + adjustment * group_sizes.to(gain).rsqrt()
    weights = _multiplied(weights, step * gain.where(count > 0, 0.0))
    return (weights.to(group_loss.dtype) * group_loss).sum(), weights


def mmce(
    probs: Tensor,  # (N, K)
    target: Tensor,  # (N,)
    *,
    width: float = 0.4,
    weighted: bool = True,
) -> Tensor:  # ()
    """Maximum mean calibration error: the kernel distance between top-label confidence and correctness.

    The root of Σ_ij e_i e_j exp(−|c_i − c_j| / width). Weighted (MMCE_w, the form that is trained with), e is c / n_wrong for wrong
    rows and (c − 1) / n_right for right ones, so that few wrong rows count as much as many right ones; at perfect
    calibration it vanishes only if half of the rows are right. Unweighted, e = (c − correct) / N, which does vanish there.
    Correctness is held constant. Memory grows with N².

    Args:
        probs: class probabilities.
        target: class indices.
        width: of the Laplacian kernel, in confidence; the paper's default.
        weighted: MMCE_w rather than MMCE.

    Raises:
        InvalidArgumentError: a shape, dtype or value that does not fit, naming the argument.

    Source: Kumar et al. 2018, *Trainable Calibration Measures for Neural Networks from Kernel Mean Embeddings*.

    >>> probs, target = torch.tensor([[0.75, 0.25], [0.75, 0.25]]), torch.tensor([0, 1])
    >>> mmce(probs, target).item(), mmce(probs, target, weighted=False).item()
    (0.5, 0.25)
    """
    _require_above("width", width, 0.0)
    return _mmce(*_top_label(_checked(probs, target), target), width, weighted)


def soft_ece(
    probs: Tensor,  # (N, K)
    target: Tensor,  # (N,)
    *,
    n_bins: int = 15,
    temperature: float = 0.01,
    norm: float = 2,
) -> Tensor:  # ()
    """Calibration error over soft bins, (Σ_b mass_b |acc_b − conf_b|^norm)^(1/norm), differentiable in the confidence.

    Row i belongs to the bin with centre m_b by softmax_b(−(c_i − m_b)² / temperature). Correctness is held constant.
    On few rows it is biased upwards, as every binned error is.

    Args:
        probs: class probabilities.
        target: class indices.
        n_bins: equal-width bins on [0, 1]; the convention of the literature.
        temperature: a squared confidence; 0.01 spreads a row over about two bins, towards 0 the bins turn hard.
        norm: 1 for the usual ECE; 2, the default, is the one that FGR projects against.

    Raises:
        InvalidArgumentError: a shape, dtype or value that does not fit, naming the argument.

    Source: Karandikar et al. 2021, *Soft Calibration Objectives for Neural Networks*; its use in FGR, arXiv 2606.20544.

    >>> round(soft_ece(torch.tensor([[0.75, 0.25], [0.75, 0.25]]), torch.tensor([0, 1])).item(), 4)
    0.25
    """
    if isinstance(n_bins, bool) or not isinstance(n_bins, int) or n_bins < 1:
        raise InvalidArgumentError(f"n_bins must be an integer of at least 1; got {n_bins!r}")
    _require_above("temperature", temperature, 0.0)
    _require_at_least("norm", norm, 1.0)
    return _soft_ece(*_top_label(_checked(probs, target), target), n_bins, temperature, norm)


class ConfigurationState(NamedTuple):
    """What ``robust_config`` remembers between batches of each routing configuration; constants to autograd."""

    weights: Tensor  # (G,) float64, the adversary's distribution
    gaps: Tensor  # (G,) float64, fading mean of the gap over rows; signed, > 0 where overconfident
    counts: Tensor  # (G,) float64, rows that mean rests on, faded alike

    @classmethod
    def start(cls, num_configurations: int, device: torch.device | str | None = None) -> "ConfigurationState":
        """An even adversary that has seen nothing.

        Raises:
            InvalidArgumentError: no configurations.

        >>> ConfigurationState.start(4).weights.tolist()
        [0.25, 0.25, 0.25, 0.25]
        """
        if num_configurations < 1:
            raise InvalidArgumentError(f"num_configurations must be at least 1; got {num_configurations}")
        nothing = torch.zeros(num_configurations, dtype=torch.float64, device=device)
        return cls(nothing + 1 / num_configurations, nothing, nothing.clone())


def robust_config(
    probs: Tensor,  # (N, K)
    target: Tensor,  # (N,)
    configuration: Tensor,  # (N,) int64
    state: ConfigurationState,
    *,
    gap: str = "confidence",
    weight: float = 1.0,
    step: float = 0.1,
    min_count: float = 30.0,
    half_life: float = 512.0,
) -> tuple[Tensor, ConfigurationState]:
    """Mean loss plus the calibration gap under an adversary over routing configurations, and what to remember.

    mean L + weight · Σ_c q_c t_c gap_c over the configurations in the batch. A batch holds few rows of each, and |gap_c| of few
    rows is mostly noise with a positive mean: its gradient would chase the rarest configuration. So the roles are split.
    *Earlier* batches say where and in which direction to push: m_c, the fading mean of the gap over rows, gives the trust
    t_c = m_c / (|m_c| + s_c) with s_c = 0.5 / √count_c, the largest standard error of a mean correctness (near ±1 beyond noise,
    near 0 within), and the adversary q_c ← q_c exp(step · t_c m_c) / Z. *This* batch only gives the gap, linear in its rows and
    independent of t and q, hence unbiased. Overconfident configurations are pushed down, underconfident ones up.
    The adversary moves for absent configurations too, else frequent ones would win by being seen more often.
    All of it sees training rows: a model that has learned them by heart shows no gap on them.

    Args:
        probs: class probabilities of the aggregate.
        target: class indices.
        configuration: which of G routing configurations, such as (cluster, chosen experts), each row took.
        state: from the last batch, or ``ConfigurationState.start(G)``.
        gap: ``"confidence"``: mean confidence − mean correctness. ``"soft_ece"`` and ``"mmce"`` (unweighted) also see errors that
            cancel in the mean; they are unsigned and biased upwards on few rows: for few configurations a batch.
        weight: of the penalty against the mean loss, ≥ 0.
        step: of the adversary, ≥ 0; 0.1 lets a gap of 0.1 gain a factor e in about 100 batches.
        min_count: remembered rows below which a configuration is left alone.
        half_life: rows of a configuration after which its memory has faded by half: the model changes as it learns. At the
            default the mean rests on about 740 rows, a standard error below 0.02.

    Raises:
        InvalidArgumentError: a shape, dtype or value that does not fit, naming the argument.

    Source: ours; group DRO (Sagawa et al. 2020) over the configurations that the theory of arXiv 2606.20544 leaves free to shift.

    >>> probs, target, state = torch.tensor([[0.75, 0.25]] * 4), torch.tensor([0, 1, 1, 1]), ConfigurationState.start(2)
    >>> loss, state = robust_config(probs, target, torch.tensor([0, 1, 1, 1]), state)
    >>> state.gaps.tolist(), state.counts.tolist()
    ([-0.25, 0.75], [1.0, 3.0])
    """
    probs = _checked(probs, target)
    _check_configuration(configuration, state, len(target))
    if gap not in GAPS:
        raise InvalidArgumentError(f"gap must be one of {GAPS}; got {gap!r}")
    for name, value in (("weight", weight), ("step", step), ("min_count", min_count)):
        _require_at_least(name, value, 0.0)
    _require_above("half_life", half_life, 0.0)
    mean = _mean(_true_class_nll(probs, target))
    if not len(target):
        return mean, state
    gaps, count = _gaps(gap, *_top_label(probs, target), configuration, len(state.weights))
    trust = _trust(state, min_count)
    weights = _multiplied(state.weights, step * trust * state.gaps)
    # A weight that was left to fall for a whole epoch would take another to come back when its configuration needs it.
    weights = weights.clamp(min=LEAST_SHARE / len(weights))
    weights = weights / weights.sum()
    penalty = ((weights * trust).to(gaps.dtype) * gaps).sum()
    return mean + weight * penalty, _remembered(state, weights, gaps.detach().double(), count, half_life)


def _trust(state: ConfigurationState, min_count: float) -> Tensor:  # (G,)
    error = 0.5 * state.counts.clamp(min=1e-12).rsqrt()
    return (state.gaps / (state.gaps.abs() + error)).where(state.counts >= min_count, 0.0)


def _remembered(
    state: ConfigurationState,
    weights: Tensor,  # (G,)
    gaps: Tensor,  # (G,) float64
    count: Tensor,  # (G,)
    half_life: float,
) -> ConfigurationState:
    count = count.double().where(gaps.isfinite(), 0.0)  # an overflow under mixed precision must not stay for good
    kept = state.counts * torch.exp2(-count / half_life)
    total = kept + count
    mean = (kept * state.gaps + count * gaps.nan_to_num(0.0, 0.0, 0.0)) / total.clamp(min=1e-12)
    return ConfigurationState(weights, mean, total)


def _gaps(
    kind: str,
    confidence: Tensor,  # (N,)
    correct: Tensor,  # (N,)
    configuration: Tensor,  # (N,)
    num_configurations: int,
) -> tuple[Tensor, Tensor]:  # (G,), (G,)
    gaps, count = _group_means(confidence - correct, configuration, num_configurations)
    if kind == "confidence":
        return gaps, count
    present = configuration.long().unique()
    rows = [configuration == each for each in present]
    if kind == "soft_ece":
        values = [_soft_ece(confidence[own], correct[own], 15, 0.01, 2) for own in rows]
    else:
        values = [_mmce(confidence[own], correct[own], 0.4, weighted=False) for own in rows]
    return torch.zeros_like(gaps).index_put((present,), torch.stack(values)), count


def _soft_ece(confidence: Tensor, correct: Tensor, n_bins: int, temperature: float, norm: float) -> Tensor:
    centres = (torch.arange(n_bins, dtype=confidence.dtype, device=confidence.device) + 0.5) / n_bins  # (B,)
    membership = (-(confidence[:, None] - centres).square() / temperature).softmax(1)  # (N, B)
    mass = membership.sum(0)
    gap = (membership * (confidence - correct)[:, None]).sum(0) / mass.clamp(min=1e-12)
    return _root((mass * gap.abs().pow(norm)).sum() / max(len(confidence), 1), norm)


def _mmce(confidence: Tensor, correct: Tensor, width: float, weighted: bool) -> Tensor:
    if weighted:
        share = torch.where(correct > 0, correct.sum(), (1 - correct).sum())
    else:
        share = torch.full_like(correct, len(correct))
    residual = (confidence - correct) / share
    kernel = torch.exp(-(confidence[:, None] - confidence).abs() / width)  # (N, N)
    return _root((residual[:, None] * residual * kernel).sum(), 2)


def _root(power: Tensor, norm: float) -> Tensor:
    """The norm-th root; below 1e-12, where rounding decides and the slope has no bound, 0 with slope 0."""
    positive = power > 1e-12
    return torch.where(positive, power.where(positive, 1.0).pow(1 / norm), power * 0)


def _tilted(losses: Tensor, eta: float, detach_weights: bool) -> Tensor:  # (N,) -> ()
    share = (eta * losses).softmax(0)
    return ((share.detach() if detach_weights else share) * losses).sum()


def _multiplied(weights: Tensor, exponent: Tensor) -> Tensor:  # (G,), (G,) -> (G,)
    """Weights times exp(exponent), normalised; in logs, where a large step cannot overflow nor a weight die at 0."""
    exponent = exponent.nan_to_num(0.0, 0.0, 0.0)  # an overflow under mixed precision must not stay for good
    logs = weights.clamp(min=torch.finfo(weights.dtype).tiny).log()
    return (logs + exponent.to(weights.dtype)).softmax(0)


def _group_means(values: Tensor, groups: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:  # (N,), (N,) -> (G,), (G,)
    # Accumulating index_put sums in a fixed order on a GPU too, unlike index_add.
    groups = groups.long()
    sums = values.new_zeros(num_groups).index_put((groups,), values, accumulate=True)
    count = torch.bincount(groups, minlength=num_groups)
    return sums / count.clamp(min=1), count


def _top_label(probs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:  # (N, K), (N,) -> (N,), (N,)
    confidence, label = probs.max(1)
    return confidence, label.eq(target).to(confidence.dtype)


def _true_class_nll(probs: Tensor, target: Tensor) -> Tensor:  # (N, K), (N,) -> (N,)
    return -probs.gather(1, target.long()[:, None])[:, 0].clamp(min=LEAST_PROBABILITY).log()


def _mean(values: Tensor) -> Tensor:  # (N,) -> ()
    return values.sum() / max(len(values), 1)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _checked(probs: Tensor, target: Tensor | None = None) -> Tensor:  # (N, K), (N,) -> (N, K)
    if not probs.is_floating_point() or probs.ndim != 2 or not probs.shape[1]:
        raise InvalidArgumentError(
            f"probs must be floating point of shape (N, K); got {probs.dtype} of shape {tuple(probs.shape)}"
        )
    _require_probabilities("probs", probs)
    if target is not None:
        _require_indices("target", target, *probs.shape)
    return _widened(probs)


def _checked_experts(expert_probs: Tensor, probs: Tensor) -> Tensor:  # (N, E, K), (N, K) -> (N, E, K)
    experts = expert_probs.shape[1] if expert_probs.ndim == 3 and expert_probs.shape[1] else "E ≥ 1"
    _require_floats("expert_probs", expert_probs, (len(probs), experts, probs.shape[1]))
    _require_probabilities("expert_probs", expert_probs)
    return _widened(expert_probs)


def _require_probabilities(name: str, probs: Tensor) -> None:
    """Logits would train, to nowhere. NaN passes: the loss is NaN, which a gradient scaler knows how to skip."""
    margin = max(1e-5, 2 * torch.finfo(probs.dtype).eps)
    outside = (probs < -margin) | (probs > 1 + margin)
    if outside.any():
        where = tuple(outside.nonzero()[0].tolist())
        raise InvalidArgumentError(f"{name} must be probabilities in [0, 1]; got {probs[where].item():g} at {where}")


def _require_floats(name: str, tensor: Tensor, shape: tuple[int | str, ...] | torch.Size) -> None:
    if not tensor.is_floating_point() or tuple(tensor.shape) != tuple(shape):
        expected = f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
        raise InvalidArgumentError(
            f"{name} must be floating point of shape {expected}; got {tensor.dtype} of shape {tuple(tensor.shape)}"
        )


def _require_indices(name: str, indices: Tensor, length: int, size: int) -> None:
    integer = not (indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool)
    if not integer or tuple(indices.shape) != (length,):
        raise InvalidArgumentError(
            f"{name} must be integer of shape ({length},); got {indices.dtype} of shape {tuple(indices.shape)}"
        )
    if length and (int(indices.min()) < 0 or int(indices.max()) >= size):
        raise InvalidArgumentError(
            f"{name} must lie in [0, {size - 1}]; got values from {int(indices.min())} to {int(indices.max())}"
        )


def _check_configuration(configuration: Tensor, state: ConfigurationState, length: int) -> None:
    shapes = {tuple(part.shape) for part in state}
    if len(shapes) != 1 or state.weights.ndim != 1 or not all(part.is_floating_point() for part in state):
        raise InvalidArgumentError(
            f"state must hold three floating point tensors of one shape (G,); got {[tuple(p.shape) for p in state]}"
        )
    _require_indices("configuration", configuration, length, len(state.weights))


def _require_at_least(name: str, value: float, least: float) -> None:
    if not least <= value < math.inf:
        raise InvalidArgumentError(f"{name} must be finite and at least {least:g}; got {value}")


def _require_above(name: str, value: float, bound: float) -> None:
    if not bound < value < math.inf:
        raise InvalidArgumentError(f"{name} must be finite and above {bound:g}; got {value}")
