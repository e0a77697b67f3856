"""The clusters and experts of decisions whose outcome can still arrive, for readers that follow a log.

Dimensions: N decisions, M outcomes, k experts per decision.
"""

import numpy as np
from numpy.typing import NDArray

from moe_posterior.audit.storage.frames import MAX_PAYLOAD
from moe_posterior.audit.storage.state import Checkpoint
from moe_posterior.audit.storage.tables import Group

_REMEMBERED = 1_000_000  # decisions, for sources that do not record a limit
_BUDGET = MAX_PAYLOAD // 2  # bytes that the pending decisions of a router in a log can take


class Asked:
    """A ring buffer of decisions, as long as the router's own. Memory is only used for pages that hold decisions.

    Args:
        checkpoint: holds how many decisions may wait, and the waiting ones.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.top_k = top_k = int(checkpoint.settings["top_k"])
        most = (checkpoint.settings.get("options") or {}).get("max_pending")
        wanted = most if type(most) is int and most > 0 else _REMEMBERED
        self.size = max(1, min(wanted, _BUDGET // (12 + 2 * top_k)))
        self._marks = np.zeros(self.size, dtype=np.int64)  # id + 1, so that an untouched page means empty
        self._clusters = np.zeros(self.size, dtype=np.int32)  # -1: a broken embedding, whose outcome is not used
        self._experts = np.zeros((self.size, top_k), dtype=np.uint16)
        self.told(checkpoint)

    def told(self, checkpoint: Checkpoint) -> None:
        """Add the pending decisions of a checkpoint."""
        arrays = checkpoint.arrays
        if "pending.id" in arrays:
            self._put(arrays["pending.id"], arrays["pending.cluster"], arrays["pending.experts"])

    def resolve(self, group: Group) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64]]:
        """Add a group; returns for each outcome whether its decision is known, its cluster or -1, its experts: (M,), (M,), (M, k)."""
        decisions, wanted = group.tables["decisions"], group.tables["outcomes"]["id"]
        ids = group.decision_ids()
        asked = np.where(np.isinf(decisions["distance"]), -1, decisions["cluster"].astype(np.int64))
        slots = wanted % self.size
        known = self._marks[slots] == wanted + 1
        clusters, experts = self._clusters[slots].astype(np.int64), self._experts[slots].astype(np.int64)
        if len(ids) and len(wanted):
            places = np.searchsorted(ids, wanted).clip(max=len(ids) - 1)
            here = ids[places] == wanted
            clusters[here], experts[here] = asked[places[here]], decisions["experts"][places[here]]
            known |= here
        self._put(ids, asked, decisions["experts"])
        return known, clusters, experts

    def _put(self, ids: NDArray, clusters: NDArray, experts: NDArray) -> None:
        slots = ids % self.size
        self._marks[slots], self._clusters[slots], self._experts[slots] = ids + 1, clusters, experts
