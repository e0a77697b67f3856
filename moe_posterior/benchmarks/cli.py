"""``moe-posterior benchmark``: run a benchmark, or render what an earlier run wrote."""

import argparse
import json
import os
import platform
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from moe_posterior.atomic import write_text
from moe_posterior.benchmarks import latency, records, render, tune
from moe_posterior.benchmarks.banks import BANKS
from moe_posterior.benchmarks.llm import STREAMS
from moe_posterior.benchmarks.records import Record, Results
from moe_posterior.benchmarks.registry import GATES, TUNED
from moe_posterior.benchmarks.static import play_static
from moe_posterior.benchmarks.suite import Plan, cases_of, run
from moe_posterior.benchmarks.tables import Table, tables_of
from moe_posterior.errors import InvalidArgumentError, MissingDataError, MissingDependencyError
from moe_posterior.escape import terminal

EXAMPLES = """
examples:
  moe-posterior benchmark b                                 tables on the terminal, about a minute
  moe-posterior benchmark b --out b.json                    and the records; run it again to go on where it stopped
  moe-posterior benchmark b --from b.json --markdown b.md --figures figures/
                                                            render again, nothing is run
  moe-posterior benchmark c --environments synthetic pacs --gates posterior softmax --seeds 3
  moe-posterior benchmark c --ablation --out ablation.json  one option of the belief changed at a time
  moe-posterior benchmark a --tune 20 --knobs knobs.json    search all gates' knobs on validation seeds, then stop
  moe-posterior benchmark audit --horizon                   how soon a reader of the audit log sees the failure of benchmark B
  moe-posterior benchmark llm                               nine real language models, static and as streams

a    a stable pool of equally competent experts: robustness must cost nothing
b    one of 16 experts fails on 60 % of the query classes, without a trace in what the gates see
c    after half of the stream the queries come from classes that no gate has seen
llm  which of nine language models should answer: static, with the best one failing midway, with a change of tasks
lm   gates swapped into a small language model of its own, experts damaged and repaired; see: moe-posterior benchmark lm --help
latency  how long a decision takes: one at a time, and when queries arrive at 1,000 to 100,000 a second; wants an idle machine
audit    what the audit log costs, how fast it is written, verified and replayed; wants an idle machine

synthetic         Gaussian queries and a known competence matrix
digits            classifiers trained on scikit-learn's digits under transforms
pacs, cifar10h    the same on PACS and CIFAR-10, from $MOE_POSTERIOR_DATA or ../shared/data
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="moe-posterior benchmark",
        description="Measure gates on streams of queries with bandit feedback: one decision at a time, one outcome back.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("benchmark", choices=("a", "b", "c", "llm", "lm", "latency", "audit"), help="which; see below")
    made.add_argument("--seeds", type=int, metavar="S", help="how many seeds (default 5; audit --horizon 20)")
    made.add_argument("--first-seed", type=int, default=0, metavar="S", help="start the seeds there (default 0)")
    made.add_argument("--out", metavar="FILE.json", help="write tidy records; what it already holds is not run again")
    made.add_argument("--from", dest="source", metavar="FILE.json", help="render these records, run nothing")
    made.add_argument("--markdown", metavar="FILE.md", help="write the tables as Markdown too")
    made.add_argument("--figures", metavar="FOLDER", help="draw figures into this folder")
    made.add_argument("--environments", nargs="+", metavar="NAME", help="default: synthetic digits; for llm: all three")
    made.add_argument(
        "--gates", nargs="+", metavar="NAME", choices=sorted(GATES), help=f"default: all of {', '.join(GATES)}"
    )
    made.add_argument("--experts", type=int, default=16, metavar="E", help="size of the pool, 8 to 32 in the paper")
    made.add_argument("--queries", type=int, default=1000, metavar="T", help="length of the stream (default 1000)")
    made.add_argument("--batch", type=int, default=1, metavar="B", help="queries decided together (default 1)")
    made.add_argument("--delay", type=int, default=0, metavar="N", help="batches until an outcome arrives (default 0)")
    made.add_argument(
        "--ablation", action="store_true", help="also run the posterior gate with one option changed at a time"
    )
    made.add_argument("--tune", type=int, metavar="N", help="try N configurations of every gate, store the best, stop")
    made.add_argument(
        "--knobs", metavar="FILE.json", help="knobs to use, or to write with --tune (default: the shipped ones)"
    )
    made.add_argument(
        "--horizon", action="store_true", help="of audit: how soon the log shows a failing expert, not how fast it is"
    )
    made.add_argument("--quiet", action="store_true", help="no progress bar")
    return made


def benchmark(arguments: Sequence[str]) -> int:
    """Run ``moe-posterior benchmark`` with these arguments; 0 on success.

    Raises:
        MoEPosteriorError: a mistake in what was asked, absent data or packages; the message says what to do.
    """
    if list(arguments[:1]) == ["lm"]:  # has options of its own, and needs transformers
        from moe_posterior.benchmarks.lm.command import lm

        return lm(list(arguments[1:]), _about(""))
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
        return show(asked, Results(found, results.about))
    for name in ("seeds", "experts", "queries", "batch"):
        if getattr(asked, name) < 1:
            raise InvalidArgumentError(f"--{name} must be at least 1; got {getattr(asked, name)}")
    if asked.tune is not None:
        return _tune(asked)
    if asked.benchmark == "latency":
        return show(asked, _latency(asked, command))
    if asked.benchmark == "audit":
        return show(asked, _audit(asked, command))
    return show(asked, _run(asked, command))


def show(asked: argparse.Namespace, results: Results) -> int:
    """Print tables and the reproducing command; write Markdown and figures where asked."""
    tables = _tables(asked.benchmark, results.records)
    render.print_tables(tables)
    if asked.markdown:
        write_text(asked.markdown, render.to_markdown(tables))
        print(f"tables: {terminal(asked.markdown)}")
    if asked.figures and asked.benchmark not in ("latency", "audit"):
        for path in render.draw(results.records, asked.figures):
            print(f"figure: {terminal(path)}")
    about = results.about
    print(terminal(f"torch {about.get('torch')}, Python {about.get('python')}, {about.get('processors')} processors"))
    print(f"again:  {terminal(about.get('command'))}")
    return 0


def _tables(benchmark: str, records: list[Record]) -> list[Table]:
    if benchmark == "latency":
        return latency.tables(records)
    if benchmark == "audit":
        from moe_posterior.benchmarks import audit, horizon

        soon = [record for record in records if record.environment == horizon.ENVIRONMENT]
        fast = [record for record in records if record.environment != horizon.ENVIRONMENT]
        return (horizon.tables(soon) if soon else []) + (audit.tables(fast) if fast else [])
    return tables_of(records)


def environments(asked: argparse.Namespace) -> list[str]:
    """The environments asked for, checked.

    Raises:
        InvalidArgumentError: one that the benchmark does not have.
    """
    known = ["static", *STREAMS] if asked.benchmark == "llm" else ["synthetic", *BANKS]
    chosen = asked.environments or (known if asked.benchmark == "llm" else ["synthetic", "digits"])
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
    kept = records.read(asked.out).records if asked.out and Path(asked.out).is_file() else []
    found, done = list(kept), {record.case for record in kept}
    about = _about(command)
    if asked.out:
        records.write(Results(found, about), asked.out)  # an unwritable place is found out before the work
    static = range(asked.first_seed, asked.first_seed + (asked.seeds if "static" in names else 0))
    total = sum(1 for _ in cases_of(plan)) + len(static)
    with progress(total, asked.quiet) as advance:

        def report(new: list[Record]) -> None:
            found.extend(new)
            advance()
            if asked.out and new:
                records.write(Results(found, about), asked.out)

        for seed in static:
            report(play_static(seed, done))
        run(plan, done, report)
    return Results([record for record in found if record.benchmark == asked.benchmark], about)


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


def _audit(asked: argparse.Namespace, command: str) -> Results:
    from moe_posterior.benchmarks import audit, horizon

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
    found = json.loads(Path(path).read_text())
    return {environment: entry["knobs"] for environment, entry in found.items()}


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
    """A bar on the standard error, gone when done."""
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
