"""``moe-posterior fit``: train the arms of an experiment through LightningCLI."""

import os
import shlex
import tempfile
import time
import warnings
from argparse import ArgumentError
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from rich.console import Console

from moe_posterior.commands.fit import parser
from moe_posterior.errors import DamagedFileError, InvalidArgumentError, MissingDataError
from moe_posterior.escape import terminal
from moe_posterior.files.atomic import write_text
from moe_posterior.files.reading import decoding, one_line, read_mapping
from moe_posterior.files.torchfile import load_plain, read_plain_file
from moe_posterior.training.callbacks import CompetenceUpdates, WarmupCheckpoint, WholeCheckpoints
from moe_posterior.training.data import ClassificationData
from moe_posterior.training.divergence import StopWhereDiverged, require_finite
from moe_posterior.training.log import MetricsFile
from moe_posterior.training.module import MoEClassifier
from moe_posterior.training.own import folders_on_path, own_classes, without_folder
from moe_posterior.training.runs import Arm, Experiment, Run, merge, read_experiment, require_folder_name


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
            parser_kwargs={"exit_on_error": False, "fit": {"exit_on_error": False}}
            if run
            else {"exit_on_error": False},
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Read the configuration, and say in one line what is wrong with it.

        Raises:
            InvalidArgumentError: it is no configuration of a MoEClassifier, its data and its trainer.
        """
        try:
            super().parse_arguments(parser, args)
        except (ArgumentError, TypeError, ValueError, ImportError, AttributeError) as error:
            where = self.arm.config if self.arm.config.is_file() else shlex.join(args)
            raise InvalidArgumentError(f"{where} cannot be used: {one_line(error)}") from error

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
        parser.link_arguments("data.num_groups", "model.num_groups", apply_on="instantiate")
        parser.add_lightning_class_args(CompetenceUpdates, "competence")


def fit(arguments: list[str]) -> int:
    """Run ``moe-posterior fit`` with the given command-line arguments."""
    with folders_on_path(["."]):
        return _fit(arguments)


def _fit(arguments: list[str]) -> int:
    if (asked := class_help(arguments)) is not None:
        with tempfile.TemporaryDirectory() as folder:
            ExperimentCLI(Arm("help", Path(folder)), ["fit", *asked], run=True)
    options, settings = parser().parse_known_args(arguments)

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
    console.print(terminal(f"Trained: {run.folder}. Evaluate it with:"), markup=False, highlight=False)
    console.print(f"  {terminal(evaluate_command(run, experiment))}", markup=False, highlight=False, soft_wrap=True)
    return 0


def evaluate_command(run: Run, experiment: Experiment) -> str:
    """The command that evaluates what is trained of a run, as it can be copied to a shell in this folder."""
    trained = [name for name in experiment.arms if run.arm(name).finished]
    words = ["moe-posterior", "evaluate", "--run", str(run.folder)]
    words += ["--arms", *trained] if len(trained) < len(experiment.arms) else []
    with without_folder("."):
        own = [name for arm in trained for name in own_classes(experiment.config(arm))]
    return shlex.join([*words, *(["--import-from", "."] if own else [])])


def class_help(arguments: list[str]) -> list[str] | None:
    """The words of a call such as ``--data.help PACS`` or ``--model.method.help=Robust``; None where there is none.

    Without a class, and with an experiment file, the class is the one that the file names there.

    >>> class_help(["--name", "x", "--data.help", "PACS"]), class_help(["--name", "x"])
    (['--data.help', 'PACS'], None)
    """
    for place, word in enumerate(arguments):
        option, equals, named = word.partition("=")
        if not option.startswith("--") or not option.endswith(".help"):
            continue
        following = arguments[place + 1 : place + 2]
        if not equals and following and not following[0].startswith("-"):
            named = following[0]
        return [option, *([named] if named else _configured(arguments, option.removeprefix("--").split(".")[:-1]))]
    return None


def _configured(arguments: list[str], keys: list[str]) -> list[str]:
    """The class that the experiment file given among the arguments names under these keys, if it does."""
    options, _ = parser().parse_known_args(
        [*arguments, *([] if "--config" in " ".join(arguments) else ["--config", ""])]
    )
    if not options.config:
        return []
    experiment = read_experiment(options.config)
    found: Any = experiment.config(chosen(options.arms, list(experiment.arms))[0])
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return [found["class_path"]] if isinstance(found, dict) and "class_path" in found else []


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
        done = read_checkpoint(arm.checkpoint)["global_step"]
        console.print(terminal(f"{arm.folder} goes on from {arm.checkpoint}"), markup=False)
        args += ["--ckpt_path", str(arm.checkpoint)]
    elif origin is not None:
        if not origin.warmup.is_file():
            raise MissingDataError(
                f"{arm.folder} branches from {origin.warmup}, which is not there: train {origin.name!r} first, its method "
                "with the same warmup_epochs"
            )
        read_checkpoint(origin.warmup)
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


PARTS = {  # of a checkpoint that training goes on from, and their types
    "state_dict": Mapping,
    "epoch": int,
    "global_step": int,
    "loops": Mapping,
    "callbacks": Mapping,
    "optimizer_states": list,
    "lr_schedulers": list,
    "pytorch-lightning_version": str,
}


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of an arm, opened without running code from it.

    Raises:
        MissingDataError: there is none.
        DamagedFileError, InvalidArgumentError: it is torn, or not a checkpoint that training or evaluation can go on from.
    """
    advice = "delete it, or train anew with --overwrite"
    with decoding(path, "a checkpoint that can be read", advice, InvalidArgumentError):
        content = load_plain(read_plain_file(path), path)
    for name, kind in PARTS.items():
        if not isinstance(content, Mapping) or not isinstance(content.get(name), kind):
            raise DamagedFileError(f"{path} must be a checkpoint of an arm; it holds no {name}; {advice}")
    if not all(isinstance(value, torch.Tensor) for value in content["state_dict"].values()):
        raise DamagedFileError(f"{path} must hold tensors alone in its state_dict; {advice}")
    return dict(content)


def read_config(arm: Arm) -> dict[str, Any]:
    """What an arm was trained with.

    Raises:
        MissingDataError: there is none. DamagedFileError: it cannot be read.
    """
    return read_mapping(arm.config, "the fit command that made the run writes it again")


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
