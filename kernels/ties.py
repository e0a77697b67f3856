"""Tie-breaking: of experts with equal scores, the one with the lowest turn ``(e - c) mod E`` comes first, for a token of cluster c.

Without evidence all scores are equal. The rule then spreads clusters over experts (cluster c takes expert c mod E and its successors)
instead of sending everything to expert 0, deterministically and identically in every backend. The Triton kernels pack the turn into
their sort key (``triton/routing.py``); everything else goes by this function.

Dimensions: N tokens, E experts.
"""

import torch
from torch import Tensor


def by_turn(cluster_ids: Tensor, num_experts: int) -> Tensor:  # (N,) -> (N, E) int64
    """Each token's experts in the order of their turns, so that a stable sort of their scores keeps equal scores in that order.

    >>> by_turn(torch.tensor([0, 2]), num_experts=3)
    tensor([[0, 1, 2],
            [2, 0, 1]])
    """
    return (cluster_ids[:, None] + torch.arange(num_experts, device=cluster_ids.device)) % num_experts
