"""Slow, plain answers: a Python loop per token or per outcome, to hold the fast code against."""

import math

import torch
from torch import Tensor, nn

# One named table of tolerances (relative, absolute), by dtype.
TOLERANCE = {torch.float64: (1e-12, 1e-12), torch.float32: (1e-4, 1e-5), torch.bfloat16: (2e-2, 2e-2)}


def assert_close(actual: Tensor, expected: Tensor) -> None:
    rtol, atol = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=rtol, atol=atol)


def nearest_centroid(hidden: Tensor, centroids: Tensor) -> list[tuple[int, float]]:
    """Per token: the first centroid at the smallest distance, and that distance, in float64."""
    answers = []
    for token in hidden.double():
        distances = [float((token - centroid).norm()) for centroid in centroids.double()]
        best = min(range(len(distances)), key=lambda c: distances[c])
        answers.append((best, distances[best]))
    return answers


def best_experts(scores: list[float], cluster: int, top_k: int) -> list[int]:
    """The k experts with the highest scores; ties by the lowest (e - c) mod E."""
    num_experts = len(scores)
    return sorted(range(num_experts), key=lambda e: (-scores[e], (e - cluster) % num_experts))[:top_k]


def softmax(values: list[float], temperature: float) -> list[float]:
    top = max(values)
    powers = [math.exp((value - top) / temperature) for value in values]
    return [power / sum(powers) for power in powers]


def mixture(experts: list[nn.Module], hidden: Tensor, expert_indices: Tensor, routing_weights: Tensor) -> Tensor:
    """One token at a time, one slot at a time."""
    rows = []
    for token, indices, weights in zip(hidden, expert_indices, routing_weights, strict=True):
        slots = [weight * experts[int(index)](token[None])[0] for index, weight in zip(indices, weights, strict=True)]
        rows.append(torch.stack(slots).sum(0))
    return torch.stack(rows)


def counted(
    cluster_ids: list[int], experts: list[list[int]], outcomes: list[list[float]], shape: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Successes and failures, one outcome at a time."""
    successes, failures = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    for cluster, slots, row in zip(cluster_ids, experts, outcomes, strict=True):
        for expert, outcome in zip(slots, row, strict=True):
            if not math.isnan(outcome):
                successes[cluster, expert] += outcome
                failures[cluster, expert] += 1 - outcome
    return successes, failures
