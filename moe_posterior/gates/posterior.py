"""The Beta-competence gate: a token's cluster, and in it the experts that have proved competent.

Dimensions: N tokens, D hidden size, C clusters, E experts, k experts per token.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_posterior import beta as beta_functions
from moe_posterior.checks.declared import as_declared
from moe_posterior.clustering import Clusterer
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.evidence import ProxyNoise, novelty_weight
from moe_posterior.gates import race
from moe_posterior.gates.base import Routing, SharedRouting, refuse_export
from moe_posterior.gates.belief import BeliefGate
from moe_posterior.gates.rules import Rule, rule_of
from moe_posterior.kernels import cpu, dispatch, reference
from moe_posterior.memberships import Memberships, SeveralClusters, mixed, mixed_at
from moe_posterior.posterior import BetaPosterior, Pooling

Score = Literal["lcb", "mean", "quantile", "thompson", "race"]
Novelty = Literal["off", "discount", "class"]
_ROW_BITS = 32  # of a draw's number, for the row of the batch; the rest counts observe calls
KNOBS = ("score", "risk_aversion", "credible_level", "temperature", "exploration")


class PosteriorGate(BeliefGate):
    """Route by proven competence: the k experts with the highest lower confidence bound in the token's cluster.

    The gate reads its :class:`BetaPosterior` and keeps no counts of its own. Where score, choice and weights depend on the
    cluster alone, they stand in tables ``topk_indices``, ``topk_weights``, ``topk_scores`` (C, k), refreshed when the belief or
    a knob changes; a forward is then one matrix product and a gather. Thompson draws, exploration and novelty make the choice
    depend on the token, and take the slower per-token path. Exact ties go to the lowest ``(e - c) mod E``.

    Args:
        hidden_size, num_experts, num_clusters, top_k: D, E, C, k.
        rule: how competence becomes a score, for instance ``LCB(2.0)`` or ``Quantile(0.1)``, see :mod:`moe_posterior.gates.rules`; None
            (default) takes the options that follow.
        score: ``"lcb"`` (default) mean − λ·std; ``"mean"``; ``"quantile"`` the exact lower credible bound; ``"thompson"`` one draw
            per token, which explores; ``"race"`` ranks by ``lcb`` and explores while, and where, the bounds do not yet tell the experts
            apart: one draw per token among those that may still be the best, see :mod:`moe_posterior.gates.race`. The scores of a
            routing are then the bounds, whoever was drawn.
        risk_aversion: λ ≥ 0 of ``lcb``, in posterior standard deviations. 1 (default) is the paper's conservative posture.
        credible_level: probability, in (0, 1), that competence lies below the ``quantile`` score; default 0.05.
        temperature: > 0; weights are ``softmax(score / temperature)`` over the chosen. Competence lives in [0, 1], so the default
            0.1 lets a lead of 10 points weigh e times as much.
        threshold: None counts outcomes fractionally; τ in [0, 1] binarises them (the paper).
        exploration: share of tokens, in [0, 1), whose last slot goes to a random other expert, so that no expert is locked out
            for ever; default 0. To explore without touching the output, keep it 0 and ask :meth:`shadow`.
        novelty: what a token farther than its cluster's radius is taken for. ``"off"`` (default): any other member. ``"discount"``: it
            relies less on the cluster's evidence and more on the experts' pooled record, see
            :func:`~moe_posterior.evidence.novelty_weight`, so that its scores fall and ``abstain`` fires. ``"class"``: all such tokens
            form a class of their own, one more row of the belief, so that which experts cope with the unknown is learned at once.
        prior_alpha, prior_beta, half_life, shrinkage, surprise, pooling: of the belief, see :class:`BetaPosterior`.
        false_positive_rate, false_negative_rate: known error rates of the outcomes; counts are de-biased by them.
        lazy: where a change of the belief touches every cluster, as under ``shrinkage``, refresh a row of the tables when it is next
            needed: for many clusters and experts and few tokens at a time. Such a gate cannot be compiled to one graph.
        clusterings: M, how many k-means runs of ``num_clusters`` each speak for a token, from different draws; the pseudo-counts that
            they give it are averaged. 1 (default) is the paper's. 4 move single accidents of a run out of the way: the scores rank
            better for abstention, at M times the rows and a slower single query.
        neighbours: H, how many of the nearest clusters of each run a token belongs to; 1 (default) is the nearest alone. With more,
            outcomes are shared among them, see :class:`~moe_posterior.memberships.SeveralClusters`. Neither goes with
            ``novelty="class"`` or ``levels=2``; with either, choices depend on the token and take the per-token path.
        softness: how far the shares spread over the ``neighbours``; positive, in units of a token's mean squared distance to its
            centroid. Default 0.1.
        levels: 2 looks for the nearest of many clusters in two steps, faster and approximately, see :class:`Clusterer`.
        seed: start of the draws. They depend on (seed, number of ``observe`` calls) alone: a forward run twice, as under
            activation checkpointing, draws the same. A router numbers its decisions instead, see :meth:`route`.
        backend: ``"auto"`` or ``"eager"`` or ``"triton"``, see ``kernels/dispatch.py``.

    Raises:
        InvalidArgumentError: a knob out of range. NotFittedError: called before :meth:`fit`.

    Source: *Bayesian Posterior Routing in Multi-Agent Systems*, "Posterior Routing Mechanism and Calibration Framework".

    >>> hidden = torch.tensor([[0.0, 0.0], [0.0, 1.0], [9.0, 9.0], [9.0, 8.0]])
    >>> gate = PosteriorGate(hidden_size=2, num_experts=3, num_clusters=2, top_k=1)
    >>> gate.fit(hidden)
    >>> gate.observe(gate(hidden), torch.tensor([[0.0, 1.0, 0.0]] * 4))  # expert 1 is right everywhere
    >>> gate(hidden).expert_indices.flatten().tolist()
    [1, 1, 1, 1]
    """

    topk_indices: Tensor  # (C, k) int64
    topk_weights: Tensor  # (C, k) float32
    topk_scores: Tensor  # (C, k) float32
    topk_counts: Tensor  # (C, 2, k) float64, alpha and beta of the chosen
    believed: Tensor  # (C, 2, E) float64, alpha and beta of all experts; with score="race" alone
    unsettled: Tensor  # (C,) bool, clusters in which score="race" still draws
    stale: Tensor  # (C,) bool, rows that a lazy gate must rewrite before use
    steps: Tensor  # () int64, observe calls so far
    score: Score
    risk_aversion: float
    credible_level: float
    temperature: float
    exploration: float
    novelty: Novelty

    @as_declared
    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        num_clusters: int = 32,
        top_k: int = 2,
        *,
        rule: Rule | None = None,
        score: Score = "lcb",
        risk_aversion: float = 1.0,
        credible_level: float = 0.05,
        temperature: float = 0.1,
        threshold: float | None = None,
        exploration: float = 0.0,
        novelty: Novelty = "off",
        prior_alpha: float = 1.0,
        prior_beta: float = 1.0,
        half_life: float | None = None,
        shrinkage: float | None = None,
        surprise: float | None = None,
        pooling: Pooling = "odds",
        false_positive_rate: float = 0.0,
        false_negative_rate: float = 0.0,
        clusterings: int = 1,
        neighbours: int = 1,
        softness: float = 0.1,
        lazy: bool = False,
        levels: int = 1,
        seed: int = 0,
        backend: dispatch.Backend = "auto",
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k)
        named: dict[str, Any] = {"score": score, "risk_aversion": risk_aversion, "credible_level": credible_level}
        if rule is not None:
            named |= rule.options
        noisy = false_positive_rate != 0 or false_negative_rate != 0
        if novelty not in get_args(Novelty):
            raise InvalidArgumentError(f"novelty must be one of {list(get_args(Novelty))}; got {novelty!r}")
        self.clusterer = Clusterer(num_clusters, hidden_size, outliers=novelty == "class", levels=levels)
        members = SeveralClusters(num_clusters, hidden_size, clusterings, neighbours, softness)
        self.members = members if members.width > 1 else None
        if self.members is not None and (novelty == "class" or levels != 1):
            raise InvalidArgumentError(
                f"clusterings and neighbours must be 1 with novelty='class' or levels=2; got {clusterings} and {neighbours}"
            )
        self.posterior = BetaPosterior(
            clusterings * self.clusterer.num_classes,
            num_experts,
            prior_alpha=prior_alpha,
            prior_beta=prior_beta,
            half_life=half_life,
            shrinkage=shrinkage,
            surprise=surprise,
            pooling=pooling,
            noise=ProxyNoise(false_positive_rate, false_negative_rate) if noisy else None,
            clusterings=clusterings,
        )
        if threshold is not None and not 0.0 <= threshold <= 1.0:
            raise InvalidArgumentError(f"threshold must lie in [0, 1] or be None; got {threshold}")
        self.novelty = novelty
        self.threshold, self.lazy, self.seed, self.backend = threshold, lazy, named.pop("seed", seed), backend
        self._views = cpu.Views()
        table = (self.posterior.num_clusters, top_k)
        self.register_buffer("topk_indices", torch.zeros(table, dtype=torch.int64), persistent=False)
        self.register_buffer("topk_weights", torch.zeros(table, dtype=torch.float32), persistent=False)
        self.register_buffer("topk_scores", torch.zeros(table, dtype=torch.float32), persistent=False)
        self.register_buffer("topk_counts", torch.zeros(table[0], 2, top_k, dtype=torch.float64), persistent=False)
        self.register_buffer("believed", torch.zeros(table[0], 2, 0, dtype=torch.float64), persistent=False)
        self.register_buffer("unsettled", torch.zeros(table[0], dtype=torch.bool), persistent=False)
        self.register_buffer("stale", torch.ones(table[0], dtype=torch.bool), persistent=False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.configure(**named, temperature=temperature, exploration=exploration)
        self.posterior.subscribe(self.refresh)

    def configure(  # type: ignore[override]  # by name, so that each knob is documented and checked
        self,
        *,
        score: Score | None = None,
        risk_aversion: float | None = None,
        credible_level: float | None = None,
        temperature: float | None = None,
        exploration: float | None = None,
    ) -> None:
        """Change how competence becomes a decision, on the same belief; what is None stays as it is.

        Raises:
            InvalidArgumentError: a value out of range; nothing has changed.
        """
        given = {
            "score": score,
            "risk_aversion": risk_aversion,
            "credible_level": credible_level,
            "temperature": temperature,
            "exploration": exploration,
        }
        given = {name: value for name, value in given.items() if value is not None}
        _validate_knobs(given, self.seed)
        for name, value in given.items():
            setattr(self, name, value)
        self.refresh(None)

    @property
    def knobs(self) -> dict[str, Any]:
        """What :meth:`configure` changes, as it stands."""
        return {name: getattr(self, name) for name in KNOBS}

    @property
    def rule(self) -> Rule:
        """How competence becomes a score, as the knobs stand; see :mod:`moe_posterior.gates.rules`."""
        return rule_of(self.score, self.risk_aversion, self.credible_level, self.seed)

    @property
    def num_configurations(self) -> int:
        """The clusters: what this gate chooses depends on nothing else."""
        return self.num_clusters

    def configurations(self, routing: Routing) -> Tensor:  # -> (N,) int64
        """The cluster of every token."""
        return routing.cluster_ids

    @property
    def recorded_options(self) -> dict[str, Any]:
        """As :attr:`BeliefGate.recorded_options`."""
        several = {} if self.members is None else {n: getattr(self.members, n) for n in ("clusterings", "neighbours")}
        return {"novelty": self.novelty, **several}

    @property
    def reads_other_clusters(self) -> bool:
        """With ``novelty="discount"`` the pooled record of all clusters speaks in each."""
        return self.novelty == "discount"

    @property
    def chooses_per_token(self) -> bool:
        """Whether a choice depends on more than the cluster, so that the tables cannot answer it."""
        drawn = self.score in ("thompson", "race") or self.exploration > 0
        return drawn or self.novelty == "discount" or self.members is not None

    @property
    def races_by_table(self) -> bool:
        """Whether the tables answer for clusters whose race is over, see ``unsettled``."""
        alone = self.exploration == 0 and self.novelty != "discount" and self.members is None
        return self.score == "race" and alone

    @property
    def draws_by_steps(self) -> bool:
        """Whether draws depend on ``steps``, which whoever decides often between outcomes must count up."""
        return self.score == "thompson" or self.exploration > 0

    @property
    def fitted(self) -> bool:
        """Whether there are centroids."""
        return self.clusterer.fitted and (self.members is None or self.members.fitted)

    @as_declared
    def fit(self, hidden: Tensor, *, generator: torch.Generator | None = None) -> None:  # (..., D)
        """As :meth:`BeliefGate.fit`, in every clustering."""
        self.clusterer.fit(hidden, generator=generator)
        if self.members is not None:
            self.members.fit(self.clusterer, hidden, generator)
        self.posterior.reset(prior=True)

    @as_declared
    def warm_start(
        self,
        hidden: Tensor,  # (N, D)
        outcome: Tensor,  # (N, E)
        *,
        strength: float | None = None,
    ) -> None:
        """Turn held-out outcomes of all experts into the prior; NaN = not observed. See :meth:`BetaPosterior.warm_start`."""
        self.validate_hidden(hidden)
        assignment, members = self.assign(hidden)
        ids, shares = (assignment.cluster_ids, None) if members is None else members
        self.posterior.warm_start(ids, outcome, shares=shares, strength=strength, threshold=self.threshold)

    def forward(self, hidden: Tensor) -> Routing:  # (N, D)
        """Choose experts for every token; changes no state.

        A row that holds NaN or inf is routed as cluster 0 with distance inf, and observing it adds no evidence.
        """
        alone = (
            isinstance(hidden, Tensor)
            and hidden.shape == (1, self.hidden_size)
            and self.backend == "auto"
            and cpu.applies(hidden)
        )
        modules: dict[str, Any] = self._modules  # read directly: nn.Module's attribute access takes half a microsecond
        if alone and not self.lazy and not self.chooses_per_token and modules["clusterer"].fitted:
            return self._forward_one(hidden)
        return self.route(hidden)

    def route(self, hidden: Tensor, numbers: Tensor | None = None) -> Routing:  # (N, D), (N,) int64
        """:meth:`forward`, with the numbers that the draws of ``score="race"`` depend on: by default the ``observe`` calls so far and
        the row, so that a forward run twice draws the same."""
        self.validate_hidden(hidden)
        self.clusterer.require_fitted()
        if self.chooses_per_token:
            return self._forward_per_token(hidden, numbers)
        if self.lazy:
            ids, distance = self.clusterer(hidden)
            self.refresh_rows(ids)
            return Routing(self.topk_indices[ids], self.topk_weights[ids], ids, self.topk_scores[ids], distance)
        assignment, selection, weights = dispatch.route_by_table(
            hidden,
            self.clusterer.prepared,
            self.topk_indices,
            self.topk_weights,
            self.topk_scores,
            backend=self.backend,
        )
        return Routing(selection.expert_indices, weights, assignment.cluster_ids, selection.scores, assignment.distance)

    def learn(self, routing: Routing, outcome: Tensor, slots: Tensor | None) -> None:  # (N, k) or (N, E)
        """Add the outcomes to the belief and refresh the tables of the touched clusters."""
        members = self._members_of(routing)
        ids, shares = (routing.cluster_ids, None) if members is None else members
        self.posterior.observe(ids, outcome, slots, shares=shares, threshold=self.threshold)
        self.steps.add_(1)

    def measure(self, hidden: Tensor, outcome: Tensor) -> None:  # (N, D), (N, E)
        """Count how every expert did on these rows as evidence."""
        self.observe(self(hidden), outcome, dense=True)

    @torch.no_grad()
    def shadow(self, routing: Routing, rate: float) -> Tensor:  # -> (N,) int64
        """Draw for a share of tokens an expert that was not chosen, to be tried beside the answer; -1 for the others.

        Its outcome is observed through ``posterior.observe(cluster_ids, outcome[:, None], experts[:, None])``, with
        ``routing.members`` in place of the ids where a token has several clusters, ``observe(ids, ..., shares=shares)``, and the
        output of the layer stays untouched: exploration without risk, at the cost of the extra evaluation.

        Raises:
            InvalidArgumentError: ``rate`` outside [0, 1].
        """
        if not 0.0 <= rate <= 1.0:
            raise InvalidArgumentError(f"rate must lie in [0, 1]; got {rate}")
        generator = self._generator(routing.expert_indices.device, "shadow")
        other = self._random_others(routing.expert_indices, generator)
        drawn = torch.rand(len(other), generator=generator, device=other.device) < rate
        return torch.where(drawn, other, -1)

    @as_declared
    def add_expert(self, prior_from: Mapping[int, float] | None = None, *, strength: float = 4.0) -> int:
        """One more expert; returns its index. Append its module to the layer's experts yourself. See BetaPosterior."""
        index = self.posterior.add_expert(prior_from, strength=strength)
        self.num_experts += 1
        return index

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, score={self.score!r}, risk_aversion={self.risk_aversion:g}"

    def competence_scores(self, cluster_ids: Tensor | None = None) -> Tensor:  # (M,) -> (M, E) float64
        """What experts are ranked by in the given clusters (None: in all C); ``thompson`` ranks by draws around these means.

        Experts that were removed score -inf.
        """
        return self._scores(*self.posterior.parameters_of(cluster_ids), None)

    @property
    def reweighs(self) -> bool:
        return not self.chooses_per_token

    def reweigh(self, hidden: Tensor, routing: Routing, expert_indices: Tensor) -> Routing:  # (N, D), _, (N, k)
        if not self.reweighs:
            return super().reweigh(hidden, routing, expert_indices)
        chosen = self.competence_scores(routing.cluster_ids).gather(1, expert_indices)
        weights = reference.weigh(chosen, self.temperature).float()
        return routing._replace(expert_indices=expert_indices, routing_weights=weights, scores=chosen.float())

    def _scores(self, alpha: Tensor, beta: Tensor, generator: torch.Generator | None) -> Tensor:  # (M, E)
        return self.rule(alpha, beta, generator).masked_fill(~self.posterior.active, -torch.inf)

    def _forward_one(self, hidden: Tensor) -> Routing:  # (1, D)
        """One token by the tables, in numpy."""
        vector = (hidden.detach() if hidden.requires_grad else hidden).numpy()[0]
        cluster, distance, (indices, weights, scores, _) = self.assign_one(vector)
        tensor, array = torch.from_numpy, np.array
        return Routing(
            tensor(indices[cluster].copy()),
            tensor(weights[cluster].copy()),
            tensor(array([cluster])),
            tensor(scores[cluster].copy()),
            tensor(array([distance], np.float32)),
        )

    def assign_one(self, vector: NDArray) -> tuple[int, float, tuple[NDArray, ...]]:  # (D,) float32
        """Cluster and distance of one token, and numpy views of the tables: indices, weights, scores, counts; (C, 1, …) each."""
        own: dict[str, Any] = self._buffers  # as in forward
        clusterer: Any = self._modules["clusterer"]
        buffers = clusterer._buffers
        centroids: tuple[Tensor, ...] = buffers["centroids"], buffers["directions"], buffers["offsets"]
        if clusterer.outliers:
            centroids += (buffers["radius"],)
        tables = own["topk_indices"], own["topk_weights"], own["topk_scores"], own["topk_counts"]
        return self._views.assign_one(vector, centroids, tables)

    @torch.no_grad()
    def _forward_per_token(self, hidden: Tensor, numbers: Tensor | None) -> Routing:
        assignment, members = self.assign(hidden)
        generator = self._generator(hidden.device, "route") if self.draws_by_steps else None
        alpha, beta = self._believed(assignment, members)
        scores = self._scores(alpha, beta, generator)
        selection = reference.select(scores, assignment.cluster_ids, self.top_k)
        if self.score == "race":
            chosen = self._raced(alpha, beta, selection.expert_indices, numbers)
            only = torch.ones_like(scores, dtype=torch.bool).scatter_(1, chosen, False)
            selection = reference.select(scores.masked_fill(only, -torch.inf), assignment.cluster_ids, self.top_k)
        indices, chosen = selection.expert_indices, selection.scores
        if generator is not None and self.exploration > 0 and int(self.posterior.active.sum()) > self.top_k:
            drawn = torch.rand(len(indices), generator=generator, device=indices.device) < self.exploration
            other = self._random_others(indices, generator)
            last = torch.where(drawn, other, indices[:, -1])
            indices = torch.cat([indices[:, :-1], last[:, None]], dim=1)
            chosen = scores.gather(1, indices)
        weights = reference.weigh(chosen, self.temperature).float()
        routing = Routing(indices, weights, assignment.cluster_ids, chosen.float(), assignment.distance)
        return routing if members is None else SharedRouting.of(routing, members)

    def _raced(
        self, alpha: Tensor, beta: Tensor, leaders: Tensor, numbers: Tensor | None
    ) -> Tensor:  # 2 x (N, E), (N, k), (N,)
        """The experts that the tokens' draws say, on the host, so that a choice is the same wherever it is made again."""
        refuse_export()
        if numbers is None:
            numbers = (int(self.steps) << _ROW_BITS) + torch.arange(len(alpha))
        running = self._running(alpha, beta, leaders)
        chosen = running.leaders.copy()
        rows = np.flatnonzero(running.open)
        if len(rows):
            uniform = race.uniforms(self.seed, numbers.numpy(force=True)[rows], 2 * alpha.shape[1] + 1)
            chosen[rows] = race.choose(running.of(rows), uniform)
        return torch.from_numpy(chosen).to(leaders.device)

    def race_one(self, cluster: int, number: int) -> int:
        """The expert that one decision's draw says, from the belief's row as :meth:`refresh_rows` left it; of gates with one expert a
        token. In numpy, as :meth:`assign_one`."""
        alpha, beta = self.believed.numpy()[cluster]
        total = alpha + beta
        mean, leaders = alpha / total, self.topk_indices.numpy()[cluster][None]
        std = np.sqrt(mean * (beta / total) / (total + 1))
        active, fallen = self.posterior.active.numpy(), self.fallen.numpy()
        running = race.start(mean[None], std[None], total[None], active, fallen, leaders, width=self.risk_aversion)
        return int(race.choose(running, race.uniforms(self.seed, np.array([number]), 2 * len(total) + 1))[0, 0])

    def bound_of(self, alpha: float, beta: float) -> float:
        """The lower confidence bound of one cell, the same bits as in the tables."""
        total = alpha + beta
        std = math.sqrt((alpha / total) * (beta / total) / (total + 1))
        return float(np.float32(alpha / total - self.risk_aversion * std))

    def _running(self, alpha: Tensor, beta: Tensor, leaders: Tensor) -> race.Race:  # 2 x (M, E), (M, k)
        belief = (beta_functions.mean(alpha, beta), beta_functions.std(alpha, beta), alpha + beta)
        mean, std, count = (part.numpy(force=True) for part in belief)
        active, fallen = self.posterior.active.numpy(force=True), self.fallen.numpy(force=True)
        return race.start(mean, std, count, active, fallen, leaders.numpy(force=True), width=self.risk_aversion)

    @property
    def fallen(self) -> Tensor:  # (E,) bool
        """Experts that the race tries now and then, see :attr:`BetaPosterior.fallen`."""
        return self.posterior.fallen

    def assign(self, hidden: Tensor) -> tuple[reference.Assignment, Memberships | None]:  # (N, D)
        """Cluster and distance of each token, and its memberships where it has several."""
        if self.members is None:
            return self.clusterer(hidden), None
        return self.members(self.clusterer, hidden)

    def _members_of(self, routing: Routing) -> Memberships | None:
        if self.members is None:
            return None
        if routing.members is None:
            raise InvalidArgumentError(
                "routing must be this gate's, in which a token has several clusters; it holds no members"
            )
        return routing.members

    def _with_novelty(
        self, assignment: reference.Assignment, members: Memberships | None
    ) -> tuple[Tensor, Tensor]:  # -> 2 x (N, E)
        """A far token keeps part of its cluster's pseudo-counts; in their place stand two of the expert's pooled record."""
        alpha, beta = self.posterior.parameters_of()
        ids = assignment.cluster_ids
        weight = novelty_weight(assignment.distance, self.clusterer.radius[ids]).to(alpha.dtype)[:, None]
        pooled = 2 * beta_functions.mean(alpha.sum(dim=0), beta.sum(dim=0))  # (E,)
        far = 1 - weight
        near = (alpha[ids], beta[ids]) if members is None else mixed(self.posterior, members)
        return weight * near[0] + far * pooled, weight * near[1] + far * (2 - pooled)

    def _random_others(self, chosen: Tensor, generator: torch.Generator) -> Tensor:  # (N, k) -> (N,)
        """A uniformly drawn active expert that is not among the chosen; the last chosen one where there is no other."""
        allowed = self.posterior.active.expand(len(chosen), -1).scatter(1, chosen, False)
        keys = torch.rand(allowed.shape, generator=generator, device=chosen.device).masked_fill(~allowed, -1.0)
        best = keys.max(dim=1)
        return torch.where(best.values >= 0, best.indices, chosen[:, -1])

    def _generator(self, device: torch.device, purpose: Literal["route", "shadow"]) -> torch.Generator:
        refuse_export()
        stream = 2 * (self.seed * 1_000_003 + int(self.steps)) + (purpose == "shadow")
        return torch.Generator(device).manual_seed(stream)

    @torch.no_grad()
    def refresh(self, cluster_ids: Tensor | None) -> None:
        """Rewrite the tables of the given clusters (None: of all, or, if lazy, mark all to be rewritten)."""
        device = self.posterior.successes.device
        if (
            device.type == "meta" or self.members is not None
        ):  # a token of several clusters has no row that could answer it
            return
        if self.topk_indices.device != device:  # a load with assign=True leaves derived buffers where they were
            for name in (
                "topk_indices",
                "topk_weights",
                "topk_scores",
                "topk_counts",
                "believed",
                "unsettled",
                "stale",
            ):
                setattr(self, name, torch.zeros_like(getattr(self, name), device=device))
            self.stale.fill_(True)
        clusters = torch.arange(self.num_clusters, device=device)
        if cluster_ids is not None and len(cluster_ids) < self.num_clusters:
            clusters = cluster_ids.to(device)
        if self.lazy and cluster_ids is None:
            self.stale[clusters] = True
            return
        self._write_rows(clusters)
        self.stale[clusters] = False

    @torch.no_grad()
    def refresh_rows(self, cluster_ids: Tensor) -> None:  # (M,)
        """Bring the tables' rows of these clusters up to date, where the gate is lazy and has not yet."""
        needed = self.stale[cluster_ids]
        if needed.any():
            clusters = cluster_ids[needed].unique()
            self._write_rows(clusters)
            self.stale[clusters] = False

    def expected_outcome(self, routing: Routing) -> Tensor:  # -> (N, k)
        """Posterior mean competence of the chosen experts as of now."""
        members = self._members_of(routing)
        if members is not None:
            return beta_functions.mean(*mixed_at(self.posterior, members, routing.expert_indices)).float()
        return super().expected_outcome(routing)

    @torch.no_grad()
    def estimates(self, hidden: Tensor) -> Tensor:  # (N, D) -> (N, E) float64
        """Posterior mean competence of every expert on every token, as of now, whoever would be chosen."""
        self.validate_hidden(hidden)
        return beta_functions.mean(*self._believed(*self.assign(hidden)))

    @torch.no_grad()
    def counts_of(self, routing: Routing) -> Tensor:  # -> (N, 2, k) float64
        """Alpha and beta of the chosen experts as of now: what mean and interval of their competence come from.

        With ``novelty="discount"`` those that the token was given, far from its cluster fewer than the cluster has.
        """
        members = self._members_of(routing)
        if self.novelty == "discount":
            believed = self._with_novelty(reference.Assignment(routing.cluster_ids, routing.distance), members)
            return _chosen(*believed, routing.expert_indices)
        if members is not None:
            return torch.stack(mixed_at(self.posterior, members, routing.expert_indices), dim=1)
        return torch.stack(self.posterior.parameters_at(routing.cluster_ids[:, None], routing.expert_indices), dim=1)

    def greedy(self, routing: Routing) -> Tensor:  # -> (N, k) int64
        """The experts that the belief, as of now, would choose for these tokens without drawing."""
        members = self._members_of(routing)
        if members is None:
            if self.lazy:
                self.refresh_rows(routing.cluster_ids)
            return self.topk_indices[routing.cluster_ids]
        assignment = reference.Assignment(routing.cluster_ids, routing.distance)
        scores = self._scores(*self._believed(assignment, members), None)
        return reference.select(scores, routing.cluster_ids, self.top_k).expert_indices

    def _believed(
        self, assignment: reference.Assignment, members: Memberships | None
    ) -> tuple[Tensor, Tensor]:  # -> 2 x (N, E)
        """What is believed of every expert, for each token."""
        if self.novelty == "discount":
            return self._with_novelty(assignment, members)
        if members is not None:
            return mixed(self.posterior, members)
        return self.posterior.parameters_of(assignment.cluster_ids)

    def _write_rows(self, clusters: Tensor) -> None:  # (M,)
        alpha, beta = self.posterior.parameters_of(clusters)
        selection = reference.select(self._scores(alpha, beta, None), clusters, self.top_k)
        self.topk_indices[clusters] = selection.expert_indices
        self.topk_scores[clusters] = selection.scores.float()
        self.topk_weights[clusters] = reference.weigh(selection.scores, self.temperature).float()
        self.topk_counts[clusters] = _chosen(alpha, beta, selection.expert_indices)
        if self.score == "race":
            if self.believed.shape[-1] != self.num_experts:  # the pool grew, or the score was another
                self.believed = self.posterior.successes.new_empty(self.num_clusters, 2, self.num_experts)
            self.believed[clusters] = torch.stack([alpha, beta], dim=1)
            running = self._running(alpha, beta, selection.expert_indices)
            self.unsettled[clusters] = torch.from_numpy(running.open).to(self.unsettled.device)


def _chosen(alpha: Tensor, beta: Tensor, expert_indices: Tensor) -> Tensor:  # 2 x (N, E), (N, k) -> (N, 2, k)
    return torch.stack([alpha.gather(1, expert_indices), beta.gather(1, expert_indices)], dim=1)


def _validate_knobs(knobs: Mapping[str, Any], seed: int) -> None:
    standard = {"score": "lcb", "risk_aversion": 1.0, "credible_level": 0.05}
    rule = {name: knobs.get(name, value) for name, value in standard.items()}
    for score in {rule["score"], "lcb", "quantile"}:  # a knob that another rule reads is checked all the same
        rule_of(score, rule["risk_aversion"], rule["credible_level"], seed)
    ranges: dict[str, tuple[str, Callable[[float], bool]]] = {
        "temperature": ("be positive and finite", lambda value: 0.0 < value < float("inf")),
        "exploration": ("lie in [0, 1)", lambda value: 0.0 <= value < 1.0),
    }
    for name, (wanted, fits) in ranges.items():
        if name in knobs and not fits(knobs[name]):
            raise InvalidArgumentError(f"{name} must {wanted}; got {knobs[name]}")
