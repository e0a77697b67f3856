"""What a classifier says of a batch, and the views of it that objectives, calibrators and reports take.

Dimensions: N inputs, E experts, K classes, k experts per input, C clusters.
"""

from typing import NamedTuple

from torch import Tensor

from moe_posterior.gates import Routing

__all__ = ["Prediction", "dense_weights"]


class Prediction(NamedTuple):
    """What the classifier says of a batch, and how it came to it."""

    probs: Tensor  # (N, K) of the aggregate
    expert_probs: Tensor  # (N, E, K)
    routing: Routing | None  # None while the gate is not fitted: every expert weighs 1/E then


def dense_weights(prediction: Prediction) -> Tensor:  # (N, E)
    """The weight of every expert, 0 for those that were not chosen; rows sum to 1.

    >>> import torch
    >>> probs = torch.full((2, 3, 4), 0.25)
    >>> dense_weights(Prediction(probs[:, 0], probs, None))[0]
    tensor([0.3333, 0.3333, 0.3333])
    """
    rows, num_experts = prediction.expert_probs.shape[:2]
    if prediction.routing is None:
        return prediction.expert_probs.new_full((rows, num_experts), 1 / num_experts)
    weights = prediction.routing.routing_weights.to(prediction.expert_probs.dtype)
    return weights.new_zeros(rows, num_experts).scatter(1, prediction.routing.expert_indices, weights)
