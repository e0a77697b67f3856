"""Smooth calibration error: a kernel instead of bins, with a bandwidth set by the error itself.

Dimensions: N predictions, K classes, T = GRID grid cells.
"""

import math

import torch
from torch import Tensor

from moe_posterior.checks.declared import as_declared
from moe_posterior.checks.validation import real
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.metrics.calibration import read_predictions, top_label

GRID = 4096  # cells on [0, 1]; residuals are split linearly between the two nearest points
BISECTIONS = 30


@as_declared
def smooth_calibration_error(
    preds: Tensor,  # (N, K) probabilities or (N,) confidences
    target: Tensor,  # (N,)
    *,
    bandwidth: float | None = None,
) -> Tensor:  # () float64
    """smECE: the integral of the kernel-smoothed |residual|, at the bandwidth that equals its own error.

    smECE_σ = ∫ |mean_i K_σ(t, c_i)(y_i − c_i)| dt over [0, 1], with the Gaussian kernel reflected at both ends. It falls in σ, so
    there is one σ* with smECE_σ* = σ*, and that is the value: consistent, continuous in the confidences, and without a number of bins.

    Args:
        preds, target: as in :func:`~moe_posterior.metrics.calibration_error`.
        bandwidth: σ > 0 to evaluate smECE_σ at; None, the default, finds σ*. Below about 1/4096 the grid blurs more than σ does.

    Raises:
        InvalidArgumentError: a shape, dtype or value that does not fit, naming the argument.

    Source: Błasiok & Nakkiran 2023, *Smooth ECE: Principled Reliability Diagrams via Kernel Smoothing*.

    >>> preds = torch.tensor([0.75, 0.75, 0.75, 0.75])
    >>> round(smooth_calibration_error(preds, torch.tensor([0, 1, 0, 1])).item(), 3)
    0.25
    """
    preds, target = read_predictions(preds, target)
    if bandwidth is not None and not 0 < (real(bandwidth) or 0.0) < math.inf:
        raise InvalidArgumentError(f"bandwidth must be positive, or None; got {bandwidth!r}")
    confidence, correct = top_label(preds, target)
    if not len(confidence):
        return confidence.new_tensor(torch.nan)
    spectrum = _residual_spectrum(confidence, correct - confidence)
    if bandwidth is not None:
        return _smoothed_error(spectrum, bandwidth)
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if float(_smoothed_error(spectrum, middle)) > middle else (low, middle)
    return _smoothed_error(spectrum, high)


def _residual_spectrum(confidence: Tensor, residual: Tensor) -> Tensor:  # (N,), (N,) -> (T + 1,) complex
    position = confidence * GRID
    left = position.long().clamp(max=GRID - 1)
    weight = position - left
    mass = residual.new_zeros(GRID + 1)
    mass.index_add_(0, left, residual * (1 - weight)).index_add_(0, left + 1, residual * weight)
    mass[[0, -1]] *= 2  # mirrored onto themselves
    even = torch.cat([mass, mass[1:-1].flip(0)])  # reflection at both ends: one period of an even function
    return torch.fft.rfft(even) * (GRID / len(confidence))


def _smoothed_error(spectrum: Tensor, sigma: float) -> Tensor:  # ()
    frequency = torch.arange(GRID + 1, dtype=torch.float64, device=spectrum.device) * math.pi
    smoothed = torch.fft.irfft(spectrum * (-(frequency * sigma).square() / 2).exp(), n=2 * GRID)[: GRID + 1]
    return torch.trapezoid(smoothed.abs(), dx=1 / GRID)
