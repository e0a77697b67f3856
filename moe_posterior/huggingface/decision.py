"""One call of a swapped router, when its own forward is not enough.

Kept apart from :mod:`~moe_posterior.huggingface.host` because excluding it from compiled graphs loads torch's compiler.

Dimensions: T tokens, D hidden size, E experts, W logits per token (at least E), k experts per token, B sequences, S positions.
"""

from typing import Any

import torch
from torch import Tensor, nn

from moe_posterior.huggingface.adapters import UnknownRouterError
from moe_posterior.huggingface.binding import Binding, mask_of
from moe_posterior.huggingface.gates import Choice, HostedGate
from moe_posterior.huggingface.logits_bias import LogitsInterceptor
from moe_posterior.replay.record import auxiliary_listener


@torch.compiler.disable
def decide(router: nn.Module, gate: HostedGate, binding: Binding, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the router's own forward with the evidence added to its logits; the gate sees the choice and, in replace mode, makes it."""
    adapter, width = binding.adapter, binding.adapter.width(router)
    hidden = adapter.hidden(args, kwargs).detach()
    hidden = hidden.reshape(-1, hidden.shape[-1])
    real = real_tokens(mask_of(binding), len(hidden))
    if binding.collector is not None:
        binding.collector(hidden if real is None else hidden[real.to(hidden.device)])
    bias, correction, assignment = None, None, None
    if (biased := gate.logits_bias(hidden)) is not None:
        evidence, assignment = biased
        bias = nn.functional.pad(evidence, (0, width - gate.num_experts))
        correction = adapter.correction(router, args, kwargs)
    replacing = gate.replaces and gate.takes_part and not binding.own_choice

    def choose(indices: Tensor, weights: Tensor) -> tuple[Tensor, Tensor] | None:
        interceptor.over = True
        _validate_understood(binding, interceptor, len(hidden), len(indices))
        binding.proved = True
        if not replacing and not gate._forward_hooks:
            return None
        routing = gate(hidden, Choice(indices, weights, real, assignment, stands=not replacing))
        weights = routing.routing_weights
        if weights.is_leaf and weights.requires_grad:
            weights = weights.clone()  # experts may scale their weights in place, which autograd forbids on a leaf
        return routing.expert_indices, weights

    with LogitsInterceptor(len(hidden), width, bias, correction) as interceptor:
        output = adapter.call(router, binding.original.forward, args, kwargs, choose)
    if not interceptor.over:
        raise UnknownRouterError(
            f"{binding.original.__name__} must return a choice; got none (router {binding.name!r})"
        )
    listening = gate._forward_hooks and torch.is_grad_enabled()
    return adapter.hand_on(output, auxiliary_listener(gate)) if listening else output


def _validate_understood(binding: Binding, interceptor: LogitsInterceptor, num_tokens: int, num_routed: int) -> None:
    kind = binding.original.__name__
    if interceptor.products != 1:
        raise UnknownRouterError(
            f"{kind} must compute its logits in one matrix product to {interceptor.width} columns; got {interceptor.products} "
            f"(router {binding.name!r}); restore_gates(model) undoes the swap"
        )
    if num_routed != num_tokens:
        raise UnknownRouterError(f"{kind} must route {num_tokens} tokens; got {num_routed} (router {binding.name!r})")


def real_tokens(mask: Tensor | None, num_tokens: int) -> Tensor | None:  # (B, S) -> (T,) bool
    """Which tokens of a call are real, not padding; None if all of them are, or if the mask is for other tokens.

    With cached keys the mask covers past positions too; a call's own tokens are its last ones.

    >>> real_tokens(torch.tensor([[0, 1, 1], [1, 1, 1]]), 4)
    tensor([True, True, True, True])
    >>> real_tokens(torch.tensor([[0, 1, 1], [1, 1, 1]]), 6)
    tensor([False,  True,  True,  True,  True,  True])
    """
    if mask is None or not len(mask) or num_tokens % len(mask) or num_tokens // len(mask) > mask.shape[1]:
        return None
    length = num_tokens // len(mask)
    return mask[:, mask.shape[1] - length :].reshape(-1).bool()
