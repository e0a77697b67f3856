"""Play a stream of queries against a gate: decide, observe the chosen expert's outcome (possibly late), decide again.

Dimensions: T queries, E experts, C clusters of the gate, M query classes of the environment.
"""

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_posterior.benchmarks.routing.environments import Environment
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.gates import BeliefGate, Gate, Routing

CHECKPOINTS = (
    0,
    10,
    20,
    40,
    60,
    80,
    100,
)  # queries after which the degraded expert's posterior is written down (Table 6)


@dataclass(frozen=True, eq=False)
class Trace:
    """What a gate did, query by query."""

    chosen: Tensor  # (T,) int64
    score: Tensor  # (T,) float64, what the gate ranked by
    confidence: Tensor  # (T,) float64, the gate's estimate that the chosen expert succeeds
    outcome: Tensor  # (T,) float64
    expected: Tensor  # (T,) float64, true success probability of the chosen expert
    oracle: Tensor  # (T,) float64, of the best expert for the query
    degraded_mean: dict[
        int, Tensor
    ]  # checkpoint -> (M,) posterior mean of the degraded expert; empty without a posterior
    log_alarm: int | None  # queries until the degraded expert is two posterior stds below the pool on some cluster


@dataclass(frozen=True)
class Feedback:
    """How outcomes come back: late, not at all, or wrong.

    Args:
        delay: batches that pass before an outcome arrives; 0 is right after the decision.
        missing: share of outcomes that never arrive (NaN).
        false_positive, false_negative: probability that a failure is reported as a success, and the reverse.

    Raises:
        InvalidArgumentError: a negative delay or a share outside [0, 1].
    """

    delay: int = 0
    missing: float = 0.0
    false_positive: float = 0.0
    false_negative: float = 0.0

    def __post_init__(self) -> None:
        shares = (self.missing, self.false_positive, self.false_negative)
        if self.delay < 0 or not all(0 <= share <= 1 for share in shares):
            raise InvalidArgumentError(f"feedback needs delay ≥ 0 and shares in [0, 1]; got {self}")

    def of(self, outcome: Tensor, generator: torch.Generator) -> Tensor:  # (N, 1) -> (N, 1)
        """The outcomes as they are reported."""
        wrong = torch.rand(outcome.shape, generator=generator, dtype=outcome.dtype)
        lost = torch.rand(outcome.shape, generator=generator, dtype=outcome.dtype) < self.missing
        flipped = wrong < outcome * self.false_negative + (1 - outcome) * self.false_positive
        return torch.where(flipped, 1 - outcome, outcome).masked_fill(lost, torch.nan)


@dataclass(frozen=True)
class Exchange:
    """One expert is replaced by another, and the gate is told.

    Args:
        expert: which.
        at: before the decision on this query.
        inherits: the newcomer's prior is the mean of the others' belief in each cluster, otherwise the initial prior.
    """

    expert: int
    at: int
    inherits: bool = False

    def tell(self, gate: Gate) -> None:
        """Tell the gate, if it can replace experts."""
        if isinstance(gate, BeliefGate):
            others = {other: 1.0 for other in range(gate.num_experts) if other != self.expert}
            gate.replace_expert(self.expert, others if self.inherits else None)


@torch.no_grad()
def play(
    gate: Gate,
    environment: Environment,
    *,
    batch_size: int = 1,
    delay: int = 0,
    feedback: Feedback | None = None,
    exchange: Exchange | None = None,
) -> Trace:
    """Route the environment's stream with bandit feedback: only the chosen experts' outcomes are ever observed.

    Args:
        gate: ready to decide (fitted, warm-started) with ``top_k = 1``.
        environment: what to route.
        batch_size: queries decided together, before any of their outcomes is known.
        delay: batches that pass before an outcome arrives; 0 is right after the decision.
        feedback: late, missing or wrong outcomes; its delay replaces ``delay``.
        exchange: a change of the pool that the gate is told of.

    Raises:
        InvalidArgumentError: ``batch_size`` below 1, ``delay`` below 0, or a gate with ``top_k`` above 1.
    """
    if batch_size < 1 or delay < 0 or gate.top_k != 1:
        raise InvalidArgumentError(
            f"batch_size must be ≥ 1, delay ≥ 0, the gate's top_k 1; got {batch_size}, {delay} and {gate.top_k}"
        )
    feedback = Feedback(delay) if feedback is None else feedback
    generator = torch.Generator().manual_seed(environment.seed)
    stream = environment.stream
    watch = _Watch(gate, environment)
    pending: deque[tuple[Routing, Tensor]] = deque()
    chosen, score, confidence = [], [], []
    for start in range(0, len(stream.hidden), batch_size):
        watch.before(start)
        if exchange is not None and start <= exchange.at < start + batch_size:
            exchange.tell(gate)
        rows = slice(start, start + batch_size)
        routing = gate(stream.hidden[rows])
        outcome = stream.outcomes[rows].gather(1, routing.expert_indices)
        pending.append((routing, feedback.of(outcome, generator)))
        chosen.append(routing.expert_indices[:, 0])
        score.append(routing.scores[:, 0].double())
        confidence.append(success_estimate(gate, routing))
        gate.adapt(stream.hidden[rows])
        if len(pending) > feedback.delay:
            gate.observe(*pending.popleft(), dense=False)
    return _trace(environment, torch.cat(chosen), torch.cat(score), torch.cat(confidence), watch)


def play_oracle(environment: Environment) -> Trace:
    """The clairvoyant router: for each query the expert with the highest true success probability."""
    competence = environment.stream.competence
    best = competence.max(dim=1)
    return _trace(environment, best.indices, best.values, best.values, None)


def play_class_oracle(environment: Environment) -> Trace:
    """The best router that knows each query's true class and every expert's mean competence there, but not the query itself."""
    competence, query_class = environment.stream.competence, environment.stream.query_class
    members = torch.nn.functional.one_hot(query_class).to(competence.dtype)  # (T, M)
    mean = members.T @ competence / members.sum(dim=0).clamp(min=1)[:, None]  # (M, E)
    best = mean[query_class].max(dim=1)
    return _trace(environment, best.indices, best.values, best.values, None)


def success_estimate(gate: Gate, routing: Routing) -> Tensor:  # (N,) float64 in [0, 1]
    """The gate's estimate of the probability that its first choice succeeds.

    The gate's ``expected_outcome``, clipped to [0, 1]: the posterior mean for a belief gate, whose bound is pessimistic by design.
    """
    return gate.expected_outcome(routing)[:, 0].double().clamp(0, 1)


def _trace(
    environment: Environment, chosen: Tensor, score: Tensor, confidence: Tensor, watch: "_Watch | None"
) -> Trace:
    stream = environment.stream
    picked = chosen[:, None]
    return Trace(
        chosen,
        score,
        confidence,
        stream.outcomes.gather(1, picked)[:, 0],
        stream.competence.gather(1, picked)[:, 0],
        stream.competence.amax(dim=1),
        {} if watch is None else watch.degraded_mean,
        None if watch is None else watch.log_alarm,
    )


class _Watch:
    """Follows the degraded expert's posterior through the first queries, as a reader of the log would."""

    def __init__(self, gate: Gate, environment: Environment) -> None:
        self.degraded_mean: dict[int, Tensor] = {}
        self.log_alarm: int | None = None
        self.gate = gate if isinstance(gate, BeliefGate) and environment.degraded is not None else None
        if self.gate is None:
            return
        stream = environment.stream
        self.start, self.expert = environment.change_at, environment.degraded
        clusters = self.gate(stream.hidden).cluster_ids
        num_classes = int(stream.query_class.max()) + 1
        counts = torch.zeros(num_classes, self.gate.num_clusters, dtype=torch.float64)
        one = torch.ones(len(clusters), dtype=torch.float64)
        counts.index_put_((stream.query_class, clusters), one, accumulate=True)
        self.weights = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)  # (M, C): a class's share of each cluster

    def before(self, query: int) -> None:
        """Read the belief before this query is decided."""
        if self.gate is None or query < self.start or query > self.start + CHECKPOINTS[-1]:
            return
        passed = query - self.start
        mean = self.gate.posterior.mean()
        for checkpoint in CHECKPOINTS:
            if checkpoint <= passed and checkpoint not in self.degraded_mean:
                self.degraded_mean[checkpoint] = self.weights @ mean[:, self.expert]
        if self.log_alarm is None:
            gap = mean.mean(dim=1) - mean[:, self.expert]
            if bool((gap > 2 * self.gate.posterior.std()[:, self.expert]).any()):
                self.log_alarm = passed
