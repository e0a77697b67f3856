"""What a benchmark routes: warm-start data and a stream of queries, with every expert's outcome fixed in advance.

Dimensions: W warm-start queries, T stream queries, D hidden size, E experts, M query classes of the environment.

The outcome of every expert on every query is drawn once (common random numbers), so gates that choose differently on the same
environment are compared query by query; a gate is only ever shown the outcome of the expert it chose. The query classes are the
environment's own and hidden from the gates, which find their clusters themselves.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from moe_posterior.errors import InvalidArgumentError
from moe_posterior.gates import SoftmaxGate

Benchmark = Literal["a", "b", "c"]

NUM_QUERIES = 1000  # "1,000 evaluation queries"
NUM_WARM = 2000
HIDDEN_SIZE = 32
NUM_CLASSES = 16  # M, of the training distribution
NUM_HELD_OUT = 8  # classes of benchmark C's second half
SPREAD = 0.6  # std of the class means per coordinate; 1 within a class: nearest-mean assignment errs on about 10 %
CHANCE = 0.1  # a guess among ten answers
DEGRADED_SHARE = 0.6  # "competence on 60 % of query classes is at chance"


@dataclass(frozen=True, eq=False)
class Stream:
    """Queries in order of arrival, with every expert's outcome on each."""

    hidden: Tensor  # (T, D) float32
    competence: (
        Tensor  # (T, E) float64, probability of success (of a deterministic expert: 0 or 1; of a graded one: the score)
    )
    outcomes: Tensor  # (T, E) float64 in [0, 1]
    query_class: Tensor  # (T,) int64 in [0, M)
    affected: Tensor  # (T,) bool, the degraded expert is at chance here


@dataclass(frozen=True, eq=False)
class Environment:
    """One reproducible instance of a benchmark."""

    benchmark: str
    name: str
    seed: int
    warm_hidden: Tensor  # (W, D) float32
    warm_outcomes: Tensor  # (W, E) float64
    stream: Stream
    degraded: int | None = None  # the expert that fails, in B
    change_at: int = 0  # first query after the change

    @property
    def num_experts(self) -> int:
        """E."""
        return self.warm_outcomes.shape[1]

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.warm_hidden.shape[1]


def uniform(low: float, high: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """float64 draws from [low, high)."""
    return low + (high - low) * torch.rand(shape, dtype=torch.float64, generator=generator)


def bernoulli(probability: Tensor, generator: torch.Generator) -> Tensor:  # float64 in {0, 1}
    """One draw per entry."""
    return torch.bernoulli(probability.double(), generator=generator)


def popular_expert(hidden: Tensor, outcomes: Tensor) -> int:  # (W, D), (W, E)
    """The expert that a softmax gate trained on the warm-start data chooses most often there; the first one on ties."""
    gate = SoftmaxGate(hidden.shape[1], outcomes.shape[1], top_k=1)
    gate.warm_start(hidden, outcomes)
    with torch.no_grad():
        chosen = gate(hidden).expert_indices[:, 0]
    return int(torch.bincount(chosen, minlength=outcomes.shape[1]).argmax())


def affected_classes(num_classes: int, generator: torch.Generator) -> Tensor:  # (M,) bool
    """A random 60 % of the query classes, at least one.

    >>> int(affected_classes(10, torch.Generator().manual_seed(0)).sum())
    6
    """
    count = max(1, round(DEGRADED_SHARE * num_classes))
    chosen = torch.randperm(num_classes, generator=generator)[:count]
    return torch.zeros(num_classes, dtype=torch.bool).index_fill_(0, chosen, True)


def degrade(
    competence: Tensor,  # (T, E)
    affected: Tensor,  # (T,) bool
    expert: int,
    chance: float,
) -> Tensor:  # (T, E)
    """The same pool with one expert at chance on the affected queries; nothing else changes, in particular no feature."""
    degraded = competence.clone()
    degraded[affected, expert] = chance
    return degraded


def with_newcomer(environment: Environment, at: int) -> tuple[Environment, int]:
    """The same queries, but one expert guesses until query ``at`` and is then replaced; also returns its index.

    Its successor is as good as the best of the pool on every query, so not trying it is costly. It is the last expert, or the one
    before if the last is the degraded one.
    """
    generator = torch.Generator().manual_seed(7919 * environment.seed + 17)
    expert = environment.num_experts - 1
    if expert == environment.degraded:
        expert -= 1
    warm, stream = environment.warm_outcomes.clone(), environment.stream
    warm[:, expert] = bernoulli(torch.full((len(warm),), CHANCE), generator)
    competence, outcomes = stream.competence.clone(), stream.outcomes.clone()
    competence[at:, expert] = stream.competence[at:].amax(dim=1)
    competence[:at, expert] = CHANCE
    outcomes[:, expert] = bernoulli(competence[:, expert], generator)
    changed = replace(stream, competence=competence, outcomes=outcomes)
    return replace(environment, warm_outcomes=warm, stream=changed), expert


def with_noisy_warm_start(environment: Environment, false_positive: float, false_negative: float) -> Environment:
    """The same, with warm-start outcomes flipped at these rates."""
    generator = torch.Generator().manual_seed(7919 * environment.seed + 19)
    outcomes = environment.warm_outcomes
    flips = bernoulli(outcomes * false_negative + (1 - outcomes) * false_positive, generator)
    return replace(environment, warm_outcomes=torch.where(flips > 0, 1 - outcomes, outcomes))


def synthetic(
    benchmark: Benchmark,
    seed: int,
    num_experts: int = 16,
    *,
    num_queries: int = NUM_QUERIES,
    num_warm: int = NUM_WARM,
) -> Environment:
    """Gaussian-mixture queries and a known competence matrix.

    Queries of class m are N(mean_m, I) in D = 32 dimensions, mean_m ~ N(0, 0.6² I), M = 16 equally frequent classes.

    - **A**: competence[m, e] ~ U(.88, .95): every expert is competent on everything.
    - **B**: expert 0 is a generalist, U(.90, .95) on every class, so gates learn to rely on it; each class has one specialist
      of U(.80, .93); all others score U(.30, .70) there, as classifiers trained on other domains do on digits. In the stream
      the expert that a softmax gate trained on the warm-start data prefers most often answers a random 60 % of the classes at
      chance (.1), from the first query on; the warm-start data show it intact.
    - **C**: experts are at home on the 16 training classes, U(.85, .95). After half of the stream, queries come from 8 held-out
      classes: the midpoint of two training means plus N(0, 0.6² I), wider by 1.5. Competence there is .35 to .95, evenly spaced
      over the experts in random order (some travel well, some do not), plus N(0, .08) a class, within [.1, .97].

    Args:
        benchmark: "a", "b" or "c".
        seed: of everything.
        num_experts: E, at least 2; the paper's pools hold 8 to 32.
        num_queries, num_warm: T and W.

    Raises:
        InvalidArgumentError: an unknown benchmark or fewer than two experts.

    Source: *Bayesian Posterior Routing in Multi-Agent Systems*, "Empirical Performance and Calibration Metrics", which describes the
    three designs but gives neither data nor competences: these are ours.

    >>> synthetic("b", seed=0, num_queries=100, num_warm=50).stream.hidden.shape
    torch.Size([100, 32])
    """
    if benchmark not in ("a", "b", "c") or num_experts < 2:
        raise InvalidArgumentError(
            f"benchmark must be 'a', 'b' or 'c' and num_experts at least 2; got {benchmark!r} and {num_experts}"
        )
    generator = torch.Generator().manual_seed(7919 * seed + 13)
    means = SPREAD * torch.randn(NUM_CLASSES, HIDDEN_SIZE, generator=generator)
    table = _competence_table(benchmark, num_experts, generator)  # (M, E)
    warm_class = torch.randint(NUM_CLASSES, (num_warm,), generator=generator)
    warm_hidden = means[warm_class] + torch.randn(num_warm, HIDDEN_SIZE, generator=generator)
    warm_outcomes = bernoulli(table[warm_class], generator)

    query_class = torch.randint(NUM_CLASSES, (num_queries,), generator=generator)
    noise = torch.randn(num_queries, HIDDEN_SIZE, generator=generator)
    degraded, change_at = None, 0
    affected = torch.zeros(num_queries, dtype=torch.bool)
    if benchmark == "c":
        change_at = num_queries // 2
        means, table = _with_held_out(means, table, generator)
        late = torch.randint(NUM_CLASSES, len(means), (num_queries - change_at,), generator=generator)
        query_class[change_at:] = late
        noise[change_at:] *= 1.5
    competence = table[query_class]
    if benchmark == "b":
        degraded = popular_expert(warm_hidden, warm_outcomes)
        affected = affected_classes(NUM_CLASSES, generator)[query_class]
        competence = degrade(competence, affected, degraded, CHANCE)
    stream = Stream(means[query_class] + noise, competence, bernoulli(competence, generator), query_class, affected)
    return Environment(benchmark, "synthetic", seed, warm_hidden, warm_outcomes, stream, degraded, change_at)


def _competence_table(benchmark: Benchmark, num_experts: int, generator: torch.Generator) -> Tensor:  # (M, E)
    if benchmark == "a":
        return uniform(0.88, 0.95, (NUM_CLASSES, num_experts), generator)
    if benchmark == "c":
        return uniform(0.85, 0.95, (NUM_CLASSES, num_experts), generator)
    table = uniform(0.30, 0.70, (NUM_CLASSES, num_experts), generator)
    table[:, 0] = uniform(0.90, 0.95, (NUM_CLASSES,), generator)
    specialist = 1 + torch.arange(NUM_CLASSES) % (num_experts - 1)
    table[torch.arange(NUM_CLASSES), specialist] = uniform(0.80, 0.93, (NUM_CLASSES,), generator)
    return table


def _with_held_out(
    means: Tensor,  # (M, D)
    table: Tensor,  # (M, E)
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:  # (M + H, D), (M + H, E)
    pairs = torch.randperm(len(means), generator=generator)[: 2 * NUM_HELD_OUT].view(2, NUM_HELD_OUT)
    offset = SPREAD * torch.randn(NUM_HELD_OUT, means.shape[1], generator=generator)
    held_out = means[pairs].mean(dim=0) + offset
    order = torch.randperm(table.shape[1], generator=generator)
    travels = torch.linspace(0.35, 0.95, table.shape[1], dtype=torch.float64)[order]
    wobble = 0.08 * torch.randn(NUM_HELD_OUT, table.shape[1], dtype=torch.float64, generator=generator)
    return torch.cat([means, held_out]), torch.cat([table, (travels + wobble).clamp(0.1, 0.97)])
