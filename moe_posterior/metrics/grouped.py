"""Calibration per group as a ``torchmetrics.Metric`` whose state has a fixed size and sums across processes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_posterior.errors import MissingDependencyError
from moe_posterior.metrics.calibration import (
    BinSums,
    add_up,
    calibration_from_sums,
    read_groups,
    read_predictions,
    top_label,
    validate_arguments,
)
from moe_posterior.precision import outlasting

try:
    from torchmetrics import Metric
except ImportError as error:
    raise MissingDependencyError("torchmetrics", "evaluate") from error


class BinSumMetric(Metric):
    """A metric whose state is three ``(rows, n_bins)`` float64 sums, whatever the data: what a :class:`BinSums` holds.

    States are named after the class: a ``MetricCollection`` merges metrics whose states have equal names and values, and after an
    empty first batch all sums are 0, so metrics that add up different things need different names.

    Args:
        rows: groups, or classes.
        n_bins: equal-width bins on [0, 1].
        kwargs: passed to ``torchmetrics.Metric``.
    """

    is_differentiable = False
    full_state_update = False

    def __init__(self, rows: int, n_bins: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.n_bins = n_bins
        self._sums = [f"{type(self).__name__}_{name}" for name in ("confidence", "correct", "count")]
        for name in self._sums:
            zeros = torch.zeros(rows, n_bins, dtype=torch.float64)
            self.add_state(name, zeros, dist_reduce_fx="sum")

    def bin_sums(self) -> BinSums:
        """The collected sums, for reliability curves: ``curve_from_sums(metric.bin_sums(), group)``."""
        return BinSums(*(getattr(self, name) for name in self._sums))

    def _add(self, sums: BinSums) -> None:
        total = self.bin_sums() + sums
        for name, value in zip(self._sums, (total.confidence, total.correct, total.count), strict=True):
            setattr(self, name, outlasting(value))

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> torch.nn.Module:
        # Casting the model that holds this metric (`.to(torch.bfloat16)`) must not round counts: follow devices only.
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), exclude_state)


class GroupedCalibrationError(BinSumMetric):
    """Top-label calibration error, accuracy, mean confidence and count of every group, in one pass.

    torchmetrics' own ``MulticlassCalibrationError`` keeps every prediction, and puts confidence 1.0 in an extra bin;
    here the state is three ``(num_groups, n_bins)`` float64 sums, whatever the data, and groups may overlap.

    Shapes:
        ``update(preds, target, groups)``: preds ``(N, K)`` probabilities, or ``(N,)`` confidences; target ``(N,)``
        classes, or 0/1 correctness with confidences; groups ``(N,)`` int64, or ``(N, num_groups)`` bool when groups
        overlap.
        ``compute()``: dict of ``calibration_error``, ``accuracy``, ``confidence`` and ``count``, each ``(num_groups,)``
        float64. An empty group is NaN in the first three, meaning *nothing observed*, and 0 in ``count``.

    Args:
        num_groups: G: clusters, subpopulations, routing configurations.
        n_bins: equal-width bins on [0, 1]; 15 is the convention of the literature.
        norm: ``"l1"`` (ECE), ``"l2"`` or ``"max"``, as in torchmetrics.
        min_count: below it a group's calibration error is NaN: the plain estimator is biased upwards on few data.
        validate_args: check every batch; costs a device synchronisation, so it may be turned off in a hot loop.
        kwargs: passed to ``torchmetrics.Metric``.

    Raises:
        InvalidArgumentError: a shape, dtype or value that does not fit, naming the argument; the state is unchanged.
        MissingDependencyError: on import, without torchmetrics.

    >>> metric = GroupedCalibrationError(num_groups=2)
    >>> metric.update(torch.tensor([[0.9, 0.1], [0.3, 0.7]]), torch.tensor([0, 0]), torch.tensor([0, 1]))
    >>> {name: [round(x, 3) for x in value.tolist()] for name, value in metric.compute().items()}
    {'calibration_error': [0.1, 0.7], 'accuracy': [1.0, 0.0], 'confidence': [0.9, 0.7], 'count': [1.0, 1.0]}
    """

    def __init__(
        self,
        num_groups: int,
        n_bins: int = 15,
        norm: str = "l1",
        min_count: int = 1,
        validate_args: bool = True,
        **kwargs: Any,
    ) -> None:
        validate_arguments(num_groups, n_bins, norm, min_count)
        super().__init__(num_groups, n_bins, **kwargs)
        self.num_groups = num_groups
        self.norm = norm
        self.min_count = min_count
        self.validate_args = validate_args

    def update(
        self,
        preds: Tensor,  # (N, K) probabilities or (N,) confidences
        target: Tensor,  # (N,)
        groups: Tensor,  # (N,) int64 or (N, G) bool
    ) -> None:
        """Add one batch."""
        if self.validate_args:
            preds, target = read_predictions(preds, target)
            groups = read_groups(groups, self.num_groups, len(preds))
        self._add(add_up(*top_label(preds, target), groups, self.num_groups, self.n_bins))

    def compute(self) -> dict[str, Tensor]:
        """Calibration of each group over everything seen, on all processes."""
        return vars(calibration_from_sums(self.bin_sums(), self.norm, self.min_count))

    def extra_repr(self) -> str:
        return f"num_groups={self.num_groups}, n_bins={self.n_bins}, norm={self.norm!r}, min_count={self.min_count}"


class CalibrationError(BinSumMetric):
    """:func:`~moe_posterior.metrics.calibration_error` over batches and processes, in three ``(1, n_bins)`` float64 sums.

    Shapes:
        ``update(preds, target)``: preds ``(N, K)`` probabilities, or ``(N,)`` confidences; target ``(N,)`` classes, or 0/1
        correctness with confidences.
        ``compute()``: ``()`` float64, NaN before the first prediction.

    Args:
        n_bins, norm: as in :func:`~moe_posterior.metrics.calibration_error`, in bins of equal width.
        validate_args: check every batch; costs a device synchronisation, so it may be turned off in a hot loop.
        kwargs: passed to ``torchmetrics.Metric``.

    Raises:
        InvalidArgumentError: a shape, dtype or value that does not fit, naming the argument; the state is unchanged.
        MissingDependencyError: on import, without torchmetrics.

    >>> metric = CalibrationError()
    >>> metric.update(torch.tensor([0.95, 1.0]), torch.tensor([0, 1]))
    >>> round(metric.compute().item(), 3)
    0.475
    """

    def __init__(self, n_bins: int = 15, norm: str = "l1", validate_args: bool = True, **kwargs: Any) -> None:
        validate_arguments(1, n_bins, norm, 1)
        super().__init__(1, n_bins, **kwargs)
        self.norm = norm
        self.validate_args = validate_args

    def update(self, preds: Tensor, target: Tensor) -> None:  # (N, K) or (N,), (N,)
        """Add one batch."""
        if self.validate_args:
            preds, target = read_predictions(preds, target)
        one_group = torch.zeros(len(preds), dtype=torch.int64, device=preds.device)
        self._add(add_up(*top_label(preds, target), one_group, 1, self.n_bins))

    def compute(self) -> Tensor:  # ()
        """The error over everything seen, on all processes."""
        return calibration_from_sums(self.bin_sums(), self.norm).calibration_error[0]

    def extra_repr(self) -> str:
        return f"n_bins={self.n_bins}, norm={self.norm!r}"
