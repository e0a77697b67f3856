"""What the losses refuse: shapes, dtypes and values that do not fit, by argument."""

import math

import torch
from torch import Tensor

from moe_posterior.errors import InvalidArgumentError


def widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def checked(probs: Tensor, target: Tensor | None = None) -> Tensor:  # (N, K), (N,) -> (N, K)
    if not probs.is_floating_point() or probs.ndim != 2 or not probs.shape[1]:
        raise InvalidArgumentError(
            f"probs must be floating point of shape (N, K); got {probs.dtype} of shape {tuple(probs.shape)}"
        )
    require_probabilities("probs", probs)
    if target is not None:
        require_indices("target", target, *probs.shape)
    return widened(probs)


def checked_experts(expert_probs: Tensor, probs: Tensor) -> Tensor:  # (N, E, K), (N, K) -> (N, E, K)
    experts = expert_probs.shape[1] if expert_probs.ndim == 3 and expert_probs.shape[1] else "E ≥ 1"
    require_floats("expert_probs", expert_probs, (len(probs), experts, probs.shape[1]))
    require_probabilities("expert_probs", expert_probs)
    return widened(expert_probs)


def require_probabilities(name: str, probs: Tensor) -> None:
    """Logits would train, to nowhere. NaN passes: the loss is NaN, which a gradient scaler knows how to skip."""
    margin = max(1e-5, 2 * torch.finfo(probs.dtype).eps)
    outside = (probs < -margin) | (probs > 1 + margin)
    if outside.any():
        where = tuple(outside.nonzero()[0].tolist())
        raise InvalidArgumentError(f"{name} must be probabilities in [0, 1]; got {probs[where].item():g} at {where}")


def require_floats(name: str, tensor: Tensor, shape: tuple[int | str, ...] | torch.Size) -> None:
    if not tensor.is_floating_point() or tuple(tensor.shape) != tuple(shape):
        expected = f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
        raise InvalidArgumentError(
            f"{name} must be floating point of shape {expected}; got {tensor.dtype} of shape {tuple(tensor.shape)}"
        )


def require_indices(name: str, indices: Tensor, length: int, size: int) -> None:
    integer = not (indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool)
    if not integer or tuple(indices.shape) != (length,):
        raise InvalidArgumentError(
            f"{name} must be integer of shape ({length},); got {indices.dtype} of shape {tuple(indices.shape)}"
        )
    if length and (int(indices.min()) < 0 or int(indices.max()) >= size):
        raise InvalidArgumentError(
            f"{name} must lie in [0, {size - 1}]; got values from {int(indices.min())} to {int(indices.max())}"
        )


def require_at_least(name: str, value: float, least: float) -> None:
    if not least <= value < math.inf:
        raise InvalidArgumentError(f"{name} must be finite and at least {least:g}; got {value}")


def require_above(name: str, value: float, bound: float) -> None:
    if not bound < value < math.inf:
        raise InvalidArgumentError(f"{name} must be finite and above {bound:g}; got {value}")
