"""The Brier score split into the cost of miscalibration and the gain from discrimination.

Dimensions: N predictions, K classes, B bins; M forecasts, of one event each (K per prediction, or one).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_posterior.bins import bin_indices
from moe_posterior.checks.declared import as_declared
from moe_posterior.metrics.calibration import read_predictions, top_label, validate_arguments


class BrierDecomposition(NamedTuple):
    """Brier score = reliability − resolution + uncertainty + within_bin, to rounding."""

    reliability: Tensor  # () squared gap between forecast and frequency, ≥ 0; smaller is better
    resolution: Tensor  # () squared distance of the bins' frequencies from the base rate, ≥ 0; larger is better
    uncertainty: Tensor  # () variance of the outcomes, the same for every forecast
    within_bin: (
        Tensor  # () hidden by the binning: variance of forecasts in a bin minus twice their covariance with outcomes
    )

    @property
    def total(self) -> Tensor:  # ()
        """The Brier score."""
        return self.reliability - self.resolution + self.uncertainty + self.within_bin


@as_declared
def brier_decomposition(
    preds: Tensor,  # (N, K) probabilities or (N,) confidences
    target: Tensor,  # (N,)
    n_bins: int = 15,
    *,
    top_label_only: bool = False,
) -> BrierDecomposition:
    """Reliability, resolution, uncertainty and the within-bin remainder, which together make the Brier score exactly.

    Args:
        preds: class probabilities ``(N, K)``, or confidences ``(N,)`` of answers whose correctness is known.
        target: classes ``(N,)``; with confidences, 1 for a right and 0 for a wrong answer, or a grade in [0, 1].
        n_bins: equal-width bins on [0, 1], per class; 15 is the convention of the literature.
        top_label_only: decompose the mean of (confidence − correct)² in place of
            :func:`~moe_posterior.metrics.brier_score`, which sums over classes. Confidences are always read so.

    Returns:
        Terms in float64, summed over classes; NaN without predictions.

    Raises:
        InvalidArgumentError: a shape, dtype or value that does not fit, naming the argument.

    Source: Murphy 1973, *A New Vector Partition of the Probability Score*; the remainder from Stephenson, Coelho & Jolliffe 2008, *Two
    Extra Components in the Brier Score Decomposition*.

    >>> result = brier_decomposition(torch.tensor([0.25, 0.75, 0.75]), torch.tensor([0, 1, 0]), n_bins=2)
    >>> [round(term.item(), 4) for term in result], round(result.total.item(), 4)
    ([0.0625, 0.0556, 0.2222, 0.0], 0.2292)
    """
    validate_arguments(1, n_bins, "l1", 1)
    preds, target = read_predictions(preds, target)
    if preds.ndim == 1 or top_label_only:
        forecast, outcome = (values[:, None] for values in top_label(preds, target))
    else:
        forecast = preds.double().clamp(0, 1)
        outcome = torch.nn.functional.one_hot(target.long(), preds.shape[1]).double()
    return BrierDecomposition(*_terms(forecast, outcome, n_bins))


def _terms(forecast: Tensor, outcome: Tensor, n_bins: int) -> list[Tensor]:  # (N, K), (N, K)
    classes = torch.arange(forecast.shape[1], device=forecast.device)
    cell = (classes * n_bins + bin_indices(forecast, n_bins)).flatten()  # (M,)
    values = torch.stack([torch.ones_like(cell, dtype=torch.float64), forecast.flatten(), outcome.flatten()])
    count, said, seen = values.new_zeros(3, len(classes) * n_bins).index_add_(1, cell, values).unbind()
    said, seen = said / count, seen / count  # means of each bin, NaN where empty
    base = outcome.mean(0)  # (K,)
    said, seen = said[cell].view_as(forecast), seen[cell].view_as(forecast)  # back to each forecast: (N, K)
    spread, residual = forecast - said, outcome - seen
    return [
        term.mean(0).sum()
        for term in (
            (said - seen).square(),
            (seen - base).square(),
            (outcome - base).square(),
            spread.square() - 2 * spread * residual,
        )
    ]
