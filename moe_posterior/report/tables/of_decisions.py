"""Tables that a deployment decision rests on: operating conditions, trivial baselines, abstention by disagreement."""

from collections.abc import Mapping
from typing import Any

from moe_posterior.report.conditions import FAIL, PASS, UNSURE, condition_name
from moe_posterior.report.schema import OVERALL
from moe_posterior.report.tables.cells import above_noise, interval_of, rows_of, without_empty_columns
from moe_posterior.report.versus import beats
from moe_posterior.results.tables import Cell, Table, estimate

__all__ = ["abstention", "baselines", "conditions"]

ORDER = {FAIL: 0, UNSURE: 1, PASS: 2}  # the worst first


def conditions(report: Mapping[str, Any], *, groups: bool = True) -> Table | None:
    """Every operating condition with its errors and its verdict; ``groups`` leaves in those of single groups."""
    found = [one for one in rows_of(report, "conditions") if groups or one.get("group") == OVERALL]
    rows = [
        [
            one.get("arm"),
            condition_name(one),
            Cell(one["verdict"], str(ORDER.get(one["verdict"])), strong=one["verdict"] == FAIL),
            one.get("n"),
            estimate(one.get("ece"), *interval_of(one)),
            estimate(one.get("gap"), *(one.get("gap_interval") or ())),
        ]
        for one in found
    ]
    note = (
        f"Pass: both intervals end within the tolerance of {found[0]['tolerance']:.3f}. Fail: one lies beyond it. Otherwise the rows "
        "are too few to say. The intervals hold together for all further sets of an arm, and for all its groups (Bonferroni): the risk "
        "of any wrong pass or fail among them is at most 5 %."
        if found
        else ""
    )
    columns = ["arm", "condition", "verdict", "n", "ECE", "mean confidence − accuracy"]
    return without_empty_columns(Table(columns, rows, note))


def baselines(report: Mapping[str, Any]) -> Table | None:
    """The model and what is trivial beside it; bold where a baseline is credibly better than the model."""
    better = {
        (one["arm"], one["panel"], one["name"], one["metric"]): beats(one)
        for one in rows_of(report, "versus")
        if one.get("against") == "the model"
    }
    rows = []
    for one in rows_of(report, "baselines"):
        key = (one["arm"], one["panel"], one["name"])
        ece = estimate(one.get("ece"), *interval_of(one), strong=bool(better.get((*key, "ece"))))
        scores = [estimate(one.get(name), strong=bool(better.get((*key, name)))) for name in ("brier", "nll")]
        name = f"{one['name']} ({one['detail']})" if one.get("detail") else one["name"]
        rows.append([one["arm"], one["panel"], name, above_noise(ece, one), *scores, one.get("accuracy"), one.get("n")])
    note = (
        "Chosen on calibration rows. Bold: credibly better than the model, by the paired 95 % interval and Holm's correction for the "
        "comparisons of this arm and evaluation."
    )
    columns = ["arm", "evaluation", "confidences of", "ECE", "Brier", "NLL", "accuracy", "n"]
    return without_empty_columns(Table(columns, rows, note))


def abstention(report: Mapping[str, Any]) -> Table | None:
    """What is left wrong after abstaining on the most disputed rows, beside abstaining on the least confident."""
    rows = []
    for one in rows_of(report, "disagreement"):
        for part in one.get("abstentions") or []:
            risks = [
                estimate(part[f"risk_{rule}"], *(part.get(f"interval_{rule}") or ()))
                for rule in ("disagreement", "confidence")
            ]
            left = Cell(f"{100 * part['share']:.0f} %", part["share"])
            rows.append([one["arm"], one["panel"], left, part.get("kept"), *risks, one.get("risk")])
    columns = ["arm", "evaluation", "abstained on", "answers left", "wrong if the most disputed are left out"]
    return without_empty_columns(
        Table([*columns, "wrong if the least confident are", "wrong without abstaining"], rows)
    )
