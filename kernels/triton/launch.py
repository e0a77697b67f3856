"""How the Triton kernels are launched: tile sizes, precision, outputs.

Dimensions: N tokens, D hidden size, C clusters, E experts, k experts per token.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from moe_posterior.kernels.triton import routing

Prepared = tuple[Tensor, Tensor, Tensor, Tensor | None]  # points (C, D), directions (C, D), offsets (C,), radius (C,)
INTERPRETED = not isinstance(routing.assign_and_gather, triton.JITFunction)
_PROGRAMS = 128  # about one per multiprocessor; for small batches each program takes fewer tokens


def tiles(num_tokens: int, num_clusters: int, dtype: torch.dtype, *, amd: bool, prior: bool = False) -> dict[str, int]:
    """Block sizes, warps and stages; fixed rather than tuned, so that what runs is what was checked not to spill.

    Up to 256 clusters are one tile, so that a token is read once; with 256, a program has registers for 32 tokens. Beyond 256, a
    token is read once for every 128 clusters, and more tokens should share each read of the centroids. In prior mode 64 float32
    tokens would spill on sm_90.
    """
    block_n = max(16, min(64, triton.next_power_of_2(triton.cdiv(num_tokens, _PROGRAMS))))
    block_c = 16 if num_clusters <= 16 else 64 if num_clusters <= 64 else 128
    if 128 < num_clusters <= 256:
        block_c, block_n = 256, min(block_n, 32)
    if prior and dtype == torch.float32:
        block_n = min(block_n, 32)
    return {
        "BLOCK_N": block_n,
        "BLOCK_C": block_c,
        "BLOCK_D": 32 if dtype == torch.bfloat16 and block_c != 128 else 16,
        "num_warps": 8,
        "num_stages": 2,
    }


def precision(dtype: torch.dtype, *, amd: bool) -> str:
    """The kernels' ``DOT``, see :mod:`moe_posterior.kernels.triton.routing`."""
    if dtype == torch.bfloat16:
        return "emulated" if INTERPRETED else "split"
    return "ieee" if amd or INTERPRETED else "tf32x3"


def compiler_options(*, amd: bool) -> dict[str, bool | int]:
    """Scores are rounded operation by operation, as torch does; NVIDIA's compiler spills for occupancy unless given all registers."""
    return {"enable_fp_fusion": False} | ({} if amd or INTERPRETED else {"maxnreg": 255})


def table_tile(top_k: int) -> dict[str, int]:
    """A whole row of the tables where k is small."""
    return {"K": top_k, "BLOCK_K": min(16, triton.next_power_of_2(top_k))}


def expert_tile(top_k: int, num_experts: int, *, draws: bool = False) -> dict[str, int]:
    """A whole row of 1024 experts would not fit the registers; nor would 64 experts with what a draw needs."""
    return {
        "K": top_k,
        "BLOCK_K": triton.next_power_of_2(top_k),
        "BLOCK_E": max(16, min(32 if draws else 64, triton.next_power_of_2(num_experts))),
    }


def route_by_table(
    hidden: Tensor,  # (N, D)
    centroids: Prepared,
    tables: list[Tensor],  # experts, weights, scores (C, k)
    outputs: tuple[Tensor, ...],
) -> None:
    """Kernel 1; writes distance, cluster ids (N,), and experts, weights, scores (N, k) into ``outputs``."""
    constants = table_tile(tables[0].shape[1])
    _run(routing.assign_and_gather, hidden, centroids, tables, outputs, (), (), constants)


def route(
    hidden: Tensor,  # (N, D)
    centroids: Prepared,
    belief: list[Tensor],  # alpha, beta (C, E)
    active: Tensor | None,  # (E,) bool
    outputs: tuple[Tensor, ...],
    knobs: tuple[float, float],  # risk aversion, temperature
    seed: int | None,
) -> None:
    """Kernel 2; ``outputs`` as those of kernel 1."""
    num_experts = belief[0].shape[1]
    constants = expert_tile(outputs[2].shape[1], num_experts, draws=seed is not None)
    constants |= {"HAS_ACTIVE": active is not None, "DRAWS": seed is not None}
    inputs, numbers = [*belief, active], (*knobs, seed or 0)
    _run(routing.assign_and_select, hidden, centroids, inputs, outputs, numbers, (num_experts,), constants)


def route_prior(
    hidden: Tensor,  # (N, D)
    centroids: Prepared,
    gate: list[Tensor | None],  # weight (E, D), bias (E,), evidence bias (C, E), active (E,) bool
    outputs: tuple[Tensor, ...],
) -> None:
    """Kernel 3; ``outputs`` as those of kernel 1."""
    _, bias, evidence, active = gate
    assert evidence is not None
    num_experts = evidence.shape[1]
    constants = expert_tile(outputs[2].shape[1], num_experts)
    constants |= {"HAS_ACTIVE": active is not None, "HAS_BIAS": bias is not None}
    _run(routing.assign_and_add, hidden, centroids, gate, outputs, (), (num_experts,), constants)


def _run(
    kernel: Any,
    hidden: Tensor,
    centroids: Prepared,
    inputs: Sequence[Tensor | None],
    outputs: tuple[Tensor, ...],
    knobs: tuple[float, ...],
    sizes: tuple[int, ...],
    constants: dict[str, int],
) -> None:
    num_tokens, hidden_size = hidden.shape
    if not num_tokens:
        return
    num_clusters = len(centroids[0])
    amd = torch.version.hip is not None
    prior = kernel is routing.assign_and_add
    options = tiles(num_tokens, num_clusters, hidden.dtype, amd=amd, prior=prior)
    # An argument that is not given is never read, but its place in the signature needs some tensor.
    given = [hidden if tensor is None else tensor.contiguous() for tensor in (*centroids, *inputs)]
    rows = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    with torch.cuda.device_of(hidden):  # a launch goes to the current device
        kernel[(triton.cdiv(num_tokens, options["BLOCK_N"]),)](
            rows,
            *given,
            *outputs,
            *knobs,
            num_tokens,
            num_clusters,
            hidden_size,
            *sizes,
            rows.stride(0),
            **constants,
            **options,
            HAS_RADIUS=centroids[3] is not None,
            DOT=precision(hidden.dtype, amd=amd),
            **compiler_options(amd=amd),
        )
