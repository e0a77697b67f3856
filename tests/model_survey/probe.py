"""Handles for checking a swap on any model that turns token ids into tensors: swap it for a while, see what it does, sway it."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from model_survey.tiny import EXPERTS
from moe_posterior.huggingface.gates import HostedPriorGate
from moe_posterior.huggingface.host import SwappedRouter
from moe_posterior.huggingface.swap import Mode, restore_gates, swap_gates, swapped_gates
from moe_posterior.replay.record import Trace, record

CLUSTERS, PADDED = 3, 3


def outputs(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """Every floating tensor that the model returns, caches left out."""
    return floating(model(**batch, use_cache=False).to_tuple())


def objective(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """A loss that every model has: the mean square of its first output, each element weighted differently."""
    first = outputs(model, batch)[0].float()
    return (first.square() * torch.linspace(0.5, 1.5, first.numel()).reshape(first.shape)).mean()


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether two lists hold the same bits, NaN in the same places included."""
    pairs = zip(one, other, strict=True)
    return all(
        a.shape == b.shape and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in pairs
    )


def condemn(gate: Any, expert: int) -> None:
    """Evidence against one expert in every cluster."""
    gate.posterior.failures[:, expert] = 1000.0
    gate.posterior.forget(1.0)  # keeps everything, and refreshes what depends on it


def evidence(gate: Any) -> float:
    """Observations in all cells."""
    return float((gate.posterior.successes + gate.posterior.failures).sum())


def bias_of(model: nn.Module, name: str, expert: int) -> float:
    """What the gate of a router adds to an expert's logit, the same in all clusters."""
    gate = dict(swapped_gates(model))[name]
    assert isinstance(gate, HostedPriorGate)
    return float(gate.evidence_bias[0, expert])


@contextmanager
def swapped(model: nn.Module, mode: Mode = "prior") -> Iterator[None]:
    """Within, the model is swapped and its clusters are fitted, to noise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a type with some layers left alone says so in its row
        swap_gates(model, CLUSTERS, mode, half_life=None)
    for _, gate in swapped_gates(model):
        gate.fit(torch.randn(50, gate.hidden_size, generator=torch.Generator().manual_seed(0)))
    try:
        yield
    finally:
        restore_gates(model)


def choices(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The experts that a swapped model's routers send a batch to with some weight, by router."""
    with record(model) as trace:
        outputs(model, batch)
    return {name.removesuffix(".posterior_gate"): taken(trace, name) for name, _ in trace.routings}


def taken(trace: Trace, name: str) -> Tensor:  # -> (M,)
    """The experts that a gate's tokens went to with some weight."""
    routings = [routing for each, routing in trace.routings if each == name]
    return torch.cat([routing.expert_indices[routing.routing_weights != 0] for routing in routings])


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor | None]:
    """Of the objective, for every parameter."""
    objective(model, batch).backward()
    found = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    return found


def logit_weight(router: nn.Module) -> int:
    """The address of the weight whose product are the router's logits."""
    assert isinstance(router, SwappedRouter)
    width = router.moe_posterior.adapter.width(router)
    return next(p.data_ptr() for p in router.parameters() if p.ndim == 2 and p.shape[0] == width)


@contextmanager
def lowered(penalties: dict[int, tuple[int, float]]) -> Iterator[None]:
    """Within, the products with these weights (by address) have one column lowered."""
    linear = functional.linear

    def lowered(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        product = linear(hidden, weight, bias)
        if weight.data_ptr() not in penalties:
            return product
        expert, penalty = penalties[weight.data_ptr()]
        shift = torch.zeros(product.shape[-1], dtype=product.dtype)
        shift[expert] = penalty
        return product + shift

    functional.linear = lowered  # type: ignore[assignment]
    try:
        yield
    finally:
        functional.linear = linear


def floating(value: Any) -> list[Tensor]:
    """The floating tensors in nested tuples and lists."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, tuple | list):
        return [tensor for part in value for tensor in floating(part)]
    return []


def expert_weights(model: nn.Module, router: str) -> Iterator[tuple[int, Tensor]]:
    """Every expert's own weights beside a router, as (expert, view)."""
    block = model.get_submodule(router)
    if not hasattr(block, "experts"):
        block = model.get_submodule(router.rpartition(".")[0])
    for name, part in block.named_children():
        if name == "experts" and len(list(part.children())) >= EXPERTS:  # one module an expert
            for expert, child in enumerate(part.children()):
                yield from ((expert, parameter) for parameter in child.parameters())
        elif name in ("experts", "input_linear", "output_linear"):
            for parameter in part.parameters():
                if parameter.shape[0] % EXPERTS == 0:
                    yield from enumerate(parameter.unflatten(0, (EXPERTS, -1)))
