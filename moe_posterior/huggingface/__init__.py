"""Swap the gates of transformers models: ``swap_gates``, ``restore_gates``, and saving and loading what was swapped."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moe_posterior.huggingface.adapters import Adapter, UnknownRouterError
from moe_posterior.huggingface.find import register_adapter
from moe_posterior.huggingface.fitting import fit_gates, warm_start_gates
from moe_posterior.huggingface.loading import copy_belief, load_belief, load_swapped
from moe_posterior.huggingface.passes import token_outcomes
from moe_posterior.huggingface.saving import save_belief
from moe_posterior.huggingface.swap import report_of, restore_gates, swap_gates, swapped_gates
from moe_posterior.huggingface.swapped import Layer, SwappedModel

if TYPE_CHECKING:
    from moe_posterior.huggingface.trainer import BeliefTrainerCallback

SwapReport = SwappedModel  # its name in release 0.1; goes with 0.3

__all__ = [
    "Adapter",
    "BeliefTrainerCallback",
    "Layer",
    "SwapReport",
    "SwappedModel",
    "UnknownRouterError",
    "copy_belief",
    "fit_gates",
    "load_belief",
    "load_swapped",
    "register_adapter",
    "report_of",
    "restore_gates",
    "save_belief",
    "swap_gates",
    "swapped_gates",
    "token_outcomes",
    "warm_start_gates",
]


def __getattr__(name: str) -> Any:
    if name == "BeliefTrainerCallback":  # derives from a class of transformers, which nothing else here needs to import
        return import_module("moe_posterior.huggingface.trainer").BeliefTrainerCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
