"""What a classifier says of a batch, and the views of it that objectives, calibrators and reports take.

Dimensions: N inputs, E experts, K classes, k experts per input, C clusters.
"""

from typing import NamedTuple

from torch import Tensor

from moe_posterior.gates import Gate, PosteriorGate, Routing

__all__ = ["Prediction", "configurations", "dense_weights", "num_configurations"]


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


def configurations(routing: Routing, gate: Gate) -> Tensor:  # (N,) int64 in [0, num_configurations(gate))
    """The routing configuration of every input.

    A posterior gate chooses by the cluster alone, so the cluster is the configuration. Without clusters it is the pair of the two
    experts that weigh most, in order: with a soft gate the finite part of an infinite configuration.
    """
    if isinstance(gate, PosteriorGate):
        return routing.cluster_ids
    second = routing.expert_indices[:, 1] if gate.top_k > 1 else routing.expert_indices[:, 0]
    return routing.expert_indices[:, 0] * gate.num_experts + second


def num_configurations(gate: Gate) -> int:
    """How many configurations there can be: the clusters, or the ordered pairs of experts."""
    return gate.num_clusters if isinstance(gate, PosteriorGate) else gate.num_experts**2
