"""The study's records as values by seed, and how its tables show them.

A value is one cell's: (setting, seed). Intervals are t intervals over seeds of the mean over settings, so n is the number of seeds.
"""

import math
import re
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from moe_posterior.results.intervals import mean_interval, plus_minus
from moe_posterior.results.tables import DASH, Table

__all__ = [
    "arms_of",
    "by_seed",
    "difference",
    "error_metric",
    "label",
    "name_of",
    "paired",
    "settings_of",
    "shown",
    "table",
    "title",
    "without_zeros",
]

Records = Sequence[Mapping[str, Any]]
Values = dict[int, float]  # seed -> mean over settings


def by_seed(records: Records, settings: Sequence[str] | None = None, **wanted: Any) -> Values:
    """The matching records' values, averaged over settings, for the seeds that have all of them."""
    found: dict[int, dict[str, float]] = {}
    for record in records:
        if all(record[key] == value for key, value in wanted.items()):
            found.setdefault(record["seed"], {})[record["setting"]] = record["value"]
    needed = {setting for values in found.values() for setting in values} if settings is None else set(settings)
    return {
        seed: mean(values[setting] for setting in needed) for seed, values in found.items() if needed <= values.keys()
    }


def paired(ours: Values, other: Values) -> tuple[float, float]:
    """Mean of ours − other over the seeds both have, and half of its 95 % interval.

    >>> paired({1: 0.1, 2: 0.2}, {1: 0.2, 2: 0.3, 3: 0.9})[0]
    -0.1
    """
    differences = [ours[seed] - other[seed] for seed in sorted(ours.keys() & other.keys())]
    if not differences:
        return math.nan, math.nan
    value, half = _interval(differences)
    return round(value, 12), half


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, correctly rounded because means of shares often end in a 5, and half of its 95 % interval."""
    return mean(values), mean_interval(values).half_width


def shown(values: Values) -> str:
    """Mean ± half of the interval, without leading zeros.

    >>> shown({42: 0.25, 43: 0.25})
    '.250 ± .000'
    """
    return without_zeros(plus_minus(*_interval(list(values.values())))) if values else DASH


def difference(ours: Values, other: Values) -> str:
    """Ours − other as :func:`paired`, with its sign; a dash where they share no seed."""
    value, half = paired(ours, other)
    return DASH if math.isnan(value) else without_zeros(plus_minus(value, half, sign="+"))


def without_zeros(text: str) -> str:
    """Numbers below 1 without the zero before the point."""
    return re.sub(r"\b0\.", ".", text)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], note: str) -> Table:
    """A table of the study, its cells left-aligned."""
    return Table(columns, rows, note, title, right=False)


def label(method: str, study: str) -> str:
    """A method as tables name it: where there are no images, FGR filters nothing."""
    return f"{method}, unfiltered" if method.startswith("fgr") and study != "cifar10h" else method


def name_of(study: str) -> str:
    """A data set as tables name it."""
    return {"pacs": "PACS", "comments": "CAD (keyword groups)", "cifar10h": "CIFAR-10H"}[study]


def title(records: Records, what: str) -> str:
    """The data set, what the table shows and the number of seeds."""
    seeds = len({record["seed"] for record in records})
    return f"{name_of(records[0]['study'])}: {what}, {seeds} seed{'s' * (seeds != 1)}"


def arms_of(records: Records) -> list[tuple[str, str]]:
    """The (method, gate) pairs, in the order of the records."""
    return list(dict.fromkeys((record["method"], record["gate"]) for record in records))


def settings_of(records: Records) -> list[str]:
    """The settings, in the order of the records."""
    return list(dict.fromkeys(record["setting"] for record in records))


def error_metric(records: Records) -> str:
    """The debiased error, where it was recorded: plain ones reward sharp confidences."""
    return "ece_debiased" if any(record["metric"] == "ece_debiased" for record in records) else "ece"
