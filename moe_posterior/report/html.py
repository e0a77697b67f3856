"""The report as one self-contained web page: every section that the run measured, and a plain line where it did not.

What the keys of the report mean is in :mod:`moe_posterior.report.schema`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moe_posterior import escape
from moe_posterior.report import charts, promise, tables
from moe_posterior.report.checklist import ABSENT, checklist, standard, tally
from moe_posterior.report.findings import baseline_findings, calibrator_findings, disagreement_findings
from moe_posterior.report.guarantee import guarantee_lines
from moe_posterior.report.missing import left_out_lines
from moe_posterior.report.places import judged_of
from moe_posterior.report.schema import Report
from moe_posterior.report.verdict import verdict_of
from moe_posterior.results.page import Section, details, page, paragraph, table
from moe_posterior.results.tables import Table


def to_html(report: Report) -> str:
    """Render a report as a whole HTML document that needs no network.

    Args:
        report: from :func:`~moe_posterior.report.evaluate_predictions` or read back from its JSON, with any of the
            further sections of :class:`~moe_posterior.report.schema.Report`. Text in it is escaped.

    >>> document = to_html({"action": {"arm": "<b>", "threshold": 0.8, "risk": 0.05, "coverage": 0.6}})
    >>> "<b>" in document, "&lt;b&gt;" in document, ABSENT in document
    (False, True, True)
    """
    known = tables.identity_values(report)
    data = next((text for name, text in known.items() if name == "data" or name.startswith("data: evaluation")), None)
    subtitle = " · ".join(part for part in (known.get("model"), data, known.get("date")) if part)
    return page(f"Calibration report of {judged_of(report)}", subtitle, [
        _verdict(report),
        _promise(report),
        _standard(report),
        Section("identity", "What was evaluated", _table(tables.identity(report))),
        _results(report),
        Section("reliability", "Reliability", charts.reliability(report) or _absent("Reliability curves")),
        _shifts(report),
        Section("subgroups", "Subgroups", _table(tables.subgroups(report), "Subgroups beyond the subsets above")),
        _configurations(report),
        _conditions(report),
        _baselines(report),
        _calibrators(report),
        _abstention(report),
        _action(report),
        Section("notes", "How to read this", _notes(report)),
    ])  # fmt: skip


def _verdict(report: Report) -> Section:
    found = verdict_of(report)
    html = paragraph(found.preference) if found.preference else ""
    for one in found.arms:
        html += f"<h3>{escape.html(one.arm)}</h3>" if len(found.arms) > 1 else ""
        for line in one.lines:
            question, _, answer = line.partition("? " if line.startswith("May") else ": ")
            html += f"<p><strong>{escape.html(question)}{'?' if line.startswith('May') else ':'}</strong> {escape.html(answer)}</p>"
    return Section("verdict", "Verdict", html)


def _conditions(report: Report) -> Section:
    whole, every = tables.conditions(report, groups=False), tables.conditions(report)
    html = _noted(whole, "Operating conditions")
    if whole and every and len(every.rows) > len(whole.rows):
        html += details("Every group on every set", table(replace(every, note="")))
    return Section("conditions", "Operating conditions", html)


def _baselines(report: Report) -> Section:
    html = "".join(map(paragraph, baseline_findings(report))) + _noted(tables.baselines(report), "Trivial baselines")
    return Section("baselines", "Trivial baselines", html)


def _abstention(report: Report) -> Section:
    html = "".join(map(paragraph, disagreement_findings(report)))
    html += _table(tables.abstention(report), "Abstention where experts disagree")
    return Section("abstention", "Abstention where experts disagree", html)


def _promise(report: Report) -> Section:
    said = promise.sentence(tables.rows_of(report, "action"))
    how = (
        "Held: the measured share of wrong answers is at most the promise. The threshold was proven on calibration rows, for rows "
        "like them. Risks have 95 % intervals. A shift fails where it fails at any severity."
    )
    proven = "".join(map(paragraph, guarantee_lines(report)))
    html = paragraph(said) + _table(tables.action(report, whole=True)) + paragraph(how, "note") + proven if said else ""
    return Section("promise", "Is the promise of the action threshold kept?", html or _absent("A promise"))


def _standard(report: Report) -> Section:
    items = checklist(report)
    intro = (
        f"What a calibration report of a consequential mixture of experts should name, and what this one holds: {tally(items)}. "
        "The last five apply to soft routing and to how the model is used."
    )
    return Section("standard", "Governance standard", paragraph(intro) + table(standard(items)))


def _results(report: Report) -> Section:
    main = tables.main_rows(report)
    if main is None:
        return Section("results", "Accuracy and calibration", _absent())
    every = tables.every_row(report)
    marked = tables.marked(report) if report.get("paired") else ""
    parts = [
        table(main),
        paragraph(f"Values with 95 % intervals. {marked}".strip(), "note"),
        charts.severity(report),
        details("Every shift, severity and subset", table(every)) if every else "",
    ]
    return Section("results", "Accuracy and calibration", "".join(parts))


def _shifts(report: Report) -> Section:
    metric = tables.metric_settings(report)
    text = paragraph(f"Metric: {metric}.") if metric else _absent("Metric and binning")
    html = text + _table(tables.shifts(report), "Shift scenarios")
    if pools := tables.pools(report):
        html += "<h3>What several sets together are called</h3>" + table(pools)
    return Section("shifts", "Shift scenarios and metric", html)


def _configurations(report: Report) -> Section:
    few = f"The largest gap first; configurations with fewer than {tables.FEW} predictions come last."
    found = tables.configurations(report)
    html = _table(found, "Routing configurations")
    if found:
        html = paragraph(few, "note") + html
    shared = _table(tables.shared_confidence(report), "Inputs that share a displayed confidence")
    return Section(
        "configurations", "Routing configurations", f"{html}<h3>One confidence, several configurations</h3>{shared}"
    )


def _calibrators(report: Report) -> Section:
    reweighted = charts.rce(report) or _absent("The worst case under reweighting")
    online = charts.online(report) or _absent("Recalibration from delivered outcomes")
    html = "".join(map(paragraph, calibrator_findings(report)))
    html += _table(tables.calibrators(report), "Post-processing of the confidences")
    html += f"<h3>Worst case over reweighted configurations</h3>{reweighted}<h3>As outcomes are delivered</h3>{online}"
    return Section("calibrators", "Calibrators", html)


def _action(report: Report) -> Section:
    html = _table(tables.action(report), "An action threshold")
    html += charts.risk_coverage(report) or _absent("Risk against coverage")
    operation: Mapping[str, Any] = report.get("operation") or {}
    labels = {"abstention": "Abstention", "routing_log": "Routing log", "conditions": "Operating conditions"}
    for key, label in labels.items():
        value = operation.get(key)
        if value:
            html += paragraph(f"{label}: {value if isinstance(value, str) else '; '.join(map(str, value))}.")
    return Section("action", "Action threshold and use", html)


def _notes(report: Report) -> str:
    missing = left_out_lines(report)
    html = paragraph(f"Left out of this report: {'; '.join(missing)}.") if missing else ""
    return html + "".join(map(paragraph, report.get("notes") or [])) or _absent()


def _table(content: Table | None, what: str = "") -> str:
    return table(content) if content else _absent(what)


def _noted(content: Table | None, what: str) -> str:
    """The table below its note, which wraps where a narrow screen scrolls the table."""
    return paragraph(content.note, "note") + table(replace(content, note="")) if content else _absent(what)


def _absent(what: str = "") -> str:
    return paragraph(f"{what}: {ABSENT}." if what else f"{ABSENT[0].upper()}{ABSENT[1:]}.", "absent")
