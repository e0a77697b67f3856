"""What is known of every expert's competence on every cluster: a Beta prior, additive evidence, and their sum.

Dimensions: N tokens, C clusters, E experts, k experts per token.
"""

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from moe_posterior import beta as beta_functions
from moe_posterior import evidence as evidence_functions
from moe_posterior import hierarchy
from moe_posterior.checks import validation
from moe_posterior.checks.declared import as_declared
from moe_posterior.checks.soundness import require_sound
from moe_posterior.churn import ChangingPool
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.evidence import Evidence, Observation, ProxyNoise
from moe_posterior.forgetting import retention

_KEPT_AFTER_SURPRISE = 0.1  # share of prior strength and evidence an expert keeps once it has surprised
_LEAST_TRUST = (
    1e-100  # nothing beside any evidence; without it 308 surprises leave no prior, and an unseen cell's mean is NaN
)
_DEGRADED_SHARE = 0.5  # the change that surprise looks for: competence fell to half of what was believed
_RECOVERY_SHARE = 0.5  # of the threshold of surprise: the one at which an expert that fell is taken for recovered
Pooling = Literal["odds", "hierarchy"]


class BetaPosterior(ChangingPool):
    """Beta posterior over the competence of each (cluster, expert): ``alpha = prior alpha + successes``, likewise beta.

    Prior and evidence are kept apart so that evidence stays additive: it merges by a sum, is rebuilt from a log, and can be
    discounted without forgetting the prior. All buffers are float64 and stay so through every cast and load; none receives
    a gradient.

    Args:
        num_clusters, num_experts: C and E.
        prior_alpha, prior_beta: pseudo-successes and pseudo-failures of every cell before any evidence. 1 and 1 (the
            default) is the uniform prior of the paper.
        half_life: observations of a cell after which what was seen there before counts half; the prior does not fade, nor
            does a cell that is not observed. None (default) never forgets.
        shrinkage: how strongly an expert's clusters inform each other, as the number of observations after which the expert's
            pooled record moves its prior means half-way; smaller is stronger, and it shrinks with the trust that an expert has
            lost. None (default) keeps cells apart, or, with ``pooling="hierarchy"``, is as many as a cell's prior
            is worth; there a number counts where that is less.
        pooling: what the pooled records do. ``"odds"`` (default) moves prior means, see
            :func:`~moe_posterior.evidence.pooled_odds`. ``"hierarchy"`` also lends them the strength of the record, as far as clusters
            are alike, and lets all experts share a drift, so that one whose outcomes nobody has seen lately is not thought better than
            the rest after they all lost the same, see :mod:`moe_posterior.hierarchy`. Surprise then compares with that drift, and an
            expert that does again as its prior says is trusted again.
        surprise: threshold in nats of a CUSUM on each expert's log-likelihood ratio "competence has halved" against "as
            believed". When it is crossed, the expert keeps a tenth of its prior strength and evidence, so that what is seen
            from then on decides. About ln(observations between false alarms); None (default) never does this.
        noise: known error rates of the competence signal; counts are de-biased by them.
        clusterings: M, if the C rows are M equal parts, each of which sees every observation whole: the clusters of M k-means runs
            one after the other. 1 (default) is the paper's.

    Raises:
        InvalidArgumentError: sizes below one, a prior that is not positive and finite, an option out of range.

    Source: *Bayesian Posterior Routing in Multi-Agent Systems*, "Prior and Posterior"; the options answer its "Scope and Known
    Constraints".

    >>> posterior = BetaPosterior(num_clusters=2, num_experts=3)
    >>> posterior.observe(torch.tensor([0, 0]), torch.tensor([[1.0, 0.0, torch.nan], [1.0, 1.0, torch.nan]]))
    >>> posterior.mean()[0]  # two successes; one of each; nothing seen
    tensor([0.7500, 0.5000, 0.5000], dtype=torch.float64)
    """

    prior_alpha: Tensor  # (C, E) float64
    prior_beta: Tensor  # (C, E) float64
    successes: Tensor  # (C, E) float64
    failures: Tensor  # (C, E) float64
    trust: Tensor  # (E,) float64, share of its prior strength an expert still has
    suspicion: Tensor  # (E,) float64, the CUSUM of surprise, in nats
    active: Tensor  # (E,) bool, False once an expert was removed
    odds: Tensor  # (E,) float64, derived: how the pooled record moves an expert's prior odds
    # With pooling="hierarchy" alone:
    relief: Tensor  # (E,) float64, the CUSUM of recovery of an expert that fell, in nats
    alike: Tensor  # (E,) float64, how many observations an expert's pooled record is worth in a cluster
    record: Tensor  # (7, E) float64, derived: a hierarchy.Record
    deviations: Tensor  # (4, E) float64, derived: hierarchy.Deviations
    _muted = False

    @as_declared
    def __init__(
        self,
        num_clusters: int,
        num_experts: int,
        *,
        prior_alpha: float = 1.0,
        prior_beta: float = 1.0,
        half_life: float | None = None,
        shrinkage: float | None = None,
        surprise: float | None = None,
        noise: ProxyNoise | None = None,
        clusterings: int = 1,
        pooling: Pooling = "odds",
    ) -> None:
        super().__init__()
        num_clusters = validation.count("num_clusters", num_clusters)
        num_experts = validation.count("num_experts", num_experts)
        for name, value in (("prior_alpha", prior_alpha), ("prior_beta", prior_beta)):
            if not 0.0 < value < float("inf"):
                raise InvalidArgumentError(f"{name} must be positive and finite; got {value}")
        for name, option in (("half_life", half_life), ("shrinkage", shrinkage), ("surprise", surprise)):
            if option is not None and not 0.0 < option < float("inf"):
                raise InvalidArgumentError(f"{name} must be positive and finite, or None; got {option}")
        if noise is not None:
            noise.validate()
        if clusterings < 1 or num_clusters % clusterings:
            raise InvalidArgumentError(f"clusterings must divide num_clusters={num_clusters}; got {clusterings}")
        if pooling not in get_args(Pooling):
            raise InvalidArgumentError(f"pooling must be one of {list(get_args(Pooling))}; got {pooling!r}")
        self.num_clusters, self.num_experts = num_clusters, num_experts
        self.initial_prior = (float(prior_alpha), float(prior_beta))
        self.half_life, self.shrinkage, self.surprise, self.noise = half_life, shrinkage, surprise, noise
        self.clusterings = clusterings
        self.pooling: Pooling = pooling
        cells, experts = (num_clusters, num_experts), (num_experts,)
        self.register_buffer("prior_alpha", torch.full(cells, prior_alpha, dtype=torch.float64))
        self.register_buffer("prior_beta", torch.full(cells, prior_beta, dtype=torch.float64))
        self.register_buffer("successes", torch.zeros(cells, dtype=torch.float64))
        self.register_buffer("failures", torch.zeros(cells, dtype=torch.float64))
        self.register_buffer("trust", torch.ones(experts, dtype=torch.float64))
        self.register_buffer("suspicion", torch.zeros(experts, dtype=torch.float64))
        self.register_buffer("active", torch.ones(experts, dtype=torch.bool))
        self.register_buffer("odds", torch.ones(experts, dtype=torch.float64), persistent=False)
        if pooling == "hierarchy":
            self._register_hierarchy()
        self._listeners: list[Callable[[Tensor | None], None]] = []
        self.register_load_state_dict_post_hook(_notify_after_load)

    @property
    def signed_counts(self) -> bool:  # type: ignore[override]
        """Whether evidence may be below 0: counts that are de-biased are, while they are few."""
        return self.noise is not None

    @property
    def alpha(self) -> Tensor:  # (C, E) float64
        """Pseudo-successes of prior and evidence together."""
        return self.parameters_of()[0]

    @property
    def beta(self) -> Tensor:  # (C, E) float64
        """Pseudo-failures of prior and evidence together."""
        return self.parameters_of()[1]

    def parameters_of(self, cluster_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:  # (M,) -> 2 x (M, E)
        """Alpha and beta in the given clusters (None: in all C), with pooling and lost trust taken into account."""
        rows = slice(None) if cluster_ids is None else _as_index(cluster_ids)
        cells = [table[rows] for table in (self.prior_alpha, self.prior_beta, self.successes, self.failures)]
        return self._combined(cells, slice(None))

    def parameters_at(self, cluster_ids: Tensor, expert_indices: Tensor) -> tuple[Tensor, Tensor]:  # -> 2 x their shape
        """Alpha and beta of single cells; the two index tensors broadcast. The same bits as :meth:`parameters_of` has there."""
        tables = (self.prior_alpha, self.prior_beta, self.successes, self.failures)
        cells = [table[cluster_ids, expert_indices] for table in tables]
        return self._combined(cells, expert_indices)

    def mean(self) -> Tensor:  # (C, E)
        """Posterior mean competence."""
        return beta_functions.mean(*self.parameters_of())

    def std(self) -> Tensor:  # (C, E)
        """Posterior standard deviation."""
        return beta_functions.std(*self.parameters_of())

    @as_declared
    def lcb(self, risk_aversion: float) -> Tensor:  # (C, E)
        """Lower confidence bound, ``mean - risk_aversion * std``."""
        return beta_functions.lcb(*self.parameters_of(), validation.number("risk_aversion", risk_aversion))

    @as_declared
    def quantile(self, probability: float) -> Tensor:  # (C, E)
        """Exact credible bound: competence exceeds it with probability ``1 - probability``."""
        return beta_functions.quantile(*self.parameters_of(), probability)

    def thompson(self, generator: torch.Generator | None = None) -> Tensor:  # (C, E)
        """One draw of competence a cell."""
        return beta_functions.thompson(*self.parameters_of(), generator)

    @torch.no_grad()
    def observe(
        self,
        cluster_ids: Tensor,  # (N,) int64, or (N, J) with shares
        outcome: Tensor,  # (N, E), or (N, k) with expert_indices
        expert_indices: Tensor | None = None,  # (N, k) int64
        *,
        shares: Tensor | None = None,  # (N, J)
        threshold: float | None = None,
        keep: Tensor | None = None,  # ()
        sync: bool = True,
    ) -> None:
        """Add observed outcomes to the evidence; every (cluster, expert) pair counts as often as it occurs.

        Args:
            cluster_ids: the cluster of each token, or, with ``shares``, its J clusters.
            outcome: competence signals in [0, 1]; NaN means not observed. Column e belongs to expert e, or, with
                ``expert_indices``, column j to the expert in slot j.
            expert_indices: the experts the columns belong to; None if the outcome covers all E experts.
            shares: by how much a token belongs to each of its clusters, 1 in all of a clustering: so much of an outcome counts there.
                See :class:`~moe_posterior.memberships.Memberships`.
            threshold: None (default) counts fractionally, ``successes += r`` and ``failures += 1 - r``; a number τ counts
                ``r >= τ`` as one success and anything below as one failure (the paper's binarisation).
            keep: share in [0, 1] of all evidence so far, of untouched cells too, to keep; alike on all ranks. None keeps it all.
            sync: where torch.distributed is initialised, sum the new evidence over all ranks, so that every rank holds the
                same belief. This is then a collective call: a rank without tokens calls it with an empty batch.

        With a half-life, a batch equals its observations one after the other, row by row; over several ranks it is their sum.

        Raises:
            InvalidArgumentError: wrong shape, an index out of range, or an outcome outside [0, 1], here or on another rank; nothing
                has changed.
        """
        together = sync and torch.distributed.is_available() and torch.distributed.is_initialized()
        mistake: InvalidArgumentError | None = None
        try:
            self.require_precision()
            seen = self._observations(cluster_ids, outcome, expert_indices, threshold, shares)
            if keep is not None:
                validation.number("keep", keep, least=0.0, most=1.0)
        except InvalidArgumentError as error:
            mistake = error
        if together:
            _agree(mistake, self.successes.device)
        if mistake is not None:
            raise mistake
        fading = None if self.half_life is None else retention(self.half_life)
        cells, sums = evidence_functions.total_by_cell(seen, self.noise, fading)  # (U,), (3, U)
        alarm = self._alarm(seen) if self.surprise is not None else None
        touched: Tensor | None = validation.integers("cluster_ids", cluster_ids).reshape(-1)
        if together:
            cells, sums = self._over_ranks(cells, sums)
            if alarm is not None:
                torch.distributed.all_reduce(alarm)
            touched = None  # other ranks touched other clusters
        if keep is not None:
            self.successes *= keep
            self.failures *= keep
            touched = None
        fired = alarm is not None and self._suspect(alarm)  # before the new evidence, which is not stale
        kept = 1.0 if fading is None else fading ** sums[2]
        for counts, added in ((self.successes.view(-1), sums[0]), (self.failures.view(-1), sums[1])):
            counts[cells] = counts[cells] * kept + added
        if self.pools:
            self._pool(None if fired or keep is not None else (cells % self.num_experts).unique())
            touched = None  # an expert's pooled record speaks in every cluster
        self._notify(None if fired else touched)

    @as_declared
    def merge(self, other: "BetaPosterior | Evidence") -> None:
        """Add another replica's evidence (not its prior) to this one.

        Raises:
            InvalidArgumentError: the shapes differ, or there are counts that are negative, NaN or inf; nothing has changed.
        """
        if not isinstance(other, (BetaPosterior, Evidence)):
            raise InvalidArgumentError(f"other must be a BetaPosterior or Evidence; got {validation.described(other)}")
        expected = tuple(self.successes.shape)
        for name, counts in (("successes", other.successes), ("failures", other.failures)):
            if tuple(counts.shape) != expected:
                raise InvalidArgumentError(f"other.{name} must have shape {expected}; got {tuple(counts.shape)}")
        given = {"successes": other.successes, "failures": other.failures}
        require_sound(given, signed=self.signed_counts, of="other.")
        with torch.no_grad():
            self.successes += other.successes.to(self.successes)
            self.failures += other.failures.to(self.failures)
        self._changed()

    @torch.no_grad()
    @as_declared
    def warm_start(
        self,
        cluster_ids: Tensor,  # (N,) int64, or (N, J) with shares
        outcome: Tensor,  # (N, E), or (N, k) with expert_indices
        expert_indices: Tensor | None = None,  # (N, k) int64
        *,
        shares: Tensor | None = None,  # (N, J)
        strength: float | None = None,
        threshold: float | None = None,
    ) -> None:
        """Turn held-out outcomes into the prior; evidence is left as it is.

        The new prior is the initial one plus the counts, so its mean is the observed rate drawn slightly to the initial
        mean, cell by cell. With pooling the initial mean is each expert's pooled rate, worth as many observations as
        its clusters are alike (:func:`~moe_posterior.evidence.between_cluster_strength`): rarely seen cells start there.

        Args:
            cluster_ids, outcome, expert_indices, shares, threshold: as in :meth:`observe`.
            strength: at most this many pseudo-observations a cell (α + β), at an unchanged mean; None keeps every count. A
                small strength lets later evidence overrule the warm start quickly; a cell seen less often keeps less.

        Raises:
            InvalidArgumentError: as :meth:`observe`, or a strength that is not positive; nothing has changed.

        Source: *Bayesian Posterior Routing in Multi-Agent Systems*, "Calibration Objective".
        """
        self.require_precision()
        if strength is not None:
            strength = validation.number("strength", strength, above=0.0, finite=False)
        seen = self._observations(cluster_ids, outcome, expert_indices, threshold, shares)
        cells, sums = evidence_functions.total_by_cell(seen, self.noise, None)
        successes, failures = torch.zeros_like(self.successes), torch.zeros_like(self.failures)
        successes.view(-1)[cells], failures.view(-1)[cells] = sums[0].clamp(min=0), sums[1].clamp(min=0)
        alpha, beta = (torch.full_like(successes, value) for value in self.initial_prior)
        if self.pools:
            totals = (counts.sum(0) / self.clusterings for counts in (successes, failures))
            pooled = beta_functions.mean(
                *(prior + total for prior, total in zip((alpha[0], beta[0]), totals, strict=True))
            )
            worth = evidence_functions.between_cluster_strength(successes, failures)
            alpha, beta = alpha + worth * pooled, beta + worth * (1 - pooled)
        alpha, beta = alpha + successes, beta + failures
        if strength is not None:
            shorten = (strength / (alpha + beta)).clamp(max=1.0)
            alpha, beta = alpha * shorten, beta * shorten
        require_sound({"prior_alpha": alpha, "prior_beta": beta})
        self.prior_alpha.copy_(alpha)
        self.prior_beta.copy_(beta)
        self.trust.fill_(1.0)
        if self.pooling == "hierarchy":
            self.alike.copy_(hierarchy.likeness(successes + failures, worth))
        self._changed()

    @torch.no_grad()
    def reset(self, *, prior: bool = False) -> None:
        """Forget all evidence and suspicion; with ``prior=True`` also any warm start."""
        self.successes.zero_()
        self.failures.zero_()
        self.suspicion.zero_()
        self.trust.fill_(1.0)
        if self.pooling == "hierarchy":
            self.relief.zero_()
        if prior:
            if self.pooling == "hierarchy":
                self.alike.fill_(hierarchy.ALIKE)
            self.prior_alpha.fill_(self.initial_prior[0])
            self.prior_beta.fill_(self.initial_prior[1])
        self._changed()

    @torch.no_grad()
    @as_declared
    def forget(self, keep: float, experts: Tensor | None = None) -> None:  # (M,) int64 or (E,) bool
        """Keep only a share of the evidence of the given experts (None: of all); the prior stays.

        Raises:
            InvalidArgumentError: ``keep`` outside [0, 1].
        """
        keep = validation.number("keep", keep, least=0.0, most=1.0)
        columns = slice(None) if experts is None else self._columns(experts)
        self.successes[:, columns] *= keep
        self.failures[:, columns] *= keep
        self._changed()

    def _columns(self, experts: Tensor) -> Tensor:
        found = validation.tensor("experts", experts)
        if found.dtype == torch.bool:
            if tuple(found.shape) != (self.num_experts,):
                raise InvalidArgumentError(
                    f"experts must be bool of shape ({self.num_experts},); got {validation.described(found)}"
                )
            return found
        return validation.integers("experts", experts, ("M",), low=0, high=self.num_experts - 1)

    def subscribe(self, listener: Callable[[Tensor | None], None]) -> Callable[[], None]:
        """Call ``listener(cluster_ids)`` after every change of the belief; None instead of ids means any cluster changed.

        Returns:
            A function that ends the subscription; calling it again does nothing.
        """
        self._listeners.append(listener)

        def unsubscribe() -> None:
            if listener in self._listeners:
                self._listeners.remove(listener)

        return unsubscribe

    def mute(self, muted: bool = True) -> None:
        """Call no listener, until ``mute(False)``: for many changes in a row between which nobody looks."""
        self._muted = muted

    def extra_repr(self) -> str:
        options = {
            "half_life": self.half_life,
            "shrinkage": self.shrinkage,
            "surprise": self.surprise,
            "noise": self.noise,
        }
        given = "".join(f", {name}={value}" for name, value in options.items() if value is not None)
        given += f", pooling={self.pooling!r}" * (self.pooling != "odds")
        observed = float((self.successes + self.failures).sum()) / self.clusterings
        return f"num_clusters={self.num_clusters}, num_experts={self.num_experts}, observations={observed:g}{given}"

    def _observations(
        self,
        cluster_ids: Tensor,
        outcome: Tensor,
        expert_indices: Tensor | None,
        threshold: float | None,
        shares: Tensor | None,
    ) -> Observation:
        device = self.successes.device
        ids = validation.tensor("cluster_ids", cluster_ids).to(device)
        signal = validation.tensor("outcome", outcome).to(device)
        experts = None
        if expert_indices is not None:
            experts = validation.tensor("expert_indices", expert_indices).to(device)
        shape = (self.num_clusters, self.num_experts)
        if shares is None:
            return evidence_functions.read_outcomes(ids, signal, experts, shape, threshold)
        weights = validation.floats("shares", shares).to(device)
        return evidence_functions.shared_outcomes(ids, weights, signal, experts, shape, threshold)

    def _combined(
        self, cells: list[Tensor], experts: Tensor | slice, shift: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Alpha and beta, elementwise, from prior alpha, prior beta, successes and failures of these experts' cells."""
        prior_alpha, prior_beta, successes, failures = cells
        trust = self.trust[experts]
        prior_alpha, prior_beta = prior_alpha * trust, prior_beta * trust
        if self.pooling == "hierarchy":
            total, own, alike = prior_alpha + prior_beta, self.deviations[:, experts], self.alike[experts]
            mean, strength = hierarchy.cell_prior(prior_alpha / total, total, own[0], own[2], alike)
            if shift is not None:
                mean = evidence_functions.shift_odds(mean, torch.exp(shift[experts] - own[0]))
            prior_alpha, prior_beta = strength * mean, strength * (1 - mean)
        elif self.shrinkage is not None:
            total = prior_alpha + prior_beta
            prior_alpha = total * evidence_functions.shift_odds(prior_alpha / total, self.odds[experts])
            prior_beta = total - prior_alpha
        if self.noise is not None:  # de-biased counts can fall below zero while they are few
            successes, failures = successes.clamp(min=0), failures.clamp(min=0)
        return prior_alpha + successes, prior_beta + failures

    def _alarm(self, seen: Observation) -> Tensor:  # -> (1, E), or (2, E) with pooling="hierarchy"
        """What a batch adds to each expert's suspicion, and to its relief: it counts as one step of the CUSUM."""
        cells, experts = seen.cells, seen.cells % self.num_experts
        clusters = cells // self.num_experts
        believed = beta_functions.mean(*self._believed_of(clusters, experts))
        ratio = evidence_functions.degraded_log_likelihood_ratio
        steps = [ratio(seen.signal, believed, _DEGRADED_SHARE, self.noise)]
        if self.pooling == "hierarchy":  # recovery: it does as its prior says and no longer half as well
            prior = beta_functions.mean(self.prior_alpha[clusters, experts], self.prior_beta[clusters, experts])
            before = evidence_functions.shift_odds(prior, torch.exp(self.deviations[3, experts]))
            steps.append(-ratio(seen.signal, before, _DEGRADED_SHARE, self.noise))
        if seen.weight is not None:
            steps = [step * (seen.weight / self.clusterings) for step in steps]
        added = self.suspicion.new_zeros(len(steps), self.num_experts)
        rows = torch.arange(len(steps), device=experts.device)[:, None].expand(-1, len(experts))
        return added.index_put_((rows, experts.expand_as(rows)), torch.stack(steps), accumulate=True)

    def _believed_of(self, clusters: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:  # 2 x (M,) -> 2 x (M,)
        """Alpha and beta that outcomes are judged by: with a hierarchy as far as the pool's drift is known from other experts."""
        if self.pooling != "hierarchy":
            return self.parameters_at(clusters, experts)
        tables = (self.prior_alpha, self.prior_beta, self.successes, self.failures)
        return self._combined([table[clusters, experts] for table in tables], experts, self.deviations[1])

    def _suspect(self, alarm: Tensor) -> bool:  # (1, E) or (2, E)
        threshold = self.surprise or torch.inf
        self.suspicion.copy_((self.suspicion + alarm[0]).clamp(min=0.0))
        fell = changed = self.suspicion > threshold
        if len(alarm) > 1:
            fallen = self.trust < 1
            self.relief.copy_(torch.where(fallen, (self.relief + alarm[1]).clamp(min=0.0), 0.0))
            changed = fell | (self.relief > _RECOVERY_SHARE * threshold)
        if not bool(changed.any()):
            return False
        kept = torch.where(changed, _KEPT_AFTER_SURPRISE, 1.0).to(self.trust.dtype)
        self.trust.mul_(torch.where(fell, _KEPT_AFTER_SURPRISE, 1.0)).clamp_(min=_LEAST_TRUST)
        self.trust.masked_fill_(changed & ~fell, 1.0)  # what was known of it before it fell holds again
        self.successes *= kept
        self.failures *= kept
        self.suspicion.masked_fill_(changed, 0.0)
        if len(alarm) > 1:
            self.relief.masked_fill_(changed, 0.0)
        return True

    @property
    def pools(self) -> bool:
        """Whether an expert's pooled record speaks in all its clusters."""
        return self.shrinkage is not None or self.pooling == "hierarchy"

    @property
    def fallen(self) -> Tensor:  # (E,) bool
        """Experts that surprise has taken trust from and that have not recovered since."""
        return (self.trust < 1) & self.active

    def _pool(self, experts: Tensor | None) -> None:  # (M,) int64; None: all
        """Bring what the pooled records say up to date, after a change to these experts."""
        device = self.successes.device
        if not self.pools or device.type == "meta":
            return
        for name in ("odds", "record", "deviations"):  # a load with assign=True leaves derived buffers where they were
            derived = self._buffers.get(name)
            if derived is not None and derived.device != device:
                setattr(self, name, torch.zeros_like(derived, device=device))
        columns = torch.arange(self.num_experts, device=device) if experts is None else experts
        tables = (self.prior_alpha, self.prior_beta, self.successes, self.failures)
        # One contiguous row an expert: a sum then takes the same steps however many experts are brought up to date.
        alpha, beta, successes, failures = (table.T[columns].contiguous() for table in tables)
        expected = beta_functions.mean(alpha, beta)
        if self.pooling == "hierarchy":
            self.record[:, columns] = self._record_of(expected, alpha + beta, successes, failures, self.trust[columns])
            self._deviate()
            return
        # An expert whose prior has lost its weight is judged by its record sooner, by as much.
        # Each clustering has seen everything: what they have seen in all is M times what happened.
        strength = (self.shrinkage or 1.0) * self.trust[columns] * self.clusterings
        self.odds[columns] = evidence_functions.pooled_odds(successes, failures, expected, strength)

    def _starts(self) -> dict[str, float]:
        starts = {"trust": 1.0, "suspicion": 0.0, "active": True, "odds": 1.0}
        if self.pooling == "hierarchy":
            starts |= {"relief": 0.0, "alike": hierarchy.ALIKE, "record": 0.0, "deviations": 0.0}
        return starts

    def _register_hierarchy(self) -> None:
        nothing = torch.zeros_like(self.trust)
        self.register_buffer("relief", nothing.clone())
        self.register_buffer("alike", nothing + hierarchy.ALIKE)
        for name, fields in (("record", hierarchy.Record), ("deviations", hierarchy.Deviations)):
            self.register_buffer(name, nothing.repeat(len(fields._fields), 1), persistent=False)
        self._pool(None)

    def _deviate(self) -> None:
        """Write down how the experts deviate from their priors, from their records."""
        record = hierarchy.Record(*self.record.numpy(force=True))
        found = np.stack(hierarchy.deviations(record, self.active.numpy(force=True)))
        self.deviations.copy_(torch.from_numpy(found))

    def _record_of(
        self, expected: Tensor, strength: Tensor, successes: Tensor, failures: Tensor, trust: Tensor
    ) -> Tensor:  # 4 x (M, C), (M,) -> (7, M)
        total, centre = successes + failures, expected.mean(dim=1)
        # The variance of log odds under a Beta of so many observations around a half; lost trust loosens it.
        worth = strength.mean(dim=1).clamp(max=hierarchy.ALIKE).clamp(min=self.shrinkage or 0.0)
        own = 4 / (trust * worth)
        beyond = (strength - sum(self.initial_prior)).clamp(min=0.0).sum(dim=1)
        known = beyond * trust * centre * (1 - centre)
        tables = (successes, failures, total * expected, total * (1 - expected))
        seen = [table.sum(dim=1) / self.clusterings for table in tables]  # each clustering has seen everything
        return torch.stack([*seen, centre, own, known / self.clusterings])

    def _over_ranks(self, cells: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        dense = sums.new_zeros(3, self.successes.numel())
        dense[:, cells] = sums
        torch.distributed.all_reduce(dense)
        cells = (dense[2] > 0).nonzero().flatten()
        return cells, dense[:, cells]

    def _changed(self) -> None:
        self._pool(None)
        self._notify(None)

    def _notify(self, cluster_ids: Tensor | None) -> None:
        for listener in () if self._muted else self._listeners:
            listener(cluster_ids)


def _as_index(cluster_ids: Tensor) -> Tensor:
    """Ids of another width would index as a mask, or not at all."""
    if isinstance(cluster_ids, Tensor) and cluster_ids.dtype == torch.int64:
        return cluster_ids
    return validation.integers("cluster_ids", cluster_ids)


def _notify_after_load(module: torch.nn.Module, incompatible_keys: object) -> None:
    if isinstance(module, BetaPosterior):
        with torch.no_grad():
            module._changed()


def _agree(mistake: InvalidArgumentError | None, device: torch.device) -> None:
    """Raise on every rank if any has made a mistake: the others would wait for it in the next collective for ever."""
    mistakes = torch.tensor(float(mistake is not None), device=device)
    torch.distributed.all_reduce(mistakes)
    if mistake is None and mistakes > 0:
        raise InvalidArgumentError("another rank's outcomes were refused, so nothing has changed on this one")
