"""What a swapped router knows besides its parameters: what it was, how it was swapped, and what the current call is about.

Which tokens of a call are padding is known where the model is called and asked for where a router is. It is kept in a context variable,
because several threads may call one model at the same time, each with a mask of its own.

Dimensions: D hidden size, B sequences, S positions.
"""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple, Optional

from torch import Tensor, nn

from moe_posterior.huggingface.adapters import Adapter


class Binding:
    """A swapped router's state besides its parameters; not a module, so that none of it is saved or cast."""

    def __init__(self, name: str, original: type[nn.Module], adapter: Adapter, recipe: dict[str, Any]) -> None:
        self.name, self.original, self.adapter = name, original, adapter
        self.recipe = recipe  # what swap_gates was called with: num_clusters, mode, knobs
        self.proved = False  # whether a forward has shown the adapter to fit
        self.own_choice = False  # whether the router's own choice is kept even in replace mode
        self.collector: Callable[[Tensor], None] | None = (
            None  # takes the hidden states of real tokens while clusters are fitted
        )


class _Call(NamedTuple):
    """A model call that is under way."""

    caller: object  # who opened it and will close it
    bindings: Sequence[Binding]  # the routers it speaks about
    mask: Tensor | None  # (B, S), 0 for padding
    outer: Optional["_Call"]  # the call that it is part of


_calls: ContextVar[_Call | None] = ContextVar("moe_posterior_calls", default=None)


def open_call(caller: object, bindings: Sequence[Binding], mask: Tensor | None) -> None:  # (B, S)
    """From here to :func:`close_call`, in this thread or asyncio task, these routers' tokens have this mask."""
    _calls.set(_Call(caller, bindings, mask, _calls.get()))


def close_call(caller: object) -> None:
    """End the innermost call that ``caller`` opened, and what was left open inside it; nothing happens if there is none."""
    call = _calls.get()
    while call is not None and call.caller is not caller:
        call = call.outer
    if call is not None:
        _calls.set(call.outer)


def mask_of(binding: Binding) -> Tensor | None:  # -> (B, S)
    """What the innermost call that speaks about this router says of its tokens; None outside of any."""
    call = _calls.get()
    while call is not None:
        if any(each is binding for each in call.bindings):
            return call.mask
        call = call.outer
    return None
