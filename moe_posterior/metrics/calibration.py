"""Top-label calibration as sums over confidence bins, for any number of possibly overlapping groups.

Dimensions: N predictions, K classes, G groups, B = n_bins bins, P (prediction, group) pairs. Bins have equal width and include
their lower edge, the last one also 1.0 (:mod:`moe_posterior.bins`); torchmetrics is the same except for an extra bin for confidence
1.0 alone, which changes the error of saturated predictions. The sums have a fixed size and are float64, so they add up over
batches, ranks and files without drift: a metric, a reliability curve and an interval all read the same three numbers per bin.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_posterior.bins import MOST_BINS, bin_edges, place
from moe_posterior.checks.declared import as_declared
from moe_posterior.checks.validation import count, floats, is_empty_list, tensor
from moe_posterior.errors import InvalidArgumentError

NORMS = ("l1", "l2", "max")
MOST_SUMS = 1 << 28


@dataclass(frozen=True, eq=False)
class BinSums:
    """Sums over the predictions in each bin, all that calibration needs; ``+`` merges two."""

    confidence: Tensor  # (G, B) float64, sum of confidences
    correct: Tensor  # (G, B) float64, number of correct predictions, or the sum of their grades
    count: Tensor  # (G, B) float64, number of predictions

    def __add__(self, other: "BinSums") -> "BinSums":
        return BinSums(
            self.confidence + other.confidence,
            self.correct + other.correct,
            self.count + other.count,
        )


@dataclass(frozen=True, eq=False)
class GroupedCalibration:
    """Calibration of each group; NaN for groups with no or too few predictions."""

    calibration_error: Tensor  # (G,), NaN below min_count
    accuracy: Tensor  # (G,), NaN for an empty group
    confidence: Tensor  # (G,), mean top-label confidence, NaN for an empty group
    count: Tensor  # (G,), predictions seen


def validate_arguments(num_groups: int, n_bins: int, norm: str, min_count: int) -> None:
    """Reject meaningless settings, naming the argument."""
    for name, value in (("num_groups", num_groups), ("n_bins", n_bins), ("min_count", min_count)):
        count(name, value, most=MOST_BINS if name == "n_bins" else None)
    if num_groups * n_bins > MOST_SUMS:
        raise InvalidArgumentError(
            f"num_groups times n_bins must be at most {MOST_SUMS}, 2 GB a sum; got {num_groups} times {n_bins}"
        )
    if not isinstance(norm, str) or norm not in NORMS:
        raise InvalidArgumentError(f"norm must be one of {NORMS}; got {norm!r}")


def validate_predictions(
    preds: Tensor,  # (N, K) probabilities or (N,) confidences
    target: Tensor,  # (N,)
) -> None:
    """Reject anything but probabilities with matching labels, or confidences with 0/1 correctness or grades in [0, 1].

    Mixtures of probabilities may leave [0, 1] by rounding, so a margin of 1e-5 (two ulp in half precision) passes.
    Logits do not: a metric that applies a softmax to whatever looks like logits turns one rounding error into a wrong
    report.
    """
    if not preds.is_floating_point() or preds.ndim not in (1, 2):
        raise InvalidArgumentError(
            f"preds must be floating point of shape (N, K) or (N,); got {preds.dtype} of shape {tuple(preds.shape)}"
        )
    graded = preds.ndim == 1 and target.is_floating_point()
    if target.shape != preds.shape[:1] or target.is_complex() or (target.is_floating_point() and not graded):
        grades = "" if preds.ndim == 2 else ", or floating point in [0, 1],"
        raise InvalidArgumentError(
            f"target must be integer{grades} of shape ({len(preds)},); got {target.dtype} of shape {tuple(target.shape)}"
        )
    if not len(preds):
        return
    margin = max(1e-5, 2 * torch.finfo(preds.dtype).eps)
    inside = (preds >= -margin) & (preds <= 1 + margin)  # False for NaN
    if not inside.all():
        where = tuple((~inside).nonzero()[0].tolist())
        raise InvalidArgumentError(f"preds must be probabilities in [0, 1]; got {preds[where].item()} at {where}")
    if graded:
        fits = (target >= 0) & (target <= 1)  # False for NaN
        if not fits.all():
            row = int((~fits).nonzero()[0])
            raise InvalidArgumentError(
                f"target must be grades in [0, 1] (1 = wholly correct); got {target[row].item():g} in row {row}"
            )
        return
    num_labels = preds.shape[1] if preds.ndim == 2 else 2
    if preds.ndim == 2:
        totals = preds.double().sum(1)
        off = (totals - 1).abs() > max(1e-3, num_labels * torch.finfo(preds.dtype).eps)
        if off.any():
            row = int(off.nonzero()[0])
            raise InvalidArgumentError(f"preds must sum to 1 over classes; got {totals[row].item():.6g} in row {row}")
    if int(target.min()) < 0 or int(target.max()) >= num_labels:
        meaning = "" if preds.ndim == 2 else " (1 = the prediction was correct)"
        raise InvalidArgumentError(
            f"target must lie in [0, {num_labels - 1}]{meaning}; got [{int(target.min())}, {int(target.max())}]"
        )


def validate_groups(
    groups: Tensor,  # (N,) int64 or (N, G) bool
    num_groups: int,
    num_predictions: int,
) -> None:
    """Reject group ids or memberships that do not match the predictions."""
    ids = groups.ndim == 1 and groups.dtype == torch.int64
    membership = groups.ndim == 2 and groups.dtype == torch.bool and groups.shape[1] == num_groups
    if not (ids or membership) or len(groups) != num_predictions:
        raise InvalidArgumentError(
            f"groups must be int64 ids of shape ({num_predictions},) or bool membership of shape "
            f"({num_predictions}, {num_groups}); got {groups.dtype} of shape {tuple(groups.shape)}"
        )
    if ids and len(groups) and (int(groups.min()) < 0 or int(groups.max()) >= num_groups):
        raise InvalidArgumentError(
            f"groups must lie in [0, {num_groups - 1}]; got [{int(groups.min())}, {int(groups.max())}]"
        )


def read_predictions(preds: Any, target: Any) -> tuple[Tensor, Tensor]:  # (N, K) or (N,), (N,)
    """Predictions and labels from tensors, arrays or lists; integer labels of any width become int64.

    Raises:
        InvalidArgumentError: as :func:`validate_predictions`.

    >>> read_predictions([0.25, 0.75], torch.tensor([0, 1], dtype=torch.uint16))[1]
    tensor([0, 1])
    """
    probs, truth = tensor("preds", preds), tensor("target", target)
    if probs.is_floating_point():
        probs = floats("preds", probs)
    graded = truth.is_floating_point() and not is_empty_list(target)
    truth = floats("target", truth) if graded else truth.to(torch.int64)
    validate_predictions(probs, truth)
    return probs, truth


def read_groups(groups: Any, num_groups: int, num_predictions: int) -> Tensor:  # (N,) int64 or (N, G) bool
    """Group ids of any width as int64, or bool membership.

    Raises:
        InvalidArgumentError: as :func:`validate_groups`.
    """
    found = tensor("groups", groups)
    ids = found.ndim == 1 and not found.is_floating_point() and found.dtype != torch.bool
    if ids or is_empty_list(groups):
        found = found.to(torch.int64)
    validate_groups(found, num_groups, num_predictions)
    return found


@as_declared
def top_label(
    preds: Tensor,  # (N, K) probabilities or (N,) confidences
    target: Tensor,  # (N,)
) -> tuple[Tensor, Tensor]:  # (N,), (N,)
    """Confidence of the top label and its correctness (or grade), both float64; ties go to the class that ``max`` returns.

    >>> confidence, correct = top_label(torch.tensor([[0.25, 0.75], [0.5, 0.5]]), torch.tensor([1, 1]))
    >>> confidence.tolist(), correct.tolist()
    ([0.75, 0.5], [1.0, 0.0])
    """
    if preds.ndim not in (1, 2) or target.shape != preds.shape[:1]:
        raise InvalidArgumentError(
            f"preds must be of shape (N, K) or (N,) and target of shape (N,); "
            f"got {tuple(preds.shape)} and {tuple(target.shape)}"
        )
    if preds.ndim == 1:
        return preds.double().clamp(0, 1), target.double()
    confidence, label = preds.max(dim=1)
    return confidence.double().clamp(0, 1), label.eq(target).double()


@as_declared
def bin_sums(
    confidence: Tensor,  # (N,)
    correct: Tensor,  # (N,)
    groups: Tensor,  # (N,) int64 or (N, G) bool
    num_groups: int,
    n_bins: int,
) -> BinSums:
    """Sums of one batch; a prediction counts once in every group it belongs to."""
    validate_arguments(num_groups, n_bins, "l1", 1)
    confidence, correct = tensor("confidence", confidence), tensor("correct", correct)
    if confidence.ndim != 1 or confidence.shape != correct.shape:
        raise InvalidArgumentError(
            f"confidence and correct must have one shape (N,); got {tuple(confidence.shape)} and {tuple(correct.shape)}"
        )
    return add_up(confidence, correct, read_groups(groups, num_groups, len(confidence)), num_groups, n_bins)


def add_up(confidence: Tensor, correct: Tensor, groups: Tensor, num_groups: int, n_bins: int) -> BinSums:
    """:func:`bin_sums` of checked inputs: no value is read, so there is no GPU synchronisation."""
    bins = place(confidence, bin_edges(n_bins)[1:-1].to(confidence.device))
    if groups.ndim == 2:
        rows, groups = groups.nonzero(as_tuple=True)  # (P,), (P,)
        confidence, correct, bins = confidence[rows], correct[rows], bins[rows]
    values = torch.stack([confidence.double(), correct.double(), torch.ones_like(confidence, dtype=torch.float64)])
    sums = values.new_zeros(3, num_groups * n_bins).index_add_(1, groups.to(torch.int64) * n_bins + bins, values)
    return BinSums(*sums.view(3, num_groups, n_bins).unbind())


@as_declared
def calibration_from_sums(sums: BinSums, norm: str = "l1", min_count: int = 1) -> GroupedCalibration:
    """Calibration error, accuracy and mean confidence of each group from its sums."""
    validate_arguments(1, 1, norm, min_count)
    total = sums.count.sum(1)  # (G,)
    gap = (sums.correct - sums.confidence).abs() / sums.count
    gap = torch.where(sums.count == 0, 0.0, gap)  # (G, B), 0 in empty bins; NaN where a confidence was
    share = sums.count / total[:, None]
    if norm == "l1":
        error = (gap * share).sum(1)
    elif norm == "l2":
        error = (gap.square() * share).sum(1).sqrt()
    else:
        error = gap.amax(1)
    return GroupedCalibration(
        calibration_error=error.masked_fill(total < min_count, torch.nan),
        accuracy=sums.correct.sum(1) / total,
        confidence=sums.confidence.sum(1) / total,
        count=total,
    )


@as_declared
def grouped_calibration_error(
    preds: Tensor,  # (N, K) probabilities or (N,) confidences
    target: Tensor,  # (N,)
    groups: Tensor,  # (N,) int64 or (N, G) bool
    num_groups: int,
    n_bins: int = 15,
    norm: str = "l1",
    min_count: int = 1,
) -> GroupedCalibration:
    """Top-label calibration error, accuracy, mean confidence and count of each group in one pass.

    Args:
        preds: class probabilities ``(N, K)``, or confidences ``(N,)`` of answers whose correctness is known.
        target: classes ``(N,)``; with confidences, 1 for a right and 0 for a wrong answer, or a grade in [0, 1].
        groups: one group id per prediction, or a bool column per group when groups overlap.
        num_groups: G.
        n_bins: equal-width bins on [0, 1]; 15 is the convention of the literature.
        norm: ``"l1"`` (ECE), ``"l2"`` (root mean square) or ``"max"`` (worst bin).
        min_count: groups with fewer predictions get a NaN calibration error. Plain ECE is biased upwards by about
            ``sqrt(bins in use / n)``, so tiny groups look miscalibrated for any model.

    Raises:
        InvalidArgumentError: a shape, dtype or value that does not fit, naming the argument.

    Source: Guo et al. 2017, *On Calibration of Modern Neural Networks*; norms as in torchmetrics, bins as in :mod:`moe_posterior.bins`.

    >>> preds = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]])
    >>> result = grouped_calibration_error(preds, torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), num_groups=3)
    >>> result.calibration_error, result.count
    (tensor([0.4500, 0.3000,    nan], dtype=torch.float64), tensor([2., 1., 0.], dtype=torch.float64))
    """
    validate_arguments(num_groups, n_bins, norm, min_count)
    preds, target = read_predictions(preds, target)
    groups = read_groups(groups, num_groups, len(preds))
    return calibration_from_sums(add_up(*top_label(preds, target), groups, num_groups, n_bins), norm, min_count)
