"""The page on a phone: nothing is wider than the screen."""

import json
from pathlib import Path

import pytest
from browser import CHROMIUM, browse
from report_example import full_report

from moe_posterior.report.html import to_html

DEMO = Path(__file__).resolve().parents[2] / "results" / "demo" / "report.json"
# Whatever reaches beyond the page, unless an ancestor scrolls it.
PROBE = """
  const width = page.documentElement.clientWidth;
  const scrolled = one => {
    for (let up = one.parentElement; up; up = up.parentElement)
      if (["auto", "scroll"].includes(view.getComputedStyle(up).overflowX)) return true;
    return false;
  };
  const beyond = [...page.body.querySelectorAll("*")].filter(
    one => one.getBoundingClientRect().right > width + 1 && !scrolled(one));
  return { width, page: page.documentElement.scrollWidth, beyond: beyond.map(one => one.outerHTML.slice(0, 80)),
           verdict: page.querySelector("#verdict").getBoundingClientRect().top };
"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the PATH (Debian: chromium)")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("report", [full_report(), json.loads(DEMO.read_text())], ids=["full", "demo"])
def test_nothing_is_wider_than_a_phone_and_the_verdict_comes_first(report: dict, dark: bool, tmp_path: Path) -> None:
    found, console = browse(to_html(report), PROBE, tmp_path, width=390, dark=dark)
    assert console == []
    assert found["width"] <= 390
    assert found["page"] <= found["width"]
    assert found["beyond"] == []
    assert found["verdict"] < 1000
