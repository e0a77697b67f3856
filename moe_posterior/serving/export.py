"""Turn the gates of a model into routing functions, and pass those to other processes."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from moe_posterior.checks.declared import as_declared
from moe_posterior.checks.validation import described
from moe_posterior.errors import DamagedFileError, InvalidArgumentError
from moe_posterior.files.tensorfile import load_tensors, save_tensors
from moe_posterior.gates import BeliefGate, Gate
from moe_posterior.replay.find import find_gates, hosting_router, outer_name
from moe_posterior.serving.learned import LearnedRouting
from moe_posterior.serving.routing import CustomRouting, PosteriorRouting, PriorRouting
from moe_posterior.serving.rule import HostRule

KIND, VERSION = "exported routing", 1
KINDS: tuple[type[CustomRouting], ...] = (PriorRouting, PosteriorRouting, LearnedRouting)


@as_declared
def export_routing(
    model: nn.Module,
    *,
    rule: HostRule | Mapping[str, HostRule] | None = None,
    scaled: bool = False,
) -> dict[str, CustomRouting]:
    """A routing function for every gate of a model, by the gate's name; for a swapped model, by its router's.

    The functions hold copies and no reference to the model. They choose as the gates do now; later evidence reaches them through
    :meth:`CustomRouting.refresh` or :func:`update_routing`. The engine's hidden states and logits must be those that the router sees
    and computes; weights are normalised if the engine asks for it by ``renormalize``. The nearest cluster is always the exact one.

    Args:
        model: was given to ``swap_gates``, or holds :class:`~moe_posterior.PriorGate` or :class:`~moe_posterior.PosteriorGate` itself.
        rule: how the model turns logits into a choice, one for all or by name. None (default) finds a swapped router's rule by trying
            it on random hidden states, and takes softmax top-k for a gate of ours.
        scaled: whether the weights include the model's ``routed_scaling_factor``. False (default): SGLang multiplies by it after a
            custom routing function, and vLLM where the layer has ``apply_routed_scale_to_output``. True for a vLLM layer without that.

    Raises:
        InvalidArgumentError: no gates, a gate of another class, one that draws at random or scores each token separately by more than a
            learned prior, or a router whose rule :class:`HostRule` cannot express; the message names it.

    >>> from moe_posterior import PosteriorMoE
    >>> hidden = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    >>> moe = PosteriorMoE(nn.ModuleList([nn.Linear(8, 8) for _ in range(4)]), hidden_size=8, num_clusters=4)
    >>> moe.gate.fit(hidden)
    >>> routing = export_routing(moe)["gate"]
    >>> weights, ids = routing(hidden_states=hidden, gating_output=torch.zeros(64, 4), topk=2, renormalize=True)
    >>> torch.equal(ids, moe.route(hidden).expert_indices.int()), ids.dtype, weights.dtype
    (True, torch.int32, torch.float32)
    """
    functions = {}
    for name, gate in find_gates(model).items():
        router = hosting_router(model, name)
        key = outer_name(model, name)
        own = rule.get(key) if isinstance(rule, Mapping) else rule
        if own is None:
            own = HostRule() if router is None else _rule_of(key, router)
        functions[key] = _routing_of(
            key, gate, own if scaled else own._replace(routed_scaling_factor=1.0), router is not None
        )
    return functions


@as_declared
def save_routing(functions: Mapping[str, CustomRouting], path: str | os.PathLike[str]) -> None:
    """Write routing functions for another process; the file is replaced whole or not at all."""
    for name, function in functions.items():
        if not isinstance(function, CustomRouting):
            raise InvalidArgumentError(
                f"functions must map names to routing functions; {name!r} is none: {described(function)}"
            )
    tensors = {
        f"{place}.{name}": table for place, f in enumerate(functions.values()) for name, table in f.state_dict().items()
    }
    header = {
        "kind": KIND,
        "version": VERSION,
        "functions": [[name, type(function).__name__, function.settings()] for name, function in functions.items()],
    }
    save_tensors(path, tensors, header)


@as_declared
def load_routing(path: str | os.PathLike[str]) -> dict[str, CustomRouting]:
    """Read what :func:`save_routing` wrote, on the CPU.

    Raises:
        MissingDataError, DamagedFileError: the file is missing, damaged, or of a later version.
    """
    kinds: dict[str, type[CustomRouting]] = {kind.__name__: kind for kind in KINDS}
    tensors, header = load_tensors(path, KIND)
    if header["version"] != VERSION:
        raise DamagedFileError(f"{path} must be of format version {VERSION}; got {header['version']}")
    functions = {}
    for place, (name, kind, settings) in enumerate(header["functions"]):
        state = {key.removeprefix(f"{place}."): table for key, table in tensors.items() if key.startswith(f"{place}.")}
        functions[name] = kinds[kind].restore(settings, state)
    return functions


@torch.no_grad()
@as_declared
def update_routing(functions: Mapping[str, CustomRouting], path: str | os.PathLike[str]) -> None:
    """Give routing functions in use the clusters and evidence of a file, in place.

    Raises:
        InvalidArgumentError: the file's functions have other names, kinds, rules or sizes; nothing has changed.
        MissingDataError, DamagedFileError: as :func:`load_routing`.
    """
    fresh = load_routing(path)
    if list(fresh) != list(functions):
        raise InvalidArgumentError(f"functions must be those of {path}, {list(fresh)}; got {list(functions)}")
    for name, function in functions.items():
        if (type(function), function.settings(), function.sizes()) != (
            type(fresh[name]),
            fresh[name].settings(),
            fresh[name].sizes(),
        ):
            raise InvalidArgumentError(
                f"function {name!r} must be as in {path}, {fresh[name]}; got {function}: load it again"
            )
    for name, function in functions.items():
        function.load_state_dict(fresh[name].state_dict())


def _routing_of(name: str, gate: Gate, rule: HostRule, hosted: bool) -> CustomRouting:
    learned = isinstance(gate, BeliefGate) and gate.learned_prior is not None
    for kind in (LearnedRouting,) if learned else (PriorRouting, PosteriorRouting):
        if isinstance(gate, kind.serves):
            try:
                # A gate that keeps its host's logits weights experts as the host does anyway.
                return kind(gate, rule, spread=not hosted, hosted=hosted and kind is PosteriorRouting)
            except InvalidArgumentError as error:
                raise InvalidArgumentError(f"gate {name!r} cannot be served: {error}") from error
    raise InvalidArgumentError(
        f"gate {name!r} cannot be served: it must be a PriorGate or PosteriorGate; got {type(gate).__name__}"
    )


def _rule_of(name: str, router: Any) -> HostRule:
    from moe_posterior.serving.hosts import rule_of

    return rule_of(name, router)
