"""Calibration errors with a gradient, as penalties.

Dimensions: N rows, K classes, B bins.
"""

import torch
from torch import Tensor

from moe_posterior.checks.declared import as_declared
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.losses.arithmetic import root, top_label
from moe_posterior.losses.checks import labelled, require_above, require_at_least


@as_declared
def mmce(
    probs: Tensor,  # (N, K)
    target: Tensor,  # (N,)
    *,
    width: float = 0.4,
    weighted: bool = True,
) -> Tensor:  # ()
    """Maximum mean calibration error: the kernel distance between top-label confidence and correctness.

    The root of Σ_ij e_i e_j exp(−|c_i − c_j| / width). Weighted (MMCE_w, the form that is trained with), e is c / n_wrong for wrong
    rows and (c − 1) / n_right for right ones, so that few wrong rows count as much as many right ones; at perfect
    calibration it vanishes only if half of the rows are right. Unweighted, e = (c − correct) / N, which does vanish there.
    Correctness is held constant. Memory grows with N².

    Args:
        probs: class probabilities.
        target: class indices.
        width: of the Laplacian kernel, in confidence; the paper's default.
        weighted: MMCE_w rather than MMCE.

    Raises:
        InvalidArgumentError: a shape, dtype or value that does not fit, naming the argument.

    Source: Kumar et al. 2018, *Trainable Calibration Measures for Neural Networks from Kernel Mean Embeddings*.

    >>> probs, target = torch.tensor([[0.75, 0.25], [0.75, 0.25]]), torch.tensor([0, 1])
    >>> mmce(probs, target).item(), mmce(probs, target, weighted=False).item()
    (0.5, 0.25)
    """
    require_above("width", width, 0.0)
    return mmce_of(*top_label(*labelled(probs, target)), width, weighted)


@as_declared
def soft_ece(
    probs: Tensor,  # (N, K)
    target: Tensor,  # (N,)
    *,
    n_bins: int = 15,
    temperature: float = 0.01,
    norm: float = 2,
) -> Tensor:  # ()
    """Calibration error over soft bins, (Σ_b mass_b |acc_b − conf_b|^norm)^(1/norm), differentiable in the confidence.

    Row i belongs to the bin with centre m_b by softmax_b(−(c_i − m_b)² / temperature). Correctness is held constant.
    On few rows it is biased upwards, as every binned error is.

    Args:
        probs: class probabilities.
        target: class indices.
        n_bins: equal-width bins on [0, 1]; the convention of the literature.
        temperature: in squared confidence; 0.01 spreads a row over about two bins, and the bins become hard as it goes to 0.
        norm: 1 for the usual ECE; 2, the default, is the one that FGR projects against.

    Raises:
        InvalidArgumentError: a shape, dtype or value that does not fit, naming the argument.

    Source: Karandikar et al. 2021, *Soft Calibration Objectives for Neural Networks*; its use in FGR, arXiv 2606.20544.

    >>> round(soft_ece(torch.tensor([[0.75, 0.25], [0.75, 0.25]]), torch.tensor([0, 1])).item(), 4)
    0.25
    """
    if isinstance(n_bins, bool) or not isinstance(n_bins, int) or n_bins < 1:
        raise InvalidArgumentError(f"n_bins must be an integer of at least 1; got {n_bins!r}")
    require_above("temperature", temperature, 0.0)
    require_at_least("norm", norm, 1.0)
    return soft_ece_of(*top_label(*labelled(probs, target)), n_bins, temperature, norm)


def soft_ece_of(confidence: Tensor, correct: Tensor, n_bins: int, temperature: float, norm: float) -> Tensor:
    centres = (torch.arange(n_bins, dtype=confidence.dtype, device=confidence.device) + 0.5) / n_bins  # (B,)
    membership = (-(confidence[:, None] - centres).square() / temperature).softmax(1)  # (N, B)
    mass = membership.sum(0)
    gap = (membership * (confidence - correct)[:, None]).sum(0) / mass.clamp(min=1e-12)
    return root((mass * gap.abs().pow(norm)).sum() / max(len(confidence), 1), norm)


def mmce_of(confidence: Tensor, correct: Tensor, width: float, weighted: bool) -> Tensor:
    if weighted:
        share = torch.where(correct > 0, correct.sum(), (1 - correct).sum())
    else:
        share = torch.full_like(correct, len(correct))
    residual = (confidence - correct) / share
    kernel = torch.exp(-(confidence[:, None] - confidence).abs() / width)  # (N, N)
    return root((residual[:, None] * residual * kernel).sum(), 2)
