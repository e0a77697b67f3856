"""Find out which tokens of a model call are padding, so that they never become evidence.

A mask comes as the user gave it, (B, M) over past and present positions, or as transformers made it for a static cache:
(B, H, S, K) for S queries and K keys, boolean or added to the scores, one for each kind of layer, or a BlockMask. Every form tells
whether a token's own key may be attended to.

Dimensions: B sequences, S positions of the call, M ≥ S positions with the past, K ≥ S keys, H heads.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moe_posterior.huggingface.binding import Binding, close_call, open_call
from moe_posterior.huggingface.host import SwappedRouter
from moe_posterior.huggingface.saving import save_beliefs_with_models

_OTHER_TOKENS = {
    "pixel_values",
    "encoder_hidden_states",
    "decoder_input_ids",
}  # arguments that hold other tokens
_HIDDEN = -1000.0  # an additive mask hides with -1e4 or less; values nearer to 0 are a bias, for relative positions say


class MaskCapture:
    """Forward hooks that pass a call's attention mask to the routers inside, until the call is over; an object, so that in a copied
    model it refers to the copy's routers.

    An inner model that is called with its own mask overrides the outer one. Without a mask it keeps the outer one, unless its
    tokens are clearly different ones: a vision tower's, or a decoder's next to an encoder.
    """

    def __init__(self, bindings: list[Binding], outermost: bool) -> None:
        self.bindings, self.outermost = bindings, outermost

    def __setstate__(self, state: dict[str, Any]) -> None:
        save_beliefs_with_models()  # in the process that unpickles a model nothing may have been swapped yet
        vars(self).update(state)

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Find the mask and pass it on; before the call."""
        if torch.compiler.is_compiling():
            return
        save_beliefs_with_models()  # PEFT may have been imported since the swap
        given = _arguments(model, args, kwargs)
        own = _OTHER_TOKENS & given.keys()
        mask = None
        if "attention_mask" in given:
            other = given.keys() & {"decoder_input_ids", "encoder_outputs"}  # the cache is then the decoder's
            mask = padding_of(given["attention_mask"], given, ("input_ids", "inputs_embeds"), cached=not other)
        elif "decoder_input_ids" in own and "decoder_attention_mask" in given:
            mask = padding_of(given["decoder_attention_mask"], given, ("decoder_input_ids",))
        keeps_outer = mask is None and not own and not self.outermost
        open_call(self, () if keeps_outer else self.bindings, mask)

    def leave(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forget the mask; after the call, also after one that failed."""
        if not torch.compiler.is_compiling():
            close_call(self)


def capture_padding(model: nn.Module, handles: list[RemovableHandle]) -> None:
    """Install a :class:`MaskCapture` on the model and on every model inside it that holds swapped routers; ``handles`` remove them."""
    for module in model.modules():
        if module is not model and not hasattr(module, "main_input_name"):
            continue
        bindings = [inner.moe_posterior for inner in module.modules() if isinstance(inner, SwappedRouter)]
        if bindings:
            capture = MaskCapture(bindings, outermost=module is model)
            handles.append(module.register_forward_pre_hook(capture, with_kwargs=True))
            handles.append(module.register_forward_hook(capture.leave, always_call=True))


def padding_of(
    mask: Any, given: Mapping[str, Any], names: tuple[str, ...], cached: bool = True
) -> Tensor | None:  # -> (B, S)
    """0 for the padding among a call's tokens, whatever form its mask has; None if the mask does not say.

    Args:
        mask: the call's.
        given: the call's arguments, by name.
        names: the arguments that may hold the tokens.
        cached: whether the call's cache, if there is one, holds the past of these tokens.
    """
    if isinstance(mask, Mapping):
        kinds = [mask.get("full_attention"), *mask.values()]
        mask = next((each for each in kinds if each is not None), None)
    tokens = next((given[name] for name in names if isinstance(given.get(name), Tensor)), None)
    size = None if tokens is None or tokens.ndim < 2 else tuple(tokens.shape[:2])
    start = _past_length(given) if cached else None
    if hasattr(mask, "mask_mod"):
        return None if size is None else _of_blocks(mask, size, start)
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 3, 4):
        return None
    seen = _attended(mask)
    if mask.ndim > 2:
        seen = seen if mask.ndim == 3 else seen.any(dim=1)  # (B, S, K)
        rows, keys = seen.shape[1:]
        if rows > keys or (size is not None and rows not in (1, size[1])):
            return None
        if rows == 1 and size is not None and size[1] > 1:  # one row for all queries
            seen = seen[:, 0]
        else:
            queries = torch.arange(rows, device=seen.device)
            seen, start = seen[:, queries, _first_key(rows, keys, start) + queries], 0
    if size is not None and len(seen) == 1:
        seen = seen.expand(size[0], -1)
    if size is None or seen.shape[1] < size[1]:
        return seen
    first = _first_key(size[1], seen.shape[1], start)
    return seen[:, first : first + size[1]]


def _attended(mask: Tensor) -> Tensor:
    """Where a mask allows attention: True, positive, or, in an additive mask, not far below 0."""
    if mask.dtype == torch.bool:
        return mask
    added = bool((mask < 0).any()) or (mask.is_floating_point() and mask.ndim > 2 and not bool((mask > 0).any()))
    return mask > _HIDDEN if added else mask != 0


def _first_key(size: int, keys: int, start: int | None) -> int:
    """Where a call's own keys begin: after the past, in a static cache; at the end, where older keys have been dropped."""
    return keys - size if start is None or start + size > keys else start


def _of_blocks(mask: Any, size: tuple[int, int], start: int | None) -> Tensor:  # -> (B, S)
    """A BlockMask keeps the function that it was made from."""
    device = mask.kv_num_blocks.device
    first = _first_key(size[1], mask.seq_lengths[1], start)
    queries, sequences = torch.arange(size[1], device=device), torch.arange(size[0], device=device)
    rule = torch.vmap(torch.vmap(mask.mask_mod, in_dims=(None, None, 0, 0)), in_dims=(0, None, None, None))
    return rule(sequences, torch.zeros((), dtype=torch.int64, device=device), queries, first + queries)


def _past_length(given: Mapping[str, Any]) -> int | None:
    """How many positions the cache of this call already holds; None without a cache, or if it does not say."""
    caches = [given[name] for name in ("past_key_values", "past_key_value", "cache_params") if name in given]
    try:
        return int(caches[0].get_seq_length())
    except (AttributeError, IndexError, NotImplementedError, TypeError, ValueError):
        return None


def _arguments(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by name, those that are None left out."""
    named = dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) if args else {}
    return {name: value for name, value in {**named, **kwargs}.items() if value is not None}
