"""Calibration metrics: what torchmetrics lacks, in its own terms."""

from moe_posterior.bins import bin_indices, equal_mass_bins
from moe_posterior.metrics.calibration import (
    BinSums,
    GroupedCalibration,
    bin_sums,
    calibration_from_sums,
    grouped_calibration_error,
    top_label,
)
from moe_posterior.metrics.classwise import ClasswiseCalibrationError, classwise_calibration_error
from moe_posterior.metrics.configurations import (
    ConfigurationCalibration,
    Configurations,
    SharedConfidence,
    configuration_calibration,
    configuration_ids,
    shared_confidence,
)
from moe_posterior.metrics.decomposition import BrierDecomposition, brier_decomposition
from moe_posterior.metrics.ece import calibration_error
from moe_posterior.metrics.floor import noise_floor
from moe_posterior.metrics.grouped import CalibrationError, GroupedCalibrationError
from moe_posterior.metrics.human import HumanDivergence, human_divergence
from moe_posterior.metrics.inference import (
    CalibrationDifference,
    CalibrationEstimate,
    calibration_difference,
    calibration_interval,
    holm,
)
from moe_posterior.metrics.reliability import ReliabilityCurve, curve_from_sums, reliability_curve, wilson_interval
from moe_posterior.metrics.reweighted import (
    RceCurve,
    cross_fitted_rce_curve,
    debiased_gap,
    rce_curve,
    reweighted_calibration_error,
)
from moe_posterior.metrics.scores import brier_score, negative_log_likelihood
from moe_posterior.metrics.selective import (
    ActionThreshold,
    action_threshold,
    aurc,
    excess_aurc,
    risk_coverage,
    selective_risk,
)
from moe_posterior.metrics.smooth import smooth_calibration_error
from moe_posterior.metrics.worst import WorstGroup, worst_group
from moe_posterior.results.intervals import Interval, PairedBootstrap, centred_interval, paired_bootstrap

__all__ = [
    "ActionThreshold",
    "BinSums",
    "BrierDecomposition",
    "CalibrationDifference",
    "CalibrationError",
    "CalibrationEstimate",
    "ClasswiseCalibrationError",
    "ConfigurationCalibration",
    "Configurations",
    "GroupedCalibration",
    "GroupedCalibrationError",
    "HumanDivergence",
    "Interval",
    "PairedBootstrap",
    "RceCurve",
    "ReliabilityCurve",
    "SharedConfidence",
    "WorstGroup",
    "action_threshold",
    "aurc",
    "bin_indices",
    "bin_sums",
    "brier_decomposition",
    "brier_score",
    "calibration_difference",
    "calibration_error",
    "calibration_from_sums",
    "calibration_interval",
    "centred_interval",
    "classwise_calibration_error",
    "configuration_calibration",
    "configuration_ids",
    "cross_fitted_rce_curve",
    "curve_from_sums",
    "debiased_gap",
    "equal_mass_bins",
    "excess_aurc",
    "grouped_calibration_error",
    "holm",
    "human_divergence",
    "negative_log_likelihood",
    "noise_floor",
    "paired_bootstrap",
    "rce_curve",
    "reliability_curve",
    "reweighted_calibration_error",
    "risk_coverage",
    "selective_risk",
    "shared_confidence",
    "smooth_calibration_error",
    "top_label",
    "wilson_interval",
    "worst_group",
]
