"""What each detector does on a stream, as records: whether it fires before the drift, how long after it, and whom it names."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from moe_posterior.benchmarks.monitor.rivals import adwin, page_hinkley, pit_monitor, transformed
from moe_posterior.benchmarks.monitor.streams import (
    PACS_ARMS,
    PACS_DOMAINS,
    Answers,
    Stream,
    calibrated,
    friedman,
    pacs,
)
from moe_posterior.benchmarks.records import Record
from moe_posterior.monitoring import Alarm, CalibrationMonitor

BENCHMARK = "monitor"
OURS, GLOBAL = "per configuration", "global"
EXACT = ", tolerance 0"
DETECTORS = (OURS, GLOBAL, OURS + EXACT, GLOBAL + EXACT, "PITMonitor", "ADWIN", "Page-Hinkley")
CALM, EDGE = "calibrated, tolerance 0", "2 points off, tolerance .02"
NULLS = {CALM: (0.0, 0.0), EDGE: (0.02, 0.02)}  # true gap, tolerance
LONG = 1_000_000
RIVAL_ROWS = 100_000
PART = 65_536


def first_alarm(detector: str, stream: Stream, seed: int) -> tuple[int | None, int | None]:
    """Row of the first alarm and the configuration that it names, None where there is none."""
    rng = np.random.default_rng([seed, DETECTORS.index(detector)])
    answers = stream.answers
    if detector in DETECTORS[:4]:
        found = _first(_monitor(detector, stream.reference), answers, grouped=detector.startswith(OURS))
        return (None, None) if found is None else (found.row, found.configuration)
    if detector == "PITMonitor":
        return pit_monitor(transformed(answers.confidence, answers.correct, rng), rng), None
    test: Callable[..., int | None] = adwin if detector == "ADWIN" else page_hinkley
    return test(answers.confidence - answers.correct), None


def of_friedman(scenario: str, seed: int) -> Iterator[Record]:
    """All detectors on one FriedmanDrift stream."""
    yield from _of(friedman(scenario, seed), f"friedman {scenario}", {}, seed)


def of_pacs(folder: Path, seed: int, *, whole: bool) -> Iterator[Record]:
    """All detectors on one stream per PACS domain and kind of mixture, where a configuration drifts."""
    for domain in PACS_DOMAINS:
        for arm in PACS_ARMS:
            stream = pacs(folder, domain, arm, seed, whole=whole)
            if stream.moved:
                yield from _of(
                    stream,
                    f"pacs {'all rows' if whole else 'one configuration'}",
                    {"domain": domain, "mixture": arm},
                    seed,
                )


def of_nothing(null: str, detector: str, seed: int, rows: int = LONG) -> Iterator[Record]:
    """Whether the monitor fires within ``rows`` rows on which its null holds, read after each of them."""
    gap, tolerance = NULLS[null]
    rng = np.random.default_rng([seed, int(1000 * gap)])
    monitor = CalibrationMonitor(tolerance=tolerance)
    for start in range(0, rows, PART):
        answers = calibrated(min(PART, rows - start), gap, rng)
        if monitor.update(*answers[: 3 if detector == OURS else 2]):
            break
    yield Record(
        BENCHMARK, "no drift", detector, {"null": null, "rows": rows}, seed, "fired", float(bool(monitor.alarms))
    )


def of_rivals(seed: int, rows: int = RIVAL_ROWS) -> Iterator[Record]:
    """Whether each rival fires within ``rows`` rows of a calibrated model."""
    answers = calibrated(rows, 0.0, np.random.default_rng([seed, 1]))
    stream = Stream(answers, answers.at(slice(0)), rows, frozenset())
    for detector in DETECTORS[4:]:
        fired = first_alarm(detector, stream, seed)[0] is not None
        options = {"null": "calibrated", "rows": rows}
        yield Record(BENCHMARK, "no drift", detector, options, seed, "fired", float(fired))


def _monitor(detector: str, reference: Answers) -> CalibrationMonitor:
    monitor = CalibrationMonitor(tolerance=0.0) if detector.endswith(EXACT) else CalibrationMonitor()
    return monitor.set_baseline(*reference[: 3 if detector.startswith(OURS) else 2])


def _first(monitor: CalibrationMonitor, answers: Answers, *, grouped: bool) -> Alarm | None:
    monitor.update(*answers[: 3 if grouped else 2])
    return monitor.alarm


def _of(stream: Stream, environment: str, options: dict[str, str], seed: int) -> Iterator[Record]:
    after = len(stream.answers.correct) - stream.drift
    for detector in DETECTORS:
        row, named = first_alarm(detector, stream, seed)
        early = row is not None and row < stream.drift
        figures: dict[str, float | None] = {
            "early": float(early),
            "delay": None if row is None or early else float(row - stream.drift + 1),
            "window": float(after),
            "named": None if named is None or early else float(named in stream.moved),
        }
        for metric, value in figures.items():
            yield Record(BENCHMARK, environment, detector, options, seed, metric, value)
