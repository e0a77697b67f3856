"""Names of evaluations: which sets they hold, of which shifts and severities, and how many rows.

The stored test rows are the set of severity 0. They are called "clean" where they are distributed as the training rows, and by the
name of their shift where the data say that they are not. A mean over sets and a pool of their predictions are different numbers, so
each is called by what it holds; no two share the word "shifted".
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moe_posterior.report.schema import Report
from moe_posterior.results.tables import Cell

CLEAN = "clean"
ALL_SHIFTS = "all shifts"

Place = tuple[str, int | None]  # shift, severity; None: the mean over severities


def judged_of(report: Report) -> str:
    """What the confidences are of: a mixture's aggregate where the report holds its routing, else any model's predictions.

    >>> judged_of({"configurations": [{}]}), judged_of({})
    ('the routed aggregate', 'the predictions')
    """
    return "the routed aggregate" if report.get("configurations") else "the predictions"


def base_of(report: Report) -> str:
    """The name of the stored test rows; "clean" where the report holds no records."""
    return next((one["shift"] for one in report.get("records") or [] if one["severity"] == 0), CLEAN)


def sets_of(report: Report) -> list[tuple[str, int]]:
    """The shifted sets behind the report's records, in their order."""
    found = [
        (one["shift"], one["severity"])
        for one in report.get("records") or []
        if one["shift"] != ALL_SHIFTS and one["severity"]
    ]
    return list(dict.fromkeys(found))


def pool_name(sets: Sequence[tuple[str, int]]) -> str:
    """The name of the predictions on several sets taken together.

    >>> pool_name([("fog", 3), ("fog", 4), ("rain", 3), ("rain", 4)]), pool_name([("fog", 3)])
    ('4 sets pooled (2 shifts, severities 3–4)', 'fog, severity 3')
    """
    return f"{len(sets)} sets pooled ({_spread(sets)})" if len(sets) > 1 else "{}, severity {}".format(*sets[0])


def place_name(sets: Sequence[tuple[str, int]], shift: str, severity: int | None) -> str:
    """The name of a record's place, given all shifted sets: a set, or the mean over those that it averages.

    >>> sets = [("fog", 1), ("fog", 2), ("rain", 1), ("rain", 2)]
    >>> place_name(sets, "all shifts", None), place_name(sets, "fog", None)
    ('mean of 4 sets (2 shifts, severities 1–2)', 'fog, mean of severities 1–2')
    >>> place_name(sets, "all shifts", 2), place_name(sets, "fog", 2), place_name(sets, "clean", 0)
    ('mean of 2 shifts, severity 2', 'fog, severity 2', 'clean')
    """
    members = members_of(sets, shift, severity)
    if not members:
        return shift
    if len(members) == 1:
        return pool_name(members)
    if shift != ALL_SHIFTS:
        return f"{shift}, mean of {severities_text(one for _, one in members)}"
    if severity is not None:
        return f"mean of {_count(members)}, severity {severity}"
    return f"mean of {len(members)} sets ({_spread(members)})"


def members_of(sets: Sequence[tuple[str, int]], shift: str, severity: int | None) -> list[tuple[str, int]]:
    """The shifted sets that a record's value is of, or the mean over."""
    return [one for one in sets if shift in (ALL_SHIFTS, one[0]) and severity in (None, one[1])]


def size(n: int, sets: int) -> Cell:
    """How many predictions there are, and of how many rows where several sets hold the same ones.

    >>> size(629, 1).text, size(12580, 20).text, size(13, 2).text
    ('629', '20 × 629', '13')
    """
    return Cell(f"{sets} × {n // sets:,}" if sets > 1 and n % sets == 0 else f"{n:,}", n)


def _spread(sets: Sequence[tuple[str, int]]) -> str:
    return f"{_count(sets)}, {severities_text(severity for _, severity in sets)}"


def _count(sets: Sequence[tuple[str, int]]) -> str:
    shifts = len({shift for shift, _ in sets})
    return f"{shifts} shift{'s' * (shifts > 1)}"


def severities_text(values: Iterable[int]) -> str:
    """``severities 1–5``, or each where they are no run.

    >>> severities_text([3, 1, 2]), severities_text([1, 4]), severities_text([2])
    ('severities 1–3', 'severities 1, 4', 'severity 2')
    """
    found = sorted(set(values))
    if len(found) == 1:
        return f"severity {found[0]}"
    run = found == list(range(found[0], found[-1] + 1))
    return "severities " + (f"{found[0]}–{found[-1]}" if run else ", ".join(map(str, found)))


def ece_text(curve: Mapping[str, Any]) -> str:
    """The calibration error of a reliability curve: debiased, and what its bins show plainly beside what noise would.

    >>> ece_text({"ece": 0.05, "debiased": 0.031, "floor": 0.024}), ece_text({"ece": 0.05})
    ('0.031; plain 0.050, noise floor 0.024', '0.050')
    """
    if curve.get("debiased") is None or curve.get("floor") is None:
        return f"{curve['ece']:.3f}"
    return f"{curve['debiased']:.3f}; plain {curve['ece']:.3f}, noise floor {curve['floor']:.3f}"
