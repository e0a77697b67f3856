"""The tables of a report as plain columns and rows, read by the web page and the model card alike.

Each function takes the report and returns a table, or None where the run did not measure what it shows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from moe_posterior.page import Cell, Table, estimate, show
from moe_posterior.training.report import promise
from moe_posterior.training.report.compute import OVERALL, SCHEMA
from moe_posterior.training.report.marks import BETTER, MEANING, WORSE, WORSE_SIGN, Key, key_of, marks_of, where_of
from moe_posterior.training.report.places import ALL_SHIFTS, members_of, place_name, sets_of, size
from moe_posterior.training.report.render import TITLES

SHOWN = ("ece", "accuracy", "nll", "brier")
NOISE = "After an ECE: what noise alone shows, the mean plain ECE of a model that is right as often as these confidences say."
OF_MANY = (
    "The largest of many gaps is large by chance too: the intervals hold for all configurations at once (Bonferroni), and beside them "
    "stands the mean |gap| of a calibrated configuration of the same size."
)
FEW = 30  # predictions, below which a configuration's gap is noise: such rows come last


def rows_of(report: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """The rows of a section; a single row may stand without its list.

    >>> rows_of({"action": {"threshold": 0.8}}, "action"), rows_of({}, "action")
    ([{'threshold': 0.8}], [])
    """
    found = report.get(key) or []
    return [found] if isinstance(found, Mapping) else list(found)


def identity(report: Mapping[str, Any]) -> Table | None:
    """What was evaluated: the report's identity, and its provenance where that is silent."""
    known = identity_values(report)
    rows = [[name, text] for name, text in known.items()]
    return Table(["what", "value"], rows) if rows else None


def identity_values(report: Mapping[str, Any]) -> dict[str, str]:
    """Name -> text of everything known about the model, the data and the run."""
    own, made = report.get("identity") or {}, report.get("provenance") or {}
    experiment = made.get("experiment") or {}
    backbone = _class_name((experiment.get("model") or {}).get("backbone"))
    derived = {
        "routing": own.get("routing") or made.get("gates"),
        "model": own.get("model") or _joined(", ", experiment.get("name"), backbone),
        "data": own.get("data") or made.get("data"),
        "seed": own.get("seed", experiment.get("seed_everything")),
        "software": own.get("versions") or made.get("versions"),
        "machine": own.get("machine") or made.get("machine"),
        "date": own.get("date"),
        "command": own.get("command") or made.get("command"),
    }
    found: dict[str, str] = {}
    for name, value in derived.items():
        if isinstance(value, Mapping) and name in ("routing", "data"):
            found |= {f"{name}: {part}": str(text) for part, text in value.items() if text is not None}
        elif isinstance(value, Mapping):
            found[name] = ", ".join(f"{part} {text}" for part, text in value.items())
        elif value is not None and value != "":
            found[name] = str(value)
    return found


def metric_settings(report: Mapping[str, Any]) -> str | None:
    """How calibration was measured, as a sentence."""
    settings = report.get("metric")
    if not settings and report.get("schema") == SCHEMA and "n_bins" in report:
        settings = {"name": "top-label ECE", "binning": "equal width", "n_bins": report["n_bins"], "norm": "l1"}
        settings["debiased"] = True
    if not settings:
        return None
    parts = [str(settings[key]) for key in ("name", "binning") if settings.get(key)]
    parts += [f"{settings['n_bins']} bins"] if settings.get("n_bins") else []
    parts += [f"norm {settings['norm']}"] if settings.get("norm") else []
    if settings.get("debiased") is not None:
        parts.append("debiased" if settings["debiased"] else "not debiased")
    return ", ".join(parts) or None


def main_rows(report: Mapping[str, Any]) -> Table | None:
    """The stored test rows and the mean of all shifted sets for every subset, one line per arm; no column for the severity."""
    records = {key_of(record): record for record in report.get("records") or []}
    places = list(dict.fromkeys(key[1:4] for key in records))
    shown = [one for one in places if one[1] == 0 or one[:2] == (ALL_SHIFTS, None)]
    rows = [[row[0], *row[2:]] for row in _metric_rows(report, records, shown)]
    columns = _metric_columns(report)
    return Table([columns[0], *columns[2:]], rows) if rows else None


def marked(report: Mapping[str, Any]) -> str:
    """What the marks in the tables mean, in this report."""
    marks = f"Bold: better; {MEANING}; {where_of(report)}."
    return f"{marks} {NOISE}" if any(one.get("floor") is not None for one in report.get("records") or []) else marks


def every_row(report: Mapping[str, Any], most: int = 2000) -> Table | None:
    """Every shift, severity, subset and arm; the first ``most`` of them."""
    records = {key_of(record): record for record in report.get("records") or []}
    places = list(dict.fromkeys(key[1:4] for key in records))
    rows = list(_metric_rows(report, records, places))
    caption = f"The first {most:,} of {len(rows):,} rows; all are in report.json." if len(rows) > most else ""
    return Table(_metric_columns(report), rows[:most], caption) if rows else None


def shifts(report: Mapping[str, Any]) -> Table | None:
    """The scenarios that the model was evaluated under."""
    listed = report.get("shifts")
    if not listed:
        listed = _shifts_of_records(report.get("records") or [])
    rows = [
        [one.get("name"), _joined(", ", *(one.get("severities") or [])) or None, one.get("n"), one.get("description")]
        for one in listed
    ]
    return _without_empty_columns(Table(["scenario", "severities", "predictions per arm", "description"], rows))


def pools(report: Mapping[str, Any]) -> Table | None:
    """What the names of evaluations stand for that hold several sets."""
    rows = [
        [
            one.get("name"),
            one.get("holds"),
            _joined(", ", *(one.get("shifts") or [])),
            _joined(", ", *(one.get("severities") or [])),
            size(one.get("n") or 0, one.get("sets") or 1),
        ]
        for one in rows_of(report, "pools")
    ]
    columns = ["evaluation", "is", "shifts", "severities", "predictions per arm (sets × rows)"]
    return _without_empty_columns(Table(columns, rows))


def subgroups(report: Mapping[str, Any]) -> Table | None:
    """Accuracy and ECE of each subgroup; the worst is marked."""
    rows = [
        [
            one.get("arm"),
            Cell(f"{one.get('group')} ({worst(one)})", str(one.get("group")), strong=not one.get("within_noise"))
            if one.get("worst")
            else one.get("group"),
            one.get("n"),
            one.get("accuracy"),
            _above_noise(
                estimate(
                    one.get("ece"), *_interval(one), strong=bool(one.get("worst")) and not one.get("within_noise")
                ),
                one,
            ),
        ]
        for one in rows_of(report, "subgroups")
    ]
    return _without_empty_columns(Table(["arm", "group", "n", "accuracy", "ECE"], rows))


def worst(one: Mapping[str, Any]) -> str:
    """What to call the subgroup with the largest ECE: the worst, if it is beyond noise.

    >>> worst({"arm": "softmax"}), worst({"within_noise": True})
    ('worst of softmax', 'largest, within noise')
    """
    return f"{'largest' if one.get('within_noise') else 'worst'}{of_arm(one)}" + (
        ", within noise" if one.get("within_noise") else ""
    )


def of_arm(one: Mapping[str, Any]) -> str:
    """``" of ARM"``, where a row says whose it is."""
    return f" of {one['arm']}" if one.get("arm") else ""


def configurations(report: Mapping[str, Any], most: int = 300) -> Table | None:
    """Routing configurations, the largest gap between confidence and accuracy first, those with few predictions last."""
    found = sorted(
        rows_of(report, "configurations"), key=lambda one: ((one.get("n") or 0) < FEW, -abs(gap(one) or 0.0))
    )
    rows = [
        [
            one.get("arm"),
            one.get("panel"),
            one.get("cluster"),
            ", ".join(str(expert) for expert in one.get("experts") or []),
            one.get("n"),
            one.get("accuracy"),
            one.get("confidence"),
            estimate(gap(one), *_interval(one)),
            one.get("floor"),
        ]
        for one in found[:most]
    ]
    caption = (
        f"The first {most:,} of {len(found):,} configurations; all are in report.json." if len(found) > most else ""
    )
    if any(one.get("floor") is not None for one in found):
        caption = f"{caption} {OF_MANY}".strip()
    columns = ["arm", "evaluation", "cluster", "experts", "n", "accuracy", "confidence", "gap (confidence − accuracy)"]
    columns.append("|gap| of noise alone")
    return _without_empty_columns(Table(columns, rows, caption))


def gap(one: Mapping[str, Any]) -> float | None:
    """Confidence minus accuracy: positive where the configuration is over-confident."""
    if one.get("gap") is not None:
        return one["gap"]
    confidence, accuracy = one.get("confidence"), one.get("accuracy")
    return None if confidence is None or accuracy is None else confidence - accuracy


def shared_confidence(report: Mapping[str, Any]) -> Table | None:
    """How many inputs display a confidence that another configuration displays too."""
    rows = [
        [
            one.get("arm"),
            one.get("panel"),
            one.get("decimals"),
            one.get("n"),
            one.get("shared"),
            percent(one["shared"] / one["n"]) if one.get("n") and one.get("shared") is not None else None,
            one.get("widest_gap"),
        ]
        for one in rows_of(report, "shared_confidence")
    ]
    columns = [
        "arm",
        "evaluation",
        "decimals displayed",
        "inputs",
        "sharing a confidence across configurations",
        "share",
    ]
    return _without_empty_columns(Table([*columns, "widest difference in accuracy"], rows))


def calibrators(report: Mapping[str, Any]) -> Table | None:
    """What each post-processing of the confidences reached."""
    rows = [
        [
            one.get("arm"),
            one.get("panel"),
            one.get("name"),
            _above_noise(estimate(one.get("ece"), *_interval(one)), one),
            one.get("nll"),
            one.get("accuracy"),
        ]
        for one in rows_of(report, "calibrators")
    ]
    return _without_empty_columns(Table(["arm", "evaluation", "calibrator", "ECE", "NLL", "accuracy"], rows))


def action(report: Mapping[str, Any], *, whole: bool = False) -> Table | None:
    """The confidence above which the system acts, and whether its promise held; ``whole`` leaves out a shift's single severities."""
    found = rows_of(report, "action")
    rows = [
        [
            one.get("arm"),
            promise.place(one),
            Cell(text, text, strong=promise.verdict(one) == promise.FAILED),
            estimate(one.get("risk"), *_interval(one)),
            one.get("max_risk"),
            one.get("coverage"),
            one.get("threshold"),
            one.get("acted"),
        ]
        for one in (promise.summary(found) if whole else found)
        for text in [promise.verdict_text(one)]
    ]
    columns = ["arm", "evaluation", "promise", "risk (share wrong)", "risk promised", "coverage (share acted on)"]
    return _without_empty_columns(Table([*columns, "act from confidence", "acted on"], rows))


def percent(share: float) -> Cell:
    """A share in [0, 1] as per cent, sorting by its value."""
    return Cell(f"{100 * share:.1f} %", share)


def _metric_columns(report: Mapping[str, Any]) -> list[str]:
    titles = [TITLES[metric] for metric in SHOWN]
    return ["evaluation", "severity", "subset", "n", "arm", titles[0], *_difference_titles(report), *titles[1:]]


def _difference_titles(report: Mapping[str, Any]) -> list[str]:
    return [f"ECE − ECE of {report['baseline']}"] if report.get("paired") and report.get("baseline") else []


def _metric_rows(report: Mapping[str, Any], records: Mapping[Key, Mapping], places: Sequence[tuple]) -> Iterator[list]:
    """A row per place (shift, severity, subset) and arm, marked as :mod:`~moe_posterior.training.report.marks` decides."""
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
            difference = [paired.get(keys["ece"], {}) for _ in _difference_titles(report)]
            cells[0] = _above_noise(cells[0], found["ece"])
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


def _above_noise(cell: Cell, one: Mapping[str, Any]) -> Cell:
    """The cell with the noise floor after its interval, where that is known."""
    floor = one.get("floor")
    return cell if floor is None else replace(cell, more=f"{cell.more} noise {show(floor)}".strip())


def _shifts_of_records(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        if record["subset"] != OVERALL or record["shift"] == ALL_SHIFTS:
            continue
        one = found.setdefault(record["shift"], {"name": record["shift"], "severities": [], "n": record["n"]})
        if record["severity"] is None:
            one["n"] = record["n"]
        elif record["severity"] and record["severity"] not in one["severities"]:
            one["severities"].append(record["severity"])
    return list(found.values())


def _interval(one: Mapping[str, Any]) -> tuple[float | None, float | None]:
    low, high = one.get("interval") or (None, None)
    return low, high


def _without_empty_columns(content: Table) -> Table | None:
    """Columns in which some row says something; None without rows."""
    kept = [i for i in range(len(content.columns)) if any(show(row[i]) not in ("", "–") for row in content.rows)]
    if not kept:
        return None
    rows = [[row[i] for i in kept] for row in content.rows]
    return Table([content.columns[i] for i in kept], rows, content.caption)


def _joined(separator: str, *parts: object) -> str:
    return separator.join(str(part) for part in parts if part not in (None, ""))


def _class_name(settings: object) -> str | None:
    return settings.get("class_path") if isinstance(settings, Mapping) else None
