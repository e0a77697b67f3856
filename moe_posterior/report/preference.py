"""Which of several arms to prefer: by the Brier score, which counts accuracy and calibration together, where the rows say so."""

from collections.abc import Mapping, Sequence
from typing import Any

from moe_posterior.report.marks import BETTER, WORSE, is_main, verdict
from moe_posterior.report.places import place_name, sets_of
from moe_posterior.report.schema import OVERALL
from moe_posterior.results.tables import estimate, show

__all__ = ["preference_of"]

Pairs = dict[str, list[Mapping[str, Any]]]


def preference_of(report: Mapping[str, Any]) -> tuple[str | None, str]:
    """The arm to prefer and why; no arm where none is credibly better, and no reason with a single arm.

    An arm is preferred where its Brier score is credibly lower than the baseline's on the stored test rows or on the mean of all
    shifted sets, and credibly higher on neither.

    >>> pair = {"arm": "b", "shift": "clean", "severity": 0, "subset": "overall", "metric": "brier"}
    >>> pair |= {"value": -0.02, "low": -0.03, "high": -0.01}
    >>> preference_of({"arms": ["a", "b"], "baseline": "a", "paired": [pair]})
    ('b', 'Prefer b: its Brier score is lower than that of a by 0.020 [0.010, 0.030] on clean.')
    """
    arms, baseline = list(report.get("arms") or []), report.get("baseline")
    if len(arms) < 2 or baseline is None:
        return None, ""
    found: Pairs = {arm: [] for arm in arms if arm != baseline}
    for pair in report.get("paired") or []:
        if pair["metric"] == "brier" and pair["subset"] == OVERALL and is_main(pair) and pair["arm"] in found:
            found[pair["arm"]].append(pair)
    marks = {arm: {verdict(pair) for pair in pairs} for arm, pairs in found.items()}
    better = [arm for arm, own in marks.items() if BETTER in own and WORSE not in own]
    worse = [arm for arm, own in marks.items() if WORSE in own and BETTER not in own]
    if len(better) == 1:
        return better[0], f"Prefer {better[0]}: {_reason(report, found, better, BETTER)}."
    if better:
        return None, f"Prefer {' or '.join(better)} to {baseline}; between them the report does not decide."
    if len(worse) == len(found):
        return baseline, f"Prefer {baseline}: {_reason(report, found, worse, WORSE)}."
    return None, "No arm is to be preferred: none has a credibly lower Brier score than all others."


def _reason(report: Mapping[str, Any], found: Pairs, arms: Sequence[str], mark: str) -> str:
    """By how much the preferred arm's score is lower, than the baseline's or than that of each other arm."""
    sets, parts = sets_of(report), []  # type: ignore[arg-type]
    for arm in arms:
        places = []
        for pair in found[arm]:
            if verdict(pair) == mark:
                ends = (pair["value"], pair["low"], pair["high"])
                by = ends if mark == WORSE else (-ends[0], -ends[2], -ends[1])
                the = "the " if pair["severity"] is None else ""
                places.append(f"{show(estimate(*by))} on {the}{place_name(sets, pair['shift'], pair['severity'])}")
        parts.append(f"than that of {report['baseline'] if mark == BETTER else arm} by {' and '.join(places)}")
    return f"its Brier score is lower {'; '.join(parts)}"
