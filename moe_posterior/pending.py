"""Decisions waiting for their outcome: a ring buffer indexed by id mod size, constant time, memory in proportion to decisions made.

Dimensions: N decisions, k experts per decision, J clusters of a query that belongs to several.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moe_posterior.errors import InvalidArgumentError

COLUMNS = ("id", "cluster", "experts", "tenure")
MEMBERS = ("members", "shares")
Members = tuple[NDArray, NDArray]  # clusters and shares of queries that belong to several: 2 x (N, J)
_FIRST = 1 << 20  # bytes of a new ring


class Pending:
    """What each waiting decision was: its cluster, its experts, and how often these had been replaced by then.

    Args:
        size: decisions that can wait; a newer decision overwrites the older one in its slot.
        top_k: k.
        width: J; 0 (default) where a query has one cluster alone.

    >>> ring = Pending(10**15, top_k=1)
    >>> ring.put(np.array([5, 7]), np.array([0, 1]), np.array([[2], [3]]), np.zeros((2, 1)))
    >>> slots, known = ring.find(np.array([7, 6, 10**14]))
    >>> known.tolist(), ring.experts[slots[0]].tolist()
    ([True, False, False], [3])
    """

    def __init__(self, size: int, top_k: int, width: int = 0) -> None:
        self.size, self.top_k, self.width = size, top_k, width
        self.names = COLUMNS + MEMBERS if width else COLUMNS
        rows = max(1, min(size, _FIRST // row_size(top_k, width)))
        self._mark = np.zeros(rows, dtype=np.int64)  # id + 1, so that 0, as in fresh memory, means empty
        self.cluster = np.zeros(rows, dtype=np.int32)  # -1: an embedding that was broken
        self.experts = np.zeros((rows, top_k), dtype=np.int32)
        self.tenure = np.zeros((rows, top_k), dtype=np.int32)
        self.members = np.zeros((rows, width), dtype=np.int32)
        self.shares = np.zeros((rows, width), dtype=np.float32)

    def put_one(
        self, decision_id: int, cluster: int, experts: list[int], tenure: NDArray, members: Members | None = None
    ) -> None:
        """Store one decision."""
        slot = decision_id % self.size
        if slot >= len(self._mark):
            self._grow(slot + 1)
        self._mark[slot], self.cluster[slot] = decision_id + 1, cluster
        self.experts[slot], self.tenure[slot] = experts, tenure
        if members is not None:
            self.members[slot], self.shares[slot] = members[0][0], members[1][0]

    def put(
        self,
        ids: NDArray,  # (N,)
        clusters: ArrayLike,  # (N,)
        experts: ArrayLike,  # (N, k)
        tenure: ArrayLike,  # (N, k)
        members: Members | None = None,
    ) -> None:
        """Store decisions."""
        if not len(ids):
            return
        slots = ids % self.size
        if (last := int(slots.max())) >= len(self._mark):
            self._grow(last + 1)
        self._mark[slots], self.cluster[slots] = ids + 1, clusters
        self.experts[slots], self.tenure[slots] = experts, tenure
        if members is not None:
            self.members[slots], self.shares[slots] = members

    def find(self, ids: NDArray) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:  # (N,) -> (N,), (N,)
        """The slot of each decision, and whether it is stored; the slot is meaningless if it is not."""
        slots = ids % self.size
        inside = slots < len(self._mark)
        slots = np.where(inside, slots, 0)
        return slots, inside & (ids >= 0) & (self._mark[slots] == ids + 1)

    def require(self, ids: NDArray, tenure: NDArray, next_id: int) -> NDArray[np.int64]:  # (N,), (E,) -> (N,)
        """The slots of decisions that are about to be resolved.

        Raises:
            InvalidArgumentError: one is not pending, comes twice, or went to an expert that has left or been replaced since.
        """
        slots, known = self.find(ids)
        if not known.all():
            first = int(ids[~known][0])
            reason = "was never given" if not 0 <= first < next_id else "is resolved already or too old"
            raise InvalidArgumentError(f"decision {first} {reason}; ids must be pending decisions of this router")
        if len(ids) > 1 and len(np.unique(ids)) < len(ids):
            raise InvalidArgumentError("ids must not repeat: a decision is resolved once")
        experts = self.experts[slots]
        left = self.tenure[slots] != tenure[experts]
        if left.any():
            row, slot = np.argwhere(left)[0]
            raise InvalidArgumentError(
                f"decision {int(ids[row])} went to expert {int(experts[row, slot])}, which has left or been replaced since"
            )
        return slots

    def remove(self, ids: NDArray) -> None:
        """Remove these decisions, where they are stored."""
        slots, known = self.find(ids)
        self._mark[slots[known]] = 0

    def clear(self) -> None:
        """Remove all decisions."""
        self._mark[:] = 0

    def columns(self) -> dict[str, NDArray]:
        """All that wait, in the order of their places: id (N,), cluster (N,), experts and tenure (N, k), members and shares (N, J)."""
        waiting = np.flatnonzero(self._mark)
        found = {"id": self._mark[waiting] - 1}
        return found | {name: getattr(self, name)[waiting] for name in self.names[1:]}

    def _grow(self, rows: int) -> None:
        rows = min(self.size, max(rows, 2 * len(self._mark)))
        try:
            for name in ("_mark", *COLUMNS[1:], *MEMBERS):
                old = getattr(self, name)
                grown = np.zeros((rows, *old.shape[1:]), dtype=old.dtype)
                grown[: len(old)] = old
                setattr(self, name, grown)
        except MemoryError as error:
            raise InvalidArgumentError(
                f"max_pending={self.size}, top_k={self.top_k} needs {rows * row_size(self.top_k, self.width)} bytes, "
                "more memory than is available"
            ) from error


def row_size(top_k: int, width: int) -> int:
    """Bytes that a waiting decision takes.

    >>> row_size(top_k=1, width=0)
    20
    """
    return 12 + 8 * top_k + 8 * width
