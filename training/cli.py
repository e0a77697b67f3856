"""``moe-posterior fit``: train the arms of an experiment through LightningCLI."""

import argparse
import os
import pickle
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from rich.console import Console

from moe_posterior.atomic import write_text
from moe_posterior.errors import InvalidArgumentError, MissingDataError
from moe_posterior.escape import terminal
from moe_posterior.training.callbacks import CompetenceUpdates, WarmupCheckpoint, WholeCheckpoints
from moe_posterior.training.data import ClassificationData
from moe_posterior.training.divergence import StopWhereDiverged, require_finite
from moe_posterior.training.log import MetricsFile
from moe_posterior.training.module import MoEClassifier
from moe_posterior.training.runs import Arm, Experiment, Run, merge, read_experiment, require_folder_name

FIT_HELP = """
Train the arms of an experiment, one after the other, from the same seed.

An experiment file is a LightningCLI configuration (model, data, trainer, seed_everything, competence) with two more keys:
'name', the run's folder, and 'arms', a mapping from names to what each arm sets differently, usually model.gate. Classes are
named by class_path, so your own data module, backbone or gate needs no registration.

A run that was interrupted goes on from its last epoch when the same command is given again; finished arms are left as they are.
"""
FIT_EXAMPLES = """
examples:
  moe-posterior fit --config configs/demo.yaml                                  both gates on scikit-learn's digits, a minute
  moe-posterior fit --config configs/cifar10h.yaml --arms posterior             one arm only
  moe-posterior fit --config configs/demo.yaml --name try --trainer.max_epochs 3 --data.batch_size 32
                                                                 any further option is a setting, and holds for every arm
  moe-posterior fit --config configs/demo.yaml --print_config                   the complete configuration with all defaults
"""


class _Progress(RichProgressBar):
    """Without the loggers' version number: the run's name says which run it is."""

    def get_metrics(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics


def _metrics_file(arm: Arm) -> dict[str, Any]:
    return {"class_path": f"{MetricsFile.__module__}.{MetricsFile.__name__}", "init_args": {"folder": str(arm.figures)}}


def _tensorboard(arm: Arm) -> dict[str, Any]:
    folder = {"save_dir": str(arm.folder), "name": "", "version": "tensorboard"}
    return {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": folder}


class ExperimentCLI(LightningCLI):
    """LightningCLI with a MoEClassifier, any data module of this library's kind, and the competence updates."""

    def __init__(self, arm: Arm, args: list[str], *, run: bool) -> None:
        self.arm = arm
        # LightningCLI suspects a mistake where it finds arguments on the command line as well; ours are read already.
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
        super().__init__(
            MoEClassifier,
            ClassificationData,
            subclass_mode_data=True,
            save_config_callback=None,
            seed_everything_default=42,
            trainer_defaults={
                "default_root_dir": str(arm.folder),
                "callbacks": [
                    _Progress(),
                    StopWhereDiverged(f"arm {arm.name!r}"),
                    WarmupCheckpoint(arm.folder / "checkpoints"),
                    ModelCheckpoint(arm.folder / "checkpoints", save_last=True, monitor="val/nll", filename="best"),
                ],
                "plugins": [{"class_path": f"{WholeCheckpoints.__module__}.{WholeCheckpoints.__name__}"}],
                "logger": [_metrics_file(arm), _tensorboard(arm)],
            },
            args=args,
            run=run,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
        parser.link_arguments("data.num_groups", "model.num_groups", apply_on="instantiate")
        parser.add_lightning_class_args(CompetenceUpdates, "competence")


def fit(arguments: list[str]) -> int:
    """Run ``moe-posterior fit`` with the given command-line arguments."""
    parser = argparse.ArgumentParser(
        "moe-posterior fit",
        description=FIT_HELP,
        epilog=FIT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="experiment file (YAML)")
    parser.add_argument("--name", help="folder of the run, instead of the experiment's own name")
    parser.add_argument("--run-dir", default="runs", metavar="DIR", help="where runs live (default: %(default)s)")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="train only these arms")
    parser.add_argument("--overwrite", action="store_true", help="start over instead of going on with an existing run")
    parser.add_argument("--print_config", action="store_true", help="print what an arm is trained with, and stop")
    options, settings = parser.parse_known_args(arguments)

    experiment = read_experiment(options.config).override(parse_settings(settings))
    arms = chosen(options.arms, list(experiment.arms))
    if options.name is not None:
        require_folder_name(options.name, "--name")
    run = Run(Path(options.run_dir) / (options.name or experiment.name))
    if options.print_config:
        return print_config(experiment, arms[0])
    console = Console()
    if is_launched_rank():
        for name in arms:
            train(run.arm(name), console, run.origin(experiment, name))
        return 0
    with run.locked():
        origins = {name: run.origin(experiment, name) for name in arms}
        run.prepare(experiment, overwrite=options.overwrite, arms=options.arms)
        for name, origin in origins.items():
            train(run.arm(name), console, origin)
    console.print(
        terminal(f"Trained: {run.folder}. Evaluate it with: moe-posterior evaluate --run {run.folder}"), markup=False
    )
    return 0


def is_launched_rank() -> bool:
    """Whether this process is one of several that a launcher started beside the first, which holds the lock and the folder."""
    return any(os.environ.get(name, "0") != "0" for name in ("LOCAL_RANK", "RANK", "SLURM_PROCID"))


def train(arm: Arm, console: Console, origin: Arm | None = None) -> None:
    """Train one arm to its end, from its last checkpoint if there is one, else from the end of the origin's warm-up if it has one.

    Raises:
        InvalidArgumentError: the last checkpoint cannot be read. KeyboardInterrupt: training was stopped before its end.
    """
    if arm.finished:
        console.print(terminal(f"{arm.folder} is trained already"), markup=False)
        return
    args, done = ["fit", "--config", str(arm.config)], 0
    if arm.checkpoint.is_file():
        done = read_checkpoint(arm)["global_step"]
        console.print(terminal(f"{arm.folder} goes on from {arm.checkpoint}"), markup=False)
        args += ["--ckpt_path", str(arm.checkpoint)]
    elif origin is not None:
        if not origin.warmup.is_file():
            raise MissingDataError(
                f"{arm.folder} branches from {origin.warmup}, which is not there: train {origin.name!r} first, its method "
                "with the same warmup_epochs"
            )
        console.print(terminal(f"{arm.folder} branches from {origin.warmup}"), markup=False)
        args += ["--ckpt_path", str(origin.warmup)]
    else:
        console.print(terminal(f"{arm.folder} starts"), markup=False)
    if not is_launched_rank():
        MetricsFile(str(arm.figures)).keep_before(done)
    started = time.monotonic()
    try:
        cli = ExperimentCLI(arm, args, run=True)
        trainer = cli.trainer
    except SystemExit as stop:
        if stop.code == 2:  # a mistake in the configuration, already explained
            raise
        raise KeyboardInterrupt from stop  # Lightning leaves like this on Ctrl-C and on SIGTERM
    if trainer.interrupted or is_launched_rank():
        if trainer.interrupted:
            raise KeyboardInterrupt
        return
    require_finite(dict(cli.model.named_parameters()), f"arm {arm.name!r}", trainer.current_epoch)
    seconds = time.monotonic() - started
    arm.finish(
        {
            "epochs": trainer.current_epoch,
            "steps": trainer.global_step,
            "seconds_of_last_session": round(seconds, 1),
            "torch": torch.__version__,
            "lightning": version("lightning"),
        }
    )


def read_checkpoint(arm: Arm) -> dict[str, Any]:
    """The arm's last checkpoint, opened without running code from it.

    Raises:
        InvalidArgumentError: it is missing or damaged.
    """
    try:
        return torch.load(arm.checkpoint, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise InvalidArgumentError(
            f"{arm.checkpoint} cannot be read ({type(error).__name__}); delete it, or train anew with --overwrite"
        ) from error


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """``--a.b 1 --c=x`` as a nested mapping, values read as YAML.

    Raises:
        InvalidArgumentError: something that is neither an option nor an option's value.

    >>> parse_settings(["--trainer.max_epochs", "3", "--model.lr=1e-2"])
    {'trainer': {'max_epochs': 3}, 'model': {'lr': '1e-2'}}
    """
    nested: dict[str, Any] = {}
    words = iter(settings)
    for word in words:
        key, equals, text = word.removeprefix("--").partition("=")
        value = text if equals else next(words, None)
        if not word.startswith("--") or not key or value is None:
            raise InvalidArgumentError(f"settings must read --key value or --key=value; got {word!r}")
        try:
            leaf: Any = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InvalidArgumentError(f"{word} must have a YAML value; got {value!r}") from error
        for part in reversed(key.split(".")):
            leaf = {part: leaf}
        nested = merge(nested, leaf)
    return nested


def chosen(wanted: list[str] | None, arms: list[str]) -> list[str]:
    """The wanted arms in the experiment's order, all if None.

    Raises:
        InvalidArgumentError: an arm the experiment does not have.
    """
    if unknown := [name for name in wanted or [] if name not in arms]:
        raise InvalidArgumentError(f"arms must be among {arms}; got {unknown}")
    return [name for name in arms if wanted is None or name in wanted]


def print_config(experiment: Experiment, arm_name: str) -> int:
    """Print the complete configuration of an arm, every default filled in."""
    with tempfile.TemporaryDirectory() as folder:
        arm = Arm(arm_name, Path(folder))
        write_text(arm.config, yaml.safe_dump(experiment.config(arm_name)))
        ExperimentCLI(arm, ["fit", "--config", str(arm.config), "--print_config"], run=True)
    return 0
