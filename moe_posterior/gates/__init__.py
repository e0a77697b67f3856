"""Gates: given hidden states, which experts, with what weights."""

from moe_posterior.gates.base import Gate, Routing
from moe_posterior.gates.baselines import SoftmaxGate
from moe_posterior.gates.posterior import PosteriorGate

__all__ = ["Gate", "PosteriorGate", "Routing", "SoftmaxGate"]
