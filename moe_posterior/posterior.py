"""What is known of every expert's competence on every cluster: a Beta prior, additive evidence, and their sum.

Dimensions: N tokens, C clusters, E experts, k experts per token.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moe_posterior import beta as beta_functions
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.precision import FixedPrecision


class Evidence(NamedTuple):
    """Successes and failures to add to a belief: plain sums, so they merge across ranks and replicas by addition."""

    successes: Tensor  # (C, E) float64
    failures: Tensor  # (C, E) float64


class BetaPosterior(FixedPrecision):
    """Beta posterior over the competence of each (cluster, expert): ``alpha = prior_alpha + successes``, likewise beta.

    Prior and evidence are kept apart so that evidence stays additive: it merges by a sum, is rebuilt from a log, and can be
    discounted without forgetting the prior. All buffers are float64 and stay so through every cast and load; none receives
    a gradient.

    Args:
        num_clusters, num_experts: C and E.
        prior_alpha, prior_beta: pseudo-successes and pseudo-failures of every cell before any evidence. 1 and 1 (the
            default) is the uniform prior of the paper.

    Raises:
        InvalidArgumentError: sizes below one, or a prior that is not positive and finite.

    Source: *Bayesian Posterior Routing in Multi-Agent Systems*, "Prior and Posterior".

    >>> posterior = BetaPosterior(num_clusters=2, num_experts=3)
    >>> posterior.observe(torch.tensor([0, 0]), torch.tensor([[1.0, 0.0, torch.nan], [1.0, 1.0, torch.nan]]))
    >>> posterior.mean()[0]  # two successes; one of each; nothing seen
    tensor([0.7500, 0.5000, 0.5000], dtype=torch.float64)
    """

    prior_alpha: Tensor  # (C, E) float64
    prior_beta: Tensor  # (C, E) float64
    successes: Tensor  # (C, E) float64
    failures: Tensor  # (C, E) float64

    def __init__(
        self, num_clusters: int, num_experts: int, *, prior_alpha: float = 1.0, prior_beta: float = 1.0
    ) -> None:
        super().__init__()
        for name, size in (("num_clusters", num_clusters), ("num_experts", num_experts)):
            if size < 1:
                raise InvalidArgumentError(f"{name} must be at least 1; got {size}")
        for name, value in (("prior_alpha", prior_alpha), ("prior_beta", prior_beta)):
            if not 0.0 < value < float("inf"):
                raise InvalidArgumentError(f"{name} must be positive and finite; got {value}")
        self.num_clusters, self.num_experts = num_clusters, num_experts
        self.initial_prior = (float(prior_alpha), float(prior_beta))
        shape = (num_clusters, num_experts)
        self.register_buffer("prior_alpha", torch.full(shape, prior_alpha, dtype=torch.float64))
        self.register_buffer("prior_beta", torch.full(shape, prior_beta, dtype=torch.float64))
        self.register_buffer("successes", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("failures", torch.zeros(shape, dtype=torch.float64))
        self._listeners: list[Callable[[Tensor | None], None]] = []
        self.register_load_state_dict_post_hook(_notify_after_load)

    @property
    def alpha(self) -> Tensor:  # (C, E) float64
        """``prior_alpha + successes``."""
        return self.prior_alpha + self.successes

    @property
    def beta(self) -> Tensor:  # (C, E) float64
        """``prior_beta + failures``."""
        return self.prior_beta + self.failures

    def mean(self) -> Tensor:  # (C, E)
        """Posterior mean competence."""
        return beta_functions.mean(self.alpha, self.beta)

    def std(self) -> Tensor:  # (C, E)
        """Posterior standard deviation."""
        return beta_functions.std(self.alpha, self.beta)

    def lcb(self, risk_aversion: float) -> Tensor:  # (C, E)
        """Lower confidence bound, ``mean - risk_aversion * std``."""
        return beta_functions.lcb(self.alpha, self.beta, risk_aversion)

    def quantile(self, probability: float) -> Tensor:  # (C, E)
        """Exact credible bound: competence exceeds it with probability ``1 - probability``."""
        return beta_functions.quantile(self.alpha, self.beta, probability)

    def thompson(self, generator: torch.Generator | None = None) -> Tensor:  # (C, E)
        """One draw of competence a cell."""
        return beta_functions.thompson(self.alpha, self.beta, generator)

    @torch.no_grad()
    def observe(
        self,
        cluster_ids: Tensor,  # (N,) int64
        outcome: Tensor,  # (N, E), or (N, k) with expert_indices
        expert_indices: Tensor | None = None,  # (N, k) int64
        *,
        threshold: float | None = None,
        sync: bool = True,
    ) -> None:
        """Add observed outcomes to the evidence; every (cluster, expert) pair counts as often as it occurs.

        Args:
            cluster_ids: the cluster of each token.
            outcome: competence signals in [0, 1]; NaN means not observed. Column e belongs to expert e, or, with
                ``expert_indices``, column j to the expert in slot j.
            expert_indices: the experts the columns belong to; None if the outcome covers all E experts.
            threshold: None (default) counts fractionally, ``successes += r`` and ``failures += 1 - r``; a number τ counts
                ``r >= τ`` as one success and anything below as one failure (the paper's binarisation).
            sync: where torch.distributed is initialised, sum the new evidence over all ranks, so that every rank holds the
                same belief. This is then a collective call: a rank without tokens calls it with an empty batch.

        Raises:
            InvalidArgumentError: wrong shape, an index out of range, or an outcome outside [0, 1]; nothing has changed.
        """
        evidence = self.tally(cluster_ids, outcome, expert_indices, threshold=threshold)
        touched: Tensor | None = cluster_ids
        if sync and torch.distributed.is_available() and torch.distributed.is_initialized():
            stacked = torch.stack(evidence)
            torch.distributed.all_reduce(stacked)
            evidence = Evidence(*stacked)
            touched = None  # other ranks touched other clusters
        self._add(evidence, touched)

    def tally(
        self,
        cluster_ids: Tensor,  # (N,) int64
        outcome: Tensor,  # (N, E), or (N, k) with expert_indices
        expert_indices: Tensor | None = None,  # (N, k) int64
        *,
        threshold: float | None = None,
    ) -> Evidence:  # 2 x (C, E)
        """Validate outcomes and count them without changing the belief; arguments and errors as in :meth:`observe`."""
        shape, device = (self.num_clusters, self.num_experts), self.successes.device
        cluster_ids, outcome = cluster_ids.to(device), outcome.to(device)
        expert_indices = None if expert_indices is None else expert_indices.to(device)
        _validate_observation(cluster_ids, outcome, expert_indices, shape, threshold)
        return _count(cluster_ids, outcome, expert_indices, shape, threshold)

    def merge(self, other: "BetaPosterior | Evidence") -> None:
        """Add another replica's evidence (not its prior) to this one.

        Raises:
            InvalidArgumentError: the shapes differ.
        """
        expected = tuple(self.successes.shape)
        for name, counts in (("successes", other.successes), ("failures", other.failures)):
            if tuple(counts.shape) != expected:
                raise InvalidArgumentError(f"other.{name} must have shape {expected}; got {tuple(counts.shape)}")
        self._add(Evidence(other.successes, other.failures), None)

    @torch.no_grad()
    def warm_start(
        self,
        cluster_ids: Tensor,  # (N,) int64
        outcome: Tensor,  # (N, E), or (N, k) with expert_indices
        expert_indices: Tensor | None = None,  # (N, k) int64
        *,
        strength: float | None = None,
        threshold: float | None = None,
    ) -> None:
        """Turn held-out outcomes into the prior; evidence is left as it is.

        The new prior is the initial one plus the counts, so its mean is the observed rate drawn slightly to the initial
        mean, cell by cell.

        Args:
            cluster_ids, outcome, expert_indices, threshold: as in :meth:`observe`.
            strength: at most this many pseudo-observations a cell (α + β), at an unchanged mean; None keeps every count. A
                small strength lets later evidence overrule the warm start quickly; a cell seen less often keeps less.

        Raises:
            InvalidArgumentError: as :meth:`observe`, or a strength that is not positive; nothing has changed.

        Source: *Bayesian Posterior Routing in Multi-Agent Systems*, "Calibration Objective".
        """
        if strength is not None and not strength > 0:
            raise InvalidArgumentError(f"strength must be positive; got {strength}")
        counts = self.tally(cluster_ids, outcome, expert_indices, threshold=threshold)
        alpha = self.initial_prior[0] + counts.successes
        beta = self.initial_prior[1] + counts.failures
        if strength is not None:
            shrink = (strength / (alpha + beta)).clamp(max=1.0)
            alpha, beta = alpha * shrink, beta * shrink
        self.prior_alpha.copy_(alpha)
        self.prior_beta.copy_(beta)
        self._notify(None)

    @torch.no_grad()
    def reset(self, *, prior: bool = False) -> None:
        """Forget all evidence; with ``prior=True`` also any warm start."""
        self.successes.zero_()
        self.failures.zero_()
        if prior:
            self.prior_alpha.fill_(self.initial_prior[0])
            self.prior_beta.fill_(self.initial_prior[1])
        self._notify(None)

    def subscribe(self, listener: Callable[[Tensor | None], None]) -> None:
        """Call ``listener(cluster_ids)`` after every change of the belief; None instead of ids means any cluster changed."""
        self._listeners.append(listener)

    def extra_repr(self) -> str:
        observed = float((self.successes + self.failures).sum())
        return f"num_clusters={self.num_clusters}, num_experts={self.num_experts}, observations={observed:g}"

    @torch.no_grad()
    def _add(self, evidence: Evidence, cluster_ids: Tensor | None) -> None:
        self.successes += evidence.successes.to(self.successes)
        self.failures += evidence.failures.to(self.failures)
        self._notify(cluster_ids)

    def _notify(self, cluster_ids: Tensor | None) -> None:
        for listener in self._listeners:
            listener(cluster_ids)


def _notify_after_load(module: torch.nn.Module, incompatible_keys: object) -> None:
    if isinstance(module, BetaPosterior):
        module._notify(None)


def _validate_observation(
    cluster_ids: Tensor,  # (N,)
    outcome: Tensor,  # (N, M)
    expert_indices: Tensor | None,  # (N, M)
    shape: tuple[int, int],
    threshold: float | None,
) -> None:
    num_clusters, num_experts = shape
    if cluster_ids.ndim != 1 or cluster_ids.is_floating_point():
        raise InvalidArgumentError(
            f"cluster_ids must be integers of shape (N,); got {cluster_ids.dtype} of shape {tuple(cluster_ids.shape)}"
        )
    columns = num_experts if expert_indices is None else expert_indices.shape[-1]
    expected = (cluster_ids.shape[0], columns)
    if tuple(outcome.shape) != expected:
        raise InvalidArgumentError(f"outcome must have shape {expected}; got {tuple(outcome.shape)}")
    if expert_indices is not None:
        if tuple(expert_indices.shape) != expected:
            raise InvalidArgumentError(f"expert_indices must have shape {expected}; got {tuple(expert_indices.shape)}")
        _validate_range("expert_indices", expert_indices, num_experts)
    _validate_range("cluster_ids", cluster_ids, num_clusters)
    if threshold is not None and not 0.0 <= threshold <= 1.0:
        raise InvalidArgumentError(f"threshold must lie in [0, 1] or be None; got {threshold}")
    wrong = (outcome < 0) | (outcome > 1)
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise InvalidArgumentError(
            f"outcome must lie in [0, 1] or be NaN (not observed); got {outcome[row, column].item():g} at ({row}, {column})"
        )


def _validate_range(name: str, indices: Tensor, size: int) -> None:
    if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= size):
        raise InvalidArgumentError(
            f"{name} must lie in [0, {size}); got values from {int(indices.min())} to {int(indices.max())}"
        )


def _count(
    cluster_ids: Tensor,  # (N,)
    outcome: Tensor,  # (N, M)
    expert_indices: Tensor | None,  # (N, M)
    shape: tuple[int, int],
    threshold: float | None,
) -> Evidence:  # 2 x (C, E)
    num_clusters, num_experts = shape
    if expert_indices is None:
        expert_indices = torch.arange(num_experts, device=outcome.device).expand(outcome.shape)
    cells = (cluster_ids[:, None] * num_experts + expert_indices).reshape(-1)
    signal = outcome.reshape(-1).to(torch.float64)
    observed = ~torch.isnan(signal)
    success = signal if threshold is None else (signal >= threshold).to(torch.float64)
    weight = observed.to(torch.float64)
    success = torch.where(observed, success, 0.0)
    # Accumulating index_put_ counts duplicate cells and, unlike scatter_add_, sums in a fixed order on a GPU too.
    successes = weight.new_zeros(num_clusters * num_experts).index_put_((cells,), success, accumulate=True)
    failures = weight.new_zeros(num_clusters * num_experts).index_put_((cells,), weight - success, accumulate=True)
    return Evidence(successes.view(shape), failures.view(shape))
