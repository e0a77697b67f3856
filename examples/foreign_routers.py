"""Swap routers that do not return what transformers' routers do: one like torchtitan's and one like Megatron-Core's.

A router is read and written by an adapter. The two routers below are small stand-ins that return what those libraries' routers do;
with the libraries themselves you only need the adapters and `register_adapter`. They were tried on torchtitan 0.3.0 and on
Megatron-Core 0.16.1, whose router then has the class name TopKRouter.

    python examples/foreign_routers.py        # seconds on one CPU core
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from moe_posterior import record, restore_gates, swap_gates
from moe_posterior.huggingface import Adapter, register_adapter, swapped_gates

DIM, EXPERTS, TOP_K = 16, 8, 2


class Torchtitan(Adapter):
    """torchtitan 0.3: (weights (B, L, k), indices (B, L, k), scores (B, L, E))."""

    logits = 2

    def read(self, router: nn.Module, output: Any) -> tuple[Tensor, Tensor]:
        return output[1].flatten(0, -2), output[0].flatten(0, -2)

    def write(self, router: nn.Module, output: Any, indices: Tensor, weights: Tensor) -> Any:
        return weights.view_as(output[0]), indices.view_as(output[1]), output[2]


class Megatron(Adapter):
    """Megatron-Core: (probabilities (T, E), 0 where not chosen; map of the chosen experts (T, E) bool)."""

    logits = None

    def top_k(self, router: nn.Module) -> int:
        return int(router.topk)

    def hidden(self, args: tuple[Any, ...], kwargs: Any) -> Tensor:
        return args[0] if args else kwargs["input"]

    def read(self, router: nn.Module, output: Any) -> tuple[Tensor, Tensor]:
        probabilities, chosen = output
        indices = (probabilities + chosen).topk(self.top_k(router), dim=-1).indices  # also those of probability 0
        return indices, probabilities.gather(1, indices)

    def write(self, router: nn.Module, output: Any, indices: Tensor, weights: Tensor) -> Any:
        probabilities = torch.zeros_like(output[0]).scatter(1, indices, weights)
        return probabilities, torch.zeros_like(output[1]).scatter(1, indices, True)


class TokenChoiceTopKRouter(nn.Module):
    """As torchtitan's."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.num_experts, self.top_k = nn.Linear(DIM, EXPERTS, bias=False), EXPERTS, TOP_K

    def forward(self, x: Tensor, expert_bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        scores = self.gate(x).float().sigmoid()
        ranked = scores if expert_bias is None else scores + expert_bias
        indices = ranked.topk(self.top_k, dim=-1).indices
        weights = scores.gather(-1, indices)
        return weights / weights.sum(-1, keepdim=True), indices, scores


class Router(ABC, nn.Module):
    """As Megatron-Core's: abstract, with a parameter of its own instead of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.topk = nn.Parameter(torch.randn(EXPERTS, DIM) / DIM**0.5), TOP_K

    @abstractmethod
    def routing(self, logits: Tensor) -> tuple[Tensor, Tensor]: ...

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        return self.routing(torch.mm(input.reshape(-1, DIM), self.weight.t()))


class MegatronTopKRouter(Router):
    def routing(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        values, indices = logits.softmax(-1).topk(self.topk, dim=-1)
        probabilities = torch.zeros_like(logits).scatter(1, indices, values)
        return probabilities, torch.zeros_like(logits, dtype=torch.bool).scatter(1, indices, True)


class Layer(nn.Module):
    """A mixture around either router."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router = router
        self.experts = nn.ModuleList([nn.Linear(DIM, DIM) for _ in range(EXPERTS)])

    def forward(self, hidden: Tensor) -> Tensor:
        first, second, *_ = self.router(hidden)
        dense = (
            first if second.dtype == torch.bool else hidden.new_zeros(len(hidden), EXPERTS).scatter(1, second, first)
        )
        outputs = torch.stack([expert(hidden) for expert in self.experts], dim=1)
        return hidden + (dense[..., None] * outputs).sum(dim=1)


def main() -> None:
    torch.manual_seed(0)
    register_adapter("TokenChoiceTopKRouter", Torchtitan())
    register_adapter("MegatronTopKRouter", Megatron())
    model = nn.Sequential(Layer(TokenChoiceTopKRouter()), Layer(MegatronTopKRouter()))
    hidden = torch.randn(512, DIM)
    before = model(hidden)
    report = swap_gates(model, num_clusters=4)
    print(report)
    print("outputs unchanged by the swap:", torch.equal(model(hidden), before))
    for _, gate in swapped_gates(model):
        gate.fit(hidden)
    with record(model) as trace:
        loss = model(hidden).square().mean()
    loss.backward()
    trace.observe_gradients()
    for name, gate in swapped_gates(model):
        print(f"{name}: {float((gate.posterior.successes + gate.posterior.failures).sum()):.0f} outcomes")
    restore_gates(model)


if __name__ == "__main__":
    main()
