"""An action threshold for each large group, and one for the small ones of each parent together, all promised at once.

Dimensions: N calibration rows. A group is whatever is known of a row before it is answered: a routing configuration, a domain.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_posterior.checks.declared import as_declared
from moe_posterior.checks.validation import count, floats, integers, number
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.guarantees.threshold import GuaranteedThreshold, assumptions, read_losses, select_threshold


@dataclass(frozen=True)
class GroupThreshold:
    """The threshold of some groups taken together."""

    name: str
    groups: tuple[int, ...]
    found: GuaranteedThreshold

    def to_dict(self) -> dict[str, Any]:
        """As strict JSON takes it."""
        return {"name": self.name, "groups": list(self.groups), **self.found.to_dict()}


@dataclass(frozen=True)
class GroupThresholds:
    """Thresholds of disjoint sets of groups; with probability of at least 1 − δ every one of them keeps its promise."""

    parts: tuple[GroupThreshold, ...]
    max_risk: float
    error_probability: float  # of all parts together
    assumptions: tuple[str, ...]

    def thresholds(self, groups: Tensor) -> Tensor:  # (N,) -> (N,) float64
        """Each row's threshold; infinite for a group without a promise and for one that the calibration rows did not have."""
        ids = integers("groups", groups)
        found = torch.full(ids.shape, math.inf, dtype=torch.float64, device=ids.device)
        for part in self.parts:
            found[torch.isin(ids, torch.tensor(part.groups, device=ids.device))] = part.found.threshold
        return found

    def acts(self, confidence: Tensor, groups: Tensor) -> Tensor:  # (N,), (N,) -> (N,) bool
        """Which answers to act on."""
        scores, least = floats("confidence", confidence), self.thresholds(groups)
        if scores.shape != least.shape:
            raise InvalidArgumentError(
                f"confidence and groups must have one shape; got {tuple(scores.shape)} and {tuple(least.shape)}"
            )
        return scores.double() >= least

    def to_dict(self) -> dict[str, Any]:
        """As strict JSON takes it."""
        return {
            "max_risk": self.max_risk,
            "error_probability": self.error_probability,
            "parts": [part.to_dict() for part in self.parts],
            "assumptions": list(self.assumptions),
        }

    def __str__(self) -> str:
        lines = [
            f"With probability of at least {100 * (1 - self.error_probability):.3g} %, in each of these at most "
            f"{100 * self.max_risk:.3g} % of the answers acted on are wrong:"
        ]
        for part in self.parts:
            found = part.found
            said = (
                f"act from {found.threshold:.6g}, on {100 * found.coverage:.3g} % of"
                if found.promised
                else "never act; of"
            )
            lines.append(f"- {part.name}: {said} {found.rows:,} rows. {found.reason}".rstrip())
        return "\n".join([*lines, "It holds if:", *(f"- {assumption}" for assumption in self.assumptions)])


@as_declared
def select_group_thresholds(
    confidence: Tensor,  # (N,)
    correct: Tensor,  # (N,)
    groups: Tensor,  # (N,) integers
    max_risk: float,
    error_probability: float = 0.1,
    *,
    parents: Mapping[int, int] | None = None,
    min_rows: int = 300,
    max_groups: int = 8,
    starts: Mapping[float, float] | None = None,
) -> GroupThresholds:
    """A threshold for each of the largest groups, for the rest of each parent, and for what then remains.

    Every row belongs to exactly one part, and δ is shared equally between the parts that are tested. So the promise also holds for all
    rows together, whatever the mix of the parts later is.

    Args:
        confidence, correct, max_risk, starts: as in :func:`~moe_posterior.guarantees.select_threshold`.
        groups: an integer per row.
        error_probability: δ, that any part breaks its promise.
        parents: group → parent, for instance routing configuration → cluster; a group that is not named has none.
        min_rows: a part with fewer rows is pooled with others; 300 rows without too many errors prove a risk of a few percent.
        max_groups: at most so many groups, and so many parents' rests, are tested on their own: each costs the others some of δ.

    Raises:
        InvalidArgumentError: a shape or value that does not fit.

    Source: fixed-sequence tests as there, with a Bonferroni correction over parts.

    >>> confidence, groups = torch.linspace(0, 1, 2000), torch.arange(2000) % 2
    >>> found = select_group_thresholds(confidence, confidence > 0.35 + 0.3 * groups, groups, max_risk=0.1)
    >>> [(part.name, round(part.found.threshold, 1)) for part in found.parts]
    [('group 0', 0.3), ('group 1', 0.6)]
    """
    scores, losses = read_losses(confidence, correct)
    ids = integers("groups", groups, (len(scores),)).cpu()
    delta = number("error_probability", error_probability, above=0.0, below=1.0)
    least, most = count("min_rows", min_rows), count("max_groups", max_groups)
    parts = _partition(ids, parents or {}, least, most)
    share = delta / max(1, sum(tested for _, _, tested in parts))
    found = []
    for name, members, tested in parts:
        rows = torch.isin(ids, torch.tensor(members))
        if tested:
            one = select_threshold(scores[rows], 1 - losses[rows], max_risk, share, starts=starts)
        else:
            reason = f"Too few rows to test: fewer than min_rows = {least}."
            one = GuaranteedThreshold(math.inf, float(max_risk), share, int(rows.sum()), 0, 0.0, assumptions(), reason)
        found.append(GroupThreshold(name, members, one))
    tied = any(len(part.found.assumptions) > len(assumptions()) for part in found)
    return GroupThresholds(tuple(found), float(max_risk), delta, (*assumptions(tied=tied), *_OF_GROUPS))


_OF_GROUPS = (
    "Which groups are tested on their own was fixed beforehand. If their numbers of rows decide it, as here, this is exact for single "
    "groups; where groups are pooled it is so unless another sample would have pooled others.",
    "A promise for pooled groups holds for their mix in the population, not for each of them.",
)


def _partition(
    ids: Tensor, parents: Mapping[int, int], min_rows: int, most: int
) -> list[tuple[str, tuple[int, ...], bool]]:
    """Name, groups, and whether there are rows enough to test, of each part."""
    values, counts = ids.unique(return_counts=True)
    rows = dict(zip(values.tolist(), counts.tolist(), strict=True))
    large = sorted((group for group in rows if rows[group] >= min_rows), key=lambda group: (-rows[group], group))[:most]
    parts: list[tuple[str, tuple[int, ...], bool]] = [(f"group {group}", (group,), True) for group in sorted(large)]
    families: dict[int, list[int]] = defaultdict(list)
    for group in rows.keys() - set(large):
        if group in parents:
            families[parents[group]].append(group)
    size = {parent: sum(rows[group] for group in members) for parent, members in families.items()}
    kept = sorted((p for p in size if size[p] >= min_rows), key=lambda parent: (-size[parent], parent))[:most]
    parts += [
        (f"the other groups of parent {parent}", tuple(sorted(families[parent])), True) for parent in sorted(kept)
    ]
    left = sorted(rows.keys() - {group for _, members, _ in parts for group in members})
    if left:
        name = "all other groups" if parts else "all groups"
        parts.append((name, tuple(left), sum(rows[group] for group in left) >= min_rows))
    return parts
