"""The belief of every gate of a LightningModule, kept while the module trains."""

from moe_posterior.training.belief.callback import BeliefCallback
from moe_posterior.training.belief.reservoir import Reservoir

__all__ = ["BeliefCallback", "Reservoir"]
