"""Who is credibly better: the one decision that every rendering of a report marks, in both directions and for every metric.

A difference is credible where the paired interval excludes 0 and Holm's correction for the comparisons of its family agrees. It is
marked on both sides: the better of the two carries
:data:`BETTER`, and an arm that is worse than the baseline carries :data:`WORSE`. So a loss shows even where no win does.
"""

from collections.abc import Mapping
from typing import Any

from moe_posterior.report.places import ALL_SHIFTS
from moe_posterior.report.schema import Report

HIGHER_IS_BETTER = frozenset({"accuracy"})  # of every other metric less is better
BETTER, WORSE = "better", "worse"
WORSE_SIGN = "†"
RISK = 0.05  # of any false mark in a family of comparisons, both directions together
MEANING = f"{WORSE_SIGN}: worse than the baseline"

Key = tuple[Any, ...]  # arm, shift, severity, subset, metric


def key_of(record: Mapping[str, Any]) -> Key:
    """What a record or a pair is about."""
    return tuple(record[name] for name in ("arm", "shift", "severity", "subset", "metric"))


def verdict(pair: Mapping[str, Any]) -> str | None:
    """Whether a pair's arm is credibly better or worse than the baseline; None where the data do not say.

    >>> verdict({"metric": "ece", "low": -0.03, "high": -0.01}), verdict({"metric": "accuracy", "low": -0.03, "high": -0.01})
    ('better', 'worse')
    >>> verdict({"metric": "ece", "low": 0.0, "high": 0.01}), verdict({"metric": "ece", "low": None, "high": None})
    (None, None)
    """
    low, high = pair.get("low"), pair.get("high")
    if low is None or high is None or low <= 0 <= high or (pair.get("p_holm") or 0.0) > RISK:
        return None
    return BETTER if (low > 0) == (pair["metric"] in HIGHER_IS_BETTER) else WORSE


def marks_of(report: Report) -> dict[Key, str]:
    """The mark of every record that has one.

    An arm is better or worse than the baseline; the baseline is better where every other arm is worse.

    >>> pair = {"arm": "b", "shift": "clean", "severity": 0, "subset": "overall", "metric": "nll", "low": 0.1, "high": 0.2}
    >>> found = marks_of({"arms": ["a", "b"], "baseline": "a", "paired": [pair]})
    >>> {key[0]: mark for key, mark in found.items()}
    {'b': 'worse', 'a': 'better'}
    """
    found: dict[Key, str] = {}
    beaten: dict[Key, int] = {}
    for pair in report.get("paired") or []:
        key, mark = key_of(pair), verdict(pair)
        if mark is not None:
            found[key] = mark
        if mark == WORSE:
            own = (report.get("baseline"), *key[1:])
            beaten[own] = beaten.get(own, 0) + 1
    others = len(report.get("arms") or []) - 1
    return found | {key: BETTER for key, count in beaten.items() if count == others}


def where_of(report: Report) -> str:
    """When a difference is marked, and of how many comparisons that is one.

    >>> print(where_of({"paired": [{"severity": 0, "comparisons": 8}]}))
    where the paired 95 % interval of the difference excludes 0, also after Holm's correction for the 8 comparisons of the main table
    """
    plain = "where the paired 95 % interval of the difference excludes 0"
    pairs = report.get("paired") or []
    main = next((pair["comparisons"] for pair in pairs if pair.get("comparisons") and is_main(pair)), None)
    rest = next((pair["comparisons"] for pair in pairs if pair.get("comparisons") and not is_main(pair)), None)
    if main is None and rest is None:
        return plain
    families = [f"the {main:,} comparisons of the main table"] if main else []
    families += [f"the {rest:,} of all further places"] if rest else []
    return f"{plain}, also after Holm's correction for {' and for '.join(families)}"


def is_main(record: Mapping[str, Any]) -> bool:
    """Whether a record stands in the main table: the stored test rows, or the mean of all shifted sets."""
    return record["severity"] == 0 or (record.get("shift"), record["severity"]) == (ALL_SHIFTS, None)
