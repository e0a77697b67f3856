"""The Beta-competence gate: a token's cluster, and in it the experts that have proved competent.

Dimensions: N tokens, D hidden size, C clusters, E experts, k experts per token.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from moe_posterior import beta as beta_functions
from moe_posterior.clustering import Clusterer
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.gates.base import Gate, Routing
from moe_posterior.kernels import dispatch, reference
from moe_posterior.posterior import BetaPosterior
from moe_posterior.precision import FixedPrecision

Score = Literal["lcb", "mean", "quantile", "thompson"]


class PosteriorGate(Gate, FixedPrecision):
    """Route by proven competence: the k experts with the highest lower confidence bound in the token's cluster.

    The gate reads its :class:`BetaPosterior` and keeps no counts of its own. Since score, choice and weights depend on the
    cluster alone, they stand in tables ``topk_indices``, ``topk_weights``, ``topk_scores`` (C, k), refreshed when the belief or
    a knob changes; a forward is then one matrix product and a gather. Exact ties go to the lowest ``(e - c) mod E``.

    Args:
        hidden_size, num_experts, num_clusters, top_k: D, E, C, k.
        score: ``"lcb"`` (default) mean − λ·std; ``"mean"``; ``"quantile"`` the exact lower credible bound; ``"thompson"`` one draw
            per token, which explores.
        risk_aversion: λ ≥ 0 of ``lcb``, in posterior standard deviations. 1 (default) is the paper's conservative posture.
        credible_level: probability, in (0, 1), that competence lies below the ``quantile`` score; default 0.05.
        temperature: > 0; weights are ``softmax(score / temperature)`` over the chosen. Competence lives in [0, 1], so the default
            0.1 lets a lead of 10 points weigh e times as much.
        threshold: None counts outcomes fractionally; τ in [0, 1] binarises them (the paper).
        prior_alpha, prior_beta: prior pseudo-counts of every cell, see :class:`BetaPosterior`.
        seed: start of the Thompson draws. They depend on (seed, number of ``observe`` calls) alone: a forward run twice, as under
            activation checkpointing, draws the same.
        backend: ``"auto"`` or a backend of :mod:`moe_posterior.kernels.dispatch`.

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
    steps: Tensor  # () int64, observe calls so far
    score: Score
    risk_aversion: float
    credible_level: float
    temperature: float

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        num_clusters: int = 32,
        top_k: int = 2,
        *,
        score: Score = "lcb",
        risk_aversion: float = 1.0,
        credible_level: float = 0.05,
        temperature: float = 0.1,
        threshold: float | None = None,
        prior_alpha: float = 1.0,
        prior_beta: float = 1.0,
        seed: int = 0,
        backend: dispatch.Backend = "auto",
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k)
        self.clusterer = Clusterer(num_clusters, hidden_size)
        self.posterior = BetaPosterior(num_clusters, num_experts, prior_alpha=prior_alpha, prior_beta=prior_beta)
        if threshold is not None and not 0.0 <= threshold <= 1.0:
            raise InvalidArgumentError(f"threshold must lie in [0, 1] or be None; got {threshold}")
        self.threshold, self.seed, self.backend = threshold, seed, backend
        table = (num_clusters, top_k)
        self.register_buffer("topk_indices", torch.zeros(table, dtype=torch.int64), persistent=False)
        self.register_buffer("topk_weights", torch.zeros(table, dtype=torch.float32), persistent=False)
        self.register_buffer("topk_scores", torch.zeros(table, dtype=torch.float32), persistent=False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.configure(score=score, risk_aversion=risk_aversion, credible_level=credible_level, temperature=temperature)
        self.posterior.subscribe(self._refresh)

    def configure(
        self,
        *,
        score: Score | None = None,
        risk_aversion: float | None = None,
        credible_level: float | None = None,
        temperature: float | None = None,
    ) -> None:
        """Change how competence becomes a decision, on the same belief; what is None stays as it is.

        Raises:
            InvalidArgumentError: a value out of range; nothing has changed.
        """
        score = self.score if score is None else score
        risk_aversion = self.risk_aversion if risk_aversion is None else risk_aversion
        credible_level = self.credible_level if credible_level is None else credible_level
        temperature = self.temperature if temperature is None else temperature
        if score not in get_args(Score):
            raise InvalidArgumentError(f"score must be one of {list(get_args(Score))}; got {score!r}")
        if not 0.0 <= risk_aversion < float("inf"):
            raise InvalidArgumentError(f"risk_aversion must be at least 0 and finite; got {risk_aversion}")
        if not 0.0 < credible_level < 1.0:
            raise InvalidArgumentError(f"credible_level must lie in (0, 1); got {credible_level}")
        if not 0.0 < temperature < float("inf"):
            raise InvalidArgumentError(f"temperature must be positive and finite; got {temperature}")
        self.score, self.risk_aversion = score, float(risk_aversion)
        self.credible_level, self.temperature = float(credible_level), float(temperature)
        self._refresh(None)

    @property
    def num_clusters(self) -> int:
        """C."""
        return self.clusterer.num_clusters

    @property
    def fitted(self) -> bool:
        """Whether there are centroids."""
        return self.clusterer.fitted

    def fit(self, hidden: Tensor, *, generator: torch.Generator | None = None) -> None:  # (..., D)
        """Find the clusters by k-means and forget all evidence: it spoke of other clusters. Errors as Clusterer.fit."""
        self.clusterer.fit(hidden, generator=generator)
        self.posterior.reset()

    def forward(self, hidden: Tensor) -> Routing:  # (N, D)
        """Choose experts for every token; changes no state.

        A row that holds NaN or inf is routed as cluster 0 with distance inf, and observing it adds no evidence.
        """
        self.validate_hidden(hidden)
        self.clusterer.require_fitted()
        if self.score == "thompson":
            return self._forward_thompson(hidden)
        assignment, selection, weights = dispatch.route_by_table(
            hidden,
            self.clusterer.centroids,
            self.clusterer.half_norms,
            self.topk_indices,
            self.topk_weights,
            self.topk_scores,
            backend=self.backend,
        )
        return Routing(selection.expert_indices, weights, assignment.cluster_ids, selection.scores, assignment.distance)

    def observe(self, routing: Routing, outcome: Tensor, *, dense: bool | None = None) -> None:  # (N, k) or (N, E)
        """Add the outcomes to the belief and refresh the tables of the touched clusters; arguments as :meth:`Gate.observe`."""
        slots = self.slots_of(routing, outcome, dense)
        lost = torch.isinf(routing.distance).to(outcome.device)
        if lost.any():
            outcome = torch.where(lost[:, None], torch.nan, outcome)
        self.posterior.observe(routing.cluster_ids, outcome, slots, threshold=self.threshold)
        self.steps += 1

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, score={self.score!r}, risk_aversion={self.risk_aversion:g}"

    def competence_scores(self, cluster_ids: Tensor | None = None) -> Tensor:  # (M,) -> (M, E) float64
        """What experts are ranked by in the given clusters (None: in all C); ``thompson`` ranks by draws around these means."""
        rows = slice(None) if cluster_ids is None else cluster_ids
        alpha = self.posterior.prior_alpha[rows] + self.posterior.successes[rows]
        beta = self.posterior.prior_beta[rows] + self.posterior.failures[rows]
        if self.score == "lcb":
            return beta_functions.lcb(alpha, beta, self.risk_aversion)
        if self.score == "quantile":
            return beta_functions.quantile(alpha, beta, self.credible_level)
        return beta_functions.mean(alpha, beta)

    @torch.no_grad()
    def _forward_thompson(self, hidden: Tensor) -> Routing:
        assignment = self.clusterer(hidden)
        generator = torch.Generator(hidden.device).manual_seed(self.seed * 1_000_003 + int(self.steps))
        alpha, beta = self.posterior.alpha[assignment.cluster_ids], self.posterior.beta[assignment.cluster_ids]
        draws = beta_functions.thompson(alpha, beta, generator)
        selection = reference.select(draws, assignment.cluster_ids, self.top_k)
        weights = reference.weigh(selection.scores, self.temperature)
        return Routing(
            selection.expert_indices,
            weights.float(),
            assignment.cluster_ids,
            selection.scores.float(),
            assignment.distance,
        )

    @torch.no_grad()
    def _refresh(self, cluster_ids: Tensor | None) -> None:
        """Rewrite the tables of the given clusters (None: of all)."""
        clusters = torch.arange(self.num_clusters, device=self.topk_indices.device)
        if cluster_ids is not None and len(cluster_ids) < self.num_clusters:
            clusters = cluster_ids.to(clusters.device)
        selection = reference.select(self.competence_scores(clusters), clusters, self.top_k)
        self.topk_indices[clusters] = selection.expert_indices
        self.topk_scores[clusters] = selection.scores.float()
        self.topk_weights[clusters] = reference.weigh(selection.scores, self.temperature).float()
