"""The posterior gate for those who route queries between agents: numpy in, decisions out, outcomes back whenever they come.

Dimensions: N queries, D embedding size, C clusters, E experts, k experts per query.
"""

import copy
from collections.abc import Mapping
from os import PathLike
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from moe_posterior.checks import validation
from moe_posterior.checks.declared import as_declared
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.files.tensorfile import save_plain
from moe_posterior.forking import ForkLock
from moe_posterior.gates import PosteriorGate, Routing, Rule
from moe_posterior.pending import COLUMNS, Members, Pending
from moe_posterior.router.decisions import Decision, Decisions
from moe_posterior.router.embeddings import clusters_for, read_embeddings
from moe_posterior.router.recorder import Audit, Recorder, require_audit
from moe_posterior.router.state import load_with, options_of

# A router's defaults: chosen on several streams, confirmed on others; see results/router.
DEFAULTS: dict[str, Any] = {"score": "race", "pooling": "hierarchy", "surprise": 8.0}

# cluster, distance, experts, scores, weights, alpha and beta, explored, members
_Choice = tuple[int, float, list[int], list[float], list[float], list[list[float]], bool, Members | None]


class PosteriorRouter:
    """Route queries to the experts that have proved competent on queries like them; learn from outcomes as they arrive.

    One lock guards the belief and the pending decisions: any number of threads may route and resolve.

    Args:
        num_experts, hidden_size: E, D.
        num_clusters: C. None (default) lets :meth:`fit` choose it from the number of its rows, see :func:`clusters_for`.
        top_k: experts per query; 1 (default) as in the paper.
        abstain_below: a decision whose score stays below it says ``abstain``; None (default) never does.
        max_pending: decisions that can wait for their outcome; older ones are forgotten, and resolving them is an error.
        audit: a :class:`moe_posterior.audit.AuditLog` that records every decision and outcome; None (default) records nothing.
        gate_options: everything else :class:`~moe_posterior.gates.PosteriorGate` takes. The defaults here suit a router, which sees
            the outcomes of nothing but its own choices: ``score="race"`` explores until the experts' bounds separate, so that it
            neither locks onto a wrong expert nor explores for ever; ``pooling="hierarchy"`` lets what is seen in one cluster speak
            in the others, and tells a drift of the whole pool from a failing expert; ``surprise=8`` gives up an expert that fails
            within some tens of queries, and goes on trying it ever more rarely. Another ``score`` keeps the gate's own defaults
            for all the rest, which are the paper's. ``lazy=True``: a resolve touches no more rows of the tables than the next
            queries ask for.

    Raises:
        InvalidArgumentError: an option out of range. NotFittedError: :meth:`route` before :meth:`fit`.

    Source: *Bayesian Posterior Routing in Multi-Agent Systems*.

    >>> embeddings = np.array([[0.0, 0.0], [0.0, 1.0], [9.0, 9.0], [9.0, 8.0]], dtype=np.float32)
    >>> router = PosteriorRouter(num_experts=3, hidden_size=2, num_clusters=2)
    >>> router.fit(embeddings)
    >>> for _ in range(30):  # only expert 2 ever succeeds
    ...     decision = router.route(embeddings[0])
    ...     router.resolve(decision.id, float(decision.expert == 2))
    >>> router.route(embeddings[0]).expert
    2
    """

    @as_declared
    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        num_clusters: int | None = None,
        *,
        top_k: int = 1,
        abstain_below: float | None = None,
        max_pending: int = 1_000_000,
        audit: Audit | None = None,
        **gate_options: Any,
    ) -> None:
        if max_pending < 1:
            raise InvalidArgumentError(f"max_pending must be at least 1; got {max_pending}")
        if isinstance(
            rule := gate_options.get("rule"), Rule
        ):  # as plain options: they are saved, and written to the log
            gate_options = {name: value for name, value in gate_options.items() if name != "rule"} | rule.options
        if gate_options.get("prior") is not None:
            raise InvalidArgumentError(
                "prior must be None for a router: its pending decisions do not hold what a learned prior expected"
            )
        if "score" not in gate_options:
            gate_options = {**DEFAULTS, **gate_options}
        self.options = {
            "num_experts": num_experts,
            "hidden_size": hidden_size,
            "num_clusters": num_clusters,
            "top_k": top_k,
            "abstain_below": abstain_below,
            "max_pending": max_pending,
            **gate_options,
        }
        require_audit(audit)
        self._chooses_clusters = num_clusters is None
        self.gate = self._new_gate(num_experts)
        self.abstain_below = abstain_below
        self.max_pending = max_pending
        self._lock = ForkLock("this router")
        self._next_id = 0
        self._pending = Pending(max_pending, top_k, 0 if self.gate.members is None else self.gate.members.width)
        self._tenure = np.zeros(num_experts, dtype=np.int32)  # rises when an expert leaves or is replaced
        self._audit = None if audit is None else audit.follow(self)

    @property
    def posterior(self) -> Any:
        """The belief, a :class:`~moe_posterior.BetaPosterior`. Take :meth:`locked` before reading it beside other threads."""
        return self.gate.posterior

    def locked(self) -> ForkLock:
        """The lock, as a context manager."""
        return self._lock

    @as_declared
    def fit(self, embeddings: ArrayLike, *, seed: int = 0) -> None:  # (N, D)
        """Find the clusters by k-means and drop all evidence and pending decisions, which belong to the old clusters.

        Without ``num_clusters`` their number follows from the rows, see :func:`clusters_for`, and ``gate`` is another one after.
        """
        with self._lock:
            self._may_change()
            rows = self._tensor(embeddings)
            if self._chooses_clusters:
                self._fit_own_number(rows, seed)
            else:
                self.gate.fit(rows, generator=torch.Generator().manual_seed(seed))
            self._pending.clear()
            self._tell("fit")

    @as_declared
    def warm_start(
        self,
        embeddings: ArrayLike,  # (N, D)
        outcomes: ArrayLike,  # (N, E), NaN where not known
        *,
        strength: float | None = None,
    ) -> None:
        """Turn what is known of the experts' past outcomes into the prior; see :meth:`BetaPosterior.warm_start`."""
        with self._lock:
            self._may_change()
            self.gate.warm_start(
                self._tensor(embeddings), validation.outcomes("outcomes", outcomes).double(), strength=strength
            )
            self._tell("warm start")

    def route(self, embedding: ArrayLike) -> Decision:  # (D,)
        """Decide where one query goes.

        Raises:
            InvalidArgumentError: the embedding is not (D,). NotFittedError: before :meth:`fit`.
        """
        vector = read_embeddings("embedding", embedding, (self.gate.hidden_size,))
        with torch.inference_mode(), self._lock:
            if self._audit is not None:
                self._audit.before()
            choice = self._choose_one(vector)
            cluster, distance, experts, scores, weights, (alphas, betas), explored, members = choice
            decision_id = self._next_id
            self._next_id += 1
            known = cluster if distance < np.inf else -1
            self._pending.put_one(decision_id, known, experts, self._tenure[experts], members)
            below = self.abstain_below is not None and not scores[0] >= self.abstain_below
            abstain = below or distance == np.inf
            why = (tuple(experts), tuple(weights), tuple(alphas), tuple(betas))
            decision = Decision(decision_id, experts[0], scores[0], cluster, distance, abstain, explored, *why)
            if self._audit is not None:
                self._audit.routed_one(decision, scores, members)
        return decision

    @torch.inference_mode()
    def route_batch(self, embeddings: ArrayLike) -> Decisions:  # (N, D)
        """Decide where a batch of queries goes; the same decisions as one after the other, as long as nothing is resolved."""
        hidden = self._tensor(embeddings)
        if len(hidden) > self.max_pending:
            raise InvalidArgumentError(
                f"embeddings must be at most max_pending={self.max_pending} rows; got {len(hidden)}"
            )
        with self._lock:
            if self._audit is not None:
                self._audit.before()
            ids = np.arange(self._next_id, self._next_id + len(hidden))
            routing = self.gate.route(hidden, torch.from_numpy(ids))
            experts, clusters = routing.expert_indices.numpy(), routing.cluster_ids.numpy()
            distance, scores = routing.distance.numpy(), routing.scores.numpy()
            counts = self.gate.counts_of(routing).numpy()
            explored = self._explored(routing)
            self._next_id += len(experts)
            members = _members_of(routing)
            self._remember(ids, clusters, experts, distance, members)
            abstain = np.isinf(distance)
            if self.abstain_below is not None:
                abstain |= ~(scores[:, 0] >= self.abstain_below)
            why = (routing.routing_weights.numpy(), counts[:, 0], counts[:, 1])
            decisions = Decisions(ids, experts, scores, clusters, distance, abstain, explored, *why)
            if self._audit is not None:
                self._audit.routed(decisions, members)
        return decisions

    def resolve(self, decision_id: int, outcome: float | ArrayLike) -> None:  # () or (k,)
        """Say how a decision turned out: a competence signal in [0, 1] for its expert, or one for each of its k; NaN = unknown.

        Raises:
            InvalidArgumentError: as :meth:`resolve_batch`.
        """
        signal = validation.tensor("outcome", outcome).reshape(1, -1)
        self.resolve_batch(validation.integers("decision_id", decision_id, ())[None], signal)

    def resolve_batch(self, ids: ArrayLike, outcomes: ArrayLike) -> None:  # (N,), (N,) or (N, k)
        """Say how decisions turned out, in any order and any time later, once each.

        Raises:
            InvalidArgumentError: an id that was never given, is resolved already, comes twice, or is older than ``max_pending``
                decisions; an expert that has left or been replaced since; an outcome outside [0, 1] or of a wrong shape.
                Nothing has changed.
        """
        wanted = np.atleast_1d(validation.integers("ids", ids).numpy(force=True))
        signal = validation.floats("outcomes", outcomes).to(torch.float64).numpy(force=True)
        given = signal.shape
        signal = signal[:, None] if signal.ndim == 1 else np.atleast_2d(signal)
        if wanted.ndim != 1:
            raise InvalidArgumentError(f"ids must be integers of shape (N,); got shape {wanted.shape}")
        expected = (len(wanted), self.gate.top_k)
        if signal.shape != expected and signal.size + len(wanted):  # nothing has any shape
            raise InvalidArgumentError(f"outcomes must have shape {expected}; got {given}")
        signal = signal.reshape(expected)
        with self._lock:
            if self._audit is None:
                self._learn(wanted, signal)
                return
            self._audit.before()
            try:
                self._learn(wanted, signal)
            except InvalidArgumentError as error:
                self._audit.refused(wanted, signal, str(error))
                raise
            self._audit.resolved(wanted, signal)

    @as_declared
    def add_expert(self, prior_from: Mapping[int, float] | None = None, *, strength: float = 4.0) -> int:
        """One more expert, its prior inherited from donors by overlap; returns its index. See :meth:`BetaPosterior.add_expert`."""
        with self._lock:
            self._may_change(1)
            index = self.gate.add_expert(prior_from, strength=strength)
            self._tenure = np.append(self._tenure, np.int32(0))
            self._tell(f"expert {index} added")
            return index

    @as_declared
    def remove_expert(self, expert: int) -> None:
        """Never choose this expert again; outcomes of its pending decisions will be refused."""
        with self._lock:
            self._may_change()
            self.gate.remove_expert(expert)
            self._tenure[expert] += 1
            self._tell(f"expert {expert} removed")

    @as_declared
    def replace_expert(
        self, expert: int, prior_from: Mapping[int, float] | None = None, *, strength: float = 4.0
    ) -> None:
        """A retrained expert in the same place; outcomes of its predecessor's pending decisions will be refused."""
        with self._lock:
            self._may_change()
            self.gate.replace_expert(expert, prior_from, strength=strength)
            self._tenure[expert] += 1
            self._tell(f"expert {expert} replaced")

    @as_declared
    def save(self, path: str | PathLike[str]) -> None:
        """Write options, clusters, belief and pending decisions to a file that :meth:`load` restores bit for bit.

        Raises:
            UnwritableFileError: the file system refuses; a file that was there before is as it was.
        """
        with self._lock:
            save_plain(path, self.state())

    @classmethod
    @as_declared
    def load(cls, path: str | PathLike[str], *, audit: Audit | None = None) -> "PosteriorRouter":
        """The router that :meth:`save` wrote; opening the file runs no code from it.

        Raises:
            MissingDataError: there is no such file. DamagedFileError: it is no router's, or cut short.
        """
        require_audit(audit)
        return load_with(lambda state: cls.from_state(state, audit=audit), path)

    def state(self) -> dict[str, Any]:
        """What :meth:`save` writes: plain values and tensors. The gate's tensors are the live ones."""
        with self._lock:
            return {
                "options": self.options,
                "gate": self.gate.state_dict(),
                "next_id": self._next_id,
                "tenure": torch.from_numpy(self._tenure),
                "pending": {name: torch.from_numpy(column) for name, column in self._pending.columns().items()},
            }

    @classmethod
    @as_declared
    def from_state(cls, state: Mapping[str, Any], *, audit: Audit | None = None) -> "PosteriorRouter":
        """The router whose :meth:`state` this was."""
        require_audit(audit)
        options = options_of(state)
        router = cls(**options | {"num_experts": len(state["tenure"])})
        router._chooses_clusters = options["num_clusters"] is None
        router.options = dict(options)
        router.gate.load_state_dict(state["gate"])
        router._next_id = state["next_id"]
        router._tenure = state["tenure"].numpy()
        waiting = {name: column.numpy() for name, column in state["pending"].items()}
        members = (waiting["members"], waiting["shares"]) if router._pending.width else None
        ids, clusters, experts, tenure = (waiting[name] for name in COLUMNS)
        router._pending.put(ids, clusters, experts, tenure, members)
        router._audit = None if audit is None else audit.follow(router)
        return router

    @property
    def pending(self) -> Pending:
        """The decisions whose outcome can still come. Take :meth:`locked` before reading it beside other threads."""
        return self._pending

    def record_with(self, recorder: Recorder) -> None:
        """Tell this recorder of every decision and outcome from now on, instead of any before it; logs call it."""
        self._audit = recorder

    def take_over(
        self,
        ids: NDArray,  # (N,), each one more than the one before
        clusters: NDArray,  # (N,), -1 for an embedding that was broken
        experts: NDArray,  # (N, k)
        members: Members | None = None,  # 2 x (N, J)
    ) -> None:
        """Hold decisions that were made elsewhere, as a log tells, as this router's own: pending, and the next id is behind them."""
        if not len(ids):
            return
        latest = slice(-self.max_pending, None)  # ids grow by one within a call: the last ones win their places
        several = None if members is None else (members[0][latest], members[1][latest])
        self._pending.put(ids[latest], clusters[latest], experts[latest], self._tenure[experts[latest]], several)
        self._next_id = int(ids[-1]) + 1

    def skip_ids(self, reached: int) -> None:
        """Never give an id up to ``reached`` again: callers may hold them, though this router does not know of them."""
        with self._lock:
            behind = reached - self._next_id
            if behind > 0:  # whole turns of the ring, so that new decisions overwrite the oldest pending ones first
                self._next_id += -(-behind // self.max_pending) * self.max_pending

    def _new_gate(self, num_experts: int, num_clusters: int | None = None) -> PosteriorGate:
        beside = ("num_experts", "hidden_size", "num_clusters", "top_k", "abstain_below", "max_pending")
        options = {"lazy": True} | {name: value for name, value in self.options.items() if name not in beside}
        clusters = num_clusters or self.options["num_clusters"] or options.get("neighbours", 1)  # None: the fewest
        return PosteriorGate(self.options["hidden_size"], num_experts, clusters, self.options["top_k"], **options)

    def _fit_own_number(self, rows: torch.Tensor, seed: int) -> None:  # (N, D)
        """Fit a gate with as many clusters as suit the rows, and put it in place of the present one."""
        wanted, old = clusters_for(len(rows)), self.gate
        if wanted > 1:
            wanted = min(wanted, len(rows.unique(dim=0)))
        wanted = max(wanted, self.options.get("neighbours", 1))
        new = self._new_gate(old.num_experts, wanted)
        new.fit(rows, generator=torch.Generator().manual_seed(seed))
        new.posterior.active.copy_(old.posterior.active)
        new.steps.copy_(old.steps)
        new.threshold = old.threshold
        new.configure(**old.knobs)
        self.gate = new
        self.options = {**self.options, "num_clusters": new.clusterer.num_clusters}

    def _tensor(self, embeddings: ArrayLike) -> torch.Tensor:  # (N, D) float32
        return torch.from_numpy(read_embeddings("embeddings", embeddings, ("N", self.gate.hidden_size)))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles hold what a saved router holds, and no audit log: a log has one writer."""
        with self._lock:
            return type(self).from_state, (copy.deepcopy(self.state()),)

    def _choose_one(self, vector: NDArray) -> "_Choice":  # (D,)
        """One query in numpy where the gate can: torch's overhead a call would be most of the time it takes."""
        found = self.gate.choose_one(vector, self._next_id)
        if found is not None:
            return *found, None
        routing = self.gate.route(torch.from_numpy(vector[None]), torch.tensor([self._next_id]))
        counts = self.gate.counts_of(routing)[0].tolist()
        explored = bool(self._explored(routing)[0])
        cluster, distance = int(routing.cluster_ids), float(routing.distance)
        parts = (routing.expert_indices, routing.scores, routing.routing_weights)
        experts, scores, weights = (part[0].tolist() for part in parts)
        return cluster, distance, experts, scores, weights, counts, explored, _members_of(routing)

    def _explored(self, routing: Routing) -> NDArray[np.bool_]:  # -> (N,)
        gate = self.gate
        if gate.exploration == 0 and gate.score not in ("thompson", "race"):
            return np.zeros(len(routing.cluster_ids), dtype=np.bool_)
        if gate.draws_by_steps:
            gate.steps += 1  # the next draws are others, also before an outcome arrives
        return (gate.greedy(routing) != routing.expert_indices).any(dim=1).numpy()

    def _learn(self, ids: NDArray, signal: NDArray) -> None:  # (N,), (N, k)
        slots = self._pending.require(ids, self._tenure, self._next_id)
        pending = self._pending
        sound = pending.cluster[slots] >= 0
        clusters = pending.members[slots] if pending.width else pending.cluster[slots].clip(min=0)
        shares = torch.from_numpy(pending.shares[slots]) if pending.width else None
        experts = torch.from_numpy(pending.experts[slots].astype(np.int64))
        signal = np.where(sound[:, None], signal, np.nan)
        rows, threshold = torch.from_numpy(clusters.astype(np.int64)), self.gate.threshold
        self.gate.posterior.observe(rows, torch.from_numpy(signal), experts, shares=shares, threshold=threshold)
        self.gate.steps.add_(1)
        pending.remove(ids)

    def _may_change(self, more: int = 0) -> None:
        if self._audit is not None:
            self._audit.may_change(self.gate.num_experts + more)

    def _tell(self, reason: str) -> None:
        if self._audit is not None:
            self._audit.changed(reason)

    def _remember(
        self, ids: NDArray, clusters: NDArray, experts: NDArray, distance: NDArray, members: Members | None
    ) -> None:
        self._pending.put(ids, np.where(np.isinf(distance), -1, clusters), experts, self._tenure[experts], members)


def _members_of(routing: Routing) -> Members | None:
    return None if routing.members is None else (routing.members.ids.numpy(), routing.members.shares.numpy())
