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


class MaskCapture:
    """A forward-pre-hook that leaves a call's attention mask with the routers below; an object, so that a copied model's refers to
    the copy's routers.

    An inner model (a decoder, a text tower) that is given a mask of its own overrides the outer one's. One that is given none
    keeps it, unless it reads pixels: a vision tower's tokens are not the text's.
    """

    def __init__(self, bindings: list[Binding], outermost: bool) -> None:
        self.bindings, self.outermost = bindings, outermost

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Find the mask and hand it on."""
        if torch.compiler.is_compiling():
            return
        mask = attention_mask_of(model, args, kwargs)
        sees_text = getattr(model, "main_input_name", "input_ids") != "pixel_values"
        if mask is None and sees_text and not self.outermost:
            return
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


def attention_mask_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:  # -> (B, S)
    """The two-dimensional ``attention_mask`` among a call's arguments; None if there is none, or one of another form."""
    mask = kwargs.get("attention_mask")
    if mask is None and args:
        names = list(inspect.signature(model.forward).parameters)
        if "attention_mask" in names[: len(args)]:
            mask = args[names.index("attention_mask")]
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
