"""Tables of what was evaluated: the model and its data, the metric's settings, the shifts and the pools of evaluation sets."""

from collections.abc import Mapping, Sequence
from typing import Any

from moe_posterior.report.places import ALL_SHIFTS, size
from moe_posterior.report.schema import OVERALL, READABLE, Report
from moe_posterior.report.tables.cells import joined, rows_of, without_empty_columns
from moe_posterior.results.tables import Table

__all__ = ["identity", "identity_values", "metric_settings", "pools", "shifts"]


def identity(report: Report) -> Table | None:
    """What was evaluated: the report's identity, and its provenance where that is silent."""
    known = identity_values(report)
    rows = [[name, text] for name, text in known.items()]
    return Table(["what", "value"], rows) if rows else None


def identity_values(report: Report) -> dict[str, str]:
    """Name -> text of everything known about the model, the data and the run."""
    own, made = report.get("identity") or {}, report.get("provenance") or {}
    about = report.get("about") or {}
    experiment = made.get("experiment") or {}
    backbone = _class_name((experiment.get("model") or {}).get("backbone"))
    derived = {
        "routing": own.get("routing") or made.get("gates"),
        "model": own.get("model") or joined(", ", experiment.get("name"), backbone),
        "data": own.get("data") or made.get("data"),
        "seed": own.get("seed", experiment.get("seed_everything")),
        "software": own.get("versions") or made.get("versions"),
        "machine": own.get("machine") or made.get("machine"),
        "date": own.get("date"),
        "command": own.get("command") or made.get("command"),
        "intended use": about.get("intended_use"),
        "contact": about.get("contact"),
        "task": about.get("task"),
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


def metric_settings(report: Report) -> str | None:
    """How calibration was measured, as a sentence."""
    settings = report.get("metric")
    if not settings and report.get("schema") in READABLE and "n_bins" in report:
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


def shifts(report: Report) -> Table | None:
    """The scenarios that the model was evaluated under."""
    known = report.get("shifts")
    listed: Sequence[Mapping[str, Any]] = _shifts_of_records(report.get("records") or []) if known is None else known
    rows = [
        [one.get("name"), joined(", ", *(one.get("severities") or [])) or None, one.get("n"), one.get("description")]
        for one in listed
    ]
    content = Table(["scenario", "severities", "predictions per arm", "description"], rows)
    return without_empty_columns(content) if rows else None


def pools(report: Report) -> Table | None:
    """What the names of evaluations stand for that hold several sets."""
    rows = [
        [
            one.get("name"),
            one.get("holds"),
            joined(", ", *(one.get("shifts") or [])),
            joined(", ", *(one.get("severities") or [])),
            size(one.get("n") or 0, one.get("sets") or 1),
        ]
        for one in rows_of(report, "pools")
    ]
    columns = ["evaluation", "is", "shifts", "severities", "predictions per arm (sets × rows)"]
    return without_empty_columns(Table(columns, rows))


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


def _class_name(settings: object) -> str | None:
    return settings.get("class_path") if isinstance(settings, Mapping) else None
