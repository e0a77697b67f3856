"""Routing in plain torch: the definition of correct, against which every faster backend is tested.

Dimensions: N tokens, D hidden size, C clusters, E experts, k experts per token.

The three steps are *assign* (nearest centroid), *select* (the k highest scores, ties by rule) and *weigh*. Assignment runs in
float32 whatever the input's dtype; scores are computed in the dtype of alpha and beta.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_posterior import beta as beta_functions
from moe_posterior.kernels import sampling
from moe_posterior.kernels.ties import by_turn


class Assignment(NamedTuple):
    """The nearest centroid of every token, and how far it is."""

    cluster_ids: Tensor  # (N,) int64
    distance: Tensor  # (N,) float32, Euclidean


class Selection(NamedTuple):
    """The chosen experts of every token, best first."""

    expert_indices: Tensor  # (N, k) int64
    scores: Tensor  # (N, k)


class Levels(NamedTuple):
    """Groups of centroids, so that a token is compared with G group means and M candidates instead of C centroids."""

    directions: Tensor  # (G, D) of the group means, bfloat16 where the processor multiplies it, else float32
    offsets: Tensor  # (G,) float32
    members: Tensor  # (G, M) int64, ascending: the group's own centroids and those nearest to it
    member_directions: Tensor  # (G, M, D)
    member_offsets: Tensor  # (G, M) float32


class Centroids(NamedTuple):
    """Centroids and what is precomputed for the search for the nearest one; see :func:`prepare_centroids`."""

    points: Tensor  # (C, D) float32
    directions: Tensor  # (C, D) float32, points less their mean
    offsets: Tensor  # (C,) float32
    radius: Tensor | None = None  # (C,) float32; a token farther than its centroid's radius belongs to cluster C
    rounded: Tensor | None = None  # (C, D) bfloat16 directions, for the first pass of :mod:`moe_posterior.kernels.cpu`
    reach: Tensor | None = None  # () float32, the longest direction
    levels: Levels | None = None  # if given, a batch on a CPU is assigned by them, approximately


def prepare_centroids(points: Tensor) -> Centroids:  # (C, D)
    """Precompute what depends on the centroids alone and is worth keeping between calls.

    With m the centroids' mean and d = c - m, the nearest centroid maximises ``x·d - (m·d + ‖d‖²/2)``. Against the plain
    ``x·c - ‖c‖²/2`` this costs nothing, and the differences between clusters are not drowned in an offset that they share, such as
    the massive activations of language models.
    """
    exact = points.double()
    mean = exact.mean(dim=0)
    directions = exact - mean
    offsets = directions @ mean + directions.square().sum(dim=-1) / 2
    rounded, reach = round_directions(directions.float())
    return Centroids(points.float(), directions.float(), offsets.float(), rounded=rounded, reach=reach)


def round_directions(directions: Tensor) -> tuple[Tensor, Tensor]:  # (C, D) -> (C, D) bfloat16, ()
    """The directions in bfloat16, and the longest of them: what a choice made in bfloat16 and its error bound need."""
    return directions.bfloat16(), torch.linalg.vector_norm(directions, dim=-1).max()


def assign(hidden: Tensor, centroids: Centroids) -> Assignment:  # (N, D)
    """Nearest centroid of every token and the Euclidean distance to it, in float32 also under autocast.

    Equal distances go to the lower cluster. A row that holds NaN or inf has no nearest centroid: it goes to cluster 0 at distance
    inf, so that its index is valid and it reads as infinitely novel. A finite row too large for float32 arithmetic gets some
    valid cluster and distance inf. If the centroids have a radius, tokens outside it, and rows with NaN or inf, form one more class,
    the outlier class, with index C.
    """
    cluster_ids = nearest(hidden, centroids)
    with torch.autocast(hidden.device.type, enabled=False):
        tokens = hidden.float()
        # From the differences: ‖x‖² - 2 x·c + ‖c‖² would leave only rounding error for data far from the origin.
        distance = torch.linalg.vector_norm(tokens - centroids.points[cluster_ids], dim=-1)
    distance = torch.where(torch.isnan(distance), torch.inf, distance)
    if centroids.radius is not None:
        cluster_ids = torch.where(distance > centroids.radius[cluster_ids], len(centroids.points), cluster_ids)
    return Assignment(cluster_ids, distance)


def nearest(hidden: Tensor, centroids: Centroids) -> Tensor:  # (N, D) -> (N,) int64
    """The clusters of :func:`assign`, when the distance is not needed and there is no radius."""
    with torch.autocast(hidden.device.type, enabled=False):
        similarity = hidden.float() @ centroids.directions.T - centroids.offsets
    best, cluster_ids = similarity.max(dim=-1)
    return torch.where(torch.isfinite(best), cluster_ids, 0)


def select(
    scores: Tensor,  # (N, E)
    cluster_ids: Tensor,  # (N,)
    top_k: int,
) -> Selection:
    """The k highest scores of every row; exact ties go to the lowest ``(e - c) mod E``, see ``ties.py``."""
    experts = by_turn(cluster_ids, scores.shape[-1])
    ordered, ranks = scores.gather(1, experts).sort(dim=-1, descending=True, stable=True)
    return Selection(experts.gather(1, ranks[:, :top_k]), ordered[:, :top_k])


def weigh(scores: Tensor, temperature: float) -> Tensor:  # (N, k) -> (N, k)
    """Routing weights: softmax of ``score / temperature`` over the chosen experts; k = 1 gives exactly 1.

    An infinite score counts as the largest finite number of its sign, so that a row with only removed experts has weights too.
    """
    largest = torch.finfo(scores.dtype).max
    return torch.softmax((scores / temperature).clamp(-largest, largest), dim=-1)


def route(
    hidden: Tensor,  # (N, D)
    centroids: Tensor | Centroids,  # (C, D)
    alpha: Tensor,  # (C, E)
    beta: Tensor,  # (C, E)
    *,
    top_k: int,
    risk_aversion: float,
    temperature: float,
    active: Tensor | None = None,  # (E,) bool
    seed: int | None = None,
) -> tuple[Assignment, Selection, Tensor]:  # weights (N, k)
    """The full path in one call: nearest centroid, lower confidence bounds (with a seed, draws), top-k, weights."""
    prepared = centroids if isinstance(centroids, Centroids) else prepare_centroids(centroids)
    assignment = assign(hidden, prepared)
    rows = assignment.cluster_ids
    if seed is None:
        scores = beta_functions.lcb(alpha, beta, risk_aversion)[rows]
    else:
        scores = sampling.beta_draws(alpha[rows], beta[rows], seed)
    selection = select(without(scores, active), rows, top_k)
    return assignment, selection, weigh(selection.scores, temperature)


def without(scores: Tensor, active: Tensor | None) -> Tensor:  # (N, E), (E,) bool -> (N, E)
    """The scores, -inf for experts that were removed."""
    return scores if active is None else scores.masked_fill(~active, -torch.inf)


def route_prior(
    hidden: Tensor,  # (N, D)
    centroids: Centroids,
    gate_weight: Tensor,  # (E, D)
    evidence_bias: Tensor,  # (C, E)
    *,
    top_k: int,
    gate_bias: Tensor | None = None,  # (E,)
    active: Tensor | None = None,  # (E,) bool
) -> tuple[Assignment, Selection, Tensor]:  # weights (N, k)
    """Prior mode: a learned gate's logits plus the bias of the token's cluster, top-k, softmax over the chosen.

    Logits are float32 also under autocast. A NaN logit, as in a row that holds NaN or inf, counts as -inf.
    """
    assignment = assign(hidden, centroids)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = hidden.float() @ gate_weight.float().T
        if gate_bias is not None:
            logits = logits + gate_bias.float()
        scores = logits + evidence_bias.detach()[assignment.cluster_ids]
    scores = without(torch.where(torch.isnan(scores), -torch.inf, scores), active)
    selection = select(scores, assignment.cluster_ids, top_k)
    return assignment, selection, weigh(selection.scores, 1.0)


def route_by_table(
    hidden: Tensor,  # (N, D)
    centroids: Centroids,
    topk_indices: Tensor,  # (C, k)
    topk_weights: Tensor,  # (C, k)
    topk_scores: Tensor,  # (C, k)
) -> tuple[Assignment, Selection, Tensor]:  # weights (N, k)
    """The fast path: score, choice and weights depend on the cluster alone, so a token only looks up its cluster's row."""
    assignment = assign(hidden, centroids)
    rows = assignment.cluster_ids
    return assignment, Selection(topk_indices[rows], topk_scores[rows]), topk_weights[rows]
