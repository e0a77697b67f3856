"""Know which tokens of a model's call are padding, so that they never become evidence.

Dimensions: B sequences, S positions.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moe_posterior.huggingface.host import Binding, SwappedRouter

_OTHER_TOKENS = {
    "pixel_values",
    "encoder_hidden_states",
    "decoder_input_ids",
}  # arguments that bring tokens of their own


class MaskCapture:
    """A forward-pre-hook that leaves a call's attention mask with the routers below; an object, so that a copied model's refers to
    the copy's routers.

    An inner model that is given a mask of its own overrides the outer one's. One that is given none keeps it, unless its tokens
    are plainly others: a vision tower's, or those of a decoder beside an encoder.
    """

    def __init__(self, bindings: list[Binding], outermost: bool) -> None:
        self.bindings, self.outermost = bindings, outermost

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Find the mask and hand it on."""
        if torch.compiler.is_compiling():
            return
        given = _arguments(model, args, kwargs)
        own = _OTHER_TOKENS & given.keys()
        mask = given.get("attention_mask")
        if mask is None and "decoder_input_ids" in own:
            mask = given.get("decoder_attention_mask")
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            if not own and not self.outermost:
                return
            mask = None
        for binding in self.bindings:
            binding.mask = mask


def capture_padding(model: nn.Module) -> list[RemovableHandle]:
    """Install a :class:`MaskCapture` on the model and on every model inside it that holds swapped routers."""
    handles = []
    for module in model.modules():
        if module is not model and not hasattr(module, "main_input_name"):
            continue
        bindings = [inner.moe_posterior for inner in module.modules() if isinstance(inner, SwappedRouter)]
        if bindings:
            capture = MaskCapture(bindings, outermost=module is model)
            handles.append(module.register_forward_pre_hook(capture, with_kwargs=True))
    return handles


def _arguments(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by name, those that are None left out."""
    named = dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) if args else {}
    return {name: value for name, value in {**named, **kwargs}.items() if value is not None}
