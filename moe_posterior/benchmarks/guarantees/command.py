"""``moe-posterior benchmark guarantees``: measure every promise on stored predictions, or render what an earlier run wrote."""

import argparse
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from moe_posterior.benchmarks import records
from moe_posterior.benchmarks.guarantees import drift, sets, thresholds
from moe_posterior.benchmarks.guarantees.predictions import Predictions, find, read
from moe_posterior.benchmarks.guarantees.tables import tables
from moe_posterior.benchmarks.guarantees.thresholds import Row
from moe_posterior.benchmarks.records import Record, Results
from moe_posterior.benchmarks.show import show
from moe_posterior.checks.validation import count, number
from moe_posterior.commands.guarantees import parser
from moe_posterior.errors import InvalidArgumentError

LEVEL = 0.1  # of the streams


def guarantees(arguments: Sequence[str], about: dict[str, object], progress: Callable[..., object]) -> int:
    """Run ``moe-posterior benchmark guarantees`` with these arguments; 0 on success.

    Args:
        arguments: those after ``guarantees``.
        about: versions and the like, for the records.
        progress: a bar of so many steps.

    Raises:
        MoEPosteriorError: a wrong argument, missing data or a missing package; the message says what to do.
    """
    asked = parser().parse_args(list(arguments))
    if asked.source is not None:
        results = records.read(asked.source)
        found = [record for record in results.records if record.benchmark == "guarantees"]
        if not found:
            raise InvalidArgumentError(f"{asked.source} must hold records of benchmark 'guarantees'; it has none")
        return show(asked, results, tables(found), None, signed=True)
    if asked.predictions is None:
        raise InvalidArgumentError("--predictions must name a folder, or --from a file of records")
    count("--resamples", asked.resamples, least=5)
    number("--delta", asked.delta, above=0.0, below=1.0)
    for level in asked.levels:
        number("--levels", level, above=0.0, below=1.0)
    about = {**about, "command": shlex.join(["moe-posterior", "benchmark", "guarantees", *arguments])}
    kept = records.Resumed(asked.out, about)
    done = {(record.environment, record.gate) for record in kept.records}
    _measure_all(asked, find(asked.predictions, asked.files), kept, done, progress)
    return show(asked, Results(kept.records, about), tables(kept.records), None, signed=True)


def _measure_all(
    asked: argparse.Namespace,
    paths: list[Path],
    kept: records.Resumed,
    done: set[tuple[str, str]],
    progress: Callable[..., object],
) -> None:
    with progress(len(paths), asked.quiet) as advance:  # type: ignore[attr-defined]
        for path in paths:
            found = read(path)
            if (found.name, found.gate) not in done:
                kept.add([record for row in _measured(found, asked) for record in _records(found, row, asked)])
            advance()


def _measured(found: Predictions, asked: argparse.Namespace) -> Iterator[Row]:
    parts, tenth = found.parts, max(1, asked.resamples // 10)
    if "test" in parts:
        for row in thresholds.measure(parts["test"], asked.levels, asked.delta, asked.resamples, asked.seed):
            yield {"what": "threshold", **row}
        ids = parts["test"].configuration
        if ids is not None and len(ids.unique()) > 1:
            for row in thresholds.measure_groups(parts["test"], asked.levels, asked.delta, tenth, asked.seed):
                yield {"what": "groups", **row}
        for row in sets.measure(parts["test"], tenth, asked.seed):
            yield {"what": "sets", **row}
    for other in sorted(parts.keys() - {"val"}) if "val" in parts else ():
        row = drift.measure(parts["val"], parts[other], LEVEL, asked.delta, tenth, asked.seed)
        yield {"what": "stream", "policy": "online", "part": other, **row}
        yield {"what": "sets", "part": other, **sets.measure_shift(parts["val"], parts[other])}


OPTIONS = ("what", "policy", "level", "rows", "part")


def _records(found: Predictions, row: Row, asked: argparse.Namespace) -> Iterator[Record]:
    options = {name: row[name] for name in OPTIONS if name in row}
    for metric, value in row.items():
        if metric not in OPTIONS:
            yield Record("guarantees", found.name, found.gate, options, asked.seed, metric, value)
