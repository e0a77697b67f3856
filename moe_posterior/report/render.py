"""A computed report as a terminal table, as Markdown and as a JSON file."""

import json
import os
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_posterior.errors import InvalidArgumentError, MissingDependencyError
from moe_posterior.escape import markdown, terminal
from moe_posterior.files.atomic import write_text
from moe_posterior.report import promise
from moe_posterior.report.marks import BETTER, MEANING, WORSE, WORSE_SIGN, key_of, marks_of, where_of
from moe_posterior.report.missing import left_out_lines
from moe_posterior.report.places import ALL_SHIFTS, base_of, judged_of, members_of, place_name, sets_of, size
from moe_posterior.report.schema import METRICS, OVERALL, TITLES, Report
from moe_posterior.report.verdict import verdict_of
from moe_posterior.results.tables import grid

if TYPE_CHECKING:
    from rich.console import Console

TERMINAL_SIGNS = {BETTER: "*", WORSE: WORSE_SIGN, None: " "}  # in place of the blank before the interval
CELL_WIDTH = len(".912*[.905,.918]")


@dataclass(frozen=True)
class _Row:
    """One arm on one evaluation and subset."""

    evaluation: str
    subset: str
    n: str  # how many predictions, and of how many rows
    arm: str
    cells: tuple[tuple[str, str | None], ...]  # text and mark, in the order of METRICS
    floor: float | None  # of the ECE, by noise alone


def render_table(report: Report, console: "Console | None" = None) -> None:
    """Print the verdict, whether the action threshold's promise held, then a table: a block per evaluation and subset, a line per arm.

    The arms stand one above the other, so that the eye compares numbers in a column. Shown: the stored test
    rows and the mean of all shifted sets for every subset, each shift (mean over its severities) overall; the rest is in the dict.

    Args:
        report: from :func:`~moe_posterior.report.evaluate_predictions`.
        console: where to print; by default the standard output.

    Raises:
        MissingDependencyError: without rich.
    """
    try:
        from rich.console import Console, Group
        from rich.table import Table
        from rich.text import Text
    except ImportError as error:
        raise MissingDependencyError("rich", "evaluate") from error

    def line(first: str, cells: Iterable[str], style: str = "") -> Table:
        grid = Table.grid(padding=(0, 1, 0, 0))
        grid.add_column(width=arm_width, no_wrap=True)
        for _ in METRICS:
            grid.add_column(width=CELL_WIDTH, no_wrap=True)
        grid.add_row(Text(terminal(first), style), *(Text(cell, style) for cell in cells))
        return grid

    arm_width = max(len(terminal(arm)) for arm in report["arms"])
    lines: list = [Text("Verdict", "bold"), *(Text(terminal(one)) for one in verdict_of(report).lines), Text("")]
    lines += [
        Text(terminal(text), "bold" if text.startswith(f"  {promise.FAILED.upper()}") else "")
        for text in _promise_lines(report)
    ]
    lines += [Text(_title(report), "italic"), line("", (TITLES[metric] for metric in METRICS), "bold")]
    rows, previous = list(_rows(report)), None
    for row in rows:
        if (row.evaluation, row.subset) != previous:
            previous = (row.evaluation, row.subset)
            lines.append(Text(terminal(f"── {row.evaluation}, {row.subset} (n = {row.n})"), "dim"))
            members = [one for one in rows if (one.evaluation, one.subset) == previous]
            lines += [Text(terminal(text), "dim") for text in _floors(members)]
        lines.append(line(row.arm, (text.replace(" ", TERMINAL_SIGNS[mark], 1) for text, mark in row.cells)))
    if missing := left_out_lines(report):
        lines.append(Text(textwrap.fill(terminal(f"Left out: {'; '.join(missing)}."), 80)))
    (console or Console()).print(
        Group(*lines, Text(textwrap.fill(f"*: better; {MEANING}; {where_of(report)}", 80), "italic"))
    )


def to_markdown(report: Report) -> str:
    """The same in Markdown, ending in a newline; the better arm is bold, a worse one carries a dagger."""
    columns = ["evaluation", "subset", "n", "arm", *(TITLES[metric] for metric in METRICS)]
    rows = []
    for row in _rows(report):
        cells = [_marked(text, mark) for text, mark in row.cells]
        cells[-1] += "" if row.floor is None else f", noise {_short(row.floor)}"
        rows.append([markdown(row.evaluation), markdown(row.subset), row.n, markdown(row.arm), *cells])
    right = [name == "n" or name in TITLES.values() for name in columns]
    legend = f"Bold: better; {MEANING}; {where_of(report)}. Noise: the plain ECE that noise alone shows."
    missing = [f"Left out: {markdown('; '.join(lines))}." for lines in [left_out_lines(report)] if lines]
    verdict = "\n".join(f"- {markdown(line)}" for line in verdict_of(report).lines)
    parts = [
        "**Verdict**",
        verdict,
        *_promise_markdown(report),
        f"**{_title(report)}**",
        grid(columns, rows, right),
        legend,
        *missing,
    ]
    return "\n\n".join(parts) + "\n"


def write_json(report: Report, path: str | os.PathLike[str]) -> None:
    """Write the report as strict JSON, whole or not at all: readers never see half a file.

    Args:
        report: any JSON-serialisable dict; NaN and infinity must already be None.
        path: replaced if it exists; its folder must exist.

    Raises:
        InvalidArgumentError: the report holds something that strict JSON cannot; the old file stays.
    """
    try:
        text = json.dumps(report, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(f"report must be strict JSON: {error}") from error
    write_text(path, text)


def _title(report: Report) -> str:
    what = judged_of(report)[4:].capitalize()
    return f"{what}: {report['n_bins']}-bin debiased ECE, 95 % intervals ({report['resamples']:,} resamples)"


def _promises(report: Report) -> tuple[str, list[Mapping[str, Any]]]:
    """What was promised and how often it held, and the rows that say where."""
    found = report.get("action") or []
    rows = [found] if isinstance(found, Mapping) else list(found)
    return promise.sentence(rows), [row for row in promise.summary(rows) if promise.verdict(row)]


def _promise_lines(report: Report) -> Iterator[str]:
    said, rows = _promises(report)
    if not said:
        return
    yield from textwrap.wrap(f"Action threshold. {said}", 80)
    arm = None
    for row in rows:
        if row.get("arm") != arm:
            arm = row.get("arm")
            threshold = row.get("threshold")
            yield (
                f"{arm}, acting from confidence {_short(threshold)}:"
                if threshold is not None
                else f"{arm}, never acting:"
            )
        failed, where = promise.verdict(row) == promise.FAILED, promise.verdict_text(row)
        some = f"; {where}" if failed and where != promise.FAILED else ""
        word = promise.FAILED.upper() if failed else promise.verdict(row)
        yield f"  {word:<7} {promise.place(row)}: {_risk(row)}{some}"
    yield ""


def _promise_markdown(report: Report) -> Iterator[str]:
    said, rows = _promises(report)
    if not said:
        return
    yield f"**Action threshold.** {markdown(said)}"
    cells = []
    for row in rows:
        found = markdown(promise.verdict_text(row))
        found = f"**{found}**" if promise.verdict(row) == promise.FAILED else found
        cells.append([markdown(row.get("arm") or ""), markdown(promise.place(row)), found, _risk(row)])
    yield grid(["arm", "evaluation", "promise", "share wrong, and coverage"], cells, [False] * 4)


def _risk(row: Mapping[str, Any]) -> str:
    """``.293 [.27,.31], acts on 97 %``: the share wrong and its interval, and the coverage."""
    coverage = f"acts on {100 * row['coverage']:.0f} %" if row.get("coverage") is not None else ""
    if row.get("risk") is None:
        return coverage
    low, high = row.get("interval") or (None, None)
    interval = "" if low is None or high is None else f" [{_short(low)},{_short(high)}]"
    return ", ".join(part for part in (f"{_short(row['risk'])}{interval}", coverage) if part)


def _rows(report: Report) -> Iterator[_Row]:
    """The rows worth reading: the stored test rows and the mean of all sets for each subset, then each shift overall."""
    records = {key_of(record): record for record in report["records"]}
    marks, sets, base = marks_of(report), sets_of(report), base_of(report)
    shifts = list(dict.fromkeys(record["shift"] for record in report["records"]))
    named = [shift for shift in shifts if shift not in (base, ALL_SHIFTS)] if len(sets) > 1 else []
    shown = [(shift, subset) for shift in (base, ALL_SHIFTS) if shift in shifts for subset in report["subsets"]]
    for shift, subset in [*shown, *((shift, OVERALL) for shift in named)]:
        severity = 0 if shift == base else None
        name, members = place_name(sets, shift, severity), members_of(sets, shift, severity)
        for arm in report["arms"]:
            keys = [(arm, shift, severity, subset, metric) for metric in METRICS]
            if keys[0] not in records:  # no such rows there
                continue
            cells = tuple((_cell(records[key]), marks.get(key)) for key in keys)
            floor = records[keys[METRICS.index("ece")]].get("floor")
            yield _Row(name, subset, size(records[keys[0]]["n"], len(members)).text, arm, cells, floor)


def _floors(rows: list[_Row]) -> list[str]:
    """``   ECE of noise alone: softmax .021, posterior .034``"""
    known = [f"{row.arm} {_short(row.floor)}" for row in rows if row.floor is not None]
    return (
        textwrap.wrap(f"ECE of noise alone: {', '.join(known)}", 80, initial_indent="   ", subsequent_indent="   ")
        if known
        else []
    )


def _marked(text: str, mark: str | None) -> str:
    return f"**{text}**" if mark == BETTER else f"{text} {WORSE_SIGN}" if mark == WORSE else text


def _cell(record: Mapping[str, Any]) -> str:
    """``.912 [.905,.918]``: four of them fit beside each other."""
    if record["value"] is None:
        return "no rows"
    if record["low"] is None or record["high"] is None:
        return f"{_short(record['value'])} "
    value, low, high = (_short(record[name]) for name in ("value", "low", "high"))
    return f"{value} [{low},{high}]"


def _short(value: float) -> str:
    """As many decimals as fit in four characters, without a leading zero."""
    texts = [f"{value:.{decimals}f}" for decimals in (3, 2, 1, 0)]
    texts = [text.removeprefix("0") if "." in text else text for text in texts]
    return next((text for text in texts if len(text) <= 4), texts[-1])
