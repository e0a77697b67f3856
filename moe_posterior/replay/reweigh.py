"""Weigh experts that somebody else chose, by a gate's or a router's own rule.

Dimensions: N tokens, D hidden size, E experts, k experts per token.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from moe_posterior.errors import InvalidArgumentError
from moe_posterior.gates import Gate, PosteriorGate, PriorGate, Routing, SoftmaxGate
from moe_posterior.kernels.reference import weigh


@singledispatch
def reweigh(gate: Gate, hidden: Tensor, routing: Routing, expert_indices: Tensor) -> Routing:  # (N, D), _, (N, k)
    """A gate's routing of ``hidden`` with its choice replaced, weighted by the gate's own rule, with gradient where it has one.

    Each class of gate that has such a rule registers it here.
    """
    raise InvalidArgumentError(
        f"weights must be 'recorded' for a {type(gate).__name__}: it has no rule to weigh a given choice"
    )


@reweigh.register
def _(gate: PriorGate, hidden: Tensor, routing: Routing, expert_indices: Tensor) -> Routing:
    if gate.router is None:
        raise InvalidArgumentError("weights must be 'recorded' for a gate without a router of its own")
    chosen = gate.tempered_logits(hidden, routing.cluster_ids).gather(1, expert_indices)
    return routing._replace(expert_indices=expert_indices, routing_weights=weigh(chosen, 1.0), scores=chosen)


@reweigh.register
def _(gate: SoftmaxGate, hidden: Tensor, routing: Routing, expert_indices: Tensor) -> Routing:
    chosen = torch.softmax(gate.router(hidden).float(), dim=-1).gather(1, expert_indices)
    weights = chosen / chosen.sum(dim=-1, keepdim=True)
    return routing._replace(expert_indices=expert_indices, routing_weights=weights, scores=chosen)


@reweigh.register
def _(gate: PosteriorGate, hidden: Tensor, routing: Routing, expert_indices: Tensor) -> Routing:
    chosen = gate.competence_scores(routing.cluster_ids).gather(1, expert_indices)
    weights = weigh(chosen, gate.temperature).float()
    return routing._replace(expert_indices=expert_indices, routing_weights=weights, scores=chosen.float())


def has_rule(gate: Gate) -> bool:
    """Whether :func:`reweigh` can weigh for this gate."""
    if isinstance(gate, PriorGate) and gate.router is None:
        return False
    drawn = isinstance(gate, PosteriorGate) and gate.chooses_per_token
    return not drawn and reweigh.dispatch(type(gate)) is not reweigh.dispatch(Gate)


class ForcedChoice(TorchFunctionMode):
    """While active, the top-k by which a router chooses gives the recorded experts and their values; all else stays the router's.

    What the router makes of the values, normalisation and scaling, follows by its own rule and with its gradient.

    >>> with ForcedChoice(torch.tensor([[2, 0]]), num_experts=3):
    ...     torch.tensor([[0.1, 0.7, 0.2]]).topk(2)
    torch.return_types.topk(
    values=tensor([[0.2000, 0.1000]]),
    indices=tensor([[2, 0]]))
    """

    def __init__(self, expert_indices: Tensor, num_experts: int) -> None:
        super().__init__()
        self.expert_indices, self.num_experts = expert_indices, num_experts
        self.choices = 0  # made so far

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func not in (torch.topk, Tensor.topk) or not self._is_choice(args, kwargs):
            return func(*args, **kwargs)
        self.choices += 1
        indices = self.expert_indices.reshape(*args[0].shape[:-1], -1)
        return torch.return_types.topk((args[0].gather(-1, indices), indices))

    def _is_choice(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Among all experts and of as many as recorded: not the best groups, nor the best of each group."""
        scores, (num_tokens, top_k) = args[0], self.expert_indices.shape
        wanted = args[1] if len(args) > 1 else kwargs.get("k")
        whole = scores.shape[-1] >= self.num_experts and scores.numel() == num_tokens * scores.shape[-1]
        return whole and wanted == top_k
