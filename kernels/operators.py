"""The Triton kernels as torch operators: traceable without data, compiled into a full graph, differentiable as the reference is.

Dimensions: N tokens, D hidden size, C clusters, E experts, k experts per token. Gradients flow to the hidden states through the
distance, the one output that varies smoothly with them. Triton loads when an operator first runs.
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
    from moe_posterior.kernels import launch

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
    _launch().route_by_table(hidden, [points, directions, offsets], radius, tables, outputs)
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
    top_k: int,
    risk_aversion: float,
    temperature: float,
) -> Outputs:
    """Nearest centroid, lower confidence bounds, top-k, weights; see :func:`moe_posterior.kernels.dispatch.route`."""
    outputs = empty_outputs(hidden, top_k, torch.int64, torch.float32, torch.float32)
    knobs = (risk_aversion, temperature)
    _launch().route(hidden, [points, directions, offsets], radius, [alpha, beta], outputs, knobs)
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
    top_k: int,
    risk_aversion: float,
    temperature: float,
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
    """The direction away from the centroid; zero where there is none: at the centroid, and for a row that holds NaN or inf."""
    none = (None,) * ctx.num_inputs
    gradient = gradients[0]
    if gradient is None:
        return none
    hidden, points, directions, offsets, nearest, distance = ctx.saved_tensors
    if ctx.has_radius:  # the class of the unlike hides which centroid was nearest
        nearest = reference.assign(hidden, reference.Centroids(points, directions, offsets)).cluster_ids
    away = (hidden.float() - points[nearest]) * (gradient / distance)[:, None]
    smooth = (distance > 0) & torch.isfinite(distance)
    return torch.where(smooth[:, None], away, 0.0).to(hidden.dtype), *none[1:]


route_by_table.register_autograd(_distance_gradient, setup_context=_keep_distance)
route.register_autograd(_distance_gradient, setup_context=_keep_distance)
