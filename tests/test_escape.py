"""No name becomes markup, steers a terminal or breaks a table, in whatever the package shows."""

import io
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from report_example import full_report

from moe_posterior import PosteriorRouter, escape
from moe_posterior.cli import main

pytest.importorskip("lightning")
markdown_it = pytest.importorskip("markdown_it")

HOSTILE = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror=alert(1)>&lt;'",
    "a|b||c",
    "a\n\n# b\r\n| c |\n|---|\v\f\x85\u2028\u2029d",
    "\x1b]8;;http://evil.example\x1b\\click\x1b]8;;\x1b\\",
    "\x1b]0;owned\x07\x1b[2J\x1b[H\x9b2J\x90q\x9c",
    "\u202egnp.exe\u2066\u200b\u200f\ufeff",
    "[x](javascript:alert(1)) ![y](http://evil.example/p.png) <http://evil.example>",
    "[red]bold[/red] [link=http://evil.example]x[/link] [/]",
    "**b** _i_ `c` ~~s~~ \\ ``` $x$ http://evil.example",
    "$\\frac{1}{$ $$",
    "_hidden",
    "lone \ud800 surrogate \0",
    "=cmd|'/c calc'!A1",
]
CALM = "name"


def renamed(value: object, name: str) -> Any:
    """A report whose arms, shifts, subsets and whatever else it names carry a name beside their own."""
    if isinstance(value, dict):
        keys = {"softmax", "posterior", "training", "torch", "hard"}
        return {f"{key} {name}" if key in keys else key: renamed(item, name) for key, item in value.items()}
    if isinstance(value, list):
        return [renamed(item, name) for item in value]
    kept = ("clean", "all shifts", "overall", "accuracy", "nll", "brier", "ece", "shifted", "held", "failed")
    return f"{value} {name}" if isinstance(value, str) and value not in kept and "/" not in value else value


def report(name: str) -> dict[str, Any]:
    made = renamed(full_report(), name)
    made["schema"] = full_report().get("schema")
    return made


def report_on_the_terminal(name: str, folder: Path) -> str:
    from rich.console import Console

    from moe_posterior.report import render_table

    stream = io.StringIO()
    render_table(report(name), Console(file=stream, width=2000))
    return stream.getvalue()


def benchmark_tables(name: str) -> list[Any]:
    from moe_posterior.results.tables import Table

    return [Table([name, name], [[name, name], [name, "1"]], name, name)]


def benchmark_on_the_terminal(name: str, folder: Path) -> str:
    from rich.console import Console

    from moe_posterior.results.tables import print_tables

    stream = io.StringIO()
    print_tables(benchmark_tables(name), Console(file=stream, width=2000))
    return stream.getvalue()


def swap_report(name: str, folder: Path) -> str:
    from moe_posterior.huggingface import Layer, SwappedModel

    layers = [Layer(name, name, "swapped", "", 8, 2), Layer(name, name, "refused", name, 8, 2)]
    return str(SwappedModel(torch.nn.Identity(), "prior", layers))


def audited(name: str, folder: Path) -> Path:
    from moe_posterior.audit import AuditLog

    name = name.replace("\ud800", "")  # which a log refuses
    place = folder / str(sum(map(ord, name)))
    if not place.exists():
        rows = np.random.default_rng(0).normal(size=(60, 4))
        with AuditLog(place) as log:
            router = PosteriorRouter(3, 4, 2)
            router._audit = log.follow(router, name)
            router.fit(rows)
            router.resolve_batch(router.route_batch(rows).ids, np.ones(60))
    return place


def command(*arguments: str) -> Callable[[str, Path], str]:
    def run(name: str, folder: Path) -> str:
        place = str(audited(name, folder))
        stream, before = io.StringIO(), (sys.stdout, sys.stderr)
        sys.stdout = sys.stderr = stream
        try:
            main(["audit", arguments[0], place, *arguments[1:]])
        finally:
            sys.stdout, sys.stderr = before
        return stream.getvalue()

    return run


def error_of_a_command(name: str, folder: Path) -> str:
    stream, before = io.StringIO(), sys.stderr
    sys.stderr = stream
    try:
        main(
            [
                "evaluate",
                "--run",
                str(folder / name.replace("/", "").replace("\0", "").encode("utf-8", "replace").decode()),
            ]
        )
    finally:
        sys.stderr = before
    return stream.getvalue()


TERMINALS = {
    "report": report_on_the_terminal,
    "benchmark": benchmark_on_the_terminal,
    "swap report": swap_report,
    "audit show": command("show"),
    "audit stats": command("stats"),
    "audit verify": command("verify", "--decisions"),
    "audit replay": command("replay"),
    "audit watch": command("watch", "--once"),
    "error": error_of_a_command,
}


def report_in_markdown(name: str, folder: Path) -> str:
    from moe_posterior.report import to_markdown

    return to_markdown(report(name))


def model_card(name: str, folder: Path) -> str:
    from moe_posterior.report import to_card

    return to_card(report(name))


def benchmark_in_markdown(name: str, folder: Path) -> str:
    from moe_posterior.results.tables import to_markdown

    return to_markdown(*benchmark_tables(name))


def study_in_markdown(name: str, folder: Path) -> str:
    from moe_posterior.results.tables import Table
    from moe_posterior.training.study.tables import to_markdown

    return to_markdown([Table([name, name], [[name, name]], name, name)], {"command": name})


def survey_in_markdown(name: str, folder: Path) -> str:
    from model_survey.survey import as_markdown

    row = {"model_type": name, "routers": [name], "status": "swapped", "checks": {}, "reason": name}
    return as_markdown([row, row], "5.0")


MARKDOWNS = {
    "report": report_in_markdown,
    "model card": model_card,
    "benchmark": benchmark_in_markdown,
    "study": study_in_markdown,
    "survey": survey_in_markdown,
}


def report_page(name: str, folder: Path) -> str:
    from moe_posterior.report import to_html

    return to_html(report(name))


def audit_page(name: str, folder: Path) -> str:
    place = audited(name, folder)
    assert main(["audit", "export", str(place), "--html", str(folder / "page.html")]) == 0
    return (folder / "page.html").read_text(encoding="utf-8")


PAGES = {"report": report_page, "audit": audit_page}


@pytest.mark.parametrize("renderer", TERMINALS)
def test_no_name_steers_a_terminal_or_breaks_a_line(renderer: str, tmp_path: Path) -> None:
    lines = len(TERMINALS[renderer](CALM, tmp_path).split("\n"))
    for name in HOSTILE:
        text = TERMINALS[renderer](name, tmp_path)
        assert all(c.isprintable() or c == "\n" for c in text), name
        assert len(text.split("\n")) == lines or renderer == "error", name  # an error may have several lines


@pytest.mark.parametrize("renderer", MARKDOWNS)
def test_no_name_becomes_markup_in_markdown(renderer: str, tmp_path: Path) -> None:
    calm = elements(MARKDOWNS[renderer](CALM, tmp_path))
    assert calm
    for name in HOSTILE:
        text = MARKDOWNS[renderer](name, tmp_path)
        assert all(c.isprintable() or c == "\n" for c in text), name
        assert elements(text) == calm, name
        outside = re.sub("`[^`]+`", "", text)
        assert "<script" not in outside  # also where backslashes mean nothing
        assert "<img" not in outside


@pytest.mark.parametrize("renderer", PAGES)
def test_no_name_becomes_markup_on_a_page(renderer: str, tmp_path: Path) -> None:
    calm = tags(PAGES[renderer](CALM, tmp_path))
    for name in HOSTILE:
        text = PAGES[renderer](name, tmp_path)
        assert all(c.isprintable() or c in "\n\t" for c in text), name
        assert tags(text) == calm, name


def test_every_name_can_be_drawn(tmp_path: Path) -> None:
    from moe_posterior.report import posterior_heatmap, reliability_diagram

    for name in HOSTILE:
        reliability_diagram(report(name), tmp_path / "reliability.png")
        posterior_heatmap(torch.rand(2, 2), torch.ones(2, 2), tmp_path / "competence.png", [name, name])
        assert not escape.label(name).startswith("_")


def test_no_name_becomes_a_formula(tmp_path: Path) -> None:
    for name in HOSTILE:
        place = audited(name, tmp_path)
        assert main(["audit", "export", str(place), "--out", str(tmp_path / "csv"), "--format", "csv"]) == 0
        text = (tmp_path / "csv" / "decisions.csv").read_text(encoding="utf-8")
        assert all(c.isprintable() or c == "\n" for c in text), name
        assert '"=' not in text
        assert len(text.splitlines()) == 61


def test_what_is_shown_can_still_be_read() -> None:
    for text in ("robust, 95 %", "Größe", "日本語", "softmax", "a-b.c (d)"):
        assert escape.terminal(text) == escape.html(text) == escape.label(text) == escape.markdown(text) == text


def elements(text: str) -> list[str]:
    """The kinds of a Markdown document's elements, in order, without its texts."""
    tokens = markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)
    found = [[token.type, *(child.type for child in token.children or [])] for token in tokens]
    return [kind for kinds in found for kind in kinds if kind not in ("text", "text_special")]


def tags(document: str) -> list[tuple[str, list[str]]]:
    found: list[tuple[str, list[str]]] = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            # A column sorts as numbers or not, and a long cell wraps
            found.append((tag, [name for name, _ in attrs if name != "class"]))

    parser = Tags()
    parser.feed(document)
    parser.close()
    return found
