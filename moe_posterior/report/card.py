"""The report as a fragment of a Hugging Face model card."""

from collections.abc import Sequence
from dataclasses import replace

from moe_posterior.escape import markdown
from moe_posterior.report import promise, tables
from moe_posterior.report.checklist import ABSENT, checklist, standard, tally
from moe_posterior.report.findings import baseline_findings, calibrator_findings, disagreement_findings
from moe_posterior.report.guarantee import guarantee_lines
from moe_posterior.report.missing import left_out_lines
from moe_posterior.report.places import judged_of
from moe_posterior.report.schema import Report
from moe_posterior.report.verdict import verdict_of
from moe_posterior.results.tables import Table, to_markdown

MOST_CONFIGURATIONS = 10


def to_card(report: Report) -> str:
    """Render a report as Markdown to paste into a model card: the verdict, whether the action threshold kept its promise, the
    governance standard, results, and each measured section.

    Args:
        report: as for :func:`~moe_posterior.report.html.to_html`. Text in it is escaped, so that no name can add
            markup or break a table.

    >>> card = to_card({"action": {"threshold": 0.8, "risk": 0.05, "max_risk": 0.1, "coverage": 0.6}})
    >>> print(card.split("### ")[2].strip())
    Action threshold
    <BLANKLINE>
    Promised: at most 0.100 wrong among the answers acted on. Held in 1 of 1.
    <BLANKLINE>
    | promise | risk (share wrong) | risk promised | coverage (share acted on) | act from confidence |
    |---|--:|--:|--:|--:|
    | held | 0.050 | 0.100 | 0.600 | 0.800 |
    """
    metric = tables.metric_settings(report)
    items = checklist(report)
    said = promise.sentence(tables.rows_of(report, "action"))
    parts = {
        "Verdict": to_list(verdict_of(report).lines),
        "Action threshold": (f"{markdown(said)}\n\n" if said else "")
        + _section(tables.action(report, whole=True))
        + "".join(f"\n\n{markdown(line)}" for line in guarantee_lines(report)),
        "Governance standard": f"Held: {markdown(tally(items))}.\n\n{_markdown(standard(items))}",
        "Results": _section(tables.main_rows(report)) + _note(report),
        "Shift scenarios": _section(tables.shifts(report))
        + (f"\n\n{_markdown(pools)}" if (pools := tables.pools(report)) else "")
        + (f"\n\nMetric: {markdown(metric)}." if metric else ""),
        "Subgroups": _section(tables.subgroups(report)),
        "Operating conditions": _section(tables.conditions(report, groups=False), note=True),
        "Trivial baselines": _told(baseline_findings(report)) + _section(tables.baselines(report), note=True),
        f"Routing configurations with the largest gap (at most {MOST_CONFIGURATIONS})": _section(
            tables.configurations(report, MOST_CONFIGURATIONS)
        ),
        "Inputs that share a displayed confidence across configurations": _section(tables.shared_confidence(report)),
        "Calibrators": _told(calibrator_findings(report)) + _section(tables.calibrators(report)),
        "Abstention where experts disagree": _told(disagreement_findings(report)) + _section(tables.abstention(report)),
    }
    if missing := left_out_lines(report):
        parts["Left out"] = markdown("; ".join(missing)) + "."
    body = "\n\n".join(f"### {name}\n\n{text}" for name, text in parts.items())
    return f"## Calibration of {judged_of(report)}\n\n{body}\n"


def to_list(lines: Sequence[str]) -> str:
    """Lines as a list in Markdown."""
    return "\n".join(f"- {markdown(line)}" for line in lines)


def _told(lines: Sequence[str]) -> str:
    return f"{to_list(lines)}\n\n" if lines else ""


def _markdown(content: Table, note: bool = False) -> str:
    """The table; its note only if asked for, since a card has little room."""
    return to_markdown(content if note else replace(content, note="")).rstrip("\n")


def _section(content: Table | None, note: bool = False) -> str:
    return _markdown(content, note) if content else f"{ABSENT[0].upper()}{ABSENT[1:]}."


def _note(report: Report) -> str:
    if not report.get("paired"):
        return ""
    return f"\n\n{tables.marked(report)}"
