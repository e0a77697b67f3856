"""Nearest centroids on a CPU: a bfloat16 product proposes, a bound certifies, float32 decides where it cannot.

Dimensions: N tokens, D hidden size, C clusters.

The product with the centroids is nearly all of a table gate's cost, and a CPU with bfloat16 instructions does it several times faster
in bfloat16. Its error is bounded: rounding x and d to 8 bits and the sum to 8 bits changes x·d by at most ``3.1 · 2⁻⁹ ‖x‖ ‖d‖``
(Cauchy-Schwarz; the float32 accumulation is in the margin). Where the best similarity leads the second by more than twice that, it is
the best in float32 too; the other tokens are assigned by the reference. So the choice is the reference's, not an approximation.
"""

from functools import lru_cache

import torch
from torch import Tensor

from moe_posterior.kernels import reference
from moe_posterior.kernels.reference import Assignment, Centroids

ROUNDING = 3.1 * 2.0**-9
LEAST_TOKENS = 32  # below, converting the centroids costs what the product saves
LEAST_SIZE = 64  # D: below, there is little to save
BLOCK = 256  # tokens whose offsets from their centroids stay in the cache


@lru_cache(maxsize=1)
def has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware; emulated it is slower than float32."""
    return "bf16" in torch.backends.cpu.get_cpu_capability().lower() or _flag("avx512_bf16") or _flag("amx_bf16")


def _flag(name: str) -> bool:
    try:
        with open("/proc/cpuinfo") as handle:
            return any(line.startswith("flags") and f" {name}" in line for line in handle)
    except OSError:
        return False


def applies(hidden: Tensor) -> bool:  # (N, D)
    """Whether :func:`assign` may stand in: it has no gradient and looks at the data, so no graph can hold it."""
    if torch.compiler.is_compiling() or hidden.device.type != "cpu" or hidden.dtype != torch.float32:
        return False
    if torch.is_grad_enabled() and hidden.requires_grad:
        return False
    return len(hidden) > 0


def assign(hidden: Tensor, centroids: Centroids, *, low_precision: bool | None = None) -> Assignment:  # (N, D) float32
    """As :func:`moe_posterior.kernels.reference.assign`: the same clusters, and distances equal up to rounding.

    Args:
        hidden: float32 on a CPU.
        centroids: prepared.
        low_precision: whether bfloat16 proposes; None (default) where the processor has it and the product is large enough.
    """
    if low_precision is None:
        low_precision = len(hidden) >= LEAST_TOKENS and hidden.shape[1] >= LEAST_SIZE and has_bfloat16()
    if low_precision:
        cluster_ids = _propose_and_check(hidden, centroids)
    else:
        cluster_ids = _exact(hidden, centroids)
    distance = _distance(hidden, centroids.points, cluster_ids)
    if not bool(torch.isfinite(distance).all()):  # a broken row, or one beyond float32: as the reference says
        return reference.assign(hidden, centroids)
    if centroids.radius is not None:
        outside = distance > centroids.radius[cluster_ids]
        cluster_ids = torch.where(outside, len(centroids.points), cluster_ids)
    return Assignment(cluster_ids, distance)


def _exact(hidden: Tensor, centroids: Centroids) -> Tensor:  # (N,)
    return (hidden @ centroids.directions.T - centroids.offsets).max(dim=-1).indices


def _propose_and_check(hidden: Tensor, centroids: Centroids) -> Tensor:  # (N,)
    proposed = hidden.bfloat16() @ centroids.directions.bfloat16().T
    similarity = proposed.float().sub_(centroids.offsets)
    if similarity.shape[1] == 1:
        return similarity.new_zeros(len(similarity), dtype=torch.int64)
    best = similarity.topk(2, dim=-1)
    lengths = torch.linalg.vector_norm(hidden, dim=-1) * torch.linalg.vector_norm(centroids.directions, dim=-1).max()
    # NaN compares false: a row whose product overflowed is uncertain as well.
    certain = best.values[:, 0] - best.values[:, 1] > 2 * ROUNDING * lengths
    cluster_ids = best.indices[:, 0]
    if not bool(certain.all()):
        doubtful = (~certain).nonzero().flatten()
        cluster_ids[doubtful] = _exact(hidden[doubtful], centroids)
    return cluster_ids


def _distance(hidden: Tensor, points: Tensor, cluster_ids: Tensor) -> Tensor:  # (N, D), (C, D), (N,) -> (N,)
    """Directly, block by block: in one piece the offsets would go through memory three times."""
    distance = hidden.new_empty(len(hidden))
    for start in range(0, len(hidden), BLOCK):
        rows = slice(start, start + BLOCK)
        offset = points.index_select(0, cluster_ids[rows]).sub_(hidden[rows])
        torch.linalg.vector_norm(offset, dim=-1, out=distance[rows])
    return distance
