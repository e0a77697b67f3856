"""The router with its defaults against textbook bandits, on streams that show only the outcome of the chosen expert.

Dimensions: T queries, D embedding size, E experts, W warm-start queries.
"""

from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from moe_posterior.benchmarks.cells import percent, text_table, whole
from moe_posterior.benchmarks.records import Record, case_key
from moe_posterior.benchmarks.routing.llm import load
from moe_posterior.results.tables import DASH, Table
from moe_posterior.router import PosteriorRouter, clusters_for

BENCHMARK = "router"
WINDOW = 20  # queries with few choices of an expert before it counts as avoided
SELDOM = 0.25
LATE = 500  # queries at the end of a stream
FLOOR, GROUPS, SIZE = 0.1, 16, 16  # synthetic streams: success of a failed expert, query classes, D
_NOTE = (
    "Mean expected outcome in %, ± half the 95 % t interval over seeds. late: the last 500 queries. avoided: queries after the "
    "failure until the failed expert has at most a quarter of the next 20, in the mean and on the worst seed. found: share of the "
    "best expert late."
)


@dataclass(frozen=True, eq=False)
class Play:
    """One stream, with every expert's outcome on every query."""

    hidden: NDArray[np.float32]  # (T, D)
    competence: NDArray[np.float64]  # (T, E)
    outcomes: NDArray[np.float64]  # (T, E)
    warm: tuple[NDArray, NDArray] | None = None  # (W, D), (W, E)
    change: int | None = None  # first query after a failure or after an expert joined
    fails: int | None = None  # which one fails
    joins: bool = False  # the last expert does not exist before the change

    @property
    def num_experts(self) -> int:
        """E."""
        return self.competence.shape[1]


class Policy(Protocol):
    """Chooses one expert per query and learns from its outcome."""

    def choose(self, query: int) -> int:
        """Choose an expert for this query."""

    def learn(self, expert: int, outcome: float) -> None:
        """Learn the outcome of that choice."""

    def join(self) -> None:
        """Add one expert at the end of the pool."""


class Routed:
    """A router as a policy."""

    def __init__(self, play: Play, seed: int, **options: object) -> None:
        self.hidden = play.hidden
        options = {"num_clusters": clusters_for(len(play.hidden)), "seed": seed, **options}
        self.router = PosteriorRouter(play.num_experts - play.joins, play.hidden.shape[1], **options)  # type: ignore[arg-type]
        self.router.fit(play.hidden if play.warm is None else play.warm[0], seed=seed)
        if play.warm is not None:
            self.router.warm_start(*play.warm, strength=50.0)
        self._id = -1

    def choose(self, query: int) -> int:
        decision = self.router.route(self.hidden[query])
        self._id = decision.id
        return decision.expert

    def learn(self, expert: int, outcome: float) -> None:
        self.router.resolve(self._id, outcome)

    def join(self) -> None:
        self.router.add_expert()


class Bandit:
    """Counts per expert and cluster (a single cluster if ``clusters`` is None), with one of three rules.

    Source: Auer, Cesa-Bianchi and Fischer 2002 (UCB1, ε-greedy); Thompson 1933.
    """

    def __init__(self, play: Play, seed: int, rule: str, clusters: NDArray | None) -> None:
        self.rule, self.random = rule, np.random.default_rng(seed)
        self.clusters = np.zeros(len(play.hidden), dtype=np.int64) if clusters is None else clusters
        self.active = play.num_experts - play.joins
        self.won = np.zeros((int(self.clusters.max()) + 1, play.num_experts))
        self.lost = np.zeros_like(self.won)
        self._here = 0

    def choose(self, query: int) -> int:
        self._here = int(self.clusters[query])
        won, lost = (table[self._here, : self.active] for table in (self.won, self.lost))
        if self.rule == "thompson":
            return int(self.random.beta(1 + won, 1 + lost).argmax())
        if self.rule == "ucb1":
            seen = np.maximum(won + lost, 1e-9)
            return int((won / seen + np.sqrt(2 * np.log(max(seen.sum(), 2.0)) / seen)).argmax())
        if self.random.random() < 0.05:
            return int(self.random.integers(self.active))
        mean = (1 + won) / (2 + won + lost)
        return int(self.random.choice(np.flatnonzero(mean == mean.max())))

    def learn(self, expert: int, outcome: float) -> None:
        self.won[self._here, expert] += outcome
        self.lost[self._here, expert] += 1 - outcome

    def join(self) -> None:
        self.active += 1


def clusters_of(play: Play, seed: int) -> NDArray[np.int64]:
    """Clusters of the stream as the router finds them, for bandits that count per cluster."""
    router = PosteriorRouter(2, play.hidden.shape[1], clusters_for(len(play.hidden)))
    router.fit(play.hidden if play.warm is None else play.warm[0], seed=seed)
    return router.gate.clusterer(torch.from_numpy(play.hidden)).cluster_ids.numpy()


POLICIES: dict[str, Callable[[Play, int], Policy]] = {
    "router, defaults": Routed,
    "router, the paper's score and belief": lambda play, seed: Routed(play, seed, score="lcb"),
    "ε-greedy .05 by cluster": lambda play, seed: Bandit(play, seed, "greedy", clusters_of(play, seed)),
    "ε-greedy .05": lambda play, seed: Bandit(play, seed, "greedy", None),
    "Thompson by cluster": lambda play, seed: Bandit(play, seed, "thompson", clusters_of(play, seed)),
    "Thompson": lambda play, seed: Bandit(play, seed, "thompson", None),
    "UCB1 by cluster": lambda play, seed: Bandit(play, seed, "ucb1", clusters_of(play, seed)),
    "UCB1": lambda play, seed: Bandit(play, seed, "ucb1", None),
}
BEST = "best single in hindsight"


def made(seed: int, quality: tuple[float, ...], spread: float = 0.5, queries: int = 2000, warm: int = 0) -> Play:
    """Well-separated query classes; an expert's log odds of success vary between them by ``spread``."""
    random = np.random.default_rng(7919 * seed + 101)
    means = 4 * random.normal(size=(GROUPS, SIZE))
    odds = np.log(np.array(quality) / (1 - np.array(quality)))[random.permutation(len(quality))]
    table = 1 / (1 + np.exp(-odds - spread * random.normal(size=(GROUPS, len(quality)))))
    group = random.integers(GROUPS, size=queries + warm)
    hidden = (means[group] + random.normal(size=(len(group), SIZE))).astype(np.float32)
    competence = table[group]
    outcomes = (random.random(competence.shape) < competence).astype(np.float64)
    past = (hidden[queries:], outcomes[queries:]) if warm else None
    return Play(hidden[:queries], competence[:queries], outcomes[:queries], past)


def models(seed: int, queries: int = 3000, warm: int = 0) -> Play:
    """Nine language models on real queries, in random order."""
    data = load("train")
    rows = np.random.default_rng(7919 * seed + 103).permutation(len(data.hidden))[: queries + warm]
    hidden, score = data.hidden.numpy()[rows], data.score.numpy()[rows]
    past = (hidden[queries:], score[queries:]) if warm else None
    return Play(hidden[:queries], score[:queries], score[:queries], past)


def failing(play: Play, seed: int, start: int, end: int | None = None) -> Play:
    """The same stream, but the expert that is best before ``start`` is at chance from ``start`` to ``end``."""
    best = int(play.competence[:start].mean(axis=0).argmax())
    competence, outcomes = play.competence.copy(), play.outcomes.copy()
    competence[start:end, best] = FLOOR
    outcomes[start:end, best] = np.random.default_rng(seed).random(len(competence[start:end])) < FLOOR
    return replace(play, competence=competence, outcomes=outcomes, change=start, fails=best)


def joined(seed: int) -> Play:
    """The best expert joins halfway."""
    play = made(seed, _SIX, queries=2000)
    order = np.argsort(play.competence.mean(axis=0))
    return replace(
        play, competence=play.competence[:, order], outcomes=play.outcomes[:, order], change=1000, joins=True
    )


def losing(seed: int, points: float, experts: int) -> Play:
    """After a warm start all experts lose the same amount, so the best one stays the best."""
    play = made(seed, tuple(np.linspace(0.97, 0.88, experts)), spread=0.0, queries=2000, warm=4000)
    competence = play.competence - points
    outcomes = (np.random.default_rng(seed).random(competence.shape) < competence).astype(np.float64)
    return replace(play, competence=competence, outcomes=outcomes)


_SIX = (0.3, 0.9, 0.42, 0.54, 0.66, 0.78)
STREAMS: dict[str, Callable[[int], Play]] = {
    "alike": lambda seed: made(seed, _SIX, spread=0.0),
    "unlike": lambda seed: made(seed, _SIX, spread=1.5, queries=3000),
    "warm": lambda seed: made(seed, _SIX, spread=1.0, warm=2000),
    "failure": lambda seed: failing(made(seed, _SIX, queries=3000), seed, 1500),
    "recovery": lambda seed: failing(made(seed, _SIX, queries=4000), seed, 1000, 1600),
    "newcomer": joined,
    "shared loss of 6": lambda seed: losing(seed, 0.06, 10),
    "models": models,
    "models, warm": lambda seed: models(seed, 2000, 1000),
    "models, failure": lambda seed: failing(models(seed), seed, 1500),
}


def run(play: Play, policy: Policy) -> NDArray[np.int64]:  # -> (T,)
    """The experts that a policy chooses, one query and one outcome at a time."""
    chosen = np.empty(len(play.hidden), dtype=np.int64)
    for query in range(len(chosen)):
        if play.joins and query == play.change:
            policy.join()
        chosen[query] = policy.choose(query)
        policy.learn(int(chosen[query]), float(play.outcomes[query, chosen[query]]))
    return chosen


def figures(play: Play, chosen: NDArray[np.int64]) -> Iterator[tuple[str, float]]:
    """Metrics of one run."""
    got = play.competence[np.arange(len(chosen)), chosen]
    yield "outcome", float(got.mean())
    yield "late", float(got[-LATE:].mean())
    best = int(play.competence[-LATE:].mean(axis=0).argmax())
    yield "found", float((chosen[-LATE:] == best).mean())
    if play.fails is not None and play.change is not None:
        picked = np.append(chosen[play.change :] == play.fails, np.zeros(WINDOW))
        seldom = np.convolve(picked, np.ones(WINDOW) / WINDOW, "valid") <= SELDOM
        yield "avoided", float(seldom.argmax())


def measure(names: Iterable[str], seeds: Iterable[int], done: Set[str]) -> Iterator[list[Record]]:
    """Records of each run that is not done yet.

    Raises:
        MissingDataError: the data of the language models are missing.
    """
    names = list(names)
    for seed in seeds:
        for name in names:
            waiting = [p for p in (BEST, *POLICIES) if case_key(BENCHMARK, name, p, {}, seed) not in done]
            play = STREAMS[name](seed) if waiting else None
            for policy in waiting:
                assert play is not None
                if policy == BEST:
                    chosen = np.full(len(play.hidden), play.competence.mean(axis=0).argmax())
                else:
                    chosen = run(play, POLICIES[policy](play, seed))
                yield [Record(BENCHMARK, name, policy, {}, seed, *figure) for figure in figures(play, chosen)]


def tables(records: list[Record]) -> list[Table]:
    """One table per stream."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for record in records:
        by_policy = found.setdefault(record.environment, {}).setdefault(record.gate, {})
        by_policy.setdefault(record.metric, []).append(record.value)  # type: ignore[arg-type]
    made_tables = []
    for stream, policies in found.items():
        rows = []
        for policy, values in policies.items():
            shares = [percent(values[metric]) for metric in ("outcome", "late", "found")]
            late = values.get("avoided", []) if policy != BEST else []
            rows.append([policy, *shares, whole(late), f"{max(late):.0f}" if late else DASH])
        seeds = len({record.seed for record in records if record.environment == stream})
        header = ["", "outcome", "late", "found", "avoided", "worst"]
        made_tables.append(text_table(f"{stream}, {seeds} seeds", header, rows, _NOTE))
    return made_tables
