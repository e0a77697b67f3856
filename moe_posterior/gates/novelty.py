"""Tokens unlike anything seen: how much of their cluster's evidence still counts for them.

Dimensions: N tokens, C clusters, E experts.
"""

from typing import Literal

from torch import Tensor

from moe_posterior import beta as beta_functions
from moe_posterior.evidence import novelty_weight
from moe_posterior.kernels.reference import Assignment
from moe_posterior.posterior import BetaPosterior

Novelty = Literal["off", "discount", "class"]


def discounted(
    belief: BetaPosterior,
    assignment: Assignment,  # of N tokens
    radius: Tensor,  # (C,)
    near: tuple[Tensor, Tensor] | None = None,  # 2 x (N, E)
    worth: Tensor | float = 2.0,  # (N, E), or one for all
) -> tuple[Tensor, Tensor]:  # 2 x (N, E)
    """Alpha and beta for each token: a distant one keeps part of its cluster's and takes the rest from the expert's pooled record.

    That record counts as ``worth`` observations, two by default. ``near`` is the belief about the token at home, if that is not simply
    its cluster's row: a mix of several clusters, or a learned prior's.
    """
    alpha, beta = belief.parameters_of()
    ids = assignment.cluster_ids
    weight = novelty_weight(assignment.distance, radius[ids]).to(alpha.dtype)[:, None]
    near = (alpha[ids], beta[ids]) if near is None else near
    pooled = worth * beta_functions.mean(alpha.sum(dim=0), beta.sum(dim=0))  # (E,) or (N, E)
    far = 1 - weight
    return weight * near[0] + far * pooled, weight * near[1] + far * (worth - pooled)
