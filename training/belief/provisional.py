"""Clusters for a gate that must route before it can be fitted."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moe_posterior.gates import BeliefGate

__all__ = ["fit_provisionally", "starting_rows"]

MOST_ROWS = 2048
JITTER = 1e-3  # in standard deviations of the batch


def fit_provisionally(gate: BeliefGate, generator: torch.Generator) -> RemovableHandle:
    """Fit the gate to the first batch that reaches it, unless it has clusters by then; returns how to call that off.

    Under torch.distributed this fit is a collective call, so the first batch must reach the gate on every rank.
    """

    def fit(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not gate.fitted:
            hidden = args[0] if args else kwargs["hidden"]
            gate.fit(starting_rows(hidden, gate.clusterer.num_clusters, generator), generator=generator)

    return gate.register_forward_pre_hook(fit, with_kwargs=True)


@torch.no_grad()
def starting_rows(hidden: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:  # (N, D) -> (n, D)
    """At least ``2 · num_clusters`` distinct finite rows, which are those of ``hidden`` but for a jitter far below their spread.

    >>> rows = starting_rows(torch.zeros(3, 4), 5, torch.Generator().manual_seed(0))
    >>> rows.shape, len(rows.unique(dim=0))
    (torch.Size([10, 4]), 10)
    """
    rows = hidden.detach().float()
    rows = rows[torch.isfinite(rows).all(dim=1)]
    count = max(2 * num_clusters, min(len(rows), MOST_ROWS))
    if not len(rows):
        return torch.randn(count, hidden.shape[1], generator=generator).to(hidden.device)
    places = torch.arange(count) * max(1, len(rows) // count) % len(rows)
    scale = rows.std(correction=0)
    scale = torch.where(scale > 0, scale, 1.0)
    noise = torch.randn(count, hidden.shape[1], generator=generator).to(rows)
    return rows[places.to(rows.device)] + JITTER * scale * noise
