"""Tables of accuracy and calibration: a line per evaluation, subset and arm, with marks where arms differ credibly."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from moe_posterior.report.marks import BETTER, MEANING, WORSE, WORSE_SIGN, Key, key_of, marks_of, where_of
from moe_posterior.report.places import ALL_SHIFTS, members_of, place_name, sets_of, size
from moe_posterior.report.schema import OVERALL, TITLES, Report
from moe_posterior.report.tables.cells import above_noise
from moe_posterior.results.tables import Cell, Table, estimate

__all__ = ["every_row", "main_rows", "marked"]

SHOWN = ("ece", "accuracy", "nll", "brier")
NOISE = "After an ECE: what noise alone shows, the mean plain ECE of a model that is right as often as these confidences say."


def main_rows(report: Report) -> Table | None:
    """The stored test rows and the mean of all shifted sets for every subset, one line per arm; no column for the severity."""
    records = {key_of(record): record for record in report.get("records") or []}
    places = list(dict.fromkeys(key[1:4] for key in records))
    shown = [one for one in places if one[1] == 0 or one[:2] == (ALL_SHIFTS, None)]
    rows = [[row[0], *row[2:]] for row in _metric_rows(report, records, shown)]
    columns = _metric_columns(report)
    return Table([columns[0], *columns[2:]], rows) if rows else None


def marked(report: Report) -> str:
    """What the marks in the tables mean, in this report."""
    marks = f"Bold: better; {MEANING}; {where_of(report)}."
    return f"{marks} {NOISE}" if any(one.get("floor") is not None for one in report.get("records") or []) else marks


def every_row(report: Report, most: int = 2000) -> Table | None:
    """Every shift, severity, subset and arm; the first ``most`` of them."""
    records = {key_of(record): record for record in report.get("records") or []}
    places = list(dict.fromkeys(key[1:4] for key in records))
    rows = list(_metric_rows(report, records, places))
    caption = f"The first {most:,} of {len(rows):,} rows; all are in report.json." if len(rows) > most else ""
    return Table(_metric_columns(report), rows[:most], caption) if rows else None


def _metric_columns(report: Report) -> list[str]:
    titles = [TITLES[metric] for metric in SHOWN]
    return ["evaluation", "severity", "subset", "n", "arm", titles[0], *_difference_titles(report), *titles[1:]]


def _difference_titles(report: Report) -> list[str]:
    return [f"ECE − ECE of {report['baseline']}"] if report.get("paired") and report.get("baseline") else []


def _metric_rows(report: Report, records: Mapping[Key, Mapping], places: Sequence[tuple]) -> Iterator[list]:
    """A row per place (shift, severity, subset) and arm, marked as :mod:`~moe_posterior.report.marks` decides."""
    paired = {key_of(record): record for record in report.get("paired") or []}
    marks, sets = marks_of(report), sets_of(report)
    for shift, severity, subset in places:
        for arm in report["arms"]:
            keys = {metric: (arm, shift, severity, subset, metric) for metric in SHOWN}
            if not any(key in records for key in keys.values()):
                continue
            found = {metric: records.get(key, {}) for metric, key in keys.items()}
            cells = [_record_cell(one, marks.get(keys[metric])) for metric, one in found.items()]
            n = size(next(one["n"] for one in found.values() if one), len(members_of(sets, shift, severity)))
            level = "mean" if severity is None else severity or None
            difference: list[Mapping[str, Any]] = [paired.get(keys["ece"], {}) for _ in _difference_titles(report)]
            cells[0] = above_noise(cells[0], found["ece"])
            cells[1:1] = [_record_cell(pair, marks.get(keys["ece"]) if pair else None) for pair in difference]
            yield [
                place_name(sets, shift, severity),
                level,
                "all rows" if subset == OVERALL else subset,
                n,
                arm,
                *cells,
            ]


def _record_cell(record: Mapping[str, Any], mark: str | None) -> Cell:
    cell = estimate(record.get("value"), record.get("low"), record.get("high"), strong=mark == BETTER)
    return replace(cell, more=f"{cell.more} {WORSE_SIGN}".strip()) if mark == WORSE else cell
