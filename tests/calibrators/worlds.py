"""Synthetic streams whose true probabilities are known, and plain measures of them."""

import torch
from torch import Tensor

from moe_posterior.calibrators import Outputs


def draw(
    rows: int,
    seed: int,
    temperature: Tensor | float = 1.0,  # (N,) or one for all
    classes: int = 5,
    spread: float = 2.0,
) -> tuple[Outputs, Tensor]:
    """Rows that are too confident by ``temperature``, with every optional field filled at random, and labels."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    target = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    shown = logits * torch.as_tensor(temperature, dtype=torch.float64).expand(rows)[:, None]
    experts = (shown[:, None] + torch.randn(rows, 3, classes, generator=generator, dtype=torch.float64)).softmax(2)
    outputs = Outputs(
        shown.softmax(1),
        expert_probs=experts,
        routing_weights=torch.rand(rows, 3, generator=generator, dtype=torch.float64),
        configuration=torch.randint(0, 4, (rows,), generator=generator),
        novelty=2 * torch.rand(rows, generator=generator, dtype=torch.float64),
        disagreement=torch.rand(rows, generator=generator, dtype=torch.float64),
        domain=torch.randint(0, 3, (rows,), generator=generator),
    )
    return outputs, target


def ece(probs: Tensor, target: Tensor) -> float:
    """Top-label calibration error in 15 equal-width bins, one bin at a time."""
    confidence, label = probs.double().max(1)
    correct, error = label.eq(target).double(), 0.0
    for low in range(15):
        inside = (confidence * 15).floor().clamp(max=14) == low
        if inside.any():
            error += float((confidence[inside].mean() - correct[inside].mean()).abs() * inside.double().mean())
    return error


def nll(probs: Tensor, target: Tensor) -> float:
    """Mean negative log-likelihood."""
    return float(-probs.double().gather(1, target[:, None]).log().mean())
