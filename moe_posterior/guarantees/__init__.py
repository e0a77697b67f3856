"""Guarantees: thresholds to act on and prediction sets that keep a stated level with a stated probability, and what they assume."""

from moe_posterior.guarantees.groups import GroupThreshold, GroupThresholds, select_group_thresholds
from moe_posterior.guarantees.online import OnlineActionThreshold
from moe_posterior.guarantees.sets import PredictionSets
from moe_posterior.guarantees.threshold import GuaranteedThreshold, select_threshold

__all__ = [
    "GroupThreshold",
    "GroupThresholds",
    "GuaranteedThreshold",
    "OnlineActionThreshold",
    "PredictionSets",
    "select_group_thresholds",
    "select_threshold",
]
