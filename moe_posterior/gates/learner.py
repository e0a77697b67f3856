"""Training a learned prior, and when evidence begins to count; the decisions are in :mod:`~moe_posterior.gates.posterior`.

Dimensions: N tokens, D hidden size, E experts, k experts per token.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moe_posterior import beta as beta_functions
from moe_posterior.checks import validation
from moe_posterior.checks.declared import as_declared
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.evidence import novelty_weight
from moe_posterior.gates.base import Routing
from moe_posterior.gates.learned import LearnedPrior, cosine_distance, log_odds, sharpness_of
from moe_posterior.gates.novelty import Novelty
from moe_posterior.gates.rules import Mean, Rule
from moe_posterior.gates.strength import levelled_means, safe_strength
from moe_posterior.gates.tables import TabledGate
from moe_posterior.kernels.reference import Assignment
from moe_posterior.posterior import BetaPosterior


class PriorLearner(TabledGate):
    """A gate that may have a :class:`~moe_posterior.LearnedPrior`; with ``prior=None`` nothing here has any effect.

    First the map alone decides, and :meth:`loss` trains it. Then :meth:`fit` finds clusters and :meth:`learn_prior` measures,
    on held-out rows, how many observations the map is worth. From then on outcomes count as evidence.
    """

    prior: LearnedPrior | None
    novelty: Novelty

    @property
    @abstractmethod
    def rule(self) -> Rule:
        """How competence becomes a score."""

    @property
    def learned_prior(self) -> LearnedPrior | None:
        return self.prior

    @property
    def from_map_alone(self) -> bool:
        """Whether the gate has a learned prior but no clusters yet, so that no evidence counts."""
        return self.prior is not None and not self.clusterer.fitted

    @property
    def counts_training_rows(self) -> bool:
        return self.prior is None

    def loss(self, hidden: Tensor, outcome: Tensor) -> Tensor | None:  # (N, D), (N, E) -> ()
        """The log score of a learned prior on the experts' own outcomes, by its weight; its gradient reaches the map alone.

        Outcomes are binarised at ``threshold`` as evidence is; NaN is not observed.

        Raises:
            InvalidArgumentError: an outcome outside [0, 1], or of another shape.
        """
        if self.prior is None:
            return None
        self.validate_hidden(hidden)
        if self.threshold is not None:  # comparing would make a valid outcome of a wrong one
            outcome = validation.outcomes("outcome", outcome, (len(hidden), self.num_experts))
            outcome = torch.where(outcome.isnan(), torch.nan, (outcome >= self.threshold).to(outcome.dtype))
        return self.prior.weight * self.prior.loss(hidden, outcome)

    @property
    def individual(self) -> float:
        return 0.0 if self.prior is None else self.prior.own

    def begin_step(self, step: int, epoch: int) -> None:
        if self.prior is not None:
            self.prior.step, self.prior.epoch = step, epoch

    @torch.no_grad()
    @as_declared
    def learn_prior(
        self,
        hidden: Tensor,  # (N, D)
        outcome: Tensor,  # (N, E)
        *,
        strength: float | None = None,
        sync: bool = True,
    ) -> float:
        """Find how many observations the trained prior is worth, on rows it was not trained on, and start without evidence.

        κ is cautious, see :func:`~moe_posterior.gates.strength.safe_strength`; a ``strength`` of the prior's own stays. The prior of a
        cluster, which is shown of it and pooled for what lies far from all clusters, becomes the map's mean over the cluster's
        rows, at the level that the outcomes put each expert. Evidence counts from here on: nothing is counted in both.

        Args:
            hidden, outcome: held-out rows and how every expert did on them, in [0, 1]; NaN is not observed.
            strength: κ is at most this; None sets no limit.
            sync: where torch.distributed is initialised, use the rows of all ranks together; a collective call.

        Returns:
            κ.

        Raises:
            NotFittedError: before :meth:`fit`. InvalidArgumentError: the gate has no learned prior, or as :meth:`observe`.
        """
        if self.prior is None:
            raise InvalidArgumentError("prior must be 'learned' or a LearnedPrior for learn_prior; this gate has none")
        self.validate_hidden(hidden)
        self.clusterer.require_fitted()
        rows = self.clusterer(hidden)
        broken = ~torch.isfinite(rows.distance).to(outcome.device)
        counts = BetaPosterior(self.num_clusters, self.num_experts, foresees=True).to(hidden.device)
        if outcome.shape == (len(hidden), self.num_experts):  # otherwise observe refuses it, on all ranks together
            outcome = torch.where(broken[:, None], torch.nan, outcome)
        counts.observe(rows.cluster_ids, outcome, threshold=self.threshold, sync=sync, expected=self.prior(hidden))
        won, lost, foreseen = counts.evidence
        if not float((won + lost).sum()):
            raise InvalidArgumentError("outcome must hold at least one observed value to learn a prior from; got none")
        found = self.prior.strength or safe_strength(won, lost, foreseen)
        if strength is not None:
            found = min(found, validation.number("strength", strength, above=0.0))
        mean = levelled_means(won, lost, foreseen)
        self.prior.usual.copy_(self._usual_of(self._angle(hidden), sync))
        self.posterior.prior_alpha.copy_(found * mean)
        self.posterior.prior_beta.copy_(found * (1 - mean))
        self.posterior.reset()
        return found

    def relearn(self) -> None:
        if self.prior is None:
            super().relearn()
            return
        self.clusterer.clear()
        self.prior.usual.fill_(torch.inf)
        self.posterior.reset(prior=True)

    def _angle(self, hidden: Tensor) -> Tensor:  # (N, D) -> (N,)
        """One minus the cosine to the nearest centroid, by angle; NaN for a row that holds NaN."""
        return cosine_distance(hidden, self.clusterer.centroids)

    def _usual_of(self, angle: Tensor, sync: bool) -> Tensor:  # (N,) -> ()
        """The median; across ranks, the mean of their medians."""
        usual = angle.nanmedian() if len(angle) else angle.new_full((), torch.inf)
        if sync and torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(usual)
            usual = usual / torch.distributed.get_world_size()
        return usual

    def sharpness(self, hidden: Tensor) -> Tensor:  # (N, D) -> (N,)
        """The factor on a token's scores before they become weights: 1 if it resembles the held-out rows, less if it is novel."""
        assert self.prior is not None
        if self.from_map_alone:
            return torch.ones(len(hidden), device=hidden.device)
        return sharpness_of(self._angle(hidden.detach()), self.prior.usual, self.prior.floor)

    @torch.no_grad()
    def moved(
        self,
        expected: Tensor,  # (N, E)
        cluster_ids: Tensor,  # (N,)
        generator: torch.Generator | None = None,
    ) -> Tensor:  # (N, E)
        """The shift of the prior's log odds by the evidence: the rule's log odds with it minus those without; -inf if removed."""
        belief = self.posterior
        if self.from_map_alone:
            shift = torch.zeros_like(expected)
        else:
            strength = belief.strength[cluster_ids]
            plain = Mean() if self.rule.score == "thompson" else self.rule
            before = plain(strength * expected, strength * (1 - expected))
            after = self.rule(*belief.parameters_of(cluster_ids, expected), generator)
            shift = log_odds(after) - log_odds(before)
        return shift.masked_fill(~belief.active, -torch.inf)

    @torch.no_grad()
    def shown(self, odds: Tensor, assignment: Assignment) -> Tensor:  # (N, k) log odds -> (N, k)
        """The chosen scores as probabilities; for a novel token they fall towards the rule's score of the worst pooled record."""
        scores = torch.sigmoid(odds)
        if self.novelty != "discount" or self.from_map_alone:
            return scores
        alpha, beta = self.posterior.parameters_of()
        mean = beta_functions.mean(alpha.sum(dim=0), beta.sum(dim=0))
        plain = Mean() if self.rule.score == "thompson" else self.rule
        least = plain(2 * mean, 2 * (1 - mean)).masked_fill(~self.posterior.active, torch.inf).min()
        weight = novelty_weight(assignment.distance, self.clusterer.radius[assignment.cluster_ids]).to(scores)[:, None]
        return weight * scores + (1 - weight) * torch.minimum(scores, least.clamp(0.0, 1.0))

    def require_observable(self) -> None:
        if self.from_map_alone:
            self.clusterer.require_fitted()

    def replace_expert(
        self, expert: int, prior_from: Mapping[int, float] | None = None, *, strength: float = 4.0
    ) -> None:
        super().replace_expert(expert, prior_from, strength=strength)
        self.put_prior(expert, prior_from)

    def put_prior(self, expert: int, prior_from: Mapping[int, float] | None) -> None:
        """Make the map expect of a new expert what it expects of its donors, or the same everywhere."""
        if self.prior is not None:
            alpha, beta = self.posterior.initial_prior
            self.prior.put_expert(expert, alpha / (alpha + beta), prior_from)

    def expected_of(self, routing: Routing) -> Tensor | None:  # -> (N, E)
        """What the learned prior expected of these tokens; None if the routing has lost it or predates an added expert."""
        known = routing.logits
        if self.prior is None or known is None or known.shape[1] != self.num_experts:
            return None
        return self.prior.mean_of(known)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "prior" not in self._modules:  # pickled by a version without learned priors
            self.__dict__.setdefault("prior", None)
