"""Random choices of rows in one pass: every row gets a random number from its id, and the smallest numbers are chosen.

The choice does not depend on how many rows there are, in which pieces they come or in which order, and it falls on the same ids in
every data set. Dimensions: N rows.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

__all__ = ["Smallest", "hashed", "mixed", "priorities"]

_STEP = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def mixed(values: np.ndarray) -> np.ndarray:  # (N,) uint64 -> (N,) uint64
    """Each value scattered over all 64 bits: the finaliser of SplitMix64 (Steele, Lea & Flood 2014), which is one to one.

    >>> bool((mixed(np.arange(3, dtype=np.uint64)) == mixed(np.arange(3, dtype=np.uint64))).all())
    True
    """
    with np.errstate(over="ignore"):
        found = values.astype(np.uint64) + _STEP
        found = (found ^ (found >> np.uint64(30))) * _FIRST
        found = (found ^ (found >> np.uint64(27))) * _SECOND
        return found ^ (found >> np.uint64(31))


def priorities(ids: np.ndarray, seed: int, purpose: str) -> np.ndarray:  # (N,) uint64 -> (N,) uint64
    """A random number of each row, the same wherever the id occurs; independent for each purpose."""
    digest = hashlib.blake2b(f"{purpose} {seed}".encode(), digest_size=8).digest()
    return mixed(ids ^ np.uint64(int.from_bytes(digest, "little")))


def hashed(ids: Sequence[object] | np.ndarray) -> np.ndarray:  # (N,) integers or texts -> (N,) uint64
    """Ids as numbers, the same in every file: integers as they are, also those written as text or as floats, and other
    texts by a digest.

    >>> bool((hashed(["7"]) == hashed(np.array([7]))).all())
    True
    """
    if isinstance(ids, np.ndarray) and ids.dtype.kind in "iu":
        return ids.astype(np.int64).view(np.uint64)
    if isinstance(ids, np.ndarray) and ids.dtype.kind == "f":
        ids = [int(one) if one.is_integer() else one for one in ids.tolist()]
    digests = b"".join(_digest(str(one)) for one in ids)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def _digest(text: str) -> bytes:
    if len(text) < 19 and text.removeprefix("-").isdecimal() and str(int(text)) == text:
        return int(text).to_bytes(8, "little", signed=True)
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


class Smallest:
    """The smallest of many numbers, in bounded memory: ``offer`` says which of some new ones can still be among them.

    >>> smallest = Smallest(2)
    >>> for part in ([5, 3], [9, 1], [2]):
    ...     _ = smallest.offer(np.array(part, dtype=np.uint64))
    >>> smallest.found().tolist()
    [1, 2]
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._held: list[np.ndarray] = []
        self._count = 0
        self._most = np.uint64(np.iinfo(np.uint64).max)

    def offer(self, numbers: np.ndarray) -> np.ndarray:  # (N,) uint64 -> (N,) bool
        """Take note of numbers; True where one can be among the smallest."""
        possible = numbers <= self._most
        self._held.append(numbers[possible])
        self._count += len(self._held[-1])
        if self._count > 2 * self.size:
            self._held = [self.found()]
            self._count = self.size
            self._most = self._held[0][-1]
        return possible

    @property
    def most(self) -> np.uint64:
        """No number above this can be among the smallest."""
        return self._most

    def found(self) -> np.ndarray:  # (at most size,) uint64, rising
        """The smallest so far."""
        held = np.concatenate(self._held) if self._held else np.empty(0, np.uint64)
        return np.sort(held)[: self.size]
