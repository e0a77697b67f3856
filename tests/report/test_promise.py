"""Whether the action threshold kept its promise is said of every evaluation, first thing, and a broken one is never counted as held."""

import io
import json
import re

import pytest
import torch
from report_example import full_report
from rich.console import Console
from scipy.stats import binomtest

from moe_posterior.guarantees import GuaranteedThreshold, select_threshold
from moe_posterior.metrics import action_threshold
from moe_posterior.prediction import Prediction
from moe_posterior.report import render_table, to_card, to_html, to_markdown
from moe_posterior.report.checklist import checklist, tally
from moe_posterior.report.guarantee import chosen_threshold, guarantee_lines, guarantee_row
from moe_posterior.report.promise import FAILED, HELD, IDLE, Scored, promise_rows, verdict

THRESHOLD = GuaranteedThreshold(0.5, 0.1, 0.1, rows=100, acted=100, errors=5.0, assumptions=())


def scored(shift: str, severity: int, wrong: int, acted: int = 100, rows: int = 120) -> Scored:
    """``acted`` answers above the threshold, the first ``wrong`` of them wrong; the rest of the rows below it, all wrong."""
    confidence = torch.where(torch.arange(rows) < acted, 0.9, 0.2)
    correct = (torch.arange(rows) >= wrong) & (torch.arange(rows) < acted)
    return Scored(shift, severity, confidence, correct.double())


CASES = {  # name -> sets, verdict of each evaluation to read first, whether the item is held
    "clean holds and the shift fails": (
        [scored("clean", 0, 5), scored("fog", 1, 8), scored("fog", 2, 30)],
        {"clean": HELD, "fog, severities 1–2 pooled": FAILED},
    ),
    "clean fails": ([scored("clean", 0, 12), scored("fog", 3, 9)], {"clean": FAILED, "fog, severity 3": HELD}),
    "no shift, held": ([scored("clean", 0, 10)], {"clean": HELD}),
    "a held-out domain fails": ([scored("held-out sketch", 0, 59)], {"held-out sketch": FAILED}),
    "one severity of a shift that holds pooled": (
        [scored("clean", 0, 0), scored("fog", 1, 0), scored("fog", 5, 15)],
        {"clean": HELD, "fog, severities 1, 5 pooled": FAILED},
    ),
    "nothing is acted on": ([scored("clean", 0, 0, acted=0)], {"clean": IDLE}),
    "nothing is acted on under a shift": (
        [scored("clean", 0, 1), scored("fog", 1, 0, acted=0)],
        {"clean": HELD, "fog, severity 1": IDLE},
    ),
}


def report_of(*arms: tuple[str, list[Scored]]) -> dict:
    rows = [row for arm, sets in arms for row in promise_rows(arm, THRESHOLD, sets)]
    return {**full_report(), "action": json.loads(json.dumps(rows, allow_nan=False))}


def renderings(report: dict) -> dict[str, str]:
    file = io.StringIO()
    render_table(report, Console(file=file, width=80, color_system=None))
    page = re.sub(r"<style>.*?</style>|<script>.*?</script>", "", to_html(report), flags=re.S)
    return {
        "terminal": file.getvalue(),
        "markdown": to_markdown(report),
        "card": to_card(report).replace("\\", ""),
        "page": page,
    }


PROMISE = {
    "terminal": "Action threshold.",
    "markdown": "**Action threshold.**",
    "card": "### Action threshold",
    "page": 'id="promise"',
}


@pytest.mark.parametrize("case", CASES)
def test_every_evaluation_is_held_or_failed_in_every_rendering(case: str) -> None:
    sets, expected = CASES[case]
    report = report_of(("softmax", sets))
    for name, text in renderings(report).items():
        for place, word in expected.items():
            lines = [
                line
                for line in re.split(r"\n|</?tr>", text[text.index(PROMISE[name]) :])
                if place in line and ("softmax" in line or name == "terminal")
            ]
            found = set(re.findall(rf"{IDLE}|{FAILED}|{HELD}(?!-)", lines[0].lower()))
            assert found == {word}, (name, lines[0])


@pytest.mark.parametrize("case", CASES)
def test_only_a_promise_that_never_failed_is_an_item_held(case: str) -> None:
    sets, expected = CASES[case]
    report = report_of(
        ("softmax", [scored("clean", 0, 1)]), ("posterior", sets)
    )  # the first arm never excuses the second
    (item,) = [one for one in checklist(report) if "threshold" in one.requirement]
    broken = FAILED in expected.values()
    assert item.failed == broken
    assert item.held == (not broken)
    if broken:
        assert "failed" in item.found
        assert "14 of 15 items; failed: Action threshold" in tally(checklist(report))
    else:
        assert tally(checklist(report)) == "15 of 15 items"
    for name in ("card", "page"):
        assert tally(checklist(report)) in renderings(report)[name]


def test_a_promise_under_which_nothing_is_acted_on_is_not_held() -> None:
    items = checklist(report_of(("softmax", [scored("clean", 0, 0, acted=0)])))
    assert [item.held for item in items if "threshold" in item.requirement] == [False]


def test_it_is_read_right_after_the_verdict() -> None:
    shown = renderings(report_of(("softmax", [scored("clean", 0, 59)])))
    assert shown["terminal"].startswith("Verdict\nsoftmax: May the score be used?")
    assert "Action threshold. Promised: at most 0.100 wrong" in shown["terminal"]
    assert "Failed in 1 of 1." in shown["terminal"]
    assert "FAILED" in shown["terminal"].split("ECE of noise")[0]
    assert shown["markdown"].startswith("**Verdict**")
    assert [part.partition("\n")[0] for part in shown["card"].split("### ")[1:3]] == ["Verdict", "Action threshold"]
    assert shown["page"].split("<section ")[1].startswith('id="verdict"')
    assert shown["page"].split("<section ")[2].startswith('id="promise"')


def test_risk_interval_and_coverage_are_those_of_a_plain_count() -> None:
    sets = [scored("clean", 0, 12), scored("fog", 1, 3), scored("fog", 2, 30, acted=60)]
    rows = {(row["shift"], row["severity"]): row for row in report_of(("a", sets))["action"]}
    assert set(rows) == {("clean", 0), ("fog", None), ("fog", 1), ("fog", 2)}
    for place, wrong, acted in ((("clean", 0), 12, 100), (("fog", 1), 3, 100), (("fog", 2), 30, 60)):
        row, wilson = rows[place], binomtest(wrong, acted).proportion_ci(method="wilson")
        assert (row["risk"], row["coverage"], row["acted"], row["n"]) == (wrong / acted, acted / 120, acted, 120)
        assert row["interval"] == pytest.approx([wilson.low, wilson.high])
    assert rows["fog", None]["risk"] == 33 / 160
    assert (rows["fog", None]["failed_at"], rows["fog", None]["sets"]) == ([2], 2)


def test_copies_of_the_same_rows_do_not_narrow_the_pooled_interval() -> None:
    alone = promise_rows("a", THRESHOLD, [scored("fog", 1, 12)])[0]
    copies = promise_rows("a", THRESHOLD, [scored("fog", severity, 12) for severity in range(1, 6)])[0]
    assert copies["interval"] == pytest.approx(alone["interval"])
    none_wrong = promise_rows("a", THRESHOLD, [scored("fog", severity, 0) for severity in range(1, 6)])[0]
    assert none_wrong["interval"] == pytest.approx(promise_rows("a", THRESHOLD, [scored("fog", 1, 0)])[0]["interval"])


def test_pooled_intervals_cover_the_risk_where_rows_are_hard_or_easy_under_every_severity() -> None:
    generator = torch.Generator().manual_seed(0)
    covered, trials, truth = 0, 400, 0.2
    for _ in range(trials):
        hard = 0.4 * torch.rand(
            300, generator=generator, dtype=torch.float64
        )  # of each row, the same under all severities
        sets = [
            Scored("fog", severity, torch.ones(300), (torch.rand(300, generator=generator) >= hard).double())
            for severity in range(1, 6)
        ]
        low, high = promise_rows("a", THRESHOLD, sets)[0]["interval"]
        covered += int(low <= truth <= high)
    assert 0.92 <= covered / trials <= 0.98


def test_the_promise_itself_is_held_by_an_exact_share_and_broken_by_one_more() -> None:
    for acted in (10, 30, 70, 90, 110):
        rows = [promise_rows("a", THRESHOLD, [scored("clean", 0, acted // 10 + more, acted)])[0] for more in (0, 1)]
        assert [row["verdict"] for row in rows] == [HELD, FAILED]
        assert [verdict(row) for row in rows] == [HELD, FAILED]


def test_an_older_report_without_evaluations_is_judged_by_what_it_says() -> None:
    report = {
        **full_report(),
        "action": [{"arm": "softmax", "threshold": 0.5, "risk": 0.593, "coverage": 0.9, "max_risk": 0.1}],
    }
    assert "FAILED" in renderings(report)["terminal"]
    assert "14 of 15 items; failed" in renderings(report)["page"]


def test_the_threshold_is_one_that_calibration_rows_prove_and_the_report_says_for_what() -> None:
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(2000, generator=generator, dtype=torch.float64)
    correct = (torch.rand(2000, generator=generator, dtype=torch.float64) < confidence).double()
    validation = Prediction(confidence, target=correct, arm="a")
    chosen = chosen_threshold(validation, 0.1)
    row = guarantee_row("a", chosen, validation)
    assert chosen == select_threshold(confidence, correct, 0.1, 0.1)
    assert row["fitting_threshold"] == action_threshold(confidence, correct, 0.1).threshold < row["threshold"]
    lines = guarantee_lines({"guarantee": [row]})
    assert "with probability 90 % over the draw of 2,000 calibration rows" in lines[0]
    assert "no shift" in lines[1]


def test_too_few_calibration_rows_promise_nothing_and_the_report_says_why() -> None:
    few = Prediction(torch.full((5,), 0.99), target=torch.ones(5), arm="a")
    chosen = chosen_threshold(few, 0.1)
    row = json.loads(json.dumps(guarantee_row("a", chosen, few), allow_nan=False))
    assert row["threshold"] is None
    assert "It takes at least" in guarantee_lines({"guarantee": [row]})[0]
    (judged,) = promise_rows("a", chosen, [scored("clean", 0, 5)])
    assert (judged["verdict"], judged["acted"]) == (IDLE, 0)
