"""``moe-posterior evaluate``: a run's arms side by side, on the stored test rows and under every shift."""

import argparse
import datetime
import hashlib
import os
import platform
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moe_posterior.calibrators import Calibrator
from moe_posterior.commands.evaluate import parser
from moe_posterior.errors import InvalidArgumentError, MissingDataError
from moe_posterior.escape import terminal
from moe_posterior.files.atomic import copy, replacing_folder, write_text
from moe_posterior.files.tensorfile import save_plain
from moe_posterior.gates import BeliefGate
from moe_posterior.training.data import ClassificationData, EvaluationSet
from moe_posterior.training.module import MoEClassifier
from moe_posterior.training.outputs import predict_split
from moe_posterior.training.own import folders_on_path, require_importable
from moe_posterior.training.prediction import Prediction, joined
from moe_posterior.training.report import (
    evaluate_predictions,
    posterior_heatmap,
    reliability_diagram,
    render_table,
    to_card,
    to_html,
    to_markdown,
    write_json,
)
from moe_posterior.training.report.compute import OVERALL, is_everything, panels_of
from moe_posterior.training.report.promise import Scored
from moe_posterior.training.report.sections import fit_calibrators, further_sections, scored
from moe_posterior.training.runs import Arm, Run
from moe_posterior.training.trained import load_data, load_model, read_config

LEAST_RESAMPLES = 100
SEVERE = 3  # severities from here on are pooled for curves and calibrators


def evaluate(arguments: list[str]) -> int:
    """Run ``moe-posterior evaluate`` with the given command-line arguments."""
    options = _parse(arguments)
    with folders_on_path(options.import_from):
        return _evaluate(options)


def _evaluate(options: argparse.Namespace) -> int:
    run = Run(options.run)
    arms = [run.arm(name) for name in run.experiment().chosen(options.arms)]
    if unfinished := [str(arm.folder) for arm in arms if not arm.finished]:
        raise MissingDataError(f"{', '.join(unfinished)} has not been trained to its end; the same fit command goes on")
    console = Console()
    data = _shared_data(arms)
    models = {arm.name: load_model(arm) for arm in arms}
    masks = {name: mask for name, mask in data.subsets().items() if name != OVERALL}
    subsets = {name: mask for name, mask in masks.items() if not is_everything(mask)}
    sets = list(options.shifts if options.shifts is not None else data.default_shifts)
    total = (1 + len(sets) * len(options.severities)) * len(models)
    with run.locked(), _progress(console) as progress:
        task = progress.add_task("evaluating", total=total)

        planned = [(data.test_name, 0), *((shift, severity) for shift in sets for severity in options.severities)]
        panel_of = panels_of(planned, SEVERE)
        judged: dict[str, dict[str, list[Prediction]]] = {}  # panel -> arm -> evaluation sets
        acted: dict[str, list[Scored]] = {name: [] for name in models}

        def predictions() -> Iterator[Prediction]:
            for item in data.evaluation_sets(options.shifts, options.severities):
                for name, model in models.items():
                    what = " ".join(str(part) for part in (item.shift, item.severity or "", name) if part)
                    progress.update(task, description=terminal(what))
                    if not console.is_terminal:  # a log file shows no bar
                        console.print(terminal(f"evaluating {what}"), markup=False)
                    prediction = predict(model, name, item)
                    acted[name].append(scored(prediction))
                    if panel := panel_of.get((item.shift, item.severity)):
                        judged.setdefault(panel, {}).setdefault(name, []).append(prediction)
                    yield prediction
                    progress.advance(task)

        report = evaluate_predictions(
            predictions(),
            masks,
            resamples=options.resamples,
            seed=options.seed,
            baseline=_baseline(list(models)),
            shifted_from=SEVERE,
        )
        validation = {name: predict_split(model, data.val_dataloader()) for name, model in models.items()}
        panels = {panel: {name: joined(parts) for name, parts in arms.items()} for panel, arms in judged.items()}
        calibrators = {name: fit_calibrators(one) for name, one in validation.items()}
        report |= further_sections(
            calibrators, validation, panels, subsets, base=data.test_name, sets=acted, seed=options.seed
        )
        report["provenance"] = _provenance(run, data, models, options)
        report["identity"] = _identity(arms, data, models, sets)
        folder = _write(run.folder / "report", report, models, calibrators)
    render_table(report, console)
    written = ["index.html", "report.json", "table.md", "model_card.md", *sorted(p.name for p in folder.glob("*.png"))]
    console.print(terminal(f"Report: {folder}/{'  '.join(written)}"), markup=False)
    if options.copy_to:
        not_copied = shutil.ignore_patterns("*.pt")
        shutil.copytree(folder, options.copy_to, dirs_exist_ok=True, ignore=not_copied, copy_function=copy)
        console.print(terminal(f"Copied to {options.copy_to}"), markup=False)
    return 0


def predict(model: MoEClassifier, arm: str, item: EvaluationSet) -> Prediction:
    """What one arm says of one evaluation set."""
    return replace(predict_split(model, item.loader), arm=arm, shift=item.shift, severity=item.severity)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    options = parser().parse_args(arguments)
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


def _baseline(arms: list[str]) -> str:
    return "softmax" if "softmax" in arms else arms[0]


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description:<28}", markup=False), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)


def _provenance(
    run: Run, data: ClassificationData, models: dict[str, MoEClassifier], options: argparse.Namespace
) -> dict[str, Any]:
    """What made this report, so that it can be made again."""
    experiment = run.experiment()
    command = ["moe-posterior", "evaluate", "--run", os.path.relpath(options.run)]
    command += ["--resamples", str(options.resamples), "--seed", str(options.seed)]
    for option, words in (
        ("--arms", options.arms),
        ("--shifts", options.shifts),
        ("--import-from", options.import_from),
    ):
        command += [option, *words] if words or (words is not None and option == "--shifts") else []
    command += ["--severities", *map(str, options.severities)]
    return {
        "command": shlex.join(command),
        "data": data.name,
        "gates": {
            name: f"{type(model.moe.gate).__name__}({model.moe.gate.extra_repr()})" for name, model in models.items()
        },
        "experiment": {"name": experiment.name, "arms": experiment.arms, **experiment.base},
        "versions": {name: version(name) for name in ("moe-posterior", "torch", "lightning", "torchmetrics")},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {'GPU' if torch.cuda.is_available() else 'no GPU'}",
    }


def _identity(
    arms: Sequence[Arm], data: ClassificationData, models: dict[str, MoEClassifier], shifts: Sequence[str]
) -> dict[str, Any]:
    """What a reader must know to say which model on which data this is."""
    checkpoints = {arm.name: hashlib.sha256(arm.checkpoint.read_bytes()).hexdigest()[:12] for arm in arms}
    backbone = type(next(iter(models.values())).backbone).__name__
    sizes = {part: len(data.split(part)) for part in ("train", "val", "test")}
    return {
        "routing": {
            name: f"{type(model.moe.gate).__name__}, top {model.moe.gate.top_k} of {model.moe.gate.num_experts} experts"
            for name, model in models.items()
        },
        "model": f"{backbone}; "
        + ", ".join(f"{name}: checkpoint sha256 {digest}" for name, digest in checkpoints.items()),
        "data": {
            "training": f"{data.name}, {sizes['train']:,} rows, split seed {data.seed}",
            "validation": f"{data.name}, {sizes['val']:,} rows held out of training",
            "evaluation": f"{data.name}, {sizes['test']:,} test rows, " + _evaluated(data, shifts),
        },
        "seed": data.seed,
        "date": datetime.date.today().isoformat(),
    }


def _evaluated(data: ClassificationData, shifts: Sequence[str]) -> str:
    """What the test rows are, and the shifts that they were evaluated under, if any."""
    stored = "distributed as the training rows" if data.test_shift is None else f"all under a shift: {data.test_shift}"
    return stored + (f"; also under {', '.join(shifts)}" if shifts else "; no further shift was evaluated")


def _write(
    folder: Path, report: dict, models: dict[str, MoEClassifier], calibrators: dict[str, dict[str, Calibrator]]
) -> Path:
    """A whole report in place of an earlier one, or that one as it was: tables and figures belong together."""
    with replacing_folder(folder) as draft:
        write_json(report, draft / "report.json")
        write_text(draft / "table.md", to_markdown(report).rstrip() + "\n")
        write_text(draft / "index.html", to_html(report))
        write_text(draft / "model_card.md", to_card(report))
        reliability_diagram(report, draft / "reliability.png")
        for name, model in models.items():
            gate = model.moe.gate
            if isinstance(gate, BeliefGate):
                observed = gate.posterior.successes + gate.posterior.failures
                posterior_heatmap(gate.posterior.mean(), observed, draft / f"competence-{name}.png")
        for name, kinds in calibrators.items():
            save_plain(draft / f"calibrators-{name}.pt", {kind: one.state_dict() for kind, one in kinds.items()})
    return folder
