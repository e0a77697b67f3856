"""The threshold to act from: chosen on calibration rows such that its promise itself is rarely broken, and what is told of it."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from moe_posterior.guarantees import GuaranteedThreshold, select_threshold
from moe_posterior.metrics import action_threshold
from moe_posterior.prediction import Prediction
from moe_posterior.report.evaluation import answers_of
from moe_posterior.report.promise import likely
from moe_posterior.report.schema import Report
from moe_posterior.results.tables import show

__all__ = ["ERROR_PROBABILITY", "chosen_threshold", "guarantee_lines", "guarantee_row"]

ERROR_PROBABILITY = 0.1  # how probable it may be that the calibration rows mislead


def chosen_threshold(validation: Prediction, max_risk: float) -> GuaranteedThreshold:
    """The threshold that calibration rows prove, at a probability of 1 − :data:`ERROR_PROBABILITY`; infinite if they prove none."""
    answers = answers_of(validation)
    return select_threshold(answers.confidence, answers.correct, max_risk, ERROR_PROBABILITY)


def guarantee_row(arm: str, chosen: GuaranteedThreshold, validation: Prediction) -> dict[str, Any]:
    """What is promised of an arm's threshold, beside the one that just fits the calibration rows."""
    answers = answers_of(validation)
    fitting = action_threshold(answers.confidence, answers.correct, chosen.max_risk)
    return {
        "arm": arm,
        **chosen.to_dict(),
        "fitting_threshold": fitting.threshold if math.isfinite(fitting.threshold) else None,
        "fitting_coverage": fitting.coverage,
    }


def guarantee_lines(report: Report) -> list[str]:
    """One sentence an arm on its threshold, then what must hold for the promises.

    >>> row = {"arm": "a", "threshold": None, "max_risk": 0.1, "error_probability": 0.1, "reason": "There are 9 rows."}
    >>> guarantee_lines({"guarantee": [row]})[0][:72]
    'a: no threshold. That at most 0.100 of the answers acted on are wrong, w'
    """
    rows = report.get("guarantee") or []
    lines = [_line(row) for row in rows]
    needed = list(dict.fromkeys(_assumptions(rows)))
    return [*lines, "The promise holds if: " + " ".join(needed)] if needed else lines


def _assumptions(rows: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    return (text for row in rows for text in row.get("assumptions") or [])


def _line(row: Mapping[str, Any]) -> str:
    said = f"at most {show(row['max_risk'])} of the answers acted on are wrong{likely(row)}"
    if row.get("threshold") is None:
        return (
            f"{row['arm']}: no threshold. That {said} cannot be promised: {row.get('reason') or 'no calibration rows.'}"
        )
    text = (
        f"{row['arm']}: acting from {show(row['threshold'])}, {said} over the draw of {show(row['rows'])} calibration rows, of "
        f"which {100 * row['coverage']:.1f} % are acted on."
    )
    if row.get("fitting_threshold") is None:
        return text
    return text + (
        f" Without that allowance for chance the threshold would be {show(row['fitting_threshold'])} "
        f"({100 * row['fitting_coverage']:.1f} % acted on), and its promise would be broken about half of the time."
    )
