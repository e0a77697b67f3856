"""When an expert is credibly worse than before, and by how much its logits are lowered: pure functions on counts and beliefs.

Dimensions: C clusters, E experts.
"""

import torch
from torch import Tensor

from moe_posterior import beta as beta_functions
from moe_posterior import evidence as evidence_functions


def evidence_bias(
    alpha: Tensor,  # (C, E)
    beta: Tensor,  # (C, E)
    reference: Tensor,  # (C, E) in (0, 1)
    *,
    penalty: float,
    confidence: float,
    innocent: bool = True,
) -> Tensor:  # (C, E)
    """What a belief adds to a learned gate's logits, ``η · min(0, log((mean + z · std) / reference))``.

    Without ``innocent`` it is ``η · log(mean / reference)``, which also rewards.

    >>> alpha, beta = torch.tensor([[16.0, 2.0]]), torch.tensor([[14.0, 28.0]])
    >>> [round(value, 2) for value in evidence_bias(alpha, beta, torch.full((1, 2), 0.6), penalty=20, confidence=2)[0].tolist()]
    [0.0, -26.91]
    """
    mean = beta_functions.mean(alpha, beta)
    if not innocent:
        return penalty * torch.log(mean / reference)
    upper = mean + confidence * beta_functions.std(alpha, beta)
    return penalty * torch.log(upper / reference).clamp(max=0.0)


def shortfall(
    successes: Tensor,  # (C, E)
    failures: Tensor,  # (C, E)
    reference: Tensor,  # (C, E)
    strength: float,
    confidence: float,
) -> Tensor:  # (E,) in (0, 1]
    """The share of its reference competence that an expert, over all clusters together, may still have reached.

    ``(κ m + Σ s + z · sd) / (κ m + Σ n p)``, at most 1, with p the reference of a cell, m the expert's mean reference, κ the strength
    and sd the standard deviation of Σ s if the reference held. 1 without evidence.

    >>> reference = torch.full((2, 2), 0.8)
    >>> successes, failures = torch.tensor([[80.0, 10.0], [80.0, 0.0]]), torch.tensor([[20.0, 90.0], [20.0, 0.0]])
    >>> [round(share, 3) for share in shortfall(successes, failures, reference, 10.0, 2.0).tolist()]
    [1.0, 0.295]
    """
    total = successes + failures
    start = strength * reference.mean(dim=0)
    doubt = confidence * (total * reference * (1 - reference)).sum(dim=0).sqrt()
    return ((start + successes.sum(dim=0) + doubt) / (start + (total * reference).sum(dim=0))).clamp(max=1.0)


def reference_from(successes: Tensor, failures: Tensor) -> Tensor:  # (C, E), (C, E) -> (C, E) in (0, 1)
    """Competence of every cell from healthy counts, drawn to expert and cluster means where counts are small.

    A cell's expectation is, in log-odds, expert mean + cluster mean − overall mean; it counts as many pseudo-observations as the
    expert's clusters are alike, by moments (:func:`~moe_posterior.evidence.between_cluster_strength`).

    >>> reference_from(torch.zeros(2, 3), torch.zeros(2, 3))[0].tolist()
    [0.5, 0.5, 0.5]
    """
    overall = _log_odds(successes.sum(), failures.sum())
    of_expert, of_cluster = (_log_odds(successes.sum(dim=d), failures.sum(dim=d)) for d in (0, 1))
    expected = torch.sigmoid(of_expert[None, :] + of_cluster[:, None] - overall)
    worth = evidence_functions.between_cluster_strength(successes, failures)
    return (successes + worth * expected) / (successes + failures + worth)


def _log_odds(successes: Tensor, failures: Tensor) -> Tensor:
    """With half an observation added on either side: finite even if nothing, or only one kind, was seen."""
    return torch.log((successes + 0.5) / (failures + 0.5))
