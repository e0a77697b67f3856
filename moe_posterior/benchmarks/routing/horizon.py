"""How soon a reader of the audit log sees that an expert fails: the paper's 20-query horizon, from the log's flags alone.

Dimensions: T queries, E experts, S seeds.

The stream of benchmark B goes through a :class:`PosteriorRouter` with an :class:`AuditLog`, one query at a time, each outcome right
after its decision. Then the log is read. A flag is raised once outcomes show that the expert fell below its own record and below its
logged start (``start``), or once it fell and its mean + 2 std lies below the plain mean of the active experts (``pool``); on one
cluster (``cell``), or over all of them (``expert``). See :mod:`moe_posterior.audit.views.flags`.
"""

import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe_posterior.audit import AuditLog
from moe_posterior.audit.views.falls import FALSE_ALARMS
from moe_posterior.audit.views.flags import Against, Flag
from moe_posterior.audit.views.survey import survey
from moe_posterior.benchmarks.cells import text_table
from moe_posterior.benchmarks.records import Record
from moe_posterior.benchmarks.routing import measures
from moe_posterior.benchmarks.routing.environments import NUM_WARM, Environment, synthetic
from moe_posterior.benchmarks.routing.registry import options_of
from moe_posterior.metrics import wilson_interval
from moe_posterior.results.intervals import median_interval
from moe_posterior.results.tables import DASH, Table
from moe_posterior.router import PosteriorRouter

ENVIRONMENT = "horizon on synthetic B"
PAPER = 20  # queries
HEALTHY = 500  # queries before the failure, in the second design
QUERIES = 500  # after it
GATES = ("posterior of the paper", "posterior")
ROUTER = "router avoids it"  # not a flag: when the router itself avoids the expert
FLAGS: dict[str, tuple[Against, bool]] = {
    "pool, cell": ("pool", False),
    "pool, expert": ("pool", True),
    "start, cell": ("start", False),
    "start, expert": ("start", True),
}
NOTE = (
    "queries: from the failure to the outcome that shows a fall from the expert's own record (start), or a fall with mean + 2 std "
    "below the pool's plain mean (pool), on any one cluster (cell) or over all (expert); an expert that stays as it is, is ever "
    f"flagged with probability {FALSE_ALARMS:g} at most; paper: within "
    f"{PAPER} queries recorded in the log. Median over seeds with a 95 % interval; ∞: no flag, or one before. own: of these, the "
    "queries that the failing expert answered itself. within: share of seeds, Wilson 95 % interval. false: flags a seed in "
    f"{HEALTHY} healthy queries, of the expert that then fails and of all others. The router avoids it: at most 5 % of the next 50 "
    "affected queries."
)


class Play(NamedTuple):
    """What a stream and its log showed."""

    chosen: Tensor  # (T,) int64
    flags: list[Flag]


def world(seed: int, healthy: int) -> tuple[Environment, int]:
    """Benchmark B with the failure after ``healthy`` queries, and the query at which it begins.

    In B the expert fails from the first query on. The ``healthy`` queries before it are drawn like the warm-start data, from the
    intact pool, and are not part of the warm start.

    >>> environment, onset = world(0, healthy=10)
    >>> len(environment.stream.hidden), onset, bool(environment.stream.affected[:onset].any())
    (510, 10, False)
    """
    made = synthetic("b", seed, num_queries=QUERIES, num_warm=NUM_WARM + healthy)
    if not healthy:
        return made, 0
    stream, hidden, outcomes = made.stream, made.warm_hidden[NUM_WARM:], made.warm_outcomes[NUM_WARM:]
    joined = replace(
        stream,
        hidden=torch.cat([hidden, stream.hidden]),
        outcomes=torch.cat([outcomes, stream.outcomes]),
        affected=torch.cat([torch.zeros(healthy, dtype=torch.bool), stream.affected]),
    )
    warm = replace(made, warm_hidden=made.warm_hidden[:NUM_WARM], warm_outcomes=made.warm_outcomes[:NUM_WARM])
    return replace(warm, stream=joined, change_at=healthy), healthy


def play_logged(environment: Environment, knobs: Mapping[str, Any], seed: int, folder: str) -> Play:
    """Route the stream through a router that logs to the folder, and read the flags from the log."""
    keywords = dict(knobs)
    num_clusters, strength = keywords.pop("num_clusters", 32), keywords.pop("strength", None)
    keywords = {name: value for name, value in keywords.items() if value is not None}
    stream = environment.stream
    hidden, outcomes = stream.hidden.numpy(), stream.outcomes.numpy()
    chosen = np.empty(len(hidden), dtype=np.int64)
    with AuditLog(folder) as log:
        router = PosteriorRouter(
            environment.num_experts,
            environment.hidden_size,
            num_clusters,
            audit=log,
            **{"seed": seed, "score": "lcb", **keywords},
        )
        router.fit(environment.warm_hidden.numpy(), seed=seed)
        router.warm_start(environment.warm_hidden.numpy(), environment.warm_outcomes.numpy(), strength=strength)
        for row in range(len(hidden)):
            decision = router.route(hidden[row])
            chosen[row] = decision.expert
            router.resolve(decision.id, outcomes[row, decision.expert])
    (source,) = survey(AuditLog(folder, mode="r").read()).sources.values()
    return Play(torch.from_numpy(chosen), source.flags())


def figures_of(play: Play, environment: Environment, onset: int) -> Iterator[tuple[str, str, float | int | None]]:
    """What the log showed and when, as (flag, metric, value).

    ``log``: decisions between the failure and the first flag; ``own``: how many of them were the failing expert's. None if no
    flag was raised, or one was up before the failure. ``false_it``, ``false_others``: flags before the failure. The
    router itself reports ``avoided``: decisions until it gives the expert at most 5 % of the next 50 affected queries.
    """
    expert = environment.degraded
    assert expert is not None
    affected, mine = environment.stream.affected, play.chosen == expert
    yield ROUTER, "avoided", measures.queries_until_avoided(play.chosen[onset:], affected[onset:], expert)[0]
    for name, (against, over_all) in FLAGS.items():
        flags = [f for f in play.flags if f.against == against and (f.cluster is None) == over_all]
        after = [flag.number for flag in flags if flag.expert == expert and flag.number >= onset]
        early = [flag.expert == expert for flag in flags if flag.number < onset]
        yield name, "log", min(after) - onset if after else None
        yield name, "own", int(mine[onset : min(after)].sum()) if after else None
        yield name, "false_it", sum(early)
        yield name, "false_others", len(early) - sum(early)


def measure(seed: int) -> Iterator[Record]:
    """Records of one seed: every gate, with the failure at the first query and after healthy ones."""
    for healthy in (0, HEALTHY):
        environment, onset = world(seed, healthy)
        for gate in GATES:
            knobs = options_of(gate)
            with tempfile.TemporaryDirectory() as folder:
                play = play_logged(environment, knobs, seed, folder)
            for flag, metric, value in figures_of(play, environment, onset):
                options = {"healthy": healthy, "flag": flag, **knobs}
                paper = PAPER if metric == "log" and flag != ROUTER else None
                yield Record("audit", ENVIRONMENT, gate, options, seed, metric, value, paper)


def tables(records: list[Record]) -> list[Table]:
    """The horizon table, from records."""
    cases: dict[tuple[int, str, str], dict[str, list[Any]]] = {}
    for record in records:
        key = (int(record.options["healthy"]), record.gate, str(record.options["flag"]))
        cases.setdefault(key, {}).setdefault(record.metric, []).append(record.value)
    rows = []
    for (healthy, gate, flag), found in cases.items():
        place = [f"after {healthy}" if healthy else "at once", gate, flag]
        if flag == ROUTER:
            rows.append([*place, _median(found["avoided"]), *[DASH] * 4])
            continue
        early = [DASH] * 2
        if healthy:
            early = [f"{sum(found[metric]) / len(found[metric]):.1f}" for metric in ("false_it", "false_others")]
        rows.append([*place, _median(found["log"]), _median(found["own"]), _within(found["log"]), *early])
    header = ["failure", "gate", "flag", "queries", "own", f"within {PAPER}", "false, it", "false, others"]
    title = f"When the log shows the failure · B, synthetic, E=16, {len({r.seed for r in records})} seeds"
    return [text_table(title, header, rows, NOTE)]


def _within(horizons: list[float | None]) -> str:
    """The share of seeds within the paper's horizon, with a Wilson interval."""
    soon = sum(value is not None and value <= PAPER for value in horizons)
    low, high = wilson_interval(torch.tensor([float(soon)]), torch.tensor([float(len(horizons))]))
    return f"{soon / len(horizons):.0%} [{float(low[0]):.0%}, {float(high[0]):.0%}]"


def _median(values: list[float | None]) -> str:
    middle, low, high = median_interval([math.inf if value is None else float(value) for value in values])
    return " ".join([_number(middle), f"[{_number(low)}, {_number(high)}]"])


def _number(value: float) -> str:
    return "∞" if math.isinf(value) else f"{value:g}"
