"""Selective prediction: the risk of acting only on confident predictions, against coverage.

Dimensions: N predictions. ``correct`` may be graded in [0, 1]. Predictions with equal confidence cannot be told apart, so at a
coverage inside a tie the risk is that of a random order: no result depends on the order of the rows.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from moe_posterior.checks.declared import as_declared
from moe_posterior.checks.validation import number
from moe_posterior.metrics.reading import read_ranking


class ActionThreshold(NamedTuple):
    """Act on confidences of at least ``threshold``."""

    threshold: float  # inf: never act
    coverage: float  # share of predictions acted on
    risk: float  # share of errors among them; NaN if nothing is acted on


@as_declared
def risk_coverage(
    confidence: Tensor,  # (N,)
    correct: Tensor,  # (N,)
) -> tuple[Tensor, Tensor]:  # (N,), (N,) float64
    """Coverage 1/N, …, 1 and the risk, the share of errors among the most confident predictions, at each.

    Args:
        confidence: higher is acted on first; any real score, not only a probability.
        correct: bool, or a grade in [0, 1].

    Raises:
        InvalidArgumentError: a shape or value that does not fit.

    Source: El-Yaniv & Wiener 2010, *On the Foundations of Noise-free Selective Classification*.

    >>> coverage, risk = risk_coverage(torch.tensor([0.9, 0.6, 0.7, 0.6]), torch.tensor([1, 0, 0, 1]))
    >>> coverage.tolist(), risk.tolist()
    ([0.25, 0.5, 0.75, 1.0], [0.0, 0.5, 0.5, 0.5])
    """
    confidence, correct = read_ranking(confidence, correct)
    if not len(confidence):
        empty = torch.zeros(0, dtype=torch.float64, device=confidence.device)
        return empty, empty
    ordered, order = confidence.sort(descending=True)
    loss = 1 - correct[order].double()
    _, tie, size = ordered.unique_consecutive(return_inverse=True, return_counts=True)
    mean = loss.new_zeros(len(size)).index_add_(0, tie, loss) / size
    position = torch.arange(1, len(loss) + 1, dtype=torch.float64, device=loss.device)
    return position / len(loss), mean[tie].cumsum(0) / position


@as_declared
def aurc(confidence: Tensor, correct: Tensor) -> Tensor:  # (N,), (N,) -> ()
    """Area under the risk-coverage curve: the mean risk over coverages 1/N, …, 1; NaN without predictions.

    Args:
        confidence, correct: as in :func:`risk_coverage`.

    Source: Geifman, Uziel & El-Yaniv 2019, *Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers*.

    >>> aurc(torch.tensor([0.9, 0.6]), torch.tensor([1, 0])).item()
    0.25
    """
    return risk_coverage(confidence, correct)[1].mean()


@as_declared
def excess_aurc(confidence: Tensor, correct: Tensor) -> Tensor:  # (N,), (N,) -> ()
    """AURC minus that of an order that puts every error last: 0 for a perfect ranking, whatever the accuracy.

    Args:
        confidence, correct: as in :func:`risk_coverage`.

    Source: Geifman, Uziel & El-Yaniv 2019 (E-AURC), with the best order's exact value in place of their approximation.

    >>> excess_aurc(torch.tensor([0.6, 0.9]), torch.tensor([1, 0])).item()
    0.5
    """
    confidence, correct = read_ranking(confidence, correct)
    return aurc(confidence, correct) - aurc(correct.double(), correct)


@as_declared
def action_threshold(confidence: Tensor, correct: Tensor, max_risk: float) -> ActionThreshold:  # (N,), (N,)
    """The lowest confidence to act on such that the risk on these predictions is at most ``max_risk``.

    Chosen and measured on the same predictions the risk is optimistic: choose on validation rows, and report coverage and risk on
    test rows with :func:`selective_risk`.

    Args:
        confidence, correct: as in :func:`risk_coverage`.
        max_risk: tolerated share of errors, in [0, 1].

    Raises:
        InvalidArgumentError: a shape or value that does not fit.

    >>> action_threshold(torch.tensor([0.75, 0.5, 0.25]), torch.tensor([1, 1, 0]), max_risk=0.1)[0]
    0.5
    """
    max_risk = number("max_risk", max_risk, least=0.0, most=1.0)
    confidence, correct = read_ranking(confidence, correct)
    _, risk = risk_coverage(confidence, correct)
    ordered = confidence.sort(descending=True).values
    last_of_tie = torch.ones_like(ordered, dtype=torch.bool)
    last_of_tie[:-1] = ordered[:-1] != ordered[1:]
    allowed = (last_of_tie & (risk <= max_risk + 1e-12)).nonzero()  # a cumulative mean of equal risks may round up
    if not len(allowed):
        return ActionThreshold(math.inf, 0.0, math.nan)
    last = int(allowed[-1])
    return ActionThreshold(float(ordered[last]), (last + 1) / len(ordered), float(risk[last]))


@as_declared
def selective_risk(confidence: Tensor, correct: Tensor, threshold: float) -> ActionThreshold:  # (N,), (N,)
    """Coverage and risk of acting on confidences of at least ``threshold``.

    Args:
        confidence, correct: as in :func:`risk_coverage`.
        threshold: for instance from :func:`action_threshold` on other rows. Compared in the dtype of ``confidence``.

    Raises:
        InvalidArgumentError: a shape or value that does not fit.

    >>> selective_risk(torch.tensor([0.75, 0.5, 0.25]), torch.tensor([1, 0, 0]), 0.5)[2]
    0.5
    """
    confidence, correct = read_ranking(confidence, correct)
    threshold = number("threshold", threshold, finite=False)
    acted = confidence >= threshold
    coverage = float(acted.double().mean()) if len(acted) else math.nan
    return ActionThreshold(threshold, coverage, float((1 - correct[acted].double()).mean()))
