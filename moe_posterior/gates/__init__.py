"""Gates: given hidden states, which experts, with what weights."""

from moe_posterior.gates.bandits import BanditGate
from moe_posterior.gates.base import Gate, Routing
from moe_posterior.gates.baselines import SoftmaxGate
from moe_posterior.gates.belief import BeliefGate
from moe_posterior.gates.fixed import FixedGate, OracleGate
from moe_posterior.gates.learned import LearnedPrior
from moe_posterior.gates.neighbours import NearestNeighbourGate
from moe_posterior.gates.posterior import PosteriorGate
from moe_posterior.gates.prior import PriorGate
from moe_posterior.gates.rules import LCB, Mean, Quantile, Race, Rule, Thompson
from moe_posterior.gates.threshold import ExpertThresholdGate

__all__ = [
    "LCB",
    "BanditGate",
    "BeliefGate",
    "ExpertThresholdGate",
    "FixedGate",
    "Gate",
    "LearnedPrior",
    "Mean",
    "NearestNeighbourGate",
    "OracleGate",
    "PosteriorGate",
    "PriorGate",
    "Quantile",
    "Race",
    "Routing",
    "Rule",
    "SoftmaxGate",
    "Thompson",
]
