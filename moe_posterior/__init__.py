"""Beta-competence gates for mixtures of experts: route by proven competence."""

from moe_posterior.clustering import Clusterer
from moe_posterior.errors import (
    DamagedFileError,
    InvalidArgumentError,
    MissingDataError,
    MissingDependencyError,
    MoEPosteriorError,
    NotFittedError,
)
from moe_posterior.evidence import Evidence, ProxyNoise
from moe_posterior.experts import ExpertsFFN
from moe_posterior.gates import Gate, PosteriorGate, PriorGate, Routing, SoftmaxGate
from moe_posterior.huggingface import restore_gates, swap_gates, token_outcomes
from moe_posterior.layer import MixtureOfExperts, PosteriorMoE
from moe_posterior.posterior import BetaPosterior
from moe_posterior.record import Trace, record
from moe_posterior.replay import replay
from moe_posterior.router import Decision, Decisions, PosteriorRouter
from moe_posterior.serving import export_routing

__all__ = [
    "BetaPosterior",
    "Clusterer",
    "DamagedFileError",
    "Decision",
    "Decisions",
    "Evidence",
    "ExpertsFFN",
    "Gate",
    "InvalidArgumentError",
    "MissingDataError",
    "MissingDependencyError",
    "MixtureOfExperts",
    "MoEPosteriorError",
    "NotFittedError",
    "PosteriorGate",
    "PosteriorMoE",
    "PosteriorRouter",
    "PriorGate",
    "ProxyNoise",
    "Routing",
    "SoftmaxGate",
    "Trace",
    "export_routing",
    "record",
    "replay",
    "restore_gates",
    "swap_gates",
    "token_outcomes",
]
