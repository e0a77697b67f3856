"""Classwise calibration against plain loops, torchmetrics' binary metric and uncertainty-calibration."""

import pytest
import torch
from torchmetrics.functional.classification import binary_calibration_error

from moe_posterior.errors import InvalidArgumentError
from moe_posterior.metrics import ClasswiseCalibrationError, classwise_calibration_error


def drawn(seed: int, rows: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    preds = torch.randn(rows, 4, generator=generator, dtype=torch.float64).mul(2).softmax(1)
    return preds, torch.multinomial(preds.sqrt(), 1, generator=generator)[:, 0]


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
def test_it_is_the_mean_of_the_binary_error_of_each_class(norm: str) -> None:
    preds, target = drawn(0)
    expected = [
        binary_calibration_error(preds[:, k], (target == k).long(), n_bins=12, norm=norm).item() for k in range(4)
    ]
    ours = classwise_calibration_error(preds, target, n_bins=12, norm=norm).item()
    assert ours == pytest.approx(sum(expected) / 4, abs=2e-6)


def test_it_agrees_with_a_plain_loop_and_with_uncertainty_calibration() -> None:
    preds, target = drawn(1)
    total = 0.0
    for k in range(4):
        bins: dict[int, float] = {}
        for probability, label in zip(preds[:, k].tolist(), target.tolist(), strict=True):
            bins[int(probability * 10)] = bins.get(int(probability * 10), 0.0) + (label == k) - probability
        total += sum(abs(gap) for gap in bins.values()) / len(preds)
    ours = classwise_calibration_error(preds, target, n_bins=10).item()
    assert ours == pytest.approx(total / 4, abs=1e-12)
    package = pytest.importorskip("calibration")
    expected = package.get_ece(preds.numpy(), target.numpy(), num_bins=10, mode="marginal")
    assert ours == pytest.approx(expected, abs=1e-9)


def test_the_metric_over_batches_equals_one_pass_and_merges_by_sums() -> None:
    preds, target = drawn(2)
    metric = ClasswiseCalibrationError(4, n_bins=9, norm="l2")
    for part, labels in zip(preds.split([7, 0, 293]), target.split([7, 0, 293]), strict=True):
        metric.update(part, labels)
    torch.testing.assert_close(metric.compute(), classwise_calibration_error(preds, target, 9, "l2"))
    assert [tuple(state.shape) for state in metric.metric_state.values()] == [(4, 9)] * 3
    assert metric.to(torch.bfloat16).bin_sums().count.dtype == torch.float64
    assert repr(metric) == "ClasswiseCalibrationError(num_classes=4, n_bins=9, norm='l2')"


def test_bad_predictions_are_named_and_leave_the_metric_as_it_was() -> None:
    metric = ClasswiseCalibrationError(3)
    with pytest.raises(InvalidArgumentError, match="preds must have 3 classes; got 4"):
        metric.update(*drawn(0))
    with pytest.raises(InvalidArgumentError, match=r"preds must have shape \(N, K\); got \(2,\)"):
        metric.update(torch.rand(2), torch.tensor([0, 1]))
    assert not metric.bin_sums().count.any()
    with pytest.raises(InvalidArgumentError, match="norm must be one of"):
        classwise_calibration_error(*drawn(0), norm="l3")
