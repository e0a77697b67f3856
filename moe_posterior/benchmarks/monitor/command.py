"""``moe-posterior benchmark monitor``."""

import argparse
import shlex
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from moe_posterior.benchmarks import records
from moe_posterior.benchmarks.monitor import measure
from moe_posterior.benchmarks.monitor.streams import FRIEDMAN
from moe_posterior.benchmarks.monitor.tables import tables_of
from moe_posterior.benchmarks.records import Record
from moe_posterior.benchmarks.show import show
from moe_posterior.checks.validation import count
from moe_posterior.errors import InvalidArgumentError

PARTS = ("friedman", "pacs", "calm", "edge", "rivals")
EXAMPLES = """
friedman   river's FriedmanDrift streams; needs river
pacs       a study's predictions on PACS under a change of domain; needs --study FOLDER, as moe-posterior study writes it
calm       false alarms of the monitor with a tolerance of 0 over a million rows of a calibrated model
edge       the same with a tolerance of 2 points on a model that is 2 points off, with and without configurations
rivals     false alarms of the rivals over 100,000 rows; needs river

examples:
  moe-posterior benchmark monitor --parts friedman --seeds 20
  moe-posterior benchmark monitor --parts calm --seeds 200 --out calm.json
"""


def monitor(arguments: Sequence[str], about: dict[str, Any]) -> int:
    """Run ``moe-posterior benchmark monitor`` with these arguments; 0 on success.

    Raises:
        MoEPosteriorError: a wrong argument, missing data or a missing package.
    """
    asked = _parser().parse_args(list(arguments))
    if asked.source is not None:
        results = records.read(asked.source)
        return show(asked, results, tables_of(_own(results.records)), None, signed=True)
    count("--seeds", asked.seeds)
    if "pacs" in asked.parts and asked.study is None:
        raise InvalidArgumentError("--study must name the folder of a study on PACS; got none")
    command = shlex.join(["moe-posterior", "benchmark", "monitor", *arguments])
    kept = records.Resumed(asked.out, {**about, "command": command})
    for key, run in _runs(asked):
        if key not in {_key(record) for record in _own(kept.records)}:
            kept.add(list(run()))
    results = kept.results(measure.BENCHMARK)
    return show(asked, results, tables_of(results.records), None, signed=True)


def _own(found: list[Record]) -> list[Record]:
    return records.select(found, benchmark=measure.BENCHMARK)


def _key(record: Record) -> tuple[object, ...]:
    """Of the run that made a record: one run makes the records of all detectors, except where nothing drifts."""
    null = record.options.get("null")
    return (record.environment, null, record.gate if null in measure.NULLS else None, record.seed)


def _runs(asked: argparse.Namespace) -> Iterator[tuple[tuple[object, ...], Callable[[], Iterator[Record]]]]:
    """Each run's key and what makes its records."""
    calm = {"calm": (measure.CALM, [measure.OURS]), "edge": (measure.EDGE, [measure.OURS, measure.GLOBAL])}
    for seed in range(asked.first_seed, asked.first_seed + asked.seeds):
        if "friedman" in asked.parts:
            for scenario in FRIEDMAN:
                yield (f"friedman {scenario}", None, None, seed), partial(measure.of_friedman, scenario, seed)
        if "pacs" in asked.parts:
            for name, whole in (("pacs one configuration", False), ("pacs all rows", True)):
                yield (name, None, None, seed), partial(measure.of_pacs, asked.study, seed, whole=whole)
        for part, (null, detectors) in calm.items():
            for detector in detectors if part in asked.parts else ():
                yield ("no drift", null, detector, seed), partial(measure.of_nothing, null, detector, seed)
        if "rivals" in asked.parts:
            yield ("no drift", "calibrated", None, seed), partial(measure.of_rivals, seed)


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="moe-posterior benchmark monitor",
        description="Delay and false alarms of the calibration monitor, beside a global test and detectors of others.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--parts", nargs="+", choices=PARTS, default=["friedman"], help="see below (default friedman)")
    made.add_argument("--seeds", type=int, default=20, metavar="S", help="how many seeds (default 20)")
    made.add_argument("--first-seed", type=int, default=0, metavar="S", help="first seed (default 0)")
    made.add_argument("--study", type=Path, metavar="FOLDER", help="a study on PACS")
    made.add_argument("--out", metavar="FILE", help="write the records (.json or .parquet); finished runs are skipped")
    made.add_argument("--from", dest="source", metavar="FILE", help="render these records without running anything")
    made.add_argument("--markdown", metavar="FILE.md", help="also write the tables as Markdown")
    made.set_defaults(figures=None)
    return made
