"""Beta-competence gates for mixtures of experts: route by proven competence.

A name is loaded with its part, and torch with it, when it is first used: what needs none of it, such as the help of the command line,
answers at once.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_posterior.clustering import Clusterer
    from moe_posterior.errors import (
        DamagedFileError,
        InvalidArgumentError,
        MissingDataError,
        MissingDependencyError,
        MoEPosteriorError,
        NotFittedError,
    )
    from moe_posterior.evaluation import CalibrationReport, evaluate
    from moe_posterior.evidence import Evidence, ProxyNoise
    from moe_posterior.experts import ExpertsFFN
    from moe_posterior.gates import BeliefGate, Gate, LearnedPrior, PosteriorGate, PriorGate, Routing, SoftmaxGate
    from moe_posterior.huggingface import fit_gates, restore_gates, swap_gates, token_outcomes, warm_start_gates
    from moe_posterior.layer import MixtureOfExperts, PosteriorMoE
    from moe_posterior.posterior import BetaPosterior
    from moe_posterior.replay.record import Trace, record
    from moe_posterior.replay.replay import replay
    from moe_posterior.router import Decision, Decisions, PosteriorRouter
    from moe_posterior.serving import export_routing

__all__ = [
    "BeliefGate",
    "BetaPosterior",
    "CalibrationReport",
    "Clusterer",
    "DamagedFileError",
    "Decision",
    "Decisions",
    "Evidence",
    "ExpertsFFN",
    "Gate",
    "InvalidArgumentError",
    "LearnedPrior",
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
    "evaluate",
    "export_routing",
    "fit_gates",
    "record",
    "replay",
    "restore_gates",
    "swap_gates",
    "token_outcomes",
    "warm_start_gates",
]

_HOMES = {  # part -> the names of the package that it defines
    "clustering": ("Clusterer",),
    "errors": (
        "DamagedFileError",
        "InvalidArgumentError",
        "MissingDataError",
        "MissingDependencyError",
        "MoEPosteriorError",
        "NotFittedError",
    ),
    "evaluation": ("CalibrationReport", "evaluate"),
    "evidence": ("Evidence", "ProxyNoise"),
    "experts": ("ExpertsFFN",),
    "gates": ("BeliefGate", "Gate", "LearnedPrior", "PosteriorGate", "PriorGate", "Routing", "SoftmaxGate"),
    "huggingface": ("fit_gates", "restore_gates", "swap_gates", "token_outcomes", "warm_start_gates"),
    "layer": ("MixtureOfExperts", "PosteriorMoE"),
    "posterior": ("BetaPosterior",),
    "replay": ("Trace", "record", "replay"),
    "router": ("Decision", "Decisions", "PosteriorRouter"),
    "serving": ("export_routing",),
}
_HOME = {name: part for part, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name in _HOME:
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    elif name in _HOMES:
        value = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    setattr(sys.modules[__name__], name, value)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """The package where ``replay`` stays a function: importing the room of that name would put the room there."""

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(value, ModuleType) and _HOME.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
