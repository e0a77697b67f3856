"""What every gate that holds a belief has: clusters of inputs, a Beta posterior of each expert's competence in each, and listeners.

Dimensions: N tokens, D hidden size, C clusters, E experts, k experts per token.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from moe_posterior import beta as beta_functions
from moe_posterior.clustering import Clusterer
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.gates.base import Gate, Routing
from moe_posterior.gates.learned import LearnedPrior
from moe_posterior.posterior import BetaPosterior
from moe_posterior.precision import FixedPrecision


class BeliefGate(Gate, FixedPrecision):
    """A gate that estimates how competent each expert is on inputs like these, and how certain that estimate is.

    Code that fits clusters, feeds outcomes, or records, saves or shows a belief checks for this class.
    :class:`~moe_posterior.PosteriorGate` decides by the belief alone, :class:`~moe_posterior.PriorGate` lets it overrule a learned
    gate.
    Subclasses compute what they decide by (tables, biases) in :meth:`refresh`, which runs after every change of the belief.
    """

    clusterer: Clusterer
    posterior: BetaPosterior
    threshold: float | None = None  # at which outcomes are binarised; None counts them fractionally

    @abstractmethod
    def refresh(self, cluster_ids: Tensor | None) -> None:  # (M,)
        """Recompute what is derived from the belief, for these clusters or (None) for all."""

    @abstractmethod
    def learn(self, routing: Routing, outcome: Tensor, slots: Tensor | None) -> None:  # (N, k) or (N, E)
        """Add outcomes that :meth:`observe` has read to the evidence; NaN is unobserved."""

    @abstractmethod
    def measure(self, hidden: Tensor, outcome: Tensor) -> None:  # (N, D), (N, E)
        """Learn from rows on which every expert's outcome is known, after a :meth:`fit`.

        They are evidence for a gate that decides by the belief, and set the reference of one that overrules a learned gate.
        """

    @property
    def decides_alone(self) -> bool:
        """Whether nothing but the belief decides, so that without evidence no expert is preferred on any token."""
        return True

    @torch.no_grad()
    def set_reference(self, successes: Tensor, failures: Tensor) -> None:  # (C, E), (C, E)
        """Start from counts on healthy data, which are added to the prior; evidence so far is forgotten."""
        alpha, beta = self.posterior.initial_prior
        self.posterior.prior_alpha.copy_(alpha + successes)
        self.posterior.prior_beta.copy_(beta + failures)
        self.posterior.reset()

    @property
    def counts_training_rows(self) -> bool:
        """Whether outcomes on rows that the model is being trained on may become evidence, or the reference of a prior.

        True unless a gate says otherwise: one that learns a prior from those outcomes would count them twice.
        """
        return True

    @property
    def num_clusters(self) -> int:
        """How many rows the belief has."""
        return self.posterior.num_clusters

    @property
    def knobs(self) -> dict[str, Any]:
        """What :meth:`configure` changes, with its present values; empty for a gate that cannot be reconfigured."""
        return {}

    def configure(self, **knobs: Any) -> None:
        """Change how the belief becomes a decision, on the same belief.

        Raises:
            InvalidArgumentError: an unknown knob; nothing has changed.
        """
        if knobs:
            raise InvalidArgumentError(f"{type(self).__name__} has nothing to configure; got {sorted(knobs)}")

    @property
    def learned_prior(self) -> LearnedPrior | None:
        """The map that says what to expect of an expert on a token before any outcome; None for a gate that has none."""
        return None

    def relearn(self) -> None:
        """Go on training a learned prior: clusters, κ and evidence are dropped, and the map alone decides until the next fit.

        Raises:
            InvalidArgumentError: the gate has no learned prior.
        """
        raise InvalidArgumentError("prior must be 'learned' or a LearnedPrior for relearn; this gate has none")

    @property
    def recorded_knobs(self) -> dict[str, Any]:
        """The :attr:`knobs` and the threshold, as an audit log records them; empty for a gate that cannot be reconfigured."""
        return {**self.knobs, "threshold": self.threshold} if self.knobs else {}

    @property
    def recorded_options(self) -> dict[str, Any]:
        """What else an audit log needs to interpret this gate's decisions."""
        return {"novelty": "off"}

    @property
    def reads_other_clusters(self) -> bool:
        """Whether a decision depends on rows of clusters other than its token's own."""
        return False

    def fit(self, hidden: Tensor, *, generator: torch.Generator | None = None) -> None:  # (..., D)
        """Find the clusters by k-means and drop all evidence and any warm start, which belong to the old clusters.

        A Routing made before a fit must not be observed after it. Errors as :meth:`Clusterer.fit`.
        """
        self.clusterer.fit(hidden, generator=generator)
        self.posterior.reset(prior=True)

    def subscribe(self, listener: Callable[[Tensor | None], None]) -> Callable[[], None]:
        """Call ``listener(cluster_ids)`` after every change of the belief, None for all clusters; returns how to unsubscribe."""
        return self.posterior.subscribe(listener)

    def observe(self, routing: Routing, outcome: Tensor, *, dense: bool | None = None) -> None:  # (N, k) or (N, E)
        """Add outcomes to the belief; arguments and errors as :meth:`Gate.observe`. A row at distance inf adds nothing."""
        routing, outcome = self.read(routing, outcome)
        slots = self.slots_of(routing, outcome, dense)
        self.require_observable()
        lost = ~torch.isfinite(routing.distance).to(outcome.device)
        if lost.any():
            outcome = torch.where(lost[:, None], torch.nan, outcome)
        self.learn(routing, outcome, slots)

    def expected_outcome(self, routing: Routing) -> Tensor:  # -> (N, k)
        """Posterior mean competence of the chosen experts as of now."""
        alpha, beta = self.posterior.parameters_of(routing.cluster_ids)
        return beta_functions.mean(alpha, beta).gather(1, routing.expert_indices).float()

    @torch.no_grad()
    def counts_of(self, routing: Routing) -> Tensor:  # -> (N, 2, k) float64
        """Alpha and beta of the chosen experts as of now: what mean and interval of their competence come from."""
        return torch.stack(self.posterior.parameters_at(routing.cluster_ids[:, None], routing.expert_indices), dim=1)

    def relative_distance(self, routing: Routing) -> Tensor:  # -> (N,)
        """How far tokens lie from their cluster's centroid, in units of its radius; 0 where there are no clusters yet."""
        if not self.clusterer.fitted:
            return torch.zeros_like(routing.distance)
        inside = routing.cluster_ids.clamp(max=len(self.clusterer.radius) - 1)  # outliers have no radius of their own
        radius = self.clusterer.radius[inside].clamp(min=torch.finfo(torch.float32).tiny)
        return routing.distance / radius

    def remove_expert(self, expert: int) -> None:
        """Never choose this expert again; indices of the others stay. See :meth:`BetaPosterior.remove_expert`.

        Raises:
            InvalidArgumentError: there is no such active expert, or fewer than ``top_k`` would be left.
        """
        if int(self.posterior.active.sum()) <= self.top_k:
            raise InvalidArgumentError(
                f"expert {expert} cannot be removed: top_k={self.top_k} experts must stay active"
            )
        self.posterior.remove_expert(expert)

    def replace_expert(
        self, expert: int, prior_from: Mapping[int, float] | None = None, *, strength: float = 4.0
    ) -> None:
        """Put a retrained expert in the same place and drop the old one's evidence. See BetaPosterior.replace_expert."""
        self.posterior.replace_expert(expert, prior_from, strength=strength)
