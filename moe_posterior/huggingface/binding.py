"""What a swapped router knows besides its parameters: what it was, how it was swapped, and what the current call is about.

Dimensions: D hidden size, B sequences, S positions.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from moe_posterior.huggingface.adapters import Adapter


class Binding:
    """A swapped router's state besides its parameters; not a module, so that none of it is saved or cast."""

    def __init__(self, name: str, original: type[nn.Module], adapter: Adapter, recipe: dict[str, Any]) -> None:
        self.name, self.original, self.adapter = name, original, adapter
        self.recipe = recipe  # what swap_gates was called with: num_clusters, mode, knobs
        self.proved = False  # whether a forward has shown the adapter to fit
        self.mask: Tensor | None = None  # (B, S), 0 for padding, of the current model call
        self.own_choice = False  # whether the router's own choice is kept even in replace mode
        self.collector: Callable[[Tensor], None] | None = (
            None  # takes the hidden states of real tokens while clusters are fitted
        )
