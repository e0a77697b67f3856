"""Sections, tables and figures as HTML strings, and the single file that holds them.

Functions take plain values and return HTML; all text is escaped. Only the ``html`` of a section, the ``svg`` of a figure and the
``body`` of details are markup already.
"""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from moe_posterior import escape
from moe_posterior.results.tables import Cell, Table, show, sort_key

LONG = 28  # characters beyond which a cell's text wraps


@dataclass(frozen=True)
class Section:
    """A part of the page, linked from its contents."""

    anchor: str  # unique on the page; letters, digits and hyphens
    title: str
    html: str


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph; ``kind`` is a class of the style sheet: "absent" or "note".

    >>> paragraph("a < b")
    '<p>a &lt; b</p>'
    """
    return f'<p class="{escape.html(kind)}">{escape.html(text)}</p>' if kind else f"<p>{escape.html(text)}</p>"


def details(summary: str, body: str) -> str:
    """Collapsed markup, expanded for printing by the page's script."""
    return f"<details><summary>{escape.html(summary)}</summary>{body}</details>"


def table(content: Table) -> str:
    """A table that scrolls sideways if too wide; columns can be sorted if scripts run.

    >>> '<th scope="col" class="number">n</th>' in table(Table(["group", "n"], [["<b>", 1200]]))
    True
    >>> '<td data-key="1200" class="number">1,200</td>' in table(Table(["group", "n"], [["<b>", 1200]]))
    True
    """
    marks = [' class="number"' if right else "" for right in content.right_aligned()]
    head = "".join(
        f'<th scope="col"{mark}>{escape.html(name)}</th>' for name, mark in zip(content.columns, marks, strict=True)
    )
    body = "\n".join(
        "<tr>" + "".join(_cell(value, mark) for value, mark in zip(row, marks, strict=True)) + "</tr>"
        for row in content.rows
    )
    caption = f"<caption>{escape.html(content.note)}</caption>" if content.note else ""
    label = escape.html(content.note or ", ".join(content.columns))
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{label}"><table class="sortable">{caption}'
        f"<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>"
    )


def figure(svg: Sequence[str], caption: str, legend: str = "", data: Table | None = None) -> str:
    """Drawings side by side under one legend, with a caption and the numbers behind them, collapsed."""
    panels = "".join(f'<div class="panel">{one}</div>' for one in svg)
    numbers = details("The numbers behind this figure", table(data)) if data else ""
    return (
        f'<figure>{legend}<div class="panels">{panels}</div>'
        f"<figcaption>{escape.html(caption)}</figcaption>{numbers}</figure>"
    )


def page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """A whole HTML document: style, script and figures inside, nothing fetched.

    A content security policy names the hashes of the style and the script, so nothing else could run even if text from
    the data were markup.

    >>> document = page("Report", "of a run", [Section("one", "First", paragraph("hello"))])
    >>> document.startswith("<!doctype html>"), "http" in document.replace("http-equiv", "")
    (True, False)
    """
    style, script = _resource("style.css"), _resource("script.js")
    policy = f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'"
    contents = "".join(
        f'<li><a href="#{escape.html(one.anchor)}">{escape.html(one.title)}</a></li>' for one in sections
    )
    parts = "\n".join(
        f'<section id="{escape.html(one.anchor)}"><h2>{escape.html(one.title)}</h2>\n{one.html}\n</section>'
        for one in sections
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{escape.html(title)}</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>{escape.html(title)}</h1>
<p>{escape.html(subtitle)}</p>
<button type="button" id="theme" hidden>Dark or light</button>
</header>
<nav aria-label="Contents"><ul>{contents}</ul></nav>
<main>
{parts}
</main>
<script>{script}</script>
</body>
</html>
"""


def _cell(value: object, mark: str) -> str:
    key = sort_key(value)
    sort = "" if isinstance(value, str) else f' data-key="{"" if key is None else escape.html(str(key))}"'
    text = escape.html(value.text if isinstance(value, Cell) else show(value))
    if isinstance(value, Cell) and value.strong:
        text = f"<strong>{text}</strong>"
    if isinstance(value, Cell) and value.more:
        text += f' <span class="more">{escape.html(value.more)}</span>'
    elif len(show(value)) > LONG:
        mark = ' class="long"'
    return f"<td{sort}{mark}>{text}</td>"


@cache
def _resource(name: str) -> str:
    return (files("moe_posterior.results.page") / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
