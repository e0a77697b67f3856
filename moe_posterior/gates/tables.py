"""The tables of a gate whose choice depends on the cluster alone: one row a cluster, kept up to date with the belief.

Dimensions: N tokens, D hidden size, C clusters, E experts, k experts per token.
"""

import math
from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_posterior.gates import race
from moe_posterior.gates.base import Routing
from moe_posterior.gates.belief import BeliefGate
from moe_posterior.gates.learned import LearnedPrior
from moe_posterior.kernels import cpu, dispatch, reference
from moe_posterior.memberships import SeveralClusters

# Cluster, distance, experts, scores, weights, alpha and beta, explored: lists of k each, alpha and beta 2 x k.
Choice = tuple[int, float, list[int], list[float], list[float], list[list[float]], bool]

_DERIVED = ("topk_indices", "topk_weights", "topk_scores", "topk_counts", "believed", "unsettled", "stale")


class TabledGate(BeliefGate):
    """A belief gate that keeps a table of the experts it chooses in every cluster and their weights.

    A forward is then one matrix product and a gather, and for a single token a few numpy calls. With ``lazy``, a row that another
    cluster's outcome has changed is rewritten when it is next needed.
    """

    topk_indices: Tensor  # (C, k) int64
    topk_weights: Tensor  # (C, k) float32
    topk_scores: Tensor  # (C, k) float32
    topk_counts: Tensor  # (C, 2, k) float64, alpha and beta of the chosen
    believed: Tensor  # (C, 2, E) float64, alpha and beta of all experts; with score="race" alone
    unsettled: Tensor  # (C,) bool, clusters in which score="race" still draws
    stale: Tensor  # (C,) bool, rows that a lazy gate must rewrite before use
    members: SeveralClusters | None
    prior: LearnedPrior | None
    score: str
    risk_aversion: float
    temperature: float
    lazy: bool
    seed: int
    backend: dispatch.Backend
    _views: cpu.Views

    @abstractmethod
    def scores(
        self, alpha: Tensor, beta: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:  # 2 x (M, E) -> (M, E)
        """What experts are ranked by, given what is believed of them; -inf for those that were removed."""

    @property
    @abstractmethod
    def chooses_per_token(self) -> bool:
        """Whether a choice depends on more than the cluster, so that the tables cannot answer it."""

    @property
    @abstractmethod
    def races_by_table(self) -> bool:
        """Whether the tables answer for clusters whose race is over, see ``unsettled``."""

    @property
    def fallen(self) -> Tensor:  # (E,) bool
        """Experts that the race retries now and then, see :attr:`BetaPosterior.fallen`."""
        return self.posterior.fallen

    def _make_tables(self) -> None:
        rows, held = self.posterior.num_clusters, self.posterior.successes.dtype
        tables = (
            torch.zeros((rows, self.top_k), dtype=torch.int64),
            torch.zeros((rows, self.top_k), dtype=torch.float32),
            torch.zeros((rows, self.top_k), dtype=torch.float32),
            torch.zeros(rows, 2, self.top_k, dtype=held),
            torch.zeros(rows, 2, 0, dtype=held),
            torch.zeros(rows, dtype=torch.bool),
            torch.ones(rows, dtype=torch.bool),
        )
        for name, table in zip(_DERIVED, tables, strict=True):
            self.register_buffer(name, table, persistent=False)
        self._views = cpu.Views()

    @torch.no_grad()
    def refresh(self, cluster_ids: Tensor | None) -> None:
        """Rewrite the tables of the given clusters (None: of all, or, if lazy, mark all to be rewritten)."""
        device = self.posterior.successes.device
        if device.type == "meta" or self.members is not None or self.prior is not None:
            return  # a token of several clusters, or with a prior of its own, has no row
        if self.topk_indices.device != device:  # loading with assign=True leaves derived buffers on the old device
            for name in _DERIVED:
                setattr(self, name, torch.zeros_like(getattr(self, name), device=device))
            self.stale.fill_(True)
        clusters = torch.arange(self.num_clusters, device=device)
        if cluster_ids is not None and len(cluster_ids) < self.num_clusters:
            clusters = cluster_ids.to(device)
        if self.lazy and cluster_ids is None:
            self.stale[clusters] = True
            return
        self._write_rows(clusters)

    @torch.no_grad()
    def refresh_rows(self, cluster_ids: Tensor) -> None:  # (M,)
        """Rewrite the rows of these clusters that a lazy gate has deferred."""
        needed = self.stale[cluster_ids]
        if needed.any():
            self._write_rows(cluster_ids[needed].unique())

    def _write_rows(self, clusters: Tensor) -> None:  # (M,)
        alpha, beta = self.posterior.parameters_of(clusters)
        selection = reference.select(self.scores(alpha, beta), clusters, self.top_k)
        self.topk_indices[clusters] = selection.expert_indices
        self.topk_scores[clusters] = selection.scores.float()
        self.topk_weights[clusters] = reference.weigh(selection.scores, self.temperature).float()
        self.topk_counts[clusters] = counts_at(alpha, beta, selection.expert_indices)
        if self.score == "race":
            if self.believed.shape[-1] != alpha.shape[1]:  # the pool grew, or the score was another
                self.believed = self.posterior.successes.new_empty(self.num_clusters, 2, alpha.shape[1])
            self.believed[clusters] = torch.stack([alpha, beta], dim=1)
            running = self.running(alpha, beta, selection.expert_indices)
            self.unsettled[clusters] = torch.from_numpy(running.open).to(self.unsettled.device)
        self.stale[clusters] = False

    def running(self, alpha: Tensor, beta: Tensor, leaders: Tensor) -> race.Race:  # 2 x (M, E), (M, k)
        """Which experts may still be among the best under this belief."""
        belief = self.posterior
        return race.start_from(alpha, beta, belief.active, self.fallen, leaders, width=self.risk_aversion)

    def _route_by_tables(self, hidden: Tensor) -> Routing:  # (N, D)
        if self.lazy:
            ids, distance = self.clusterer(hidden)
            self.refresh_rows(ids)
            return Routing(self.topk_indices[ids], self.topk_weights[ids], ids, self.topk_scores[ids], distance)
        tables = (self.topk_indices, self.topk_weights, self.topk_scores)
        found = dispatch.route_by_table(hidden, self.clusterer.prepared, *tables, backend=self.backend)
        assignment, selection, weights = found
        return Routing(selection.expert_indices, weights, assignment.cluster_ids, selection.scores, assignment.distance)

    def _goes_alone(self, hidden: Tensor) -> bool:
        """Whether this is one token that :meth:`_route_alone` can take: without gradient, on a CPU, in no graph."""
        alone = isinstance(hidden, Tensor) and hidden.shape == (1, self.hidden_size)
        if not alone or self.backend != "auto" or not cpu.applies(hidden) or self.lazy or self.chooses_per_token:
            return False
        modules: dict[str, Any] = self._modules  # read directly: nn.Module's attribute access takes half a microsecond
        return bool(modules["clusterer"].fitted)

    def _route_alone(self, hidden: Tensor) -> Routing:  # (1, D)
        """One token by the tables, in numpy: a torch operation costs more than its arithmetic."""
        vector = (hidden.detach() if hidden.requires_grad else hidden).numpy()[0]
        cluster, distance, (indices, weights, scores, _) = self._look_up(vector)
        tensor, array = torch.from_numpy, np.array
        return Routing(
            tensor(indices[cluster].copy()),
            tensor(weights[cluster].copy()),
            tensor(array([cluster])),
            tensor(scores[cluster].copy()),
            tensor(array([distance], np.float32)),
        )

    def _look_up(self, vector: NDArray) -> tuple[int, float, tuple[NDArray, ...]]:  # (D,) float32
        """Cluster and distance of one token, and numpy views of the tables: indices, weights, scores, counts; (C, 1, …) each."""
        modules: dict[str, Any] = self._modules  # as in _goes_alone
        own: dict[str, Any] = self._buffers
        tables = own["topk_indices"], own["topk_weights"], own["topk_scores"], own["topk_counts"]
        return self._views.assign_one(vector, modules["clusterer"].prepared_for_one, tables)

    def choose_one(self, vector: NDArray, number: int) -> Choice | None:  # (D,) float32
        """Decide for one token in numpy, ``number`` as in :meth:`PosteriorGate.route`; None if only the batched path can decide.

        Raises:
            NotFittedError: before :meth:`fit`.
        """
        self.clusterer.require_fitted()
        if self.chooses_per_token and not self.races_by_table:
            return None
        cluster, distance, tables = self._look_up(vector)
        if self.lazy and self.stale.numpy()[cluster]:
            self.refresh_rows(torch.tensor([cluster]))
        if self.races_by_table and self.unsettled.numpy()[cluster]:
            if self.top_k > 1:
                return None
            expert = self._race_one(cluster, number)
            if expert != tables[0][cluster, 0, 0]:
                alpha, beta = self.believed.numpy()[cluster, :, expert].tolist()
                return cluster, distance, [expert], [self._bound_of(alpha, beta)], [1.0], [[alpha], [beta]], True
        experts, weights, scores, counts = (table[cluster, 0].tolist() for table in tables)
        return cluster, distance, experts, scores, weights, counts, False

    def _race_one(self, cluster: int, number: int) -> int:
        """The expert that one decision's draw says, for gates with one expert a token."""
        alpha, beta = self.believed.numpy()[cluster]
        total = alpha + beta
        mean, leaders = alpha / total, self.topk_indices.numpy()[cluster][None]
        std = np.sqrt(mean * (beta / total) / (total + 1))
        active, fallen = self.posterior.active.numpy(), self.fallen.numpy()
        running = race.start(mean[None], std[None], total[None], active, fallen, leaders, width=self.risk_aversion)
        return int(race.choose(running, race.uniforms(self.seed, np.array([number]), 2 * len(total) + 1))[0, 0])

    def _bound_of(self, alpha: float, beta: float) -> float:
        """The lower confidence bound of one cell, the same bits as in the tables."""
        total = alpha + beta
        std = math.sqrt((alpha / total) * (beta / total) / (total + 1))
        return float(np.float32(alpha / total - self.risk_aversion * std))


def counts_at(alpha: Tensor, beta: Tensor, expert_indices: Tensor) -> Tensor:  # 2 x (N, E), (N, k) -> (N, 2, k)
    """Alpha and beta of the chosen experts."""
    return torch.stack([alpha.gather(1, expert_indices), beta.gather(1, expert_indices)], dim=1)
