"""Where a report comes from: the command, the software, the model's checkpoint and the data."""

import argparse
import datetime
import hashlib
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch

from moe_posterior.report.schema import Identity
from moe_posterior.training.data import ClassificationData
from moe_posterior.training.module import MoEClassifier
from moe_posterior.training.runs import Arm, Run

__all__ = ["evaluated_on", "identity_of", "provenance_of"]


def provenance_of(
    run: Run, data: ClassificationData, models: Mapping[str, MoEClassifier], options: argparse.Namespace
) -> dict[str, Any]:
    """The command, configuration and software, with which the report can be made again."""
    experiment = run.experiment()
    command = ["moe-posterior", "evaluate", "--run", os.path.relpath(options.run)]
    command += ["--resamples", str(options.resamples), "--seed", str(options.seed)]
    for option, words in (
        ("--arms", options.arms),
        ("--shifts", options.shifts),
        ("--import-from", options.import_from),
    ):
        command += [option, *words] if words or (words is not None and option == "--shifts") else []
    command += ["--severities", *map(str, options.severities), "--tolerance", str(options.tolerance)]
    for option, place in (("--about", options.about), ("--audit-log", options.audit_log)):
        command += [option, os.path.relpath(place)] if place is not None else []
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


def identity_of(
    arms: Sequence[Arm], data: ClassificationData, models: Mapping[str, MoEClassifier], shifts: Sequence[str]
) -> Identity:
    """Which model on which data this is."""
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
            "evaluation": f"{data.name}, {sizes['test']:,} test rows, " + evaluated_on(data, shifts),
        },
        "seed": data.seed,
        "date": datetime.date.today().isoformat(),
    }


def evaluated_on(data: ClassificationData, shifts: Sequence[str]) -> str:
    """How the test rows are distributed, and the shifts they were evaluated under."""
    stored = "distributed as the training rows" if data.test_shift is None else f"all under a shift: {data.test_shift}"
    return stored + (f"; also under {', '.join(shifts)}" if shifts else "; no further shift was evaluated")
