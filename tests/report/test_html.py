"""The report's web page and model card: complete, self-contained, escaped, and alive in a browser."""

import copy
import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from browser import CHROMIUM, browse
from markdown_it import MarkdownIt
from report_example import full_report

from moe_posterior.report.card import to_card
from moe_posterior.report.checklist import ABSENT, REQUIREMENTS, checklist
from moe_posterior.report.html import to_html
from moe_posterior.report.schema import SCHEMA
from moe_posterior.report.tables import configurations, identity_values
from moe_posterior.results.page import Axis, Series, line_chart, nice_ticks, table
from moe_posterior.results.tables import Table

ROOT = Path(__file__).resolve().parents[2]
RESULTS = sorted(ROOT.glob("results/*/report.json"))
VOID = {"meta", "link", "br", "img", "input", "hr"}
HOSTILE = "\"><img src=x onerror=alert(1)><script>alert(1)</script>&amp;'`|\n[x](javascript:alert(1)) **b**"
# The report's own words.
KEPT = {"clean", "all shifts", "overall", "hard", "accuracy", "nll", "brier", "ece", SCHEMA}
KEPT |= {"the model", "temperature", "pass", "fail", "cannot say"}
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the PATH (Debian: chromium)")


class Page(HTMLParser):
    """The elements of a document; refuses one that closes what it did not open."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.sections: dict[str, str] = {}
        self.tables: list[list[list[str]]] = []
        self.within = ""
        self.feed(document)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "section":
            self.within = dict(attrs)["id"]
            self.sections[self.within] = ""
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.within and "section" in self.open:
            self.sections[self.within] += data
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data

    def shape(self) -> list[tuple]:
        return [(tag, tuple(name for name in attrs)) for tag, attrs in self.elements]


@pytest.fixture(params=[*RESULTS, None], ids=lambda path: path.parent.name if path else "everything measured")
def report(request: pytest.FixtureRequest) -> dict:
    return json.loads(request.param.read_text()) if request.param else full_report()


def test_the_page_is_one_well_formed_file_that_refers_to_nothing_outside(report: dict) -> None:
    document = to_html(report)
    page = Page(document)
    assert len(document.encode()) < 1_000_000
    assert not re.search(r"https?://|//[a-z]|url\(|@import", document)
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    for tag, attrs in page.elements:
        assert attrs.get("src") is None, tag
        if target := attrs.get("href"):
            assert target == "data:," or target.removeprefix("#") in ids
        for name in (attrs.get("aria-labelledby") or "").split():
            assert name in ids
    assert all(len({len(row) for row in rows}) == 1 for rows in page.tables)


def test_rendering_is_pure(report: dict) -> None:
    before = copy.deepcopy(report)
    assert to_html(report) == to_html(report)
    assert to_card(report) == to_card(report)
    assert str(report) == str(before)


def hostile(value: object) -> object:
    """The same report with a payload in every text that could come from a user."""
    if isinstance(value, str):
        return value if value in KEPT else value + HOSTILE
    if isinstance(value, dict):
        return {
            key + HOSTILE if key in {"softmax", "posterior", "training", "torch"} else key: hostile(item)
            for key, item in value.items()
        }
    return [hostile(item) for item in value] if isinstance(value, list) else value


def test_no_text_of_the_data_becomes_markup_in_the_page() -> None:
    attacked = Page(to_html(hostile(full_report())))
    calm = Page(to_html(full_report()))
    unmarked = [
        [(tag, tuple(n for n in names if n != "class")) for tag, names in one.shape()] for one in (attacked, calm)
    ]
    assert unmarked[0] == unmarked[1]  # only classes may differ: long texts wrap
    assert sum("<script>alert(1)</script>" in cell for rows in attacked.tables for row in rows for cell in row) > 10


def rendered_card(report: dict) -> list:
    return MarkdownIt("commonmark", {"html": True}).enable("table").enable("strikethrough").parse(to_card(report))


def inline_kinds(tokens: list) -> list[str]:
    return [child.type for token in tokens for child in (token.children or []) if child.type != "text"]


def test_no_text_of_the_data_becomes_markup_in_the_card() -> None:
    attacked, calm = rendered_card(hostile(full_report())), rendered_card(full_report())
    assert [token.type for token in attacked] == [token.type for token in calm]
    assert inline_kinds(attacked) == inline_kinds(calm)
    assert set(inline_kinds(calm)) == {"strong_open", "strong_close"}


def test_the_card_has_the_values_of_the_report(report: dict) -> None:
    card = to_card(report)
    for one in report["records"]:
        if (one["subset"], one["metric"], one["severity"]) == ("overall", "ece", 0):
            assert rf"{one['value']:.3f} \[{one['low']:.3f}, {one['high']:.3f}\]" in card
    tables = [token for token in rendered_card(report) if token.type == "table_open"]
    assert len(tables) >= (4 if "provenance" in report else 8)


# What the page no longer holds when a key is gone, and where it says so.
SECTIONS = {
    "subgroups": ("subgroups", "0.123", 1),
    "shared_confidence": ("configurations", "87.0 %", 1),
    "calibrators": ("calibrators", "0.100 [0.080, 0.120]", 1),
    "rce": ("calibrators", "ρ (KL divergence, nats)", 1),
    "online": ("calibrators", "outcomes delivered", 1),
    "action": ("action", "0.620", 1),
    "risk_coverage": ("action", "Acting on the most confident", 1),
    "reliability": ("reliability", "confidence of the top label", 1),
    "configurations": ("configurations", "gap (confidence − accuracy)", 1),
    "conditions": ("conditions", "cannot say", 1),
    "baselines": ("baselines", "constant confidence (0.900)", 1),
    "disagreement": ("abstention", "10 %", 1),
    "records": ("results", "ECE, mean over shifts", 1),
    "notes": ("notes", "bootstrap intervals", 1),
}


@pytest.mark.parametrize("key", SECTIONS)
def test_a_section_that_was_not_measured_says_so_and_shows_nothing(key: str) -> None:
    anchor, text, times = SECTIONS[key]
    whole = Page(to_html(full_report())).sections[anchor]
    without = Page(to_html({name: value for name, value in full_report().items() if name != key})).sections[anchor]
    assert text in whole.replace("\n", "")
    assert ABSENT not in whole.lower()
    assert text not in without.replace("\n", "")
    assert without.lower().count(ABSENT) == times


def test_an_empty_report_is_a_page_of_absences() -> None:
    page = Page(to_html({}))
    assert all(ABSENT in text.lower() for text in page.sections.values())
    assert "svg" not in {tag for tag, _ in page.elements}
    assert all(item.found is None for item in checklist({}))
    assert ABSENT in to_card({})


@pytest.mark.parametrize(
    ("requirement", "value", "keys"),
    [
        ("final routed aggregate", "softmax, clean: ECE 0.040", ["records"]),
        ("Routing type", "posterior: posterior, top-2 of 4", ["identity"]),
        ("Model version", "small net 1.2", ["identity"]),
        ("Training and evaluation", "evaluation: digits test", ["identity"]),
        ("Shift scenarios", "fog", ["shifts", "records"]),
        ("Calibration metric", "top-label ECE", ["metric", "schema"]),
        ("Binning", "equal mass, 2 bins, norm l2, debiased", ["metric", "schema"]),
        ("Subgroup", "2 groups; worst of softmax: right, ECE 0.123", ["subgroups", "subsets"]),
        ("Temperature", "none, temperature", ["calibrators"]),
        ("Action threshold", "held, risk 0.031, coverage 0.620; act from 0.850, promised at most 0.050", ["action"]),
        ("identical displayed", "softmax: 870 of 1,000 inputs", ["shared_confidence"]),
        ("monitoring", "4 configurations measured, widest gap 0.300", ["configurations"]),
        (
            "Abstention",
            "above 0.2 On clean, for softmax: abstaining by disagreement is worse",
            ["operation", "disagreement"],
        ),
        (
            "Routing logs",
            "logs/routing, 1,200 decisions, its chain verified, last hash 5f0c",
            ["operation", "audit_log"],
        ),
        (
            "Operating conditions",
            "indoors; English. softmax, tolerance 0.050, sets within 1; outside 1; not enough rows on 1; holds on: clean",
            ["operation", "conditions"],
        ),
    ],
)
def test_every_item_of_the_standard_has_its_value_or_none(requirement: str, value: str, keys: list[str]) -> None:
    def found(report: dict) -> str | None:
        (item,) = [one for one in checklist(report) if requirement in one.requirement]
        return item.found

    assert value in found(full_report())
    assert value in Page(to_html(full_report())).sections["standard"]
    assert found({key: part for key, part in full_report().items() if key not in keys}) is None
    assert len(REQUIREMENTS) == 15


def test_the_provenance_names_what_the_identity_leaves_out() -> None:
    report = json.loads((ROOT / "results/demo/report.json").read_text())
    known = identity_values(report)
    assert known["seed"] == "42"
    assert known["command"] == report["provenance"]["command"]
    assert "DigitsNet" in known["model"]
    assert identity_values({**report, "identity": {"seed": 0, "model": "mine"}})["model"] == "mine"
    assert identity_values({**report, "identity": {"seed": 0}})["seed"] == "0"


def test_configurations_stand_by_their_gap_and_small_ones_last() -> None:
    rows = configurations(full_report()).rows
    assert [row[0] for row in rows] == [1, 0, 3, 2]
    assert [row[-1].text for row in rows] == ["−0.300", "0.020", "–", "0.990"]
    assert rows[0][-1].more == "[−0.400, −0.200]"


def test_what_has_no_value_is_a_dash() -> None:
    content = Table(["a", "b"], [[None, math.nan], [0.5, math.inf]])
    cells = Page(table(content)).tables[0]
    assert cells == [["a", "b"], ["–", "–"], ["0.500", "∞"]]


def test_a_subset_without_rows_renders() -> None:
    report = full_report()
    for one in report["records"]:
        if one["subset"] == "hard":
            one.update(n=0, value=None, low=None, high=None)
    for one in report["paired"]:
        one.update(value=None, low=None, high=None)
    (rows,) = [
        rows for rows in Page(to_html(report)).tables if rows[0][:5] == ["evaluation", "subset", "n", "arm", "ECE ↓"]
    ]
    hard = [row for row in rows if row[1] == "hard"]
    assert [row[4:] for row in hard] == [["–"] * 5] * 4


def test_points_lie_where_their_values_are() -> None:
    x_axis, y_axis = Axis("x", 0, 2, [0, 1, 2]), Axis("y", -1, 1, [-1, 0, 1])
    x, y = [0.0, 0.5, None, 2.0], [-1.0, 0.25, 0.0, math.nan]
    svg = line_chart("c", "t", "d", [Series("s", 0, x, y)], x_axis, y_axis)
    frame = next(attrs for tag, attrs in Page(svg).elements if tag == "rect")
    left, top, width, height = (float(frame[name]) for name in ("x", "y", "width", "height"))
    found = [(float(attrs["cx"]), float(attrs["cy"])) for tag, attrs in Page(svg).elements if tag == "circle"]
    wanted = [(left + width * a / 2, top + height * (1 - b) / 2) for a, b in [(0.0, -1.0), (0.5, 0.25)]]
    assert found == [pytest.approx(point, abs=0.06) for point in wanted]


def test_bars_and_whiskers_have_the_size_of_their_shares_and_intervals() -> None:
    axis = Axis("p", 0, 1, [0, 1])
    one = Series("s", 0, [0.25, 0.75], [0.5, 0.5], [0.4, None], [0.7, None], bars=[0.2, 0.8])
    svg = line_chart("c", "t", "d", [one], axis, axis, whiskers=True)
    tall = [float(attrs["height"]) for tag, attrs in Page(svg).elements if attrs.get("class") == "bar"]
    assert tall[1] / tall[0] == pytest.approx(4, rel=0.02)
    (whisker,) = [attrs["d"] for tag, attrs in Page(svg).elements if attrs.get("class") == "whisker"]
    frame = next(attrs for tag, attrs in Page(svg).elements if tag == "rect")
    high, low = (float(number) for number in re.match(r"M[\d.]+ ([\d.]+)V([\d.]+)", whisker).groups())
    assert (low - high) / float(frame["height"]) == pytest.approx(0.3, abs=0.001)


@pytest.mark.parametrize("high", [1e-4, 0.037, 0.23, 1.0, 7.0, 480.0])
def test_ticks_are_few_round_and_inside(high: float) -> None:
    ticks = nice_ticks(0, high)
    assert 3 <= len(ticks) <= 8
    assert ticks[0] == 0
    assert ticks[-1] <= high * (1 + 1e-9)
    gaps = {f"{b - a:.6e}" for a, b in pairwise(ticks)}
    assert len(gaps) == 1
    assert gaps.pop()[:4] in {"1.00", "2.00", "2.50", "5.00"}


PROBE = """
  for (const one of page.querySelectorAll("details")) one.open = true;
  const column = (table, i) => [...table.tBodies[0].rows].map((row) => row.cells[i].dataset.key ?? row.cells[i].textContent);
  const tables = [...page.querySelectorAll("table.sortable")].map((table) => [...table.tHead.rows[0].cells].map((head, i) => {
    const button = head.querySelector("button"), orders = [column(table, i)], states = [];
    for (const _ of [1, 2]) {
      button.click();
      orders.push(column(table, i));
      states.push(head.getAttribute("aria-sort"));
    }
    return {title: button.textContent, orders, states, sorted: table.querySelectorAll("[aria-sort]").length};
  }));
  const size = (one) => { const box = one.getBoundingClientRect(); return [box.width, box.height]; };
  const style = view.getComputedStyle(page.body), colours = [style.backgroundColor];
  page.getElementById("theme").click();
  colours.push(view.getComputedStyle(page.body).backgroundColor);
  return {
    tables, colours,
    figures: [...page.querySelectorAll("figure .panel svg")].map(size),
    texts: [...page.querySelectorAll("figure .panel svg text")].map((text) => {
      const box = text.getBoundingClientRect(), svg = text.closest("svg").getBoundingClientRect();
      return box.left >= svg.left - 1 && box.right <= svg.right + 1 && box.top >= svg.top - 1 && box.bottom <= svg.bottom + 1;
    }),
    overflow: page.documentElement.scrollWidth - view.innerWidth,
  };
"""


@needs_chromium
@pytest.mark.parametrize(("width", "dark"), [(1000, False), (400, True)])
def test_the_page_lives_in_a_browser(tmp_path: Path, report: dict, width: int, dark: bool) -> None:
    found, console = browse(to_html(report), PROBE, tmp_path, width, dark)
    assert console == []
    drawn = to_html(report).count('role="img"')
    assert len(found["figures"]) == drawn >= 4
    assert all(wide > 200 and tall > 150 for wide, tall in found["figures"])
    assert all(found["texts"]), "text outside its figure"
    assert found["overflow"] <= 0
    light_paper, dark_paper = "rgb(255, 255, 255)", "rgb(20, 24, 29)"
    assert found["colours"] == ([dark_paper, light_paper] if dark else [light_paper, dark_paper])


def order(keys: list[str]) -> list[str]:
    """Ascending: numbers by value where all are, text otherwise, nothing last; a plain re-computation."""
    present = [key for key in keys if key]
    numeric = all(re.fullmatch(r"-?[\d.]+(e-?\d+)?", key) for key in present)
    return sorted(present, key=float if numeric else str.casefold) + [""] * (len(keys) - len(present))


@needs_chromium
def test_a_click_on_a_header_sorts_its_column_and_another_reverses_it(tmp_path: Path) -> None:
    found, _ = browse(to_html(full_report()), PROBE, tmp_path)
    columns = [column for one in found["tables"] for column in one]
    numbers = [
        column for column in columns if column["title"] in ("n", "ECE ↓", "gap (confidence − accuracy)", "severity")
    ]
    assert len(numbers) >= 4
    for column in columns:
        assert column["states"] == ["ascending", "descending"]
        assert column["sorted"] == 1
        first, ascending, descending = column["orders"]
        assert sorted(first) == sorted(ascending) == sorted(descending)
    for column in numbers:
        first, ascending, descending = column["orders"]
        assert ascending == order(first)
        empty = [key for key in first if not key]
        assert descending == order(first)[: len(first) - len(empty)][::-1] + empty
    assert any(column["orders"][0] != column["orders"][1] for column in numbers)


@needs_chromium
def test_the_browser_check_would_see_an_error_and_a_blocked_script(tmp_path: Path) -> None:
    document = to_html(full_report())
    for spoiled, message in [
        (document.replace("</body>", "<script>alert(1)</script></body>"), "Content Security Policy"),
        (document.replace('id="theme"', 'id="other"'), "TypeError"),
    ]:
        _, console = browse(spoiled, "return 1", tmp_path)
        assert any(message in line for line in console), console
