"""What the tables of a report share: reading a section's rows, and cells with intervals and noise floors."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moe_posterior.results.tables import Cell, Table, show

__all__ = ["above_noise", "interval_of", "joined", "rows_of", "without_empty_columns"]


def rows_of(report: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """The rows of a section; a single row may stand without its list.

    >>> rows_of({"action": {"threshold": 0.8}}, "action"), rows_of({}, "action")
    ([{'threshold': 0.8}], [])
    """
    found = report.get(key) or []
    return [found] if isinstance(found, Mapping) else list(found)


def above_noise(cell: Cell, one: Mapping[str, Any]) -> Cell:
    """The cell with the noise floor after its interval, where that is known."""
    floor = one.get("floor")
    return cell if floor is None else replace(cell, more=f"{cell.more} noise {show(floor)}".strip())


def interval_of(one: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """The ends of a row's interval, None where there is none."""
    low, high = one.get("interval") or (None, None)
    return low, high


def without_empty_columns(content: Table) -> Table | None:
    """The table without columns that are empty in every row; None without rows."""
    kept = [i for i in range(len(content.columns)) if any(show(row[i]) not in ("", "–") for row in content.rows)]
    if not kept:
        return None
    rows = [[row[i] for i in kept] for row in content.rows]
    return Table([content.columns[i] for i in kept], rows, content.note)


def joined(separator: str, *parts: object) -> str:
    """The parts that say something, as one text."""
    return separator.join(str(part) for part in parts if part not in (None, ""))
