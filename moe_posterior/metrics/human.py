"""Distance of predictions from the distribution of human labels.

Dimensions: N predictions, K classes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_posterior.checks.declared import as_declared
from moe_posterior.checks.validation import number, tensor
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.metrics.calibration import read_predictions


class HumanDivergence(NamedTuple):
    """Distances from the human label distribution."""

    kl: Tensor  # () or (N,) KL(human‖preds), nats
    brier: Tensor  # () or (N,) Σ_k (p_k − h_k)²


@as_declared
def human_divergence(
    preds: Tensor,  # (N, K)
    human: Tensor,  # (N, K)
    reduction: str = "mean",
    eps: float = 1e-12,
) -> HumanDivergence:
    """KL(human‖preds) and the Brier distance Σ_k (p_k − h_k)², both 0 for predictions that equal the human distribution.

    Args:
        preds: class probabilities.
        human: share of people who gave each label.
        reduction: ``"mean"`` or ``"none"``; the mean of no rows is NaN.
        eps: floor of a predicted probability: a single 0 on a label that someone gave would make the mean infinite.

    Raises:
        InvalidArgumentError: a shape, dtype or value that does not fit, naming the argument.

    Source: Peterson et al. 2019, *Human Uncertainty Makes Classification More Robust* (CIFAR-10H).

    >>> result = human_divergence(torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]]))
    >>> round(result.kl.item(), 4), result.brier.item()
    (0.6931, 0.5)
    """
    preds, human = tensor("preds", preds), tensor("human", human)
    if preds.ndim != 2 or preds.shape != human.shape:
        raise InvalidArgumentError(
            f"preds and human must have one shape (N, K); got {tuple(preds.shape)} and {tuple(human.shape)}"
        )
    if reduction not in ("mean", "none"):
        raise InvalidArgumentError(f"reduction must be 'mean' or 'none'; got {reduction!r}")
    eps = number("eps", eps, above=0.0, below=1.0)
    anything = torch.zeros(len(preds), dtype=torch.int64, device=preds.device)
    preds, _ = read_predictions(preds, anything)
    try:
        human, _ = read_predictions(human, anything)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(str(error).replace("preds", "human", 1)) from None
    preds, human = preds.double(), human.double().clamp(min=0)
    kl = (torch.xlogy(human, human) - human * preds.clamp(eps, 1).log()).sum(1)
    brier = (preds - human).square().sum(1)
    return HumanDivergence(kl.mean(), brier.mean()) if reduction == "mean" else HumanDivergence(kl, brier)
