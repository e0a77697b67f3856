"""Records the gates inside a model: a given share of the tokens, and their outcomes.

Dimensions: N tokens, M sampled tokens, C clusters, E experts, k experts per token.
"""

import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moe_posterior.audit.limits import require_pool
from moe_posterior.audit.recorder import BeliefTracker, columns_of
from moe_posterior.audit.sink import Sink
from moe_posterior.audit.storage.clock import now
from moe_posterior.audit.storage.collect import Event, Many, Marked, Resolved
from moe_posterior.audit.storage.state import Checkpoint, require_knobs
from moe_posterior.audit.storage.tables import Columns
from moe_posterior.errors import AuditError, InvalidArgumentError
from moe_posterior.forking import ForkLock
from moe_posterior.gates import BeliefGate, Gate, Routing
from moe_posterior.pending import Members

_PIECE = 32 << 20  # bytes of a forward's tokens, or of their outcomes, per record
_REMEMBERED = 256  # most recent routings of a gate whose outcomes can still be recorded


class _Sampled(NamedTuple):
    """Which tokens of a routing were recorded."""

    routing: Callable[[], Tensor | None]  # weakly
    ids: NDArray[np.int64]  # (M,)
    rows: Tensor  # (M,)


class GateRecorder:
    """One gate's decisions and outcomes, sampled per token."""

    def __init__(self, log: Sink, gate: Gate, name: str, rate: float, seed: int) -> None:
        self.log, self.gate, self.name, self.rate = log, gate, name, rate
        self.source = log.source_of(name)
        self._random = np.random.default_rng(seed)
        self._belief = BeliefTracker(gate) if isinstance(gate, BeliefGate) else None
        self._next_id, self._generation = log.reached_id, -1
        self._knobs: dict[str, Any] = {}
        self._lost = 0
        self._recent: OrderedDict[int, _Sampled] = OrderedDict()
        self._lock = ForkLock(f"the recorded gate {name!r}")
        self._hook = gate.register_forward_hook(self._routed)
        self._observe = gate.observe
        gate.observe = self._observed  # type: ignore[method-assign]
        with self._lock:
            self._checkpoint("attached")

    def detach(self) -> None:
        """Stop recording and restore the gate."""
        self._hook.remove()
        self.gate.__dict__.pop("observe", None)
        if self._belief is not None:
            self._belief.close()

    def _routed(self, gate: nn.Module, inputs: Any, routing: Routing) -> None:
        if gate is not self.gate or torch._C._current_graph_task_id() != -1:  # a copy of the model, or a recomputation
            return
        count = len(routing.expert_indices)
        with self._lock:
            sampled = np.flatnonzero(self._random.random(count) < self.rate)
            if not len(sampled) or not self._before(len(sampled)):
                return
            rows = torch.from_numpy(sampled).to(routing.expert_indices.device)
            ids = np.arange(self._next_id, self._next_id + len(sampled))
            self._next_id += len(sampled)
            self.log.reached_id = max(self.log.reached_id, self._next_id)
            self._put(routing, rows, int(ids[0]))
            key = id(routing.expert_indices)
            self._recent[key] = _Sampled(weakref.ref(routing.expert_indices), ids, rows)
            self._recent.move_to_end(key)
            if len(self._recent) > _REMEMBERED:
                self._recent.popitem(last=False)

    def _put(self, routing: Routing, rows: Tensor, first: int) -> None:
        clusters = routing.cluster_ids[rows].numpy(force=True)
        versions = np.zeros(len(clusters), dtype=np.uint32)
        members: Members | None = None
        if routing.members is not None:
            members = routing.members.ids[rows].numpy(force=True), routing.members.shares[rows].numpy(force=True)
        several: Columns | None = None
        if self._belief is not None:
            captured = self._belief.capture(self.source, clusters if members is None else members[0].reshape(-1))
            if captured is not None:
                self.log.put(captured, 400 + captured.alpha.nbytes + captured.beta.nbytes)
            versions = self._belief.versions[clusters]
            several = None if members is None else self._belief.members(*members)
        beliefs = self._beliefs(routing, rows)
        distance, scores = (part[rows].float().numpy(force=True) for part in (routing.distance, routing.scores))
        experts = routing.expert_indices[rows].numpy(force=True)
        columns = columns_of(clusters, distance, versions, experts, scores, np.zeros(len(clusters)))
        time, width = now(), 0 if members is None else members[0].shape[1]
        for piece in _pieces(len(clusters), self.gate.top_k * (1 if beliefs is None else 3), width):
            part = {name: column[piece] for name, column in columns.items()}
            held_of = None if beliefs is None else {name: column[piece] for name, column in beliefs.items()}
            theirs = slice(piece.start * width, piece.stop * width)
            their = None if several is None else {name: column[theirs] for name, column in several.items()}
            item = Many(self.source, time, first + piece.start, 0, part, their, held_of)
            held = [column for some in (part, their, held_of) if some is not None for column in some.values()]
            self.log.put(item, 600 + sum(column.nbytes for column in held))

    def _beliefs(self, routing: Routing, rows: Tensor) -> Columns | None:  # (M,)
        """Alpha and beta of the chosen experts, if a learned prior makes them specific to the token."""
        gate = self.gate
        if not isinstance(gate, BeliefGate) or gate.learned_prior is None:
            return None
        counts = gate.counts_of(routing.map(lambda part: part[rows])).numpy(force=True)
        return {"alpha": counts[:, 0].copy(), "beta": counts[:, 1].copy()}

    def _observed(self, routing: Routing, outcome: Tensor, *, dense: bool | None = None) -> None:
        self._observe(routing, outcome, dense=dense)
        with self._lock:
            sampled = self._recent.get(id(routing.expert_indices))
            if sampled is None or sampled.routing() is not routing.expert_indices:
                return  # not one of ours, or too long ago
            del self._recent[id(routing.expert_indices)]
            if not self._before(len(sampled.ids)):
                return
            values = outcome.to(sampled.rows.device)[sampled.rows]
            experts = routing.expert_indices[sampled.rows]
            if self.gate.slots_of(routing, outcome, dense) is None:
                values = values.gather(1, experts)
            signal, time = values.detach().double().numpy(force=True).copy(), now()
            for piece in _pieces(len(signal), signal.shape[1], 0):
                part = Resolved(self.source, time, 0, sampled.ids[piece], signal[piece])
                self.log.put(part, 400 + 2 * part.signal.nbytes)

    def _before(self, count: int) -> bool:
        if not self.log.admit():
            self._lost += count
            self.log.count_dropped("sampled", count)
            return False
        if self._lost:
            event = {"event": "dropped", "time": now(), "source": self.source, "name": self.name}
            self.log.put(Event(self.source, event | {"lost": {"sampled": self._lost}}))
            self._lost = 0
        gate = self.gate
        configured = _knobs_of(gate) != self._knobs
        if self._belief is not None and self._belief.outdated():
            self._checkpoint("changed from outside")
        elif configured or self._generation != self.log.generation:
            self._checkpoint("configured" if configured else "rotated")
        return True

    def _checkpoint(self, reason: str) -> None:
        gate = self.gate
        require_pool(gate)  # experts may have been added since
        named = _knobs_of(gate)
        require_knobs(named)
        self._knobs = named
        self._generation = self.log.generation
        settings: dict[str, Any] = {
            "source": self.source,
            "name": self.name,
            "kind": "gate",
            "reason": reason,
            "time": now(),
            "num_experts": gate.num_experts,
            "num_clusters": 1,
            "top_k": gate.top_k,
            "gate": type(gate).__name__,
            "rate": self.rate,
            "next_id": self._next_id,
            "knobs": named,
        }
        arrays: dict[str, NDArray[Any]] = {}
        if self._belief is not None and isinstance(gate, BeliefGate):
            settings["num_clusters"] = gate.num_clusters
            settings["options"] = gate.recorded_options
            arrays = self._belief.snapshot()
        size = 2000 + sum(array.nbytes for array in arrays.values())
        self.log.put(Marked(self.source, Checkpoint(settings, arrays), self._generation), size)


def _knobs_of(gate: Gate) -> dict[str, Any]:
    """How the gate's belief becomes decisions, and outcomes evidence."""
    return gate.recorded_knobs if isinstance(gate, BeliefGate) else {}


def _pieces(rows: int, top_k: int, width: int) -> list[slice]:
    """The rows of a forward in parts that each fit one record."""
    step = max(1, _PIECE // (16 + 8 * top_k + 12 * width))
    return [slice(start, min(rows, start + step)) for start in range(0, rows, step)]


class Attachment:
    """The recorded gates of one model; a context manager that ends the recording."""

    def __init__(self, recorders: list[GateRecorder]) -> None:
        self.recorders = recorders

    def detach(self) -> None:
        """Stop recording these gates."""
        for recorder in self.recorders:
            recorder.detach()

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()


def attach(log: Sink, model: nn.Module, rate: float, name: str, seed: int) -> Attachment:
    """See :meth:`AuditLog.attach`."""
    if not 0.0 < rate <= 1.0:
        raise InvalidArgumentError(f"rate must lie in (0, 1]; got {rate}")
    gates = {place: module for place, module in model.named_modules() if isinstance(module, Gate)}
    if not gates:
        raise InvalidArgumentError(f"model must hold at least one Gate; {type(model).__name__} holds none")
    if any("observe" in gate.__dict__ for gate in gates.values()):
        raise AuditError("a gate of this model is already being recorded")
    names = [f"{name}.{place}" if place else name for place in gates]
    for gate, full in zip(gates.values(), names, strict=True):  # check all of them before changing the first
        require_pool(gate)
        log.source_of(full)
    recorders = [
        GateRecorder(log, gate, full, rate, seed + index)
        for index, (gate, full) in enumerate(zip(gates.values(), names, strict=True))
    ]
    return Attachment(recorders)
