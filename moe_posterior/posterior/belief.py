"""The tables of a belief and how they are read: prior, evidence, trust, and what the experts' pooled records add.

Dimensions: C clusters, E experts, M cells or clusters asked for.
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
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.evidence import ProxyNoise
from moe_posterior.precision import FixedPrecision

Pooling = Literal["odds", "hierarchy"]


class Belief(FixedPrecision):
    """What :class:`~moe_posterior.BetaPosterior` holds and answers; that class says how it changes, and what the arguments mean."""

    prior_alpha: Tensor  # (C, E) float64
    prior_beta: Tensor  # (C, E) float64
    successes: Tensor  # (C, E) float64
    failures: Tensor  # (C, E) float64
    trust: Tensor  # (E,) float64, share of its prior strength an expert still has
    suspicion: Tensor  # (E,) float64, the CUSUM of surprise, in nats
    active: Tensor  # (E,) bool, False once an expert was removed
    foreseen: Tensor  # (C, E) float64, with foresees=True alone: what was expected of the outcomes observed, summed
    odds: Tensor  # (E,) float64, derived: how the pooled record moves an expert's prior odds
    # With pooling="hierarchy" alone:
    relief: Tensor  # (E,) float64, the CUSUM of recovery of an expert that fell, in nats
    alike: Tensor  # (E,) float64, how many observations an expert's pooled record is worth in a cluster
    record: Tensor  # (7, E) float64, derived: a hierarchy.Record
    deviations: Tensor  # (4, E) float64, derived: hierarchy.Deviations
    _muted = False
    foresees = False

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
        foresees: bool = False,
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
        self.foresees = foresees
        cells, experts = (num_clusters, num_experts), (num_experts,)
        self.register_buffer("prior_alpha", torch.full(cells, prior_alpha, dtype=torch.float64))
        self.register_buffer("prior_beta", torch.full(cells, prior_beta, dtype=torch.float64))
        self.register_buffer("successes", torch.zeros(cells, dtype=torch.float64))
        self.register_buffer("failures", torch.zeros(cells, dtype=torch.float64))
        if foresees:
            self.register_buffer("foreseen", torch.zeros(cells, dtype=torch.float64))
        self.register_buffer("trust", torch.ones(experts, dtype=torch.float64))
        self.register_buffer("suspicion", torch.zeros(experts, dtype=torch.float64))
        self.register_buffer("active", torch.ones(experts, dtype=torch.bool))
        self.register_buffer("odds", torch.ones(experts, dtype=torch.float64), persistent=False)
        if pooling == "hierarchy":
            self._register_hierarchy()
        self._listeners: list[Callable[[Tensor | None], None]] = []
        self.register_load_state_dict_post_hook(notify_after_load)

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

    @property
    def evidence(self) -> tuple[Tensor, ...]:  # 2 or 3 x (C, E) float64
        """The tables that count: successes, failures and, with ``foresees``, what was expected of those outcomes."""
        return (self.successes, self.failures, *((self.foreseen,) if self.foresees else ()))

    @property
    def strength(self) -> Tensor:  # (C, E) float64
        """Pseudo-observations that the prior of each cell is worth, before any trust is lost."""
        return self.prior_alpha + self.prior_beta

    def parameters_of(
        self,
        cluster_ids: Tensor | None = None,  # (M,)
        expected: Tensor | None = None,  # (M, E)
    ) -> tuple[Tensor, Tensor]:  # 2 x (M, E)
        """Alpha and beta in the given clusters (None: in all C), with pooling and lost trust taken into account.

        ``expected`` are prior means of the rows' own, in (0, 1), in place of their clusters', worth as much; the result is
        differentiable in them.
        """
        rows = slice(None) if cluster_ids is None else _as_index(cluster_ids)
        cells = [table[rows] for table in (self.prior_alpha, self.prior_beta, self.successes, self.failures)]
        return self._combined(with_means(cells, expected), slice(None))

    def parameters_at(
        self, cluster_ids: Tensor, expert_indices: Tensor, expected: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:  # -> 2 x their shape
        """Alpha and beta of single cells; the index tensors broadcast. The same bits as :meth:`parameters_of` has there."""
        tables = (self.prior_alpha, self.prior_beta, self.successes, self.failures)
        cells = [table[cluster_ids, expert_indices] for table in tables]
        return self._combined(with_means(cells, expected), expert_indices)

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

    @property
    def pools(self) -> bool:
        """Whether an expert's pooled record speaks in all its clusters."""
        return self.shrinkage is not None or self.pooling == "hierarchy"

    @property
    def fallen(self) -> Tensor:  # (E,) bool
        """Experts that surprise has taken trust from and that have not recovered since."""
        return (self.trust < 1) & self.active

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
        foreseen = None
        if self.foresees:
            won = self.foreseen.T[columns].contiguous()
            foreseen = won, successes + failures - won
        if self.pooling == "hierarchy":
            counts = (successes, failures, foreseen)
            self.record[:, columns] = self._record_of(expected, alpha + beta, counts, self.trust[columns])
            self._deviate()
            return
        # An expert whose prior has lost its weight is judged by its record sooner, by as much.
        # Each clustering has seen everything: what they have seen in all is M times what happened.
        strength = (self.shrinkage or 1.0) * self.trust[columns] * self.clusterings
        self.odds[columns] = evidence_functions.pooled_odds(successes, failures, expected, strength, foreseen)

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
        self,
        expected: Tensor,  # (M, C)
        strength: Tensor,  # (M, C)
        counts: tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None],  # 4 x (M, C)
        trust: Tensor,  # (M,)
    ) -> Tensor:  # (7, M)
        successes, failures, foreseen = counts
        total, centre = successes + failures, expected.mean(dim=1)
        won, lost = (total * expected, total * (1 - expected)) if foreseen is None else foreseen
        # The variance of log odds under a Beta worth that many observations around a half; lost trust loosens it.
        worth = strength.mean(dim=1).clamp(max=hierarchy.ALIKE).clamp(min=self.shrinkage or 0.0)
        own = 4 / (trust * worth)
        beyond = (strength - sum(self.initial_prior)).clamp(min=0.0).sum(dim=1)
        known = beyond * trust * centre * (1 - centre)
        tables = (successes, failures, won, lost)
        seen = [table.sum(dim=1) / self.clusterings for table in tables]  # each clustering has seen everything
        return torch.stack([*seen, centre, own, known / self.clusterings])

    def _changed(self) -> None:
        self._pool(None)
        self._notify(None)

    def _notify(self, cluster_ids: Tensor | None) -> None:
        for listener in () if self._muted else self._listeners:
            listener(cluster_ids)


def with_means(cells: list[Tensor], expected: Tensor | None) -> list[Tensor]:
    """Prior alpha and beta, successes and failures of cells, with the prior at these means and of the same strength."""
    if expected is None:
        return cells
    strength = cells[0] + cells[1]
    expected = expected.to(strength)
    return [strength * expected, strength * (1 - expected), *cells[2:]]


def _as_index(cluster_ids: Tensor) -> Tensor:
    """Ids of another width would index as a mask, or not at all."""
    if isinstance(cluster_ids, Tensor) and cluster_ids.dtype == torch.int64:
        return cluster_ids
    return validation.integers("cluster_ids", cluster_ids)


def notify_after_load(module: torch.nn.Module, incompatible_keys: object) -> None:
    """Bring up to date what is derived from a belief that was just loaded."""
    if isinstance(module, Belief):
        with torch.no_grad():
            module._changed()
