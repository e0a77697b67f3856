"""The tables of the promises, from records."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from moe_posterior.benchmarks.cells import text_table
from moe_posterior.benchmarks.guarantees.drift import SHOWN
from moe_posterior.benchmarks.guarantees.sets import ERROR_RATE, TILT
from moe_posterior.benchmarks.records import Record
from moe_posterior.results.tables import DASH, Table

Case = dict[str, Any]


def tables(records: Iterable[Record]) -> list[Table]:
    """All tables that the records fill."""
    cases: dict[str, Case] = {}
    for record in records:
        case = cases.setdefault(record.case, {"name": record.environment, "gate": record.gate, **record.options})
        case[record.metric] = record.value
    of = {
        what: [case for case in cases.values() if case["what"] == what]
        for what in ("threshold", "groups", "stream", "sets")
    }
    made = [
        _thresholds(of["threshold"]),
        _groups(of["groups"]),
        _streams(of["stream"]),
        _times(of["stream"]),
        *_sets(of["sets"]),
    ]
    return [table for table in made if table.rows]


def _thresholds(cases: Sequence[Case]) -> Table:
    rows = []
    for key, of in _together(cases, ("name", "gate", "level", "rows")):
        promised, empirical = of["promised"], of["empirical"]
        lost = empirical["coverage"] - promised["coverage"]
        fixed = of.get("temperature, then 1 − α")
        rows.append(
            (
                *_key(key),
                f"{key[3]:,}",
                _share(promised["violations"]),
                _share(empirical["violations"]),
                _points(promised["coverage"]),
                _points(empirical["coverage"]),
                _points(lost),
                f"{_share(fixed['violations'])} at {_points(fixed['coverage'])}" if fixed else DASH,
                f"{of['act on everything']['risk']:.3f}",
            )
        )
    columns = (
        *("population", "gate", "α", "calibration rows", "level broken", "empirical: broken", "coverage", "empirical"),
        *("lost", "temperature + 1 − α: broken at coverage", "risk of everything"),
    )
    note = (
        "Share of resamples whose threshold has a true risk above α; coverage in percent of the population, mean over resamples. "
        "Lost: points of coverage against the empirical threshold. Levels that acting on everything keeps are left out."
    )
    return text_table("A promised threshold", columns, rows, note)


def _groups(cases: Sequence[Case]) -> Table:
    rows = []
    for key, of in _together(cases, ("name", "gate", "level")):
        one, each = of["one threshold"], of["per configuration"]
        rows.append(
            (
                *_key(key),
                f"{each['parts']:.1f}",
                _share(one["violations"]),
                _share(each["violations"]),
                _points(one["coverage"]),
                _points(each["coverage"]),
            )
        )
    columns = (
        "population",
        "gate",
        "α",
        "parts",
        "one threshold: broken in a part",
        "per part: broken",
        "coverage",
        "per part",
    )
    return text_table(
        "Thresholds per routing configuration", columns, rows, "Broken: in at least one part the true risk is above α."
    )


def _streams(cases: Sequence[Case]) -> Table:
    rows = [
        (
            *_key((case["name"], case["gate"], case["level"])),
            case["part"],
            _points(case["promised_coverage"]),
            _points(case["quiet_coverage"]),
            _share(case["false_alarms"]),
            f"{case['static_risk']:.3f}",
            _share(case["static_bad"]),
            _outcomes(case["delay"]),
            _outcomes(case["delay_90"]),
            f"{case['holds_after']:,}",
            _points(case["possible"]),
        )
        for case in cases
    ]
    columns = (
        *(
            "calibrated on val of",
            "gate",
            "α",
            "served",
            "coverage before",
            "online",
            "false alarms",
            "risk if kept",
            "broken if kept",
        ),
        *("outcomes to the alarm: median", "90 %", "level holds again after", "possible coverage"),
    )
    note = (
        "False alarms: streams with one in 400 outcomes before the shift. If kept: the promised threshold under the shift. The level "
        "holds again from the outcome on after which at most δ of the streams act at a threshold whose true risk is above α. "
        "Possible: the largest coverage on the served rows that keeps α."
    )
    return text_table("A promise under a shift, watched while outcomes arrive", columns, rows, note)


def _times(cases: Sequence[Case]) -> Table:
    rows = [
        (
            case["name"],
            case["gate"],
            case["part"],
            *(
                f"{_share(bad)} / {_points(coverage)}"
                for bad, coverage in zip(case["bad"], case["coverage"], strict=True)
            ),
        )
        for case in cases
    ]
    columns = ("calibrated on val of", "gate", "served", *(f"{shown:,}" for shown in SHOWN))
    note = "Share of streams whose threshold has a true risk above α / mean coverage in percent, by outcomes since the shift."
    return text_table("Online threshold by outcomes since the shift", columns, rows, note)


def _sets(cases: Sequence[Case]) -> Iterator[Table]:
    plain = [case for case in cases if case["policy"] not in ("tilted", "under the shift")]
    names = ("held", "worst_class", "worst_configuration")
    rows = [
        (case["name"], case["gate"], case["policy"], *(_share(case[name]) for name in names), f"{case['size']:.2f}")
        for case in plain
    ]
    columns = ("population", "gate", "sets", "hold the right class", "worst class", "worst configuration", "mean size")
    yield text_table(
        f"Prediction sets, ε = {ERROR_RATE}",
        columns,
        rows,
        "Worst: of the classes and configurations with at least 100 rows.",
    )
    tilted = [
        (case["name"], case["gate"], _share(case["plain"]), _share(case["weighted"]))
        for case in cases
        if case["policy"] == "tilted"
    ]
    note = f"Rows are drawn in proportion to e^({TILT:g} · confidence): more doubtful ones than before."
    yield text_table("Sets under a known covariate shift", ("population", "gate", "plain", "weighted"), tilted, note)
    served = [
        (case["name"], case["gate"], case["part"], _share(case["held"]), f"{case['size']:.2f}")
        for case in cases
        if case["policy"] == "under the shift"
    ]
    of_served = ("calibrated on val of", "gate", "served", "hold the right class", "mean size")
    yield text_table(
        "Sets under a shift that nobody knows", of_served, served, f"LAC; promised without a shift: {1 - ERROR_RATE}."
    )


def _together(cases: Sequence[Case], names: Sequence[str]) -> Iterator[tuple[tuple[Any, ...], dict[str, Case]]]:
    """Cases with the same key, by policy."""
    found: dict[tuple[Any, ...], dict[str, Case]] = {}
    for case in cases:
        found.setdefault(tuple(case[name] for name in names), {})[case["policy"]] = case
    yield from found.items()


def _key(key: Sequence[Any]) -> tuple[str, str, str]:
    return key[0], key[1], f"{key[2]:g}"


def _share(value: float | None) -> str:
    return DASH if value is None else f"{value:.3f}"


def _points(value: float) -> str:
    return f"{100 * value:.1f}"


def _outcomes(value: float | None) -> str:
    return DASH if value is None else f"{value:,.0f}"
