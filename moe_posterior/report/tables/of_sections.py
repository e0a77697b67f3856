"""Tables of the further sections: subgroups, routing configurations, shared confidences, calibrators, the action threshold."""

from collections.abc import Mapping
from typing import Any

from moe_posterior.report import promise
from moe_posterior.report.schema import Report
from moe_posterior.report.tables.cells import above_noise, interval_of, rows_of, without_empty_columns
from moe_posterior.results.tables import Cell, Table, estimate

__all__ = ["FEW", "action", "calibrators", "configurations", "gap", "of_arm", "shared_confidence", "subgroups", "worst"]

OF_MANY = (
    "The largest of many gaps is large by chance too: the intervals hold for all configurations at once (Bonferroni), and beside them "
    "stands the mean |gap| of a calibrated configuration of the same size."
)
FEW = 30  # predictions, below which a configuration's gap is noise: such rows come last


def subgroups(report: Report) -> Table | None:
    """Accuracy and ECE of each subgroup; the worst is marked."""
    rows = [
        [
            one.get("arm"),
            Cell(f"{one.get('group')} ({worst(one)})", str(one.get("group")), strong=not one.get("within_noise"))
            if one.get("worst")
            else one.get("group"),
            one.get("n"),
            one.get("accuracy"),
            above_noise(
                estimate(
                    one.get("ece"), *interval_of(one), strong=bool(one.get("worst")) and not one.get("within_noise")
                ),
                one,
            ),
        ]
        for one in rows_of(report, "subgroups")
    ]
    return without_empty_columns(Table(["arm", "group", "n", "accuracy", "ECE"], rows))


def worst(one: Mapping[str, Any]) -> str:
    """What to call the subgroup with the largest ECE: the worst, if it is beyond noise.

    >>> worst({"arm": "softmax"}), worst({"within_noise": True})
    ('worst of softmax', 'largest, within noise')
    """
    return f"{'largest' if one.get('within_noise') else 'worst'}{of_arm(one)}" + (
        ", within noise" if one.get("within_noise") else ""
    )


def of_arm(one: Mapping[str, Any]) -> str:
    """``" of ARM"``, where a row says whose it is."""
    return f" of {one['arm']}" if one.get("arm") else ""


def configurations(report: Report, most: int = 300) -> Table | None:
    """Routing configurations, the largest gap between confidence and accuracy first, those with few predictions last."""
    found = sorted(
        rows_of(report, "configurations"), key=lambda one: ((one.get("n") or 0) < FEW, -abs(gap(one) or 0.0))
    )
    rows = [
        [
            one.get("arm"),
            one.get("panel"),
            one.get("cluster"),
            ", ".join(str(expert) for expert in one.get("experts") or []),
            one.get("n"),
            one.get("accuracy"),
            one.get("confidence"),
            estimate(gap(one), *interval_of(one)),
            one.get("floor"),
        ]
        for one in found[:most]
    ]
    caption = (
        f"The first {most:,} of {len(found):,} configurations; all are in report.json." if len(found) > most else ""
    )
    if any(one.get("floor") is not None for one in found):
        caption = f"{caption} {OF_MANY}".strip()
    columns = ["arm", "evaluation", "cluster", "experts", "n", "accuracy", "confidence", "gap (confidence − accuracy)"]
    columns.append("|gap| of noise alone")
    return without_empty_columns(Table(columns, rows, caption))


def gap(one: Mapping[str, Any]) -> float | None:
    """Confidence minus accuracy: positive where the configuration is over-confident."""
    if one.get("gap") is not None:
        return one["gap"]
    confidence, accuracy = one.get("confidence"), one.get("accuracy")
    return None if confidence is None or accuracy is None else confidence - accuracy


def shared_confidence(report: Report) -> Table | None:
    """How many inputs display a confidence that another configuration displays too."""
    rows = [
        [
            one.get("arm"),
            one.get("panel"),
            one.get("decimals"),
            one.get("n"),
            one.get("shared"),
            _percent(one["shared"] / one["n"]) if one.get("n") and one.get("shared") is not None else None,
            one.get("widest_gap"),
        ]
        for one in rows_of(report, "shared_confidence")
    ]
    columns = [
        "arm",
        "evaluation",
        "decimals displayed",
        "inputs",
        "sharing a confidence across configurations",
        "share",
    ]
    return without_empty_columns(Table([*columns, "widest difference in accuracy"], rows))


def calibrators(report: Report) -> Table | None:
    """What each post-processing of the confidences reached."""
    rows = [
        [
            one.get("arm"),
            one.get("panel"),
            one.get("name"),
            above_noise(estimate(one.get("ece"), *interval_of(one)), one),
            one.get("nll"),
            one.get("accuracy"),
        ]
        for one in rows_of(report, "calibrators")
    ]
    return without_empty_columns(Table(["arm", "evaluation", "calibrator", "ECE", "NLL", "accuracy"], rows))


def action(report: Report, *, whole: bool = False) -> Table | None:
    """The confidence above which the system acts, and whether its promise held; ``whole`` leaves out a shift's single severities."""
    found = rows_of(report, "action")
    rows = [
        [
            one.get("arm"),
            promise.place(one),
            Cell(text, text, strong=promise.verdict(one) == promise.FAILED),
            estimate(one.get("risk"), *interval_of(one)),
            one.get("max_risk"),
            one.get("coverage"),
            one.get("threshold"),
            one.get("acted"),
        ]
        for one in (promise.summary(found) if whole else found)
        for text in [promise.verdict_text(one)]
    ]
    columns = ["arm", "evaluation", "promise", "risk (share wrong)", "risk promised", "coverage (share acted on)"]
    return without_empty_columns(Table([*columns, "act from confidence", "acted on"], rows))


def _percent(share: float) -> Cell:
    """A share in [0, 1] as per cent, sorting by its value."""
    return Cell(f"{100 * share:.1f} %", share)
