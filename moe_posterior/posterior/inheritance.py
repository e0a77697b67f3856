"""The prior of an expert that joins: inherited from those whose domains overlap with its own.

Dimensions: C clusters, E experts.

Source: *Bayesian Posterior Routing in Multi-Agent Systems*, "Dynamic Expert Pool Management".
"""

from collections.abc import Mapping

from torch import Tensor

from moe_posterior.checks import validation
from moe_posterior.checks.soundness import require_sound
from moe_posterior.errors import InvalidArgumentError


def require_donors(prior_from: Mapping[int, float], strength: float, num_experts: int) -> None:
    """Check donors, their weights and the strength of what they hand on.

    Raises:
        InvalidArgumentError: no donor or an unknown one, a weight or strength that is not positive and finite.
    """
    worth = validation.real(strength)
    if not isinstance(prior_from, Mapping) or not prior_from or worth is None or not 0 < worth < float("inf"):
        raise InvalidArgumentError(
            f"prior_from needs donors and a positive, finite strength; got {prior_from}, {strength}"
        )
    for donor, weight in prior_from.items():
        share = validation.real(weight)
        known = validation.is_index(donor, num_experts)
        if not known or share is None or not 0 < share < float("inf"):
            raise InvalidArgumentError(
                f"prior_from must map experts in [0, {num_experts}) to positive, finite weights; got {donor}: {weight}"
            )


def prior_of(
    mean: Tensor, prior_from: Mapping[int, float], strength: float
) -> tuple[Tensor, Tensor]:  # (C, E) -> 2 x (C,)
    """Alpha and beta, worth ``strength`` observations, at the donors' weighted mean competence in each cluster.

    >>> import torch
    >>> mean = torch.tensor([[0.25, 0.75]])
    >>> [part.tolist() for part in prior_of(mean, {0: 1.0, 1: 1.0}, 4.0)]
    [[2.0], [2.0]]
    """
    weights = mean.new_tensor([float(weight) for weight in prior_from.values()])
    inherited = mean[:, [int(donor) for donor in prior_from]] @ (weights / weights.sum())
    alpha, beta = strength * inherited, strength * (1 - inherited)
    require_sound({"alpha": alpha, "beta": beta}, of="inherited ")
    return alpha, beta
