"""The Beta-competence gate: a token's cluster, and in it the experts that have proved competent.

Dimensions: N tokens, D hidden size, C clusters, E experts, k experts per token.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from moe_posterior.checks import validation
from moe_posterior.checks.declared import as_declared
from moe_posterior.clustering import Clusterer
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.evidence import ProxyNoise
from moe_posterior.gates import exploration as exploring
from moe_posterior.gates import race
from moe_posterior.gates.base import ForeseenRouting, Routing, SharedRouting, refuse_export
from moe_posterior.gates.believed import TokenBelief
from moe_posterior.gates.learned import LearnedPrior, read_prior
from moe_posterior.gates.novelty import Novelty
from moe_posterior.gates.rules import KNOBS, Mean, Rule, Score, require_knobs, rule_of
from moe_posterior.kernels import dispatch, reference
from moe_posterior.memberships import SeveralClusters
from moe_posterior.posterior import BetaPosterior, Pooling

_ROW_BITS = 32  # of a draw's number, for the row of the batch; the rest counts observe calls


class PosteriorGate(TokenBelief):
    """Route by proven competence: the k experts with the highest lower confidence bound in the token's cluster.

    The gate reads its :class:`BetaPosterior` and keeps no counts of its own. Where score, choice and weights depend on the cluster
    alone, they stand in tables ``topk_indices``, ``topk_weights``, ``topk_scores`` (C, k), see :mod:`moe_posterior.gates.tables`.
    Thompson draws, exploration and novelty make the choice depend on the token, and take the slower per-token path. Exact ties go
    to the lowest ``(e - c) mod E``.

    With a learned ``prior`` what is expected of an expert before any outcome depends on the token, and the map behind it is trained
    with the model: the gate routes from the map alone until :meth:`fit` and :meth:`learn_prior` give it clusters, in which outcomes
    then overrule the map. Its decisions take the per-token path in plain torch, also on a GPU.

    Args:
        hidden_size, num_experts, num_clusters, top_k: D, E, C, k.
        rule: how competence becomes a score, for instance ``LCB(2.0)`` or ``Quantile(0.1)``, see :mod:`moe_posterior.gates.rules`; None
            (default) takes the options that follow.
        score: ``"lcb"`` (default) mean − λ·std; ``"mean"``; ``"quantile"`` the exact lower credible bound; ``"thompson"`` one draw
            per token, which explores; ``"race"`` ranks by ``lcb`` and explores while, and where, the bounds do not yet tell the experts
            apart: one draw per token among those that may still be the best, see :mod:`moe_posterior.gates.race`. The scores of a
            routing are then still the bounds, whichever expert was drawn.
        risk_aversion: λ ≥ 0 of ``lcb``, in posterior standard deviations. 1 (default) is the paper's conservative posture.
        credible_level: probability, in (0, 1), that competence lies below the ``quantile`` score; default 0.05.
        temperature: > 0; weights are ``softmax(score / temperature)`` over the chosen. Competence lives in [0, 1], so the default
            0.1 lets a lead of 10 points weigh e times as much; by a learned prior's log odds the default is 1.
        threshold: None counts outcomes fractionally; τ in [0, 1] binarises them (the paper).
        exploration: share of tokens, in [0, 1), whose last slot goes to a random other expert, so that no expert is locked out
            for ever; default 0. To explore without touching the output, keep it 0 and ask :meth:`shadow`.
        prior: None (default) expects the same of an expert everywhere, ``prior_alpha / (prior_alpha + prior_beta)``, or what
            :meth:`warm_start` counted in the cluster. ``"learned"`` is ``LearnedPrior()``, see :class:`LearnedPrior`: what is expected
            is a function of the token, learned in training. It does not go with ``clusterings`` or ``neighbours`` above 1.
        novelty: how a token outside its cluster's radius is treated. ``"off"``: like any member; the default without a ``prior``.
            ``"discount"``, the default with one: it relies less on the cluster's evidence and more on the experts' pooled record, see
            :func:`~moe_posterior.evidence.novelty_weight`, so that its scores fall and ``abstain`` fires. ``"class"``: all such tokens
            form an outlier class, one more row of the belief, so that it is learned quickly which experts cope with the unknown.
        prior_alpha, prior_beta, half_life, shrinkage, surprise, pooling: of the belief, see :class:`BetaPosterior`.
        false_positive_rate, false_negative_rate: known error rates of the outcomes; counts are de-biased by them.
        lazy: where a change of the belief touches every cluster, as under ``shrinkage``, refresh a row of the tables when it is next
            needed: for many clusters and experts and few tokens at a time. Such a gate cannot be compiled to one graph.
        clusterings: M, how many k-means runs of ``num_clusters`` each speak for a token, from different draws; the pseudo-counts that
            they give it are averaged. 1 (default) is the paper's. 4 average out the accidents of single runs: the scores rank
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
        prior: LearnedPrior | Literal["learned"] | None = None,
        score: Score = "lcb",
        risk_aversion: float = 1.0,
        credible_level: float = 0.05,
        temperature: float | None = None,
        threshold: float | None = None,
        exploration: float = 0.0,
        novelty: Novelty | None = None,
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
        learned = read_prior(prior)
        if novelty is None:
            novelty = "off" if learned is None else "discount"
        if novelty not in get_args(Novelty):
            raise InvalidArgumentError(f"novelty must be one of {list(get_args(Novelty))}; got {novelty!r}")
        self.clusterer = Clusterer(num_clusters, hidden_size, outliers=novelty == "class", levels=levels)
        members = SeveralClusters(num_clusters, hidden_size, clusterings, neighbours, softness)
        self.members = members if members.width > 1 else None
        if self.members is not None and (novelty == "class" or levels != 1):
            raise InvalidArgumentError(
                f"clusterings and neighbours must be 1 with novelty='class' or levels=2; got {clusterings} and {neighbours}"
            )
        if self.members is not None and learned is not None:
            raise InvalidArgumentError(
                f"clusterings and neighbours must be 1 with a learned prior; got {clusterings} and {neighbours}"
            )
        if learned is not None:
            shrinkage = learned.shrinkage if shrinkage is None else shrinkage
            if learned.strength is not None:
                for name, value in (("prior_alpha", prior_alpha), ("prior_beta", prior_beta)):
                    validation.number(name, value, above=0.0)
                share = prior_alpha / (prior_alpha + prior_beta)
                prior_alpha, prior_beta = learned.strength * share, learned.strength * (1 - share)
        if temperature is None:
            temperature = 1.0 if learned is not None and learned.scale == "odds" else 0.1
        self.prior = learned
        noisy = false_positive_rate != 0 or false_negative_rate != 0
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
            foresees=learned is not None,
        )
        if threshold is not None and not 0.0 <= threshold <= 1.0:
            raise InvalidArgumentError(f"threshold must lie in [0, 1] or be None; got {threshold}")
        self.novelty = novelty
        self.threshold, self.lazy, self.seed, self.backend = threshold, lazy, named.pop("seed", seed), backend
        self._make_tables()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.configure(**named, temperature=temperature, exploration=exploration)
        self.posterior.subscribe(self.refresh)
        if learned is not None:  # last: a gate that refuses its arguments leaves the prior free for another
            learned.bind(self.hidden_size, self.num_experts)

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
        require_knobs(given, self.seed)
        for name, value in given.items():
            setattr(self, name, value)
        self.refresh(None)

    @property
    def knobs(self) -> dict[str, Any]:
        """What :meth:`configure` changes, with its present values."""
        return {name: getattr(self, name) for name in KNOBS}

    @property
    def rule(self) -> Rule:
        """How competence becomes a score with the present knobs; see :mod:`moe_posterior.gates.rules`.

        The mean while there is only a learned prior: how certain it is, is not known yet.
        """
        if self.from_map_alone:
            return Mean()
        return rule_of(self.score, self.risk_aversion, self.credible_level, self.seed)

    @property
    def num_configurations(self) -> int:
        """The number of clusters: the choice depends on nothing else. With a learned prior, as of any gate."""
        return self.num_clusters if self.prior is None else super().num_configurations

    def configurations(self, routing: Routing) -> Tensor:  # -> (N,) int64
        """The cluster of every token; with a learned prior, as of any gate."""
        return routing.cluster_ids if self.prior is None else super().configurations(routing)

    @property
    def recorded_knobs(self) -> dict[str, Any]:
        """As :attr:`BeliefGate.recorded_knobs`, with the score in use: a learned prior without clusters ranks by the mean."""
        return {**super().recorded_knobs, "score": self.rule.score}

    @property
    def recorded_options(self) -> dict[str, Any]:
        """As :attr:`BeliefGate.recorded_options`."""
        several = {} if self.members is None else {n: getattr(self.members, n) for n in ("clusterings", "neighbours")}
        return {
            "novelty": self.novelty,
            **several,
            **({} if self.prior is None else {"prior": "learned", "scale": self.prior.scale}),
        }

    @property
    def reads_other_clusters(self) -> bool:
        """With ``novelty="discount"`` the pooled record of all clusters counts in each."""
        return self.novelty == "discount"

    @property
    def chooses_per_token(self) -> bool:
        """Whether a choice depends on more than the cluster, so that the tables cannot answer it."""
        own = self.members is not None or self.prior is not None
        return own or self._draws or self.novelty == "discount"

    @property
    def _draws(self) -> bool:
        return self.score in ("thompson", "race") or self.exploration > 0

    @property
    def races_by_table(self) -> bool:
        """Whether the tables answer for clusters whose race is over, see ``unsettled``."""
        alone = self.exploration == 0 and self.novelty != "discount" and self.members is None and self.prior is None
        return self.score == "race" and alone

    @property
    def draws_by_steps(self) -> bool:
        """Whether draws depend on ``steps``; a caller that decides repeatedly between outcomes must then increase it."""
        return self.score == "thompson" or self.exploration > 0

    @property
    def fitted(self) -> bool:
        """Whether it can decide: there are centroids, or a learned prior that is not in its warm-up."""
        if self.prior is not None:
            return self.clusterer.fitted or not (self.training and self.prior.warming_up)
        return self.clusterer.fitted and (self.members is None or self.members.fitted)

    @as_declared
    def fit(self, hidden: Tensor, *, generator: torch.Generator | None = None) -> None:  # (..., D)
        """As :meth:`BeliefGate.fit`, in every clustering."""
        self.clusterer.fit(hidden, generator=generator)
        if self.prior is not None:
            self.prior.usual.fill_(torch.inf)
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
        """Turn held-out outcomes of all experts into the prior; NaN = not observed. See :meth:`BetaPosterior.warm_start`.

        With a learned prior this is :meth:`learn_prior`, alone on this rank.
        """
        if self.prior is not None:
            self.learn_prior(hidden, outcome, strength=strength, sync=False)
            return
        self.validate_hidden(hidden)
        assignment, members = self.assign(hidden)
        ids, shares = (assignment.cluster_ids, None) if members is None else members
        self.posterior.warm_start(ids, outcome, shares=shares, strength=strength, threshold=self.threshold)

    def forward(self, hidden: Tensor) -> Routing:  # (N, D)
        """Choose experts for every token; changes no state.

        A row that holds NaN or inf is routed as cluster 0 with distance inf, and observing it adds no evidence.
        """
        return self._route_alone(hidden) if self._goes_alone(hidden) else self.route(hidden)

    def route(self, hidden: Tensor, numbers: Tensor | None = None) -> Routing:  # (N, D), (N,) int64
        """:meth:`forward`, with the numbers that the draws of ``score="race"`` depend on.

        By default they are the ``observe`` calls so far and the row, so that a forward run twice draws the same.
        """
        self.validate_hidden(hidden)
        if self.prior is not None:
            return self._route_by_prior(hidden, numbers, self.prior)
        self.clusterer.require_fitted()
        return self._route_per_token(hidden, numbers) if self.chooses_per_token else self._route_by_tables(hidden)

    @torch.no_grad()
    def _route_per_token(self, hidden: Tensor, numbers: Tensor | None) -> Routing:
        assignment, members = self.assign(hidden)
        alpha, beta = self.believed_of(assignment, members)
        routing = self.decide(alpha, beta, assignment, numbers)
        return routing if members is None else SharedRouting.of(routing, members)

    def _route_by_prior(self, hidden: Tensor, numbers: Tensor | None, prior: LearnedPrior) -> Routing:
        logits = prior.logits(hidden)
        expected, (assignment, _) = prior.mean_of(logits), self.assign(hidden)
        belief = self.believed_of(assignment, None, expected)
        generator = self._generator(hidden.device, "route") if self.draws_by_steps else None
        odds = prior.scale == "odds"
        if odds:
            scores = logits.double() + self.moved(expected, assignment.cluster_ids, generator)
        else:
            scores = self.scores(*belief, generator)
        if self.training and prior.draws is not None and self.from_map_alone:
            refuse_export()
            ranks = prior.drawn(expected, self.seed).masked_fill(~self.posterior.active, -torch.inf)
            drawn = reference.select(ranks, assignment.cluster_ids, self.top_k).expert_indices
            selection = self._among(scores, drawn, assignment)
        else:
            selection = self._choose(scores, belief, assignment, numbers, generator)
        routing = self._routed(selection, assignment, self.sharpness(hidden) if odds else None)
        # A compiled graph returns the five fields only.
        return routing if torch.compiler.is_compiling() else ForeseenRouting.of(routing, logits.detach())

    def decide(
        self,
        alpha: Tensor,  # (N, E)
        beta: Tensor,  # (N, E)
        assignment: reference.Assignment,
        numbers: Tensor | None = None,  # (N,) int64
    ) -> Routing:
        """Route tokens by a given belief about every expert for each of them.

        Scores are the rule's, differentiable in alpha and beta where the rule is; draws and exploration as in :meth:`route`.
        """
        generator = self._generator(alpha.device, "route") if self.draws_by_steps else None
        scores = self.scores(alpha, beta, generator)
        return self._routed(self._choose(scores, (alpha, beta), assignment, numbers, generator), assignment)

    def _choose(
        self,
        scores: Tensor,  # (N, E)
        belief: tuple[Tensor, Tensor],  # 2 x (N, E)
        assignment: reference.Assignment,
        numbers: Tensor | None,
        generator: torch.Generator | None,
    ) -> reference.Selection:
        indices, chosen = reference.select(scores, assignment.cluster_ids, self.top_k)
        if self.score == "race" and not self.from_map_alone:
            indices, chosen = self._among(scores, self._raced(*belief, indices, numbers), assignment)
        if generator is not None and self.exploration > 0 and int(self.posterior.active.sum()) > self.top_k:
            indices = exploring.explored(indices, self.posterior.active, self.exploration, generator)
            chosen = scores.gather(1, indices)
        return reference.Selection(indices, chosen)

    def _among(self, scores: Tensor, drawn: Tensor, assignment: reference.Assignment) -> reference.Selection:
        """The drawn experts, (N, k) in no order, as a selection by score."""
        beside = torch.ones_like(scores, dtype=torch.bool).scatter_(1, drawn, False)
        return reference.select(scores.masked_fill(beside, -torch.inf), assignment.cluster_ids, self.top_k)

    def _routed(
        self,
        selection: reference.Selection,
        assignment: reference.Assignment,
        sharpness: Tensor | None = None,  # (N,), where scores are log odds
    ) -> Routing:
        indices, chosen = selection
        if sharpness is None:
            weights, shown = reference.weigh(chosen, self.temperature), chosen
        else:
            weights = reference.weigh(chosen * sharpness.to(chosen)[:, None], self.temperature)
            shown = self.shown(chosen, assignment)
        return Routing(indices, weights.float(), assignment.cluster_ids, shown.float(), assignment.distance)

    def learn(self, routing: Routing, outcome: Tensor, slots: Tensor | None) -> None:  # (N, k) or (N, E)
        """Add the outcomes to the belief and refresh the tables of the touched clusters."""
        members = self._members_of(routing)
        ids, shares = (routing.cluster_ids, None) if members is None else members
        expected = self.expected_of(routing)
        if expected is not None and slots is not None:
            expected = expected.gather(1, slots)
        self.posterior.observe(ids, outcome, slots, shares=shares, threshold=self.threshold, expected=expected)
        self.steps.add_(1)

    def measure(self, hidden: Tensor, outcome: Tensor) -> None:  # (N, D), (N, E)
        """Count how every expert did on these rows as evidence; with a learned prior, :meth:`learn_prior` from them."""
        if self.prior is not None:
            self.learn_prior(hidden, outcome)
            return
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
        return exploring.shadowed(routing.expert_indices, self.posterior.active, rate, generator)

    @as_declared
    def add_expert(self, prior_from: Mapping[int, float] | None = None, *, strength: float = 4.0) -> int:
        """One more expert; returns its index. Append its module to the layer's experts yourself. See BetaPosterior."""
        index = self.posterior.add_expert(prior_from, strength=strength)
        self.num_experts += 1
        self.put_prior(index, prior_from)
        return index

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, score={self.score!r}, risk_aversion={self.risk_aversion:g}"

    def competence_scores(self, cluster_ids: Tensor | None = None) -> Tensor:  # (M,) -> (M, E) float64
        """What experts are ranked by in the given clusters (None: in all C); ``thompson`` ranks by draws around these means.

        Experts that were removed score -inf.
        """
        return self.scores(*self.posterior.parameters_of(cluster_ids))

    @property
    def reweighs(self) -> bool:
        return not self._draws if self.prior is not None else not self.chooses_per_token

    def reweigh(self, hidden: Tensor, routing: Routing, expert_indices: Tensor) -> Routing:  # (N, D), _, (N, k)
        if not self.reweighs:
            return super().reweigh(hidden, routing, expert_indices)
        assignment = reference.Assignment(routing.cluster_ids, routing.distance)
        scores = self._ranks(self.prior.logits(hidden), assignment) if self.prior is not None else None
        if scores is None:
            scores = self.competence_scores(routing.cluster_ids)
        odds = self.prior is not None and self.prior.scale == "odds"
        selection = reference.Selection(expert_indices, scores.gather(1, expert_indices))
        made = self._routed(selection, assignment, self.sharpness(hidden) if odds else None)
        return routing._replace(expert_indices=expert_indices, routing_weights=made.routing_weights, scores=made.scores)

    def _ranks(self, logits: Tensor, assignment: reference.Assignment) -> Tensor:  # (N, E) -> (N, E)
        """What a gate with a learned prior ranks experts by, where nothing is drawn."""
        assert self.prior is not None
        expected = self.prior.mean_of(logits)
        if self.prior.scale == "odds":
            return logits.double() + self.moved(expected, assignment.cluster_ids)
        return self.scores(*self.believed_of(assignment, None, expected))

    def scores(
        self, alpha: Tensor, beta: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:  # 2 x (M, E) -> (M, E)
        """What experts are ranked by under :attr:`rule`, given what is believed of them; -inf for those that were removed."""
        return self.rule(alpha, beta, generator).masked_fill(~self.posterior.active, -torch.inf)

    def _raced(
        self, alpha: Tensor, beta: Tensor, leaders: Tensor, numbers: Tensor | None
    ) -> Tensor:  # 2 x (N, E), (N, k), (N,)
        """The experts drawn for the tokens, on the host, so that a repeated choice is the same on every device."""
        refuse_export()
        if numbers is None:
            numbers = (int(self.steps) << _ROW_BITS) + torch.arange(len(alpha))
        chosen = race.draw(self.running(alpha, beta, leaders), self.seed, numbers.numpy(force=True))
        return torch.from_numpy(chosen).to(leaders.device)

    def _generator(self, device: torch.device, purpose: Literal["route", "shadow"]) -> torch.Generator:
        return exploring.generator_for(device, self.seed, self.steps, purpose)

    def greedy(self, routing: Routing) -> Tensor:  # -> (N, k) int64
        """The experts that the current belief would choose for these tokens without drawing."""
        members = self._members_of(routing)
        if members is None and self.prior is None:
            if self.lazy:
                self.refresh_rows(routing.cluster_ids)
            return self.topk_indices[routing.cluster_ids]
        assignment = reference.Assignment(routing.cluster_ids, routing.distance)
        if self.prior is not None and self.expected_of(routing) is not None and routing.logits is not None:
            scores = self._ranks(routing.logits, assignment)
        else:
            scores = self.scores(*self.believed_of(assignment, members))
        return reference.select(scores, routing.cluster_ids, self.top_k).expert_indices
