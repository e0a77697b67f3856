"""Page, model card, Markdown table and terminal table mark the same differences, whichever arm they favour."""

import io
import re

import pytest
from markdown_it import MarkdownIt
from report_example import METRICS, full_report
from rich.console import Console

from moe_posterior.report import render_table, to_card, to_html, to_markdown
from moe_posterior.report.marks import BETTER, WORSE
from moe_posterior.report.schema import TITLES

Marks = dict[tuple[str, str], str | None]  # (arm, metric) -> mark, of the clean rows overall


def report_with(sign: dict[tuple[str, str], int], arms: tuple[str, ...] = ("softmax", "posterior")) -> dict:
    """Two arms or more; the difference of (arm, metric) from the first arm is credibly positive, negative or neither."""
    report = full_report()
    own = [
        one for one in report["records"] if (one["arm"], one["subset"], one["shift"]) == ("softmax", "overall", "clean")
    ]
    report |= {"arms": list(arms), "subsets": {"overall": None}}
    report["records"] = [{**one, "arm": arm} for arm in arms for one in own]
    ends = {1: (0.01, 0.03), -1: (-0.03, -0.01), 0: (-0.01, 0.02)}
    report["paired"] = [
        {**one, "baseline": "softmax", "value": 0.02 * way, "low": ends[way][0], "high": ends[way][1]}
        for one in report["records"]
        if one["arm"] != "softmax"
        for way in [sign.get((one["arm"], one["metric"]), 0)]
    ]
    return report


def mark(text: str, bold: bool) -> str | None:
    return BETTER if bold else WORSE if "†" in text else None


def of_page(report: dict) -> Marks:
    head, *rows = re.findall(r"<tr>.*?</tr>", to_html(report).split('id="results"')[1].split("</table>")[0], flags=re.S)
    titles = re.findall(r"<th[^>]*>(.*?)</th>", head)
    found: Marks = {}
    for row in rows:
        cells = dict(zip(titles, re.findall(r"<td[^>]*>(.*?)</td>", row), strict=True))
        found |= {
            (cells["arm"], name): mark(cells[title], "<strong>" in cells[title]) for name, title in TITLES.items()
        }
    return found


def of_markdown(text: str) -> Marks:
    """Of the first table with a column for every metric."""
    found: Marks = {}
    titles: list[str] = []
    row: list[tuple[str, bool]] = []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "tr_open":
            row = []
        elif token.type == "inline":
            plain = "".join(child.content for child in token.children or [])
            row.append((plain, any(child.type == "strong_open" for child in token.children or [])))
        elif token.type == "tr_close" and set(TITLES.values()) <= {cell for cell, _ in row}:
            titles = [cell for cell, _ in row]
        elif token.type == "tr_close" and titles:
            cells = dict(zip(titles, row, strict=True))
            found |= {(cells["arm"][0], name): mark(*cells[title]) for name, title in TITLES.items()}
        elif token.type == "table_close" and titles:
            break
    return found


def of_terminal(report: dict) -> Marks:
    file = io.StringIO()
    render_table(report, Console(file=file, width=80, color_system=None))
    found: Marks = {}
    for line in file.getvalue().splitlines():
        if line.split(" ")[0] in report["arms"] and "[" in line:
            signs = re.findall(r"\d(.)\[", line)
            assert len(signs) == len(TITLES)
            found |= {
                (line.split(" ")[0], name): {"*": BETTER, "†": WORSE, " ": None}[sign]
                for name, sign in zip(TITLES, signs, strict=True)
            }
    return found


def everywhere(report: dict) -> Marks:
    """The marks, which must be the same in all four."""
    page = of_page(report)
    assert page == of_markdown(to_card(report)) == of_markdown(to_markdown(report)) == of_terminal(report)
    return page


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("way", [1, -1])
def test_a_credible_difference_is_marked_on_both_sides_in_every_rendering(metric: str, way: int) -> None:
    wins = (way > 0) == (metric == "accuracy")
    marks = everywhere(report_with({("posterior", metric): way}))
    assert marks.pop(("posterior", metric)) == (BETTER if wins else WORSE)
    assert marks.pop(("softmax", metric)) == (None if wins else BETTER)
    assert len(marks) == 2 * (len(METRICS) - 1)
    assert set(marks.values()) == {None}


def test_nothing_is_marked_where_the_interval_touches_zero() -> None:
    report = report_with({})
    for pair in report["paired"]:
        pair["low"] = 0.0
    assert set(everywhere(report).values()) == {None}


def test_of_several_arms_each_stands_against_the_baseline_which_wins_only_over_all() -> None:
    arms = ("softmax", "posterior", "third")
    signs = {("posterior", "nll"): 1, ("third", "nll"): 1, ("posterior", "brier"): 1, ("third", "brier"): -1}
    marks = everywhere(report_with(signs, arms))
    assert [marks[arm, "nll"] for arm in arms] == [BETTER, WORSE, WORSE]
    assert [marks[arm, "brier"] for arm in arms] == [None, WORSE, BETTER]
    assert [marks[arm, "accuracy"] for arm in arms] == [None] * 3
