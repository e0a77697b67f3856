"""How a belief about the experts changes: outcomes, other replicas, a warm start, forgetting, experts that come and go.

Dimensions: N tokens, C clusters, E experts, k experts per token, J clusters per token.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from moe_posterior import beta as beta_functions
from moe_posterior import evidence as evidence_functions
from moe_posterior import hierarchy
from moe_posterior.checks import validation
from moe_posterior.checks.declared import as_declared
from moe_posterior.checks.soundness import require_sound
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.evidence import Evidence, Observation
from moe_posterior.forgetting import retention
from moe_posterior.posterior import inheritance, ranks, surprise
from moe_posterior.posterior.belief import Belief, with_means


class BetaPosterior(Belief):
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
        foresees: also sum what was expected of the outcomes observed, in ``foreseen``: for prior means that differ within a cluster,
            as a learned prior's do. Pooled records are then held against that sum. Off by default.

    Raises:
        InvalidArgumentError: sizes below one, a prior that is not positive and finite, an option out of range.

    Source: *Bayesian Posterior Routing in Multi-Agent Systems*, "Prior and Posterior"; the options answer its "Scope and Known
    Constraints".

    >>> posterior = BetaPosterior(num_clusters=2, num_experts=3)
    >>> posterior.observe(torch.tensor([0, 0]), torch.tensor([[1.0, 0.0, torch.nan], [1.0, 1.0, torch.nan]]))
    >>> posterior.mean()[0]  # two successes; one of each; nothing seen
    tensor([0.7500, 0.5000, 0.5000], dtype=torch.float64)
    """

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
        expected: Tensor | None = None,  # as outcome
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
            expected: with ``foresees``, the prior mean of each outcome, in [0, 1]; None takes those of the cells.

        With a half-life, a batch equals its observations one after the other, row by row; over several ranks it is their sum.

        Raises:
            InvalidArgumentError: wrong shape, an index out of range, or an outcome outside [0, 1], here or on another rank; nothing
                has changed.
        """
        together = sync and torch.distributed.is_available() and torch.distributed.is_initialized()
        mistake: InvalidArgumentError | None = None
        try:
            self.require_precision()
            seen = self._observations(cluster_ids, outcome, expert_indices, threshold, shares, expected)
            if keep is not None:
                validation.number("keep", keep, least=0.0, most=1.0)
        except InvalidArgumentError as error:
            mistake = error
        if together:
            ranks.agree(mistake, self.successes.device)
        if mistake is not None:
            raise mistake
        fading = None if self.half_life is None else retention(self.half_life)
        cells, sums = evidence_functions.total_by_cell(seen, self.noise, fading)  # (U,), (3 or 4, U)
        alarm = self._alarm(seen) if self.surprise is not None else None
        touched: Tensor | None = validation.integers("cluster_ids", cluster_ids).reshape(-1)
        if together:
            cells, sums = ranks.summed(cells, sums, self.successes.numel())
            if alarm is not None:
                torch.distributed.all_reduce(alarm)
            touched = None  # other ranks touched other clusters
        if keep is not None:
            for counts in self.evidence:
                counts *= keep
            touched = None
        fired = alarm is not None and self._suspect(alarm)  # before the new evidence, which is not stale
        kept = 1.0 if fading is None else fading ** sums[2]
        for counts, added in zip(self.evidence, (*sums[:2], *sums[3:]), strict=True):
            flat = counts.view(-1)
            flat[cells] = flat[cells] * kept + added
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
            if self.foresees:
                foreseen = getattr(other, "foreseen", None)
                if foreseen is None:  # as these cells' own priors would have it
                    total = other.successes.to(self.successes) + other.failures.to(self.failures)
                    foreseen = total * beta_functions.mean(self.prior_alpha, self.prior_beta)
                self.foreseen += foreseen.to(self.foreseen)
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
        for counts in self.evidence:
            counts.zero_()
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
        for counts in self.evidence:
            counts[:, columns] *= keep
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

    @torch.no_grad()
    def add_expert(self, prior_from: Mapping[int, float] | None = None, *, strength: float = 4.0) -> int:
        """Make room for another expert and return its index; the others' belief is unchanged.

        Args:
            prior_from: donors and how much their domains overlap with the new expert's (any positive weights): in each
                cluster its prior mean is their weighted posterior mean. None starts it from the initial prior.
            strength: pseudo-observations the inherited prior is worth; few, since the newcomer has proved nothing itself.

        Raises:
            InvalidArgumentError: an unknown donor, a weight or strength that is not positive.

        Source: *Bayesian Posterior Routing in Multi-Agent Systems*, "Dynamic Expert Pool Management".
        """
        alpha, beta = self._inherited(prior_from, strength)
        nothing = torch.zeros_like(alpha)
        columns = {"prior_alpha": alpha, "prior_beta": beta, "successes": nothing, "failures": nothing}
        columns |= {"foreseen": nothing} if self.foresees else {}
        for name, column in columns.items():
            setattr(self, name, torch.cat([getattr(self, name), column[:, None]], dim=1))
        for name, start in self._starts().items():
            per_expert = getattr(self, name)
            room = per_expert.new_full((*per_expert.shape[:-1], 1), start)
            setattr(self, name, torch.cat([per_expert, room], dim=-1))
        self.num_experts += 1
        self._changed()
        return self.num_experts - 1

    @torch.no_grad()
    def remove_expert(self, expert: int) -> None:
        """Never choose this expert again; its index is not given to another, so delayed outcomes cannot be misattributed.

        Raises:
            InvalidArgumentError: there is no such active expert, or it is the last one.
        """
        expert = self._require_active(expert)
        if int(self.active.sum()) == 1:
            raise InvalidArgumentError(f"expert {expert} is the last active one and cannot be removed")
        self.active[expert] = False
        self._changed()

    @torch.no_grad()
    def replace_expert(
        self, expert: int, prior_from: Mapping[int, float] | None = None, *, strength: float = 4.0
    ) -> None:
        """A retrained or exchanged expert in the same place: its evidence is dropped; arguments as :meth:`add_expert`."""
        expert = self._require_active(expert)
        alpha, beta = self._inherited(prior_from, strength)
        self.prior_alpha[:, expert], self.prior_beta[:, expert] = alpha, beta
        for counts in self.evidence:
            counts[:, expert] = 0.0
        for name, start in self._starts().items():
            getattr(self, name)[..., expert] = start
        self._changed()

    def _observations(
        self,
        cluster_ids: Tensor,
        outcome: Tensor,
        expert_indices: Tensor | None,
        threshold: float | None,
        shares: Tensor | None,
        expected: Tensor | None = None,
    ) -> Observation:
        device = self.successes.device
        ids = validation.tensor("cluster_ids", cluster_ids).to(device)
        signal = validation.tensor("outcome", outcome).to(device)
        experts = None
        if expert_indices is not None:
            experts = validation.tensor("expert_indices", expert_indices).to(device)
        shape = (self.num_clusters, self.num_experts)
        if expected is not None and (not self.foresees or shares is not None):
            raise InvalidArgumentError("expected must be None for a belief without foresees=True, and with shares")
        if shares is None:
            seen = evidence_functions.read_outcomes(ids, signal, experts, shape, threshold)
            return self._with_expected(seen, signal, expected) if self.foresees else seen
        if self.foresees:
            raise InvalidArgumentError("shares must be None for a belief with foresees=True")
        weights = validation.floats("shares", shares).to(device)
        return evidence_functions.shared_outcomes(ids, weights, signal, experts, shape, threshold)

    def _with_expected(self, seen: Observation, signal: Tensor, expected: Tensor | None) -> Observation:
        if expected is None:
            cells = (table.reshape(-1)[seen.cells] for table in (self.prior_alpha, self.prior_beta))
            return seen._replace(expected=beta_functions.mean(*cells))
        means = validation.outcomes("expected", expected).to(self.successes)
        if means.shape != signal.shape:
            raise InvalidArgumentError(
                f"expected must have the shape of outcome, {tuple(signal.shape)}; got {tuple(means.shape)}"
            )
        means = means[~torch.isnan(signal)]
        if bool(torch.isnan(means).any()):
            raise InvalidArgumentError("expected must be a number wherever an outcome was observed; got NaN")
        return seen._replace(expected=means)

    def _alarm(self, seen: Observation) -> Tensor:  # -> (1, E), or (2, E) with pooling="hierarchy"
        clusters, experts = seen.cells // self.num_experts, seen.cells % self.num_experts
        believed = beta_functions.mean(*self._believed_of(clusters, experts, seen.expected))
        before = None
        if self.pooling == "hierarchy":
            prior = seen.expected
            if prior is None:
                prior = beta_functions.mean(self.prior_alpha[clusters, experts], self.prior_beta[clusters, experts])
            before = evidence_functions.shift_odds(prior, torch.exp(self.deviations[3, experts]))
        steps = surprise.steps(seen, believed, before, self.noise, self.clusterings)
        return surprise.by_expert(steps, experts, self.num_experts)

    def _believed_of(
        self, clusters: Tensor, experts: Tensor, expected: Tensor | None
    ) -> tuple[Tensor, Tensor]:  # 3 x (M,) -> 2 x (M,)
        """Alpha and beta that outcomes are judged by: with a hierarchy as far as the pool's drift is known from other experts."""
        if self.pooling != "hierarchy":
            return self.parameters_at(clusters, experts, expected)
        tables = (self.prior_alpha, self.prior_beta, self.successes, self.failures)
        cells = with_means([table[clusters, experts] for table in tables], expected)
        return self._combined(cells, experts, self.deviations[1])

    def _suspect(self, alarm: Tensor) -> bool:  # (1, E) or (2, E)
        relief = self.relief if len(alarm) > 1 else None
        found = surprise.judge(alarm, self.suspicion, relief, self.trust, self.surprise or torch.inf)
        self.suspicion.copy_(found.suspicion)
        if relief is not None and found.relief is not None:
            relief.copy_(found.relief)
        if found.kept is None:
            return False
        self.trust.copy_(found.trust)
        for counts in self.evidence:
            counts *= found.kept
        return True

    def _starts(self) -> dict[str, float]:
        starts = {"trust": 1.0, "suspicion": 0.0, "active": True, "odds": 1.0}
        if self.pooling == "hierarchy":
            starts |= {"relief": 0.0, "alike": hierarchy.ALIKE, "record": 0.0, "deviations": 0.0}
        return starts

    def _inherited(self, prior_from: Mapping[int, float] | None, strength: float) -> tuple[Tensor, Tensor]:  # 2 x (C,)
        if prior_from is None:
            alpha, beta = (self.prior_alpha.new_full((self.num_clusters,), value) for value in self.initial_prior)
            return alpha, beta
        inheritance.require_donors(prior_from, strength, self.num_experts)
        return inheritance.prior_of(self.mean(), prior_from, float(strength))

    def _require_active(self, expert: int) -> int:
        if not validation.is_index(expert, self.num_experts) or not bool(self.active[int(expert)]):
            raise InvalidArgumentError(f"expert must be an active index below {self.num_experts}; got {expert}")
        return int(expert)
