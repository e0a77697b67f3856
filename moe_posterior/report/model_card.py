"""A whole model card for the Hugging Face hub: front matter with the results as ``model-index``, then the report's card."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from moe_posterior.escape import markdown
from moe_posterior.report.card import to_card
from moe_posterior.report.marks import is_main
from moe_posterior.report.places import place_name, sets_of
from moe_posterior.report.schema import OVERALL, Report
from moe_posterior.report.tables import identity_values

__all__ = ["model_index", "to_model_card"]

# The hub's names of the metrics; NLL and ECE have none there.
TYPES = {"accuracy": "accuracy", "brier": "brier_score", "nll": "nll", "ece": "ece"}
TASK = "other"  # the hub's name of a task that it does not know
MOST_NAME = 96  # characters of a model's or data set's name; the hub refuses longer ones


def to_model_card(report: Report) -> str:
    """Render a report as a README.md for a model on the hub: YAML front matter with ``model-index``, and the card below it.

    The front matter names what the report measured on the stored test rows and on the mean of all shifted sets. License, language and
    further tags are the user's to add.

    Args:
        report: as for :func:`~moe_posterior.report.html.to_html`. Text in it is quoted, so that no name can add a key.

    >>> print(to_model_card({"arms": ["a"], "about": {"model": "triage"}}).split("## ")[0].strip())
    ---
    library_name: moe-posterior
    tags:
    - mixture-of-experts
    - calibration
    ---
    <BLANKLINE>
    # triage
    """
    found = model_index(report)
    lines = ["---", "library_name: moe-posterior", "tags:", "- mixture-of-experts", "- calibration"]
    if found[0]["results"]:
        lines += ["model-index:", *_block(found)]
    return "\n".join([*lines, "---", "", f"# {markdown(found[0]['name'])}", "", to_card(report)])


def model_index(report: Report) -> list[dict[str, Any]]:
    """The results as the hub's ``model-index``: an entry per evaluation, its metrics by arm; intervals are in the arguments."""
    known, about = identity_values(report), report.get("about") or {}
    data = next(
        (text for name, text in known.items() if name == "data: evaluation" or name == "data"), "evaluation data"
    )
    name = about.get("model") or (report.get("identity") or {}).get("model") or "model"
    first = [
        re.split("[;,]", text)[0].strip() or text for text in (name, data)
    ]  # what follows are checkpoints and numbers of rows
    return [{"name": _short(first[0]), "results": list(_results(report, _short(first[1]), about.get("task") or TASK))}]


def _results(report: Report, data: str, task: str) -> Iterator[dict[str, Any]]:
    sets = sets_of(report)
    by_place: dict[tuple[str, int | None], list[Mapping[str, Any]]] = {}
    for record in report.get("records") or []:
        if record["subset"] == OVERALL and record["value"] is not None and is_main(record):
            by_place.setdefault((record["shift"], record["severity"]), []).append(record)
    for (shift, severity), records in by_place.items():
        place = place_name(sets, shift, severity)
        yield {
            "task": {"type": task, "name": place},
            "dataset": {"name": data, "type": _slug(data), "config": place, "split": "test"},
            "metrics": [_metric(record) for record in records],
        }


def _metric(record: Mapping[str, Any]) -> dict[str, Any]:
    name = f"{record['metric'].upper() if record['metric'] in ('ece', 'nll') else record['metric']}, {record['arm']}"
    found = {"type": TYPES[record["metric"]], "value": round(record["value"], 6), "name": name}
    if record["low"] is not None and record["high"] is not None:
        found["args"] = {"low": round(record["low"], 6), "high": round(record["high"], 6), "level": 0.95}
    return found


def _short(text: str) -> str:
    return text if len(text) <= MOST_NAME else f"{text[: MOST_NAME - 1]}…"


def _slug(text: str) -> str:
    """An id for a data set that the hub may not know."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "data"


def _block(value: Any, indent: int = 0) -> Iterator[str]:
    """Lists and mappings as YAML blocks; every scalar is quoted as JSON, which YAML reads."""
    space = " " * indent
    if isinstance(value, list):
        for item in value:
            first, *rest = _block(item, indent + 2)
            yield f"{space}- {first[indent + 2 :]}"
            yield from rest
        return
    for key, item in value.items():
        if isinstance(item, list | dict) and item:
            yield f"{space}{key}:"
            yield from _block(item, indent if isinstance(item, list) else indent + 2)
        else:
            yield f"{space}{key}: {_quoted(item)}"


def _quoted(value: Any) -> str:
    """A scalar that YAML reads back: JSON, with every character that YAML does not print written as its number."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(one if one.isprintable() else f"\\U{ord(one):08x}" for one in text)
