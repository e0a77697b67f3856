"""Training objectives for mixtures: pure functions on class probabilities and labels.

Dimensions: N rows, K classes, E experts, G groups or routing configurations. L_i is the negative log of the probability
that the *aggregate* gives to the true class of row i. Half precision is computed in float32. Every loss is a 0-d tensor
with a gradient; for an empty batch it is a 0 that is still attached to the graph, so that a rank without data can take part
in a backward pass. State that must outlive a batch is passed in and returned.
"""

from moe_posterior.losses.calibration import mmce, soft_ece
from moe_posterior.losses.configuration import ConfigurationState, robust_config
from moe_posterior.losses.robust import (
    expert_disagreement,
    filter_mask,
    group_dro,
    mixture_regret,
    nll,
    nll_per_row,
    robust,
    robust_filtered,
)

__all__ = [
    "ConfigurationState",
    "expert_disagreement",
    "filter_mask",
    "group_dro",
    "mixture_regret",
    "mmce",
    "nll",
    "nll_per_row",
    "robust",
    "robust_config",
    "robust_filtered",
    "soft_ece",
]
