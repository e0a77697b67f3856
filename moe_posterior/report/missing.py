"""What a report leaves out, by name, because the predictions do not hold what it takes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moe_posterior.prediction import Prediction
from moe_posterior.report.schema import LeftOut, Report

__all__ = ["left_out", "left_out_lines"]

ROUTING = "no routing weights: configurations not measured"


def left_out(
    base: Mapping[str, Prediction],  # by arm: the stored test rows
    validation: Mapping[str, Prediction],  # by arm
    fitted: Mapping[str, Mapping[str, Any]],  # by arm, then name
    grouped: bool,
) -> list[LeftOut]:
    """The sections that some arm is missing, each once where all arms miss it."""
    found: dict[tuple[str, str], list[str]] = {}
    for arm, judged in base.items():
        for section, reason in _missing(judged, validation.get(arm), fitted.get(arm) or {}, grouped):
            found.setdefault((section, reason), []).append(arm)
    return [
        {"section": section, "reason": reason}
        if len(arms) == len(base)
        else {"arm": arm, "section": section, "reason": reason}
        for (section, reason), arms in found.items()
        for arm in (arms if len(arms) < len(base) else arms[:1])
    ]


def left_out_lines(report: Report) -> list[str]:
    """What the report leaves out, a line each.

    >>> left_out_lines({"left_out": [{"section": "subgroups", "reason": "no groups"}, {"arm": "b", "section": "x", "reason": "y"}]})
    ['subgroups (no groups)', 'x of b (y)']
    """
    found: Sequence[Mapping[str, Any]] = report.get("left_out") or []
    return [
        f"{' of '.join(str(one[key]) for key in ('section', 'arm') if one.get(key))} ({one['reason']})" for one in found
    ]


def _missing(
    judged: Prediction, validation: Prediction | None, fitted: Mapping[str, Any], grouped: bool
) -> Iterator[tuple[str, str]]:
    routed = judged.configuration is not None
    if not grouped and not judged.subsets:
        yield "subgroups", "no groups given"
    if not routed:
        yield "routing configurations", ROUTING
    if validation is None:
        yield "calibrators", "no calibration rows"
        yield "action threshold", "no calibration rows"
        return
    if not judged.classes:
        yield "calibrators", "only confidences given: they need the probability of every class"
        return
    if "temperature per expert" not in fitted:
        missing = "probabilities of each expert" if judged.expert_probs is None else "routing weights"
        yield "temperature per expert", f"no {missing}"
    if not routed:
        yield "calibration per configuration", "no routing weights"
