"""Calibration metrics: what torchmetrics lacks, in its own terms."""

from moe_posterior.metrics.calibration import (
    BinSums,
    GroupedCalibration,
    bin_indices,
    bin_sums,
    calibration_from_sums,
    grouped_calibration_error,
    top_label,
)
from moe_posterior.metrics.grouped import GroupedCalibrationError
from moe_posterior.metrics.reliability import ReliabilityCurve, curve_from_sums, reliability_curve, wilson_interval
from moe_posterior.metrics.scores import brier_score, negative_log_likelihood

__all__ = [
    "BinSums",
    "GroupedCalibration",
    "GroupedCalibrationError",
    "ReliabilityCurve",
    "bin_indices",
    "bin_sums",
    "brier_score",
    "calibration_from_sums",
    "curve_from_sums",
    "grouped_calibration_error",
    "negative_log_likelihood",
    "reliability_curve",
    "top_label",
    "wilson_interval",
]
