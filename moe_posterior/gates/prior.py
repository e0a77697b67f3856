"""A learned gate that evidence can overrule: its logits stay, and experts below their own reference are penalised.

Dimensions: N tokens, D hidden size, C clusters, E experts, k experts per token.
"""

import torch
from torch import Tensor, nn

from moe_posterior import beta as beta_functions
from moe_posterior.checks.declared import as_declared
from moe_posterior.checks.soundness import require_sound
from moe_posterior.clustering import Clusterer
from moe_posterior.errors import InvalidArgumentError, NotFittedError
from moe_posterior.gates.base import Routing
from moe_posterior.gates.belief import BeliefGate
from moe_posterior.gates.tempering import evidence_bias, reference_from, shortfall
from moe_posterior.kernels import dispatch, reference
from moe_posterior.kernels.reference import Assignment
from moe_posterior.posterior import BetaPosterior


class PriorGate(BeliefGate):
    """A softmax gate plus a penalty for experts that are credibly worse than they were: innocent until proven.

    Every (cluster, expert) has a reference competence, measured on healthy data by :meth:`warm_start`. The belief starts there, and

        penalty = η · min(0, log((mean + z · std) / reference))

    is added to the learned logits: exactly 0 without evidence and for as long as an expert may be as good as it was, strongly
    negative once even its credible upper bound is below. The choice is then top-k of the sums, the weights their softmax over
    the chosen, so that the learned weights stay trainable. Before :meth:`fit` this is a plain softmax gate. The logits
    are the router's own, rounded as its dtype rounds them; where a GPU's kernel computes them, they are not rounded below float32.

    Args:
        hidden_size, num_experts, num_clusters, top_k: D, E, C, k.
        penalty: η ≥ 0, logits by which a halved competence costs ``η · log 2``. The default 20 sends next to nothing to an expert
            that fell by a quarter.
        confidence: z ≥ 0, posterior standard deviations of doubt in the expert's favour; default 2.
        strength: k0 > 0, pseudo-observations that the reference is worth in each cell; default 30.
        half_life: observations of a cell after which what was seen there before counts half; default 300. None never forgets.
        amnesty: tokens observed by the gate after which all evidence counts half, including that of experts that are no longer
            chosen and could not recover otherwise; default 5,000. None never forgives: every false alarm then lasts, so that a
            healthy model degrades over a long run, and old evidence outweighs fresh damage.
        pooling: pseudo-observations after which an expert's shortfall over all clusters together moves what is expected of it in
            each, downwards only; default 30. None keeps clusters apart.
        innocent: False drops the rule, ``penalty = η · log(mean / reference)``, for comparison: every fluctuation then moves logits.
        learned: whether the gate has a linear router of its own; a gate inside another router has none.
        backend: ``"auto"`` or ``"eager"`` or ``"triton"``, see ``kernels/dispatch.py``.

    Raises:
        InvalidArgumentError: a knob out of range. NotFittedError: observed before :meth:`fit`.

    Source: the tempering of a learned gate by posterior competence in *Bayesian Posterior Routing in Multi-Agent Systems*,
    "Posterior Routing Mechanism and Calibration Framework"; the rule and its defaults are this project's.

    >>> generator = torch.Generator().manual_seed(0)
    >>> hidden = torch.randn(400, 4, generator=generator)
    >>> gate = PriorGate(hidden_size=4, num_experts=3, num_clusters=2, top_k=1)
    >>> gate.fit(hidden)
    >>> gate.warm_start(hidden, torch.full((400, 3), 0.8))
    >>> learned = gate(hidden).expert_indices
    >>> gate.observe(gate(hidden), torch.where(learned == 1, 0.0, 0.8))  # expert 1 now fails wherever it is asked
    >>> bool((gate(hidden).expert_indices == 1).any())
    False
    """

    evidence_bias: Tensor  # (C, E) float32, derived: at most 0, -inf for an expert that was removed

    @as_declared
    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        num_clusters: int = 64,
        top_k: int = 2,
        *,
        penalty: float = 20.0,
        confidence: float = 2.0,
        strength: float = 30.0,
        half_life: float | None = 300.0,
        amnesty: float | None = 5000.0,
        pooling: float | None = 30.0,
        innocent: bool = True,
        learned: bool = True,
        backend: dispatch.Backend = "auto",
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k)
        for name, value in (("penalty", penalty), ("confidence", confidence)):
            if not 0.0 <= value < float("inf"):
                raise InvalidArgumentError(f"{name} must be at least 0 and finite; got {value}")
        for name, option in (("strength", strength), ("amnesty", amnesty), ("pooling", pooling)):
            if option is not None and not 0.0 < option < float("inf"):
                raise InvalidArgumentError(f"{name} must be positive and finite; got {option}")
        self.penalty, self.confidence, self.strength = penalty, confidence, strength
        self.amnesty, self.pooling, self.innocent, self.backend = amnesty, pooling, innocent, backend
        with torch.inference_mode(False):  # trainable weights must be created outside inference mode
            self.router = nn.Linear(hidden_size, num_experts, bias=False) if learned else None
        self.clusterer = Clusterer(num_clusters, hidden_size)
        half = strength / 2
        self.posterior = BetaPosterior(
            num_clusters, num_experts, prior_alpha=half, prior_beta=half, half_life=half_life
        )
        self._biased, self._version = False, 0
        self.register_buffer("evidence_bias", torch.zeros(num_clusters, num_experts), persistent=False)
        self.posterior.subscribe(self.refresh)

    @property
    def biased(self) -> bool:
        """Whether any of ``evidence_bias`` is not 0: known on the host, so that the check needs no synchronisation.

        Except once after the buffer was written to from outside, as by a broadcast of buffers or an average of models.
        """
        bias = self.evidence_bias
        known = self._biased or torch.compiler.is_compiling() or bias.is_inference() or bias.is_meta
        if not known and bias._version != self._version:
            self._look()
        return self._biased

    @property
    def reference(self) -> Tensor:  # (C, E) float64
        """The competence every expert is held to, measured by the warm start; ½ before one."""
        return beta_functions.mean(self.posterior.prior_alpha, self.posterior.prior_beta)

    @as_declared
    def warm_start(self, hidden: Tensor, outcome: Tensor) -> None:  # (N, D), (N, E)
        """Measure the reference from outcomes of healthy experts; NaN = not observed. See :meth:`warm_start_from_counts`.

        No collective call: under torch.distributed every rank must be given the same data, or the summed counts.
        """
        self._warm_start(hidden, outcome, sync=False)

    def _warm_start(self, hidden: Tensor, outcome: Tensor, *, sync: bool) -> None:  # (N, D), (N, E)
        self.validate_hidden(hidden)
        counts = BetaPosterior(self.num_clusters, self.num_experts).to(hidden.device)
        counts.observe(self.clusterer(hidden).cluster_ids, outcome, sync=sync)
        self.warm_start_from_counts(counts.successes, counts.failures)

    @torch.no_grad()
    def warm_start_from_counts(self, successes: Tensor, failures: Tensor) -> None:  # (C, E), (C, E)
        """Set the reference from counts on healthy data; evidence so far is forgotten.

        A cell with few observations is shrunk towards its expert's and its cluster's mean, see
        ``gates.tempering.reference_from``.

        Raises:
            InvalidArgumentError: wrong shape, or counts that are negative or not finite; nothing has changed.
        """
        shape = tuple(self.posterior.successes.shape)
        for name, counts in (("successes", successes), ("failures", failures)):
            if tuple(counts.shape) != shape:
                raise InvalidArgumentError(f"{name} must have shape {shape}; got {tuple(counts.shape)}")
        require_sound({"successes": successes, "failures": failures})
        held = self.posterior.prior_alpha
        expected = reference_from(successes.to(held), failures.to(held))
        self.posterior.prior_alpha.copy_(self.strength * expected)
        self.posterior.prior_beta.copy_(self.strength * (1 - expected))
        self.posterior.reset()

    @property
    def decides_alone(self) -> bool:
        return False

    def set_reference(self, successes: Tensor, failures: Tensor) -> None:  # (C, E), (C, E)
        """As :meth:`warm_start_from_counts`."""
        self.warm_start_from_counts(successes, failures)

    def assign(self, hidden: Tensor) -> Assignment:  # (N, D)
        """Clusters and distances; cluster 0 at distance 0 before :meth:`fit`, when clusters mean nothing yet."""
        if self.clusterer.fitted:
            return self.clusterer(hidden)
        ids = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)
        return Assignment(ids, torch.zeros(hidden.shape[0], device=hidden.device))

    def forward(self, hidden: Tensor) -> Routing:  # (N, D)
        """Choose experts for every token; changes no state.

        A row that holds NaN or inf has equal weights, and observing it adds no evidence.
        """
        self.validate_hidden(hidden)
        if self.router is None:
            raise InvalidArgumentError("a gate made with learned=False has no router of its own to route by")
        if self._fuses(hidden):
            (ids, distance), selection, weights = dispatch.route_prior(
                hidden,
                self.clusterer.prepared,
                self.router.weight,
                self.evidence_bias,
                top_k=self.top_k,
                gate_bias=self.router.bias,
                backend=self.backend,
            )
        else:
            ids, distance = self.assign(hidden)
            selection = reference.select(self.tempered_logits(hidden, ids), ids, self.top_k)
            weights = reference.weigh(selection.scores, 1.0)
        return Routing(selection.expert_indices, weights, ids, selection.scores, distance)

    def tempered_logits(self, hidden: Tensor, cluster_ids: Tensor) -> Tensor:  # (N, D), (N,) -> (N, E) float32
        """The router's own logits, in its own precision, plus the evidence; NaN, as of a broken row, counts as -inf."""
        assert self.router is not None
        logits = self.router(hidden).float()
        logits = torch.where(torch.isnan(logits), -torch.inf, logits)
        return logits + self.evidence_bias[cluster_ids] if self.biased else logits

    @property
    def reweighs(self) -> bool:
        return self.router is not None

    def reweigh(self, hidden: Tensor, routing: Routing, expert_indices: Tensor) -> Routing:  # (N, D), _, (N, k)
        if not self.reweighs:
            return super().reweigh(hidden, routing, expert_indices)
        chosen = self.tempered_logits(hidden, routing.cluster_ids).gather(1, expert_indices)
        weights = reference.weigh(chosen, 1.0)
        return routing._replace(expert_indices=expert_indices, routing_weights=weights, scores=chosen)

    def _fuses(self, hidden: Tensor) -> bool:  # (N, D)
        """Whether one kernel can do it: on a GPU, for a router that is a plain weight and bias, without LoRA or the like."""
        assert self.router is not None
        if not self.clusterer.fitted or self.backend == "eager":
            return False
        plain = type(self.router) is nn.Linear and not self.router._forward_hooks and not self.router._forward_pre_hooks
        if self.backend == "triton" and not plain:
            raise InvalidArgumentError(
                f"backend must be 'auto' or 'eager' here: 'triton' needs a plain nn.Linear as router; got {self.router}"
            )
        return plain and (hidden.is_cuda or self.backend != "auto")

    def learn(self, routing: Routing, outcome: Tensor, slots: Tensor | None) -> None:  # (N, k) or (N, E)
        """Discount the evidence so far by the amnesty, then add the outcomes."""
        keep = None if self.amnesty is None else self._kept(outcome, self.amnesty)
        self.posterior.observe(routing.cluster_ids, outcome, slots, keep=keep)

    def measure(self, hidden: Tensor, outcome: Tensor) -> None:  # (N, D), (N, E)
        """Set the reference from these rows, those of all ranks together: a collective :meth:`warm_start`."""
        self._warm_start(hidden, outcome, sync=True)

    def require_observable(self) -> None:
        if not self.clusterer.fitted:
            raise NotFittedError("this gate has no clusters to hold evidence yet: call fit(hidden) first")

    def _kept(self, outcome: Tensor, amnesty: float) -> Tensor:  # -> ()
        """The share kept of the evidence so far once these tokens, those of all ranks, have been observed."""
        tokens = (~outcome.isnan()).any(dim=1).sum().to(self.posterior.successes)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(tokens)
        return torch.exp2(-tokens / amnesty)

    def extra_repr(self) -> str:
        knobs = f"penalty={self.penalty:g}, confidence={self.confidence:g}, strength={self.strength:g}"
        return f"{super().extra_repr()}, num_clusters={self.num_clusters}, {knobs}, biased={self.biased}"

    @torch.no_grad()
    def refresh(self, cluster_ids: Tensor | None) -> None:
        """The whole table: with pooling, what was seen in one cluster counts in all."""
        belief = self.posterior
        if belief.successes.device.type == "meta":
            return
        expected, beta = belief.prior_alpha, belief.prior_beta
        if self.pooling is not None:
            share = shortfall(belief.successes, belief.failures, self.reference, self.pooling, self.confidence)
            expected = expected * share
            beta = belief.prior_alpha + belief.prior_beta - expected
        bias = evidence_bias(
            expected + belief.successes,
            beta + belief.failures,
            self.reference,
            penalty=self.penalty,
            confidence=self.confidence,
            innocent=self.innocent,
        )
        bias = bias.masked_fill(~belief.active, -torch.inf)
        self.evidence_bias = bias.float()  # replaced, not written into: it may be on another device after a load
        self._look()

    def _look(self) -> None:
        self._biased = bool((self.evidence_bias != 0).any())
        self._version = 0 if self.evidence_bias.is_inference() else self.evidence_bias._version
