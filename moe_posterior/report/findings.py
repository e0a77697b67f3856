"""What the comparisons of a report come to, in sentences: baselines that beat the model, calibrators that do not beat temperature."""

from collections.abc import Mapping, Sequence
from typing import Any

from moe_posterior.report.baselines import MODEL, TEMPERATURE
from moe_posterior.report.tables.cells import rows_of
from moe_posterior.report.versus import beats
from moe_posterior.results.tables import estimate, show

__all__ = ["baseline_findings", "calibrator_findings", "disagreement_findings"]

TITLES = {"ece": "ECE", "brier": "Brier score", "nll": "NLL"}

Row = Mapping[str, Any]


def baseline_findings(report: Mapping[str, Any]) -> list[str]:
    """A sentence per arm and panel: which trivial baseline credibly beats the model, in what and by how much.

    >>> row = {"arm": "a", "panel": "clean", "name": "constant confidence", "against": "the model", "metric": "ece"}
    >>> baseline_findings({"versus": [row | {"value": -0.05, "low": -0.08, "high": -0.02}]})
    ['On clean, constant confidence beats a: ECE lower by 0.050 [0.020, 0.080].']
    >>> baseline_findings({"versus": [row | {"value": 0.01, "low": -0.08, "high": 0.1}]})
    ['On clean, no trivial baseline credibly beats a.']
    """
    found = []
    for (panel, arm), rows in _families(report, MODEL).items():
        winners: dict[str, list[str]] = {}
        for one in rows:
            if beats(one):
                digits = 3 if abs(one["value"]) >= 0.001 else 5
                by = show(estimate(-one["value"], -one["high"], -one["low"], digits=digits))
                winners.setdefault(one["name"], []).append(f"{TITLES[one['metric']]} lower by {by}")
        found += [f"On {panel}, {name} beats {arm}: {'; '.join(gains)}." for name, gains in winners.items()]
        if not winners:
            found.append(f"On {panel}, no trivial baseline credibly beats {arm}.")
    return found


def calibrator_findings(report: Mapping[str, Any]) -> list[str]:
    """A sentence per arm and panel: whether a fancier calibrator has a credibly lower ECE than temperature scaling.

    >>> row = {"arm": "a", "panel": "fog", "name": "vector", "against": "temperature", "metric": "ece"}
    >>> calibrator_findings({"versus": [row | {"value": 0.004, "low": -0.01, "high": 0.02}]})
    ['On fog, no other calibrator of a beats temperature scaling (ECE): no credible difference: vector 0.004 [−0.010, 0.020].']
    """
    found = []
    for (panel, arm), rows in _families(report, TEMPERATURE).items():
        named: dict[bool | None, list[str]] = {True: [], False: [], None: []}
        for one in rows:
            if one["metric"] == "ece":
                named[beats(one)].append(f"{one['name']} {show(estimate(one['value'], one['low'], one['high']))}")
        words = {True: "better", False: "worse", None: "no credible difference"}
        told = "; ".join(f"{words[key]}: {', '.join(names)}" for key, names in named.items() if names)
        lead = (
            f"calibrators of {arm} beside temperature scaling (ECE)"
            if named[True]
            else f"no other calibrator of {arm} beats temperature scaling (ECE)"
        )
        found.append(f"On {panel}, {lead}: {told}.")
    return found


def disagreement_findings(report: Mapping[str, Any]) -> list[str]:
    """A sentence per arm and panel: whether abstaining where experts disagree leaves less risk than where the confidence is low.

    >>> row = {"arm": "a", "panel": "clean", "difference": 0.02, "interval": [0.01, 0.03]}
    >>> disagreement_findings({"disagreement": [row]})
    ['On clean, for a: abstaining by disagreement is worse than abstaining by confidence \
(difference of the areas under risk and coverage 0.020 [0.010, 0.030]).']
    """
    found = []
    for one in rows_of(report, "disagreement"):
        low, high = one["interval"]
        word = "better than" if high < 0 else "worse than" if low > 0 else "not told apart from"
        area = show(estimate(one["difference"], low, high))
        found.append(
            f"On {one['panel']}, for {one['arm']}: abstaining by disagreement is {word} abstaining by confidence "
            f"(difference of the areas under risk and coverage {area})."
        )
    return found


def _families(report: Mapping[str, Any], against: str) -> dict[tuple[str, str], Sequence[Row]]:
    found: dict[tuple[str, str], list[Row]] = {}
    for one in rows_of(report, "versus"):
        if one["against"] == against:
            found.setdefault((one["panel"], one["arm"]), []).append(one)
    return dict(found)
