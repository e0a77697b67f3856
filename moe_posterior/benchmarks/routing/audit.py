"""What the audit log costs a router under load, and how fast it is written, verified and replayed.

Dimensions: N decisions, D embedding size, C clusters, E experts, R repeats.

Runs with and without a log alternate, so a busy machine disturbs both equally: ratios compare neighbours, and the median over
repeats is reported with the spread.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moe_posterior.audit import AuditLog
from moe_posterior.audit.rebuild import rebuild
from moe_posterior.audit.verify import verify
from moe_posterior.benchmarks.cells import text_table
from moe_posterior.benchmarks.records import Record
from moe_posterior.benchmarks.routing.environments import synthetic
from moe_posterior.benchmarks.routing.latency import SIZES, open_loop
from moe_posterior.results.tables import Table
from moe_posterior.router import PosteriorRouter
from moe_posterior.threads import one_thread

LOAD = 50_000  # decisions offered per second
SECONDS = 2.0  # of load, with and without a log, in each repeat
BATCH = 25  # about the batch size under that load
CLOSED, ROUNDS = 5_000, 8  # decisions back to back, and how often with and without a log in turn
_OPEN = ("p50_ms", "p90_ms", "p99_ms", "throughput", "mean_batch")
SUSTAINED, SUSTAINED_BATCH = 1_500_000, 2_000
REALISTIC = 100_000
COMMIT = 5_000  # decisions between syncs in the realistic stream: 0.1 s at the load above


def parts(repeats: int) -> int:
    """How often :func:`measure` calls ``advance``."""
    return 3 * repeats


def measure(seeds: Iterable[int], advance: Callable[[], None] = lambda: None) -> Iterator[Record]:
    """Records of every repeat; the seed labels a repeat and draws its embeddings, outcomes and arrivals."""
    with one_thread():
        for seed in seeds:
            for part in (under_load, sustained, realistic):
                for metric, value in part(seed).items():
                    yield Record("audit", _ENVIRONMENTS[part.__name__], "posterior", {}, seed, metric, value)
                advance()


def under_load(seed: int) -> dict[str, float]:
    """The router of the latency benchmark, E = 32, with and without a log alternately: under open-loop load, and back to back."""
    size, random = SIZES[0], np.random.default_rng(seed)
    embeddings = random.normal(size=(4000, size.hidden)).astype(np.float32)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, AuditLog(folder) as log:
        routers = {
            name: PosteriorRouter(size.experts, size.hidden, size.clusters, seed=seed, audit=audit, score="lcb")
            for name, audit in (("off", None), ("on", log))
        }
        for name, router in sorted(routers.items(), reverse=bool(seed % 2)):
            router.fit(embeddings[:1000], seed=seed)
            back_to_back(router, embeddings, CLOSED, BATCH, random)  # warm
            loaded = open_loop(router, embeddings, LOAD, SECONDS, np.random.default_rng(seed))
            found |= {f"{metric} {name}": loaded[metric] for metric in _OPEN}
        paces: dict[str, list[tuple[float, float]]] = {name: [] for name in routers}
        for _ in range(ROUNDS):
            for name, router in routers.items():
                log.flush()
                paces[name].append(back_to_back(router, embeddings, CLOSED, BATCH, random))
    wall, processor = (np.array([[pace[i] for pace in paces[name]] for name in ("off", "on")]) for i in (0, 1))
    found |= {"closed off": float(np.median(wall[0])), "closed on": float(np.median(wall[1]))}
    return found | {
        "throughput cost": 1 - found["throughput on"] / found["throughput off"],
        "closed cost": float(np.median(1 - wall[1] / wall[0])),
        "processor cost": float(np.median(1 - processor[1] / processor[0])),
    }


def back_to_back(
    router: PosteriorRouter, embeddings: np.ndarray, count: int, batch: int, random: np.random.Generator
) -> tuple[float, float]:
    """Decisions per second of wall-clock and of the deciding thread's CPU time; each batch is resolved before the next is decided."""
    outcomes = (random.random((64, batch)) < 0.9).astype(np.float64)
    starts = random.integers(len(embeddings) - batch, size=count // batch)
    began, busy = time.perf_counter(), time.thread_time()
    for turn, start in enumerate(starts.tolist()):
        decisions = router.route_batch(embeddings[start : start + batch])
        router.resolve_batch(decisions.ids, outcomes[turn % 64])
    done = len(starts) * batch
    return done / (time.perf_counter() - began), done / max(time.thread_time() - busy, 1e-9)


def sustained(seed: int) -> dict[str, float]:
    """Decisions with outcomes per second, in batches, until all of them are synced.

    ``with the router`` includes a small router that makes the decisions; ``sustained`` feeds the log decisions made beforehand, which
    times the log alone. The belief does not change there, so no posterior rows are written.
    """
    random = np.random.default_rng(seed)
    embeddings = random.normal(size=(SUSTAINED_BATCH * 8, 16)).astype(np.float32)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        log = AuditLog(folder)
        router = PosteriorRouter(32, 16, 32, seed=seed, audit=log, score="lcb")
        router.fit(embeddings[:2000], seed=seed)
        began = time.perf_counter()
        back_to_back(router, embeddings, SUSTAINED // 3, SUSTAINED_BATCH, random)
        log.flush()
        found["with the router"] = SUSTAINED // 3 / (time.perf_counter() - began)
        log.close()
    with tempfile.TemporaryDirectory() as folder:
        log = AuditLog(folder)
        router = PosteriorRouter(32, 16, 32, seed=seed, score="lcb")
        router.fit(embeddings[:2000], seed=seed)
        recorder = log.follow(router)
        made = [router.route_batch(embeddings[i::8]) for i in range(8)]
        signal = (random.random((SUSTAINED_BATCH, 1)) < 0.9).astype(np.float64)
        began = time.perf_counter()
        for turn in range(SUSTAINED // SUSTAINED_BATCH):
            one = made[turn % 8]
            ids = np.arange(turn * SUSTAINED_BATCH, (turn + 1) * SUSTAINED_BATCH)
            recorder.before()
            recorder.routed(one._replace(ids=ids))
            recorder.before()
            recorder.resolved(ids, signal)
        log.flush()
        found["sustained"] = SUSTAINED / (time.perf_counter() - began)
        log.close()
    return found


def realistic(seed: int) -> dict[str, float]:
    """Benchmark B's queries, E = C = 32, k = 1, in batches of 25, outcomes one batch later, synced every 5,000 decisions.

    That corresponds to 50,000 queries per second at the default ``fsync_every`` of 0.1 s. Bytes per decision count all files of the
    closed log, checkpoints included; verify checks every hash and reads every record; replay rebuilds the router from the first
    checkpoint.
    """
    environment = synthetic("b", seed, 32, num_queries=REALISTIC)
    stream = environment.stream
    hidden, outcomes = stream.hidden.numpy(), stream.outcomes.numpy()
    with tempfile.TemporaryDirectory() as folder:
        with AuditLog(folder, fsync_every=3600.0) as log:
            router = PosteriorRouter(32, environment.hidden_size, 32, seed=seed, audit=log, threshold=0.5, score="lcb")
            router.fit(environment.warm_hidden.numpy(), seed=seed)
            router.warm_start(environment.warm_hidden.numpy(), environment.warm_outcomes.numpy(), strength=20.0)
            waiting: tuple[Any, Any] | None = None
            for start in range(0, REALISTIC, BATCH):
                decisions = router.route_batch(hidden[start : start + BATCH])
                if waiting is not None:
                    router.resolve_batch(*waiting)
                chosen = decisions.experts[:, 0]
                waiting = decisions.ids, outcomes[np.arange(start, start + len(chosen)), chosen]
                if (start + BATCH) % COMMIT == 0:
                    log.flush()
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        found = {"bytes a decision": size / REALISTIC}
        log = AuditLog(folder, mode="r")
        for name, work in (("verify", lambda: verify(Path(folder))), ("replay", lambda: rebuild(log.read()))):
            began = time.perf_counter()
            work()
            found[name] = REALISTIC / (time.perf_counter() - began)
    return found


_ENVIRONMENTS = {"under_load": SIZES[0].name, "sustained": "E=32 C=32 D=16", "realistic": "synthetic B, E=32 C=32"}
_SHOWN: list[tuple[str, str, str]] = [  # metric, what it is, format
    ("throughput cost", f"throughput lost to the log, {LOAD:,} decisions/s offered", ".1%"),
    ("closed cost", f"throughput lost to the log, batches of {BATCH} back to back", ".1%"),
    ("processor cost", "the same, of the deciding thread's processor time", ".1%"),
    ("throughput on", "decisions/s with a log, offered load", ",.0f"),
    ("throughput off", "decisions/s without", ",.0f"),
    ("closed on", "decisions/s with a log, back to back", ",.0f"),
    ("closed off", "decisions/s without", ",.0f"),
    ("p90_ms on", "p90 latency with a log, offered load (ms)", ".2f"),
    ("p90_ms off", "p90 latency without (ms)", ".2f"),
    ("p99_ms on", "p99 latency with a log, offered load (ms)", ".2f"),
    ("sustained", "decisions/s with outcomes through the log alone to the disk", ",.0f"),
    ("with the router", f"decisions/s with outcomes, router included, batches of {SUSTAINED_BATCH:,}", ",.0f"),
    ("bytes a decision", "bytes a decision, realistic stream", ".1f"),
    ("verify", "decisions/s verified", ",.0f"),
    ("replay", "decisions/s replayed", ",.0f"),
]
_TARGETS: dict[str, tuple[str, float]] = {
    "throughput cost": ("≤", 0.15),
    "closed cost": ("≤", 0.15),
    "p90_ms on": ("≤", 5.0),
    "sustained": ("≥", 300_000.0),
    "bytes a decision": ("≤", 60.0),
    "verify": ("≥", 1_000_000.0),
    "replay": ("≥", 200_000.0),
}


def tables(records: list[Record]) -> list[Table]:
    """Medians over repeats with the spread, next to the targets."""
    values: dict[str, list[float]] = {}
    for record in records:
        if isinstance(record.value, int | float):
            values.setdefault(record.metric, []).append(float(record.value))
    rows = []
    for metric, what, form in _SHOWN:
        if metric in values:
            found = sorted(values[metric])
            middle = statistics.median(found)
            sign, limit = _TARGETS.get(metric, ("", 0.0))
            met = (middle <= limit if sign == "≤" else middle >= limit) if sign else None
            target = f"{sign} {limit:{form}}" if sign else ""
            spread = f"{found[0]:{form}} to {found[-1]:{form}}"
            rows.append([what, f"{middle:{form}}", spread, target, {None: "", True: "met", False: "missed"}[met]])
    note = (
        f"Medians over {len({record.seed for record in records})} repeats, with and without a log in turn within each. Realistic: "
        f"{REALISTIC:,} queries of benchmark B, E = C = 32, k = 1, batches of {BATCH}, every outcome a batch later, a sync every "
        f"{COMMIT:,} decisions; bytes of all files over decisions."
    )
    return [text_table("The audit log's cost and pace", ["what", "median", "least to most", "target", ""], rows, note)]
