"""The expected calibration error (ECE) of one set of predictions: every norm, both binnings, with or without the bias of small bins.

Dimensions: N predictions, K classes, B bins.
"""

import math

import torch
from torch import Tensor

from moe_posterior.bins import bin_indices, equal_mass_bins
from moe_posterior.checks.declared import as_declared
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.metrics.calibration import (
    BinSums,
    add_up,
    calibration_from_sums,
    read_predictions,
    top_label,
    validate_arguments,
)

BINNINGS = ("equal_width", "equal_mass")


def expected_absolute(
    mean: Tensor,  # any shape
    std: Tensor,  # same shape
) -> Tensor:
    """E|X| of X ~ N(mean, std²), the mean of the folded normal; ``|mean|`` where the std is 0.

    Source: Leone, Nelson & Nottingham 1961, *The Folded Normal Distribution*.

    >>> expected_absolute(torch.tensor([0.0, 3.0]), torch.tensor([1.0, 0.0]))
    tensor([0.7979, 3.0000])
    """
    ratio = mean / std.clamp(min=torch.finfo(std.dtype).tiny)
    return std * math.sqrt(2 / math.pi) * (-ratio.square() / 2).exp() + mean * (ratio / math.sqrt(2)).erf()


@as_declared
def calibration_error(
    preds: Tensor,  # (N, K) probabilities or (N,) confidences
    target: Tensor,  # (N,)
    *,
    n_bins: int = 15,
    norm: str = "l1",
    binning: str = "equal_width",
    debias: bool = False,
) -> Tensor:  # () float64
    """Top-label calibration error; NaN without predictions.

    Args:
        preds: class probabilities ``(N, K)``, or confidences ``(N,)`` of answers whose correctness is known.
        target: classes ``(N,)``; with confidences, 1 for a right and 0 for a wrong answer, or a grade in [0, 1]:
            a bin's error is then |mean grade − mean confidence|.
        n_bins: 15 is the convention of the literature.
        norm: ``"l1"`` (ECE), ``"l2"`` (root mean square) or ``"max"`` (worst bin).
        binning: ``"equal_width"`` or ``"equal_mass"`` (quantiles of the confidences, ties together); both hold their lower edge.
        debias: subtract what sampling noise adds. Off by default: published numbers are plain. For l1 the estimate is
            2·ECE − E[ECE of redrawn bin accuracies], with the accuracy of a bin redrawn as N(p̂, p̂(1 − p̂)/n) and the
            expectation in closed form; for l2, p̂(1 − p̂)/(n − 1) is subtracted from each squared gap. Both are at least 0. A bin with
            one prediction reveals no noise and keeps its plain gap, so with as many bins as predictions the value is the plain
            one: counted as 0, a dozen confident mistakes would pass as calibrated. For l1 any bin that is all right or all
            wrong keeps its gap, so prefer equal-mass bins. Grades use their own variance instead of p̂(1 − p̂). No such
            estimator is known for ``"max"``.

    Raises:
        InvalidArgumentError: a shape, dtype, value or combination that does not fit, naming the argument.

    Source: Guo et al. 2017 (ECE); Kumar, Liang & Ma 2019, *Verified Uncertainty Calibration*, section 5 (l2) and the appendix
    on the l1 error (their simulation, here exact).

    >>> preds, target = torch.tensor([0.9, 0.9, 0.9, 0.9]), torch.tensor([1, 1, 0, 1])
    >>> round(calibration_error(preds, target).item(), 3), round(calibration_error(preds, target, debias=True).item(), 3)
    (0.15, 0.087)
    """
    validate_arguments(1, n_bins, norm, 1)
    if binning not in BINNINGS:
        raise InvalidArgumentError(f"binning must be one of {BINNINGS}; got {binning!r}")
    if debias and norm == "max":
        raise InvalidArgumentError("norm must be 'l1' or 'l2' to be debiased; got 'max'")
    preds, target = read_predictions(preds, target)
    confidence, correct = top_label(preds, target)
    bins = bin_indices(confidence, n_bins) if binning == "equal_width" else equal_mass_bins(confidence, n_bins)
    sums = _sums(confidence, correct, bins, n_bins)
    if debias:
        return _debiased(sums, norm, _sums(confidence, correct.square(), bins, n_bins).correct)
    return calibration_from_sums(sums, norm).calibration_error[0]


def _sums(confidence: Tensor, correct: Tensor, bins: Tensor, num_bins: int) -> BinSums:
    by_bin = add_up(confidence, correct, bins, num_bins, 1)  # each bin a group: (num_bins, 1)
    return BinSums(*(sums[:, 0][None] for sums in (by_bin.confidence, by_bin.correct, by_bin.count)))


def _debiased(sums: BinSums, norm: str, squares: Tensor) -> Tensor:  # (1, B) each -> ()
    used = sums.count > 0
    if not used.any():
        return sums.count.new_tensor(torch.nan)
    count = sums.count[used]  # (B',)
    accuracy, confidence = sums.correct[used] / count, sums.confidence[used] / count
    gap, share = accuracy - confidence, count / count.sum()
    graded = accuracy - squares[used] / count  # how much less than 0 or 1 answers vary; 0 where each is one of the two
    variance = (accuracy * (1 - accuracy) - graded).clamp(min=0)
    if norm == "l1":
        terms = 2 * gap.abs() - expected_absolute(gap, (variance / count).sqrt())
        return (share * terms).sum().clamp(min=0)
    parts = gap.square() - torch.where(count > 1, variance / (count - 1).clamp(min=1), 0.0)
    return (share * parts).sum().clamp(min=0).sqrt()
