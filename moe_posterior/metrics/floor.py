"""The plain calibration error that noise alone produces.

Dimensions: N predictions, K classes, M bins in use.
"""

from typing import Any

import torch
from torch import Tensor

from moe_posterior.bins import bin_indices
from moe_posterior.checks.declared import as_declared
from moe_posterior.checks.validation import floats
from moe_posterior.metrics.calibration import read_predictions, top_label, validate_arguments


@as_declared
def noise_floor(preds: Any, *, n_bins: int = 15) -> Tensor:  # (N, K) probabilities or (N,) confidences -> () float64
    """Mean plain ECE of a model that is right exactly as often as these confidences say; NaN without predictions.

    The number of right answers in a bin is treated as binomial with the variance given by the bin's confidences; its mean absolute
    deviation is a closed form, so nothing is drawn. A plain ECE near the floor is no evidence against calibration.

    Raises:
        InvalidArgumentError: a shape, dtype or value that does not fit, naming the argument.

    Source: Diaconis & Zabell 1991, *Closed Form Summation for Classical Distributions* (De Moivre's formula).

    >>> round(noise_floor(torch.full((100,), 0.75)).item(), 4)
    0.0344
    """
    validate_arguments(1, n_bins, "l1", 1)
    known = floats("preds", preds)
    preds, labels = read_predictions(known, torch.zeros(known.shape[:1], dtype=torch.int64))
    confidence, _ = top_label(preds, labels.to(preds.device))
    sums = confidence.new_zeros(3, n_bins).index_add_(
        1,
        bin_indices(confidence, n_bins),
        torch.stack([torch.ones_like(confidence), confidence, confidence * (1 - confidence)]),
    )
    count, said, spread = sums[:, sums[0] > 0]
    return binomial_deviation(count, said / count, spread).sum() / count.sum()


def binomial_deviation(count: Tensor, rate: Tensor, variance: Tensor) -> Tensor:  # (M,) each -> (M,)
    """E|X − count · rate| of a binomial X, stretched to the variance of answers that are right at unequal rates."""
    top = (count * rate).floor().clamp(max=count - 1) + 1
    ways = (count + 1).lgamma() - (top + 1).lgamma() - (count - top + 1).lgamma()
    logs = ways + torch.xlogy(top, rate) + torch.xlogy(count - top + 1, 1 - rate)
    binary = count * rate * (1 - rate)
    return 2 * top * logs.exp() * torch.where(binary > 0, (variance / binary).clamp(max=1).sqrt(), 1.0)
