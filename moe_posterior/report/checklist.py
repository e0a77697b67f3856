"""The governance standard for consequential mixtures of experts, item by item, with what a report says to each.

Source: *The Expert Router Becomes the Confidence Problem*, "Governance Standard".
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_posterior.report import promise, tables
from moe_posterior.report.findings import disagreement_findings
from moe_posterior.report.places import ALL_SHIFTS, CLEAN, place_name, sets_of
from moe_posterior.report.schema import OVERALL, Report
from moe_posterior.report.verdict import verdict_of
from moe_posterior.results.tables import Cell, Table, estimate, show

ABSENT = "not measured in this run"
Finder = Callable[[Report], str | None]


@dataclass(frozen=True)
class Item:
    """One requirement, what the report holds for it, and where."""

    requirement: str
    found: str | None  # None: not measured in this run
    anchor: str  # section of the page
    failed: bool = False  # measured, and not as it was promised
    asked: str = ABSENT  # what to do where nothing was found

    @property
    def held(self) -> bool:
        """Whether the report has what is asked for, and it is as promised."""
        return self.found is not None and not self.failed


def standard(items: Sequence[Item]) -> Table:
    """The checklist as a table."""
    rows = []
    for item in items:
        word = Cell(promise.FAILED, promise.FAILED, strong=True) if item.failed else "yes" if item.held else "no"
        rows.append([item.requirement, word, item.found or item.asked])
    return Table(["item", "held", "value found"], rows)


def tally(items: Sequence[Item]) -> str:
    """How many items a report holds, and which it measured and found broken.

    >>> tally([Item("a", "x", "s"), Item("b", "y", "s", failed=True), Item("c", None, "s")])
    '1 of 3 items; failed: b'
    """
    failed = [item.requirement for item in items if item.failed]
    asked = [item.requirement for item in items if item.found is None and item.asked != ABSENT]
    return (
        f"{sum(item.held for item in items)} of {len(items)} items"
        + ("; failed: " + ", ".join(failed) if failed else "")
        + ("; asked of you: " + ", ".join(asked) if asked else "")
    )


def checklist(report: Report) -> list[Item]:
    """Every item of the standard, in its order; ``found`` is None where the report is silent.

    >>> report = {"action": {"threshold": 0.8, "risk": 0.05, "max_risk": 0.02}}
    >>> [(item.found, item.failed) for item in checklist(report) if "threshold" in item.requirement]
    [('failed, risk 0.050; act from 0.800, promised at most 0.020', True)]
    """
    return [
        Item(requirement, found, anchor, found is not None and _failed(report, find), ASKED.get(requirement, ABSENT))
        for requirement, anchor, find in REQUIREMENTS
        for found in [find(report) or None]
    ]


def _failed(report: Report, find: Finder) -> bool:
    """Whether what was measured is not as promised: the action threshold's risk, or the audit log's chain."""
    if find is _action:
        return promise.overall(tables.rows_of(report, "action")) not in (None, promise.HELD)
    return find is _routing_log and (report.get("audit_log") or {}).get("verified") is False


def _aggregate(report: Report) -> str | None:
    sets = sets_of(report)
    found = [
        f"{record['arm']}, {place_name(sets, record['shift'], record['severity'])}: "
        f"ECE {_with_floor({'ece': record['value'], **record})}"
        for record in report.get("records") or []
        if record["subset"] == OVERALL and record["metric"] == "ece"
        if record["severity"] == 0 or (record["shift"], record["severity"]) == (ALL_SHIFTS, None)
    ]
    return "; ".join(found)


def _with_floor(one: Mapping[str, Any]) -> str:
    """``0.050 [0.031, 0.070], noise floor 0.024``, as far as it is known."""
    low, high = one.get("interval") or (one.get("low"), one.get("high"))
    text = show(estimate(one.get("ece"), low, high))
    return text if one.get("floor") is None else f"{text}, noise floor {show(one['floor'])}"


def _identity(prefix: str) -> Finder:
    def find(report: Report) -> str:
        known = tables.identity_values(report)
        parts = [
            text if name == prefix else f"{name.removeprefix(f'{prefix}: ')}: {text}"
            for name, text in known.items()
            if name == prefix or name.startswith(f"{prefix}: ")
        ]
        return "; ".join(parts)

    return find


def _shifts(report: Report) -> str:
    content = tables.shifts(report)
    return ", ".join(show(row[0]) for row in content.rows if row[0] != CLEAN) if content else ""


def _bins(report: Report) -> str:
    settings = report.get("metric") or {}
    rule = (tables.metric_settings(report) or "").partition(", ")[2]
    return rule if settings.get("binning") or not settings else ""


def _metric_name(report: Report) -> str:
    return (tables.metric_settings(report) or "").partition(", ")[0]


def _subgroups(report: Report) -> str:
    groups = list(dict.fromkeys(str(one.get("group")) for one in tables.rows_of(report, "subgroups")))
    worst = [one for one in tables.rows_of(report, "subgroups") if one.get("worst")]
    if groups:
        named = "; ".join(f"{tables.worst(one)}: {one.get('group')}, ECE {_with_floor(one)}" for one in worst)
        return f"{len(groups)} groups" + (f"; {named}" if named else "")
    sizes = {name: n for name, n in (report.get("subsets") or {}).items() if name != OVERALL}
    return "subsets " + ", ".join(f"{name} (n = {show(n)})" for name, n in sizes.items()) if sizes else ""


def _calibrators(report: Report) -> str:
    return ", ".join(dict.fromkeys(str(one.get("name")) for one in tables.rows_of(report, "calibrators")))


def _action(report: Report) -> str:
    """Per arm: the verdict on every evaluation, then the threshold and what it promised."""
    by_arm: dict[Any, list[Mapping[str, Any]]] = {}
    for one in promise.summary(tables.rows_of(report, "action")):
        by_arm.setdefault(one.get("arm"), []).append(one)
    found = []
    for arm, rows in by_arm.items():
        parts = [part for one in rows if (part := _measured(one))]
        labels = {"threshold": "act from", "max_risk": "promised at most"}
        shared = [f"{label} {show(rows[0][key])}" for key, label in labels.items() if rows[0].get(key) is not None]
        text = "; ".join([*parts, ", ".join(shared)] if shared else parts)
        found.append((f"{arm}: " if arm else "") + text if text else "")
    return ". ".join(part for part in found if part)


def _measured(one: Mapping[str, Any]) -> str:
    interval = one.get("interval")
    risk = f"risk {show(estimate(one['risk'], *(interval or ())))}" if one.get("risk") is not None else ""
    coverage = f"coverage {show(one['coverage'])}" if one.get("coverage") is not None else ""
    name = " ".join(part for part in (promise.place(one), promise.verdict_text(one)) if part)
    return ", ".join(part for part in (name, risk, coverage) if part)


def _shared(report: Report) -> str:
    found = []
    for one in tables.rows_of(report, "shared_confidence"):
        name = ", ".join(str(one[key]) for key in ("arm", "panel") if one.get(key))
        found.append((f"{name}: " if name else "") + f"{show(one.get('shared'))} of {show(one.get('n'))} inputs")
    return "; ".join(found)


def _monitoring(report: Report) -> str:
    rows = tables.rows_of(report, "configurations")
    gaps = [abs(found) for one in rows if (one.get("n") or 0) >= tables.FEW and (found := tables.gap(one)) is not None]
    if not rows:
        return ""
    widest = f", widest gap {max(gaps):.3f} among those with {tables.FEW} predictions or more" if gaps else ""
    ends = [one["interval"] for one in rows if one.get("floor") is not None and one.get("interval")]
    beyond = sum(low is not None and high is not None and not low <= 0 <= high for low, high in ends)
    certain = f"; the gap is beyond noise in {beyond:,} of {len(ends):,}, all at once at 95 %" if ends else ""
    return f"{len(rows):,} configurations measured{widest}{certain}"


def _operation(key: str) -> Finder:
    def find(report: Report) -> str:
        operation: Mapping[str, Any] = report.get("operation") or {}
        value = operation.get(key) or ""
        return value if isinstance(value, str) else "; ".join(map(str, value))

    return find


def _abstention(report: Report) -> str:
    """The user's own rule, and what abstaining by disagreement was measured to do."""
    given = _operation("abstention")(report) or ""
    return " ".join([*([given] if given else []), *disagreement_findings(report)])


def _routing_log(report: Report) -> str:
    log: Mapping[str, Any] = report.get("audit_log") or {}
    if not log:
        return _operation("routing_log")(report) or ""
    checked = {True: "its chain verified", False: f"not as it was written: {log.get('problem')}"}
    parts = [
        str(log.get("path")),
        f"{show(log['decisions'])} decisions" if log.get("decisions") is not None else "",
        checked.get(log["verified"], "") if log.get("verified") is not None else "",
        f"last hash {log['head']}" if log.get("head") else "",
    ]
    return ", ".join(part for part in parts if part)


def _conditions(report: Report) -> str:
    """The user's own conditions, and per arm the sets inside the tolerance, outside it, and those with too few rows."""
    parts = [given] if (given := _operation("conditions")(report)) else []
    for one in verdict_of(report).arms:
        if one.tolerance is not None:
            words = {"within": one.passed, "outside": one.failed, "not enough rows on": one.undecided}
            told = "; ".join(f"{word} {len(names)}" for word, names in words.items())
            named = f": {', '.join(one.passed)}" if one.passed else ""
            parts.append(f"{one.arm}, tolerance {show(one.tolerance)}, sets {told}; holds on{named or ' none'}")
    return ". ".join(parts)


# What a user can do about an item that the report lacks, in options of `moe-posterior evaluate`.
ASKED = {
    "Routing type": "not given: pass --about FILE with routing",
    "Model version": "not given: pass --about FILE with model and version",
    "Training and evaluation distributions": "not given: pass --about FILE with training_data",
    "Shift scenarios tested": f"{ABSENT}: pass a file per shift, or --shift COLUMN",
    "Subgroup behaviour": f"{ABSENT}: pass --groups",
    "Temperature scaling or other post-processing": f"{ABSENT}: pass class probabilities, and rows to calibrate on",
    "Action threshold attached to the score": f"{ABSENT}: pass rows to choose it on, --calibration",
    "Whether identical displayed confidences hide different expert configurations": f"{ABSENT}: pass --weights",
    "Configuration-aware monitoring": f"{ABSENT}: pass --weights or --configuration",
    "Abstention where experts disagree": f"{ABSENT}: pass --experts and --weights",
    "Routing logs for incident review": "none given: pass --audit-log FOLDER",
}
REQUIREMENTS: tuple[tuple[str, str, Finder], ...] = (
    ("Calibration evidence for the final routed aggregate, not only for its experts", "results", _aggregate),
    ("Routing type", "identity", _identity("routing")),
    ("Model version", "identity", _identity("model")),
    ("Training and evaluation distributions", "identity", _identity("data")),
    ("Shift scenarios tested", "shifts", _shifts),
    ("Calibration metric", "shifts", _metric_name),
    ("Binning or scoring rule", "shifts", _bins),
    ("Subgroup behaviour", "subgroups", _subgroups),
    ("Temperature scaling or other post-processing", "calibrators", _calibrators),
    ("Action threshold attached to the score", "action", _action),
    ("Whether identical displayed confidences hide different expert configurations", "configurations", _shared),
    ("Configuration-aware monitoring", "configurations", _monitoring),
    ("Abstention where experts disagree", "abstention", _abstention),
    ("Routing logs for incident review", "action", _routing_log),
    ("Operating conditions inside which the confidences hold", "conditions", _conditions),
)
