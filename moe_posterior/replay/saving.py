"""The routings of a model's forward passes as plain data, and the file that stores them.

Dimensions: N tokens, D hidden size, E experts, k experts per token.
"""

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_posterior.checks.declared import as_declared
from moe_posterior.errors import DamagedFileError
from moe_posterior.files.tensorfile import digest, load_tensors, save_tensors
from moe_posterior.gates import Gate, Routing
from moe_posterior.gates.base import SharedRouting
from moe_posterior.memberships import Memberships

KIND, VERSION = "recorded routing", 1
_MEMBERS = ("member_ids", "member_shares")  # extra fields, for tokens in several clusters


class GateMark(NamedTuple):
    """What must match between a gate and the one whose routing it replays."""

    num_experts: int  # E
    top_k: int  # k
    hidden_size: int  # D
    state: str  # checksum of its state_dict: weights, belief, centroids; "" if not requested

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(E, k, D)."""
        return self.num_experts, self.top_k, self.hidden_size


class Recording(NamedTuple):
    """The gates of a model in the model's order, and their routings in the order they were made."""

    gates: dict[str, GateMark]
    calls: list[tuple[str, Routing]]


def mark(gate: Gate, *, with_state: bool = True) -> GateMark:
    """A gate's sizes and the checksum of its state as it is now."""
    state = {name: value for name, value in gate.state_dict().items() if isinstance(value, Tensor)}
    return GateMark(gate.num_experts, gate.top_k, gate.hidden_size, digest(state) if with_state else "")


def recording_of(gates: Mapping[str, Gate], routings: Sequence[tuple[str, Routing]]) -> Recording:
    """A recording detached from the autograd graph of its routings."""
    calls = [(name, routing.map(Tensor.detach)) for name, routing in routings]
    return Recording({name: mark(gate) for name, gate in gates.items()}, calls)


@as_declared
def save_recording(recording: Recording, path: str | os.PathLike[str]) -> None:
    """Write a recording; indices and clusters are stored in 32 bits, everything else unchanged."""
    tensors = {
        f"{place}.{field}": part.to(torch.int32) if part.dtype == torch.int64 else part
        for place, (_, routing) in enumerate(recording.calls)
        for field, part in _parts_of(routing).items()
    }
    header = {
        "kind": KIND,
        "version": VERSION,
        "gates": [[name, *gate] for name, gate in recording.gates.items()],
        "calls": [name for name, _ in recording.calls],
    }
    save_tensors(path, tensors, header)


@as_declared
def load_recording(path: str | os.PathLike[str]) -> Recording:
    """Read what :func:`save_recording` wrote; tensors on the CPU.

    Raises:
        MissingDataError, MissingDependencyError: as ``tensorfile.load_tensors``.
        DamagedFileError: as there, or the file was written by a later version, or an index is out of its gate's range.
    """
    tensors, header = load_tensors(path, KIND)
    if header["version"] != VERSION:
        raise DamagedFileError(f"{path} must be of format version {VERSION}; got {header['version']}")
    gates = {name: GateMark(*sizes) for name, *sizes in header["gates"]}
    calls = []
    for place, name in enumerate(header["calls"]):
        names = Routing._fields + (_MEMBERS if f"{place}.{_MEMBERS[0]}" in tensors else ())
        parts = {field: tensors[f"{place}.{field}"] for field in names}
        indices = parts["expert_indices"]
        if indices.ndim != 2 or (indices < 0).any() or (indices >= gates[name].num_experts).any():
            raise DamagedFileError(
                f"{path} must hold experts below {gates[name].num_experts} for gate {name!r}; call {place} does not"
            )
        parts = {field: part.long() if part.dtype == torch.int32 else part for field, part in parts.items()}
        members = [parts.pop(field) for field in _MEMBERS if field in parts]
        routing = Routing(**parts)
        calls.append((name, SharedRouting.of(routing, Memberships(*members)) if members else routing))
    return Recording(gates, calls)


def _parts_of(routing: Routing) -> dict[str, Tensor]:
    return routing._asdict() | dict(zip(_MEMBERS, routing.members or (), strict=False))
