"""Reliability curves with their sampling error, from one set of predictions or from collected sums."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_posterior.bins import bin_edges
from moe_posterior.checks.declared import as_declared
from moe_posterior.checks.validation import count as count_of
from moe_posterior.checks.validation import floats, number
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.metrics.calibration import BinSums, add_up, read_predictions, top_label, validate_arguments


@dataclass(frozen=True, eq=False)
class ReliabilityCurve:
    """Accuracy against confidence, bin by bin; the values of an empty bin are NaN."""

    lower: Tensor  # (B,) lower edge, included
    upper: Tensor  # (B,) upper edge, excluded but for the last bin's
    confidence: Tensor  # (B,) mean confidence
    accuracy: Tensor  # (B,)
    low: Tensor  # (B,) Wilson interval of the accuracy
    high: Tensor  # (B,)
    count: Tensor  # (B,)


@as_declared
def wilson_interval(
    successes: Tensor,  # any shape
    trials: Tensor,  # same shape
    level: float = 0.95,
) -> tuple[Tensor, Tensor]:
    """Wilson score interval of a proportion: stays inside [0, 1] and keeps a width at 0 and n successes.

    Args:
        successes, trials: counts; zero trials give NaN.
        level: two-sided confidence level, in (0, 1).

    Source: Wilson 1927, *Probable Inference, the Law of Succession, and Statistical Inference*.

    >>> low, high = wilson_interval(torch.tensor([8.0]), torch.tensor([10.0]))
    >>> round(low.item(), 3), round(high.item(), 3)
    (0.49, 0.943)
    """
    level = number("level", level, above=0.0, below=1.0)
    successes, trials = floats("successes", successes), floats("trials", trials).double()
    if successes.shape != trials.shape:
        raise InvalidArgumentError(
            f"successes and trials must have one shape; got {tuple(successes.shape)} and {tuple(trials.shape)}"
        )
    if bool(((successes < 0) | (successes > trials)).any()):
        raise InvalidArgumentError("successes must be counts of at least 0 and at most trials; got others")
    z = torch.special.ndtri(torch.tensor(0.5 + level / 2, dtype=torch.float64, device=trials.device))
    share = successes.double() / trials
    shrunk = 1 + z**2 / trials
    centre = (share + z**2 / (2 * trials)) / shrunk
    half = z * (share * (1 - share) / trials + z**2 / (4 * trials**2)).sqrt() / shrunk
    return (centre - half).clamp(0, 1), (centre + half).clamp(0, 1)


@as_declared
def curve_from_sums(sums: BinSums, group: int = 0) -> ReliabilityCurve:
    """The reliability curve of one group of collected sums."""
    group = count_of("group", group, least=0, most=len(sums.count) - 1)
    confidence, correct, count = sums.confidence[group], sums.correct[group], sums.count[group]
    edges = bin_edges(len(count)).to(count.device)
    low, high = wilson_interval(correct, count)
    return ReliabilityCurve(
        lower=edges[:-1],
        upper=edges[1:],
        confidence=confidence / count,
        accuracy=correct / count,
        low=low,
        high=high,
        count=count,
    )


@as_declared
def reliability_curve(
    preds: Tensor,  # (N, K) probabilities or (N,) confidences
    target: Tensor,  # (N,)
    n_bins: int = 15,
) -> ReliabilityCurve:
    """Accuracy and mean confidence per bin with a 95 % Wilson interval on the accuracy, all ``(n_bins,)``.

    Args:
        preds, target, n_bins: as in :func:`~moe_posterior.metrics.grouped_calibration_error`.

    Returns:
        The gaps weighted by ``count`` add up to the calibration error. The interval treats predictions as independent; grades between
        0 and 1 vary less than the interval allows for, so it is then too wide rather than too narrow.

    Raises:
        InvalidArgumentError: a shape, dtype or value that does not fit, naming the argument.

    >>> curve = reliability_curve(torch.tensor([0.25, 0.75, 0.75]), torch.tensor([0, 1, 0]), n_bins=2)
    >>> curve.confidence, curve.accuracy
    (tensor([0.2500, 0.7500], dtype=torch.float64), tensor([0.0000, 0.5000], dtype=torch.float64))
    """
    validate_arguments(1, n_bins, "l1", 1)
    preds, target = read_predictions(preds, target)
    one_group = torch.zeros(len(preds), dtype=torch.int64, device=preds.device)
    return curve_from_sums(add_up(*top_label(preds, target), one_group, 1, n_bins))
