"""Swap the gates of transformers models: ``swap_gates``, ``restore_gates``, and saving and loading what was swapped."""

from moe_posterior.huggingface.loading import load_belief, load_swapped
from moe_posterior.huggingface.passes import token_outcomes
from moe_posterior.huggingface.saving import save_belief
from moe_posterior.huggingface.swap import restore_gates, swap_gates, swapped_gates
from moe_posterior.huggingface.swapped import Layer, SwappedModel

SwapReport = SwappedModel  # its name in release 0.1; goes with 0.3

__all__ = [
    "Layer",
    "SwapReport",
    "SwappedModel",
    "load_belief",
    "load_swapped",
    "restore_gates",
    "save_belief",
    "swap_gates",
    "swapped_gates",
    "token_outcomes",
]
