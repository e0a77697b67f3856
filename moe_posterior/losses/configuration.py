"""An adversary over routing configurations.

Dimensions: N rows, K classes, G routing configurations.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_posterior.checks.declared import as_declared
from moe_posterior.checks.validation import count, tensor
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.losses.arithmetic import group_means, mean_of, multiplied, top_label, true_class_nll
from moe_posterior.losses.calibration import mmce_of, soft_ece_of
from moe_posterior.losses.checks import labelled, read_indices, require_above, require_at_least

GAPS = ("confidence", "soft_ece", "mmce")
MOST_CONFIGURATIONS = 1 << 28  # 2 GB for each of three sums
LEAST_SHARE = 0.01  # of a uniform weight; see robust_config


class ConfigurationState(NamedTuple):
    """What ``robust_config`` keeps for each routing configuration between batches; constants for autograd."""

    weights: Tensor  # (G,) float64, the adversary's distribution
    gaps: Tensor  # (G,) float64, fading mean of the gap over rows; signed, > 0 where overconfident
    counts: Tensor  # (G,) float64, number of rows behind that mean, faded the same way

    @classmethod
    @as_declared
    def start(cls, num_configurations: int, device: torch.device | str | None = None) -> "ConfigurationState":
        """A uniform adversary, before the first batch.

        Raises:
            InvalidArgumentError: no configurations.

        >>> ConfigurationState.start(4).weights.tolist()
        [0.25, 0.25, 0.25, 0.25]
        """
        count("num_configurations", num_configurations, most=MOST_CONFIGURATIONS)
        try:
            device = None if device is None else torch.device(device)
        except RuntimeError as error:
            raise InvalidArgumentError(f"device must be a device of torch; got {device!r}") from error
        nothing = torch.zeros(num_configurations, dtype=torch.float64, device=device)
        return cls(nothing + 1 / num_configurations, nothing, nothing.clone())


@as_declared
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
    """Mean loss plus the calibration gap under an adversary over routing configurations, and the new state.

    mean L + weight · Σ_c q_c t_c gap_c over the configurations in the batch. A batch holds few rows of each, and |gap_c| of few
    rows is mostly noise with a positive mean: its gradient would chase the rarest configuration. So the roles are split.
    *Earlier* batches say where and in which direction to push: m_c, the fading mean of the gap over rows, gives the trust
    t_c = m_c / (|m_c| + s_c) with s_c = 0.5 / √count_c, the largest standard error of a mean correctness (near ±1 beyond noise,
    near 0 within), and the adversary q_c ← q_c exp(step · t_c m_c) / Z. *This* batch only gives the gap, linear in its rows and
    independent of t and q, hence unbiased. Overconfident configurations are pushed down, underconfident ones up.
    The adversary moves for absent configurations too, else frequent ones would win by being seen more often.
    All of this is measured on training rows: a model that has memorised them shows no gap.

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
    probs, target = labelled(probs, target)
    configuration = _read_configuration(configuration, state, len(target))
    if gap not in GAPS:
        raise InvalidArgumentError(f"gap must be one of {GAPS}; got {gap!r}")
    for name, value in (("weight", weight), ("step", step), ("min_count", min_count)):
        require_at_least(name, value, 0.0)
    require_above("half_life", half_life, 0.0)
    mean = mean_of(true_class_nll(probs, target))
    if not len(target):
        return mean, state
    gaps, count = _gaps(gap, *top_label(probs, target), configuration, len(state.weights))
    trust = _trust(state, min_count)
    weights = multiplied(state.weights, step * trust * state.gaps)
    # Without a floor, a weight that falls for an epoch would need another to recover when its configuration needs it.
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
    count = count.double().where(gaps.isfinite(), 0.0)  # an overflow under mixed precision must not become permanent
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
    gaps, count = group_means(confidence - correct, configuration, num_configurations)
    if kind == "confidence":
        return gaps, count
    present = configuration.long().unique()
    rows = [configuration == each for each in present]
    if kind == "soft_ece":
        values = [soft_ece_of(confidence[own], correct[own], 15, 0.01, 2) for own in rows]
    else:
        values = [mmce_of(confidence[own], correct[own], 0.4, weighted=False) for own in rows]
    return torch.zeros_like(gaps).index_put((present,), torch.stack(values)), count


def _read_configuration(configuration: Tensor, state: ConfigurationState, length: int) -> Tensor:
    state = ConfigurationState(*(tensor(f"state.{name}", part) for name, part in state._asdict().items()))
    shapes = {tuple(part.shape) for part in state}
    if len(shapes) != 1 or state.weights.ndim != 1 or not all(part.is_floating_point() for part in state):
        raise InvalidArgumentError(
            f"state must hold three floating point tensors of one shape (G,); got {[tuple(p.shape) for p in state]}"
        )
    return read_indices("configuration", configuration, length, len(state.weights))
