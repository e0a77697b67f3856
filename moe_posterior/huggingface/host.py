"""A router with a gate inside: the same object, parameters and hooks, with one more child module and a subclass of its own class.

Dimensions: T tokens, D hidden size, B sequences, S positions.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

from moe_posterior.errors import InvalidArgumentError
from moe_posterior.gates.host import GateHost
from moe_posterior.huggingface.binding import Binding
from moe_posterior.huggingface.gates import HostedGate

CHILD = "posterior_gate"  # the name of the gate inside its router


class SwappedRouter(GateHost):
    """Mixin that :func:`swapped_class` adds to a router's class; swapping a router sets its ``__class__``."""

    moe_posterior: Binding
    posterior_gate: HostedGate

    @property
    def chooses(self) -> bool:
        return not self.posterior_gate.replaces

    @property
    def whole(self) -> bool:
        return self.moe_posterior.adapter.whole

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The router's own forward, unchanged as long as there is no evidence and no listener."""
        if is_awake(self):
            from moe_posterior.huggingface.decision import decide  # loads torch's compiler

            return decide(self, self.posterior_gate, self.moe_posterior, args, kwargs)
        return self.moe_posterior.original.forward(self, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty_router, (self.moe_posterior.original,), self.__dict__


_OVERRIDDEN = ("chooses", "whole", "forward", "__reduce_ex__")  # what takes precedence over the router's own
_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def swapped_class(original: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a router's class that consults the gate inside; one per original class.

    The original comes first among the bases: Python sets an instance's ``__class__`` only to a class of the same layout, and the
    layout is the first base's. A router class that names ABC before nn.Module has another layout than nn.Module.
    """
    if original not in _CLASSES:
        own = {name: vars(SwappedRouter)[name] for name in _OVERRIDDEN}
        _CLASSES[original] = type(
            f"Swapped{original.__name__}", (original, SwappedRouter), {"__module__": __name__, **own}
        )
    return _CLASSES[original]


def is_awake(router: SwappedRouter) -> bool:
    """Whether a call needs more than the router's own forward."""
    gate, binding = router.posterior_gate, router.moe_posterior
    if not binding.proved or binding.collector is not None or len(gate._forward_hooks) > 0:
        return True
    return gate.takes_part


def host(router: nn.Module, gate: HostedGate, binding: Binding) -> SwappedRouter:
    """Put the gate into the router; returns the router.

    Raises:
        InvalidArgumentError: the router's class does not allow it; the router is as it was.
    """
    before, original = dict(vars(router)), type(router)
    children = dict(vars(router)["_modules"])
    try:
        if taken := [name for name in (CHILD, "moe_posterior") if hasattr(router, name)]:
            raise AttributeError(f"it has an attribute {taken[0]!r} of its own")
        router.__class__ = swapped_class(original)
        router.add_module(CHILD, gate)
        _rebind(router, original.forward, SwappedRouter.forward)
        router.moe_posterior = binding  # type: ignore[assignment]
    except BaseException as error:
        object.__setattr__(router, "__class__", original)
        vars(router).clear()
        vars(router).update(before)
        vars(router)["_modules"].clear()
        vars(router)["_modules"].update(children)
        if not isinstance(error, Exception):
            raise
        raise InvalidArgumentError(
            f"model must hold routers that a gate can be put into; router {binding.name!r}, a {original.__name__}, refuses it: "
            f"{error}"
        ) from error
    return router  # type: ignore[return-value]


def unhost(router: SwappedRouter) -> None:
    """Take the gate out again; the router is as it was before the swap."""
    _rebind(router, SwappedRouter.forward, router.moe_posterior.original.forward)
    router.__class__ = router.moe_posterior.original  # type: ignore[assignment]
    delattr(router, CHILD)
    del router.moe_posterior


def _empty_router(original: type[nn.Module]) -> nn.Module:
    swapped = swapped_class(original)
    return swapped.__new__(swapped)


def wraps_own_forward(router: nn.Module) -> bool:
    """Whether accelerate's hooks wrap the forward of the router's class, as on models spread over several devices."""
    inner = vars(router).get("_old_forward")
    return "_hf_hook" in vars(router) and getattr(inner, "__func__", None) is type(router).forward


def _rebind(router: nn.Module, old: Callable[..., Any], new: Callable[..., Any]) -> None:
    """Rebind to the new class the methods that accelerate's hooks bound to the instance."""
    for name in ("forward", "_old_forward"):
        if getattr(vars(router).get(name), "__func__", None) is old:
            vars(router)[name] = MethodType(new, router)


def swapped_routers(model: nn.Module, required: bool = True) -> dict[str, SwappedRouter]:
    """The swapped routers of a model by name.

    Raises:
        InvalidArgumentError: there are none, and they are required.
    """
    routers = {name: module for name, module in model.named_modules() if isinstance(module, SwappedRouter)}
    if required and not routers:
        raise InvalidArgumentError(
            f"model must have been swapped by swap_gates; {type(model).__name__} holds no swapped router"
        )
    return routers


def validate_unswapped(model: nn.Module) -> None:
    """Raise InvalidArgumentError if the model holds a swapped router already, or was compiled."""
    for name, module in model.named_modules():
        if isinstance(module, SwappedRouter):
            raise InvalidArgumentError(
                f"model must not be swapped already; router {name!r} is: call restore_gates(model) first"
            )
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise InvalidArgumentError("model must not be compiled yet: swap the gates first, then compile")
