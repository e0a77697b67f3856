"""A uniform sample of the hidden states that reach a gate, of fixed size, and the same on every rank.

Every row of the stream gets a pseudo-random 64-bit key from (seed, gate, batch, call, rank, position), and the sample is the rows with
the smallest keys. So ranks sample without talking to each other, and what they hold is merged exactly: the smallest keys of the union
of their samples are the smallest keys of the whole stream. Merging twice changes nothing.

Dimensions: n rows kept, D hidden size, E experts.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moe_posterior.checks import validation
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.training.data.base import generator_for

__all__ = ["Reservoir", "row_keys"]

LARGEST = torch.iinfo(torch.int64).max
# splitmix64 (Steele et al. 2014), its constants as signed numbers: int64 products wrap around in torch as unsigned ones do in C.
_GOLDEN, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685


def row_keys(
    count: int, stream: tuple[int | str, ...], rank: int = 0, world_size: int = 1
) -> Tensor:  # -> (count,) int64
    """Keys of the rows that one rank has of a batch, row i of rank r being row ``i · world_size + r`` of the whole batch.

    That is how Lightning deals rows to ranks, so with one row an example the keys do not depend on the number of ranks.

    >>> whole = row_keys(4, ("gate", 7))
    >>> torch.equal(whole[1::2], row_keys(2, ("gate", 7), rank=1, world_size=2))
    True
    """
    start = torch.randint(LARGEST, (), generator=generator_for(*stream))
    mixed = start + (torch.arange(count) * world_size + rank) * _GOLDEN
    mixed = (mixed ^ _shifted(mixed, 30)) * _FIRST
    mixed = (mixed ^ _shifted(mixed, 27)) * _SECOND
    return mixed ^ _shifted(mixed, 31)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """A shift to the right that brings in zeros, not the sign."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


class Reservoir:
    """The rows with the smallest keys, on the CPU in float32.

    A state may be loaded into a reservoir of another capacity. The sample stays uniform: into a smaller one go the smallest keys, and a
    larger one admits no key above those that were dropped before, so that it fills up more slowly.

    Args:
        capacity: most rows that are kept.

    >>> sample = Reservoir(capacity=2)
    >>> keys = torch.tensor([5, -3, 9])
    >>> sample.add(keys, torch.tensor([[0.0], [1.0], [2.0]]), torch.full((3, 4), torch.nan))
    >>> sample.hidden[sample.keys.argsort()].flatten()
    tensor([1., 0.])
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = validation.count("capacity", capacity)
        self.keys = torch.empty(0, dtype=torch.int64)  # (n,)
        self.hidden = torch.empty(0, 0)  # (n, D) float32
        self.outcome = torch.empty(0, 0)  # (n, E) float32, NaN where not observed
        self.bound = LARGEST  # rows with this key or a larger one may have been dropped

    def __len__(self) -> int:
        return len(self.keys)

    def admitted(self, keys: Tensor) -> Tensor:  # (N,) -> (M,) int64
        """The positions of the keys that are small enough to get in, in a full reservoir only those below its largest."""
        return (keys < self.bound).nonzero().flatten()

    def add(self, keys: Tensor, hidden: Tensor, outcome: Tensor) -> None:  # (N,), (N, D), (N, E)
        """Take in rows with their keys; rows that hold NaN or inf are left out."""
        hidden, outcome = (part.detach().to("cpu", torch.float32) for part in (hidden, outcome))
        wanted = torch.isfinite(hidden).all(dim=1) & (keys < self.bound)
        keys, hidden, outcome = keys[wanted], hidden[wanted], outcome[wanted]
        if not len(keys):
            return
        room = min(self.capacity - len(self), len(keys))
        if room:
            old = (self.hidden, self.outcome) if len(self) else (hidden[:0], outcome[:0])
            self.keys = torch.cat([self.keys, keys[:room]])
            self.hidden, self.outcome = torch.cat([old[0], hidden[:room]]), torch.cat([old[1], outcome[:room]])
            keys, hidden, outcome = keys[room:], hidden[room:], outcome[room:]
        together = torch.cat([self.keys, keys])
        kept = torch.zeros(len(together), dtype=torch.bool)
        kept[together.topk(len(self), largest=False).indices] = True
        evicted, accepted = (~kept[: len(self)]).nonzero().flatten(), kept[len(self) :].nonzero().flatten()
        self.keys[evicted] = keys[accepted]
        self.hidden[evicted], self.outcome[evicted] = hidden[accepted], outcome[accepted]
        self._close_if_full()

    def merged(self, device: torch.device, sizes: tuple[int, int]) -> "Reservoir":
        """The sample of what all ranks have seen, sorted by key and the same on each; collective under torch.distributed.

        Args:
            device: where the process group exchanges tensors.
            sizes: D and E, which a rank that has seen nothing does not know.
        """
        whole = Reservoir(self.capacity)
        whole.bound = self.bound
        order = self.keys.argsort()
        whole.keys = self.keys[order]
        whole.hidden = self.hidden[order] if len(self) else torch.empty(0, sizes[0])
        whole.outcome = self.outcome[order] if len(self) else torch.empty(0, sizes[1])
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return whole
        held, bounds = _gathered(whole.keys, self.bound, self.capacity, device)  # (ranks, capacity), (ranks,)
        whole.bound = int(bounds.min())
        keys = held.unique()
        keys = keys[(keys < LARGEST) & (keys <= whole.bound)][: self.capacity]
        rank = torch.distributed.get_rank()
        # After a resume several ranks hold the same rows; the lowest of them sends each.
        before = held[:rank].flatten()
        mine = torch.isin(whole.keys, keys) & ~torch.isin(whole.keys, before)
        places = torch.searchsorted(keys, whole.keys[mine])
        whole.hidden = _collected(whole.hidden[mine], places, len(keys), device)
        whole.outcome = _collected(whole.outcome[mine], places, len(keys), device)
        whole.keys = keys
        whole._close_if_full()
        return whole

    def state_dict(self) -> dict[str, Tensor]:
        """The rows and their keys, and the bound below which no key was dropped."""
        bound = torch.tensor(self.bound)
        return {"keys": self.keys, "hidden": self.hidden, "outcome": self.outcome, "bound": bound}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the rows of an earlier :meth:`state_dict`: all of them, or as many with the smallest keys as there is room for.

        Raises:
            InvalidArgumentError: it is none.
        """
        parts = [state.get(name) for name in ("keys", "hidden", "outcome")]
        rows = [part for part in parts if isinstance(part, Tensor)]
        if len(rows) < len(parts) or len({len(part) for part in rows}) != 1:
            raise InvalidArgumentError(
                f"state must hold tensors keys, hidden and outcome of as many rows; got {sorted(state)}"
            )
        kept = rows[0].argsort()[: self.capacity].sort().values  # in their order
        self.keys, self.hidden, self.outcome = (part[kept] for part in rows)
        self.bound = int(
            state.get("bound", LARGEST)
        )  # version 0.2 had none; its samples are resumed with the same capacity
        self._close_if_full()

    def _close_if_full(self) -> None:
        """A full reservoir admits only what would push out its largest key."""
        if len(self) == self.capacity:
            self.bound = min(self.bound, int(self.keys.max()))


def _gathered(
    keys: Tensor, bound: int, capacity: int, device: torch.device
) -> tuple[Tensor, Tensor]:  # (n,) -> (ranks, capacity), (ranks,), on the CPU
    """Every rank's keys, filled up with the largest number, and its bound."""
    padded = torch.full((capacity + 1,), LARGEST, dtype=torch.int64)
    padded[: len(keys)] = keys
    padded[capacity] = bound
    parts = [torch.empty_like(padded, device=device) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, padded.to(device))
    whole = torch.stack(parts).cpu()
    return whole[:, :capacity], whole[:, capacity]


def _collected(rows: Tensor, places: Tensor, count: int, device: torch.device) -> Tensor:  # (m, W), (m,) -> (count, W)
    """Rows that each rank has some of, in their places; summed as integers, so that every bit arrives as it was."""
    whole = torch.zeros(count, rows.shape[1], dtype=torch.int32)
    whole[places] = rows.view(torch.int32)
    whole = whole.to(device)
    torch.distributed.all_reduce(whole)
    return whole.cpu().view(torch.float32)
