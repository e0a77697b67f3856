"""Random exploration: which tokens go to an expert that was not chosen, and to which one.

Dimensions: N tokens, E experts, k experts per token. Every draw comes from a generator that (seed, step, purpose) determine.
"""

from typing import Literal

import torch
from torch import Tensor

from moe_posterior.gates.base import refuse_export


def generator_for(
    device: torch.device, seed: int, step: Tensor, purpose: Literal["route", "shadow"]
) -> torch.Generator:
    """The draws of one step: the same again for a forward that is run twice, others for :meth:`PosteriorGate.shadow`.

    Raises:
        InvalidArgumentError: the gate is being exported.
    """
    refuse_export()
    stream = 2 * (seed * 1_000_003 + int(step)) + (purpose == "shadow")
    return torch.Generator(device).manual_seed(stream)


def others(chosen: Tensor, active: Tensor, generator: torch.Generator) -> Tensor:  # (N, k), (E,) -> (N,)
    """A uniformly drawn active expert that is not among the chosen; the last chosen one where there is no other."""
    allowed = active.expand(len(chosen), -1).scatter(1, chosen, False)
    keys = torch.rand(allowed.shape, generator=generator, device=chosen.device).masked_fill(~allowed, -1.0)
    best = keys.max(dim=1)
    return torch.where(best.values >= 0, best.indices, chosen[:, -1])


def explored(chosen: Tensor, active: Tensor, rate: float, generator: torch.Generator) -> Tensor:  # (N, k) -> (N, k)
    """The chosen experts, for a share of tokens with another one in the last slot."""
    drawn = torch.rand(len(chosen), generator=generator, device=chosen.device) < rate
    last = torch.where(drawn, others(chosen, active, generator), chosen[:, -1])
    return torch.cat([chosen[:, :-1], last[:, None]], dim=1)


def shadowed(chosen: Tensor, active: Tensor, rate: float, generator: torch.Generator) -> Tensor:  # (N, k) -> (N,)
    """For a share of tokens another expert than the chosen; -1 for the rest."""
    other = others(chosen, active, generator)
    drawn = torch.rand(len(other), generator=generator, device=other.device) < rate
    return torch.where(drawn, other, -1)
