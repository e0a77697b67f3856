"""Give the routers of a transformers model a belief about their experts, in place, and take it away again."""

import json
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, Literal

from torch import nn

from moe_posterior.errors import InvalidArgumentError
from moe_posterior.huggingface.binding import Binding
from moe_posterior.huggingface.find import Found, find_routers
from moe_posterior.huggingface.gates import HostedGate, make_gate
from moe_posterior.huggingface.host import SwappedRouter, host, swapped_routers, unhost, validate_unswapped
from moe_posterior.huggingface.padding import capture_padding
from moe_posterior.huggingface.saving import LoadWatcher, save_beliefs_with_models
from moe_posterior.huggingface.swapped import Layer, SwappedModel

Mode = Literal["prior", "replace"]
_HANDLES = "_moe_posterior_handles"  # attribute of a swapped model, for its hooks


def swap_gates(model: nn.Module, num_clusters: int = 64, mode: Mode = "prior", **knobs: Any) -> SwappedModel:
    """Put a gate with a belief into every supported router of ``model``, in place and reversibly.

    The routers remain the same objects, with their parameters, names and hooks. In ``"prior"`` mode each keeps choosing by its own
    rule, with a bias on the logits of experts that evidence speaks against (:class:`~moe_posterior.gates.PriorGate`); until then its
    outputs are the same bit for bit. In ``"replace"`` mode the belief alone chooses once the clusters are fitted
    (:class:`~moe_posterior.PosteriorGate`), with weights that sum to what the router's own weights would, so that its
    scaling stays. Logits that a router returns, for an auxiliary loss for example, include the bias.

    It finds modules whose class name ends in Router, Gate or Gating, that have ``top_k`` and one projection to logits, and
    return ``(logits, weights (T, k), indices (T, k))``; a hand-written block only needs such a router. Before any choice is
    changed, a forward must have confirmed that the router behaves this way; otherwise that forward raises. A few classes that
    return something else have adapters of their own.

    Tokens that the ``attention_mask`` marks as padding never become evidence: as a (B, M) mask, or as the 4-D mask or BlockMask
    that transformers makes for a static cache.

    ``save_pretrained`` of the model, of one around it, or of a PEFT wrapper then saves the belief too, and
    :func:`~moe_posterior.huggingface.load_swapped` or :func:`~moe_posterior.huggingface.load_belief` loads it. With transformers'
    Trainer, add a :class:`~moe_posterior.huggingface.trainer.BeliefTrainerCallback`, which observes, resumes and rolls back.

    Next: with ``swapped = swap_gates(model)``, ``swapped.fit(dataloader)``, then ``swapped.warm_start(dataloader)``, then observe.

    Args:
        model: a transformers model, or any module that holds such routers. Not compiled yet.
        num_clusters: C of every layer.
        mode: ``"prior"`` for a model that was trained with its routers; ``"replace"`` for the belief alone.
        knobs: options of the mode's gate, the same for every layer.

    Returns:
        What was swapped, and what was left alone and why; print it for a table. A warning also names what was left alone.

    Raises:
        InvalidArgumentError: nothing in the model could be swapped, it is swapped or compiled already, a knob is out of range, or
            a router's class refuses the gate. After this error, or any other, the model is unchanged.

    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> config = MixtralConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
    ...                        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    >>> model = MixtralForCausalLM(config)
    >>> swapped = swap_gates(model, num_clusters=8)
    >>> [(layer.name, layer.num_experts, layer.top_k) for layer in swapped.swapped]
    [('model.layers.0.mlp.gate', 4, 2), ('model.layers.1.mlp.gate', 4, 2)]
    >>> restore_gates(model)
    """
    validate_unswapped(model)
    found = find_routers(model)
    usable = [entry for entry in found if entry.adapter is not None]
    if not usable:
        reasons = "; ".join(f"{entry.name}: {entry.reason}" for entry in found) or "it holds no router"
        raise InvalidArgumentError(
            f"model must hold a router that can be swapped; got {type(model).__name__} ({reasons})"
        )
    recipe = {"num_clusters": num_clusters, "mode": mode, "knobs": knobs}
    _validate_savable(recipe)
    gates = [_gate_for(entry, num_clusters, mode, knobs) for entry in usable]
    with ExitStack() as undo:
        for entry, gate in zip(usable, gates, strict=True):
            assert entry.adapter is not None
            binding = Binding(entry.name, type(entry.module), entry.adapter, recipe)
            undo.callback(unhost, host(entry.module, gate, binding))
        undo.callback(_remove_hooks, model)
        vars(model)[_HANDLES] = []
        capture_padding(model, vars(model)[_HANDLES])
        vars(model)[_HANDLES].append(model.register_load_state_dict_pre_hook(LoadWatcher()))
        save_beliefs_with_models()
        swapped = report_of(model)
        if swapped.refused:
            warnings.warn(f"some of the model was left as it is:\n{swapped}", stacklevel=2)
        undo.pop_all()
    return swapped


def restore_gates(model: nn.Module) -> None:
    """Undo :func:`swap_gates`: every router is the same object with its original class, and the belief is gone.

    Raises:
        InvalidArgumentError: the model is not swapped.
    """
    routers = swapped_routers(model)
    for router in routers.values():
        unhost(router)
    _remove_hooks(model)


def _remove_hooks(model: nn.Module) -> None:
    for holder in model.modules():
        for handle in vars(holder).pop(_HANDLES, []):
            handle.remove()


def report_of(model: nn.Module) -> SwappedModel:
    """What :func:`swap_gates` returned, for a model that was swapped elsewhere, say by :func:`load_swapped`.

    Raises:
        InvalidArgumentError: the model is not swapped.
    """
    routers = swapped_routers(model)
    recipe = next(iter(routers.values())).moe_posterior.recipe
    return SwappedModel(model, recipe["mode"], [_layer(entry) for entry in find_routers(model)])


def swapped_gates(model: nn.Module) -> Iterator[tuple[str, HostedGate]]:
    """The gates inside a swapped model, by their routers' names."""
    for name, router in swapped_routers(model, required=False).items():
        yield name, router.posterior_gate


def _validate_savable(recipe: dict[str, Any]) -> None:
    """Fail now rather than after training, when the belief is saved."""
    try:
        json.dumps(recipe)
    except TypeError as error:
        raise InvalidArgumentError(
            f"num_clusters and knobs must be plain numbers, strings, booleans or None; got {recipe}: {error}"
        ) from error


def _gate_for(entry: Found, num_clusters: int, mode: Mode, knobs: dict[str, Any]) -> HostedGate:
    assert entry.adapter is not None
    adapter, router = entry.adapter, entry.module
    sizes = (adapter.hidden_size(router), adapter.num_experts(router))
    gate = make_gate(mode, *sizes, num_clusters, adapter.top_k(router), **knobs)
    parameter = next(router.parameters())
    return gate.to(parameter.device).train(router.training)


def _layer(entry: Found) -> Layer:
    kind, adapter = type(entry.module), entry.adapter
    if adapter is None:
        return Layer(entry.name, kind.__name__, "refused", entry.reason, 0, 0)
    name = next(
        base.__name__
        for base in kind.__mro__
        if base not in SwappedRouter.__mro__ and not issubclass(base, SwappedRouter)
    )
    router = entry.module
    return Layer(entry.name, name, adapter.kind, "", adapter.num_experts(router), adapter.top_k(router))
