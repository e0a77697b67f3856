"""``moe-posterior benchmark``: run a benchmark, or render what an earlier run wrote."""

import argparse
import os
import platform
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from moe_posterior.benchmarks import records
from moe_posterior.benchmarks.records import Record, Results
from moe_posterior.benchmarks.routing import figures, latency, router, tune
from moe_posterior.benchmarks.routing.banks import BANKS
from moe_posterior.benchmarks.routing.llm import STREAMS
from moe_posterior.benchmarks.routing.registry import GATES, TUNED
from moe_posterior.benchmarks.routing.static import play_static
from moe_posterior.benchmarks.routing.suite import Plan, cases_of, run
from moe_posterior.benchmarks.routing.tables import tables_of
from moe_posterior.benchmarks.show import show
from moe_posterior.commands.benchmark import parser
from moe_posterior.errors import InvalidArgumentError, MissingDataError, MissingDependencyError
from moe_posterior.escape import terminal
from moe_posterior.files.reading import decoding, read_json
from moe_posterior.results.tables import Table


def benchmark(arguments: Sequence[str]) -> int:
    """Run ``moe-posterior benchmark`` with these arguments; 0 on success.

    Raises:
        MoEPosteriorError: a wrong argument, missing data or a missing package; the message says what to do.
    """
    if list(arguments[:1]) == ["lm"]:  # has options of its own, and needs transformers
        from moe_posterior.benchmarks.lm.command import lm

        return lm(list(arguments[1:]), _about(""))
    if list(arguments[:1]) == ["guarantees"]:
        from moe_posterior.benchmarks.guarantees.command import guarantees

        return guarantees(list(arguments[1:]), _about(""), progress)
    if list(arguments[:1]) == ["monitor"]:  # as lm
        from moe_posterior.benchmarks.monitor.command import monitor

        return monitor(list(arguments[1:]), _about(""))
    if list(arguments[:1]) == ["intervals"]:  # as lm
        from moe_posterior.benchmarks.intervals import intervals

        return intervals(list(arguments[1:]), _about(""))
    asked = parser().parse_args(list(arguments))
    if asked.seeds is None:
        asked.seeds = 20 if asked.horizon else 5
    command = shlex.join(["moe-posterior", "benchmark", *arguments])
    if asked.source is not None:
        results = records.read(asked.source)
        found = [record for record in results.records if record.benchmark == asked.benchmark]
        if not found:
            raise InvalidArgumentError(
                f"{asked.source} must hold records of benchmark {asked.benchmark!r}; it has none"
            )
        return _show(asked, Results(found, results.about))
    for name in ("seeds", "experts", "queries", "batch"):
        if getattr(asked, name) < 1:
            raise InvalidArgumentError(f"--{name} must be at least 1; got {getattr(asked, name)}")
    if asked.tune is not None:
        return _tune(asked)
    if asked.benchmark == "latency":
        return _show(asked, _latency(asked, command))
    if asked.benchmark == "audit":
        return _show(asked, _audit(asked, command))
    if asked.benchmark == "router":
        return _show(asked, _router(asked, command))
    return _show(asked, _run(asked, command))


def _show(asked: argparse.Namespace, results: Results) -> int:
    draw = None if asked.benchmark in ("latency", "audit", "router") else figures.draw
    return show(asked, results, _tables(asked.benchmark, results.records), draw)


def _tables(benchmark: str, records: list[Record]) -> list[Table]:
    if benchmark == "latency":
        return latency.tables(records)
    if benchmark == "router":
        return router.tables(records)
    if benchmark == "audit":
        from moe_posterior.benchmarks.routing import audit, horizon

        soon = [record for record in records if record.environment == horizon.ENVIRONMENT]
        fast = [record for record in records if record.environment != horizon.ENVIRONMENT]
        return (horizon.tables(soon) if soon else []) + (audit.tables(fast) if fast else [])
    return tables_of(records)


def environments(asked: argparse.Namespace) -> list[str]:
    """The environments to run, checked against what the benchmark has.

    Raises:
        InvalidArgumentError: an unknown environment.
    """
    if asked.benchmark == "router":
        known = list(router.STREAMS)
    else:
        known = ["static", *STREAMS] if asked.benchmark == "llm" else ["synthetic", *BANKS]
    chosen = asked.environments or (known if asked.benchmark in ("llm", "router") else ["synthetic", "digits"])
    if unknown := [name for name in chosen if name not in known]:
        raise InvalidArgumentError(
            f"--environments must be among {known} for benchmark {asked.benchmark}; got {unknown}"
        )
    return chosen


def _run(asked: argparse.Namespace, command: str) -> Results:
    names = environments(asked)
    plan = Plan(
        asked.benchmark,
        [name for name in names if name != "static"],
        asked.gates or list(GATES),
        range(asked.first_seed, asked.first_seed + asked.seeds),
        asked.experts,
        asked.queries,
        asked.ablation,
        asked.batch,
        asked.delay,
        _knobs(asked.knobs),
    )
    kept = records.Resumed(asked.out, _about(command))
    static = range(asked.first_seed, asked.first_seed + (asked.seeds if "static" in names else 0))
    total = sum(1 for _ in cases_of(plan)) + len(static)
    with progress(total, asked.quiet) as advance:

        def report(new: list[Record]) -> None:
            kept.add(new)
            advance()

        done = kept.done
        for seed in static:
            report(play_static(seed, done))
        run(plan, done, report)
    return kept.results(asked.benchmark)


def _latency(asked: argparse.Namespace, command: str) -> Results:
    found: list[Record] = []
    seeds = range(asked.first_seed, asked.first_seed + asked.seeds)
    with progress(len(seeds) * latency.parts(), asked.quiet) as advance:
        for seed in seeds:
            found += latency.measure(seed, advance=advance)
    results = Results(found, _about(command))
    if asked.out:
        records.write(results, asked.out)
    return results


def _router(asked: argparse.Namespace, command: str) -> Results:
    names, seeds = environments(asked), range(asked.first_seed, asked.first_seed + asked.seeds)
    kept = records.Resumed(asked.out, _about(command))
    done = kept.done
    with progress(len(names) * len(seeds) * (1 + len(router.POLICIES)) - len(done), asked.quiet) as advance:
        for new in router.measure(names, seeds, done):
            kept.add(new)
            advance()
    return kept.results(asked.benchmark)


def _audit(asked: argparse.Namespace, command: str) -> Results:
    from moe_posterior.benchmarks.routing import audit, horizon

    seeds = range(asked.first_seed, asked.first_seed + asked.seeds)
    found: list[Record] = []
    if asked.horizon:
        with progress(len(seeds), asked.quiet) as advance:
            for seed in seeds:
                found += horizon.measure(seed)
                advance()
    else:
        with progress(audit.parts(len(seeds)), asked.quiet) as advance:
            found += audit.measure(seeds, advance=advance)
    results = Results(found, _about(command))
    if asked.out:
        records.write(results, asked.out)
    return results


def _about(command: str) -> dict[str, Any]:
    return {
        "command": command,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processors": os.cpu_count(),
    }


def _knobs(path: str | None) -> dict[str, dict[str, dict[str, Any]]] | None:
    if path is None:
        return None
    if not Path(path).is_file():
        raise MissingDataError(f"there is no {path}; make one with: moe-posterior benchmark a --tune 20 --knobs {path}")
    found = read_json(path)
    with decoding(path, "a file of knobs", "make one with --tune"):
        return {
            environment: {gate: dict(knobs) for gate, knobs in entry["knobs"].items()}
            for environment, entry in found.items()
        }


def _tune(asked: argparse.Namespace) -> int:
    gates = asked.gates or list(GATES)
    path = asked.knobs or str(TUNED)
    names = asked.environments or ["synthetic"]
    total = len(names) * sum(len(list(tune.candidates(gate, asked.tune))) for gate in gates)
    with progress(total, asked.quiet) as advance:
        for environment in names:
            for gate in gates:
                found = tune.tune(
                    [gate],
                    asked.tune,
                    environment=environment,
                    queries=asked.queries,
                    report=lambda name, value: advance(),
                )
                tune.write_knobs(found, path, environment)
    print(f"knobs: {terminal(path)}")
    return 0


@contextmanager
def progress(total: int, quiet: bool) -> Iterator[Callable[[], None]]:
    """A progress bar on standard error, removed at the end."""
    if quiet:
        yield lambda: None
        return
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError as error:
        raise MissingDependencyError("rich", "train") from error
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("runs", total=total)
        yield lambda: bar.advance(task)
