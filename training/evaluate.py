"""``moe-posterior evaluate``: a run's arms side by side, on the stored test rows and under every shift."""

import argparse
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moe_posterior.audit.views.evidence import evidence_of
from moe_posterior.calibrators import Calibrator
from moe_posterior.commands.evaluate import misplaced, parser
from moe_posterior.errors import InvalidArgumentError, MissingDataError
from moe_posterior.escape import terminal
from moe_posterior.files.atomic import copy, replacing_folder, write_text
from moe_posterior.files.tensorfile import save_plain
from moe_posterior.gates import BeliefGate
from moe_posterior.prediction import Prediction
from moe_posterior.report import posterior_heatmap, render_table
from moe_posterior.report.about import read_about, with_facts
from moe_posterior.report.schema import Report
from moe_posterior.report.sections import fit_calibrators
from moe_posterior.report.whole import report_of
from moe_posterior.report.writing import write_report
from moe_posterior.training.damage import (
    Recovery,
    recovery_figure,
    recovery_of,
    recovery_records,
    recovery_table,
)
from moe_posterior.training.data import ClassificationData, EvaluationSet
from moe_posterior.training.module import MoEClassifier
from moe_posterior.training.outputs import predict_split
from moe_posterior.training.own import folders_on_path, require_importable
from moe_posterior.training.provenance import identity_of, provenance_of
from moe_posterior.training.runs import Arm, Run
from moe_posterior.training.trained import load_data, load_model, read_config

LEAST_RESAMPLES = 100


def evaluate(arguments: list[str]) -> int:
    """Run ``moe-posterior evaluate`` with the given command-line arguments."""
    options = _parse(arguments)
    with folders_on_path(options.import_from):
        return _evaluate(options)


def _evaluate(options: argparse.Namespace) -> int:
    about = None if options.about is None else read_about(options.about)
    log = None if options.audit_log is None else evidence_of(options.audit_log)
    run = Run(options.run)
    arms = [run.arm(name) for name in run.experiment().chosen(options.arms)]
    if unfinished := [str(arm.folder) for arm in arms if not arm.finished]:
        raise MissingDataError(f"{', '.join(unfinished)} is not fully trained; run the same fit command to resume it")
    console = Console()
    data = _shared_data(arms)
    models = {arm.name: load_model(arm) for arm in arms}
    shifts = list(options.shifts if options.shifts is not None else data.default_shifts)
    sets = [(data.test_name, 0), *((shift, severity) for shift in shifts for severity in options.severities)]
    with run.locked(), _progress(console) as progress:
        validation = {name: predict_split(model, data.val_dataloader()) for name, model in models.items()}
        calibrators = {name: fit_calibrators(one) for name, one in validation.items()}
        predictions = _predictions(data, models, options, progress)
        found = report_of(
            predictions,
            validation,
            calibrators,
            data.subsets(),
            sets,
            resamples=options.resamples,
            seed=options.seed,
            tolerance=options.tolerance,
        )
        report: Report = {
            **found,
            "provenance": provenance_of(run, data, models, options),
            "identity": identity_of(arms, data, models, shifts),
        }
        report = with_facts(report, about, log)
        recoveries = []
        if options.damage:
            recoveries = [
                recovery_of(model, data.test_dataloader(), name, seed=options.seed) for name, model in models.items()
            ]
        folder = _write(run.folder / "report", report, models, calibrators, recoveries)
    render_table(report, console)
    if recoveries:
        console.print(terminal(recovery_table(recoveries)), markup=False, soft_wrap=True)
    written = ["index.html", "report.json", "table.md", "model_card.md", *sorted(p.name for p in folder.glob("*.png"))]
    console.print(terminal(f"Report: {folder}/{'  '.join(written)}"), markup=False)
    if options.copy_to:
        not_copied = shutil.ignore_patterns("*.pt")
        shutil.copytree(folder, options.copy_to, dirs_exist_ok=True, ignore=not_copied, copy_function=copy)
        console.print(terminal(f"Copied to {options.copy_to}"), markup=False)
    return 0


def _predictions(
    data: ClassificationData, models: Mapping[str, MoEClassifier], options: argparse.Namespace, progress: Progress
) -> Iterator[Prediction]:
    """The predictions of every arm on every evaluation set, one after the other."""
    shifts = data.default_shifts if options.shifts is None else options.shifts
    task = progress.add_task("evaluating", total=(1 + len(shifts) * len(options.severities)) * len(models))
    for item in data.evaluation_sets(options.shifts, options.severities):
        for name, model in models.items():
            what = terminal(" ".join(str(part) for part in (item.shift, item.severity or "", name) if part))
            progress.update(task, description=what)
            if not progress.console.is_terminal:  # a log file shows no bar
                progress.console.print(f"evaluating {what}", markup=False)
            yield predict(model, name, item)
            progress.advance(task)


def predict(model: MoEClassifier, arm: str, item: EvaluationSet) -> Prediction:
    """The predictions of one arm on one evaluation set."""
    return replace(predict_split(model, item.loader), arm=arm, shift=item.shift, severity=item.severity)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    options = parser().parse_args(arguments)
    if wrong := misplaced(options):
        raise InvalidArgumentError(wrong)
    options.severities = sorted(set(options.severities))
    if options.resamples < LEAST_RESAMPLES:
        raise InvalidArgumentError(
            f"--resamples must be at least {LEAST_RESAMPLES}, fewer say nothing about a 95 % interval; got {options.resamples}"
        )
    return options


def _shared_data(arms: Sequence[Arm]) -> ClassificationData:
    """The data module that all arms share."""
    configs = [read_config(arm) for arm in arms]
    for arm, config in zip(arms, configs, strict=True):
        require_importable(config, arm.config)
    settings = [config.get("data") for config in configs]
    if any(other != settings[0] for other in settings):
        raise InvalidArgumentError(
            "arms must share their data settings to be compared; evaluate them one by one with --arms"
        )
    return load_data(arms[0])


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description:<28}", markup=False), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)


def _write(
    folder: Path,
    report: Report,
    models: dict[str, MoEClassifier],
    calibrators: dict[str, dict[str, Calibrator]],
    recoveries: Sequence[Recovery],
) -> Path:
    """Write the whole report, or leave the earlier one as it was: tables and figures belong together."""
    with replacing_folder(folder) as draft:
        write_report(report, draft)
        for name, model in models.items():
            gate = model.moe.gate
            if isinstance(gate, BeliefGate):
                observed = gate.posterior.successes + gate.posterior.failures
                posterior_heatmap(gate.posterior.mean(), observed, draft / f"competence-{name}.png")
        if recoveries:
            recovery_figure(recoveries, draft / "damage.png")
            write_text(draft / "damage.md", recovery_table(recoveries))
            write_text(draft / "damage.json", json.dumps(recovery_records(recoveries), indent=2) + "\n")
        for name, kinds in calibrators.items():
            save_plain(draft / f"calibrators-{name}.pt", {kind: one.state_dict() for kind, one in kinds.items()})
    return folder
