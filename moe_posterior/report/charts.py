"""The figures of a report for its web page: each a drawing a panel, one legend, and the numbers behind it.

Each function takes the report and returns HTML, or "" where the run did not measure what it shows.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from moe_posterior.report.places import ALL_SHIFTS, base_of, ece_text, sets_of, size
from moe_posterior.report.schema import OVERALL, Report
from moe_posterior.report.tables import rows_of
from moe_posterior.results.page import Axis, Series, figure, legend, line_chart, nice_ticks
from moe_posterior.results.tables import Table, estimate

FEW = 10  # predictions in a bin, below which its accuracy is drawn faint
SHARE_TICKS = (0, 0.2, 0.4, 0.6, 0.8, 1)


def reliability(report: Report) -> str:
    """Accuracy against confidence with Wilson intervals, a panel per evaluation and subset, shares of predictions below."""
    curves = [one for one in rows_of(report, "reliability") if one.get("n")]
    if not curves:
        return ""
    arms = list(dict.fromkeys([*(report.get("arms") or []), *(str(one["arm"]) for one in curves)]))
    x_axis = Axis("confidence of the top label", 0, 1, SHARE_TICKS)
    y_axis = Axis("accuracy (share correct)", 0, 1, SHARE_TICKS)
    drawings, rows = [], []
    for number, (place, members) in enumerate(_grouped(curves, ("panel", "subset")).items()):
        title = f"{', '.join(place)} (n = {size(members[0]['n'], members[0].get('sets', 1)).text})"
        errors = "; ".join(f"{one['arm']}: ECE {ece_text(one)}" for one in members if one.get("ece") is not None)
        series = [_bins_series(one, arms.index(str(one["arm"]))) for one in members]
        about = f"Accuracy against confidence in {len(members[0]['bins']['count'])} bins. {errors}."
        drawings.append(
            line_chart(f"reliability-{number}", title, about, series, x_axis, y_axis, diagonal=True, whiskers=True)
        )
        rows += [row for one in members for row in _bin_rows(", ".join(place), one)]
    caption = (
        "Reliability: a calibrated model lies on the diagonal, an over-confident one below it. Whiskers: 95 % Wilson intervals; "
        f"faint: fewer than {FEW} predictions. Strip: share of predictions in each bin, in per cent."
    )
    columns = ["evaluation", "arm", "bin from", "bin to", "n", "confidence", "accuracy"]
    return figure(drawings, caption, legend([(arm, i) for i, arm in enumerate(arms)]), Table(columns, rows))


def severity(report: Report) -> str:
    """Accuracy and ECE of all rows against severity, from the stored test rows to the hardest shift."""
    base = base_of(report)
    wanted: list[Mapping[str, Any]] = [
        one
        for one in report.get("records") or []
        if one["subset"] == OVERALL and one["severity"] is not None and one["shift"] in (base, ALL_SHIFTS)
    ]
    levels = sorted({one["severity"] for one in wanted})
    if len(levels) < 2:
        return ""
    arms = list(report["arms"])
    x_axis = Axis("severity of the shift (0: none)", levels[0], levels[-1], levels)
    drawings, rows = [], []
    for metric, label in (("ece", "ECE"), ("accuracy", "accuracy (share correct)")):
        series = []
        for index, arm in enumerate(arms):
            points = [one for one in wanted if (one["arm"], one["metric"]) == (arm, metric)]
            points.sort(key=lambda one: one["severity"])
            x, y, low, high = ([one[key] for one in points] for key in ("severity", "value", "low", "high"))
            series.append(Series(arm, index, x, y, low, high))
            rows += [[metric, arm, one["severity"], estimate(one["value"], one["low"], one["high"])] for one in points]
        title = {"ece": "ECE, mean over shifts", "accuracy": "Accuracy, mean over shifts"}[metric]
        about = f"{label} against severity, one line per arm, with 95 % intervals."
        drawings.append(
            line_chart(
                f"severity-{metric}",
                title,
                about,
                series,
                x_axis,
                _value_axis(label, series, from_zero=metric == "ece"),
            )
        )
    caption = (
        f"Accuracy and calibration as the shift grows, each point a mean over {len({name for name, _ in sets_of(report)})} shifts; "
        f"severity 0: {base}. Bands: 95 % bootstrap intervals."
    )
    names = legend([(arm, i) for i, arm in enumerate(arms)])
    return figure(drawings, caption, names, Table(["metric", "arm", "severity", "value"], rows))


def risk_coverage(report: Report) -> str:
    """Share of wrong answers against the share acted on, as the threshold falls."""
    caption = "Acting on the most confident answers first: the risk at each coverage. Lower is better."
    axis = ("coverage (share acted on)", "risk (share wrong)")
    return _curves(report, "risk_coverage", axis, caption, x_range=(0, 1))


def rce(report: Report) -> str:
    """Worst calibration error over reweightings of configurations, per calibrator."""
    caption = (
        "RCE(ρ): the largest calibration error under any reweighting of configurations within a KL divergence of ρ. Noise floor: its "
        "mean if the confidences were right, because picking the worst of many gaps picks noise too."
    )
    return _curves(report, "rce", ("ρ (KL divergence, nats)", "calibration error"), caption)


def online(report: Report) -> str:
    """Calibration error against the number of outcomes delivered."""
    caption = "Each prediction is made before its own outcome is delivered (prequential). Lower is better."
    return _curves(report, "online", ("outcomes delivered", "debiased ECE"), caption, log=True)


def _curves(
    report: Report,
    key: str,
    labels: tuple[str, str],
    caption: str,
    *,
    x_range: tuple[float, float] | None = None,
    log: bool = False,
) -> str:
    curves = rows_of(report, key)
    values = [x for one in curves for x in one["x"] if _known(x)]
    if not values:
        return ""
    names = list(dict.fromkeys(str(one["name"]) for one in curves))
    low, high = x_range or (min(0.0, *values, 0.0), max(values))
    ticks = _count_ticks(high) if log else nice_ticks(low, high)
    x_axis = Axis(labels[0], low, high, ticks, log)
    every = [_curve_series(one, names) for one in curves]
    y_axis = _value_axis(labels[1], every)  # shared, so that panels compare
    drawings, rows = [], []
    for number, (place, members) in enumerate(_grouped(curves, ("panel",)).items()):
        series = [_curve_series(one, names) for one in members]
        title = ", ".join(place) or labels[1]
        about = f"{labels[1]} against {labels[0]}: {', '.join(str(one['name']) for one in members)}."
        drawings.append(line_chart(f"{key}-{number}", title, about, series, x_axis, y_axis))
        for one in series:
            rows += [[", ".join(place), one.name, x, _at(one, i)] for i, x in enumerate(one.x)]
    names_legend = legend([(name, i) for i, name in enumerate(names)])
    intervals = " Bands: 95 % intervals." if any(one.low for one in every) else ""
    table = Table(["evaluation", "name", *labels], rows)
    return figure(drawings, caption + intervals, names_legend, table)


def _at(one: Series, index: int) -> object:
    interval = (one.low[index], one.high[index]) if one.low and one.high else ()
    return estimate(one.y[index], *interval)


def _curve_series(one: Mapping[str, Any], names: Sequence[str]) -> Series:
    low, high = one.get("low") or (), one.get("high") or ()
    return Series(str(one["name"]), names.index(str(one["name"])), one["x"], one["y"], low, high)


def _bins_series(curve: Mapping[str, Any], style: int) -> Series:
    bins = curve["bins"]
    counts = bins["count"]
    return Series(
        str(curve["arm"]),
        style,
        bins["confidence"],
        bins["accuracy"],
        bins["low"],
        bins["high"],
        faint=[count < FEW for count in counts],
        bars=[count / curve["n"] for count in counts],
    )


def _bin_rows(place: str, curve: Mapping[str, Any]) -> list[list[object]]:
    columns = [curve["bins"][name] for name in ("lower", "upper", "count", "confidence", "accuracy", "low", "high")]
    return [
        [place, curve["arm"], lower, upper, int(count), confidence, estimate(accuracy, low, high)]
        for lower, upper, count, confidence, accuracy, low, high in zip(*columns, strict=True)
        if count
    ]


def _grouped(
    curves: Sequence[Mapping[str, Any]], keys: Sequence[str]
) -> dict[tuple[str, ...], list[Mapping[str, Any]]]:
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for one in curves:
        groups.setdefault(tuple(str(one[key]) for key in keys if one.get(key)), []).append(one)
    return groups


def _value_axis(label: str, series: Sequence[Series], *, from_zero: bool = True) -> Axis:
    """From 0, or the tenth below the lowest value, to just above the highest value or interval."""
    values = [x for one in series for x in (*one.y, *one.low, *one.high) if x is not None and _known(x)]
    low = 0.0 if from_zero else max(0.0, math.floor(10 * min(values, default=0.0)) / 10)
    high = max(values, default=1.0) or 1.0
    high = 1.0 if 0.75 < high <= 1 else 1.05 * high
    return Axis(label, low, high, nice_ticks(low, high))


def _count_ticks(high: float) -> list[float]:
    """0, then 10, 20, 50, 100, 200, … up to the highest.

    >>> _count_ticks(100)
    [0, 10, 20, 50, 100]
    """
    steps = (factor * 10**power for power in range(1, 10) for factor in (1, 2, 5))
    return [0, *(step for step in steps if step <= high)]


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
