"""What a log says in sum: decisions, outcomes, and how competent each expert has proved, with intervals.

Dimensions: N decisions, M outcomes, E experts, k experts per decision.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moe_posterior import beta as beta_functions
from moe_posterior.audit.read import Reader
from moe_posterior.audit.state import Checkpoint
from moe_posterior.audit.tables import ABSTAIN, EXPLORED, Group
from moe_posterior.errors import AuditError

_RING = 1_000_000  # decisions whose experts are remembered, for sources that do not say how many may wait
_INTERVAL = (0.025, 0.975)


class _Tally:
    """One source's counts."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.decisions = self.abstained = self.explored = self.outcomes = self.refused = self.unmatched = 0
        self.chosen, self.seen, self.won = (np.zeros(0) for _ in range(3))  # (E,)
        self.clusters = np.zeros(0, dtype=np.int64)  # (C,)
        self._ring_ids = np.full(0, -1, dtype=np.int64)
        self._ring_experts = np.zeros((0, 1), dtype=np.uint16)

    def start(self, checkpoint: Checkpoint) -> None:
        """Make room for what the checkpoint speaks of, and take over what was pending."""
        settings, arrays = checkpoint.settings, checkpoint.arrays
        size = (settings.get("options") or {}).get("max_pending", _RING)
        if not isinstance(size, int) or not 1 <= size <= 1 << 28:
            raise AuditError("a checkpoint says that an impossible number of decisions may wait")
        if len(self._ring_ids) != size:
            self._ring_ids = np.full(size, -1, dtype=np.int64)
            self._ring_experts = np.zeros((size, settings["top_k"]), dtype=np.uint16)
        if "pending.id" in arrays:
            slots = arrays["pending.id"] % size
            self._ring_ids[slots], self._ring_experts[slots] = arrays["pending.id"], arrays["pending.experts"]
        for name in ("chosen", "seen", "won"):
            grown = max(0, settings["num_experts"] - len(getattr(self, name)))
            setattr(self, name, np.append(getattr(self, name), np.zeros(grown)))
        grown = max(0, settings["num_clusters"] - len(self.clusters))
        self.clusters = np.append(self.clusters, np.zeros(grown, dtype=np.int64))

    def add(self, group: Group) -> None:
        decisions, outcomes = group.tables["decisions"], group.tables["outcomes"]
        ids = group.decision_ids()
        self.decisions += len(ids)
        self.abstained += int((decisions["flags"] & ABSTAIN != 0).sum())
        self.explored += int((decisions["flags"] & EXPLORED != 0).sum())
        self.outcomes += len(outcomes["id"])
        self.refused += len(np.unique(group.tables["refusals"]["id"]))
        if len(outcomes["id"]):
            known, experts = self._experts_of(outcomes["id"], ids, decisions["experts"])
            self.unmatched += int((~known).sum())
            experts, signal = experts[known].reshape(-1), outcomes["signal"][known].reshape(-1)
            seen = ~np.isnan(signal)
            self.seen += self._count(experts[seen])
            self.won += self._count(experts[seen], signal[seen])
        if len(ids):
            slots = ids % len(self._ring_ids)
            self._ring_ids[slots], self._ring_experts[slots] = ids, decisions["experts"]
            self.chosen += self._count(decisions["experts"].reshape(-1))
            self.clusters += np.bincount(decisions["cluster"], minlength=len(self.clusters))[: len(self.clusters)]

    def _experts_of(self, wanted: NDArray, ids: NDArray, experts: NDArray) -> tuple[NDArray, NDArray]:  # (M,), (M, k)
        """Whether the decisions are known, of this group or before it, and their experts."""
        slots = wanted % len(self._ring_ids)
        known, found = self._ring_ids[slots] == wanted, self._ring_experts[slots]
        if len(ids):
            places = np.searchsorted(ids, wanted).clip(max=len(ids) - 1)
            here = ids[places] == wanted
            found[here] = experts[places[here]]
            known |= here
        return known, found

    def _count(self, experts: NDArray, weights: NDArray | None = None) -> NDArray:
        return np.bincount(experts, weights, minlength=len(self.chosen))[: len(self.chosen)]

    def summary(self) -> dict[str, Any]:
        share = 1 / max(self.decisions, 1)
        alpha, beta = torch.from_numpy(1 + self.won), torch.from_numpy(1 + self.seen - self.won)
        low, high = (beta_functions.quantile(alpha, beta, p).tolist() for p in _INTERVAL)
        experts = [
            {
                "expert": e,
                "chosen": int(self.chosen[e]),
                "outcomes": int(self.seen[e]),
                "competence": float(self.won[e] / self.seen[e]) if self.seen[e] else None,
                "low": low[e],
                "high": high[e],
            }
            for e in range(len(self.chosen))
        ]
        return {
            "source": self.name,
            "decisions": self.decisions,
            "outcomes": self.outcomes,
            "refused": self.refused,
            "abstained": self.abstained,
            "abstained_share": self.abstained * share,
            "explored": self.explored,
            "explored_share": self.explored * share,
            "decisions_by_cluster": self.clusters.tolist(),
            "experts": experts,
            "outcomes_of_decisions_no_longer_held": self.unmatched,
        }


def summarise(reader: Reader) -> dict[str, Any]:
    """First and last time (microseconds since 1970), and for each source its counts and its experts' competence.

    An expert's ``competence`` is the mean of its outcomes; ``low`` and ``high`` bound 95 % of a Beta posterior from a uniform prior.

    Raises:
        AuditError: the log was altered or is malformed.
    """
    tallies: dict[int, _Tally] = {}
    times: list[int] = []
    for record in reader:
        if isinstance(record, Checkpoint):
            source = record.settings["source"]
            tallies.setdefault(source, _Tally(record.settings["name"])).start(record)
        elif isinstance(record, Group) and record.source in tallies:
            calls = record.tables["calls"]["time"]
            times = [*times[:1], int(calls[-1])] if times else [int(calls[0]), int(calls[-1])]
            try:
                tallies[record.source].add(record)
            except (IndexError, ValueError) as error:
                raise AuditError(f"a group does not fit the checkpoint before it: {error}") from error
    return {
        "first_time": times[0] if times else None,
        "last_time": times[-1] if times else None,
        "sources": [tally.summary() for tally in tallies.values()],
    }
