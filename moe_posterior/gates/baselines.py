"""The gates to compare with.

Dimensions: N tokens, D hidden size, E experts, k experts per token.
"""

import torch
from torch import Tensor, nn

from moe_posterior.gates.base import Gate, Routing


class SoftmaxGate(Gate):
    """The standard learned gate: softmax over a linear map, or a small MLP, of the hidden state; the top k renormalised.

    Args:
        hidden_size, num_experts, top_k: D, E, k. ``top_k = num_experts`` is the fully soft mixture.
        router_width: None (default) is one linear map, as in Mixtral; a number is a hidden layer of that many ReLU units, as
            in *Toward Calibrated MoE Under Distribution Shift* (128 there).

    >>> gate = SoftmaxGate(hidden_size=8, num_experts=4, top_k=2)
    >>> routing = gate(torch.ones(3, 8))
    >>> routing.expert_indices.shape, bool(torch.allclose(routing.routing_weights.sum(-1), torch.ones(3)))
    (torch.Size([3, 2]), True)
    """

    def __init__(self, hidden_size: int, num_experts: int, top_k: int = 2, *, router_width: int | None = None) -> None:
        super().__init__(hidden_size, num_experts, top_k)
        self.router: nn.Module
        if router_width is None:
            self.router = nn.Linear(hidden_size, num_experts, bias=False)
        else:
            self.router = nn.Sequential(
                nn.Linear(hidden_size, router_width), nn.ReLU(), nn.Linear(router_width, num_experts)
            )

    def forward(self, hidden: Tensor) -> Routing:  # (N, D)
        """Choose by the largest router probabilities; a row that holds NaN or inf has NaN weights, as in any softmax router."""
        self.validate_hidden(hidden)
        probabilities = torch.softmax(self.router(hidden), dim=-1)
        scores, expert_indices = probabilities.topk(self.top_k, dim=-1)
        cluster_ids = expert_indices.new_zeros(len(hidden))
        distance = torch.zeros(len(hidden), dtype=torch.float32, device=hidden.device)
        return Routing(expert_indices, scores / scores.sum(dim=-1, keepdim=True), cluster_ids, scores, distance)
