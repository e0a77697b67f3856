"""How long a decision takes: one at a time in process, and under open-loop load, which includes waiting.

Dimensions: N queries, D embedding size, C clusters, E experts.

Open loop: queries arrive at random times whether or not the router is ready (Poisson arrivals at a given rate); it decides everything
that has arrived as one batch, then resolves the outcomes of the batch before. Latency runs from a query's arrival to its decision, so
a router that falls behind shows it. Embedding the query is not included; the paper's figures may include it.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_posterior.benchmarks.cells import decimal, plain, text_table
from moe_posterior.benchmarks.records import Record
from moe_posterior.results.tables import Table
from moe_posterior.router import PosteriorRouter
from moe_posterior.threads import one_thread

LOADS = (1_000, 5_000, 10_000, 20_000, 50_000, 100_000)  # queries per second
PAPER_P90 = {1: 3.8, 10_000: 8.7, 50_000: 44.2}  # ms: one decision (benchmark A), and "Latency Under Load"
QUANTILES = {"p50_ms": 0.5, "p90_ms": 0.9, "p99_ms": 0.99}
_WARM_UP = 200
_SPIN = 200e-6  # seconds before an arrival at which to stop sleeping and spin: sleep is not that exact


@dataclass(frozen=True)
class Size:
    """Size of a router."""

    experts: int
    clusters: int
    hidden: int = 384

    @property
    def name(self) -> str:
        """Its name in records."""
        return f"E={self.experts} C={self.clusters} D={self.hidden}"


SIZES = (Size(32, 64), Size(1000, 512))
VARIANTS: dict[str, dict[str, Any]] = {
    "posterior": {"score": "lcb"},
    "posterior, all options": {
        "score": "lcb",
        "half_life": 300.0,
        "shrinkage": 20.0,
        "surprise": 6.0,
        "exploration": 0.02,
    },
    "posterior, the router's defaults": {},
}


def measure(
    seed: int, seconds: float = 3.0, loads: tuple[int, ...] = LOADS, advance: Callable[[], None] = lambda: None
) -> Iterator[Record]:
    """Records of one seed: single decisions and outcomes for every size, open-loop load for the small one.

    Args:
        seed: of embeddings, outcomes and arrival times.
        seconds: length of each load level.
        loads: arrivals per second.
        advance: called after each part, for a progress bar.
    """
    with one_thread():
        for size in SIZES:
            for name, options in VARIANTS.items():
                router, embeddings = _router(size, options, seed)
                for metric, value in single_decisions(router, embeddings).items():
                    yield _record(size, name, {"load": 1, **options}, seed, metric, value)
                advance()
        small = SIZES[0]
        for load in loads:
            for name, options in VARIANTS.items():
                router, embeddings = _router(small, options, seed)
                found = open_loop(router, embeddings, load, seconds, np.random.default_rng(seed))
                for metric, value in found.items():
                    yield _record(small, name, {"load": load, **options}, seed, metric, value)
                advance()


def parts(loads: tuple[int, ...] = LOADS) -> int:
    """How often :func:`measure` calls ``advance``."""
    return len(VARIANTS) * (len(SIZES) + len(loads))


def single_decisions(router: PosteriorRouter, embeddings: np.ndarray, repeats: int = 2000) -> dict[str, float]:
    """Percentiles of single decisions and single outcomes, each resolved before the next decision."""
    route, resolve = np.empty(repeats), np.empty(repeats)
    for i in range(-_WARM_UP, repeats):
        start = time.perf_counter()
        decision = router.route(embeddings[i % len(embeddings)])
        between = time.perf_counter()
        router.resolve(decision.id, float(i % 10 != 0))
        if i >= 0:
            route[i], resolve[i] = between - start, time.perf_counter() - between
    found = {metric: 1e3 * float(np.quantile(route, q)) for metric, q in QUANTILES.items()}
    return found | {f"resolve_{metric}": 1e3 * float(np.quantile(resolve, q)) for metric, q in QUANTILES.items()}


def open_loop(
    router: PosteriorRouter, embeddings: np.ndarray, load: int, seconds: float, random: np.random.Generator
) -> dict[str, float]:
    """Latency percentiles, throughput and the breakdown of time at a given arrival rate.

    ``backlog_s`` is the time between the last arrival and the last decision: more than a few milliseconds mean that the router is
    saturated, and the percentiles then only reflect how long the load lasted.
    """
    arrivals = random.exponential(1 / load, size=int(load * seconds)).cumsum()
    rows = random.integers(len(embeddings), size=len(arrivals))
    outcomes = (random.random(len(arrivals)) < 0.9).astype(np.float64)
    finished, waiting = np.empty(len(arrivals)), None
    spent = {"route_s": 0.0, "resolve_s": 0.0}
    done, batches, start = 0, 0, time.perf_counter()
    while done < len(arrivals):
        now = time.perf_counter() - start
        arrived = int(np.searchsorted(arrivals, now, side="right"))
        if arrived == done:
            if arrivals[done] - now > _SPIN:
                time.sleep(arrivals[done] - now - _SPIN)
            continue
        decisions = router.route_batch(embeddings[rows[done:arrived]])
        decided = time.perf_counter() - start
        finished[done:arrived] = decided
        if waiting is not None:
            router.resolve_batch(*waiting)
        waiting = decisions.ids, outcomes[done:arrived]
        spent["route_s"] += decided - now
        spent["resolve_s"] += time.perf_counter() - start - decided
        done, batches = arrived, batches + 1
    elapsed = time.perf_counter() - start
    latency = finished - arrivals
    return {metric: 1e3 * float(np.quantile(latency, q)) for metric, q in QUANTILES.items()} | {
        "throughput": len(arrivals) / elapsed,
        "backlog_s": float(finished[-1] - arrivals[-1]),
        "mean_batch": len(arrivals) / batches,
        "share_routing": spent["route_s"] / elapsed,
        "share_resolving": spent["resolve_s"] / elapsed,
    }


def tables(records: list[Record]) -> list[Table]:
    """One table of single decisions and one of load, from records."""
    cases: dict[tuple[str, str, int], dict[str, list[float]]] = {}
    published: dict[tuple[str, str, int], float | None] = {}
    for record in records:
        key = (record.environment, record.gate, int(record.options["load"]))
        if isinstance(record.value, int | float):
            cases.setdefault(key, {}).setdefault(record.metric, []).append(float(record.value))
        published[key] = published.get(key) or record.paper
    single = [
        [
            size,
            gate,
            *(decimal(found[m]) for m in (*QUANTILES, *(f"resolve_{m}" for m in QUANTILES))),
            plain(published[key]),
        ]
        for key, found in cases.items()
        for size, gate, load in [key]
        if load == 1
    ]
    loaded = [
        [
            f"{load:,}",
            gate,
            *(decimal(found[m]) for m in (*QUANTILES, "backlog_s")),
            *_shares(found),
            plain(published[key]),
        ]
        for key, found in sorted(cases.items(), key=lambda item: item[0][2])
        for _, gate, load in [key]
        if load > 1
    ]
    note = (
        "ms unless said; mean ± half the 95 % interval over seeds. The paper's figures may contain embedding the query."
    )
    return [
        text_table(
            "One decision, one outcome, in process",
            ["size", "gate", "route p50", "p90", "p99", "resolve p50", "p90", "p99", "paper p90"],
            single,
            note,
        ),
        text_table(
            f"Open-loop load, outcomes resolved too · {SIZES[0].name}",
            ["arrivals/s", "gate", "p50", "p90", "p99", "backlog s", "batch", "routing", "resolving", "paper p90"],
            loaded,
            note + " Batch: queries decided together. A backlog at the end says that the router was saturated.",
        ),
    ]


def _shares(found: dict[str, list[float]]) -> list[str]:
    mean = {name: sum(values) / len(values) for name, values in found.items()}
    return [f"{mean['mean_batch']:.0f}", f"{mean['share_routing']:.0%}", f"{mean['share_resolving']:.0%}"]


def _router(size: Size, options: dict[str, Any], seed: int) -> tuple[PosteriorRouter, np.ndarray]:
    random = np.random.default_rng(seed)
    centres = random.normal(size=(size.clusters, size.hidden))
    rows = random.integers(size.clusters, size=4 * size.clusters + 2000)
    embeddings = (centres[rows] + random.normal(size=(len(rows), size.hidden))).astype(np.float32)
    router = PosteriorRouter(size.experts, size.hidden, size.clusters, seed=seed, **options)
    router.fit(embeddings, seed=seed)
    return router, embeddings


def _record(size: Size, gate: str, options: dict[str, Any], seed: int, metric: str, value: float) -> Record:
    small = size == SIZES[0] and metric == "p90_ms"
    return Record(
        "latency", size.name, gate, options, seed, metric, value, PAPER_P90.get(options["load"]) if small else None
    )
