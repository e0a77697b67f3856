"""Whether the promise of an action threshold was kept: "at most so many wrong among the answers acted on", per arm and evaluation.

The threshold is proven on validation rows, for rows like them (:mod:`~moe_posterior.report.guarantee`). The system will be used
elsewhere too, so it is judged on the stored test rows and under every shift. One function, :func:`verdict`, decides; every
rendering reads it.

Dimensions: n rows of an evaluation set.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_posterior.guarantees import GuaranteedThreshold
from moe_posterior.metrics import selective_risk
from moe_posterior.report.copies import share_of_copies
from moe_posterior.report.places import severities_text

HELD, FAILED, IDLE = "held", "failed", "nothing acted on"
ROUNDING = 1e-12  # a share of equal counts may round up


class Scored(NamedTuple):
    """What an arm said of one evaluation set, as far as acting on it goes; row i is the same example in all sets of one size."""

    shift: str
    severity: int  # 0: the stored test rows
    confidence: Tensor  # (n,)
    correct: Tensor  # (n,)


def promise_rows(arm: str, chosen: GuaranteedThreshold, sets: Iterable[Scored]) -> list[dict[str, Any]]:
    """The rows of a report's ``action``: one per set, and one per shift over its severities where there are several.

    A shift fails as a whole where it fails at any severity, whatever its pooled risk; ``failed_at`` names those. Intervals are 95 %
    Wilson intervals. Copies of one row under several severities are no independent rows: the pooled interval takes as many as
    their spread over rows is worth.
    """
    by_shift: dict[str, list[Scored]] = {}
    for one in sets:
        by_shift.setdefault(one.shift, []).append(one)
    rows = []
    for shift, members in by_shift.items():
        own = [_row(arm, shift, one.severity, [one], chosen) for one in members]
        if len(members) > 1:
            whole = _row(arm, shift, None, members, chosen)
            whole["severities"] = sorted(one.severity for one in members)
            whole["failed_at"] = [one["severity"] for one in own if one["verdict"] == FAILED]
            rows.append({**whole, "verdict": verdict(whole)})
        rows += own
    return rows


def verdict(row: Mapping[str, Any]) -> str | None:
    """Whether a row keeps its promise; None where it says none.

    >>> verdict({"risk": 0.05, "max_risk": 0.1}), verdict({"risk": 0.12, "max_risk": 0.1}), verdict({"risk": 0.12})
    ('held', 'failed', None)
    >>> verdict({"risk": None, "max_risk": 0.1}), verdict({"risk": 0.08, "max_risk": 0.1, "failed_at": [5]})
    ('nothing acted on', 'failed')
    """
    promised, risk = row.get("max_risk"), row.get("risk")
    if promised is None:
        return None
    if row.get("failed_at") or (risk is not None and risk > promised + ROUNDING):
        return FAILED
    return IDLE if risk is None else HELD


def overall(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The verdict on all rows together: failed where one failed, held where one held and none failed.

    >>> overall([{"risk": 0.05, "max_risk": 0.1}, {"risk": 0.12, "max_risk": 0.1}]), overall([])
    ('failed', None)
    """
    found = {verdict(row) for row in rows}
    return next((one for one in (FAILED, HELD, IDLE) if one in found), None)


def summary(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows to read first: the stored test rows and each shift as a whole, without its single severities."""
    whole = {(row.get("arm"), row.get("shift")) for row in rows if row.get("severities")}
    return [row for row in rows if row.get("severities") or (row.get("arm"), row.get("shift")) not in whole]


def place(row: Mapping[str, Any]) -> str:
    """Where a row was measured.

    >>> place({"shift": "fog", "severity": None, "severities": [1, 2, 3]}), place({"shift": "fog", "severity": 2}), place({})
    ('fog, severities 1–3 pooled', 'fog, severity 2', '')
    """
    shift, severity = row.get("shift") or row.get("panel") or "", row.get("severity")
    if row.get("severities"):
        return f"{shift}, {severities_text(row['severities'])} pooled"
    return f"{shift}, severity {severity}" if severity else str(shift)


def verdict_text(row: Mapping[str, Any]) -> str:
    """The verdict, and for a whole shift where it failed.

    >>> verdict_text({"risk": 0.2, "max_risk": 0.1, "severities": [1, 2, 3], "failed_at": [2, 3]})
    'failed at severities 2–3'
    """
    found, where = verdict(row), row.get("failed_at")
    if found == FAILED and where and len(where) < len(row.get("severities") or []):
        return f"{FAILED} at {severities_text(where)}"
    return found or ""


def sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    """The promise, and in how many evaluations it was held and failed; empty where there was none.

    >>> sentence([{"arm": "a", "shift": "clean", "risk": 0.05, "max_risk": 0.1, "interval": [0.03, 0.12]}])
    'Promised: at most 0.100 wrong among the answers acted on. Held in 1 of 1 (in 1 of these the interval reaches above the promise).'
    """
    judged = [row for row in summary(rows) if verdict(row) is not None]
    if not judged:
        return ""
    found = [verdict(row) for row in judged]
    promised = ", ".join(f"{value:.3f}" for value in dict.fromkeys(row["max_risk"] for row in judged))
    parts = [f"{word} in {found.count(word)} of {len(judged)}" for word in (FAILED, HELD, IDLE) if word in found]
    unsure = sum(verdict(row) == HELD and (row.get("interval") or [0, 0])[1] > row["max_risk"] for row in judged)
    doubt = f" (in {unsure} of these the interval reaches above the promise)" if unsure else ""
    text = "; ".join(part + (doubt if part.startswith(HELD) else "") for part in parts)
    certain = {likely(row) for row in judged}
    certainly = certain.pop() if len(certain) == 1 else ""
    return f"Promised: at most {promised} wrong among the answers acted on{certainly}. {text[0].upper()}{text[1:]}."


def likely(row: Mapping[str, Any]) -> str:
    """With which probability a promise holds, as a clause; empty in a report that does not say.

    >>> likely({"error_probability": 0.1}), likely({})
    (', with probability 90 %', '')
    """
    known = row.get("error_probability")
    return "" if known is None else f", with probability {100 * (1 - known):.3g} %"


def _row(
    arm: str, shift: str, severity: int | None, members: Sequence[Scored], chosen: GuaranteedThreshold
) -> dict[str, Any]:
    confidence, correct = (torch.cat([getattr(one, name) for one in members]) for name in ("confidence", "correct"))
    measured = selective_risk(confidence, correct, chosen.threshold)
    acted = int((confidence >= chosen.threshold).sum())
    row = {
        "arm": arm,
        "shift": shift,
        "severity": severity,
        "sets": len(members),
        "n": len(confidence),
        "acted": acted,
        "threshold": chosen.threshold,
        "risk": measured.risk if acted else None,
        "interval": _interval(members, chosen.threshold) if acted else None,
        "coverage": measured.coverage,
        "max_risk": chosen.max_risk,
        "error_probability": chosen.error_probability,
    }
    return {**row, "verdict": verdict(row)}


def _interval(members: Sequence[Scored], threshold: float) -> list[float]:
    """Wilson interval of the risk at as many independent answers as the acted ones are worth."""
    wrong = torch.cat([(1 - one.correct.double()) * (one.confidence >= threshold) for one in members])
    acted = torch.cat([(one.confidence >= threshold).double() for one in members])
    sizes = sorted({len(one.confidence) for one in members})  # only sets of one size hold the same rows
    rows = torch.cat(
        [torch.arange(len(one.confidence)) + sum(s for s in sizes if s < len(one.confidence)) for one in members]
    )
    return share_of_copies(wrong, acted, rows)
