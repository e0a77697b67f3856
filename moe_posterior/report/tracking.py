"""A report in an experiment tracker, in one call: metrics, parameters, and the report's folder as artifacts."""

import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

from moe_posterior.errors import InvalidArgumentError, MissingDependencyError
from moe_posterior.report.marks import is_main
from moe_posterior.report.places import place_name, sets_of
from moe_posterior.report.schema import Report
from moe_posterior.report.tables import identity_values
from moe_posterior.report.verdict import verdict_of
from moe_posterior.report.writing import write_report

__all__ = ["log_report", "metrics_of", "parameters_of"]

FOLDER = "calibration_report"  # of the artifacts
MOST = 500  # characters of a parameter: the least that trackers take


def log_report(report: Report, to: Any, *, folder: str | os.PathLike[str] | None = None) -> str:
    """Log a report to MLflow or to Weights & Biases.

    Args:
        report: a computed report.
        to: "mlflow" or "wandb", which take the active run or start one and end it; or a run of theirs (from ``mlflow.start_run()``
            or ``wandb.init()``), which stays open.
        folder: the report's files, where they are written already; by default they are written anew for the upload.

    Returns:
        The run's id.

    Raises:
        InvalidArgumentError: ``to`` is none of these.
        MissingDependencyError: the tracker is not installed.
    """
    with tempfile.TemporaryDirectory() as made:
        place = Path(made if folder is None else folder)
        if folder is None:
            write_report(report, place)
        if to == "mlflow":
            return _mlflow(report, None, place)
        if to == "wandb":
            return _wandb(report, None, place)
        if hasattr(getattr(to, "info", None), "run_id"):
            return _mlflow(report, to.info.run_id, place)
        if all(hasattr(to, name) for name in ("log_artifact", "summary", "config")):
            return _wandb(report, to, place)
    raise InvalidArgumentError(f"to must be 'mlflow', 'wandb' or a run of theirs; got {type(to).__name__} {to!r:.60}")


def metrics_of(report: Report) -> dict[str, float]:
    """Every value of the main table and of the action threshold, by a path that trackers group by.

    >>> record = {"arm": "a", "shift": "clean", "severity": 0, "subset": "overall", "metric": "ece", "value": 0.02}
    >>> metrics_of({"arms": ["a"], "records": [record | {"low": 0.0, "high": 0.04}]})
    {'clean/overall/a/ece': 0.02, 'clean/overall/a/ece_low': 0.0, 'clean/overall/a/ece_high': 0.04}
    """
    found: dict[str, float] = {}
    for name, value in _metrics(report):
        found[_unused(name, found)] = value
    return found


def _metrics(report: Report) -> Iterator[tuple[str, float]]:
    sets = sets_of(report)
    for record in report.get("records") or []:
        if is_main(record):
            place = place_name(sets, record["shift"], record["severity"])
            path = _path(place, record["subset"], record["arm"], record["metric"])
            for suffix, value in (("", record["value"]), ("_low", record["low"]), ("_high", record["high"])):
                if value is not None:
                    yield path + suffix, float(value)
    for one in verdict_of(report).arms:
        for name in ("threshold", "risk", "coverage"):
            if (value := getattr(one, name)) is not None:
                yield _path("action", one.arm, name), float(value)


def parameters_of(report: Report) -> dict[str, str]:
    """What was evaluated and how, and the verdict's words.

    >>> parameters_of({"arms": ["a"], "n_bins": 15})["verdict/a/usable"]
    'not measured'
    """
    found: dict[str, Any] = {name: report.get(name) for name in ("schema", "n_bins", "resamples", "seed", "baseline")}
    found |= {_path(name): text for name, text in identity_values(report).items()}
    verdict = verdict_of(report)
    for one in verdict.arms:
        found |= {_path("verdict", one.arm, "usable"): one.usable, _path("verdict", one.arm, "acting"): one.acting}
    found["verdict/preferred"] = verdict.preferred
    return {name: str(value)[:MOST] for name, value in found.items() if value is not None}


def _path(*parts: str) -> str:
    """Parts joined by slashes, with nothing in them that a tracker refuses."""
    return "/".join(re.sub(r"[^\w. -]+", "_", part, flags=re.ASCII).strip() or "_" for part in parts)


def _unused(name: str, taken: Mapping[str, Any]) -> str:
    """The name, or the first of name_2, name_3, …: unlike groups may differ only in what a tracker refuses."""
    if name not in taken:
        return name
    return next(tried for number in count(2) if (tried := f"{name}_{number}") not in taken)


def _mlflow(report: Report, run_id: str | None, folder: Path) -> str:
    mlflow = _module("mlflow")
    started = None
    if run_id is None:
        run = mlflow.active_run()
        if run is None:
            run = started = mlflow.start_run(run_name="calibration report")
        run_id = run.info.run_id
    try:
        client = mlflow.MlflowClient()
        for name, text in parameters_of(report).items():
            client.log_param(run_id, name, text)
        for name, value in metrics_of(report).items():
            client.log_metric(run_id, name, value)
        client.set_tag(run_id, "verdict", str(verdict_of(report)))
        client.log_artifacts(run_id, str(folder), artifact_path=FOLDER)
    finally:
        if started is not None:
            mlflow.end_run()
    return str(run_id)


def _wandb(report: Report, run: Any, folder: Path) -> str:
    wandb = _module("wandb")
    started = None
    if run is None and (run := wandb.run) is None:
        run = started = wandb.init(job_type="calibration report")
    try:
        run.config.update(parameters_of(report), allow_val_change=True)
        values: Mapping[str, Any] = {**metrics_of(report), "verdict/text": str(verdict_of(report))}
        run.summary.update(values)
        artifact = wandb.Artifact(f"{FOLDER}-{run.id}", type="report")
        artifact.add_dir(str(folder))
        run.log_artifact(artifact)
    finally:
        if started is not None:
            started.finish()
    return str(run.id)


def _module(name: str) -> ModuleType:
    try:
        return __import__(name)
    except ImportError as error:
        raise MissingDependencyError(name, "tracking") from error
