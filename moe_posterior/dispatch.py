"""Send tokens to their experts and mix what comes back.

Dimensions: N tokens, D hidden size, E experts, k experts per token, O output size.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import einsum
from torch import Tensor, nn


class Dispatch(NamedTuple):
    """The N·k (token, slot) pairs sorted by expert, slots of one expert in token order."""

    order: Tensor  # (N k,) int64: pair at each sorted place; pair // k is its token
    counts: Tensor  # (E,) int64: pairs of each expert


def dispatch(expert_indices: Tensor, num_experts: int) -> Dispatch:  # (N, k)
    """Group the (token, slot) pairs by expert.

    >>> dispatch(torch.tensor([[1, 0], [1, 2]]), num_experts=3)
    Dispatch(order=tensor([1, 0, 2, 3]), counts=tensor([1, 2, 1]))
    """
    flat = expert_indices.reshape(-1)
    # No bincount: it breaks a compiled graph and synchronises with the accelerator to learn its size.
    counts = flat.new_zeros(num_experts).scatter_add_(0, flat, torch.ones_like(flat))
    return Dispatch(flat.argsort(stable=True), counts)


def split_by_expert(rows: Tensor, counts: Tensor) -> Sequence[Tensor]:  # (N k, D), (E,) -> E of (n_e, D)
    """Each expert's rows. In a compiled or exported graph the sizes are symbols, so that one graph does for all of them."""
    if not torch.compiler.is_compiling():
        return rows.split(counts.tolist())
    with torch._dynamo.patch_dynamo_config(capture_scalar_outputs=True):  # else reading the counts breaks the graph
        sizes = counts.tolist()
    for size in sizes:
        torch._check(size >= 0)
        torch._check(size <= rows.shape[0])
    return rows.split(sizes)


def run_experts(
    experts: Sequence[nn.Module],
    tokens: Tensor,  # (N k, D) sorted by expert
    counts: Tensor,  # (E,)
) -> Tensor:  # (N k, O)
    """Each expert on its own rows.

    In training, experts without rows run on an empty batch: their parameters then get a zero gradient instead of none, which
    distributed training requires. So they do in a compiled graph, which cannot know who has rows.
    """
    outputs = []
    always = torch.compiler.is_compiling() or any(expert.training for expert in experts)
    for expert, rows in zip(experts, split_by_expert(tokens, counts), strict=True):
        if always or rows.shape[0]:
            outputs.append(expert(rows))
    return torch.cat(outputs) if outputs else experts[0](tokens)


def combine(
    outputs: Tensor,  # (N k, O) sorted by expert
    order: Tensor,  # (N k,)
    routing_weights: Tensor,  # (N, k)
) -> Tensor:  # (N, O)
    """Weighted sum of each token's expert outputs, slots added in order: the same bits on every run and device.

    Rows go back to their slots by a gather rather than an atomic scatter-add.
    """
    num_tokens, top_k = routing_weights.shape
    place = torch.empty_like(order)
    place[order] = torch.arange(order.shape[0], device=order.device)
    slots = outputs[place].reshape(num_tokens, top_k, outputs.shape[-1])
    return einsum(routing_weights.to(slots.dtype), slots, "n k, n k o -> n o")
