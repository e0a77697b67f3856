"""Post-hoc calibrators: maps from a routed model's outputs to probabilities that mean what they say.

All share one interface: ``calibrator.fit(outputs, target)`` on validation rows alone, then ``calibrator(outputs)`` gives
(N, K) probabilities that sum to 1. The state is in buffers, so a calibrator pickles, moves and enters a checkpoint with
the model. ``keeps_top_label`` says whether the answer can change: only ``ExpertTemperature``, ``VectorScaling`` and
``StructuredMatrixScaling`` may.
"""

from moe_posterior.calibrators.base import Calibrator, Outputs
from moe_posterior.calibrators.binning import HistogramBinning, IsotonicCalibration
from moe_posterior.calibrators.configuration import ConfigurationCalibrator
from moe_posterior.calibrators.domains import MultiDomainTemperature
from moe_posterior.calibrators.external import Multicalibration, StructuredMatrixScaling, VennAbers
from moe_posterior.calibrators.online import OnlineConfigurationCalibrator
from moe_posterior.calibrators.scaling import ExpertTemperature, TemperatureScaling, VectorScaling
from moe_posterior.calibrators.shift import ShiftAwareTemperature

__all__ = [
    "Calibrator",
    "ConfigurationCalibrator",
    "ExpertTemperature",
    "HistogramBinning",
    "IsotonicCalibration",
    "MultiDomainTemperature",
    "Multicalibration",
    "OnlineConfigurationCalibrator",
    "Outputs",
    "ShiftAwareTemperature",
    "StructuredMatrixScaling",
    "TemperatureScaling",
    "VectorScaling",
    "VennAbers",
]
