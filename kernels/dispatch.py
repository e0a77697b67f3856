"""One function a task picks the backend that runs it: ``auto`` falls back, an explicit backend that cannot run raises.

Triton runs on CUDA and ROCm devices (NVIDIA from compute capability 8.0), and on CPU tensors where ``TRITON_INTERPRET=1`` was set
before the import, which is how the kernels are tested without a GPU.
"""

import os
from typing import Literal, get_args

import torch
from torch import Tensor

from moe_posterior.errors import InvalidArgumentError, MissingDependencyError
from moe_posterior.kernels import cpu, operators, reference

Backend = Literal["auto", "eager", "triton"]
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BACKENDS = get_args(Backend)
_MAX_TOP_K = 64  # of the full path on Triton: the best so far stay in registers


def assign(hidden: Tensor, centroids: reference.Centroids) -> reference.Assignment:  # (N, D)
    """Nearest centroid and distance, by :mod:`moe_posterior.kernels.cpu` where it applies, else by plain torch."""
    return cpu.assign(hidden, centroids) if cpu.applies(hidden) else reference.assign(hidden, centroids)


def route_by_table(
    hidden: Tensor,  # (N, D)
    centroids: reference.Centroids,
    topk_indices: Tensor,  # (C, k)
    topk_weights: Tensor,  # (C, k)
    topk_scores: Tensor,  # (C, k)
    *,
    backend: Backend = "auto",
) -> tuple[reference.Assignment, reference.Selection, Tensor]:  # weights (N, k)
    """Nearest centroid, then that cluster's row of the tables, by the chosen backend.

    Args:
        backend: ``"auto"`` takes Triton for tensors on a GPU that it runs on, :mod:`moe_posterior.kernels.cpu` for float32
            without gradient on a CPU, else plain torch; ``"eager"`` is plain torch; ``"triton"`` is one launch, see
            :mod:`moe_posterior.kernels.routing` for its precision.

    Raises:
        InvalidArgumentError: the backend is unknown or cannot run here. MissingDependencyError: Triton is not installed.
    """
    if _choose(backend, hidden) == "eager":
        if backend == "auto" and cpu.applies(hidden):
            assignment = cpu.assign(hidden, centroids)
            rows = assignment.cluster_ids
            return assignment, reference.Selection(topk_indices[rows], topk_scores[rows]), topk_weights[rows]
        return reference.route_by_table(hidden, centroids, topk_indices, topk_weights, topk_scores)
    return _named(operators.route_by_table(hidden, *centroids[:4], topk_indices, topk_weights, topk_scores))


def route(
    hidden: Tensor,  # (N, D)
    centroids: reference.Centroids,
    alpha: Tensor,  # (C, E)
    beta: Tensor,  # (C, E)
    *,
    top_k: int,
    risk_aversion: float,
    temperature: float,
    backend: Backend = "auto",
) -> tuple[reference.Assignment, reference.Selection, Tensor]:  # weights (N, k)
    """Nearest centroid, lower confidence bounds of its experts, the k best, their weights, by the chosen backend.

    Args:
        alpha, beta: pseudo-counts; one row more than there are centroids where these have a radius. Triton takes float32: counts
            kept in float64 are to be copied once a change, not once a call.
        top_k, risk_aversion, temperature: as of :class:`~moe_posterior.gates.posterior.PosteriorGate`; Triton takes k ≤ 64.
        backend: as of :func:`route_by_table`.

    Raises:
        InvalidArgumentError: the backend is unknown or cannot run here. MissingDependencyError: Triton is not installed.

    >>> centroids = reference.prepare_centroids(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    >>> alpha, beta = torch.tensor([[9.0, 1.0], [1.0, 9.0]]), torch.tensor([[1.0, 9.0], [9.0, 1.0]])
    >>> _, selection, weights = route(torch.ones(1, 2), centroids, alpha, beta, top_k=1, risk_aversion=1.0, temperature=0.1)
    >>> selection.expert_indices.tolist(), weights.tolist()
    ([[1]], [[1.0]])
    """
    obstacle = _obstacle_to_selection(alpha, beta, top_k)
    if _choose(backend, hidden, obstacle) == "eager":
        return reference.route(
            hidden, centroids, alpha, beta, top_k=top_k, risk_aversion=risk_aversion, temperature=temperature
        )
    return _named(operators.route(hidden, *centroids[:4], alpha, beta, top_k, risk_aversion, temperature))


def _named(outputs: operators.Outputs) -> tuple[reference.Assignment, reference.Selection, Tensor]:
    distance, cluster_ids, experts, weights, scores = outputs
    return reference.Assignment(cluster_ids, distance), reference.Selection(experts, scores), weights


def _choose(backend: Backend, hidden: Tensor, obstacle: str | None = None) -> str:
    if backend not in _BACKENDS:
        raise InvalidArgumentError(f"backend must be one of {list(_BACKENDS)}; got {backend!r}")
    if backend == "eager":
        return "eager"
    obstacle = _obstacle(hidden) or obstacle
    if backend == "auto":
        return "triton" if hidden.is_cuda and operators.TRITON_INSTALLED and obstacle is None else "eager"
    if not operators.TRITON_INSTALLED:
        raise MissingDependencyError("triton", "triton")
    if obstacle is not None:
        raise InvalidArgumentError(f"backend must be 'auto' or 'eager' here: 'triton' needs {obstacle}")
    return "triton"


def _obstacle(hidden: Tensor) -> str | None:
    if hidden.dtype not in _DTYPES:
        return f"hidden of float32, bfloat16 or float16; got {hidden.dtype}"
    if not hidden.is_cuda:
        return None if _INTERPRETED else f"tensors on a GPU; got hidden on {hidden.device}"
    if torch.version.hip is None and torch.cuda.get_device_properties(hidden.device).major < 8:
        return "compute capability 8.0 or newer"
    return None


def _obstacle_to_selection(alpha: Tensor, beta: Tensor, top_k: int) -> str | None:
    if alpha.dtype != torch.float32 or beta.dtype != torch.float32:
        return f"alpha and beta of float32; got {alpha.dtype} and {beta.dtype}"
    return f"top_k of at most {_MAX_TOP_K}; got {top_k}" if top_k > _MAX_TOP_K else None
