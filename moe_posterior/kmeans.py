"""K-means in torch, on the device of the points: seeding, Lloyd and mini-batch steps, repair of empty clusters, radii.

Dimensions: N points, D coordinates, C clusters.
"""

import math

import torch
from torch import Tensor

from moe_posterior.errors import InvalidArgumentError
from moe_posterior.kernels import cpu, reference

_CHUNK = 16_384  # rows an assignment step handles at a time: bounds memory to chunk x C floats
_RADIUS_QUANTILE = 0.99
_FEW_MEMBERS = 20  # below it a cluster's own 99th percentile says little; the pooled one stands in
_REPAIRS = 100


def _squared_distances(points: Tensor, centre: Tensor) -> Tensor:  # (N, D), (D,) -> (N,)
    """Directly, not by the expanded square: a point that equals the centre must come out as exactly zero."""
    return torch.cat([(chunk - centre).square().sum(dim=1) for chunk in points.split(_CHUNK)])


def seed_centroids(points: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:  # (N, D) -> (C, D)
    """Greedy k-means++: of 2 + log C candidates drawn in proportion to squared distance, keep the one that helps most."""
    candidates = 2 + int(math.log(num_clusters))
    first = int(torch.randint(len(points), (), generator=generator))
    chosen, nearest = [first], _squared_distances(points, points[first])
    while len(chosen) < num_clusters:
        cumulative = nearest.double().cumsum(0).cpu()
        if not cumulative[-1] > 0:
            raise InvalidArgumentError(
                f"hidden must hold at least num_clusters={num_clusters} distinct rows; got {len(chosen)} distinct ones"
            )
        draws = torch.rand(candidates, generator=generator, dtype=torch.float64) * cumulative[-1]
        drawn = torch.searchsorted(cumulative, draws, right=True).clamp(max=len(points) - 1)
        reduced = [torch.minimum(nearest, _squared_distances(points, points[i])) for i in drawn.tolist()]
        best = min(range(candidates), key=lambda j: float(reduced[j].sum(dtype=torch.float64)))
        chosen.append(int(drawn[best]))
        nearest = reduced[best]
    return points[torch.tensor(chosen, device=points.device)].clone()


def _assign(points: Tensor, centroids: Tensor) -> reference.Assignment:
    prepared = reference.prepare_centroids(centroids)
    parts = [reference.assign(chunk, prepared) for chunk in points.split(_CHUNK)]
    return reference.Assignment(torch.cat([p.cluster_ids for p in parts]), torch.cat([p.distance for p in parts]))


@torch.no_grad()
def two_levels(centroids: reference.Centroids) -> reference.Levels:
    """The centroids in groups, on the CPU, the only place where they are used; the same centroids give the same groups."""
    points = centroids.points.cpu()
    num_groups = min(round(math.sqrt(2 * len(points))), len(points.unique(dim=0)))
    means = seed_centroids(points, num_groups, torch.Generator().manual_seed(0))
    means = lloyd(points, means, max_iterations=20, tolerance=0.0)
    groups = _assign(points, means).cluster_ids
    return cpu.prepare_levels(reference.prepare_centroids(points), means, groups, math.ceil(len(points) / 8))


def lloyd(
    points: Tensor, centroids: Tensor, max_iterations: int, tolerance: float
) -> Tensor:  # (N, D), (C, D) -> (C, D)
    """Assign and average until no centroid moves by more than the tolerance; an empty cluster stays where it is."""
    for _ in range(max_iterations):
        ids = _assign(points, centroids).cluster_ids
        counts = torch.bincount(ids, minlength=len(centroids))
        sums = torch.zeros_like(centroids).index_add_(0, ids, points)
        updated = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centroids)
        moved = float((updated - centroids).norm(dim=1).max())
        centroids = updated
        if moved <= tolerance:
            break
    return centroids


def mini_batches(
    points: Tensor,  # (N, D)
    centroids: Tensor,  # (C, D)
    batch_size: int,
    passes: int,
    tolerance: float,
    generator: torch.Generator,
) -> Tensor:  # (C, D)
    """Each centroid is the running mean of the points assigned to it so far."""
    seen = torch.zeros(len(centroids), device=points.device)
    for _ in range(passes):
        before = centroids
        for rows in torch.randperm(len(points), generator=generator).split(batch_size):
            batch = points[rows.to(points.device)]
            ids = _assign(batch, centroids).cluster_ids
            counts = torch.bincount(ids, minlength=len(centroids))
            seen = seen + counts
            offsets = torch.zeros_like(centroids).index_add_(0, ids, batch - centroids[ids])
            centroids = centroids + offsets / seen.clamp(min=1)[:, None]
        if float((centroids - before).norm(dim=1).max()) <= tolerance:
            break
    return centroids


def without_empty_clusters(points: Tensor, centroids: Tensor) -> tuple[Tensor, reference.Assignment]:
    """Move each empty cluster onto the point that is farthest from its own centroid, until none is empty."""
    for _ in range(_REPAIRS):
        assignment = _assign(points, centroids)
        empty = (torch.bincount(assignment.cluster_ids, minlength=len(centroids)) == 0).nonzero().flatten()
        if not len(empty):
            return centroids, assignment
        distance = _squared_to_own(points, centroids, assignment.cluster_ids)
        centroids = centroids.clone()
        for cluster in empty.tolist():
            farthest = int(distance.argmax())
            centroids[cluster] = points[farthest]
            distance = torch.minimum(distance, _squared_distances(points, points[farthest]))
    raise InvalidArgumentError(
        f"hidden must hold at least num_clusters={len(centroids)} rows that float32 can tell apart; "
        f"{len(empty)} clusters stayed empty"
    )


def _squared_to_own(points: Tensor, centroids: Tensor, ids: Tensor) -> Tensor:  # (N, D), (C, D), (N,) -> (N,)
    pairs = zip(points.split(_CHUNK), ids.split(_CHUNK), strict=True)
    return torch.cat([(chunk - centroids[own]).square().sum(dim=1) for chunk, own in pairs])


def radius_of(assignment: reference.Assignment, num_clusters: int) -> Tensor:  # -> (C,)
    """The distance within which 99 % of a cluster's members lie; a small cluster gets that of all points together."""
    pooled = _quantile(assignment.distance)
    members = [assignment.distance[assignment.cluster_ids == c] for c in range(num_clusters)]
    return torch.stack([_quantile(m) if len(m) >= _FEW_MEMBERS else pooled for m in members])


def _quantile(distance: Tensor) -> Tensor:  # (n,) -> ()
    """By a sort: torch.quantile refuses more than 2^24 values."""
    ordered = distance.sort().values
    return ordered[math.ceil(_RADIUS_QUANTILE * len(ordered)) - 1]
