"""What is known of every expert's competence on every cluster: a Beta prior, additive evidence, and their sum."""

from moe_posterior.posterior.belief import Pooling, notify_after_load
from moe_posterior.posterior.posterior import BetaPosterior

__all__ = ["BetaPosterior", "Pooling"]

_notify_after_load = notify_after_load  # its name in a posterior that an earlier version saved whole
