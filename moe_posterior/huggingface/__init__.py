"""Swap the gates of transformers models: ``swap_gates``, ``restore_gates`` and what belongs to them."""

from moe_posterior.huggingface.passes import token_outcomes
from moe_posterior.huggingface.report import Layer, SwapReport
from moe_posterior.huggingface.swap import restore_gates, swap_gates, swapped_gates

__all__ = [
    "Layer",
    "SwapReport",
    "restore_gates",
    "swap_gates",
    "swapped_gates",
    "token_outcomes",
]
