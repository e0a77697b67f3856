"""``moe-posterior evaluate --predictions``: the report of predictions in files."""

import argparse
import datetime
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from moe_posterior.audit.views.evidence import evidence_of
from moe_posterior.commands.evaluate import misplaced, parser
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.escape import terminal
from moe_posterior.evaluation.collect import Collector, Settings, Words
from moe_posterior.evaluation.decode import Decoder, Origin
from moe_posterior.evaluation.inputs import MODEL, Input, inputs_of, keys_of
from moe_posterior.evaluation.measure import settings_of
from moe_posterior.evaluation.result import CalibrationReport, require_own
from moe_posterior.evaluation.roles import Roles, recognised
from moe_posterior.evaluation.scan import Source, open_source
from moe_posterior.evaluation.survey import Survey, planned
from moe_posterior.report import render_table
from moe_posterior.report.about import read_about, with_facts
from moe_posterior.report.schema import Report

__all__ = ["evaluate", "report_of_files"]

Tick = Callable[[int], None]


def evaluate(arguments: list[str]) -> int:
    """Run ``moe-posterior evaluate --predictions`` with the given command-line arguments."""
    options = parser().parse_args(arguments)
    if wrong := misplaced(options):
        raise InvalidArgumentError(wrong)
    settings = settings_of(
        max_risk=options.max_risk,
        hold_out=options.hold_out,
        sample=options.sample,
        resamples=options.resamples,
        seed=options.seed,
        tolerance=options.tolerance,
    )
    about = None if options.about is None else read_about(options.about)
    log = None if options.audit_log is None else evidence_of(options.audit_log)
    require_own(options.out)
    console = Console()
    report = report_of_files(options, settings, console)
    command = ["moe-posterior", "evaluate", *arguments]
    report["identity"]["command"] = shlex.join(command)
    report["identity"]["date"] = datetime.date.today().isoformat()
    report = with_facts(report, about, log)
    folder = CalibrationReport(report).save(options.out)
    render_table(report, console)
    written = ["index.html", *sorted(one.name for one in folder.iterdir() if one.name != "index.html")]
    console.print(terminal(f"Report: {folder}{os.sep}{'  '.join(written)}"), markup=False)
    return 0


def report_of_files(options: argparse.Namespace, settings: Settings, console: Console) -> Report:
    """Two passes over the files: which rows there are, then the predictions."""
    inputs, ordered = inputs_of(options.predictions)
    opened = [(one, open_source(one.path)) for one in inputs]
    roles = _roles(opened, options)
    if roles.shift and any(one.shift for one, _ in opened):
        raise InvalidArgumentError("--shift must not be given with several files of a model, which are its shifts")
    if roles.model and any(one.model for one, _ in opened):
        raise InvalidArgumentError("--model must not be given with NAME=FILE, which names the model")
    console.print(terminal(f"Reading {roles.text()}"), markup=False)
    words = Words()
    widths: dict[str, int] = {}
    decoders = [
        (one, Decoder(source, roles, words, options.logits, options.class_names, widths)) for one, source in opened
    ]
    with _progress(console, [source for _, source in opened]) as (looking, reading):
        facts = _surveyed(decoders, settings, looking)
        keys = keys_of(facts, options.base, ordered)
        given = _calibrations(options, roles, words, widths)
        plan = planned(
            {keys[origin]: one.facts() for origin, one in facts.items()}, 0.0 if given else settings.hold_out
        )
        collector = Collector(plan, settings, words, calibrated=bool(given))
        for one, decoder in decoders:
            for origin, columns in decoder.pieces(reading):
                collector.add(keys[_placed(origin, one)], columns)
        for one, decoder in given:
            for origin, columns in decoder.pieces(lambda _: None):
                collector.calibrate(_placed(origin, one)[0] or MODEL, columns)
    report = collector.report()
    files = "; ".join(f"{one.path.name}" for one in inputs[:20]) + (
        f"; {len(inputs) - 20} more" if len(inputs) > 20 else ""
    )
    report["identity"]["data"] = {**report["identity"]["data"], "files": files}
    return report


def _roles(opened: Sequence[tuple[Input, Source]], options: argparse.Namespace) -> Roles:
    said = Roles(
        probs=[options.probs] if options.probs else (),
        labels=options.labels,
        confidence=options.confidence,
        correct=options.correct,
        predicted=options.predicted,
        groups=options.groups,
        shift=options.shift,
        severity=options.severity,
        model=options.model,
        weights=[options.weights] if options.weights else (),
        experts=[options.experts] if options.experts else (),
        configuration=options.configuration,
        rows=options.rows,
    )
    first = opened[0][1]
    roles = recognised(first.path, list(first.types), said, logits=options.logits)
    for _, source in opened[1:]:
        _require_columns(source, roles, first)
    return roles


def _require_columns(source: Source, roles: Roles, first: Source) -> None:
    for name in roles.columns():
        if name not in source.types:
            raise InvalidArgumentError(
                f"{source.path} has no column {name!r}, as {first.path} has; its columns are {', '.join(source.types)}"
            )


def _surveyed(decoders: Sequence[tuple[Input, Decoder]], settings: Settings, tick: Tick) -> dict[Origin, Survey]:
    facts: dict[Origin, Survey] = {}
    for one, decoder in decoders:
        for origin, n, target, row in decoder.survey(tick):
            facts.setdefault(_placed(origin, one), Survey(settings.seed)).add(n, target, row)
    if not facts:
        raise InvalidArgumentError(f"{decoders[0][0].path} must hold at least one row; got none")
    return facts


def _calibrations(
    options: argparse.Namespace, roles: Roles, words: Words, widths: dict[str, int]
) -> list[tuple[Input, Decoder]]:
    found = []
    for word in options.calibration or []:
        for one in inputs_of([word])[0]:
            source, own = open_source(one.path), roles.without_shifts()
            _require_columns(source, own, source)
            found.append((one, Decoder(source, own, words, options.logits, options.class_names, widths)))
    return found


def _placed(origin: Origin, one: Input) -> Origin:
    """What the columns say, and the file's name where they are silent."""
    model, shift, severity = origin
    return model or one.model or "", shift or one.shift or "", severity


@contextmanager
def _progress(console: Console, sources: Sequence[Source]) -> Iterator[tuple[Tick, Tick]]:
    rows = [source.rows for source in sources]
    total = None if None in rows else sum(row for row in rows if row is not None)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        tasks = [progress.add_task(f"{what:<12}", total=total) for what in ("counting", "reading rows")]

        def ticking(task: Any) -> Tick:
            return lambda n: progress.advance(task, n)

        yield ticking(tasks[0]), ticking(tasks[1])
