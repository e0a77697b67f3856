"""Nearest centroids on a CPU: a bfloat16 product proposes, a bound certifies, float32 decides where it cannot.

Dimensions: N tokens, D hidden size, C clusters, k experts per token.

The product with the centroids is nearly all of a table gate's cost, and a CPU with bfloat16 instructions does it several times faster
in bfloat16. Its error is bounded: rounding x and d to 8 bits and the sum to 8 bits changes x·d by at most ``3.1 · 2⁻⁹ ‖x‖ ‖d‖``
(Cauchy-Schwarz; the float32 accumulation is in the margin). If the best similarity leads the second by more than twice that, it is
the best in float32 too; all other tokens are assigned by the reference. So the result is the reference's, not an approximation.

A single token is assigned in numpy, because one torch call costs more than the arithmetic in it.
"""

import math
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_posterior.kernels import reference
from moe_posterior.kernels.reference import Assignment, Centroids, Levels

ROUNDING = 3.1 * 2.0**-9
LEAST_TOKENS = 32  # below, converting the centroids costs what the product saves
LEAST_SIZE = 64  # D: below, there is little to save
BLOCK = 256  # tokens whose offsets from their centroids stay in the cache


@lru_cache(maxsize=1)
def has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware; emulated, it is slower than float32."""
    return "bf16" in torch.backends.cpu.get_cpu_capability().lower() or _flag("avx512_bf16") or _flag("amx_bf16")


def _flag(name: str) -> bool:
    try:
        with open("/proc/cpuinfo") as handle:
            return any(line.startswith("flags") and f" {name}" in line for line in handle)
    except OSError:
        return False


def applies(hidden: Tensor) -> bool:  # (N, D)
    """Whether :func:`assign` can be used: it has no gradient and branches on the data, so it cannot be part of a graph."""
    if (
        type(hidden) is not Tensor  # a fake tensor, for example, has no values to look at
        or not hidden.is_cpu
        or hidden.dtype is not torch.float32
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
    ):
        return False
    if hidden.requires_grad and torch.is_grad_enabled():
        return False
    return hidden.shape[0] > 0


def assign(hidden: Tensor, centroids: Centroids, *, low_precision: bool | None = None) -> Assignment:  # (N, D) float32
    """As :func:`moe_posterior.kernels.reference.assign`: the same clusters, and distances equal up to rounding.

    If the centroids have levels, a batch is assigned by them: to a valid, near cluster that is not always the nearest.

    Args:
        hidden: float32 on a CPU.
        centroids: prepared.
        low_precision: whether bfloat16 proposes; None (default) where the processor has it and the product is large enough.
    """
    if low_precision is None:
        low_precision = len(hidden) >= LEAST_TOKENS and hidden.shape[1] >= LEAST_SIZE and has_bfloat16()
    if torch.is_autocast_enabled("cpu"):  # it would run the deciding product in bfloat16
        with torch.autocast("cpu", enabled=False):
            return assign(hidden, centroids, low_precision=low_precision)
    if centroids.levels is not None and len(hidden) >= LEAST_TOKENS:
        cluster_ids = _by_levels(hidden, centroids.levels)
    elif low_precision:
        cluster_ids = _propose_and_check(hidden, centroids)
    else:
        cluster_ids = _exact(hidden, centroids)
    distance = _distance(hidden, centroids.points, cluster_ids)
    if not bool(torch.isfinite(distance).all()):  # NaN, inf or too large: left to the reference
        return reference.assign(hidden, centroids)
    if centroids.radius is not None:
        outside = distance > centroids.radius[cluster_ids]
        cluster_ids = torch.where(outside, len(centroids.points), cluster_ids)
    return Assignment(cluster_ids, distance)


class Views:
    """Numpy views of centroids and tables, kept between calls: making them takes as long as a decision.

    Each call compares where the tensors lie, so that no stale view is used: ``.to()``, a load, ``share_memory_`` and handing
    a module to another process all move it. A copied or unpickled owner makes its own views.
    """

    def __init__(self) -> None:
        self._kept: _Kept = ([], (), (), ())

    @np.errstate(over="ignore", invalid="ignore")  # a row that overflows is reported by its distance
    def assign_one(
        self,
        vector: NDArray,  # (D,) float32
        centroids: tuple[
            Tensor, ...
        ],  # points (C, D), directions (C, D), offsets (C,) and, if there is one, radius (C,)
        tables: tuple[Tensor, ...] = (),  # each (C, k)
    ) -> tuple[int, float, tuple[NDArray, ...]]:  # tables as (C, 1, k)
        """Cluster and distance of one token: :func:`moe_posterior.kernels.reference.assign` in numpy, equal up to rounding.

        Shapes and dtypes must stay the same between calls.
        """
        addresses = [*map(_address, centroids), *map(_address, tables)]
        kept, views, rows, _ = self._kept
        if kept != addresses:
            views, rows = tuple(c.numpy() for c in centroids), tuple(table.numpy()[:, None] for table in tables)
            self._kept = (addresses, views, rows, centroids + tables)  # one assignment: threads see the old or the new
        points, directions, offsets, *radius = views
        similarity = directions.dot(vector)
        similarity -= offsets
        cluster = int(similarity.argmax())
        offset = vector - points[cluster]
        squared = offset.dot(offset)
        if squared < math.inf:  # NaN is not
            distance = math.sqrt(squared)
        else:
            distance = math.inf
            cluster = cluster if math.isfinite(similarity[cluster]) else 0
        if radius and distance > radius[0][cluster]:
            cluster = len(points)
        return cluster, distance, rows

    def __reduce__(self) -> tuple[type["Views"], tuple[()]]:
        return Views, ()


_Kept = tuple[list[int], tuple[NDArray, ...], tuple[NDArray, ...], tuple[Tensor, ...]]
_address = Tensor.data_ptr


def _exact(hidden: Tensor, centroids: Centroids) -> Tensor:  # (N,)
    return (hidden @ centroids.directions.T - centroids.offsets).max(dim=-1).indices


def _propose_and_check(hidden: Tensor, centroids: Centroids) -> Tensor:  # (N,)
    rounded, reach = centroids.rounded, centroids.reach
    if rounded is None or reach is None:
        rounded, reach = reference.round_directions(centroids.directions)
    proposed = hidden.bfloat16() @ rounded.T
    similarity = proposed.float().sub_(centroids.offsets)
    if similarity.shape[1] == 1:
        return similarity.new_zeros(len(similarity), dtype=torch.int64)
    best = similarity.topk(2, dim=-1)
    lengths = torch.linalg.vector_norm(hidden, dim=-1) * reach
    # NaN compares false: a row whose product overflowed is uncertain as well.
    certain = best.values[:, 0] - best.values[:, 1] > 2 * ROUNDING * lengths
    cluster_ids = best.indices[:, 0]
    if not bool(certain.all()):
        doubtful = (~certain).nonzero().flatten()
        cluster_ids[doubtful] = _exact(hidden[doubtful], centroids)
    return cluster_ids


def prepare_levels(centroids: Centroids, means: Tensor, groups: Tensor, num_candidates: int) -> Levels:
    """Candidates for every group: its own centroids, then those nearest to its mean, as many for each group.

    Args:
        means: (G, D), of the groups.
        groups: (C,) int64, the group of each centroid; each in 0 … G - 1.
        num_candidates: at least so many for a group; more where a group owns more.
    """
    points = centroids.points
    width = min(len(points), max(num_candidates, int(torch.bincount(groups).max())))
    apart = torch.cdist(means, points)
    apart[groups, torch.arange(len(points), device=points.device)] = -1.0
    members = apart.topk(width, largest=False).indices.sort().values
    coarse = reference.prepare_centroids(means)
    dtype = torch.bfloat16 if has_bfloat16() else torch.float32
    directions = centroids.directions.to(dtype)
    return Levels(coarse.directions.to(dtype), coarse.offsets, members, directions[members], centroids.offsets[members])


def _by_levels(hidden: Tensor, levels: Levels) -> Tensor:  # (N,)
    tokens = hidden.to(levels.directions.dtype)
    groups = (tokens @ levels.directions.T).float().sub_(levels.offsets).argmax(dim=-1)
    order = groups.argsort(stable=True)
    counts = torch.bincount(groups, minlength=len(levels.directions)).tolist()
    found = []
    for group, rows in enumerate(tokens[order].split(counts)):
        if len(rows):
            similarity = (rows @ levels.member_directions[group].T).float().sub_(levels.member_offsets[group])
            found.append(levels.members[group][similarity.argmax(dim=-1)])
    cluster_ids = torch.empty_like(groups)
    cluster_ids[order] = torch.cat(found)
    return cluster_ids


def _distance(hidden: Tensor, points: Tensor, cluster_ids: Tensor) -> Tensor:  # (N, D), (C, D), (N,) -> (N,)
    """From the differences, block by block: in one piece they would pass through memory three times."""
    distance = hidden.new_empty(len(hidden))
    for start in range(0, len(hidden), BLOCK):
        rows = slice(start, start + BLOCK)
        offset = points.index_select(0, cluster_ids[rows]).sub_(hidden[rows])
        torch.linalg.vector_norm(offset, dim=-1, out=distance[rows])
    return distance
