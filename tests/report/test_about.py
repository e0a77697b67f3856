"""What only the user knows: the about file, and the audit log for incident review."""

from pathlib import Path

import pytest
from report_example import full_report

from moe_posterior import InvalidArgumentError, MissingDataError
from moe_posterior.report.about import FACTS, read_about, with_facts
from moe_posterior.report.checklist import checklist, standard, tally
from moe_posterior.report.html import to_html
from moe_posterior.report.tables import identity_values

ROUTING_LOG = "Routing logs for incident review"


def test_every_fact_is_read_and_shown(tmp_path: Path) -> None:
    file = tmp_path / "about.yaml"
    file.write_text("\n".join(f"{name}: the {name}" for name in FACTS))
    report = with_facts(full_report(), read_about(file))
    shown = " ".join(identity_values(report).values())
    assert all(f"the {name}" in shown for name in FACTS)
    assert "the intended_use" in to_html(report)


def test_a_number_is_a_version(tmp_path: Path) -> None:
    file = tmp_path / "about.yaml"
    file.write_text("version: 2.1")
    assert read_about(file) == {"version": "2.1"}


@pytest.mark.parametrize("text", ["modell: x", "model: [a]", "model: true", "model: ' '", "- a", "model: {a: b}"])
def test_a_file_that_says_something_else_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "about.yaml"
    file.write_text(text)
    with pytest.raises(InvalidArgumentError, match=r"about\.yaml"):
        read_about(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match="nowhere"):
        read_about(tmp_path / "nowhere.yaml")


def test_facts_leave_the_measured_report_as_it_was() -> None:
    report = full_report()
    found = with_facts(report, {"model": "triage"}, {"path": "log", "verified": True})
    assert report == full_report() or str(report) == str(full_report())
    assert found["records"] is report["records"]
    assert found["identity"]["data"] == report["identity"]["data"]


def item_of(report: dict, requirement: str):
    return next(item for item in checklist(report) if item.requirement == requirement)


def test_the_standard_asks_for_what_was_not_given() -> None:
    report = {"arms": ["a"]}
    items = checklist(report)
    assert len(items) == 15
    told = {row[0]: row[2] for row in standard(items).rows}
    assert told[ROUTING_LOG] == "none given: pass --audit-log FOLDER"
    assert "--about FILE" in told["Model version"]
    assert told["Abstention where experts disagree"].endswith("pass --experts and --weights")
    found = tally(items)
    assert all(name in found.split("asked of you: ")[1] for name in (ROUTING_LOG, "Model version"))


@pytest.mark.parametrize(("verified", "failed"), [(True, False), (False, True), (None, False)])
def test_an_altered_log_fails_the_item(verified: bool | None, failed: bool) -> None:
    log = {"path": "runs/x/audit", "verified": verified, "head": "5f0c", "decisions": 12}
    if verified is False:
        log["problem"] = "segment 0, record 3: altered"
    item = item_of(with_facts({"arms": ["a"]}, None, log), ROUTING_LOG)
    assert item.failed is failed
    assert "runs/x/audit" in item.found
    assert "12 decisions" in item.found
    assert "5f0c" in item.found
    assert ("altered" in item.found) is (verified is False)
