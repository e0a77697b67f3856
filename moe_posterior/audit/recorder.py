"""Records a router in an audit log, under the router's lock: a few appends, and the posterior rows behind each decision.

Dimensions: N decisions, M outcomes, R posterior rows, C clusters, E experts, k experts per decision.
"""

from operator import attrgetter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_posterior.audit.limits import require_router
from moe_posterior.audit.sink import Sink
from moe_posterior.audit.storage.clock import now
from moe_posterior.audit.storage.collect import Event, Many, Marked, One, Refused, Resolved, Rows
from moe_posterior.audit.storage.state import Checkpoint, require_knobs
from moe_posterior.audit.storage.tables import Columns
from moe_posterior.gates import BeliefGate, PosteriorGate
from moe_posterior.gates.rules import KNOBS
from moe_posterior.pending import Members
from moe_posterior.router import Decision, Decisions, PosteriorRouter

MAX_REFUSALS = 1000  # rows of one refused call that are kept; its reason says how many there were
_ONE_SIZE = 400  # approximate bytes of memory for the item of a single decision
_deciding = attrgetter(*KNOBS, "threshold")
Tables = tuple[NDArray, NDArray]  # 2 x (C, E)


def knobs_of(gate: PosteriorGate, abstain_below: float | None) -> tuple[Any, ...]:
    """What turns a router's belief into decisions and outcomes into evidence."""
    return (*_deciding(gate), abstain_below)


def columns_of(
    clusters: NDArray,  # (N,)
    distance: NDArray,  # (N,)
    versions: NDArray,  # (N,)
    experts: NDArray,  # (N, k)
    scores: NDArray,  # (N, k)
    flags: NDArray,  # (N,)
) -> Columns:
    """Decisions as a log keeps them; copies, because the caller may change its arrays."""
    return {
        "cluster": clusters.astype(np.uint32),
        "distance": distance.astype(np.float32),
        "version": versions.astype(np.uint32),
        "experts": experts.astype(np.uint16),
        "scores": scores.astype(np.float32),
        "flags": flags.astype(np.uint8),
    }


class BeliefTracker:
    """Which posterior rows of a gate are newer than what the log holds."""

    def __init__(self, gate: BeliefGate) -> None:
        self.gate = gate
        self.versions = np.zeros(gate.num_clusters, dtype=np.uint32)  # (C,)
        self.dirty = np.zeros(gate.num_clusters, dtype=np.bool_)  # (C,)
        self.notified = 0  # changes of the belief since the last check
        self._base: Tables | None = None  # prior pseudo-counts, as of the last snapshot
        self._evidence: Tables
        self._told: tuple[Tensor, ...] = ()  # what outcomes do not change, as of the last snapshot
        self._storage = 0  # where the evidence lay then
        self._suspect = False
        self.close = gate.subscribe(self._touch)  # ends the tracking

    def _touch(self, cluster_ids: Tensor | None) -> None:
        self.notified += 1
        if cluster_ids is None:
            self.dirty[:] = self._suspect = True
        else:
            self.dirty[cluster_ids.numpy(force=True)] = True

    def capture(self, source: int, clusters: NDArray) -> Rows | None:  # (N,)
        """The rows behind decisions in these clusters that the log does not hold yet."""
        if self.gate.reads_other_clusters:  # the pooled record of all clusters counts in each
            clusters = np.arange(len(self.dirty))
        wanted = np.zeros_like(self.dirty)
        wanted[clusters] = True
        wanted &= self.dirty
        rows = np.flatnonzero(wanted)
        if not len(rows):
            return None
        self.dirty[rows] = False
        self.versions[rows] += 1
        return Rows(source, rows, self.versions[rows], *self._cells(rows))

    def capture_one(self, source: int, cluster: int) -> Rows | None:
        """:meth:`capture` of one cluster."""
        if not self.dirty[cluster] or self.gate.reads_other_clusters:
            return self.capture(source, np.array([cluster]))
        self.dirty[cluster] = False
        version = self.versions[cluster] + 1
        self.versions[cluster] = version
        return Rows(source, [cluster], [version], *self._cells(slice(cluster, cluster + 1)))

    def members(self, ids: NDArray, shares: NDArray) -> Columns:  # 2 x (N, J)
        """The log's columns for queries in several clusters, whose rows were captured."""
        flat = ids.reshape(-1)
        return {
            "cluster": flat.astype(np.uint32),
            "version": self.versions[flat],
            "share": shares.reshape(-1).astype(np.float32),
        }

    def outdated(self) -> bool:
        """Whether the belief's prior, pool or storage changed since the last snapshot, so that no row can be captured."""
        if self.gate.posterior.successes.data_ptr() != self._storage:
            return True
        suspect, self._suspect = self._suspect, False
        return suspect and not all(map(torch.equal, self._given(), self._told))

    def _given(self) -> tuple[Tensor, ...]:
        belief = self.gate.posterior
        plain = () if self._base is None else (belief.trust,)  # otherwise it changes with outcomes
        return (belief.prior_alpha, belief.prior_beta, belief.active, *plain)

    def _cells(self, rows: NDArray | slice) -> tuple[NDArray, NDArray, Tables | None, bool]:
        """Copies of the parts of alpha and beta of these rows; the writer's thread adds them up."""
        if self._base is None:
            ids = np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
            device = self.gate.posterior.successes.device
            alpha, beta = self.gate.posterior.parameters_of(torch.from_numpy(ids).to(device))
            return alpha.numpy(force=True), beta.numpy(force=True), None, False
        successes, failures = self._evidence
        if isinstance(rows, slice):
            return successes[rows].copy(), failures[rows].copy(), self._base, False
        if 4 * len(rows) > len(successes):  # copying everything is cheaper than picking much of it
            return successes.copy(), failures.copy(), self._base, True
        return successes.take(rows, axis=0), failures.take(rows, axis=0), self._base, False

    def _prepare(self) -> None:
        """If the prior is fixed and cells are independent, alpha and beta are the prior plus the counts."""
        belief = self.gate.posterior
        self._base = None
        plain = not belief.pools and belief.noise is None and belief.surprise is None
        if plain and belief.successes.device.type == "cpu":
            self._base = ((belief.prior_alpha * belief.trust).numpy(), (belief.prior_beta * belief.trust).numpy())
            self._evidence = (belief.successes.numpy(), belief.failures.numpy())

    def snapshot(self) -> dict[str, NDArray[Any]]:
        """All rows at once; the log then holds them."""
        self.versions[self.dirty] += 1
        self.dirty[:] = False
        self.notified = 0
        self._prepare()
        belief = self.gate.posterior
        self._told = tuple(tensor.clone() for tensor in self._given())
        self._storage, self._suspect = belief.successes.data_ptr(), False
        alpha, beta = belief.parameters_of()
        arrays = {"alpha": alpha, "beta": beta, "active": belief.active, "radius": self.gate.clusterer.radius}
        return {"versions": self.versions.copy(), **{n: t.detach().numpy(force=True).copy() for n, t in arrays.items()}}


class RouterRecorder:
    """The :class:`~moe_posterior.router.Recorder` that writes to an audit log."""

    def __init__(self, log: Sink, router: PosteriorRouter, source: int, name: str, reason: str) -> None:
        gate = router.gate
        require_router(router)
        self.log, self.router, self.source, self.name = log, router, source, name
        self._belief = BeliefTracker(gate)
        self._generation = -1
        self._knobs: tuple[Any, ...] = ()
        self._steps = 0
        self._owed: str | None = None  # a change still to be recorded
        self._fallen: NDArray[np.bool_] | None = (
            None  # (E,) whom the draws of a race treat apart, as the log last heard
        )
        self._lost: dict[str, int] = {}  # what was dropped since the log last had room
        self._open = True  # whether the current call is recorded
        with router.locked():
            router.skip_ids(log.reached_id)
            self.checkpoint(reason)

    def may_change(self, num_experts: int) -> None:
        self.log.require_open()
        require_router(self.router, num_experts)

    def before(self) -> None:
        self._open = self.log.admit()
        if not self._open:
            return
        reason = None
        if self._lost:
            reason = "resumed after a gap"
            dropped = {"event": "dropped", "time": now(), "lost": self._lost, **self._source()}
            self.log.put(Event(self.source, dropped))
            self._lost = {}
        elif self._owed is not None:
            reason = self._owed
        elif self._belief.notified:
            reason = "changed from outside"
        elif knobs_of(self.router.gate, self.router.abstain_below) != self._knobs:
            reason = "configured"
        elif self._generation != self.log.generation:
            reason = "rotated"
        if reason is not None:
            self.checkpoint(reason)

    def routed_one(self, decision: Decision, scores: list[float], members: Members | None = None) -> None:
        if members is not None:
            self.routed(_as_batch(decision, scores), members)
            return
        if not self._open:
            self._drop("decisions", 1)
            return
        belief, cluster = self._belief, decision.cluster
        if belief.dirty[cluster] and (row := belief.capture_one(self.source, cluster)) is not None:
            self.log.put(row, 800)
        self.log.reached_id = max(self.log.reached_id, decision.id + 1)
        if self.router.gate.chooses_per_token:
            self._steps = int(self.router.gate.steps)
        flags = decision.abstain + 2 * decision.explored
        made = (cluster, decision.distance, belief.versions[cluster], list(decision.experts), scores, flags)
        self.log.put(One(self.source, now(), decision.id, self._steps, *made), _ONE_SIZE)

    def routed(self, decisions: Decisions, members: Members | None = None) -> None:
        ids, clusters = decisions.ids, decisions.clusters
        if not self._open:
            self._drop("decisions", len(ids))
            return
        rows = self._belief.capture(self.source, clusters if members is None else members[0].reshape(-1))
        if rows is not None:
            self.log.put(rows, 400 + rows.alpha.nbytes + rows.beta.nbytes)
        if self.router.gate.chooses_per_token:
            self._steps = int(self.router.gate.steps)
        flags = decisions.abstain + 2 * decisions.explored.view(np.uint8)
        why = (self._belief.versions[clusters], decisions.experts, decisions.scores, flags)
        columns = columns_of(clusters, decisions.distance, *why)
        first = int(ids[0]) if len(ids) else 0
        self.log.reached_id = max(self.log.reached_id, first + len(ids))
        several = None if members is None else self._belief.members(*members)
        item = Many(self.source, now(), first, self._steps, columns, several)
        held = [*columns.values(), *(() if several is None else several.values())]
        self.log.put(item, 600 + sum(column.nbytes for column in held))

    def resolved(self, ids: NDArray, outcomes: NDArray) -> None:  # (M,), (M, k)
        if not self._open:
            self._drop("outcomes", len(ids))
            return
        self._steps += 1
        if self._fallen is not None and not np.array_equal(self._fallen, self.router.gate.fallen.numpy()):
            self._owed = self._owed or "trust changed"
        self._belief.notified -= 1  # if the belief was also changed from outside, the next call writes a checkpoint
        item = Resolved(self.source, now(), self._steps, ids.astype(np.int64), np.array(outcomes, dtype=np.float64))
        self.log.put(item, 400 + item.ids.nbytes + item.signal.nbytes)

    def refused(self, ids: NDArray, outcomes: NDArray, reason: str) -> None:
        if not self._open:
            self._drop("refusals", 1)
            return
        top_k = outcomes.shape[1]
        if len(ids) * top_k > MAX_REFUSALS:
            reason = f"{reason} (one of {len(ids)} refused together)"
        kept = ids.astype(np.int64)[: max(1, MAX_REFUSALS // top_k)]
        slots = np.tile(np.arange(top_k), len(kept))
        signal = outcomes[: len(kept)].reshape(-1).copy()
        item = Refused(self.source, now(), np.repeat(kept, top_k), slots, signal, reason[:400])
        self.log.put(item, 800 + 24 * len(slots))

    def changed(self, reason: str) -> None:
        if self.log.has_room():
            self.checkpoint(reason)
        else:  # it has happened; the next call records it or raises
            self._owed = reason

    def checkpoint(self, reason: str) -> None:
        """Record the complete state; under the router's lock."""
        router, gate = self.router, self.router.gate
        require_router(router)  # somebody may have added experts to its gate
        knobs = knobs_of(gate, router.abstain_below)
        named = dict(zip((*KNOBS, "threshold", "abstain_below"), knobs, strict=True))
        require_knobs(named)
        self._generation, self._knobs = self.log.generation, knobs
        self._steps, self._owed = int(gate.steps), None
        self._fallen = gate.fallen.numpy().copy() if gate.score == "race" else None
        if self._belief.gate is not gate:  # a fit chose another number of clusters
            self._belief = BeliefTracker(gate)
        state = router.state()
        settings = {
            **self._source(),
            "kind": "router",
            "reason": reason,
            "time": now(),
            "num_experts": gate.num_experts,
            "num_clusters": gate.num_clusters,
            "top_k": gate.top_k,
            "knobs": named,
            "options": state["options"],
            "next_id": state["next_id"],
        }
        arrays = self._belief.snapshot() | {"tenure": state["tenure"].numpy().copy()}
        arrays |= {f"gate.{name}": tensor.numpy(force=True).copy() for name, tensor in state["gate"].items()}
        arrays |= {f"pending.{name}": tensor.numpy() for name, tensor in state["pending"].items()}
        size = 2000 + sum(array.nbytes for array in arrays.values())
        self.log.put(Marked(self.source, Checkpoint(settings, arrays), self._generation), size)

    def _source(self) -> dict[str, Any]:
        return {"source": self.source, "name": self.name}

    def _drop(self, what: str, count: int) -> None:
        self._lost[what] = self._lost.get(what, 0) + count
        self.log.count_dropped(what, count)


def _as_batch(decision: Decision, scores: list[float]) -> Decisions:
    own = (
        decision.id,
        decision.experts,
        scores,
        decision.cluster,
        decision.distance,
        decision.abstain,
        decision.explored,
    )
    fields = (*own, decision.weights, decision.alphas, decision.betas)
    return Decisions(*(np.array([field]) for field in fields))
