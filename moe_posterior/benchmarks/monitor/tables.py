"""The tables of the monitor's benchmark."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from moe_posterior.benchmarks.cells import text_table
from moe_posterior.benchmarks.monitor.measure import DETECTORS, EXACT, GLOBAL
from moe_posterior.benchmarks.records import Record, case_key, select
from moe_posterior.metrics import wilson_interval
from moe_posterior.results.intervals import median_interval
from moe_posterior.results.tables import DASH, Table

NOTE = (
    "early: share of streams with an alarm before the drift. found: share of the others with one after it. delay: rows from the drift "
    "to the first alarm, median over the streams without an early alarm, 95 % interval; ∞: none within the stream. relative: mean "
    "delay over that of the global test with the same tolerance, on the streams where neither is early, with a paired bootstrap "
    "95 % interval; no alarm counts as the rest of the stream, which favours the slower one. named: share of first alarms naming a "
    "configuration that name one whose gap did change by more than 4 points."
)
TITLES = {
    "friedman local": "FriedmanDrift, 18 % of the inputs at once (local)",
    "friedman lea": "FriedmanDrift, 1.6 %, then 5 %, then 18 % of the inputs (lea)",
    "friedman gra": "FriedmanDrift, everywhere at once (gra)",
    "friedman gsg": "FriedmanDrift, everywhere over 500 rows (gsg)",
    "pacs one configuration": "PACS, one configuration changes its domain",
    "pacs all rows": "PACS, all rows change their domain",
}


def tables_of(records: Iterable[Record]) -> list[Table]:
    """One table of false alarms, one per kind of drift."""
    records = list(records)
    calm = select(records, environment="no drift")
    drifts = {title: own for name, title in TITLES.items() if (own := select(records, environment=name))}
    tables = [_false(calm)] if calm else []
    for place, (title, own) in enumerate(drifts.items()):
        tables.append(_delays(title, own, NOTE if place == len(drifts) - 1 else ""))
    return tables


def _false(records: list[Record]) -> Table:
    rows = []
    for null, length in dict.fromkeys((record.options["null"], record.options["rows"]) for record in records):
        for detector in DETECTORS:
            own = [record for record in records if (record.options["null"], record.options["rows"]) == (null, length)]
            fired = list(_figures(own, detector, "fired").values())
            if fired:
                rows.append((detector, null, f"{length:,}", f"{len(fired):,}", _share(fired)))
    note = (
        "Share of runs with any alarm, read after every row, Wilson 95 % interval; 16 configurations of unequal size."
    )
    return text_table("False alarms", ("detector", "truth", "rows", "runs", "fired"), rows, note)


def _delays(title: str, records: list[Record], note: str) -> Table:
    rows = []
    for detector in DETECTORS:
        early, delay = (_figures(records, detector, name) for name in ("early", "delay"))
        late = [delay.get(key, math.inf) for key, fired in early.items() if not fired]
        named = list(_figures(records, detector, "named").values())
        rows.append(
            (
                detector,
                _share(list(early.values())),
                _share([float(math.isfinite(value)) for value in late]),
                _median(late),
                _relative(records, detector),
                f"{np.mean(named):.2f} of {len(named)}" if named else DASH,
            )
        )
    streams = len(_figures(records, DETECTORS[0], "early"))
    columns = ("detector", "early", "found", "delay", "relative", "named")
    return text_table(f"{title}: {streams} streams", columns, rows, note)


def _figures(records: list[Record], detector: str, metric: str) -> dict[str, float]:
    """By run; without those that have no such figure."""
    found = {}
    for record in select(records, gate=detector, metric=metric):
        if isinstance(record.value, int | float):
            found[case_key("", "", "", record.options, record.seed)] = float(record.value)
    return found


def _median(delays: Sequence[float]) -> str:
    if not delays:
        return DASH
    return "{} ({}, {})".format(*(f"{value:,.0f}" if value < math.inf else "∞" for value in median_interval(delays)))


def _relative(records: list[Record], detector: str) -> str:
    base = GLOBAL + EXACT if detector.endswith(EXACT) else GLOBAL
    if detector == base:
        return DASH
    windows, early, delays = (
        [_figures(records, one, metric) for one in (detector, base)] for metric in ("window", "early", "delay")
    )
    both = [key for key in windows[0] if not (early[0][key] or early[1][key])]
    if not both:
        return DASH
    first, second = (np.array([delay.get(key, windows[0][key]) for key in both]) for delay in delays)
    drawn = np.random.default_rng(0).integers(len(both), size=(2000, len(both)))
    low, high = np.quantile(first[drawn].mean(1) / second[drawn].mean(1), [0.025, 0.975])
    return f"{first.mean() / second.mean():.2f} ({low:.2f}, {high:.2f})"


def _share(values: Sequence[float]) -> str:
    if not values:
        return DASH
    low, high = wilson_interval(torch.tensor(sum(values)), torch.tensor(float(len(values))))
    return f"{np.mean(values):.3f} ({float(low):.3f}, {float(high):.3f})"
