"""Argument checks of the losses: shapes, dtypes and values that do not fit are refused by name."""

import math

import torch
from torch import Tensor

from moe_posterior.checks.validation import described, integers, is_empty_list, real, tensor
from moe_posterior.errors import InvalidArgumentError


def widened(values: Tensor) -> Tensor:
    if values.dtype.itemsize == 1:  # float8, which has no common type with any other
        return values.float()
    return values.to(torch.promote_types(values.dtype, torch.float32))


def labelled(probs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:  # (N, K), (N,) -> (N, K), (N,)
    """Probabilities and labels of any type, as floats of at least 32 bits and as int64."""
    probs = checked(probs)
    return probs, read_indices("target", target, *probs.shape)


def checked(probs: Tensor) -> Tensor:  # (N, K) -> (N, K)
    probs = tensor("probs", probs)
    if not probs.is_floating_point() or probs.ndim != 2 or not probs.shape[1]:
        raise InvalidArgumentError(
            f"probs must be floating point of shape (N, K); got {probs.dtype} of shape {tuple(probs.shape)}"
        )
    require_probabilities("probs", probs)
    return widened(probs)


def checked_experts(expert_probs: Tensor, probs: Tensor) -> Tensor:  # (N, E, K), (N, K) -> (N, E, K)
    expert_probs = tensor("expert_probs", expert_probs)
    experts = expert_probs.shape[1] if expert_probs.ndim == 3 and expert_probs.shape[1] else "E ≥ 1"
    expert_probs = read_floats("expert_probs", expert_probs, (len(probs), experts, probs.shape[1]))
    require_probabilities("expert_probs", expert_probs)
    return widened(expert_probs)


def require_probabilities(name: str, probs: Tensor) -> None:
    """Refuse logits: training on them would run and learn nothing. NaN passes: the loss is NaN, which a gradient scaler skips."""
    margin = max(1e-5, 2 * torch.finfo(probs.dtype).eps)
    probs = widened(probs.detach())
    outside = (probs < -margin) | (probs > 1 + margin)
    if outside.any():
        where = tuple(outside.nonzero()[0].tolist())
        raise InvalidArgumentError(f"{name} must be probabilities in [0, 1]; got {probs[where].item():g} at {where}")


def read_floats(name: str, given: Tensor, shape: tuple[int | str, ...] | torch.Size) -> Tensor:
    found = tensor(name, given)
    if not found.is_floating_point() or tuple(found.shape) != tuple(shape):
        expected = f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
        raise InvalidArgumentError(
            f"{name} must be floating point of shape {expected}; got {found.dtype} of shape {tuple(found.shape)}"
        )
    return found


def read_indices(name: str, indices: Tensor, length: int, size: int) -> Tensor:  # (N,) -> (N,) int64
    found = tensor(name, indices)
    if is_empty_list(indices):
        found = found.to(torch.int64)
    if found.is_floating_point() or found.dtype == torch.bool or tuple(found.shape) != (length,):
        raise InvalidArgumentError(f"{name} must be integer of shape ({length},); got {described(indices)}")
    return integers(name, found, low=0, high=size - 1)


def require_at_least(name: str, value: float, least: float) -> None:
    found = real(value)
    if found is None or not least <= found < math.inf:
        raise InvalidArgumentError(f"{name} must be finite and at least {least:g}; got {described(value)}")


def require_above(name: str, value: float, bound: float) -> None:
    found = real(value)
    if found is None or not bound < found < math.inf:
        raise InvalidArgumentError(f"{name} must be finite and above {bound:g}; got {described(value)}")
