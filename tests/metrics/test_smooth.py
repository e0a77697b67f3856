"""Smooth calibration error against its definition summed directly, and against its authors' package."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from moe_posterior.errors import InvalidArgumentError
from moe_posterior.metrics import smooth_calibration_error


def overconfident(seed: int, rows: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    confidence = 0.4 + 0.6 * torch.rand(rows, generator=generator, dtype=torch.float64)
    return confidence, torch.bernoulli(confidence**2, generator=generator).long()


@pytest.mark.parametrize("bandwidth", [0.01, 0.05, 0.3, 1.0])
def test_at_a_fixed_bandwidth_it_is_the_integral_of_the_reflected_kernel_sum(bandwidth: float) -> None:
    confidence, correct = overconfident(0, rows=60)
    t = np.linspace(0, 1, 20_001)
    smoothed = np.zeros_like(t)
    for c, y in zip(confidence.tolist(), correct.tolist(), strict=True):
        for turn in range(-4, 5):
            for image in (2 * turn + c, 2 * turn - c):
                smoothed += (y - c) * norm.pdf(t, image, bandwidth) / 60
    expected = np.trapezoid(np.abs(smoothed), t)
    ours = smooth_calibration_error(confidence, correct, bandwidth=bandwidth).item()
    assert ours == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_agrees_with_the_authors_package(seed: int) -> None:
    relplot = pytest.importorskip("relplot.metrics")
    confidence, correct = overconfident(seed)
    expected = relplot.smECE(confidence.numpy(), correct.numpy())
    assert smooth_calibration_error(confidence, correct).item() == pytest.approx(expected, abs=2e-3)  # its search step


def test_the_value_is_its_own_bandwidth() -> None:
    confidence, correct = overconfident(3)
    value = smooth_calibration_error(confidence, correct)
    assert smooth_calibration_error(confidence, correct, bandwidth=value.item()).item() == pytest.approx(value.item())


def test_it_moves_little_when_confidences_cross_a_bin_edge() -> None:
    correct = torch.tensor([0, 1] * 50)
    near = [
        smooth_calibration_error(torch.full((100,), 0.6 + step, dtype=torch.float64), correct) for step in (-1e-6, 1e-6)
    ]
    assert near[0].item() == pytest.approx(near[1].item(), abs=1e-5)
    assert near[0].item() == pytest.approx(0.1, abs=1e-3)


def test_certainty_at_either_end_is_right_or_wrong() -> None:
    ends = torch.tensor([0.0, 1.0])
    assert smooth_calibration_error(ends, torch.tensor([0, 1])).item() == pytest.approx(0, abs=1e-6)
    assert smooth_calibration_error(ends, torch.tensor([1, 0]), bandwidth=0.01).item() == pytest.approx(1, abs=1e-6)
    assert math.isnan(smooth_calibration_error(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).item())


def test_a_bandwidth_must_be_positive() -> None:
    with pytest.raises(InvalidArgumentError, match="bandwidth must be positive, or None; got 0"):
        smooth_calibration_error(torch.tensor([0.5]), torch.tensor([1]), bandwidth=0)
