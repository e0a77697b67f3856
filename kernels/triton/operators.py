"""The Triton kernels as torch operators: traceable without data, compiled into a full graph, differentiable as the reference is.

Dimensions: N tokens, D hidden size, C clusters, E experts, k experts per token. Gradients flow to the hidden states through the
distance, and in prior mode through the chosen scores and weights to the hidden states and the learned gate. Triton loads when an
operator first runs.
"""

import importlib.util
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from moe_posterior.errors import MissingDependencyError
from moe_posterior.kernels import reference

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # distance, cluster ids (N,); experts, weights, scores (N, k)
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def _launch() -> ModuleType:
    if not TRITON_INSTALLED:
        raise MissingDependencyError("triton", "triton")
    from moe_posterior.kernels.triton import launch

    return launch


@torch.library.custom_op("moe_posterior::route_by_table", mutates_args=())
def route_by_table(
    hidden: Tensor,  # (N, D)
    points: Tensor,  # (C, D)
    directions: Tensor,  # (C, D)
    offsets: Tensor,  # (C,)
    radius: Tensor | None,  # (C,)
    topk_indices: Tensor,  # (C, k)
    topk_weights: Tensor,  # (C, k)
    topk_scores: Tensor,  # (C, k)
) -> Outputs:
    """Nearest centroid, then that cluster's row of the tables; see :func:`moe_posterior.kernels.dispatch.route_by_table`."""
    tables = [topk_indices, topk_weights, topk_scores]
    outputs = empty_outputs(hidden, topk_indices.shape[1], *(table.dtype for table in tables))
    _launch().route_by_table(hidden, (points, directions, offsets, radius), tables, outputs)
    return outputs


@route_by_table.register_fake
def _(
    hidden: Tensor,
    points: Tensor,
    directions: Tensor,
    offsets: Tensor,
    radius: Tensor | None,
    topk_indices: Tensor,
    topk_weights: Tensor,
    topk_scores: Tensor,
) -> Outputs:
    return empty_outputs(hidden, topk_indices.shape[1], topk_indices.dtype, topk_weights.dtype, topk_scores.dtype)


@torch.library.custom_op("moe_posterior::route", mutates_args=())
def route(
    hidden: Tensor,  # (N, D)
    points: Tensor,  # (C, D)
    directions: Tensor,  # (C, D)
    offsets: Tensor,  # (C,)
    radius: Tensor | None,  # (C,)
    alpha: Tensor,  # (C, E)
    beta: Tensor,  # (C, E)
    active: Tensor | None,  # (E,) bool
    top_k: int,
    risk_aversion: float,
    temperature: float,
    seed: int | None,
) -> Outputs:
    """Nearest centroid, lower confidence bounds or draws, top-k, weights; see :func:`moe_posterior.kernels.dispatch.route`."""
    outputs = empty_outputs(hidden, top_k, torch.int64, torch.float32, torch.float32)
    knobs = (risk_aversion, temperature)
    _launch().route(hidden, (points, directions, offsets, radius), [alpha, beta], active, outputs, knobs, seed)
    return outputs


@route.register_fake
def _(
    hidden: Tensor,
    points: Tensor,
    directions: Tensor,
    offsets: Tensor,
    radius: Tensor | None,
    alpha: Tensor,
    beta: Tensor,
    active: Tensor | None,
    top_k: int,
    risk_aversion: float,
    temperature: float,
    seed: int | None,
) -> Outputs:
    return empty_outputs(hidden, top_k, torch.int64, torch.float32, torch.float32)


@torch.library.custom_op("moe_posterior::route_prior", mutates_args=())
def route_prior(
    hidden: Tensor,  # (N, D)
    points: Tensor,  # (C, D)
    directions: Tensor,  # (C, D)
    offsets: Tensor,  # (C,)
    radius: Tensor | None,  # (C,)
    gate_weight: Tensor,  # (E, D)
    gate_bias: Tensor | None,  # (E,)
    evidence_bias: Tensor,  # (C, E)
    active: Tensor | None,  # (E,) bool
    top_k: int,
) -> Outputs:
    """A learned gate's logits plus the bias of the nearest centroid; see :func:`moe_posterior.kernels.dispatch.route_prior`."""
    outputs = empty_outputs(hidden, top_k, torch.int64, torch.float32, torch.float32)
    gate = [gate_weight, gate_bias, evidence_bias, active]
    _launch().route_prior(hidden, (points, directions, offsets, radius), gate, outputs)
    return outputs


@route_prior.register_fake
def _(
    hidden: Tensor,
    points: Tensor,
    directions: Tensor,
    offsets: Tensor,
    radius: Tensor | None,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    evidence_bias: Tensor,
    active: Tensor | None,
    top_k: int,
) -> Outputs:
    return empty_outputs(hidden, top_k, torch.int64, torch.float32, torch.float32)


def empty_outputs(hidden: Tensor, top_k: int, *dtypes: torch.dtype) -> Outputs:
    """What the kernels write to; also their shapes for a trace without data."""
    num_tokens = hidden.shape[0]
    ids = hidden.new_empty(num_tokens, dtype=torch.int64)
    distance = hidden.new_empty(num_tokens, dtype=torch.float32)
    experts, weights, scores = (hidden.new_empty((num_tokens, top_k), dtype=dtype) for dtype in dtypes)
    return distance, ids, experts, weights, scores


def _keep_distance(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    distance, cluster_ids, experts, weights, scores = output
    ctx.mark_non_differentiable(cluster_ids, experts, weights, scores)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4], cluster_ids, distance)
    ctx.has_radius, ctx.num_inputs = inputs[4] is not None, len(inputs)


def _distance_gradient(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    none = (None,) * ctx.num_inputs
    if gradients[0] is None:
        return none
    return _away_from_centroids(ctx.has_radius, gradients[0], *ctx.saved_tensors), *none[1:]


def _away_from_centroids(
    has_radius: bool,
    gradient: Tensor,  # (N,)
    hidden: Tensor,  # (N, D)
    points: Tensor,  # (C, D)
    directions: Tensor,  # (C, D)
    offsets: Tensor,  # (C,)
    nearest: Tensor,  # (N,)
    distance: Tensor,  # (N,)
) -> Tensor:  # (N, D)
    """The direction away from the centroid; zero where there is none: at the centroid, and for a row that holds NaN or inf."""
    if has_radius:  # the outlier class hides which centroid was nearest
        nearest = reference.assign(hidden, reference.Centroids(points, directions, offsets)).cluster_ids
    away = (hidden.float() - points[nearest]) * (gradient / distance)[:, None]
    smooth = (distance > 0) & torch.isfinite(distance)
    return torch.where(smooth[:, None], away, 0.0).to(hidden.dtype)


def _keep_choice(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    distance, cluster_ids, experts, weights, scores = output
    ctx.mark_non_differentiable(cluster_ids, experts)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4], cluster_ids, distance, inputs[5], experts, weights, scores)
    ctx.has_radius, ctx.bias_dtype = inputs[4] is not None, None if inputs[6] is None else inputs[6].dtype


def _prior_gradient(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of the distance as above, and of weights and scores to tokens and gate, over the chosen experts only."""
    *of_distance, gate_weight, experts, weights, scores = ctx.saved_tensors
    hidden = of_distance[0]
    to_distance, _, _, to_weights, to_scores = gradients
    to_hidden = to_gate = to_bias = None
    if to_distance is not None:
        to_hidden = _away_from_centroids(ctx.has_radius, to_distance, *of_distance)
    if to_weights is not None or to_scores is not None:
        chosen = torch.zeros_like(scores) if to_scores is None else to_scores
        if to_weights is not None:
            chosen = chosen + weights * (to_weights - (weights * to_weights).sum(dim=-1, keepdim=True))
        chosen = torch.where(torch.isfinite(scores), chosen, 0.0)
        slopes = chosen.new_zeros(len(hidden), len(gate_weight)).scatter_(1, experts, chosen)  # (N, E)
        through_gate = (slopes @ gate_weight.float()).to(hidden.dtype)
        to_hidden = through_gate if to_hidden is None else to_hidden + through_gate
        to_gate = (slopes.T @ hidden.float()).to(gate_weight.dtype)
        to_bias = None if ctx.bias_dtype is None else slopes.sum(dim=0).to(ctx.bias_dtype)
    return to_hidden, None, None, None, None, to_gate, to_bias, None, None, None


route_by_table.register_autograd(_distance_gradient, setup_context=_keep_distance)
route.register_autograd(_distance_gradient, setup_context=_keep_distance)
route_prior.register_autograd(_prior_gradient, setup_context=_keep_choice)
