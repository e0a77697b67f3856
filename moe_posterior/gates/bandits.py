"""Bandits over the clusters: every (cluster, expert) is an arm, and the index explores where it knows little.

Dimensions: N tokens, D hidden size, C clusters, E experts, k experts per token.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from moe_posterior import beta as beta_functions
from moe_posterior.checks.declared import as_declared
from moe_posterior.clustering import Clusterer
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.evidence import Evidence, read_outcomes
from moe_posterior.forgetting import discounts
from moe_posterior.gates.base import Gate, Routing, refuse_export
from moe_posterior.gates.baselines import UNKNOWN, read_labelled
from moe_posterior.kernels import reference
from moe_posterior.posterior import BetaPosterior
from moe_posterior.precision import FixedPrecision

Policy = Literal["ucb1", "discounted_ucb", "thompson"]
# Untried arms come first. Not inf: two of them would differ by NaN.
_UNTRIED = torch.finfo(torch.float32).max


class BanditGate(Gate, FixedPrecision):
    """One multi-armed bandit a cluster, its arms the experts; the k arms with the highest index are played.

    - ``"ucb1"``: ``mean + c·sqrt(2 ln t / n)``, n the outcomes of the arm, t those of all arms of the cluster.
    - ``"discounted_ucb"``: the same, with every outcome worth γ less at each later round of its cluster.
    - ``"thompson"``: a draw from the arm's Beta(1 + successes, 1 + failures), one a token.

    Untried arms come before all others; exact ties go to the lowest ``(e - c) mod E``. ``Routing.scores`` is the index, which is no
    probability; the estimate is :meth:`expected_outcome`, and the routing weights are its softmax. The counts live in a
    :class:`BetaPosterior`.

    Args:
        hidden_size, num_experts, num_clusters, top_k: D, E, C, k.
        policy: the index, above.
        contextual: False plays one bandit for all tokens; it needs no clusters and no fit, and C is then 1.
        exploration: c ≥ 0. 1 (default) is UCB1 as published; the source of discounted UCB writes ``2B·sqrt(ξ ln t / n)``, so that
            ``c = B·sqrt(2ξ)``, 1 at its ξ = 1/2.
        discount: γ in (0, 1] of ``discounted_ucb``.
        temperature: > 0; weights are ``softmax(estimate / temperature)`` over the chosen.
        threshold: None counts outcomes fractionally; τ in [0, 1] binarises them.
        seed: start of the Thompson draws, which depend on (seed, number of ``observe`` calls) alone.

    Raises:
        InvalidArgumentError: a knob out of range. NotFittedError: a contextual gate called before :meth:`fit`.

    Source: Auer, Cesa-Bianchi & Fischer 2002 (UCB1); Garivier & Moulines 2008, *On Upper-Confidence Bound Policies for
    Non-Stationary Bandit Problems*; Thompson 1933.

    >>> hidden = torch.zeros(1, 2)
    >>> gate = BanditGate(hidden_size=2, num_experts=3, top_k=1, contextual=False)
    >>> plays = []
    >>> for _ in range(5):
    ...     routing = gate(hidden)
    ...     plays.append(int(routing.expert_indices))
    ...     gate.observe(routing, (routing.expert_indices == 1).double())  # expert 1 alone succeeds
    >>> plays  # each once, then the one that succeeded
    [0, 1, 2, 1, 1]
    """

    steps: Tensor  # () int64, observe calls so far

    @as_declared
    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        num_clusters: int = 32,
        top_k: int = 2,
        *,
        policy: Policy = "ucb1",
        contextual: bool = True,
        exploration: float = 1.0,
        discount: float = 0.99,
        temperature: float = 0.1,
        threshold: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k)
        if policy not in get_args(Policy):
            raise InvalidArgumentError(f"policy must be one of {list(get_args(Policy))}; got {policy!r}")
        if not 0.0 <= exploration < float("inf"):
            raise InvalidArgumentError(f"exploration must be at least 0 and finite; got {exploration}")
        if not 0.0 < discount <= 1.0:
            raise InvalidArgumentError(f"discount must lie in (0, 1]; got {discount}")
        validate_temperature(temperature)
        if threshold is not None and not 0.0 <= threshold <= 1.0:
            raise InvalidArgumentError(f"threshold must lie in [0, 1] or be None; got {threshold}")
        self.policy, self.exploration, self.temperature = policy, float(exploration), float(temperature)
        self.discount = float(discount) if policy == "discounted_ucb" else 1.0
        self.threshold, self.seed = threshold, seed
        self.num_clusters = num_clusters if contextual else 1
        self.clusterer = Clusterer(num_clusters, hidden_size) if contextual else None
        self.posterior = BetaPosterior(self.num_clusters, num_experts)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @property
    def fitted(self) -> bool:
        """Whether there are centroids, where there are to be any."""
        return self.clusterer is None or self.clusterer.fitted

    def fit(self, hidden: Tensor, *, generator: torch.Generator | None = None) -> None:  # (..., D)
        """Find the clusters by k-means and forget all counts: they spoke of other clusters. Errors as Clusterer.fit."""
        if self.clusterer is not None:
            self.clusterer.fit(hidden, generator=generator)
            self.posterior.reset()

    @torch.no_grad()
    def warm_start(self, hidden: Tensor, outcome: Tensor, *, strength: float | None = None) -> None:  # (N, D), (N, E)
        """Replace all counts by those of labelled rows, in order of the rows; no ranks are synchronised, give all the same.

        Args:
            hidden: finite rows.
            outcome: competence signals in [0, 1], column e for expert e; NaN where not observed.
            strength: at most this many outcomes an arm, at an unchanged mean; None keeps every count. A small strength lets
                later outcomes overrule the warm start quickly.

        Raises:
            InvalidArgumentError: a wrong shape, a value out of range, or a strength that is not positive; nothing has changed.
        """
        hidden, outcome = read_labelled(self, hidden, outcome)
        if strength is not None and not strength > 0:
            raise InvalidArgumentError(f"strength must be positive; got {strength}")
        cluster_ids = self._assign(hidden).cluster_ids
        successes, failures, _ = self._count(cluster_ids, outcome, None)
        if strength is not None:
            shorten = (strength / (successes + failures)).clamp(max=1.0)  # n = 0 gives inf, clamped
            successes, failures = successes * shorten, failures * shorten
        self.posterior.reset()
        self.posterior.merge(Evidence(successes, failures))

    def forward(self, hidden: Tensor) -> Routing:  # (N, D)
        """Play the k arms with the highest index for every token; changes no state.

        A row that holds NaN or inf is routed as cluster 0 with distance inf, and observing it counts nothing.
        """
        self.validate_hidden(hidden)
        assignment = self._assign(hidden)
        with torch.no_grad():
            selection = reference.select(self._index(assignment.cluster_ids), assignment.cluster_ids, self.top_k)
            estimates = self._estimates(assignment.cluster_ids).gather(1, selection.expert_indices)
            weights = reference.weigh(estimates, self.temperature)
        scores = selection.scores.float()
        return Routing(selection.expert_indices, weights.float(), assignment.cluster_ids, scores, assignment.distance)

    def observe(self, routing: Routing, outcome: Tensor, *, dense: bool | None = None) -> None:  # (N, k) or (N, E)
        """Count the outcomes, in order of the rows; arguments as :meth:`Gate.observe`.

        Under ``discounted_ucb`` every row with an outcome is one round of its cluster, so that a batch counts as its rows would
        one at a time. Where torch.distributed is initialised this is a collective call, and the rows of different ranks
        do not age each other within the batch.
        """
        routing, outcome = self.read(routing, outcome)
        slots = self.slots_of(routing, outcome, dense)
        lost = ~torch.isfinite(routing.distance).to(outcome.device)
        outcome = torch.where(lost[:, None], torch.nan, outcome)
        with torch.no_grad():
            counts = torch.stack(self._count(routing.cluster_ids, outcome, slots))
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(counts)
            successes, failures, rounds = counts
            aged = self.discount**rounds  # a power of 0 is exactly 1: clusters without a round keep every bit
            self.posterior.successes *= aged
            self.posterior.failures *= aged
            self.posterior.merge(Evidence(successes, failures))
        self.steps += 1

    def expected_outcome(self, routing: Routing) -> Tensor:  # -> (N, k)
        """The estimated success rate of the chosen arms as it is now: ask before observing the routing.

        The posterior mean for ``thompson``; else the arm's mean outcome, ½ if it is untried.
        """
        estimates = self._estimates(routing.cluster_ids).gather(1, routing.expert_indices)
        return estimates.to(routing.scores.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, policy={self.policy!r}, num_clusters={self.num_clusters}"

    def _assign(self, hidden: Tensor) -> reference.Assignment:
        if self.clusterer is not None:
            return self.clusterer(hidden)
        finite = torch.isfinite(hidden).all(dim=1)
        distance = torch.where(finite, 0.0, torch.inf).float()
        return reference.Assignment(torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device), distance)

    def _index(self, cluster_ids: Tensor) -> Tensor:  # (N,) -> (N, E) float64
        if self.policy == "thompson":
            refuse_export()
            generator = torch.Generator(cluster_ids.device).manual_seed(self.seed * 1_000_003 + int(self.steps))
            alpha, beta = self.posterior.alpha[cluster_ids], self.posterior.beta[cluster_ids]
            return beta_functions.thompson(alpha, beta, generator)
        successes, failures = self.posterior.successes[cluster_ids], self.posterior.failures[cluster_ids]
        return upper_confidence(successes, failures, self.exploration)

    def _estimates(self, cluster_ids: Tensor) -> Tensor:  # (N,) -> (N, E) float64
        if self.policy == "thompson":
            return beta_functions.mean(self.posterior.alpha[cluster_ids], self.posterior.beta[cluster_ids])
        successes = self.posterior.successes[cluster_ids]
        plays = successes + self.posterior.failures[cluster_ids]
        return torch.where(plays > 0, successes / plays, UNKNOWN)

    def _count(self, cluster_ids: Tensor, outcome: Tensor, slots: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Validate and count: successes, failures, and the rounds of each cell's cluster, all (C, E)."""
        device = self.posterior.successes.device
        slots = None if slots is None else slots.to(device)
        shape = (self.num_clusters, self.num_experts)
        return count_rounds(
            cluster_ids.to(device), outcome.to(device), slots, shape, discount=self.discount, threshold=self.threshold
        )


def upper_confidence(successes: Tensor, failures: Tensor, exploration: float) -> Tensor:  # (N, E), (N, E) -> (N, E)
    """UCB1's index ``mean + c·sqrt(2 ln t / n)``, t the row's total; the largest float32 for what is untried.

    >>> upper_confidence(torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 1.0]]), 0.0)
    tensor([[0.7500, 0.5000]])
    """
    plays = successes + failures
    total = plays.sum(dim=-1, keepdim=True).clamp(min=1.0)
    index = successes / plays + exploration * (2 * total.log() / plays).sqrt()
    return torch.where(plays > 0, index.clamp(max=_UNTRIED), _UNTRIED)


def count_rounds(
    cluster_ids: Tensor,  # (N,) int64
    outcome: Tensor,  # (N, E), or (N, k) with expert_indices
    expert_indices: Tensor | None,  # (N, k) int64
    shape: tuple[int, int],  # C, E
    *,
    discount: float,
    threshold: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # 3 x (C, E) float64
    """Successes and failures of a batch in which each row is worth ``discount ** (later rounds of its cluster)``; the rounds.

    A row with any outcome is one round of its cluster. Arguments and errors as
    :func:`~moe_posterior.evidence.read_outcomes`.
    """
    seen = read_outcomes(cluster_ids, outcome, expert_indices, shape, threshold)
    observed = ~outcome.isnan()
    played = observed.any(dim=1)
    worth = torch.zeros(len(outcome), dtype=torch.float64, device=outcome.device)
    worth[played] = discounts(cluster_ids[played], discount)
    worth_of_slot = worth[:, None].expand_as(outcome)[observed]  # row by row, as seen is
    counts = []
    for signal in (seen.signal, 1 - seen.signal):
        total = worth.new_zeros(shape[0] * shape[1])
        # Accumulating index_put_ counts duplicate cells and, unlike scatter_add_, sums in a fixed order on a GPU too.
        counts.append(total.index_put_((seen.cells,), signal * worth_of_slot, accumulate=True).view(shape))
    rounds = torch.bincount(cluster_ids[played], minlength=shape[0]).double()
    return counts[0], counts[1], rounds[:, None].expand(shape)


def validate_temperature(temperature: float) -> None:
    """Raise InvalidArgumentError unless positive and finite."""
    if not 0.0 < temperature < float("inf"):
        raise InvalidArgumentError(f"temperature must be positive and finite; got {temperature}")
