"""The limits of a log's records, checked before anything is recorded: a writer that exceeds one later fails on every attempt.

Dimensions: C clusters, E experts, k experts per decision.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from moe_posterior.audit.storage.frames import MAX_PAYLOAD
from moe_posterior.audit.storage.state import encode_json
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.gates import BeliefGate, Gate
from moe_posterior.pending import row_size
from moe_posterior.router import PosteriorRouter

MAX_EXPERTS = 1 << 16  # an expert is 2 bytes in every record
MAX_TOP_K = MAX_EXPERTS - 1  # so is the number of them per decision
MAX_NAME = 1000  # characters
MAX_NAMES = 512 << 10  # bytes of all names together, which every segment repeats in its first record
MAX_OPTIONS = 64 << 10  # bytes of a router's options as JSON
_BESIDE = 128 << 10  # bytes of a checkpoint besides its arrays, at most


def require_pool(gate: Gate, num_experts: int | None = None) -> None:
    """Raise InvalidArgumentError for a pool too large for a record; ``num_experts`` replaces the pool's own size if given."""
    experts = gate.num_experts if num_experts is None else num_experts
    if experts > MAX_EXPERTS:
        raise InvalidArgumentError(f"num_experts of an audited gate must be at most {MAX_EXPERTS}; got {experts}")
    if gate.top_k > MAX_TOP_K:
        raise InvalidArgumentError(f"top_k of an audited gate must be at most {MAX_TOP_K}; got {gate.top_k}")
    size = _BESIDE + (belief_bytes(gate, experts) if isinstance(gate, BeliefGate) else 0)
    if size > MAX_PAYLOAD:
        raise InvalidArgumentError(
            f"the belief of an audited gate must fit one record of {MAX_PAYLOAD} bytes; "
            f"num_clusters={gate.num_clusters} x num_experts={experts} takes {size}"
        )


def require_router(router: PosteriorRouter, num_experts: int | None = None) -> None:
    """Raise InvalidArgumentError for a router whose checkpoints might not fit one record; with ``num_experts`` if given."""
    gate, width = router.gate, 0 if router.gate.members is None else router.gate.members.width
    waiting = router.max_pending * row_size(gate.top_k, width)
    require_pool(gate, num_experts)
    if waiting > MAX_PAYLOAD // 2:
        raise InvalidArgumentError(
            f"an audited router's pending decisions must fit one record: max_pending * (12 + 8 top_k + 8 J) must be at most "
            f"{MAX_PAYLOAD // 2}, J being clusterings * neighbours or, where a query has one cluster, 0; got "
            f"max_pending={router.max_pending}, top_k={gate.top_k}, J={width}"
        )
    experts = gate.num_experts if num_experts is None else num_experts
    size = _BESIDE + belief_bytes(gate, experts) + 4 * experts + waiting
    if size > MAX_PAYLOAD:
        raise InvalidArgumentError(
            f"an audited router must fit one record of {MAX_PAYLOAD} bytes with all its pending decisions; num_clusters="
            f"{gate.num_clusters} x num_experts={experts} with max_pending={router.max_pending}, top_k={gate.top_k} takes {size}"
        )
    require_options(router.options)


def require_options(options: Mapping[str, Any]) -> None:
    """Raise InvalidArgumentError for options that a reader would refuse."""
    said = encode_json(dict(options))
    if len(said) > MAX_OPTIONS:
        raise InvalidArgumentError(
            f"options of an audited router must be at most {MAX_OPTIONS} bytes as JSON; got {len(said)}"
        )


def require_name(name: str, names: Iterable[str]) -> None:
    """Raise InvalidArgumentError for one name more than a segment's first record can hold."""
    if not 1 <= len(name) <= MAX_NAME:
        raise InvalidArgumentError(f"name must be 1 to {MAX_NAME} characters; got {len(name)}")
    total = len(encode_json(dict.fromkeys([*names, name], MAX_EXPERTS)))
    if total > MAX_NAMES:
        raise InvalidArgumentError(
            f"the names in a log must be at most {MAX_NAMES} bytes together; with {name[:50]!r} {total}"
        )


def belief_bytes(gate: BeliefGate, num_experts: int) -> int:
    """The size of one gate's arrays in a checkpoint: its state, and the posterior derived from it."""
    belief = gate.posterior
    state = sum(_grown(tensor, belief.num_experts, num_experts) for tensor in gate.state_dict().values())
    return state + gate.num_clusters * (16 * num_experts + 8) + num_experts


def _grown(tensor: torch.Tensor, old: int, new: int) -> int:
    per_expert = new / old if tensor.ndim and tensor.shape[-1] == old else 1.0
    return int(tensor.numel() * tensor.element_size() * per_expert)
