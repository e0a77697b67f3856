"""A mixture-of-experts layer: a gate, experts, and the way between them.

Dimensions: N tokens, D hidden size, C clusters, E experts, k experts per token, O output size.
"""

from typing import Any

import torch
from torch import Tensor, nn

from moe_posterior.dispatch import combine, dispatch, run_experts
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.experts import ExpertsFFN
from moe_posterior.gates import Gate, PosteriorGate, Routing


class MixtureOfExperts(nn.Module):
    """Any gate with any experts: ``forward = mix ∘ route``.

    Args:
        experts: an ``nn.ModuleList`` of modules ``(n, D) -> (n, O)`` that accept n = 0, or :class:`ExpertsFFN`.
        gate: the gate that chooses among them; its ``num_experts`` must be their number.

    Raises:
        InvalidArgumentError: there are no experts, or not as many as the gate expects.

    >>> from moe_posterior import SoftmaxGate
    >>> experts = nn.ModuleList([nn.Linear(8, 5) for _ in range(4)])
    >>> moe = MixtureOfExperts(experts, SoftmaxGate(hidden_size=8, num_experts=4, top_k=2))
    >>> moe(torch.ones(2, 3, 8)).shape
    torch.Size([2, 3, 5])
    """

    def __init__(self, experts: nn.ModuleList | ExpertsFFN, gate: Gate) -> None:
        super().__init__()
        if not isinstance(experts, nn.ModuleList | ExpertsFFN):
            raise InvalidArgumentError(f"experts must be an nn.ModuleList or ExpertsFFN; got {type(experts).__name__}")
        if len(experts) != gate.num_experts:
            raise InvalidArgumentError(f"gate expects {gate.num_experts} experts; got {len(experts)}")
        self.experts, self.gate = experts, gate

    def forward(self, hidden: Tensor) -> Tensor:  # (..., D) -> (..., O)
        """Route every token and mix its experts' outputs; any leading dimensions, also empty ones."""
        return self.mix(hidden, self.route(hidden))

    def route(self, hidden: Tensor) -> Routing:  # (..., D)
        """The gate's choice for every token, tokens flattened to N rows."""
        return self.gate(self._flatten(hidden))

    def mix(self, hidden: Tensor, routing: Routing) -> Tensor:  # (..., D) -> (..., O)
        """Run the chosen experts and sum their outputs by routing weight; the routing may come from anywhere."""
        tokens = self._flatten(hidden)
        if len(routing.expert_indices) != len(tokens):
            raise InvalidArgumentError(
                f"routing must cover the {len(tokens)} tokens of hidden; got {len(routing.expert_indices)}"
            )
        order, counts = dispatch(routing.expert_indices, self.gate.num_experts)
        top_k = routing.expert_indices.shape[1]
        rows = tokens[order // top_k]
        if isinstance(self.experts, ExpertsFFN):
            outputs = self.experts(rows, counts)
        else:
            outputs = run_experts(list(self.experts), rows, counts)
        mixed = combine(outputs, order, routing.routing_weights)
        return mixed.reshape(*hidden.shape[:-1], mixed.shape[-1])

    def expert_outputs(self, hidden: Tensor) -> Tensor:  # (..., D) -> (..., E, O)
        """What every expert says of every token, chosen or not: for judging experts one by one."""
        tokens = self._flatten(hidden)
        num_experts = self.gate.num_experts
        if isinstance(self.experts, ExpertsFFN):
            counts = torch.full((num_experts,), len(tokens), device=tokens.device)
            outputs = self.experts(tokens.repeat(num_experts, 1), counts)
            outputs = outputs.reshape(num_experts, len(tokens), outputs.shape[-1])
        else:
            outputs = torch.stack([expert(tokens) for expert in self.experts])
        outputs = outputs.transpose(0, 1)
        return outputs.reshape(*hidden.shape[:-1], *outputs.shape[1:])

    def observe(self, routing: Routing, outcome: Tensor, *, dense: bool | None = None) -> None:  # (N, k) or (N, E)
        """Tell the gate how the experts did; see :meth:`Gate.observe`."""
        self.gate.observe(routing, outcome, dense=dense)

    def _flatten(self, hidden: Tensor) -> Tensor:  # (..., D) -> (N, D)
        if hidden.ndim < 1 or hidden.shape[-1] != self.gate.hidden_size:
            raise InvalidArgumentError(
                f"hidden must have shape (..., {self.gate.hidden_size}); got {tuple(hidden.shape)}"
            )
        return hidden.reshape(-1, self.gate.hidden_size)


class PosteriorMoE(MixtureOfExperts):
    """A mixture of experts behind a :class:`PosteriorGate`.

    Args:
        experts: an ``nn.ModuleList`` of modules ``(n, D) -> (n, O)``, or :class:`ExpertsFFN`.
        hidden_size: D.
        num_clusters: C; more clusters separate competence finer and need more evidence.
        top_k: k experts a token.
        gate_options: everything else :class:`PosteriorGate` takes: ``risk_aversion``, ``score``, ``temperature``, …

    >>> generator = torch.Generator().manual_seed(0)
    >>> hidden = torch.randn(64, 8, generator=generator)
    >>> experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])
    >>> moe = PosteriorMoE(experts, hidden_size=8, num_clusters=4, top_k=2)
    >>> moe.gate.fit(hidden)
    >>> routing = moe.route(hidden)
    >>> moe.observe(routing, torch.ones(64, 2))
    >>> float(moe.gate.posterior.successes.sum())
    128.0
    """

    gate: PosteriorGate

    def __init__(
        self,
        experts: nn.ModuleList | ExpertsFFN,
        hidden_size: int,
        num_clusters: int = 32,
        top_k: int = 2,
        **gate_options: Any,
    ) -> None:
        super().__init__(experts, PosteriorGate(hidden_size, len(experts), num_clusters, top_k, **gate_options))
