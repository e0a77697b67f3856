"""Routing in plain torch: the definition of correct that every faster backend is held to.

Dimensions: N tokens, D hidden size, C clusters, E experts, k experts per token.

The three steps are *assign* (nearest centroid), *select* (the k highest scores, ties by rule) and *weigh*. Assignment runs in
float32 whatever the input's dtype; scores are computed in the dtype of alpha and beta.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_posterior import beta as beta_functions


class Assignment(NamedTuple):
    """The nearest centroid of every token, and how far it is."""

    cluster_ids: Tensor  # (N,) int64
    distance: Tensor  # (N,) float32, Euclidean


class Selection(NamedTuple):
    """The chosen experts of every token, best first."""

    expert_indices: Tensor  # (N, k) int64
    scores: Tensor  # (N, k)


def half_squared_norms(centroids: Tensor) -> Tensor:  # (C, D) -> (C,)
    """``‖c‖² / 2``: the constant of the nearest-centroid search, worth keeping between calls."""
    return centroids.float().square().sum(dim=-1) / 2


def assign(
    hidden: Tensor,  # (N, D)
    centroids: Tensor,  # (C, D)
    half_norms: Tensor,  # (C,)
) -> Assignment:
    """Nearest centroid of every token: ``argmax_c x·c - ‖c‖²/2``, since ‖x‖² is the same for every c.

    Equal distances go to the lower cluster. A row that holds NaN or inf, or overflows float32, has no nearest centroid: it
    goes to cluster 0 at distance inf, so that its index is valid and it reads as infinitely novel.
    """
    tokens = hidden.float()
    similarity = tokens @ centroids.float().T - half_norms
    best, cluster_ids = similarity.max(dim=-1)
    valid = torch.isfinite(best)
    # ‖x - c‖² = ‖x‖² - 2 (x·c - ‖c‖²/2); rounding can push it below zero next to a centroid.
    squared = (tokens.square().sum(dim=-1) - 2 * best).clamp(min=0)
    distance = torch.where(valid, squared.sqrt(), torch.inf)
    return Assignment(torch.where(valid, cluster_ids, 0), distance)


def select(
    scores: Tensor,  # (N, E)
    cluster_ids: Tensor,  # (N,)
    top_k: int,
) -> Selection:
    """The k highest scores of every row; exact ties go to the lowest ``(e - c) mod E``.

    With no evidence all scores are equal: the rule then spreads clusters over experts (cluster c takes expert c mod E and its
    successors) instead of sending everything to expert 0, deterministically and alike in every backend.
    """
    num_experts = scores.shape[-1]
    offsets = torch.arange(num_experts, device=scores.device)
    experts = (cluster_ids[:, None] + offsets) % num_experts  # column j holds the expert with (e - c) mod E = j
    ordered, ranks = scores.gather(1, experts).sort(dim=-1, descending=True, stable=True)
    return Selection(experts.gather(1, ranks[:, :top_k]), ordered[:, :top_k])


def weigh(scores: Tensor, temperature: float) -> Tensor:  # (N, k) -> (N, k)
    """Routing weights: softmax of ``score / temperature`` over the chosen experts; k = 1 gives exactly 1."""
    return torch.softmax(scores / temperature, dim=-1)


def route(
    hidden: Tensor,  # (N, D)
    centroids: Tensor,  # (C, D)
    alpha: Tensor,  # (C, E)
    beta: Tensor,  # (C, E)
    *,
    top_k: int,
    risk_aversion: float,
    temperature: float,
) -> tuple[Assignment, Selection, Tensor]:  # weights (N, k)
    """The full path in one call: nearest centroid, lower confidence bound, top-k, weights."""
    assignment = assign(hidden, centroids, half_squared_norms(centroids))
    scores = beta_functions.lcb(alpha, beta, risk_aversion)[assignment.cluster_ids]
    selection = select(scores, assignment.cluster_ids, top_k)
    return assignment, selection, weigh(selection.scores, temperature)


def route_by_table(
    hidden: Tensor,  # (N, D)
    centroids: Tensor,  # (C, D)
    half_norms: Tensor,  # (C,)
    topk_indices: Tensor,  # (C, k)
    topk_weights: Tensor,  # (C, k)
    topk_scores: Tensor,  # (C, k)
) -> tuple[Assignment, Selection, Tensor]:  # weights (N, k)
    """The fast path: score, choice and weights depend on the cluster alone, so a token only looks up its cluster's row."""
    assignment = assign(hidden, centroids, half_norms)
    rows = assignment.cluster_ids
    return assignment, Selection(topk_indices[rows], topk_scores[rows]), topk_weights[rows]
