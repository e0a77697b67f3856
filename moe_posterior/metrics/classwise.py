"""Calibration of every class probability, not only of the top label.

Dimensions: N predictions, K classes, B = n_bins bins.
"""

from typing import Any

import torch
from torch import Tensor

from moe_posterior.checks.declared import as_declared
from moe_posterior.checks.validation import count, tensor
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.metrics.calibration import (
    MOST_SUMS,
    BinSums,
    add_up,
    calibration_from_sums,
    read_predictions,
    validate_arguments,
)
from moe_posterior.metrics.grouped import BinSumMetric


def classwise_sums(preds: Tensor, target: Tensor, n_bins: int) -> BinSums:  # (N, K), (N,) -> (K, B) each
    """Sums of each class's probability and of how often it was the true one, by bins of that probability.

    >>> classwise_sums(torch.tensor([[0.75, 0.25]]), torch.tensor([0]), n_bins=2).correct.tolist()
    [[0.0, 1.0], [0.0, 0.0]]
    """
    num_classes = preds.shape[1]
    classes = torch.arange(num_classes, device=preds.device)
    hit = target[:, None] == classes  # (N, K)
    probability = preds.double().clamp(0, 1)
    return add_up(probability.flatten(), hit.flatten(), classes.repeat(len(preds)), num_classes, n_bins)


@as_declared
def classwise_calibration_error(
    preds: Tensor,  # (N, K)
    target: Tensor,  # (N,)
    n_bins: int = 15,
    norm: str = "l1",
) -> Tensor:  # () float64
    """Mean over classes of the binned gap between a class's probability and its frequency; NaN without predictions.

    Args:
        preds: class probabilities.
        target: class indices.
        n_bins: equal-width bins on [0, 1]; 15 is the convention of the literature.
        norm: of each class's error: ``"l1"``, ``"l2"`` or ``"max"``. With many classes most probabilities are near 0 and so are
            their gaps: the l1 value then looks small whatever the model.

    Raises:
        InvalidArgumentError: a shape, dtype or value that does not fit, naming the argument.

    Source: Kull et al. 2019, *Beyond Temperature Scaling* (classwise-ECE).

    >>> classwise_calibration_error(torch.tensor([[0.75, 0.25], [0.75, 0.25]]), torch.tensor([0, 1])).item()
    0.25
    """
    validate_arguments(1, n_bins, norm, 1)
    preds, target = _read(preds, target)
    return calibration_from_sums(classwise_sums(preds, target, n_bins), norm).calibration_error.mean()


class ClasswiseCalibrationError(BinSumMetric):
    """:func:`classwise_calibration_error` over batches and processes, in three ``(num_classes, n_bins)`` float64 sums.

    Shapes:
        ``update(preds, target)``: preds ``(N, num_classes)`` probabilities, target ``(N,)`` classes.
        ``compute()``: ``()`` float64.

    Args:
        num_classes: K.
        n_bins, norm: as in :func:`classwise_calibration_error`.
        validate_args: check every batch; costs a device synchronisation, so it may be turned off in a hot loop.
        kwargs: passed to ``torchmetrics.Metric``.

    Raises:
        InvalidArgumentError: a shape, dtype or value that does not fit, naming the argument; the state is unchanged.
        MissingDependencyError: on import, without torchmetrics.

    >>> metric = ClasswiseCalibrationError(num_classes=2)
    >>> metric.update(torch.tensor([[0.75, 0.25], [0.75, 0.25]]), torch.tensor([0, 1]))
    >>> metric.compute().item()
    0.25
    """

    def __init__(
        self, num_classes: int, n_bins: int = 15, norm: str = "l1", validate_args: bool = True, **kwargs: Any
    ) -> None:
        count("num_classes", num_classes, most=MOST_SUMS)
        validate_arguments(num_classes, n_bins, norm, 1)
        super().__init__(num_classes, n_bins, **kwargs)
        self.num_classes = num_classes
        self.norm = norm
        self.validate_args = validate_args

    def update(self, preds: Tensor, target: Tensor) -> None:  # (N, K), (N,)
        """Add one batch."""
        if self.validate_args:
            preds, target = _read(preds, target)
            if preds.shape[1] != self.num_classes:
                raise InvalidArgumentError(f"preds must have {self.num_classes} classes; got {preds.shape[1]}")
        self._add(classwise_sums(preds, target, self.n_bins))

    def compute(self) -> Tensor:  # ()
        """The error over everything seen, on all processes."""
        return calibration_from_sums(self.bin_sums(), self.norm).calibration_error.mean()

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, n_bins={self.n_bins}, norm={self.norm!r}"


def _read(preds: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    preds = tensor("preds", preds)
    if preds.ndim != 2:
        raise InvalidArgumentError(f"preds must have shape (N, K); got {tuple(preds.shape)}")
    return read_predictions(preds, target)
