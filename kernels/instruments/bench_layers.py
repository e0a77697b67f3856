"""Whole layers on a CPU: against the same experts behind a softmax gate, against transformers' Mixtral block, and in bytes.

Dimensions: B tokens, D hidden size, C clusters, E experts, k experts per token.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_posterior.experts import ExpertsFFN
from moe_posterior.gates import SoftmaxGate
from moe_posterior.kernels.instruments.bench_common import TOP_K, posterior_gate, record
from moe_posterior.layer import MixtureOfExperts, PosteriorMoE

BATCH, HIDDEN, EXPERTS = 2048, 256, 8
TOLERANCE = 1e-4  # between implementations of the same experts, float32


def cases() -> Iterator[dict[str, Any]]:
    """Every case, checked and measured."""
    for backward in (False, True):
        yield layer_case(BATCH, HIDDEN, EXPERTS, backward)
    for implementation in ("eager", "grouped_mm"):
        for backward in (False, True):
            yield mixtral_case(BATCH, HIDDEN, EXPERTS, implementation, backward)
    yield from memory_cases(BATCH, HIDDEN, EXPERTS)
    yield observe_case(2 * BATCH, HIDDEN, EXPERTS)


def layer_case(batch: int, hidden_size: int, experts: int, backward: bool) -> dict[str, Any]:
    """PosteriorMoE against the same experts behind a softmax gate."""
    ours, theirs, hidden = layers(batch, hidden_size, experts)
    clusters = ours.gate.num_clusters
    path = "forward + backward" if backward else "forward"
    steps = _step(ours, hidden, backward), _step(theirs, hidden, backward)
    return record("layer / softmax layer", path, batch, clusters, experts, *steps)


def mixtral_case(batch: int, hidden_size: int, experts: int, implementation: str, backward: bool) -> dict[str, Any]:
    """PosteriorMoE against the Mixtral block of transformers with the same experts; without transformers, a record that says so."""
    ours, softmax, hidden = layers(batch, hidden_size, experts)
    clusters = ours.gate.num_clusters
    case, path = "layer / Mixtral block", f"{implementation}, forward{' + backward' if backward else ''}"
    try:
        block = mixtral_block(softmax, implementation)
    except ImportError:
        sizes = {"batch": batch, "clusters": clusters, "experts": experts}
        return {"case": case, "path": path, **sizes, "ratio": None, "skipped": "transformers is not installed"}
    with torch.no_grad():
        routing = ours.route(hidden)
        theirs = block.experts(hidden, routing.expert_indices, routing.routing_weights)
        for mine, other in ((ours.mix(hidden, routing), theirs), (softmax(hidden), block(hidden[None])[0])):
            if not torch.allclose(mine, other, rtol=TOLERANCE, atol=TOLERANCE):
                raise AssertionError(f"Mixtral's experts ({implementation}) do not compute what ours do")
    steps = _step(ours, hidden, backward), _step(block, hidden[None], backward)
    return record(case, path, batch, clusters, experts, *steps)


def mixtral_block(layer: MixtureOfExperts, implementation: str) -> Any:
    """transformers' block with the experts and the gate of ours; ImportError where transformers is not installed."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    experts, gate = layer.experts, layer.gate
    assert isinstance(experts, ExpertsFFN)
    options: dict[str, Any] = {
        "hidden_size": experts.hidden_size,
        "intermediate_size": experts.intermediate_size,
        "num_local_experts": len(experts),
        "num_experts_per_tok": gate.top_k,
        "experts_implementation": implementation,
    }
    block = MixtralSparseMoeBlock(MixtralConfig(**options))
    with torch.no_grad():
        block.experts.gate_up_proj.copy_(experts.up.transpose(1, 2))
        block.experts.down_proj.copy_(experts.down.transpose(1, 2))
        block.gate.weight.copy_(next(gate.parameters()))
    return block


def memory_cases(batch: int, hidden_size: int, experts: int) -> Iterator[dict[str, Any]]:
    """Bytes of PosteriorMoE and of the softmax layer over a forward and backward: the peak, and what is kept for the backward."""
    ours, theirs, hidden = layers(batch, hidden_size, experts)
    sizes = {"batch": batch, "clusters": ours.gate.num_clusters, "experts": experts}
    for path, measure in (("peak, forward + backward", peak_bytes), ("kept for backward", saved_bytes)):
        mine, other = (measure(layer, hidden) / 2**20 for layer in (ours, theirs))
        found = {"ratio": mine / other, "ours_mib": mine, "other_mib": other}
        yield {"case": "memory / softmax layer", "path": path, **sizes, **found}


def observe_case(batch: int, hidden_size: int, experts: int) -> dict[str, Any]:
    """One observe of a batch as a share of the layer's forward and backward on it."""
    ours, _, hidden = layers(batch, hidden_size, experts)
    routing = ours.route(hidden)
    outcome = torch.bernoulli(torch.full((batch, TOP_K), 0.8), generator=torch.Generator().manual_seed(0))
    clusters = ours.gate.num_clusters
    calls = (lambda: ours.observe(routing, outcome)), _step(ours, hidden, backward=True)
    return record("observe / layer step", "dense counts", batch, clusters, experts, *calls)


def layers(batch: int, hidden_size: int, experts: int) -> tuple[PosteriorMoE, MixtureOfExperts, Tensor]:
    """Both layers over the same experts, and hidden states (B, D)."""
    generator = torch.Generator().manual_seed(0)
    ffn = ExpertsFFN(experts, hidden_size, 2 * hidden_size, generator=generator)
    ours = PosteriorMoE(ffn, hidden_size, num_clusters=4 * experts, top_k=TOP_K)
    gate, hidden = posterior_gate(batch, hidden_size, 4 * experts, experts, generator)
    ours.gate.load_state_dict(gate.state_dict())
    return ours, MixtureOfExperts(ffn, SoftmaxGate(hidden_size, experts, TOP_K)), hidden


def peak_bytes(layer: nn.Module, hidden: Tensor) -> int:
    """The most that tensors made during a forward and backward held at once; what an operator uses inside is not seen."""
    step = _step(layer, hidden, backward=True)
    step()  # allocates what is allocated only once
    layer.zero_grad(set_to_none=True)
    with _Peak() as peak:
        step()
    return peak.bytes


def saved_bytes(layer: nn.Module, hidden: Tensor) -> int:
    """What a forward keeps for its backward, parameters and the input included."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = layer(hidden)  # kept alive until all is counted, so that no address is reused
    del output
    return sum(kept.values())


class _Peak(TorchDispatchMode):
    """Adds up, after every operator, the storages that operators returned and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        self._alive = {key: (ref, size) for key, (ref, size) in self._alive.items() if not ref.expired()}
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given:
                storage = leaf.untyped_storage()
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.bytes = max(self.bytes, sum(size for _, size in self._alive.values()))
        return output


def _step(layer: nn.Module, hidden: Tensor, backward: bool) -> Callable[[], object]:
    def step() -> object:
        if not backward:
            with torch.inference_mode():
                return layer(hidden)
        layer.zero_grad(set_to_none=True)
        return layer(hidden).square().mean().backward()

    return step
