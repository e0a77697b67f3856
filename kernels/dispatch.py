"""One function per task, which picks the backend: ``auto`` falls back, an explicit backend that cannot run raises.

Triton runs on CUDA and ROCm devices (NVIDIA from compute capability 8.0), and on CPU tensors where ``TRITON_INTERPRET=1`` was set
before the import, which is how the kernels are tested without a GPU.
"""

import os
from typing import Literal, get_args

import torch
from torch import Tensor

from moe_posterior.errors import InvalidArgumentError, MissingDependencyError
from moe_posterior.kernels import cpu, reference
from moe_posterior.kernels.triton import operators

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
            :mod:`moe_posterior.kernels.triton.routing` for its precision.

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
    active: Tensor | None = None,  # (E,) bool
    seed: int | None = None,
    backend: Backend = "auto",
) -> tuple[reference.Assignment, reference.Selection, Tensor]:  # weights (N, k)
    """Nearest centroid, lower confidence bounds of its experts, the k best, their weights, by the chosen backend.

    Args:
        alpha, beta: pseudo-counts; one row more than there are centroids where these have a radius. Triton takes float32: copy
            float64 counts once per change, not once per call.
        top_k, risk_aversion, temperature: as in :class:`~moe_posterior.gates.posterior.PosteriorGate`; Triton takes k ≤ 64.
        active: experts that may be chosen; the others score -inf and come last. None (default): all.
        seed: None (default) ranks by lower confidence bounds; a number ≥ 0 ranks by one draw from each expert's posterior instead. It
            depends on (seed, position of the token in the batch, expert) only. See :mod:`moe_posterior.kernels.sampling`.
        backend: as in :func:`route_by_table`.

    Raises:
        InvalidArgumentError: the backend is unknown or cannot run here; a seed below 0 or beyond 63 bits.
        MissingDependencyError: Triton is not installed.

    >>> centroids = reference.prepare_centroids(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    >>> alpha, beta = torch.tensor([[9.0, 1.0], [1.0, 9.0]]), torch.tensor([[1.0, 9.0], [9.0, 1.0]])
    >>> _, selection, weights = route(torch.ones(1, 2), centroids, alpha, beta, top_k=1, risk_aversion=1.0, temperature=0.1)
    >>> selection.expert_indices.tolist(), weights.tolist()
    ([[1]], [[1.0]])
    """
    if seed is not None and not 0 <= seed < 2**63:
        raise InvalidArgumentError(f"seed must lie in [0, 2^63) or be None; got {seed}")
    obstacle = _obstacle_to_selection(top_k, alpha=alpha, beta=beta)
    if _choose(backend, hidden, obstacle) == "eager":
        knobs: dict[str, float] = {"risk_aversion": risk_aversion, "temperature": temperature}
        return reference.route(hidden, centroids, alpha, beta, top_k=top_k, active=active, seed=seed, **knobs)
    return _named(operators.route(hidden, *centroids[:4], alpha, beta, active, top_k, risk_aversion, temperature, seed))


def route_prior(
    hidden: Tensor,  # (N, D)
    centroids: reference.Centroids,
    gate_weight: Tensor,  # (E, D)
    evidence_bias: Tensor,  # (C, E)
    *,
    top_k: int,
    gate_bias: Tensor | None = None,  # (E,)
    active: Tensor | None = None,  # (E,) bool
    backend: Backend = "auto",
) -> tuple[reference.Assignment, reference.Selection, Tensor]:  # weights (N, k)
    """Nearest centroid, a learned gate's logits plus that cluster's bias, the k best, softmax over them, by the chosen backend.

    Ties, rows with NaN or inf and the outlier class are as in :func:`route`; a NaN logit counts as -inf. Gradients flow through
    scores and weights to ``hidden``, ``gate_weight`` and ``gate_bias``, and through the distance to ``hidden``.

    Args:
        gate_weight, gate_bias: of the learned gate; Triton takes a weight of the dtype of ``hidden``.
        evidence_bias: float32, one row more than there are centroids where these have a radius; 0 changes nothing. Gets no
            gradient.
        top_k: k; Triton takes k ≤ 64.
        active: experts that may be chosen; the others score -inf and come last. None (default): all.
        backend: as in :func:`route_by_table`.

    Raises:
        InvalidArgumentError: the backend is unknown or cannot run here. MissingDependencyError: Triton is not installed.

    >>> centroids = reference.prepare_centroids(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    >>> gate, bias = torch.eye(3, 2), torch.tensor([[0.0, 0.0, 0.0], [0.0, -9.0, 0.0]])
    >>> _, selection, _ = route_prior(torch.ones(1, 2), centroids, gate, bias, top_k=2)  # logits 1, 1, 0
    >>> selection.expert_indices.tolist(), selection.scores.tolist()
    ([[0, 2]], [[1.0, 0.0]])
    """
    obstacle = _obstacle_to_selection(top_k, evidence_bias=evidence_bias)
    if gate_weight.dtype != hidden.dtype:
        obstacle = obstacle or f"gate_weight of {hidden.dtype}, as hidden; got {gate_weight.dtype}"
    if _choose(backend, hidden, obstacle) == "eager":
        gate = {"gate_bias": gate_bias, "active": active}
        return reference.route_prior(hidden, centroids, gate_weight, evidence_bias, top_k=top_k, **gate)
    return _named(operators.route_prior(hidden, *centroids[:4], gate_weight, gate_bias, evidence_bias, active, top_k))


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


def _obstacle_to_selection(top_k: int, **beliefs: Tensor) -> str | None:
    if any(belief.dtype != torch.float32 for belief in beliefs.values()):
        return f"{' and '.join(beliefs)} of float32; got {' and '.join(str(b.dtype) for b in beliefs.values())}"
    return f"top_k of at most {_MAX_TOP_K}; got {top_k}" if top_k > _MAX_TOP_K else None
