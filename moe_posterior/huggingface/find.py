"""Find the routers of a model, and whether each can be swapped."""

import re
from typing import NamedTuple

from torch import nn

from moe_posterior.checks.validation import described
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.huggingface.adapters import COMMON, SPECIAL, Adapter, UnknownRouterError
from moe_posterior.huggingface.gates import HostedGate
from moe_posterior.huggingface.host import SwappedRouter, wraps_own_forward

_ROUTER_NAME = re.compile(r"(Router|Gate|Gating)$")

REFUSED = {
    "DeepseekV4HashRouter": "its experts are a fixed function of the token's id: there is no choice to change",
    "DogeCDMoE": "it retrieves experts by product keys and has no logit for each expert",
    "NllbMoeTop2Router": "its experts are not the ones that the router names (transformers runs expert 1 for every first choice and "
    "expert 0 for all else), so evidence would be credited to the wrong ones",
    "VitPoseBackboneMoeMLP": "its expert is given by the data set's index: there is no choice to change",
}

BYPASSING = {
    "Mxfp4GptOssMLP": "the block around it computes the logits past the router: load the model with Mxfp4Config(dequantize=True)",
}

_registered: dict[str, Adapter] = {}


class Found(NamedTuple):
    """A router, or a mixture whose router is not supported."""

    name: str
    module: nn.Module
    adapter: Adapter | None  # None: refused
    reason: str  # why it was refused, else ""


def register_adapter(class_name: str, adapter: Adapter) -> None:
    """Say how routers of this class are to be swapped, from the next :func:`~moe_posterior.swap_gates` on, in this process.

    A router of a registered class is found whatever its name and attributes are. Registering again replaces the adapter. A process
    that loads a belief, or unpickles a swapped model, must register the same adapters first.

    Args:
        class_name: the router's class, as ``type(router).__name__``.
        adapter: an instance.

    Raises:
        InvalidArgumentError: no name of a class, or no adapter.

    >>> register_adapter("MyTopKSelector", Adapter())
    """
    if not isinstance(class_name, str) or not class_name.isidentifier():
        raise InvalidArgumentError(f"class_name must be the name of a class; got {described(class_name)}")
    if not isinstance(adapter, Adapter):
        raise InvalidArgumentError(f"adapter must be an instance of Adapter; got {described(adapter)}")
    _registered[class_name] = adapter


def find_routers(model: nn.Module) -> list[Found]:
    """Every router in the model, in the model's order, and every mixture whose router is not supported.

    A swapped router is found as what it was.
    """
    found: list[Found] = []
    for name, module in model.named_modules():
        if isinstance(module, HostedGate):
            continue
        kind = type(module).__name__
        if isinstance(module, SwappedRouter):
            found.append(Found(name, module, module.moe_posterior.adapter, ""))
            continue
        special = _registered.get(kind) or SPECIAL.get(kind)
        if kind in REFUSED and special is None:
            found.append(Found(name, module, None, REFUSED[kind]))
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        if special is not None or _looks_like_router(module):
            found.append(_examined(name, module, parent, special or COMMON))
    routers = {id(entry.module) for entry in found}
    for name, module in model.named_modules():
        holds_experts = isinstance(getattr(module, "experts", None), nn.Module)
        if holds_experts and not any(id(inner) in routers for inner in module.modules()):
            reason = "it holds experts, and no router in it is understood"
            found.append(Found(name, module, None, reason))
    return found


def _looks_like_router(module: nn.Module) -> bool:
    """Whether the class name is a router's, and the module says how many experts it chooses."""
    if not _ROUTER_NAME.search(type(module).__name__):
        return False
    return hasattr(module, "top_k") or hasattr(getattr(module, "config", None), "top_k_experts")


def _examined(name: str, router: nn.Module, parent: nn.Module, adapter: Adapter) -> Found:
    if "forward" in vars(router) and not wraps_own_forward(router):
        return Found(name, router, None, "its forward was replaced on the instance: swap the gates before that")
    if type(parent).__name__ in BYPASSING:
        return Found(name, router, None, BYPASSING[type(parent).__name__])
    if "forward" in vars(parent) and "_hf_hook" not in vars(parent):
        return Found(
            name, router, None, f"the forward of the {type(parent).__name__} around it was replaced on the instance"
        )
    if any(parameter.is_meta for parameter in router.parameters()):
        return Found(name, router, None, "its parameters are on the meta device: load or materialise them first")
    try:
        adapter.num_experts(router), adapter.hidden_size(router), adapter.top_k(router)
    except UnknownRouterError as error:
        return Found(name, router, None, str(error))
    return Found(name, router, adapter, "")
