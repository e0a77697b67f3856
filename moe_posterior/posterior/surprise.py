"""Surprise: a CUSUM on each expert's outcomes that notices when it fell, and, after a fall, that it has recovered.

Dimensions: M observations, E experts. A batch counts as one step of the CUSUM.

Source: Page 1954, *Continuous Inspection Schemes*.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_posterior.evidence import Observation, ProxyNoise, degraded_log_likelihood_ratio

KEPT = 0.1  # share of prior strength and evidence an expert keeps once it has surprised
LEAST_TRUST = (
    1e-100  # nothing beside any evidence; without it 308 surprises leave no prior, and an unseen cell's mean is NaN
)
DEGRADED_SHARE = 0.5  # the change that is looked for: competence fell to half of what was believed
RECOVERY_SHARE = 0.5  # of the threshold of surprise: the one at which an expert that fell is taken for recovered


class Verdict(NamedTuple):
    """The CUSUMs after a step; ``kept`` is None where no expert has changed."""

    suspicion: Tensor  # (E,) float64, nats
    relief: Tensor | None  # (E,) float64, nats
    trust: Tensor  # (E,) float64
    kept: Tensor | None  # (E,) float64, share of its evidence that an expert keeps


def steps(
    seen: Observation,
    believed: Tensor,  # (M,) competence expected of each observed expert
    before: Tensor | None,  # (M,) what was expected of it before it fell; None: recovery is not looked for
    noise: ProxyNoise | None,
    clusterings: int,
) -> Tensor:  # (1, M), or (2, M) with ``before``
    """What each observation adds to its expert's suspicion and, in the second row, to its relief."""
    found = [degraded_log_likelihood_ratio(seen.signal, believed, DEGRADED_SHARE, noise)]
    if before is not None:  # recovery: it does as its prior says and no longer half as well
        found.append(-degraded_log_likelihood_ratio(seen.signal, before, DEGRADED_SHARE, noise))
    if seen.weight is not None:
        found = [step * (seen.weight / clusterings) for step in found]
    return torch.stack(found)


def by_expert(added: Tensor, experts: Tensor, num_experts: int) -> Tensor:  # (R, M), (M,) -> (R, E)
    """The steps summed for each expert."""
    total = added.new_zeros(len(added), num_experts)
    rows = torch.arange(len(added), device=experts.device)[:, None].expand(-1, len(experts))
    return total.index_put_((rows, experts.expand_as(rows)), added, accumulate=True)


def judge(
    alarm: Tensor,  # (1, E), or (2, E) with relief
    suspicion: Tensor,  # (E,)
    relief: Tensor | None,  # (E,)
    trust: Tensor,  # (E,)
    threshold: float,
) -> Verdict:
    """Take a step of the CUSUMs: who crosses the threshold loses trust and evidence, who recovers has its trust back.

    >>> one = torch.ones(2, dtype=torch.float64)
    >>> found = judge(torch.tensor([[3.0, -1.0]]).double(), 0.5 * one, None, one, threshold=3.0)
    >>> found.suspicion.tolist(), found.trust.float().tolist()
    ([0.0, 0.0], [0.10000000149011612, 1.0])
    """
    suspicion = (suspicion + alarm[0]).clamp(min=0.0)
    fell = changed = suspicion > threshold
    if relief is not None:
        relief = torch.where(trust < 1, (relief + alarm[1]).clamp(min=0.0), 0.0)
        changed = fell | (relief > RECOVERY_SHARE * threshold)
    if not bool(changed.any()):
        return Verdict(suspicion, relief, trust, None)
    kept = torch.where(changed, KEPT, 1.0).to(trust.dtype)
    trust = (trust * torch.where(fell, KEPT, 1.0)).clamp(min=LEAST_TRUST)
    trust = trust.masked_fill(changed & ~fell, 1.0)  # what was known of it before it fell holds again
    suspicion = suspicion.masked_fill(changed, 0.0)
    return Verdict(suspicion, None if relief is None else relief.masked_fill(changed, 0.0), trust, kept)
