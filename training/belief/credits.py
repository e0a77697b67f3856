"""What a training step says about the experts: an outcome for every routing of the step, from the module itself or from gradients.

Dimensions: N tokens of one call of a gate, T tokens of all its calls in a step, E experts, k experts per token.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_posterior.checks import validation
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.gates import BeliefGate, Routing
from moe_posterior.gates.base import SharedRouting
from moe_posterior.memberships import Memberships
from moe_posterior.replay import Trace

__all__ = ["Credit", "from_gradients", "from_module", "joined", "nothing", "per_expert"]


class Credit(NamedTuple):
    """The outcomes of one routing."""

    routing: Routing
    outcome: Tensor  # (N, k), or (N, E) if dense
    dense: bool


def from_gradients(trace: Trace) -> list[Credit | None]:
    """One bit a slot: did this expert's share lower its token's loss? Nothing for a step without a backward pass."""
    if all(routing.routing_weights.grad is None for _, routing in trace.routings):
        return [None] * len(trace.routings)
    return [Credit(routing, outcome, dense=False) for _, routing, outcome in trace.gradient_outcomes()]


def from_module(trace: Trace, said: Any, outer: Mapping[str, str]) -> list[Credit | None]:
    """What a module's ``outcomes`` returned, for each routing of the step.

    Args:
        trace: the step's routings.
        said: a tensor, for every gate alike; a mapping from names of gates, or of the routers that they live in, to
            tensors; or None.
        outer: every gate's name, or that of its router, by the gate's name; also of gates that the trace does not watch, whose
            outcomes are passed over.

    Raises:
        InvalidArgumentError: no such gate, or a tensor that does not fit the tokens that a gate has routed.
    """
    if said is None:
        return [None] * len(trace.routings)
    if isinstance(said, Mapping):
        known = {**{name: name for name in outer}, **{own: name for name, own in outer.items()}}
        if unknown := [name for name in said if name not in known]:
            raise InvalidArgumentError(f"outcomes must name gates, of {sorted(known)}; got {unknown[0]!r}")
        by_gate = {known[name]: value for name, value in said.items()}
    else:
        by_gate = dict.fromkeys(trace.gates, said)
    found: list[Credit | None] = [None] * len(trace.routings)
    for name, outcome in by_gate.items():
        places = [place for place, (gate, _) in enumerate(trace.routings) if gate == name]
        routings = [trace.routings[place][1] for place in places]
        if outcome is None or not places:
            continue
        for place, credit in zip(places, _of_gate(name, trace.gates[name].num_experts, routings, outcome), strict=True):
            found[place] = credit
    return found


def _of_gate(name: str, num_experts: int, routings: Sequence[Routing], outcome: Any) -> list[Credit]:
    """The outcomes of a gate's calls in a step, from one tensor for them all."""
    outcome = validation.floats(f"outcomes of gate {name!r}", outcome).detach()
    tokens, top_k = sum(len(routing.expert_indices) for routing in routings), routings[0].expert_indices.shape[1]
    width = outcome.shape[-1] if outcome.ndim else 1
    if outcome.numel() == tokens:
        rows, dense = outcome.reshape(tokens, 1).expand(tokens, top_k), False
    elif width in (num_experts, top_k) and outcome.numel() == tokens * width:
        rows, dense = outcome.reshape(tokens, width), width == num_experts
    else:
        raise InvalidArgumentError(
            f"outcomes of gate {name!r} must hold {tokens} values, one a token, or have shape ({tokens}, {top_k}), one a slot, or "
            f"({tokens}, {num_experts}), one an expert; got shape {tuple(outcome.shape)}"
        )
    parts = rows.split([len(routing.expert_indices) for routing in routings])
    return [Credit(routing, part, dense) for routing, part in zip(routings, parts, strict=True)]


def per_expert(credit: Credit | None, rows: Tensor, num_experts: int) -> Tensor:  # (M,) -> (M, E)
    """The outcomes of some of a routing's tokens, a column an expert; NaN for those that did not take part."""
    if credit is None:
        return torch.full((len(rows), num_experts), torch.nan)
    rows = rows.to(credit.outcome.device)
    outcome = credit.outcome[rows].float()
    if credit.dense:
        return outcome
    experts = credit.routing.expert_indices.to(outcome.device)[rows]
    return outcome.new_full((len(rows), num_experts), torch.nan).scatter(1, experts, outcome)


def joined(credits: Sequence[Credit]) -> Credit:
    """A gate's credits of one step as one."""
    if len(credits) == 1:
        return credits[0]
    routing = Routing(*(torch.cat(parts) for parts in zip(*(credit.routing for credit in credits), strict=True)))
    members = [credit.routing.members for credit in credits]
    if all(each is not None for each in members):
        shared = Memberships(*(torch.cat(parts) for parts in zip(*members, strict=True)))
        routing = SharedRouting.of(routing, shared)
    return Credit(routing, torch.cat([credit.outcome for credit in credits]), credits[0].dense)


def nothing(gate: BeliefGate) -> Credit:
    """A credit without tokens, by which a rank takes part in what the others observe."""
    device = gate.posterior.successes.device
    slots, none = torch.empty(0, gate.top_k, device=device), torch.empty(0, device=device)
    routing = Routing(slots.long(), slots, none.long(), slots, none)
    members = getattr(gate, "members", None)
    if members is not None:
        count = members.clusterings * members.neighbours
        empty = torch.empty(0, count, device=device)
        routing = SharedRouting.of(routing, Memberships(empty.long(), empty))
    return Credit(routing, slots, dense=False)
