"""Calibrators that map the top-label confidence alone: isotonic regression and histogram binning.

Dimensions: N rows, K classes, B bins or knots.
"""

import torch
from torch import Tensor

from moe_posterior.bins import place
from moe_posterior.calibrators.base import Calibrator, Outputs
from moe_posterior.calibrators.probabilities import top_confidence, top_label, with_confidence
from moe_posterior.checks.declared import as_declared
from moe_posterior.errors import InvalidArgumentError, MissingDependencyError


def interpolate(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:  # (N,), (B,), (B,) -> (N,)
    """Piecewise linear through (knots, values), constant beyond the ends; knots rise strictly.

    >>> interpolate(torch.tensor([-1.0, 0.5, 2.0]), torch.tensor([0.0, 1.0]), torch.tensor([10.0, 20.0])).tolist()
    [10.0, 15.0, 20.0]
    """
    if len(knots) == 1:
        return values.expand(len(x))
    right = torch.searchsorted(knots, x.contiguous()).clamp(1, len(knots) - 1)
    left = right - 1
    share = ((x - knots[left]) / (knots[right] - knots[left])).clamp(0, 1)
    return torch.lerp(values[left], values[right], share)


class IsotonicCalibration(Calibrator):
    """The increasing step function from confidence to accuracy with least squared error; the other classes are rescaled.

    The predicted label never changes, so no confidence falls below 1/K. Where all validation rows were right the map gives 1,
    and one mistake there makes the log loss infinite. Only ``fit`` needs scikit-learn.

    Raises:
        MissingDependencyError: in ``fit``, without scikit-learn.

    Source: Zadrozny & Elkan 2002, *Transforming Classifier Scores into Accurate Multiclass Probability Estimates*.

    >>> outputs = Outputs(torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]]))
    >>> IsotonicCalibration().fit(outputs, torch.tensor([0, 0, 0, 1]))(outputs)[:, 0]
    tensor([1.0000, 1.0000, 0.5000, 0.5000])
    """

    knots: Tensor
    values: Tensor

    @as_declared
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("knots", torch.zeros(0, dtype=torch.float64))  # (B,)
        self.register_buffer("values", torch.zeros(0, dtype=torch.float64))  # (B,)

    def _fit(self, outputs: Outputs, target: Tensor) -> None:
        try:
            from sklearn.isotonic import IsotonicRegression
        except ImportError:
            raise MissingDependencyError("scikit-learn", "evaluate") from None
        confidence = top_confidence(outputs.probs)
        correct = top_label(outputs.probs).eq(target).double()
        fitted = IsotonicRegression(y_min=0, y_max=1).fit(confidence.cpu().numpy(), correct.cpu().numpy())
        self.knots = torch.as_tensor(fitted.X_thresholds_).to(confidence)
        self.values = torch.as_tensor(fitted.y_thresholds_).to(confidence)

    def _calibrate(self, outputs: Outputs) -> Tensor:
        return with_confidence(outputs.probs, interpolate(top_confidence(outputs.probs), self.knots, self.values))

    def extra_repr(self) -> str:
        return f"knots={len(self.knots)}"


class HistogramBinning(Calibrator):
    """Equal-mass bins of confidence, each mapped to the accuracy of its validation rows; the other classes are rescaled.

    The predicted label never changes, so no confidence falls below 1/K.

    Args:
        n_bins: number of bins requested; equal confidences share a bin, so there may be fewer. 15 as in the usual ECE.

    Raises:
        InvalidArgumentError: fewer than one bin.

    Source: Zadrozny & Elkan 2001, *Obtaining calibrated probability estimates from decision trees and naive Bayesian
    classifiers*.

    >>> outputs = Outputs(torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.55, 0.45]]))
    >>> HistogramBinning(n_bins=2).fit(outputs, torch.tensor([0, 0, 0, 1]))(outputs)[:, 0]
    tensor([1.0000, 1.0000, 0.5000, 0.5000])
    """

    edges: Tensor
    values: Tensor

    @as_declared
    def __init__(self, n_bins: int = 15) -> None:
        super().__init__()
        if isinstance(n_bins, bool) or not isinstance(n_bins, int) or n_bins < 1:
            raise InvalidArgumentError(f"n_bins must be an integer of at least 1; got {n_bins!r}")
        self.n_bins = n_bins
        self.register_buffer("edges", torch.zeros(0, dtype=torch.float64))  # (B - 1,) inner edges
        self.register_buffer("values", torch.zeros(0, dtype=torch.float64))  # (B,)

    def _fit(self, outputs: Outputs, target: Tensor) -> None:
        confidence = top_confidence(outputs.probs)
        correct = top_label(outputs.probs).eq(target).double()
        ordered = confidence.sort().values
        firsts = torch.arange(1, self.n_bins, device=ordered.device) * len(ordered) // self.n_bins
        edges = ordered[firsts].unique()
        self.edges = edges[edges > ordered[0]]  # an edge at the minimum would leave an empty bin below it
        bins = place(confidence, self.edges)
        counts = bins.bincount(minlength=len(self.edges) + 1)
        self.values = bins.bincount(weights=correct, minlength=len(self.edges) + 1) / counts

    def _calibrate(self, outputs: Outputs) -> Tensor:
        confidence = top_confidence(outputs.probs)
        return with_confidence(outputs.probs, self.values[place(confidence, self.edges)])

    def extra_repr(self) -> str:
        return f"n_bins={self.n_bins}"
