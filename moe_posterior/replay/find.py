"""Find the gates of a model, and the routers of another library that some of them live in."""

from torch import nn

from moe_posterior.errors import InvalidArgumentError
from moe_posterior.gates import Gate
from moe_posterior.gates.host import GateHost


def find_gates(model: nn.Module) -> dict[str, Gate]:
    """The gates of a model by their names, in the model's order.

    Raises:
        InvalidArgumentError: it is not a module, it holds no gate, or it was compiled.
    """
    if not isinstance(model, nn.Module):
        hint = "; of a compiled function, pass the module that it calls" if callable(model) else ""
        raise InvalidArgumentError(f"model must be a torch.nn.Module; got {type(model).__name__}{hint}")
    _require_uncompiled(model)
    gates = {name: module for name, module in model.named_modules() if isinstance(module, Gate)}
    if not gates:
        raise InvalidArgumentError(f"model must hold at least one Gate; {type(model).__name__} holds none")
    return gates


def _require_uncompiled(model: nn.Module) -> None:
    """Raise InvalidArgumentError, which says what to pass instead, if a gate is in a part that was compiled."""
    for name, module in model.named_modules():
        whole, in_place = hasattr(module, "_orig_mod"), module._compiled_call_impl is not None
        if not (whole or in_place) or not any(isinstance(child, Gate) for child in module.modules()):
            continue
        if whole and not name:
            wanted = "pass the model that was compiled, which is model._orig_mod"
        else:
            part = f"module {name!r}" if name else "the model"
            how = "by .compile()" if in_place else "by itself"
            wanted = f"{part} was compiled {how}; take compiled = torch.compile(model) instead, and pass model"
        raise InvalidArgumentError(f"model must not be compiled: a compiled graph runs no hooks; {wanted}")


def hosting_router(model: nn.Module, name: str) -> GateHost | None:
    """The router that the gate of this name lives in; None for a gate that decides by itself."""
    holder = model.get_submodule(name.rpartition(".")[0]) if name else None
    return holder if isinstance(holder, GateHost) else None


def outer_name(model: nn.Module, name: str) -> str:
    """The name by which the rest of the model knows a gate: that of the router it lives in, or its own."""
    return name if hosting_router(model, name) is None else name.rpartition(".")[0]
