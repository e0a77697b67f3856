"""Proper scores of predicted class probabilities: they reward calibration and sharpness at once.

Dimensions: N predictions, K classes. Computed in float64; ``reduction="none"`` keeps the score of each row, which is
what a bootstrap resamples.
"""

import torch
from torch import Tensor

from moe_posterior.checks.declared import as_declared
from moe_posterior.checks.validation import number
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.metrics.calibration import read_predictions


@as_declared
def brier_score(
    preds: Tensor,  # (N, K) probabilities or (N,) confidences
    target: Tensor,  # (N,)
    reduction: str = "mean",
) -> Tensor:  # () or (N,)
    """Multiclass Brier score Σ_k (p_k − 1[k = y])², in [0, 2]; of confidences (c − r)², in [0, 1], half of the two-class value.

    Args:
        preds: class probabilities ``(N, K)``, or confidences ``(N,)`` of answers whose correctness is known.
        target: class indices; with confidences, 1 for a right and 0 for a wrong answer, or a grade r in [0, 1].
        reduction: ``"mean"`` or ``"none"``; the mean of no rows is NaN.

    Raises:
        InvalidArgumentError: a shape, dtype or value that does not fit, naming the argument.

    Source: Brier 1950, *Verification of Forecasts Expressed in Terms of Probability*.

    >>> brier_score(torch.tensor([[0.75, 0.25]]), torch.tensor([0])).item()
    0.125
    >>> brier_score(torch.tensor([0.75]), torch.tensor([0.5])).item()  # half right
    0.0625
    """
    preds, target = _read(preds, target, reduction)
    preds = preds.double()
    if preds.ndim == 1:
        rows = (preds - target.double()).square()
    else:
        rows = (preds - torch.nn.functional.one_hot(target.long(), preds.shape[1])).square().sum(1)
    return rows.mean() if reduction == "mean" else rows


@as_declared
def negative_log_likelihood(
    preds: Tensor,  # (N, K) probabilities or (N,) confidences
    target: Tensor,  # (N,)
    reduction: str = "mean",
    eps: float = 1e-12,
) -> Tensor:  # () or (N,)
    """Negative log of the probability given to the true class, −log max(p_y, eps), in nats.

    Of confidences it is −r log c − (1 − r) log(1 − c), the same for an r of 0 or 1; for a grade in between the minimum is not 0
    but its own entropy, at c = r.

    Args:
        preds, target: as in :func:`brier_score`.
        reduction: ``"mean"`` or ``"none"``; the mean of no rows is NaN.
        eps: floor of the probability. The default caps a row at 27.6 nats: one underflow to 0 would make the mean
            infinite and hide every other row.

    Raises:
        InvalidArgumentError: a shape, dtype or value that does not fit, naming the argument.

    >>> round(negative_log_likelihood(torch.tensor([[0.75, 0.25]]), torch.tensor([1])).item(), 4)
    1.3863
    """
    preds, target = _read(preds, target, reduction)
    eps = number("eps", eps, above=0.0, below=1.0)
    if preds.ndim == 1:
        right = target.double()
        rows = -right * preds.double().clamp(eps, 1).log() - (1 - right) * (1 - preds.double()).clamp(eps, 1).log()
    else:
        rows = -preds.double().gather(1, target.long()[:, None]).squeeze(1).clamp(eps, 1).log()
    return rows.mean() if reduction == "mean" else rows


def _read(preds: Tensor, target: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    if reduction not in ("mean", "none"):
        raise InvalidArgumentError(f"reduction must be 'mean' or 'none'; got {reduction!r}")
    return read_predictions(preds, target)
